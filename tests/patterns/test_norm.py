"""Norms of real models, and near misses with their reasons."""

from collections import Counter

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.nn import functional as F

from graphwright.passes.canonicalize import canonicalize
from graphwright.patterns.graph import GraphView
from graphwright.patterns.norm import find_norms


def functional(model: nn.Module, *args: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return export(model.eval(), args, strict=False).run_decompositions({})


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


class Last(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).last_hidden_state


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.arange(8)[None]


def test_qk_norms_are_told_from_block_norms() -> None:
    config = transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5)
    program = functional(Logits(transformers.Qwen3ForCausalLM(config)), IDS)
    canonicalize(program)
    found = find_norms(GraphView(program), phase="decode")
    assert not found.refusals
    assert Counter((site.form, site.size) for site in found.sites) == {("rms_norm", 64): 5, ("rms_norm", 16): 4}
    assert all(site.eps == pytest.approx(1e-5) and site.gain_offset == 0 and site.bias is None for site in found.sites)
    site = {site.id: site for site in found.sites}["decode/model.model.layers.1.self_attn.q_norm/norm[0]"]
    assert site.weight is not None
    assert GraphView(program).target(site.weight) == "model.model.layers.1.self_attn.q_norm.weight"
    assert site.describe() == {
        "form": "rms_norm",
        "size": "16",
        "eps": "1e-05",
        "gain": "weight",
        "bias": "no",
        "dtype": "float32",
    }


def test_layer_norms_of_an_encoder() -> None:
    program = functional(Last(transformers.BertModel(transformers.BertConfig(**SIZES))), IDS)
    found = find_norms(GraphView(program))
    assert Counter(site.form for site in found.sites) == {"layer_norm": 5}
    assert all(site.weight is not None and site.bias is not None and site.eps == 1e-12 for site in found.sites)
    assert len({site.id for site in found.sites}) == 5


class Case(nn.Module):
    """One norm, near or far from the pattern."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.weight, self.grid = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        match self.case:
            case "plain":
                return F.rms_norm(x, (16,))
            case "offset":
                return F.rms_norm(x, (16,), 1 + self.weight, 1e-6)
            case "twice":
                return F.layer_norm(F.layer_norm(x, (16,)), (16,), self.weight)
            case "grid":
                return F.layer_norm(x, (4, 16), self.grid)
            case "computed gain":
                return F.rms_norm(x, (16,), gain)
            case "computed bias":
                return F.layer_norm(x, (16,), self.weight, gain)
            case _:
                return F.group_norm(x, 2)


def found_in(case: str, dtype: torch.dtype = torch.float32):
    x = torch.randn(2, 4, 16, dtype=dtype)
    return find_norms(GraphView(functional(Case(case).to(dtype), x, torch.randn(16, dtype=dtype))))


def test_an_offset_gain_is_split() -> None:
    (site,) = found_in("offset").sites
    assert site.gain_offset == 1
    assert site.weight is not None
    assert site.weight.op == "placeholder"
    assert site.describe()["gain"] == "1 + weight"


def test_two_norms_of_one_module_get_two_ids() -> None:
    assert [site.id for site in found_in("twice").sites] == ["main/norm[0]", "main/norm[1]"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_default_eps_is_what_the_operator_adds(dtype: torch.dtype) -> None:
    (site,) = found_in("plain", dtype).sites
    x = torch.full((1, 16), 0.01 * site.eps**0.5, dtype=dtype)  # so small that eps decides
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + site.eps).sqrt()
    torch.testing.assert_close(F.rms_norm(x, (16,)).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


REFUSALS = {
    "grid": "does not normalise over the last dimension alone",
    "computed gain": "computed gain",
    "computed bias": "computed bias",
    "groups": "normalises over groups or the batch",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_near_misses_are_refused_with_the_reason(case: str) -> None:
    found = found_in(case)
    assert not found.sites
    assert found.nearest_miss is not None
    assert found.nearest_miss.reason == REFUSALS[case]
