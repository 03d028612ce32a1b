"""The ``.gw`` file: the phases of a program over one set of tensors, with its documents, as data that cannot run.

A ZIP of ``manifest.json`` (versions, tables of tensors, sizes), ``weights.safetensors`` (every distinct tensor once,
not compressed, so that it can be mapped), ``graphs/<phase>.json`` and ``documents/<name>.json``. There is no pickle in
it and no text in it is evaluated; ``archive/graph.py`` says what a graph may hold.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import mmap
import os
import re
import secrets
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import InvalidFile
from .graph import read_program, write_program
from .signature import qualified_name
from .tensors import ALIGNMENT, TensorWriter, read_tensors

VERSION = 1  # of the format; a reader refuses what is newer than itself


@dataclass(frozen=True)
class Contents:
    """What an archive holds.

    Attributes:
        phases: Exported programs by name. Where two of them have the same tensor, be it a weight or state, it is
            stored once, and the loaded phases share it. Example inputs are not kept.
        documents: JSON values by name: profile, report, decisions, conditions.
        tensors: Other tensors by name: example inputs, rotations.
    """

    phases: dict[str, ExportedProgram]
    documents: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def write_archive(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write an archive, whole or not at all: until it is complete and on the disk, an older file stays as it was.

    State that holds one value throughout is stored as that value. Memory needed beside the program: the largest tensor
    that is not contiguous or not on the CPU.

    Raises:
        InvalidFile: The path cannot be written, or the contents cannot be stored; the message names what.
    """
    with _explained(path, "cannot be written"):
        tensors = TensorWriter()
        members: dict[str, bytes] = {}
        phases = {}
        for name, program in contents.phases.items():
            with _explained(f"phase {name!r}", "cannot be stored"):
                members[_member("graphs", name)] = _to_json(write_program(program))
                phases[name] = _add_phase(tensors, program)
        extras = {name: tensors.add(f"tensors/{name}", tensor) for name, tensor in contents.tensors.items()}
        for name, document in contents.documents.items():
            with _explained(f"document {name!r}", "cannot be stored"):
                members[_member("documents", name)] = _to_json(document)
        table = tensors.table()
        manifest = {
            "format": _FORMAT,
            "version": VERSION,
            "graphwright": _package_version(),
            "torch": torch.__version__,
            "phases": phases,
            "documents": list(contents.documents),
            "tensors": extras,
            "table": table,
            "sizes": {_WEIGHTS: tensors.size} | {name: len(text) for name, text in members.items()},
        }
        with _replacing(Path(os.path.realpath(path))) as stream, zipfile.ZipFile(stream, "w") as archive:
            with archive.open(_weights_info(tensors.size), "w") as member:
                tensors.write(member)
            for name, text in {**members, _MANIFEST: _to_json(manifest)}.items():
                archive.writestr(_info(name, zipfile.ZIP_DEFLATED), text)


def read_archive(path: str | os.PathLike[str]) -> Contents:
    """Read an archive. Its weights are mapped, not read: the file may be replaced or removed while they are in use,
    but must not be changed in place.

    Operators of ``graphwright.kernels`` that the graphs call must have been imported. The checksum of the weights is
    not verified (that would read them all); those of the other members are.

    Raises:
        InvalidFile: The file is missing, foreign, truncated, newer than this version, or holds anything that
            ``write_archive`` does not write; the message names the path, the member and the value.
    """
    with _explained(path, "is damaged or foreign"), open(path, "rb") as stream:
        length = os.fstat(stream.fileno()).st_size
        if length == 0:
            raise InvalidFile("the file is empty")
        try:
            archive = zipfile.ZipFile(stream)
        except zipfile.BadZipFile as error:
            raise InvalidFile("not a graphwright archive: it is foreign or truncated") from error
        members = _check_members(archive, length)
        with _explained(_MANIFEST, "is damaged or foreign"):
            manifest = _read_manifest(archive, members)
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        with _explained(_WEIGHTS, "is damaged or foreign"):
            start, size = _locate(mapping, members[_WEIGHTS])
            tensors = read_tensors(mapping, start, size, manifest["table"])
        phases: dict[str, ExportedProgram] = {}
        for name, phase in manifest["phases"].items():
            with _explained(member := _member("graphs", name), "is damaged or foreign"):
                state, constants = (_pick(tensors, phase[kind]) for kind in ("state", "constants"))
                phases[name] = read_program(_read_json(archive, members[member]), state, constants)
        documents: dict[str, Any] = {}
        for name in manifest["documents"]:
            with _explained(member := _member("documents", name), "is damaged or foreign"):
                documents[name] = _read_json(archive, members[member])
        with _explained(_MANIFEST, "is damaged or foreign"):
            extras = {str(name): tensors[key] for name, key in manifest["tensors"].items()}
        return Contents(phases, documents, extras)


def _add_phase(tensors: TensorWriter, program: ExportedProgram) -> dict[str, dict[str, str]]:
    state = set(program.graph_signature.buffers_to_mutate.values())
    return {
        kind: {name: tensors.add(qualified_name(name), tensor, state=name in state) for name, tensor in source.items()}
        for kind, source in (("state", program.state_dict), ("constants", program.constants))
    }


