"""Snapping on the CPU: against the formula element by element, at its ends, refused, exported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import snap_tokens as module
from graphwright.kernels.contract import FLOATS, OPERATORS
from graphwright.kernels.snap_tokens import (
    critical_theta,
    reference,
    roots_reference,
    saved_share,
    snap_tokens,
    token_roots,
)

GROUPS, FACTORS = [4, 5, 3], [1.0, 0.5, 2.0]


def make_case(grid=(5, 6, 7), first=3, text=5, channels=12, *, theta=0.6, dtype=torch.float32, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, text + grid[0] * grid[1] * grid[2], channels, generator=generator).to(dtype)
    sizes = dict(zip(("frames", "height", "width"), grid, strict=True))
    return x, torch.tensor([theta]), {**sizes, "first": first}


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    text=st.integers(0, 4),
    axes=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True),
    window=st.integers(2, 4),
    granularity=st.sampled_from(["element", "group", "token"]),
    theta=st.sampled_from([0.0, 0.2, 0.5, 1.0, float("inf")]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_is_the_formula(grid, text, axes, window, granularity, theta, dtype, seed):
    x, limit, sizes = make_case(grid, text // 2, text, theta=theta, dtype=dtype, seed=seed)
    factors = FACTORS if granularity != "token" else [1.0] * 3
    options = {**sizes, "axes": axes, "window": window, "granularity": granularity}
    found, expected = (f(x, limit, GROUPS, factors, **options) for f in (snap_tokens, reference))
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
    if granularity == "token":
        del options["granularity"]
        roots = token_roots(x, limit, **options)
        assert torch.equal(roots, roots_reference(x, limit, **options))
        assert torch.equal(found[0], x.gather(2, roots.long()[..., None].expand_as(x)))
        moved = (roots != torch.arange(x.shape[2])).sum(2)
        assert torch.equal(found[1], moved[..., None].expand_as(found[1]).int())


def test_threshold_zero_leaves_everything():
    x, _, sizes = make_case()
    options = {**sizes, "axes": [0, 1, 2], "window": 2}
    for granularity in ("element", "group", "token"):
        snapped, reused = snap_tokens(x, torch.zeros(1), GROUPS, [1.0] * 3, granularity=granularity, **options)
        assert torch.equal(snapped, x)
        assert not reused.any()
    assert torch.equal(token_roots(x, torch.zeros(1), **options), torch.arange(x.shape[2]).int().expand(x.shape[:3]))


def test_threshold_infinity_makes_every_cell_constant():
    x, _, sizes = make_case((4, 6, 8))
    options = {**sizes, "axes": [0, 1, 2], "window": 2, "granularity": "element"}
    snapped, reused = snap_tokens(x, torch.tensor([torch.inf]), GROUPS, FACTORS, **options)
    video = snapped[:, :, 3 : 3 + 192].unflatten(2, (2, 2, 3, 2, 4, 2))
    assert torch.equal(video, video[:, :, :, :1, :, :1, :, :1].expand_as(video))
    assert torch.equal(snapped[:, :, :3], x[:, :, :3])
    assert torch.equal(snapped[:, :, 195:], x[:, :, 195:])
    assert (reused == 192 * 7 // 8).all()
    # Both sides keep one value in eight, of the tokens that are video.
    kept = 1 - 168 / x.shape[2]
    torch.testing.assert_close(saved_share(reused, reused, x.shape[2]), torch.full((2, 3), 1 - kept**2).double())


def test_what_does_not_fill_a_window_is_left():
    x, theta, sizes = make_case((3, 3, 3), 0, 0, theta=float("inf"))
    snapped, _ = snap_tokens(x, theta, GROUPS, FACTORS, **sizes, axes=[0, 1, 2], window=2, granularity="element")
    video, before = snapped.unflatten(2, (3, 3, 3)), x.unflatten(2, (3, 3, 3))
    assert torch.equal(video[:, :, 2, 2, 2], before[:, :, 2, 2, 2])
    assert torch.equal(video[:, :, 1, 1, 2], before[:, :, 0, 0, 2])
    whole, _ = snap_tokens(x, theta, GROUPS, FACTORS, **sizes, axes=[0, 1, 2], window=4, granularity="element")
    assert torch.equal(whole, x)


def test_flags_are_ored_and_chains_end_at_computed_tokens():
    """One channel: equal along w in one row, along h in one column, so the corner goes to the cell's first token."""
    x = torch.tensor([[0.0, 0.1], [0.2, 5.0]]).view(1, 1, 4, 1)
    options = {"frames": 1, "height": 2, "width": 2, "first": 0, "axes": [0, 1, 2], "window": 2}
    snapped, reused = snap_tokens(x, torch.tensor([0.11]), [1], [1.0], **options, granularity="element")
    assert torch.equal(snapped.flatten(), torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert reused.item() == 2


@pytest.mark.parametrize("window", [2, 3])
def test_what_is_reused_is_computed(window):
    """A root is its own root, so as many different values are left as are counted."""
    x, theta, sizes = make_case((6, 6, 6), 0, 0, batch=1)
    options = {**sizes, "axes": [0, 1, 2], "window": window}
    roots = token_roots(x, theta, **options).long()
    assert (roots != torch.arange(216)).any()
    assert torch.equal(roots.gather(2, roots), roots)
    snapped, reused = snap_tokens(x, theta, GROUPS, FACTORS, **options, granularity="element")
    for head in range(3):
        for channel in range(12):
            assert len(snapped[0, head, :, channel].unique()) == 216 - int(reused[0, head, channel])


@pytest.mark.parametrize("granularity", ["element", "group", "token"])
@pytest.mark.parametrize("window", [2, 4])
def test_critical_thresholds_say_what_is_reused_at_any_threshold(granularity, window):
    x, _, sizes = make_case()
    factors = FACTORS if granularity != "token" else [1.0] * 3
    options = {**sizes, "axes": [0, 2], "window": window, "granularity": granularity}
    critical = critical_theta(x, GROUPS, factors, **options)
    assert critical[:, :, :3].isinf().all()
    for theta in (0.3, 0.7, 1.2):
        _, reused = snap_tokens(x, torch.tensor([theta]), GROUPS, factors, **options)
        # Delta divided by a factor, or the threshold multiplied by it: all factors are powers of two.
        assert torch.equal((critical < theta).sum(2).int(), reused)


def test_a_group_is_snapped_alone():
    x, _, sizes = make_case(theta=1.0)
    one = snap_tokens(
        x, torch.tensor([1e30]), GROUPS, [1.0, 0.0, 0.0], **sizes, axes=[0], window=2, granularity="element"
    )
    assert torch.equal(one[0][..., 4:], x[..., 4:])
    assert (one[1][..., :4] == 2 * 6 * 7).all()
    assert not one[1][..., 4:].any()


def test_a_nan_is_never_reused():
    x, theta, sizes = make_case((2, 2, 2), 0, 0, theta=float("inf"))
    x[0, 0, 1, 2] = float("nan")
    options = {**sizes, "axes": [2], "window": 2, "granularity": "element"}
    for operator in (snap_tokens, reference):
        snapped, _ = operator(x, theta, GROUPS, FACTORS, **options)
        assert snapped.isnan().sum() == 1
        assert snapped[0, 0, 1, 2].isnan()


def test_saving_follows_its_formula_with_grouped_heads():
    query, key = torch.tensor([[[5, 0], [10, 10]]]), torch.tensor([[[5, 5]]])
    expected = [[1 - (0.5 * 0.5 + 1 * 0.5) / 2, 1.0]]
    torch.testing.assert_close(saved_share(query, key, 10), torch.tensor(expected).double())


def test_strides_and_inputs_left_alone():
    x, theta, sizes = make_case()
    options = {**sizes, "axes": [0, 1], "window": 2, "granularity": "group"}
    before = x.clone()
    expected = snap_tokens(x, theta, GROUPS, FACTORS, **options)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    for got, wanted in zip(snap_tokens(apart, theta, GROUPS, FACTORS, **options), expected, strict=True):
        assert torch.equal(got, wanted)
        assert got.is_contiguous()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.ones(1, 2, 9, 4, dtype=torch.float64)}, "got x of torch.float64"),
        ({"theta": torch.ones(2)}, "got E=2 in theta, expected at most 1"),
        ({"groups": [2, 1]}, r"got groups of \[2, 1\] channels, expected 4 together"),
        ({"factors": [1.0]}, "got 1 factors for 2 groups"),
        ({"frames": 3}, "got a grid of 3 x 2 x 2 from token 1 on, and 9 tokens"),
        ({"first": 2}, "got a grid of 2 x 2 x 2 from token 2 on, and 9 tokens"),
        ({"axes": []}, r"got axes \[\]"),
        ({"axes": [0, 0]}, r"got axes \[0, 0\]"),
        ({"axes": [3]}, r"got axes \[3\]"),
        ({"window": 1}, "got window=1, expected at least 2"),
        ({"granularity": "row"}, "got granularity 'row'"),
        ({"granularity": "token", "factors": [1.0, 2.0]}, r"got factors \[1.0, 2.0\], expected equal ones"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_does_not_fit(change, reason, device):
    arguments = {
        "x": torch.ones(1, 2, 9, 4), "theta": torch.ones(1), "groups": [2, 2], "factors": [1.0, 1.0],
        "frames": 2, "height": 2, "width": 2, "first": 1, "axes": [0], "window": 2, "granularity": "element", **change,
    }  # fmt: skip
    arguments = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    with pytest.raises(InvalidArgument, match=f"^snap_tokens: {reason}"):
        snap_tokens(**arguments)
    if "axes" in change or "first" in change:
        for name in ("groups", "factors", "granularity"):
            arguments.pop(name)
        with pytest.raises(InvalidArgument, match=f"^token_roots: {reason}"):
            token_roots(**arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    x, theta, sizes = make_case((2, 2, 3), dtype=dtype)
    options = {**sizes, "axes": [0, 1, 2], "window": 2}
    torch.library.opcheck(snap_tokens, (x, theta, GROUPS, FACTORS), {**options, "granularity": "group"})
    torch.library.opcheck(token_roots, (x, theta), options)


class _Snap(torch.nn.Module):
    def forward(self, x, theta):
        frames = (x.shape[2] - 5) // 42
        snapped, reused = snap_tokens(
            x, theta, GROUPS, FACTORS, frames=frames, height=6, width=7, first=3, axes=[0, 2], window=2,
            granularity="element",
        )  # fmt: skip
        return snapped, reused


def test_export_keeps_one_node_and_the_frames_dynamic():
    frames = torch.export.Dim("frames", min=1, max=9)
    shapes = {"x": {2: 42 * frames + 5}, "theta": {}}
    x, theta, _ = make_case()
    program = torch.export.export(_Snap(), (x, theta), dynamic_shapes=shapes, strict=False).run_decompositions({})
    ours = [n.target for n in program.graph.nodes if "graphwright" in str(n.target)]
    assert ours == [OPERATORS["snap_tokens"].overload]
    longer, _, _ = make_case((7, 6, 7))
    for got, wanted in zip(program.module()(longer, theta), _Snap()(longer, theta), strict=True):
        assert torch.equal(got, wanted)


def test_without_triton_the_cpu_kernel_works_and_the_cuda_kernel_says_so():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from graphwright.kernels import snap_tokens as module
        grid = {"frames": 1, "height": 2, "width": 2, "first": 0, "axes": [1], "window": 2}
        case = torch.ones(1, 1, 4, 8), torch.ones(1)
        assert module.snap_tokens(*case, [8], [1.0], granularity="token", **grid)[0].shape == (1, 1, 4, 8)
        module._cuda_roots(*case, **grid)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingKernel: graphwright::token_roots has no kernel" in done.stderr
    assert "triton is not installed" in done.stderr


def test_other_devices_get_the_missing_kernel_error():
    x, theta, sizes = make_case((1, 1, 2))
    options = {**sizes, "axes": [0], "window": 2}
    with pytest.raises(MissingKernel, match="graphwright::snap_tokens has no kernel for device 'cpu'"):
        module.snap_tokens._init_fn(x, theta, GROUPS, FACTORS, **options, granularity="element")
    with pytest.raises(MissingKernel, match="graphwright::token_roots has no kernel for device 'cpu'"):
        module.token_roots._init_fn(x, theta, **options)
