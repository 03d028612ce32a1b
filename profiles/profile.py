"""The file that replays decisions without search.

JSON, with a published schema (`profile.schema.json` beside this file). It carries what it was made for: the
fingerprint of the graph and of the weights, versions, hardware, the calibration data's hash and the figures that were
measured. A profile that was made for something else is refused with the fields that differ.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from ..errors import InvalidFile, StaleProfile
from ..passes.decision import Decision
from ..patterns.graph import GraphView
from ..patterns.steps import StepRange
from ..replace_files import replacing_file
from .tensor_file import TensorFile, read_tensors, write_tensors

SCHEMA_VERSION = 1


class Fingerprint(BaseModel):
    """What a profile was made for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    graph: str = Field(description="SHA-256 of the canonical graphs: operators, wiring, shapes, weight names.")
    weights: str = Field(description="SHA-256 of every weight's name, shape, dtype and a sample of its values.")


class Profile(BaseModel):
    """Decisions, and all that is needed to trust them."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    fingerprint: Fingerprint
    methods: list[dict[str, Any]] = Field(default_factory=list, description="Name and options of each method.")
    decisions: list[Decision] = Field(default_factory=list)
    steps: list[StepRange] = Field(
        default_factory=list, description="The ranges of denoising steps that have a phase each, of denoisers."
    )
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, str] = Field(default_factory=dict)
    data: str = Field("", description="SHA-256 of the calibration inputs, empty where there were none.")
    measured: dict[str, Any] = Field(default_factory=dict, description="Quality and speed as measured.")
    tensor_file: TensorFile | None = Field(
        default=None, description="The tensors that decisions name, in a file beside this."
    )
    _tensors: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors that decisions name: rotations, rounded weights."""
        return self._tensors

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, and its tensors beside it, if it has any.

        An existing file is replaced only when the new one is complete.

        Raises:
            InvalidFile: The path cannot be written.
        """
        path = Path(path)
        record = write_tensors(path, self.tensors) if self.tensors else None
        with replacing_file(path) as temporary:
            temporary.write_text(self.model_copy(update={"tensor_file": record}).model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            InvalidFile: The file is missing, is not JSON, or is no profile; the message names the first bad field. Or
                its tensors are not those that were saved with it.
            StaleProfile: It was written by another version of the schema.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise InvalidFile(f"{path}: {error.strerror or 'cannot be read'}") from error
        except (ValueError, UnicodeDecodeError) as error:
            raise InvalidFile(f"{path}: not a JSON file: {error}") from error
        profile = cls.parse(values, str(path))
        if profile.tensor_file is not None:
            profile.tensors.update(read_tensors(path, profile.tensor_file))
        return profile

    @classmethod
    def parse(cls, values: Any, source: str) -> Profile:
        """Make a profile of plain JSON values; `source` names them in errors."""
        found = values.get("schema_version") if isinstance(values, dict) else None
        if found is not None and found != SCHEMA_VERSION:
            raise StaleProfile(f"{source}: schema version {found}, this graphwright reads {SCHEMA_VERSION}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise InvalidFile(f"{source}: not a graphwright profile: {field}: {first['msg']}") from error

    def check(self, fingerprint: Fingerprint) -> None:
        """Refuse to be replayed on another program.

        Raises:
            StaleProfile: Lists the fields that differ.
        """
        differing = [
            f"{name} is {getattr(fingerprint, name)[:12]}, the profile's is {getattr(self.fingerprint, name)[:12]}"
            for name in Fingerprint.model_fields
            if getattr(fingerprint, name) != getattr(self.fingerprint, name)
        ]
        if differing:
            raise StaleProfile(f"the profile was made for another program: {'; '.join(differing)}")


def fingerprint(phases: Mapping[str, ExportedProgram]) -> Fingerprint:
    """Fingerprint canonical programs; equal for equal graphs, whatever their nodes are called.

    Args:
        phases: Canonical programs by phase.

    Returns:
        Hashes of the graphs and of the weights.
    """
    graph, weights = hashlib.sha256(), hashlib.sha256()
    stored: dict[str, Tensor] = {}
    for name, exported in sorted(phases.items()):
        graph.update(f"phase {name}\n".encode())
        view = GraphView(exported)
        symbols: dict[str, str] = {}
        numbers: dict[Node, int] = {}
        for number, node in enumerate(exported.graph.nodes):
            numbers[node] = number
            target = view.target(node) or ("" if node.op == "placeholder" else str(node.target))
            args = map_arg((node.args, node.kwargs), lambda n, known=numbers: f"%{known[n]}")
            graph.update(f"{node.op} {target} {args} {_shape(node, symbols)}\n".encode())
        for target, tensor in {**exported.state_dict, **exported.constants}.items():
            if isinstance(tensor, Tensor):
                stored[target] = tensor
    for target, tensor in sorted(stored.items()):
        weights.update(f"{target} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        weights.update(_sample(tensor))
    return Fingerprint(graph=graph.hexdigest(), weights=weights.hexdigest())


def _shape(node: Node, symbols: dict[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    sizes = [symbols.setdefault(str(s), f"s{len(symbols)}") if not isinstance(s, int) else str(s) for s in value.shape]
    return f"{value.dtype}[{','.join(sizes)}]"


def _sample(tensor: Tensor, count: int = 256) -> bytes:
    """Up to `count` values spread over a tensor: enough to tell checkpoints apart, quick for any size."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return b""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // count)
    return flat[::step][:count].double().cpu().numpy().tobytes()


def data_hash(inputs: Iterable[list[Any]]) -> str:
    """SHA-256 of calibration inputs, "" for none."""
    digest, count = hashlib.sha256(), 0
    for flat in inputs:
        for value in flat:
            count += 1
            if isinstance(value, Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
                # A copy: one value that was expanded counts as contiguous and has a stride of 0.
                flat = value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest() if count else ""


def versions() -> dict[str, str]:
    """Versions of what took part."""
    return {"graphwright": version("graphwright"), "torch": torch.__version__, "python": platform.python_version()}


def hardware() -> dict[str, str]:
    """The machine, in words."""
    found = {"machine": platform.machine(), "processor": _processor(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
