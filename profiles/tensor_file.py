"""The tensors of a profile (rotations, rounded weights), in a safetensors file beside its JSON.

The JSON names the file, its size and its SHA-256. What is read is what was written, or it is refused: the name is a
plain file name in the profile's own folder, size and hash are compared before anything is parsed, and safetensors holds
numbers only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InvalidFile
from ..replace_files import replacing_file


class TensorFile(BaseModel):
    """Where a profile's tensors are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(description="Name of the safetensors file, in the profile's folder.")
    bytes: int = Field(ge=0, description="Its size.")
    sha256: str = Field(description="SHA-256 of its contents.")


def write_tensors(profile: Path, tensors: Mapping[str, Tensor]) -> TensorFile:
    """Write tensors beside a profile, `<stem>.safetensors`; an existing file is replaced when the new one is complete.

    Raises:
        InvalidFile: The path cannot be written.
    """
    path = profile.with_suffix(".safetensors")
    with replacing_file(path) as temporary:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:
            raise InvalidFile(f"{path}: cannot be written: {error}") from error
        return TensorFile(file=path.name, bytes=temporary.stat().st_size, sha256=_digest(temporary))


def read_tensors(profile: Path, record: TensorFile) -> dict[str, Tensor]:
    """Read the tensors of a profile.

    Raises:
        InvalidFile: The name leaves the folder, or the file is missing, is not the one that was written, or is no
            safetensors file.
    """
    if Path(record.file).name != record.file or record.file in ("", ".", "..") or "\\" in record.file:
        raise InvalidFile(f"{profile}: the tensor file {record.file!r} is no plain file name")
    path = profile.with_name(record.file)
    try:
        if path.is_symlink() or not path.is_file():
            raise InvalidFile(f"{path}: the profile's tensors are missing, or are no regular file")
        size = path.stat().st_size
        if size != record.bytes:
            raise InvalidFile(f"{path}: got {size} bytes, the profile was saved with {record.bytes}")
        if _digest(path) != record.sha256:
            raise InvalidFile(f"{path}: its contents are not those that the profile was saved with")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, InvalidFile):
            raise
        raise InvalidFile(f"{path}: cannot be read: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
