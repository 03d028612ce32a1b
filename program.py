"""What `optimize` returns: phases over one set of weights and one set of state, and the record of what was decided.

A `Program` is called like the model that it was made from. It picks the phase on the host, runs that phase's lowered
graph and leaves state (a KV cache) in tensors that the phases share.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidArgument
from .generation import Sampling, generate
from .inputs import CallSignature, bind, require_all
from .kernels.contract import missing_kernel
from .kernels.slow_pool import nowhere
from .lowering.eager import lower_eager
from .offload import Offload, figures
from .passes.decision import Decision
from .passes.manager import PassRecord
from .patterns.find import Sites, find_sites
from .patterns.graph import GraphView
from .phases import Phase, device_of, move_phases, plan_for, state_of
from .profiles.profile import Profile
from .program_module import ProgramModule
from .prompts import Prompts
from .step_order import StepOrder


@dataclass
class History:
    """What led to a program, for reports: pass records, graph text before any lossy rewrite, measurements."""

    passes: list[PassRecord] = field(default_factory=list)
    refusals: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


class Program:
    """A rewritten model.

    Args:
        phases: In the order in which their conditions are tried.
        inputs: Names of the call's arguments.
        kind: "module", "causal_lm" or "denoiser".
        facts: What capture knows of the model.
        profile: The decisions that made it.
        history: How it came about.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        inputs: tuple[str, ...],
        kind: str,
        facts: dict[str, Any],
        profile: Profile,
        history: History | None = None,
    ) -> None:
        self.phases: dict[str, Phase] = {phase.name: phase for phase in phases}
        self.inputs = inputs
        self.kind = kind
        self.facts = facts
        self.profile = profile
        self.history = history or History()
        self._signatures = {
            phase.name: CallSignature(phase.exported, inputs, facts.get("max_cache_len")) for phase in phases
        }
        self._lowered: dict[str, Any] = {}
        self._offload = Offload(phases)
        self._order = StepOrder(self.phases, self._state, self.initial_state, self.reset)
        self._initial = {name: _initial_value(tensor) for name, tensor in self._state(offloaded=False).items()}
        self._sites: dict[str, Sites] = {}

    # ---- running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, with the model's own arguments.

        Raises:
            InvalidType: The arguments do not fit the captured signature.
            InvalidArgument: No phase takes them, or they go beyond the captured cache.
        """
        bound, phase, flat = self.dispatch(*args, **kwargs)
        self._order.follow(bound, phase)
        return self.run_phase(phase, flat)

    def run_phase(self, phase: str, flat: Sequence[Any]) -> Any:
        """Run a phase on inputs that `dispatch` gave, whatever its conditions and the calls before."""
        with torch.no_grad():
            outputs = self._run(phase)(*flat)
        return self._signatures[phase].unflatten(outputs)

    def branch(self, name: str) -> AbstractContextManager[None]:
        """Run with state of its own, kept under a name: guidance branches that are called in turn stay apart."""
        return self._order.branch(name)

    def dispatch(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], str, list[Any]]:
        """What a call with these arguments would do, without doing it.

        Returns:
            The arguments by name, the name of the phase that takes them, and the phase's inputs as its graph has them.

        Raises:
            InvalidType, InvalidArgument: As a call.
        """
        bound = bind(self.inputs, args, kwargs)
        require_all(bound, self.inputs, self.facts, self.device)
        phase = plan_for((phase.plan for phase in self.phases.values()), bound).name
        return bound, phase, self._signatures[phase].flatten(bound)

    def _run(self, phase: str) -> Any:
        if phase not in self._lowered:
            self._offload.place()
            self._lowered[phase] = lower_eager(self.phases[phase].exported)
        return self._lowered[phase]

    def reset(self) -> None:
        """Set all state back to what it was at capture: an empty cache."""
        if not self._offload.is_mine:
            self.offload_to()
        self._offload.settle()
        for name, tensor in self._state(offloaded=False).items():
            initial = self._initial[name]
            tensor.copy_(initial) if isinstance(initial, Tensor) else tensor.fill_(initial)
        self._order.restart()

    def initial_state(self) -> dict[str, Tensor]:
        """State as it was at capture, by fully qualified name; new tensors, which the phases do not read."""
        state = self._state()
        made = {name: nowhere(state[name], self.device) for name in self._offload.names}
        for name, value in self._initial.items():
            made[name] = value.clone() if isinstance(value, Tensor) else torch.full_like(state[name], value)
        return made

    def generate(
        self,
        tokens: Prompts,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        eos_token_id: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue a prompt with a captured language model.

        Args:
            tokens: int64 [batch, prompt]; or a list of prompts, each a list of tokens or a tensor [prompt]. Prompts of
                different lengths need a program that was captured with `padding`.
            max_new_tokens: At most this many are added.
            attention_mask: [batch, prompt], zero where `tokens` has padding, which must be on the left.
            temperature: 0 takes the most probable token, otherwise logits are divided by it and sampled.
            top_p: Sample from the smallest set of tokens with this much probability.
            eos_token_id: Stops a sequence; finished ones are padded with it.
            seed: Makes sampling repeatable.

        Returns:
            int64 [batch, longest prompt + new]; shorter prompts of a list have `eos_token_id` or 0 to their left.

        Raises:
            InvalidArgument: The program is no language model, the text would outgrow the captured cache, or there is
                padding and the program was captured without, or it is not on the left.
            InvalidType: The tokens are not those of as many sequences as were captured.
        """
        options = Sampling(max_new_tokens, temperature, top_p, eos_token_id, seed)
        return generate(self, tokens, attention_mask, options)

    def as_module(self) -> ProgramModule:
        """A module with the model's call, to put in its place, for example `pipe.transformer`.

        Keywords that the capture fixed (`return_dict=False`) are accepted with the captured value only.
        """
        return ProgramModule(self)

    def to(self, device: torch.device | str) -> Program:
        """Move weights and state; phases keep sharing them.

        Raises:
            InvalidArgument: The device is not there.
            MissingKernel: Pages of the cache lie in a file, and that is for the CPU only.
        """
        if self._offload.names and torch.device(device).type != "cpu":
            raise missing_kernel("page_append", device)
        move_phases(list(self.phases.values()), device)
        self._lowered.clear()
        self._order.forget_branches()
        return self

    def offload_to(self, folder: str | Path | None = None, *, buffers: int | None = None) -> None:
        """Let pages of the cache that are not at hand lie in another folder; what the cache held is forgotten.

        A program of FreeKV keeps them in one file of its own, which has no name and goes with the program. It is made
        when the program runs first, by default in the system's folder for temporary files.

        Args:
            folder: A folder of a disk with room; None leaves it where it is, and only makes a new file.
            buffers: 2 copies one head's pages to their places, in a thread of its own, while the next head's are read;
                1, as it is at first, does both in turn.

        Raises:
            InvalidArgument: Another number of buffers.
        """
        if buffers not in (None, 1, 2):
            raise InvalidArgument(f"buffers must be 1 or 2, got {buffers}")
        self._offload.drop(folder, buffers)
        self._lowered.clear()
        self.reset()

    def offload_figures(self) -> dict[str, float]:
        """What was brought from the slow memory since the last reset: see `offload.figures`. Empty without FreeKV."""
        self._offload.settle()
        state = self._state()
        return figures(state[name] for name in self._offload.counts)

    def offload_figures_by_layer(self) -> list[dict[str, float]]:
        """The same of each layer whose cache is offloaded, in their order."""
        self._offload.settle()
        state = self._state()
        return [figures([state[name]]) for name in self._offload.counts]

    def offloaded_bytes(self) -> int:
        """Bytes of pages on the disk."""
        return self._offload.bytes

    # ---- what was done

    @property
    def decisions(self) -> list[Decision]:
        """One record a site and method."""
        return self.profile.decisions

    @property
    def sites(self) -> dict[str, Sites]:
        """The sites that are in the graphs as they are now, by phase."""
        for name, phase in self.phases.items():
            if name not in self._sites:
                self._sites[name] = find_sites(GraphView(phase.exported), name)
        return self._sites

    def report(self) -> Any:
        """What was found, tried, kept, refused and rolled back, and why: print it, or take `.to_json()`."""
        from .inspection.report import Report

        return Report(self)

    def explain(self, site: str) -> str:
        """Everything that is known about one site: its match, guards, decision, figures and source line.

        Raises:
            InvalidArgument: There is no such site; the message has the nearest ids.
        """
        from .inspection.report_explain import explain

        return explain(self, site)

    def diff(self, phase: str) -> str:
        """The phase's graph before and after the lossy rewrites, as a unified diff.

        Raises:
            InvalidArgument: There is no such phase.
        """
        from .inspection.report_diff import diff

        return diff(self, phase)

    def to_networkx(self, phase: str) -> Any:
        """The phase's graph as a `networkx.DiGraph`; nodes carry operator, type, module path, source and provenance.

        Raises:
            InvalidArgument: There is no such phase.
        """
        from .inspection.graph_export import to_networkx

        return to_networkx(self, phase)

    def graph(self, phase: str) -> str:
        """The phase's graph as text: inputs and state, then a line a call with its shape, arguments and module.

        Raises:
            InvalidArgument: There is no such phase.
        """
        from .inspection.graph_export import phase_text

        return phase_text(self, phase)

    def write_graph(self, phase: str, path: str | Path) -> Path:
        """Write a phase's graph for another viewer: `.graphml`, `.dot`, `.txt`, or `.pt2` for netron.

        Raises:
            InvalidArgument: There is no such phase or format.
            InvalidFile: The path cannot be written.
        """
        from .inspection.graph_export import write_graph

        return write_graph(self, phase, path)

    def html(self, path: str | Path) -> Path:
        """Write the program's page: graphs, passes, decisions and pictures in one file that needs no network.

        Args:
            path: Where to write; an existing file is replaced.

        Returns:
            The path.

        Raises:
            InvalidFile: The path cannot be written.
        """
        from .html_report.write import write_html

        return write_html(self, path)

    def note(self, name: str, before: str, after: str, comment: str = "") -> None:
        """Keep a figure that you measured with the program, for its page and its file.

        Args:
            name: What was measured, such as "prefill of 512 tokens".
            before: The figure of the model, with its unit.
            after: The figure of this program.
            comment: What the two say, such as "1.9x faster".
        """
        row = {"name": name, "before": before, "after": after, "note": comment}
        self.history.measured.setdefault("figures", []).append(row)

    def weight_bytes(self) -> int:
        """Bytes of the distinct stored tensors without state, shared ones counted once."""
        state = set(self._state())
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for phase in self.phases.values()
            for name, tensor in {**phase.exported.constants, **phase.exported.state_dict}.items()
            if name not in state and isinstance(tensor, Tensor)
        }
        return sum(storages.values())

    def state_bytes(self) -> int:
        """Bytes of the state tensors in memory; pages on a disk are not among them."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._state(offloaded=False).values())

    def time(self, *args: Any, repeats: int = 3, **kwargs: Any) -> float:
        """Least seconds of a call over `repeats`."""
        best = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            self(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return device_of(next(iter(self.phases.values())).exported)

    def _state(self, *, offloaded: bool = True) -> dict[str, Tensor]:
        state = {name: tensor for phase in self.phases.values() for name, tensor in state_of(phase.exported).items()}
        return {name: tensor for name, tensor in state.items() if offloaded or name not in self._offload.names}

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write one `.gw` file: weights once, graphs, profile, report.

        An existing file is replaced when the new one is complete; an interrupted save leaves it as it was.

        Raises:
            InvalidFile: The path cannot be written.
        """
        from .program_file import save

        save(self, path)

    def export(self, path: str | Path, **options: Any) -> list[Path]:
        """Write files that run without graphwright's Python; the suffix says which.

        Args:
            path: `.onnx` for ONNX models, which `gw.load` opens; `.pt2` for AOTInductor packages; `.engine` for
                engines of TensorRT-RTX; `.zip` for all that builds engines of TensorRT elsewhere.
            options: The target's: `opset` (23 or 24) and `ops` ("portable", "ort" or "function") for ONNX;
                `compute_capabilities` (such as "sm_89") for TensorRT-RTX, `architectures` for TensorRT, and for both
                `sizes` (input -> dimension -> least, usual and largest) and `tf32`.

        Returns:
            The files: one a phase, and what they share.

        Raises:
            InvalidArgument: An unknown suffix or option.
            InvalidFile: The path cannot be written. What was there before is still there.
            MissingExtra: The target's packages are not installed.
            UnsupportedLowering: What the target cannot take, by name.
        """
        from .export import export

        return export(self, path, **options)

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def __repr__(self) -> str:
        kept = sum(decision.status == "kept" for decision in self.decisions)
        return f"<Program {self.kind}: {', '.join(self.phases)}; {kept} of {len(self.decisions)} decisions kept>"


def _initial_value(tensor: Tensor) -> Tensor | float | int | bool:
    """What state is reset to: one number where it is constant, as empty caches are, else a copy."""
    if tensor.numel() == 0:
        return 0
    first = tensor.flatten()[0]
    return first.item() if bool((tensor == first).all()) else tensor.clone()
