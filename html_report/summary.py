"""The top of the page: what the program is, what was done to it, what was measured, and what was not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..program import Program

_NO_METHOD = (
    "No method was asked for: this is the canonical program, exact.",
    "gw.optimize(model, methods=[gw.Int8()], calibration=batches)",
)
_NO_QUALITY = (
    "The quality of the whole program was not measured.",
    "gw.optimize(..., budget=gw.Budget(max_error=0.05)), or a budget with an evaluation of your own",
)
_NO_TIME = (
    "Time before and after was not measured.",
    'measure both programs with program.time(...), then program.note("prefill", f"{before:.3f} s", f"{after:.3f} s")',
)


def summary_data(program: Program) -> dict[str, Any]:
    """The summary as plain data; `missing` has pairs of what is not known and how to get it."""
    measured = {**program.profile.measured, **program.history.measured}
    figures = [*_bytes(program, measured), *_quality(measured), *measured.get("figures", ())]
    return {
        "kind": program.kind,
        "phases": [_phase(program, name) for name in program.phases],
        "methods": [
            {"name": method["name"], "options": ", ".join(f"{k}={v}" for k, v in method["options"].items())}
            for method in program.profile.methods
        ],
        "target": getattr(program, "target", "eager"),
        "counts": _counts(program),
        "figures": figures,
        "seconds": {key.removesuffix("_seconds"): v for key, v in measured.items() if key.endswith("_seconds")},
        "versions": {**program.profile.versions, **program.profile.hardware},
        "missing": _missing(program, measured),
    }


def figure(name: str, before: str, after: str, note: str = "") -> dict[str, str]:
    """One row of what was measured before and after."""
    return {"name": name, "before": before, "after": after, "note": note}


def _phase(program: Program, name: str) -> dict[str, Any]:
    phase, sites = program.phases[name], program.sites[name]
    return {
        "name": name,
        "when": " and ".join(map(str, phase.plan.conditions)) or "otherwise",
        "calls": sum(node.op == "call_function" for node in phase.exported.graph.nodes),
        "sites": {family: len(getattr(sites, family)) for family in ("attention", "linear", "cache", "norm")},
    }


def _counts(program: Program) -> dict[str, int]:
    counts: dict[str, int] = {}
    for decision in program.decisions:
        counts[decision.status] = counts.get(decision.status, 0) + 1
    return counts


def _bytes(program: Program, measured: dict[str, Any]) -> list[dict[str, str]]:
    now = {"weights": program.weight_bytes(), "state": program.state_bytes()}
    before = measured.get("bytes_before") or {}
    rows = []
    for name, after in now.items():
        first = before.get(name)
        ratio = first / after if first and after else 1.0
        note = "" if abs(ratio - 1) < 0.005 else f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x larger"
        rows.append(figure(name, f"{first / 1e6:.1f} MB" if first is not None else "-", f"{after / 1e6:.1f} MB", note))
    return rows


def _quality(measured: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    budget, frontier = measured.get("budget"), measured.get("frontier") or ()
    if budget is not None:
        held = [point for point in frontier if point["rolled_back"] == budget["rolled_back"]]
        error = budget["metric"] != "evaluate"
        if held:
            score = held[0]["score"]
            name = "relative L2 error of the output" if error else "score (higher is better)"
            before, limit = ("0", -budget["limit"]) if error else (f"{budget['baseline']:.5g}", budget["limit"])
            rows.append(figure(name, before, f"{abs(score) if error else score:.4g}", f"budget {limit:.4g}"))
    for number, video in enumerate(measured.get("video") or ()):
        similar = f"SSIM {video['ssim']:.4f}" if "ssim" in video else ""
        rows.append(
            figure(f"video {number + 1} against the dense program's", "-", f"PSNR {video['psnr']:.2f} dB", similar)
        )
    return rows


def _missing(program: Program, measured: dict[str, Any]) -> list[dict[str, str]]:
    missing = []
    if not program.decisions:
        missing.append(_NO_METHOD)
    elif not measured.get("budget") and not measured.get("video"):
        missing.append(_NO_QUALITY)
    if not measured.get("figures"):
        missing.append(_NO_TIME)
    return [{"what": what, "how": how} for what, how in missing]
