"""The channels of a stream before and after its rotation, from one run of the rotated program."""

from __future__ import annotations

import torch

import graphwright as gw
from graphwright.html_report.write import page_data
from graphwright.profiles.rotation_figures import channel_sizes, rotation_figures
from tests.models import captured_llama, tokens

TEXTS = [tokens(31, seed) for seed in range(6)]


def test_sizes_are_the_largest_of_each_channel_over_their_mean():
    rows = torch.tensor([[1.0, -4.0, 0.0], [2.0, 1.0, 0.0]])
    assert channel_sizes(rows).tolist() == [2.0, 1.0, 0.0]


def test_the_identity_leaves_both_alike_and_other_widths_are_left_out():
    program = gw.optimize(captured_llama(), progress=False)
    exported = program.phases["prefill"].exported
    flat = [tokens(8), torch.arange(8)]
    same = rotation_figures(exported, flat, torch.eye(64))
    assert same["channels rotated"] == same["channels unrotated"]
    assert len(same["channels rotated"]) == 33
    assert same["channels rotated"] == sorted(same["channels rotated"], reverse=True)
    assert rotation_figures(exported, flat, torch.eye(48)) == {}


def test_what_was_rotated_is_rotated_back():
    """A rotation of an unrotated program: "rotated" is the norm's own output, "unrotated" that times R^T."""
    exported = gw.optimize(captured_llama(), progress=False).phases["prefill"].exported
    flat = [tokens(8), torch.arange(8)]
    permutation = torch.eye(64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    found = rotation_figures(exported, flat, permutation)
    assert found["channels rotated"] == found["channels unrotated"]  # sizes are sorted: a permutation changes none
    spread = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
    found = rotation_figures(exported, flat, spread)
    assert found["channels rotated"] != found["channels unrotated"]


def test_optimize_notes_them_and_the_page_draws_them():
    method = gw.DartQuant(rotate="always", weights="rtn", steps=0, samples=128, batch=128)
    program = gw.optimize(captured_llama(), methods=[method], calibration=TEXTS, keep="smaller", progress=False)
    rotated = [d for d in program.decisions if d.pass_name == "rotate" and d.status == "kept"]
    noted = [d for d in rotated if d.figures]
    assert [d.phase for d in noted] == ["prefill"]
    figures = noted[0].figures
    assert figures["channels unrotated"] != figures["channels rotated"]
    assert figures["channels unrotated"][0] >= 1.0
    titles = [each["title"] for each in page_data(program)["pictures"]]
    assert any(title.startswith("Channels of the residual stream before and after rotation") for title in titles)