def _pick(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    missing = set(names.values()) - tensors.keys()
    if missing:
        raise InvalidFile(f"the manifest has no tensor {min(missing)!r}")
    return {qualified_name(name): tensors[key] for name, key in names.items()}


def _check_members(archive: zipfile.ZipFile, length: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name, once their names, kinds and sizes are known to be harmless."""
    members: dict[str, zipfile.ZipInfo] = {}
    unpacked = 0
    for info in archive.infolist():
        name = info.orig_filename
        if not _MEMBER.fullmatch(name) or info.filename != name:
            raise InvalidFile(f"unexpected member {name!r}")
        if name in members:
            raise InvalidFile(f"the member {name} is there twice")
        if info.flag_bits & _ENCRYPTED:
            raise InvalidFile(f"the member {name} is encrypted")
        allowed = (zipfile.ZIP_STORED,) if name == _WEIGHTS else (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if info.compress_type not in allowed:
            raise InvalidFile(f"the member {name} is compressed by method {info.compress_type}")
        if info.compress_size > length or (
            info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size
        ):
            raise InvalidFile(f"the member {name} claims {info.file_size} bytes")
        if name != _WEIGHTS:
            unpacked += info.file_size
            if unpacked > _MAX_JSON or info.file_size > max(_SMALL, _MAX_RATIO * info.compress_size):
                raise InvalidFile(f"the member {name} unpacks to {info.file_size} bytes")
        members[name] = info
    for name in (_MANIFEST, _WEIGHTS):
        if name not in members:
            raise InvalidFile(f"not a graphwright archive: it has no {name}")
    return members


def _read_manifest(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> dict[str, Any]:
    manifest = _read_json(archive, members[_MANIFEST])
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise InvalidFile("it does not describe a graphwright archive")
    version = manifest["version"]
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        made_by = f"graphwright {manifest['graphwright']}"
        raise InvalidFile(f"format version {version}, made by {made_by}; this one reads up to {VERSION}")
    named = {_WEIGHTS}
    named |= {_member("graphs", name) for name in manifest["phases"]}
    named |= {_member("documents", name) for name in manifest["documents"]}
    sizes = {name: info.file_size for name, info in members.items() if name != _MANIFEST}
    if named != sizes.keys():
        raise InvalidFile(f"it does not list the members {sorted(named ^ sizes.keys())}")
    for name, size in sizes.items():
        if manifest["sizes"].get(name) != size:
            raise InvalidFile(f"the member {name} has {size} bytes, expected {manifest['sizes'].get(name)}")
    return manifest


def _read_json(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    with archive.open(info) as member:
        return json.loads(member.read())


def _locate(mapping: mmap.mmap, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a stored member's bytes lie: after its local header, whose lengths differ from the directory's."""
    header = mapping[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
    if len(header) < _LOCAL_HEADER.size:
        raise InvalidFile("the member lies outside the file")
    signature, method, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name_start = info.header_offset + _LOCAL_HEADER.size
    name = mapping[name_start : name_start + name_length]
    start = name_start + name_length + extra_length
    if signature != b"PK\x03\x04" or method != zipfile.ZIP_STORED or name != info.filename.encode():
        raise InvalidFile("the local header is not that of the directory")
    if start + info.file_size > len(mapping):
        raise InvalidFile(f"the member claims {info.file_size} bytes, the file ends before")
    return start, info.file_size


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file under a temporary name beside ``path``, which it becomes when the block ends without an exception."""
    if path.is_dir():
        raise InvalidFile("is a directory")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def _explained(place: object, otherwise: str) -> Iterator[None]:
    """Name the place in every error, and turn whatever a malformed value provokes into an ``InvalidFile``."""
    try:
        yield
    except InvalidFile as error:
        raise InvalidFile(f"{place}: {error}") from error
    except OSError as error:
        raise InvalidFile(f"{place}: {error.strerror or error}") from error
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise InvalidFile(f"{place}: {otherwise} ({type(error).__name__}: {first_line})") from error


def _weights_info(size: int) -> zipfile.ZipInfo:
    info = _info(_WEIGHTS, zipfile.ZIP_STORED)
    info.file_size = size
    # As the first member it starts at 0; padding in the header's extra field aligns its bytes to be mapped.
    zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0  # the rule and the field of the zipfile module
    padding = -(_LOCAL_HEADER.size + len(_WEIGHTS) + zip64 + 4) % ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    return info


def _info(name: str, compression: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # the fixed date of its default makes equal programs equal files
    info.compress_type = compression
    return info


def _member(folder: str, name: object) -> str:
    member = f"{folder}/{name}.json"
    if not isinstance(name, str) or not _MEMBER.fullmatch(member):
        raise InvalidFile(f"{name!r} cannot be the name of a member; use letters, digits, - and _")
    return member


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _package_version() -> str:
    try:
        return importlib.metadata.version("graphwright")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


_FORMAT = "graphwright archive"
_MANIFEST = "manifest.json"
_WEIGHTS = "weights.safetensors"
_MEMBER = re.compile(r"manifest\.json|weights\.safetensors|(graphs|documents)/[\w\-]{1,64}\.json", re.ASCII)
_ENCRYPTED = 0x1
_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # signature, method, lengths of name and extra field
_PADDING_FIELD = 0xD935  # the extra field by which Android's zipalign aligns members
_MAX_JSON = 1 << 29
_SMALL = 1 << 20
_MAX_RATIO = 200
