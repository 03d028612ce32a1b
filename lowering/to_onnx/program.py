"""An exported ONNX program, called like the model: the phase is picked on the host, state stays bound between calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ...archive.signature import read_call
from ...errors import GraphwrightError, InvalidArgument, InvalidFile, InvalidType
from ...phases import PhasePlan
from ...torch_private import pytree
from .session import DTYPES, OrtSession, State
from .write import KEY, state_file


def load_onnx(path: str | Path, provider: str = "CPUExecutionProvider", threads: int | None = None) -> OnnxProgram:
    """Open what `Program.export` wrote as ONNX.

    Args:
        path: The file that was asked for at export; the others lie beside it.
        provider: The execution provider that must run it.
        threads: Threads within an operator; by default torch's.

    Raises:
        InvalidFile: A file is missing or was not written by graphwright.
        InvalidArgument: The provider is not there, or the runtime fell back to another.
        MissingExtra: onnxruntime is not installed.
    """
    path = Path(path)
    session = OrtSession(path, provider, threads)
    text = session.session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise InvalidFile(f"{path}: was not exported by graphwright; open it with onnxruntime itself")
    try:
        return OnnxProgram(path, json.loads(text), session, provider, threads)
    except GraphwrightError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidFile(f"{path}: its metadata is not graphwright's: {type(error).__name__}: {error}") from error


class OnnxProgram:
    """ONNX models over one set of state.

    Attributes:
        inputs: Names of the call's arguments.
        kind: "module", "causal_lm" or "denoiser".
        state: What is kept between calls.
    """

    def __init__(
        self, path: Path, document: dict[str, Any], session: OrtSession, provider: str, threads: int | None
    ) -> None:
        self.kind, self.inputs, self.facts = document["kind"], tuple(document["inputs"]), dict(document["facts"])
        self.plans = [PhasePlan.model_validate(phase["plan"]) for phase in document["phases"]]
        self._files = {
            plan.name: path.with_name(Path(phase["file"]).name)
            for plan, phase in zip(self.plans, document["phases"], strict=True)
        }
        self._sessions = {document["phase"]: session}
        self._open = (provider, threads)
        self._leaves = tuple(int(place) for place in document["leaves"])
        self._arguments, self._result, _, _ = read_call(document["call"])
        in_place = [set(phase["in_place"]) for phase in document["phases"]]
        stored = safetensors.torch.load_file(state_file(path)) if None in document["state"].values() else {}
        first = {
            name: stored[name] if value is None else _filled(session, f"past.{name}", value)
            for name, value in document["state"].items()
        }
        self.state = State(first, sorted(set.intersection(*in_place)), session.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the model's own arguments.

        Raises:
            InvalidType: The arguments do not fit.
            InvalidArgument: No phase takes them, or they go beyond the captured cache.
        """
        bound = self._bind(args, kwargs)
        session = self.session(self._phase_for(bound))
        flat = pytree.tree_leaves([bound[name] for name in self.inputs])
        users = [name for name in session.inputs if not name.startswith("past.")]
        if len(flat) <= max(self._leaves, default=-1):
            raise InvalidType(f"the inputs hold {len(flat)} tensors and values, the captured ones more")
        given = dict(zip(users, (flat[place] for place in self._leaves), strict=True))
        outputs = session.run(given, self.state)
        return pytree.tree_unflatten(outputs, self._result)

    def session(self, phase: str) -> OrtSession:
        """The session of a phase, opened when it is first asked for."""
        if phase not in self._sessions:
            self._sessions[phase] = OrtSession(self._files[phase], *self._open)
        return self._sessions[phase]

    def reset(self) -> None:
        """Set all state back to what it was at capture: an empty cache."""
        self.state.reset()

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.inputs):
            raise InvalidType(f"takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(args)}")
        bound = dict(zip(self.inputs, args, strict=False))
        for name, value in kwargs.items():
            if name in bound or name not in self.inputs:
                known = f"the inputs are {', '.join(self.inputs)}"
                raise InvalidType(f"got two values for {name!r}" if name in bound else f"there is no {name!r}; {known}")
            bound[name] = value
        if self.kind == "causal_lm":
            if "starts" in self.inputs:
                bound.setdefault("starts", torch.zeros(self.facts["batch_size"], dtype=torch.int64))
            self._check_positions(bound.get("cache_position"))
        missing = [name for name in self.inputs if name not in bound]
        if missing:
            raise InvalidType(f"missing input {missing[0]!r}; the inputs are {', '.join(self.inputs)}")
        return bound

    def _check_positions(self, positions: Any) -> None:
        length = self.facts.get("max_cache_len")
        if isinstance(positions, Tensor) and positions.numel() and length is not None:
            first, last = int(positions[0]), int(positions[-1])
            if first < 0 or last >= length or last - first != len(positions) - 1:
                raise InvalidArgument(f"positions {first} to {last} do not fit the captured cache of {length}")

    def _phase_for(self, bound: dict[str, Any]) -> str:
        for plan in self.plans:
            if all(condition.holds(bound) for condition in plan.conditions):
                return plan.name
        raise InvalidArgument(f"no phase takes these inputs; there are {', '.join(plan.name for plan in self.plans)}")


def _filled(session: OrtSession, name: str, value: Any) -> Tensor:
    item = session.inputs[name]
    return torch.full(item.shape, value, dtype=DTYPES[item.type])
