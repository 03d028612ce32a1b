"""Turns what the user gives as calibration into flat inputs for each phase.

For captured language models an item may be a tensor of tokens; for everything else an item is `(args, kwargs)` of the
program. Phases that no item would run in are calibrated on a piece of one that fits, or on their example inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import InvalidArgument, InvalidType
from ..torch_private import pytree

LONGEST = 512
"""Tokens of a text that calibration runs at once."""


def calibration_inputs(
    phases: Mapping[str, ExportedProgram],
    kind: str,
    facts: Mapping[str, Any],
    calibration: Iterable[Any] | None,
    most: int = 8,
    longest: int = LONGEST,
) -> dict[str, list[list[Any]]]:
    """Flat inputs by phase.

    Args:
        phases: The program of each phase.
        kind: "module", "causal_lm" or "denoiser".
        facts: What capture knows of the model.
        calibration: The user's items, or None for the example inputs.
        most: At most this many items are used.
        longest: Tokens of a text that are run at once; longer ones are cut.

    Returns:
        At least one flat input for each phase that carries example inputs.

    Raises:
        InvalidType: An item is neither `(args, kwargs)` nor, for language models, a tensor of tokens.
        InvalidArgument: The iterable was empty, or a text is shorter than two tokens.
    """
    result: dict[str, list[list[Any]]] = {name: [] for name in phases}
    if calibration is None:
        for name, exported in phases.items():
            if exported.example_inputs is not None:
                result[name].append(pytree.tree_leaves(exported.example_inputs))
        return result
    items = [item for _, item in zip(range(most), calibration, strict=False)]
    if not items:
        raise InvalidArgument("calibration is empty")
    for position, item in enumerate(items):
        if kind == "causal_lm" and isinstance(item, Tensor):
            for rows in _checked_rows(facts, item, position, longest).split(int(facts["batch_size"])):
                for name, flat in _token_calls(phases, facts, rows).items():
                    result[name].append(flat)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping):
            flat = pytree.tree_leaves((tuple(item[0]), dict(item[1])))
            for name in phases:
                result[name].append(flat)
        else:
            wanted = "a tensor of tokens or (args, kwargs)" if kind == "causal_lm" else "(args, kwargs)"
            raise InvalidType(f"calibration item {position}: expected {wanted}, got {type(item).__name__}")
    return result


def _checked_rows(facts: Mapping[str, Any], tokens: Tensor, position: int, longest: int) -> Tensor:
    """Texts as rows [n, tokens], cut to what is calibrated on and to what the cache holds."""
    longest = min(longest, int(facts["max_cache_len"]))
    rows = tokens.reshape(tokens.shape[:-1].numel(), tokens.shape[-1]) if tokens.dim() else tokens[None, None]
    if rows.shape[-1] < 2 or rows.shape[0] < 1 or rows.is_floating_point():
        raise InvalidArgument(
            f"calibration item {position}: expected at least two integer tokens, got {tokens.dtype}{list(tokens.shape)}"
        )
    vocabulary = _vocabulary(facts)
    if vocabulary and (int(rows.max()) >= vocabulary or int(rows.min()) < 0):
        raise InvalidArgument(
            f"calibration item {position}: token {int(rows.max())} is outside the vocabulary of {vocabulary}"
        )
    return rows[:, :longest]


def _token_calls(phases: Mapping[str, ExportedProgram], facts: Mapping[str, Any], rows: Tensor) -> dict[str, list[Any]]:
    """One call a phase: the texts from position 0, or as much of them as the phase takes."""
    batch = int(facts["batch_size"])
    rows = rows[torch.arange(batch) % rows.shape[0]]
    calls = {}
    for name, exported in phases.items():
        taken = rows[:, :1] if _is_fixed(exported) else rows
        calls[name] = [taken.contiguous(), torch.arange(taken.shape[1], device=taken.device)]
        if "starts" in exported.graph_signature.user_inputs:  # no text is padded
            calls[name].append(torch.zeros(batch, dtype=torch.int64, device=taken.device))
    return calls


def _is_fixed(exported: ExportedProgram) -> bool:
    inputs: Sequence[str] = exported.graph_signature.user_inputs  # pyright: ignore[reportAssignmentType]
    node = next(n for n in exported.graph.find_nodes(op="placeholder") if n.name == inputs[0])
    return isinstance(node.meta["val"].shape[1], int)


def _vocabulary(facts: Mapping[str, Any]) -> int | None:
    config = facts.get("config") or {}
    value = config.get("vocab_size")
    return int(value) if value else None
