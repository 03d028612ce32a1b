"""Caches split by heads: the graph, the numbers against a plain formula, the bytes, padding, files, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import graphwright as gw
from graphwright.build import build
from graphwright.kernels.window_cache import slots_for
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.edit import Edit
from graphwright.passes.split_cache_heads import SplitCacheHeads
from graphwright.patterns.cache import find_caches
from graphwright.patterns.nodes import aten
from graphwright.prepare import Prepared, prepare
from graphwright.profiles.profile import Profile, fingerprint
from tests.graph_text import check_text
from tests.models import CACHE, captured_bloom, captured_llama, tiny_bloom, tiny_llama, tokens
from tests.passes.test_quantize_cache import sliding_mistral


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(captured_llama())


def program(prepared: Prepared, *keep: tuple[int, ...], phases: Any = None, **options: Any) -> gw.Program:
    """Layer l keeps the heads keep[l]; None leaves a layer as it is."""
    options = {"sinks": 2, "window": 6} | options
    decisions = [
        Decision(site=site.id, method="test", pass_name="split_cache_heads", options=options | {"keep": list(heads)})
        for phase, sites in prepared.sites.items()
        for site, heads in zip(sites.cache, keep, strict=False)
        if phases is None or phase in phases
    ]
    return build(prepared, Profile(fingerprint=fingerprint(prepared.exported), data="", decisions=decisions))


@pytest.fixture(scope="module")
def full(prepared: Prepared) -> gw.Program:
    return program(prepared)


@pytest.fixture(scope="module")
def split(prepared: Prepared) -> gw.Program:
    made = program(prepared, (1,), ())
    assert {d.status for d in made.decisions} == {"kept"}, made.decisions
    return made


def steps(program: gw.Program, ids: Tensor, *pieces: int) -> Tensor:
    """Logits of tokens that are read in pieces, from an empty cache."""
    program.reset()
    results, first = [], 0
    for count in pieces:
        results.append(program(ids[:, first : first + count], torch.arange(first, first + count)))
        first += count
    return torch.cat(results, 1)


def test_the_graph_has_an_attention_for_each_kind_of_head(split: gw.Program):
    for phase in ("decode", "extend"):
        check_text(
            split.phases[phase].exported,
            """
            CHECK: {{.*}}window_cache_attention.default
            CHECK: {{.*}}window_cache_append.default(key_cache_0.window
            CHECK: {{.*}}window_cache_append.default(value_cache_0.window
            CHECK: {{.*}}scaled_dot_product_attention
            CHECK: {{.*}}cat.default
            CHECK: {{.*}}window_cache_attention.default
            CHECK: {{.*}}window_cache_append.default(key_cache_1.window
            CHECK-NOT: scaled_dot_product_attention
            """,
        )
    prefill = [str(node.target) for node in split.phases["prefill"].exported.graph.nodes]
    assert sum("scaled_dot_product" in name for name in prefill) == 3
    assert sum("window_cache_attention" in name for name in prefill) == 0, "a prefill attends to all tokens"
    assert sum("window_cache_append" in name for name in prefill) == 4


def test_while_nothing_is_dropped_nothing_changes(split: gw.Program, full: gw.Program):
    ids = tokens(8)
    for pieces in ((8,), (1,) * 8, (3, 1, 4)):
        torch.testing.assert_close(steps(split, ids, *pieces), steps(full, ids, *pieces), rtol=1e-4, atol=1e-5)


def test_a_prefill_attends_to_everything(split: gw.Program, full: gw.Program):
    ids = tokens(30)
    torch.testing.assert_close(steps(split, ids, 30), steps(full, ids, 30), rtol=1e-4, atol=1e-5)
    # What comes after does not.
    assert not torch.allclose(steps(split, ids, 29, 1)[:, -1], steps(full, ids, 29, 1)[:, -1], rtol=1e-3, atol=1e-3)


def test_the_state_does_not_depend_on_the_pieces(prepared: Prepared):
    """In the first layer, whose keys and values do not depend on what earlier attentions saw."""
    ids = tokens(24)
    states = []
    for pieces in ((24,), (1,) * 24, (5, 1, 9, 9)):
        made = program(prepared, (1,), (0,))
        steps(made, ids, *pieces)
        states.append({name: tensor for name, tensor in made._state().items() if "_cache_0" in name})
    assert set(states[0]) == {f"{half}_cache_0.{part}" for half in ("key", "value") for part in ("kept", "window")}
    for other in states[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, states[0][name], rtol=1e-4, atol=1e-6)


class _Split(torch.nn.Module):
    """transformers' attention as a formula: windowed heads see sinks, a window, and the mean of what was dropped."""

    def __init__(self, keep: dict[int, tuple[int, ...]], sinks: int, window: int) -> None:
        super().__init__()
        self.keep, self.sinks, self.window = keep, sinks, window

    def attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        length, outputs = key.shape[2], []
        now = length - 1  # one query, at the last position
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            k, v, q = key[0, group], value[0, group], query[0, head, -1]
            bias = torch.zeros(length)
            gone = slice(self.sinks, max(self.sinks, now - self.window))
            if group not in self.keep[module.layer_idx] and (n := gone.stop - gone.start):
                k, v = (torch.cat([x[: gone.start], x[gone.stop :], x[gone].mean(0, keepdim=True)]) for x in (k, v))
                bias = torch.zeros(len(k))
                bias[-1] = torch.tensor(float(n)).log()
            outputs.append(((k @ q) * query.shape[-1] ** -0.5 + bias).softmax(0) @ v)
        return torch.stack(outputs)[None, None], None


def test_decoding_is_the_formula():
    """Token by token, against transformers' model with a growing cache and the formula in its attention."""
    from transformers import DynamicCache
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    keep = {0: (1,), 1: ()}
    ALL_ATTENTION_FUNCTIONS["split_for_test"] = _Split(keep, 2, 6).attention
    try:
        model = tiny_llama()
        made = program(prepare(gw.capture_causal_lm(model, CACHE)), *keep.values())
        model.config._attn_implementation = "split_for_test"
        ids, cache = tokens(20), DynamicCache()
        with torch.no_grad():
            wanted = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20)]
    finally:
        del ALL_ATTENTION_FUNCTIONS["split_for_test"]
    torch.testing.assert_close(steps(made, ids, *[1] * 20), torch.cat(wanted, 1), rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_buffers(split: gw.Program, full: gw.Program):
    # float32, heads of 16: layer 0 keeps one head of two whole, layer 1 none.
    slots = slots_for(2, 6, torch.float32)
    assert slots == 9
    assert full.state_bytes() == 2 * 2 * 2 * CACHE * 16 * 4
    assert split.state_bytes() == 2 * 16 * 4 * (CACHE + slots + 2 * slots)
    assert not any(name in split.phases["decode"].exported.state_dict for name in ("key_cache_0", "value_cache_1"))


def test_writes_are_in_place(split: gw.Program):
    """A decode step copies no buffer."""
    split(tokens(1), torch.tensor([0]))
    calls = [str(node.target) for node in split._lowered["decode"].graph.nodes]
    assert calls.count("graphwright.window_cache_append_.default") == 4
    assert calls.count("aten.index_copy_.default") == 2
    assert not any("copy_.default" in name and "index" not in name for name in calls)


def test_a_saved_program_is_the_same(split: gw.Program, tmp_path):
    wanted = split.generate(tokens(6), 20)
    split.save(tmp_path / "s.gw")
    loaded = gw.load(tmp_path / "s.gw")
    assert torch.equal(loaded.generate(tokens(6), 20), wanted)
    assert loaded.state_bytes() == split.state_bytes()


def test_more_tokens_than_were_captured_are_refused(split: gw.Program):
    with pytest.raises(gw.GraphwrightError, match="do not fit the captured cache of 32"):
        split.generate(tokens(30), 4)
    with pytest.raises(gw.GraphwrightError, match="do not fit the captured cache of 32"):
        split(tokens(1), torch.tensor([32]))


def test_a_place_is_split_in_all_phases_or_in_none(prepared: Prepared, full: gw.Program):
    made = program(prepared, (1,), (0,), phases=("decode", "extend"))
    assert all(d.status == "failed" and "prefill would keep the old state" in d.reason for d in made.decisions)
    assert made.state_bytes() == full.state_bytes()
    ids = tokens(16)
    assert torch.equal(steps(made, ids, 8, 1, 7), steps(full, ids, 8, 1, 7))


@pytest.mark.parametrize("pack", [{}, {"key_bits": 8, "value_bits": 8, "mode": "per_token"}])
def test_padded_sequences_are_what_they_are_alone(pack):
    model = tiny_llama()
    padded = prepare(gw.capture_causal_lm(model, CACHE, 2, padding=True))
    alone = prepare(gw.capture_causal_lm(model, CACHE))
    both, one = (program(each, (1,), (), pack=pack) for each in (padded, alone))
    assert {d.status for d in both.decisions} == {"kept"}, both.decisions
    prompts = [tokens(5)[0].tolist(), tokens(14, 1)[0].tolist()]
    together = both.generate(prompts, 16)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[-16:], one.generate([prompt], 16)[0, -16:])


def test_whole_heads_can_be_packed(prepared: Prepared, split: gw.Program):
    packed = program(prepared, (1,), (), pack={"key_bits": 8, "value_bits": 4, "mode": "per_token"})
    assert {d.status for d in packed.decisions} == {"kept"}, packed.decisions
    names = [str(node.target) for node in packed.phases["decode"].exported.graph.nodes]
    assert sum("quantized_cache_attention" in name for name in names) == 1
    assert sum("cache_append" in name and "window" not in name for name in names) == 2
    assert packed.state_bytes() == split.state_bytes() - 2 * CACHE * 16 * 4 + CACHE * (16 + 4 + 8 + 4)
    ids = tokens(24)
    found, wanted = steps(packed, ids, 10, *[1] * 14), steps(split, ids, 10, *[1] * 14)
    assert torch.equal(found[:, :10], wanted[:, :10])
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1


def test_the_mean_can_be_left_out(prepared: Prepared, split: gw.Program):
    without = program(prepared, (1,), (), compensate=False)
    ids = tokens(24)
    assert not torch.allclose(steps(without, ids, *[1] * 24), steps(split, ids, *[1] * 24), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": (2,)}, "head 2 is to be kept, the cache has heads 0 to 1"),
        ({"keep": (0, 1)}, "every head keeps the whole cache"),
        ({"window": 0}, "got 2 sinks and a window of 0"),
        ({"window": 29}, "take 32 slots, the whole cache 32"),
        ({"pack": {"key_bits": 3}}, "got 3 bits"),
    ],
)
def test_wrong_options_fail_with_a_reason(prepared: Prepared, full: gw.Program, options, reason):
    keep = options.pop("keep", (1,)) if "keep" in options else (1,)
    made = program(prepared, keep, keep, **{k: v for k, v in options.items() if k != "keep"})
    assert all(d.status == "failed" and reason in d.reason for d in made.decisions), made.decisions
    assert made.state_bytes() == full.state_bytes()


