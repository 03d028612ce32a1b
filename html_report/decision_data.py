"""The table of decisions as plain data, and for each family of sites what nearly was one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..program import Program


def decisions_data(program: Program) -> list[dict[str, Any]]:
    """One row a decision, with the source line of its site where that is still in the graph."""
    sources = {site.id: site.source for sites in program.sites.values() for site in sites.all}
    return [
        {
            "site": decision.site,
            "phase": decision.phase,
            "place": decision.place,
            "method": decision.method,
            "pass": decision.pass_name,
            "options": {name: _short(value) for name, value in decision.options.items()},
            "status": decision.status,
            "reason": decision.reason,
            "facts": decision.facts,
            "figures": {name: _short(value) for name, value in decision.figures.items()},
            "predicted": decision.predicted_gain,
            "measured": decision.measured_gain,
            "local": decision.local_error,
            "output": decision.output_error,
            "source": sources.get(decision.site, ""),
        }
        for decision in program.decisions
    ]


def near_misses(program: Program) -> list[dict[str, Any]]:
    """What nearly was a site: by phase, family and reason, the one that came furthest first."""
    rows = []
    for phase, sites in program.sites.items():
        for family, refusals in sites.refusals.items():
            nearest = sites.nearest_miss(family)
            groups: dict[str, list[Any]] = {}
            for refusal in sorted(refusals, key=lambda refusal: -refusal.depth):
                groups.setdefault(str(refusal), []).append(refusal)
            rows += [
                {
                    "phase": phase,
                    "family": family,
                    "reason": reason,
                    "count": len(group),
                    "where": group[0].module_path or group[0].node,
                    "source": group[0].source,
                    "nearest": nearest is not None and reason == str(nearest),
                }
                for reason, group in groups.items()
            ]
    return rows


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
