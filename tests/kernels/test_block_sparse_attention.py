"""The operator on the CPU: against an oracle in float64, at the edges, refused, and exported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import block_sparse_attention as module
from graphwright.kernels import block_sparse_attention_cpu as cpu
from graphwright.kernels.block_sparse_attention import (
    block_sparse_attention,
    block_sparse_attention_lse,
    reference_lse,
)
from graphwright.kernels.contract import FLOATS, OPERATORS


class Case(NamedTuple):
    """Arguments of the operator, the keywords apart."""

    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor
    blocks: Tensor
    pattern: Tensor | None
    order: Tensor | None
    key_bias: Tensor | None
    key_blocks: int
    block_size: int
    scale: float | None = None

    def call(self, function: Any) -> Any:
        return function(*self[:8], **dict(zip(self._fields[8:], self[8:], strict=True)))


def make_case(
    batch=1, heads=2, key_heads=None, queries=200, keys=None, head_dim=32, *, block_size=64, rows=1, density=0.5,
    q_tail=0, k_tail=0, pattern=False, order=None, bias=None, scale=None, dtype=torch.float32, magnitude=1.0, seed=0,
):  # fmt: skip
    """Random lists over all blocks but the tails'; `order` is "shared" or "own"; `bias` the share of keys it masks."""
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    query = torch.randn(batch, heads, queries, head_dim, generator=generator) * magnitude
    shape = (batch, key_heads or heads, keys, head_dim)
    key = torch.randn(shape, generator=generator) * magnitude
    value = torch.randn(shape, generator=generator)
    orders = None
    if order is not None:
        # Some tokens stand nowhere and some positions are empty.
        held, places = max(queries - 3, 0), queries + 9
        orders = torch.full((rows if order == "own" else 1, places), -1, dtype=torch.int32)
        for row in orders:
            chosen = torch.randperm(queries, generator=generator)[:held].int()
            row[torch.randperm(places, generator=generator)[:held]] = chosen
    q_places, k_places = (queries, keys) if orders is None else (orders.shape[1],) * 2
    governed = max(-(-q_places // block_size) - q_tail, 0)
    key_blocks = max(-(-k_places // block_size) - k_tail, 0)
    keep = torch.rand(rows, governed, key_blocks, generator=generator) < density
    counts = keep.sum(-1).int()
    blocks = torch.full((rows, governed, key_blocks + 1), 10**9, dtype=torch.int32)
    for row in range(rows):
        for block in range(governed):
            listed = keep[row, block].nonzero().flatten().int()
            blocks[row, block, : len(listed)] = listed
    rows_of = torch.randint(rows, (batch if seed % 2 else 1, heads), generator=generator) if pattern else None
    key_bias = None
    if bias is not None:
        key_bias = torch.randn(1 if seed % 3 else batch, 1 if seed % 5 else heads, keys, generator=generator)
        key_bias[torch.rand(key_bias.shape, generator=generator) < bias] = float("-inf")
    floats = (t.to(dtype) for t in (query, key, value))
    return Case(*floats, counts, blocks, rows_of, orders, key_bias, key_blocks, block_size, scale)


def exact(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logarithms and the largest magnitude of each query's scores, in float64, one head at a time."""
    batch, heads, queries, head_dim = case.query.shape
    keys, size = case.key.shape[2], case.block_size
    output = torch.zeros(case.query.shape, dtype=torch.float64)
    lse = torch.full(output.shape[:3], float("-inf"), dtype=torch.float64)
    magnitude = torch.zeros_like(lse)
    for b in range(batch):
        for h in range(heads):
            if case.pattern is not None:
                row = int(case.pattern[b % len(case.pattern), h])
            else:
                row = (b * heads + h) % len(case.counts)
            order = None if case.order is None else case.order[row % len(case.order)].tolist()
            q_tokens, k_tokens = (range(queries), range(keys)) if order is None else (order, order)
            q, k, v = (t[b, h * t.shape[1] // heads].double() for t in case[:3])
            scale = head_dim**-0.5 if case.scale is None else case.scale
            for block in range(-(-len(q_tokens) // size)):
                asking = [t for t in q_tokens[block * size : (block + 1) * size] if t >= 0]
                if block < case.counts.shape[1]:
                    listed = case.blocks[row, block, : int(case.counts[row, block])].tolist()
                    places = [p for one in listed for p in range(one * size, (one + 1) * size)]
                    places += range(case.key_blocks * size, len(k_tokens))
                else:
                    places = range(len(k_tokens))
                asked = [k_tokens[p] for p in places if p < len(k_tokens) and k_tokens[p] >= 0]
                if not asking or not asked:
                    continue
                scores = q[asking] @ k[asked].T * scale
                sizes = q[asking].abs() @ k[asked].abs().T * abs(scale)
                if case.key_bias is not None:
                    bias = case.key_bias[b % len(case.key_bias), h % case.key_bias.shape[1], asked].double()
                    scores, sizes = scores + bias, sizes + bias.nan_to_num(neginf=0).abs()
                total = scores.logsumexp(-1)
                shares = (scores - total.masked_fill(total.isinf(), 0)[:, None]).exp()
                output[b, h, asking], lse[b, h, asking] = shares @ v[asked], total
                magnitude[b, h, asking] = sizes.amax(-1)
    return output, lse, magnitude


def assert_within_rounding(made: tuple[Tensor, Tensor], case: Case) -> None:
    """Assert that output and logarithms are the exact ones up to rounding.

    A score is a sum of D products, a scale, a bias and a difference to a maximum: at most D + 6 roundings of the sum of
    magnitudes. That much changes the logarithm, and each share by twice as much. Both sums have as many roundings as
    keys, and exp is good to 20 units in the last place in aten's attention, with 16 bits to 2^-13. With 16 bits the
    shares and the result are rounded to them.
    """
    output, lse = made
    expected, expected_lse, magnitude = exact(case)
    keys = case.key.shape[2]
    half_ulp = torch.finfo(torch.float32).eps / 2
    score = half_ulp * (case.query.shape[-1] + 6) * magnitude
    exponential = 40 * half_ulp if case.query.dtype == torch.float32 else 2**-13
    relative = 2 * (score + exponential) + half_ulp * 2 * keys
    largest = float(case.value.double().abs().max()) if case.value.numel() else 0.0
    info = torch.finfo(case.query.dtype)
    bound = relative[..., None] * largest + info.eps / 2 * (expected.abs() + largest) + info.tiny
    assert output.dtype == case.query.dtype
    assert output.shape == case.query.shape
    assert output.is_contiguous()
    assert lse.dtype == torch.float32
    assert torch.equal(lse == float("-inf"), expected_lse == float("-inf"))
    assert torch.equal(output[lse == float("-inf")], torch.zeros_like(output[lse == float("-inf")]))
    worst = ((output.double() - expected).abs() / bound).max() if output.numel() else 0
    assert worst <= 1, float(worst)
    finite = expected_lse.isfinite()
    allowed = score + exponential + half_ulp * (keys + expected_lse.abs().nan_to_num(posinf=0) * 4)
    assert ((lse.double() - expected_lse).abs() <= allowed)[finite].all()


SIZES = {
    "plain": {},
    "odd sizes": {"queries": 211, "keys": 333, "head_dim": 24},
    "tails": {"queries": 300, "q_tail": 1, "k_tail": 2},
    "all dense": {"q_tail": 9, "k_tail": 9},
    "empty rows": {"density": 0.15, "queries": 400},
    "rows by head": {"rows": 2, "batch": 2},
    "rows by batch and head": {"rows": 6, "batch": 2, "heads": 3},
    "pattern": {"rows": 3, "pattern": True, "batch": 2, "heads": 4, "key_heads": 2},
    "one order": {"rows": 2, "order": "shared", "k_tail": 1, "q_tail": 1},
    "orders": {"rows": 3, "order": "own", "pattern": True, "heads": 4, "bias": 0.3, "queries": 260},
    "bias": {"bias": 0.5, "k_tail": 1, "batch": 2, "seed": 3},
    "all masked": {"bias": 1.0},
    "blocks of 128": {"block_size": 128, "queries": 500, "k_tail": 1, "bias": 0.1, "order": "shared"},
    "head_dim 80": {"head_dim": 80, "scale": 0.05},
    "head_dim 256": {"head_dim": 256, "queries": 130},
    "large scores": {"magnitude": 5.0, "queries": 260},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SIZES)
def test_kernel_and_reference_agree_with_the_exact_attention(name, dtype):
    case = make_case(**SIZES[name], dtype=dtype)
    assert_within_rounding(case.call(block_sparse_attention_lse), case)
    assert_within_rounding(case.call(reference_lse), case)
    assert torch.equal(case.call(block_sparse_attention), case.call(block_sparse_attention_lse)[0])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "heads": st.sampled_from([1, 2, 4]),
            "queries": st.integers(0, 300),
            "head_dim": st.sampled_from([1, 8, 48, 64]),
            "block_size": st.sampled_from([64, 128]),
            "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
            "q_tail": st.integers(0, 3),
            "k_tail": st.integers(0, 3),
            "order": st.sampled_from([None, "shared", "own"]),
            "bias": st.sampled_from([None, 0.0, 0.4, 1.0]),
            "magnitude": st.sampled_from([0.1, 1.0, 6.0]),
            "dtype": st.sampled_from(FLOATS),
            "seed": st.integers(0, 2**31),
        }
    ),
    rows=st.integers(1, 3),
    keys=st.integers(0, 300),
    threads=st.sampled_from([1, 2, 5]),
    path=st.sampled_from(["products", "fused"]),
    chunk=st.sampled_from([128, 2048]),
)
def test_every_way_of_the_kernel_agrees_with_the_exact_attention(sizes, rows, keys, threads, path, chunk):
    keys = None if sizes["order"] else keys
    case = make_case(**sizes, keys=keys, rows=rows, pattern=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # as many query blocks are taken together
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "cpu_path", lambda dtype: (path, ""))
            patch.setattr(cpu, "_CHUNK", chunk)
            made = case.call(block_sparse_attention_lse)
    finally:
        torch.set_num_threads(before)
    assert_within_rounding(made, case)


@pytest.mark.parametrize("path", ["products", "fused"])
@pytest.mark.parametrize("magnitude", [0.5, 12.0])
def test_a_nan_stays_with_its_query(path, magnitude, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_path", lambda dtype: (path, ""))
    case = make_case(queries=256, magnitude=magnitude)
    case.query[0, 1, 70, 3] = float("nan")
    output, lse = case.call(block_sparse_attention_lse)
    bad = output.isnan().any(-1)
    assert bad[0, 1, 70]
    assert lse[0, 1, 70].isnan()
    assert bad.sum() == 1


def test_the_path_follows_the_processor(monkeypatch):
    for dtype in (torch.float32, torch.float16):
        assert cpu.cpu_path(dtype) == ("products", f"{dtype} is multiplied as float32, in two matrix products")
    for flags, path in (({"amx_bf16": True}, "fused"), ({"avx2": True}, "products"), ({"avx512_bf16": True}, "fused")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        cpu._multiplies_bfloat16.cache_clear()
        chosen, reason = cpu.cpu_path(torch.bfloat16)
        assert chosen == path
        assert "multipl" in reason
    cpu._multiplies_bfloat16.cache_clear()


def test_dense_is_faster_where_it_was_measured_faster():
    for device, known in module.CROSSOVER.items():
        shortest = min(known)
        assert f"faster below {shortest} tokens on {device}" in str(module.dense_is_faster(device, shortest - 1, 0.1))
        for keys, limit in known.items():
            assert module.dense_is_faster(device, keys, limit - 0.01) is None
            assert f"from density {limit} on at {keys} tokens" in str(module.dense_is_faster(device, keys, limit))
    assert module.dense_is_faster("meta", 10, 1.0) is None


def test_any_strides_and_inputs_left_alone():
    case = make_case(2, 4, 2, 150, bias=0.2, rows=4, order="own")
    before = [None if t is None else t.clone() for t in case[:8]]
    expected = case.call(block_sparse_attention)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in case[:3]]
    lists = case.counts.T.contiguous().T, case.blocks.mT.contiguous().mT
    assert torch.equal(Case(*apart, *lists, *case[5:]).call(block_sparse_attention), expected)
    rows = torch.arange(4, dtype=torch.int32)
    assert torch.equal(case._replace(pattern=rows[None]).call(block_sparse_attention), expected)
    assert torch.equal(case._replace(pattern=rows.expand(2, 4)).call(block_sparse_attention), expected)
    for after, tensor in zip(case[:8], before, strict=True):
        assert (after is None and tensor is None) or torch.equal(after, tensor)


@pytest.mark.parametrize("shape", [(0, 2, 64, 8), (1, 2, 0, 8)])
def test_nothing_to_do(shape):
    query = torch.ones(shape)
    counts, blocks = torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 0, 1, dtype=torch.int32)
    output, lse = block_sparse_attention_lse(query, query, query, counts, blocks, key_blocks=0, block_size=64)
    assert output.shape == shape
    assert lse.shape == shape[:3]


def test_lists_of_everything_are_dense_attention():
    case = make_case(2, 4, 2, 256, density=2.0)
    dense = torch.nn.functional.scaled_dot_product_attention(*case[:3], enable_gqa=True)
    torch.testing.assert_close(case.call(block_sparse_attention), dense, atol=1e-6, rtol=1e-5)


GOOD = make_case(1, 4, 2, 192, q_tail=1, k_tail=1)
INT = torch.int32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": GOOD.query.double()}, "got query of torch.float64"),
        ({"query": GOOD.query[0]}, r"got query of shape \[4, 192, 32\], expected \[B H N D\]"),
        ({"key": GOOD.key[..., :8]}, r"got key of shape \[1, 2, 192, 8\], expected \[B G M D\] with D=32 of query"),
        ({"value": GOOD.value[:, :1]}, r"got value of shape \[1, 1, 192, 32\], expected \[B G M D\] with G=2 of key"),
        ({"value": GOOD.value.half()}, "got value of torch.float16, expected torch.float32 as query has"),
        ({"key": GOOD.key[:, :0], "value": GOOD.value[:, :0]}, "got G=0 in key, expected at least 1"),
        ({"query": GOOD.query[:, :3]}, "got H=3 in query, expected a multiple of G=2"),
        (
            {name: torch.ones(1, 1, 192, 257) for name in ("query", "key", "value")},
            "got D=257 in query",
        ),
        ({"counts": GOOD.counts.long()}, "got counts of torch.int64, expected torch.int32"),
        ({"blocks": GOOD.blocks[:, :1]}, r"got blocks of shape \[1, 1, 3\], expected \[R Q W\] with Q=2 of counts"),
        ({"pattern": torch.zeros(1, 3, dtype=INT)}, r"got pattern of shape \[1, 3\], expected \[1|B H\] with H=4"),
        ({"pattern": torch.zeros(2, 4, dtype=INT)}, r"got pattern of shape \[2, 4\], expected \[1|B H\] with B=1"),
        ({"order": torch.zeros(2, 192, dtype=INT)}, r"got order of shape \[2, 192\], expected \[1|R P\] with R=1"),
        ({"key_bias": torch.zeros(1, 1, 5)}, r"got key_bias of shape \[1, 1, 5\], expected \[1|B 1|H M\] with M=192"),
        ({"key_bias": torch.zeros(1, 3, 192)}, r"got key_bias of shape \[1, 3, 192\]"),
        ({"block_size": 32}, "got block_size=32, expected one of 64, 128"),
        ({"key_blocks": -1}, "got key_blocks=-1, expected at least 0"),
        ({"key_blocks": 4}, "got key_blocks=4, expected at most the 3 blocks of 192 positions"),
        (
            {"counts": torch.zeros(1, 4, dtype=INT), "blocks": torch.zeros(1, 4, 1, dtype=INT)},
            "got Q=4, expected at most the 3 blocks of 192 positions",
        ),
        (
            {"counts": torch.zeros(3, 2, dtype=INT), "blocks": torch.zeros(3, 2, 1, dtype=INT)},
            "got 3 rows of lists and no pattern, expected 1, 4 or 4 rows",
        ),
        (
            {"key": GOOD.key[:, :, :150], "value": GOOD.value[:, :, :150], "order": torch.zeros(1, 192, dtype=INT)},
            "got an order, 192 queries and 150 keys, expected as many queries as keys",
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("operator", [block_sparse_attention, block_sparse_attention_lse])
def test_refuses_what_the_contract_does_not_hold(change, reason, device, operator):
    case = GOOD._replace(**change)
    case = Case(*(v.to(device) if isinstance(v, Tensor) else v for v in case))
    name = "block_sparse_attention_lse" if operator is block_sparse_attention_lse else "block_sparse_attention"
    with pytest.raises(InvalidArgument, match=f"^{name}: {reason}"):
        case.call(operator)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operator", [block_sparse_attention, block_sparse_attention_lse])
def test_opcheck(dtype, operator):
    case = make_case(1, 2, 1, 70, dtype=dtype, bias=0.2, order="shared", pattern=True)
    torch.library.opcheck(operator, case[:8], dict(zip(Case._fields[8:], case[8:], strict=True)))


class _Attention(torch.nn.Module):
    def forward(self, query, key, value, counts, blocks, pattern, order):
        key_blocks = order.shape[1] // 64
        return block_sparse_attention_lse(
            query, key, value, counts, blocks, pattern, order, key_blocks=key_blocks, block_size=64
        )


def test_export_keeps_one_node_and_every_size_dynamic():
    auto = torch.export.Dim.AUTO
    case = make_case(2, 3, 3, 250, order="own", rows=2, pattern=True, k_tail=1, seed=3)
    shapes = {name: dict.fromkeys(range(t.dim()), auto) for name, t in zip(Case._fields, case[:7], strict=False)}
    program = torch.export.export(_Attention(), case[:7], dynamic_shapes=shapes, strict=False).run_decompositions({})
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(OPERATORS["block_sparse_attention_lse"].overload) == 1
    other = make_case(2, 5, 5, 180, order="own", rows=4, pattern=True, k_tail=1, head_dim=24, seed=1)
    for made, expected in zip(program.module()(*other[:7]), other.call(block_sparse_attention_lse), strict=True):
        assert torch.equal(made, expected)


def test_both_operators_are_registered():
    for name in ("block_sparse_attention", "block_sparse_attention_lse"):
        operator = OPERATORS[name]
        assert operator.contract.operator == name
        assert operator.overload is getattr(torch.ops.graphwright, name).default


def test_without_triton_the_cpu_kernel_works_and_the_cuda_kernel_says_so():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from graphwright.kernels import block_sparse_attention as module
        q = torch.ones(1, 1, 64, 8)
        lists = torch.ones(1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
        assert module.block_sparse_attention(q, q, q, *lists, key_blocks=1, block_size=64).shape == q.shape
        module._cuda(q, q, q, *lists, key_blocks=1, block_size=64)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingKernel: graphwright::block_sparse_attention has no kernel" in done.stderr
    assert "triton is not installed" in done.stderr


def test_other_devices_get_the_missing_kernel_error():
    for operator in (module.block_sparse_attention, module.block_sparse_attention_lse):
        with pytest.raises(MissingKernel, match="has no kernel for device 'cpu'"):
            make_case(1, 1, 1, 4).call(operator._init_fn)
