"""Several methods at one site: which pairs go together, and in which order.

A pass declares in `absorbs` which other passes it can do as well, before its own work: block-sparse attention can snap
its queries and keys first (TimeRipple, then RainFusion or Compact Attention), and a cache that is split by heads can be
packed where it is kept whole (RazorAttention and KVTuner, in any order). Two decisions about one site become one, which
profiles, budget and rollback treat as any other. Everything else is refused with the pair named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..errors import InvalidArgument
from ..passes.base import pass_named
from ..passes.decision import Decision
from ..passes.quantize_cache import QuantizeCache
from ..passes.snap_operands import Snap

_PARTS: dict[str, frozenset[str]] = {
    "snap": frozenset(item.name for item in fields(Snap)),
    "pack": frozenset(item.name for item in fields(QuantizeCache)),
}
"""What a field that takes another pass's options takes of them."""
_IN_ANY_ORDER = frozenset({"pack"})
"""Fields of passes that go together whichever method decided first: neither looks at what the other does."""


def compose(decisions: Sequence[Decision]) -> list[Decision]:
    """Join what several methods decided.

    Args:
        decisions: Of all methods, in the order in which the methods were given.

    Returns:
        The decisions, at most one proposal a site and family.

    Raises:
        InvalidArgument: Two methods would rewrite one site and cannot be joined, or only the other way round.
    """
    _refuse_covered(decisions)
    first: dict[str, int] = {}
    result: list[Decision | None] = list(decisions)
    for place, decision in enumerate(decisions):
        if decision.status != "proposed":
            continue
        before = first.setdefault(decision.site, place)
        other = result[before]
        if before == place or other is None:
            continue
        if other.method == decision.method:
            continue
        result[before], result[place] = None, _joined(other, decision)
        first[decision.site] = place
    return [decision for decision in result if decision is not None]


def _refuse_covered(decisions: Sequence[Decision]) -> None:
    """A rewrite of a whole block makes its calls anew, so nothing inside it can be rewritten besides."""
    covered = {
        site: (decision.method, decision.site)
        for decision in decisions
        if decision.status == "proposed"
        for site in decision.figures.get("covers", ())
    }
    for decision in decisions:
        if decision.status == "proposed" and decision.site in covered:
            method, block = covered[decision.site]
            raise InvalidArgument(
                f"{method} and {decision.method} would both rewrite {decision.site}: {method} makes the calls of"
                f" {block} anew for the tokens that it selects; choose one of them"
            )


def _joined(first: Decision, second: Decision) -> Decision:
    """One decision in the place of two."""
    field = _absorbs(second).get(first.pass_name)
    if field is None:
        if _absorbs(first).get(second.pass_name) in _IN_ANY_ORDER:
            return _joined(second, first)
        if second.pass_name in _absorbs(first):
            raise InvalidArgument(
                f"{first.method} and {second.method} would both rewrite {first.site}; give {second.method} first:"
                f" its tokens are snapped before {first.method} looks at them"
            )
        raise InvalidArgument(f"{first.method} and {second.method} would both rewrite {first.site}; choose one of them")
    taken = {name: value for name, value in first.options.items() if name in _PARTS[field]}
    return second.model_copy(
        update={
            "method": f"{first.method}+{second.method}",
            "options": second.options | {field: taken},
            "facts": first.facts | second.facts,
            "figures": first.figures | second.figures,
        }
    )


def _absorbs(decision: Decision) -> Any:
    return type(pass_named(decision.pass_name, decision.options)).absorbs
