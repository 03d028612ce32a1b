"""The operator on the CPU: against an oracle in float64, known tables, its memory, refusals, and exported graphs."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import tile_mass as module
from graphwright.kernels.contract import FLOATS, OPERATORS
from graphwright.kernels.tile_mass import reference, tile_counts, tile_grid, tile_mass, tile_order


def make_case(
    grid, tile, *, protected=0, first=0, stride=1, batch=1, heads=2, head_dim=16, dtype=torch.float32, magnitude=1.0,
    seed=0,
):  # fmt: skip
    """Arguments and keywords of a call."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(2, batch, heads, math.prod(grid) + protected, head_dim, generator=generator) * magnitude
    ).to(dtype)
    sizes = dict(zip(("frames", "height", "width"), grid, strict=True))
    order = tile_order(*grid, tile, protected, first)
    return (query, key, order), {**sizes, "tile": list(tile), "stride": stride}


def assert_within_rounding(result, args, kwargs, scale=None):
    """Assert that both results are exact up to float32 rounding of the scores and of the sums.

    The scores as in band_recall: D + 4 roundings of the sum of magnitudes, half of which reaches a share. Then come
    sums over the keys and over the queries of a tile in float32, and over tiles.
    """
    (query, key, order), sizes = args, dict(kwargs)
    tile, stride = sizes["tile"], sizes["stride"]
    grid = [-(-sizes[name] // edge) for name, edge in zip(("frames", "height", "width"), tile, strict=True)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    volume = math.prod(tile)
    coordinates = list(itertools.product(*map(range, grid)))
    tile_of = {}  # token -> tile, None for protected ones
    for position, token in enumerate(order.tolist()):
        if 0 <= token < query.shape[2]:
            tile_of[token] = coordinates[position // volume] if position < volume * len(coordinates) else None
    sampled = set(coordinates[::stride])
    tokens = torch.tensor(sorted(tile_of))
    q, k = query.double()[:, :, tokens] * scale, key.double()[:, :, tokens]
    shares = (q @ k.mT).softmax(-1)
    rows = [index for index, token in enumerate(tokens.tolist()) if tile_of[token] in sampled]
    mass, rest = torch.zeros(*query.shape[:2], *grid, dtype=torch.float64), torch.zeros(query.shape[:2]).double()
    for row, (column, token) in itertools.product(rows, enumerate(tokens.tolist())):
        at, to = tile_of[int(tokens[row])], tile_of[token]
        if to is None:
            rest += shares[:, :, row, column] / len(rows)
        else:
            offset = tuple(abs(a - b) for a, b in zip(at, to, strict=True))
            mass[:, :, *offset] += shares[:, :, row, column] / len(rows)
    magnitudes = float((q.abs() @ k.abs().mT).amax())
    half_ulp = torch.finfo(torch.float32).eps / 2
    bound = half_ulp * ((query.shape[-1] + 4) * magnitudes / 2 + 2 * len(tokens) + len(rows) + 8)
    for got, exact in zip(result, (mass, rest), strict=True):
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        assert float((got.double() - exact).abs().max()) <= bound


sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=40, deadline=None)
@given(
    grid=sizes,
    tile=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    text=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    stride=st.integers(1, 4),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([None, 0.4]),
    slab=st.sampled_from([1, 1 << 21]),
    seed=st.integers(0, 2**31),
)
def test_kernel_and_reference_agree_with_the_exact_masses(grid, tile, text, stride, dtype, scale, slab, seed):
    args, kwargs = make_case(
        grid, tile, protected=sum(text), first=text[0], stride=stride, batch=2, dtype=dtype, magnitude=1.5, seed=seed
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLAB", slab)  # one head at a time, or all
        got = tile_mass(*args, **kwargs, scale=scale)
    assert_within_rounding(got, args, kwargs, scale)
    assert_within_rounding(reference(*args, **kwargs, scale=scale), args, kwargs, scale)
    torch.testing.assert_close(got[0].sum((2, 3, 4)) + got[1], torch.ones(2, 2), atol=1e-5, rtol=0)


def test_equal_scores_give_the_counts():
    """Every key has the same share, so a whole tile has the same share as any other: mass is counts / tiles^2."""
    (query, key, order), kwargs = make_case((4, 6, 4), (2, 3, 2), stride=1)
    mass, rest = tile_mass(torch.zeros_like(query), key, order, **kwargs)
    counts = tile_counts(4, 6, 4, (2, 3, 2))
    torch.testing.assert_close(mass[0, 0].double(), counts / counts.sum(), atol=1e-6, rtol=0)
    assert (rest == 0).all()


def test_padding_and_foreign_entries_are_neither_queries_nor_keys():
    (query, key, order), kwargs = make_case((3, 3, 3), (2, 2, 2), protected=2)
    expected = tile_mass(query, key, order, **kwargs)
    changed = order.clone()
    changed[order < 0] = 29 + torch.arange(int((order < 0).sum()), dtype=torch.int32)
    for got, wanted in zip(tile_mass(query, key, changed, **kwargs), expected, strict=True):
        assert torch.equal(got, wanted)
    empty = torch.full_like(order, -1)
    for operator in (tile_mass, reference):
        assert all((table == 0).all() for table in operator(query, key, empty, **kwargs))


def test_a_nan_stays_in_its_head():
    (query, key, order), kwargs = make_case((2, 4, 4), (2, 2, 2), batch=2, heads=3, protected=1)
    key[1, 2, 5, 0] = float("nan")
    mass, rest = tile_mass(query, key, order, **kwargs)
    assert mass[1, 2].isnan().any()
    assert rest[1, 2].isnan()
    assert rest.isnan().sum() == 1
    assert mass.isnan().any(-1).any(-1).any(-1).sum() == 1


def test_any_strides_and_inputs_left_alone():
    (query, key, order), kwargs = make_case((3, 4, 4), (2, 2, 2), batch=2, heads=3)
    before = query.clone(), key.clone(), order.clone()
    expected = tile_mass(query, key, order, **kwargs)
    apart = query.transpose(1, 2).contiguous().transpose(1, 2), key.mT.contiguous().mT
    for got in (tile_mass(*apart, order, **kwargs), tile_mass(query, key, order.repeat_interleave(2)[::2], **kwargs)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (query, key, order), strict=True))
    mass, rest = tile_mass(query[:, :0], key[:, :0], order, **kwargs)
    assert (mass.shape, rest.shape) == ((2, 0, 2, 2, 2), (2, 0))


@settings(max_examples=60, deadline=None)
@given(grid=sizes, tile=sizes, stride=st.integers(1, 5), text=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_counts_and_order_are_what_brute_force_finds(grid, tile, stride, text):
    shape = tile_grid(*grid, tile)
    tiles = list(itertools.product(*map(range, shape)))
    counts = torch.zeros(*shape, dtype=torch.float64)
    for at, to in itertools.product(tiles[::stride], tiles):
        counts[tuple(abs(a - b) for a, b in zip(at, to, strict=True))] += 1
    assert torch.equal(tile_counts(*grid, tile, stride), counts)
    expected = []
    for corner in tiles:
        for inside in itertools.product(*map(range, tile)):
            t, h, w = (a * edge + b for a, edge, b in zip(corner, tile, inside, strict=True))
            held = t < grid[0] and h < grid[1] and w < grid[2]
            expected.append(text[0] + (t * grid[1] + h) * grid[2] + w if held else -1)
    video = math.prod(grid)
    expected += [*range(text[0]), *range(text[0] + video, sum(text) + video)]
    order = tile_order(*grid, tile, sum(text), text[0])
    assert order.dtype == torch.int32
    assert order.tolist() == expected


def test_order_refuses_a_first_token_that_cannot_be():
    with pytest.raises(InvalidArgument, match="2 text tokens, 3 of them first"):
        tile_order(2, 2, 2, (1, 1, 1), 2, 3)


class _Largest(TorchDispatchMode):
    """The most elements that any tensor inside it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_grows_with_n_and_not_with_its_square():
    largest = {}
    for frames in (8, 32):
        (query, key, order), kwargs = make_case((frames, 16, 16), (2, 8, 8), heads=3, head_dim=32, stride=8)
        with _Largest() as mode:
            module._cpu(query, key, order, **kwargs)
        largest[len(order)] = mode.elements
    assert largest[2048] < 2048**2
    # One tile of queries against all keys, of as many heads as fit the slab; one head's once it is full.
    assert largest[8192] <= max(module._SLAB, 128 * 8192, 3 * 8192 * 32)
    assert largest[8192] <= 4 * largest[2048]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": torch.ones(1, 2, 8, 4, dtype=torch.float64)}, "got query of torch.float64"),
        ({"key": torch.ones(1, 2, 8, 4).half()}, "got key of torch.float16, expected torch.float32 as query has"),
        ({"key": torch.ones(1, 1, 8, 4)}, r"got key of shape \[1, 1, 8, 4\], expected \[B H N D\] with H=2 of query"),
        ({"order": torch.zeros(8)}, "got order of torch.float32, expected torch.int32"),
        ({"order": torch.zeros(2, 4, dtype=torch.int32)}, r"got order of shape \[2, 4\], expected \[P\]"),
        ({"order": torch.zeros(7, dtype=torch.int32)}, "got protected positions=-1, expected at least 0"),
        ({"frames": 0}, "got frames=0, expected at least 1"),
        ({"stride": 0}, "got stride=0, expected at least 1"),
        ({"tile": [1, 0, 2]}, r"got tile=\[1, 0, 2\], expected three sizes of at least 1"),
        ({name: torch.ones(1, 2, 8, 257) for name in ("query", "key")}, "got D=257 in query, expected at most 256"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_the_contract_does_not_hold(change, reason, device):
    (query, key, order), kwargs = make_case((2, 2, 2), (1, 2, 2), head_dim=4)
    arguments = {"query": query, "key": key, "order": order, **kwargs, **change}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(InvalidArgument, match=f"^tile_mass: {reason}"):
        tile_mass(**arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    args, kwargs = make_case((3, 3, 2), (2, 2, 2), protected=1, stride=2, dtype=dtype)
    torch.library.opcheck(tile_mass, args, kwargs)


class _Mass(torch.nn.Module):
    def forward(self, query, key, order):
        frames = query.shape[2] // 6
        return tile_mass(query, key, order, frames=frames, height=2, width=3, tile=[2, 2, 2])


def test_export_keeps_one_node_for_any_number_of_frames():
    auto = torch.export.Dim.AUTO
    args, _ = make_case((5, 2, 3), (2, 2, 2), batch=2)
    shapes = {"query": {0: auto, 1: auto, 2: auto}, "key": {0: auto, 1: auto, 2: auto}, "order": {0: auto}}
    program = torch.export.export(_Mass(), args, dynamic_shapes=shapes, strict=False).run_decompositions({})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(OPERATORS["tile_mass"].overload) == 1
    for frames in (4, 9):
        args, kwargs = make_case((frames, 2, 3), (2, 2, 2), batch=3, heads=4)
        mass, rest = program.module()(*args)
        assert mass.shape == (3, 4, -(-frames // 2), 1, 2)
        assert all(torch.equal(a, b) for a, b in zip((mass, rest), tile_mass(*args, **kwargs), strict=True))


def test_without_triton_the_cpu_kernel_works_and_the_cuda_kernel_says_so():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from graphwright.kernels import tile_mass as module
        case = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.arange(8, dtype=torch.int32)
        sizes = dict(frames=2, height=2, width=2, tile=[1, 2, 2])
        assert module.tile_mass(*case, **sizes)[0].shape == (1, 1, 2, 1, 1)
        module._cuda(*case, **sizes)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingKernel: graphwright::tile_mass has no kernel" in done.stderr
    assert "triton is not installed" in done.stderr


def test_other_devices_get_the_missing_kernel_error():
    args, kwargs = make_case((2, 2, 2), (1, 2, 2))
    with pytest.raises(MissingKernel, match="graphwright::tile_mass has no kernel for device 'cpu'"):
        module.tile_mass._init_fn(*args, **kwargs)
