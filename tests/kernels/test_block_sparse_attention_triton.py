"""The Triton kernels: their numbers in the interpreter and, where there is one, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.kernels.block_sparse_attention import block_sparse_attention, block_sparse_attention_lse
from graphwright.kernels.block_sparse_attention_cuda import launch
from graphwright.kernels.contract import FLOATS

from .interpreter import Call, interpret
from .test_block_sparse_attention import SIZES, Case, assert_within_rounding, make_case

LAUNCH = "graphwright.kernels.block_sparse_attention_cuda:launch"


def arguments(case: Case) -> tuple[Any, ...]:
    return (*case, True)


def test_interpreted_kernels_agree_with_the_exact_attention():
    cases = [make_case(**sizes) for sizes in SIZES.values()]
    cases += [make_case(**SIZES[name], dtype=torch.float16) for name in ("plain", "tails", "bias", "large scores")]
    for made, case in zip(interpret([Call(LAUNCH, arguments(case)) for case in cases]), cases, strict=True):
        assert_within_rounding(made, case)


def test_interpreted_kernels_with_tensor_descriptors():
    """The tiles of sm_90, which read by descriptors what others read by pointers."""
    names = ("odd sizes", "tails", "pattern", "one order", "orders", "bias", "head_dim 80")
    cases = [make_case(**SIZES[name], dtype=torch.float16) for name in names]
    calls = [Call(LAUNCH, arguments(case), {"capability": (9, 0)}) for case in cases]
    for made, case in zip(interpret(calls), cases, strict=True):
        assert_within_rounding(made, case)


def test_interpreted_kernels_at_the_edges():
    """Strides that no descriptor takes, a negative scale, a scale of zero, no keys, no queries, no output of sums."""
    case = make_case(2, 4, 2, 150, head_dim=24, rows=4, order="own", bias=0.2, dtype=torch.float16)
    apart = Case(*(t.mT.contiguous().mT for t in case[:3]), *case[3:])
    negative, zero = case._replace(scale=-0.3), case._replace(scale=0.0)
    keys = make_case(queries=100, keys=0, head_dim=24, dtype=torch.float16)
    queries = make_case(queries=0, keys=100, head_dim=24, dtype=torch.float16)
    cases = [apart, negative, zero, keys, queries]
    calls = [Call(LAUNCH, arguments(one), {"capability": (9, 0)}) for one in cases]
    calls.append(Call(LAUNCH, (*case, False)))
    *made, (output, lse) = interpret(calls)
    for one, of in zip(made, cases, strict=True):
        assert_within_rounding(one, of)
    assert lse.numel() == 0
    assert_within_rounding((output, case.call(block_sparse_attention_lse)[1]), case)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnTheGpu:
    """The same comparisons, over all dtypes."""

    pytestmark = GPU

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("name", SIZES)
    def test_agrees_with_the_exact_attention(self, name, dtype):
        case = make_case(**SIZES[name], dtype=dtype)
        on_gpu = Case(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in case))
        output, lse = on_gpu.call(block_sparse_attention_lse)
        assert_within_rounding((output.cpu(), lse.cpu()), case)
        assert torch.equal(on_gpu.call(block_sparse_attention), output)

    @pytest.mark.parametrize("block_size", [64, 128])
    @pytest.mark.parametrize("head_dim", [48, 64, 96, 128, 256])
    def test_large_blocks_of_work(self, block_size, head_dim):
        """As many programs as a device runs at once and more, in bfloat16, and the same with other tiles."""
        case = make_case(
            1, 8, 4, 3000, head_dim=head_dim, block_size=block_size, rows=3, pattern=True, order="own", k_tail=2,
            q_tail=1, dtype=torch.bfloat16, bias=0.1,
        )  # fmt: skip
        on_gpu = Case(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in case))
        output, lse = on_gpu.call(block_sparse_attention_lse)
        assert_within_rounding((output.cpu(), lse.cpu()), case)
        for with_bias in (on_gpu, on_gpu._replace(key_bias=None)):
            one = launch(*with_bias, True)
            other = launch(*with_bias, True, capability=(8, 0))
            torch.testing.assert_close(one[0], other[0], atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(one[1], other[1], atol=1e-3, rtol=1e-4)

    def test_nothing_waits_and_no_map_is_stored(self):
        case = make_case(1, 2, 2, 8192, head_dim=64, block_size=128, density=0.2, dtype=torch.bfloat16, rows=2)
        on_gpu = Case(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in case))
        on_gpu = on_gpu._replace(order=torch.randperm(8192, device="cuda").int()[None])
        on_gpu.call(block_sparse_attention)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_gpu.call(block_sparse_attention)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # Queries, keys, values and the output are 2 MiB each; one map of one head is 256 MiB.
        assert torch.cuda.max_memory_allocated() - before < 12 << 20
