"""Where a long training keeps what it has, so that an interrupted one goes on.

A folder of safetensors files and one JSON file that names them. The JSON file is written last and replaced at once, so
whatever moment it stops at, the folder holds the last complete state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InvalidFile, StaleProfile
from ..replace_files import replacing_file

_RECORD = "training.json"


class TrainingFolder:
    """The state of one training.

    Args:
        path: The folder; made where it is not there. None keeps nothing.
        made_for: What the training is of (weights, data, options); a folder that is of something else is refused.

    Raises:
        StaleProfile: The folder holds another training.
        InvalidFile: It cannot be read.
    """

    def __init__(self, path: Path | None, made_for: Mapping[str, Any]) -> None:
        self.path, self.made_for = path, json.loads(json.dumps(dict(made_for), default=str))
        self.record: dict[str, Any] = {}
        if path is None or not (path / _RECORD).exists():
            return
        try:
            stored = json.loads((path / _RECORD).read_text())
            known = stored["made_for"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidFile(f"{path / _RECORD}: not the record of a training: {error}") from error
        differing = sorted(key for key in self.made_for if known.get(key) != self.made_for[key])
        if differing:
            raise StaleProfile(f"{path} holds a training of other {', '.join(differing)}; use another folder")
        self.record = stored

    def save(self, record: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep a state: tensors in a file each, by the names of `tensors`; files of earlier states are kept if named.

        Args:
            record: Plain data.
            tensors: File -> its tensors; a file that is left out stays as it is.
        """
        if self.path is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            files = dict(self.record.get("files", {}))
            number = int(self.record.get("number", 0)) + 1
            for name, content in tensors.items():
                files[name] = f"{name}.{number}.safetensors"
                save_file({key: value.contiguous() for key, value in content.items()}, self.path / files[name])
            made = {**record, "files": files, "number": number, "made_for": self.made_for}
            with replacing_file(self.path / _RECORD) as temporary:
                temporary.write_text(json.dumps(made, indent=1))
            for old in set(self.record.get("files", {}).values()) - set(files.values()):
                (self.path / old).unlink(missing_ok=True)
        except OSError as error:
            raise InvalidFile(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self.record = made

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of the last state.

        Raises:
            InvalidFile: It is missing or damaged.
        """
        assert self.path is not None
        path = self.path / Path(str(self.record["files"][name])).name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InvalidFile(f"{path}: cannot be read: {error}") from error