def test_heads_that_cannot_be_split_are_refused(prepared: Prepared):
    """Query heads that are no multiple of the cache's, heads repeated before the attention, a mask of each head."""
    edit = Edit(copy_exported(prepared.exported["extend"]))
    site = find_caches(edit.view).sites[0]
    split = SplitCacheHeads(keep=(0,), sinks=2, window=6)
    assert split.guard(site, edit) is None
    assert "heads cannot be split: 4 query heads are no multiple of 3" in str(
        split.guard(replace(site, kv_heads=3), edit)
    )
    node = site.attention
    repeated = edit.call(aten.repeat_interleave.self_int, site.key_write, 2, 1, like=node)
    args = node.args
    node.args = (args[0], repeated, *args[2:])
    assert "reads the cache's heads repeated" in str(split.guard(site, edit))


def test_sliding_windows_are_left_alone():
    prepared = prepare(gw.capture_causal_lm(sliding_mistral(), CACHE))
    made = program(prepared, (1,), (1,))
    assert all(d.status == "failed" and "no more than its last 8 tokens" in d.reason for d in made.decisions)


@pytest.fixture(scope="module")
def bloom() -> Prepared:
    return prepare(captured_bloom())


ALIBI = {"compensate": False, "window": 6, "sinks": 2}


@pytest.mark.parametrize("keep", [((2, 3), (0, 2)), ((3,), ()), ((), (1,))])
def test_alibi_heads_decode_as_the_model_with_a_mask_of_each_head(bloom: Prepared, keep: Any):
    """The model's own attention, with what a windowed head does not keep masked for it."""
    made = program(bloom, *keep, **ALIBI)
    assert {d.status for d in made.decisions} == {"kept"}, made.decisions
    model, ids = tiny_bloom(), tokens(24)
    away = torch.arange(24)[:, None] - torch.arange(24)
    gone = (away > 6) & (torch.arange(24) >= 2)
    for layer, heads in enumerate(keep):
        windowed = torch.tensor([head not in heads for head in range(4)])
        lost = (gone & windowed[:, None, None])[None]

        def hook(module: Any, args: Any, kwargs: Any, lost: Tensor = lost) -> Any:
            mask = kwargs["attention_mask"].expand_as(lost).masked_fill(lost, torch.finfo(torch.float32).min)
            return args, kwargs | {"attention_mask": mask}

        model.transformer.h[layer].self_attention.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(steps(made, ids, *[1] * 24), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, tiny_bloom()(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_prefill_of_alibi_heads_attends_to_everything(bloom: Prepared):
    made, ids = program(bloom, (1, 3), (), **ALIBI), tokens(30)
    with torch.no_grad():
        torch.testing.assert_close(steps(made, ids, 30), tiny_bloom()(ids).logits, rtol=1e-4, atol=1e-5)
    # And leaves what single tokens leave, in the first layer.
    states = []
    for pieces in ((30,), (1,) * 30, (7, 1, 22)):
        again = program(bloom, (1, 3), (), **ALIBI)
        steps(again, ids, *pieces)
        states.append({name: x for name, x in again._state().items() if "_cache_0" in name})
    for other in states[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, states[0][name], rtol=1e-4, atol=1e-6)


def test_alibi_heads_of_a_saved_program(bloom: Prepared, tmp_path):
    made = program(bloom, (2, 3), (0,), **ALIBI)
    made.save(tmp_path / "s.gw")
    loaded = gw.load(tmp_path / "s.gw")
    assert torch.equal(loaded.generate(tokens(6), 20), made.generate(tokens(6), 20))
    assert loaded.state_bytes() == 2 * 16 * 4 * (3 * CACHE + 5 * 9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compensate": True}, "the mask adds slopes over the keys, and the mean of dropped tokens has no position"),
        ({"pack": {"key_bits": 8, "value_bits": 8, "mode": "per_token"}}, "the mask is not causal in the positions"),
    ],
)
def test_alibi_heads_have_no_mean_and_are_not_packed(bloom: Prepared, options, reason):
    made = program(bloom, (1,), (1,), **ALIBI | options)
    assert all(d.status == "failed" and reason in d.reason for d in made.decisions), made.decisions


def test_alibi_heads_are_left_alone_on_cuda(bloom: Prepared):
    edit = Edit(copy_exported(bloom.exported["decode"]))
    site = find_caches(edit.view).sites[0]
    split = SplitCacheHeads(keep=(0,), **ALIBI)
    assert split.guard(site, edit) is None
    buffer = site.key_buffer.meta["val"]
    with buffer.fake_mode:
        site.key_buffer.meta["val"] = torch.empty(buffer.shape, device="cuda")
    assert "window_cache_attention takes on the CPU only" in str(split.guard(site, edit))


class _Reader(torch.nn.Module):
    """An attention over a cache that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 2, 16, 8))
        self.register_buffer("values", torch.zeros(1, 2, 16, 8))

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (b.index_copy_(2, at, x) for b in (self.get_buffer("keys"), self.get_buffer("values")))
        mask = torch.arange(16) <= at[:, None]
        return functional.scaled_dot_product_attention(x, keys, values, mask), keys.sum()


def test_a_cache_that_something_else_reads_is_named():
    sites = prepare(gw.capture(_Reader().eval(), (torch.randn(1, 2, 3, 8), torch.arange(3)))).sites["main"]
    assert not sites.cache
    assert any(
        "read by something that is not its attention" in str(r) and "sum" in str(r) for r in sites.refusals["cache"]
    )
