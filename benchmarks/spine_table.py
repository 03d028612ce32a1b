"""The table of SmolLM2, the int8 linear and `optimize` itself: what is measured, and what is wanted of it."""

from __future__ import annotations

from typing import Any

import graphwright as gw
from graphwright.benchmarks import spine
from graphwright.benchmarks.timing import Row, one_thread
from graphwright.examples.load_smollm2 import load_smollm2
from graphwright.examples.perplexity import perplexity


def spine_table(quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Measure it; `quick` takes fewer repeats, shorter texts and fewer layers."""
    rounds = 2 if quick else 6
    layers = 4 if quick else None
    measured: dict[str, Any] = {"import_seconds": spine.import_seconds()}
    measured["growth"] = spine.growth((2, 4) if quick else (4, 8, 16, spine.LAYERS))
    model, captured, calibration, evaluation = spine.setting(layers)
    canonical = gw.optimize(captured)
    tokens = evaluation[:1]
    with one_thread():
        measured["int8_linear"] = spine.int8_linear(rounds * 4)
        measured["canonical"] = spine.canonical_against_eager(model, canonical, tokens, rounds)
    plain = gw.optimize(captured, methods=[gw.Int8(smooth=None)], calibration=calibration[:1])
    probes = 16 if quick else 211
    budgeted = spine.budgeted_int8(captured, canonical, calibration[4:], calibration[:3], largest=0.008, probes=probes)
    measured["sites"] = spine.sites(canonical)
    programs = {"fp32": canonical, "plain int8": plain, "int8 in budget": budgeted}
    measured["perplexity"] = {
        name: perplexity(spine.logits_of(program), evaluation[: 2 if quick else 8])
        for name, program in programs.items()
    }
    measured["frontier"] = budgeted.profile.measured["frontier"]
    measured["rolled_back"] = sorted({d.place for d in budgeted.decisions if d.status == "rolled_back"})
    del model
    last = gw.capture_causal_lm(load_smollm2(layers=layers), spine.CACHE, logits_to_keep=1)
    generating = gw.optimize(last)
    generating_int8 = spine.same_sites(last, budgeted, calibration[4:])
    with one_thread():
        measured["plain int8"] = spine.int8_against_fp32(canonical, plain, tokens, rounds)
        measured["int8 in budget"] = spine.int8_against_fp32(canonical, budgeted, tokens, rounds)
        measured["int8 in budget, last logits"] = spine.int8_against_fp32(generating, generating_int8, tokens, rounds)
    del generating, generating_int8, last
    measured["bytes"] = {"fp32": canonical.weight_bytes(), "int8": budgeted.weight_bytes()}
    measured["round_trip"] = spine.round_trip(budgeted, tokens)
    return _rows(measured), measured


def _rows(m: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for phase, found in m["sites"].items():
        text = (
            f"{found['attention']} attention ({found['grouped']} grouped, {', '.join(found['masks'])}), "
            f"{found['linear']} linear, {found['norm']} norm, {found['cache']} cache"
        )
        whole = (found["attention"], found["grouped"], found["linear"], found["norm"], found["cache"])
        mask = "causal" if phase == "prefill" else "cache_causal"
        rows.append(
            (
                f"sites in {phase}",
                text,
                f"30, 30 {mask}, 211, 61, 30",
                whole == (30, 30, 211, 61, 30) and found["masks"] == [mask],
            )
        )
    canonical = m["canonical"]
    for phase in ("prefill", "decode"):
        difference, speedup = canonical[f"{phase}_difference"], canonical[f"{phase}_speedup"]
        text = f"error {difference:.1e} of max, {speedup:.2f}x"
        if phase == "prefill":
            text += f" ({canonical['prefill_without_cache_speedup']:.2f}x of eager without a cache)"
        rows.append((f"canonical {phase} against eager", text, "1e-4, 1.0x", difference <= 1e-4 and speedup >= 1.0))
    quality = m["perplexity"]
    for name in ("plain int8", "int8 in budget", "int8 in budget, last logits"):
        of = name.removesuffix(", last logits")
        worse = quality[of] / quality["fp32"] - 1
        text = (
            f"prefill {m[name]['prefill_speedup']:.2f}x, decode {m[name]['decode_speedup']:.2f}x, "
            f"perplexity {quality['fp32']:.3f} -> {quality[of]:.3f} ({worse:+.2%})"
        )
        plain = of == "plain int8"
        holds = plain or (m[name]["prefill_speedup"] >= 2.0 and worse <= 0.01)
        rows.append((f"{name}, 512 tokens", text, "-" if plain else "2.0x, +1%", holds))
    for row, (fp32, bf16) in zip(m["int8_linear"], ((3.0, 1.2), (3.0, 1.2), (0.0, 0.0)), strict=True):
        text = f"{row['over_fp32']:.2f}x of fp32, {row['over_bf16']:.2f}x of bf16"
        holds = row["over_fp32"] >= fp32 and row["over_bf16"] >= bf16
        rows.append((f"int8_linear {row['shape']}", text, f"{fp32:g}x, {bf16:g}x" if fp32 else "-", holds))
    for row in m["growth"]:
        text = (
            f"{row['seconds']:.1f} s ({row['capture_seconds']:.1f} s of it capture),"
            f" peak {row['over_weights']:.2f} x weights"
            f" ({row['beyond_loaded']:.2f} x without what Python and torch hold)"
        )
        holds = row["seconds"] <= 90 and (row["over_weights"] <= 2.5 or row["layers"] < spine.LAYERS)
        rows.append((f"optimize(), {row['layers']} layers", text, "90 s, 2.5 x", holds))
    trip = m["round_trip"]
    equal = "bit-equal" if trip["bit_equal"] else "DIFFERS"
    text = f"{equal}, {trip['file_over_weights']:.3f} x weights, load {trip['load_seconds']:.1f} s"
    rows.append(("save and load", text, "bit-equal, 1.05 x", trip["bit_equal"] and trip["file_over_weights"] <= 1.05))
    rows.append(
        ("import graphwright", f"{m['import_seconds']:.3f} s beyond torch", "0.5 s", m["import_seconds"] <= 0.5)
    )
    return rows
