"""Searches that can be interrupted: an optuna study in a file, marked with what it searches."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, InvalidFile, MissingExtra


def open_study(name: str, about: str, path: Path | None, objectives: int = 1) -> Any:
    """A study to be minimised; from a file it goes on where it stood.

    Args:
        name: Of the study, in the file.
        about: What is searched, as text: a file that holds another search is refused.
        path: The file, a journal that several processes may write; None keeps the study in memory.
        objectives: How many values a trial has.

    Raises:
        InvalidArgument: The file holds the study of another search.
        InvalidFile: Its folder does not exist.
        MissingExtra: optuna is not installed.
    """
    optuna = load_optuna()
    storage = None
    if path is not None:
        if not path.absolute().parent.is_dir():
            raise InvalidFile(f"{path}: there is no such folder")
        journal = optuna.storages.journal
        storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * objectives, load_if_exists=path is not None
    )
    mark = hashlib.sha256(about.encode()).hexdigest()
    if study.user_attrs.get("search", mark) != mark:
        raise InvalidArgument(f"{path} holds the study of another search; give another file")
    study.set_user_attr("search", mark)
    return study


def load_optuna() -> Any:
    """optuna, quiet.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("optuna is not installed: pip install 'graphwright[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
