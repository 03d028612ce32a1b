"""An exported ONNX program, called like the model: the phase is picked on the host, state stays bound between calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ...archive.signature import read_call
from ...errors import GraphwrightError, InvalidFile, InvalidType
from ...inputs import bind, check_cache_inputs, require_all
from ...phases import PhasePlan, plan_for
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
        bound = bind(self.inputs, args, kwargs)
        require_all(bound, self.inputs, self.facts)
        if "max_cache_len" in self.facts:
            check_cache_inputs(bound, self.facts["max_cache_len"])
        session = self.session(plan_for(self.plans, bound).name)
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


def _filled(session: OrtSession, name: str, value: Any) -> Tensor:
    item = session.inputs[name]
    return torch.full(item.shape, value, dtype=DTYPES[item.type])
