"""Roles of linears in real models, from dataflow alone; near misses are refused for the right reason."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from graphwright.passes.canonicalize import canonicalize
from graphwright.patterns.graph import GraphView
from graphwright.patterns.linear import find_linears

TOKENS = torch.arange(8)[None]
ENCODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = ENCODER | SPECIAL | {"vocab_size": 100, "max_position_embeddings": 64}
DECODER = TEXT | {"num_key_value_heads": 2}


class Field(nn.Module):
    """Calls a transformers model and takes one field out of what it returns."""

    def __init__(self, model: nn.Module, field: str = "logits", **options: bool) -> None:
        super().__init__()
        self.model, self.field, self.options = model, field, options

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(x, **self.options), self.field)


class Wan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        )

    def forward(self, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
        return self.model(hidden_states=x, timestep=step, encoder_hidden_states=text, return_dict=False)[0]


def functional(model: nn.Module, *args: Tensor, dynamic_shapes=None) -> ExportedProgram:
    with torch.no_grad():
        program = export(model.eval(), args, dynamic_shapes=dynamic_shapes, strict=False)
        return program.run_decompositions({})


def decoder(kind: str, **options) -> ExportedProgram:
    config = getattr(transformers, f"{kind}Config")(**DECODER, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return functional(Field(model, use_cache=False), TOKENS)


def neox() -> ExportedProgram:
    return functional(
        Field(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)), use_cache=False), TOKENS
    )


def gpt2() -> ExportedProgram:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64, **SPECIAL)
    return functional(Field(transformers.GPT2LMHeadModel(config), use_cache=False), TOKENS)


def bert() -> ExportedProgram:
    return functional(Field(transformers.BertModel(transformers.BertConfig(**TEXT)), "last_hidden_state"), TOKENS)


def vit() -> ExportedProgram:
    config = transformers.ViTConfig(**ENCODER, image_size=16, patch_size=4)
    return functional(Field(transformers.ViTForImageClassification(config)), torch.randn(1, 3, 16, 16))


def wan() -> ExportedProgram:
    frames = Dim("frames", min=2, max=32)
    inputs = torch.randn(1, 4, 3, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32)
    return functional(Wan(), *inputs, dynamic_shapes=({2: frames}, None, None))


GATED = ["q", "k", "v", "o", "gate", "up", "down"]
PLAIN = ["q", "k", "v", "o", "up", "down"]

# Two layers each.
# Wan: attention to itself and to the text; the time and text embedders are two more plain MLPs, the projection that
# makes the modulation of all blocks is none of these.
MODELS: dict[str, tuple[Callable[[], ExportedProgram], dict[str, int]]] = {
    "llama": (lambda: decoder("Llama"), dict.fromkeys(GATED, 2) | {"head": 1}),
    "llama_eager": (lambda: decoder("Llama", attn_implementation="eager"), dict.fromkeys(GATED, 2) | {"head": 1}),
    "qwen3_qk_norm": (lambda: decoder("Qwen3", head_dim=16), dict.fromkeys(GATED, 2) | {"head": 1}),
    "gemma2_softcap": (lambda: decoder("Gemma2", head_dim=16), dict.fromkeys(GATED, 2) | {"head": 1}),
    "phi3_fused": (lambda: decoder("Phi3"), {"qkv": 2, "o": 2, "gate_up": 2, "down": 2, "head": 1}),
    "neox_parallel": (neox, {"qkv": 2, "o": 2, "up": 2, "down": 2, "head": 1}),
    "gpt2_conv1d": (gpt2, {"head": 1}),
    "bert": (bert, dict.fromkeys(PLAIN, 2)),
    "vit": (vit, dict.fromkeys(PLAIN, 2) | {"head": 1}),
    "wan": (wan, dict.fromkeys("qkvo", 4) | {"up": 4, "down": 4, "other": 1, "head": 1}),
}


@cache
def exported(name: str) -> ExportedProgram:
    """One model of the table; tests share it and must not change it."""
    return MODELS[name][0]()


def roles(program: ExportedProgram) -> Counter[str]:
    return Counter(site.role for site in find_linears(GraphView(program)).sites)


@pytest.mark.parametrize("name", MODELS)
def test_roles_in_real_models(name: str) -> None:
    found = find_linears(GraphView(exported(name)))
    assert Counter(site.role for site in found.sites) == MODELS[name][1]
    assert len({site.id for site in found.sites}) == len(found.sites)
    named = {"query": "q", "q_proj": "q", "to_k": "k", "v_proj": "v", "gate_proj": "gate", "up_proj": "up"}
    named |= {"gate_up_proj": "gate_up", "qkv_proj": "qkv", "query_key_value": "qkv", "down_proj": "down"}
    for site in found.sites:
        last = site.module_path.rsplit(".", 1)[-1]
        assert site.role == named.get(last, site.role), site.id


@pytest.mark.parametrize("name", ["llama_eager", "wan"])
def test_ids_and_roles_survive_canonicalization(name: str) -> None:
    before = {site.id: site.role for site in find_linears(GraphView(exported(name))).sites}
    program = copy.deepcopy(exported(name))
    canonicalize(program)
    assert {site.id: site.role for site in find_linears(GraphView(program)).sites} == before


def test_facts_of_one_site() -> None:
    view = GraphView(decoder("Qwen3", head_dim=16, tie_word_embeddings=True))
    sites = {site.id: site for site in find_linears(view, phase="prefill").sites}
    site = sites["prefill/model.model.layers.1.mlp.down_proj/linear[0]"]
    assert (site.in_features, site.out_features, site.bias, site.shared_weight) == (96, 64, None, False)
    assert site.weight_name == "model.model.layers.1.mlp.down_proj.weight"
    assert site.place == "model.model.layers.1.mlp.down_proj/linear[0]"
    assert "down_proj" in site.source or "linear" in site.source
    assert site.describe() == {
        "role": "down",
        "features": "96 -> 64",
        "tokens": "1 x 8",
        "bias": "no",
        "weight": "model.model.layers.1.mlp.down_proj.weight",
        "dtype": "float32",
    }
    assert sites["prefill/model.lm_head/linear[0]"].shared_weight


def test_conv1d_is_refused_by_name() -> None:
    found = find_linears(GraphView(exported("gpt2_conv1d")))
    assert Counter(refusal.reason for refusal in found.refusals) == {"weight is stored transposed": 8}
    assert found.refusals[0].facts["shape"] == [64, 192]  # [in, out]
    assert found.refusals[0].facts["weight"] == "model.transformer.h.0.attn.c_attn.weight"


class Mlp(nn.Module):
    """down(combine(first(x), second(x))) with a residual, so that down is no head."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], other_source: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.combine, self.other_source = combine, other_source

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.down(self.combine(self.first(x), self.second(y if self.other_source else x)))


def spelled_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


COMBINATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "silu": (lambda a, b: F.silu(a) * b, ["gate", "up", "down"]),
    "silu_second": (lambda a, b: a * F.silu(b), ["up", "gate", "down"]),
    "spelled_silu": (lambda a, b: a * torch.sigmoid(a) * b, ["gate", "up", "down"]),
    "quick_gelu": (lambda a, b: a * torch.sigmoid(1.702 * a) * b, ["gate", "up", "down"]),
    "spelled_gelu": (lambda a, b: spelled_gelu(a) * b, ["gate", "up", "down"]),
    "erf_gelu": (lambda a, b: 0.5 * a * (1 + torch.erf(a / 2**0.5)) * b, ["gate", "up", "down"]),
    "squared_relu": (lambda a, b: F.relu(a).square() * b, ["gate", "up", "down"]),
    "bilinear": (lambda a, b: a * b, ["up", "up", "down"]),
    "side_by_side": (lambda a, b: torch.cat([F.gelu(a), F.silu(b)], -1)[..., ::2], ["up", "up", "down"]),
    "sum": (lambda a, b: F.gelu(a) + b, ["other", "other", "other"]),
    "no_activation": (lambda a, b: a - a.mean() + 0 * b.sum(), ["other", "other", "other"]),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_gate_and_up(name: str) -> None:
    combine, expected = COMBINATIONS[name]
    x = torch.randn(2, 3, 16)
    found = find_linears(GraphView(functional(Mlp(combine), x, x)))
    by_module = {site.module_path: site.role for site in found.sites}
    assert [by_module[part] for part in ("first", "second", "down")] == expected


def test_a_gate_from_another_source_is_no_gate() -> None:
    combine = COMBINATIONS["silu"][0]
    program = functional(Mlp(combine, other_source=True), torch.randn(2, 3, 16), torch.randn(2, 3, 16))
    assert roles(program) == {"other": 3}


class Attention(nn.Module):
    """One head group, with what varies handed in."""

    def __init__(self, gated: bool = False, projected: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate, self.o = (nn.Linear(16, 16) for _ in range(5))
        self.gated, self.projected = gated, projected

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], 2, 8).transpose(1, 2)

        key = self.k(x) if self.projected else x
        y = F.scaled_dot_product_attention(heads(self.q(x)), heads(key), heads(self.v(x)))
        y = y.transpose(1, 2).flatten(2)
        return x + self.o(y * torch.sigmoid(self.gate(x)) if self.gated else y)


def test_gated_attention_output() -> None:
    found = find_linears(GraphView(functional(Attention(gated=True), torch.randn(1, 4, 16))))
    by_module = {site.module_path: site.role for site in found.sites}
    assert by_module == {"q": "q", "k": "k", "v": "v", "gate": "other", "o": "o"}


def test_a_residual_is_not_mistaken_for_a_projection() -> None:
    """Without a key projection the key is the residual stream, which the first block's linears feed: still no keys."""
    model = nn.Sequential(Attention(), Attention(projected=False))
    by_module = {s.module_path: s.role for s in find_linears(GraphView(functional(model, torch.randn(1, 4, 16)))).sites}
    assert by_module == {"0.q": "q", "0.k": "k", "0.v": "v", "0.o": "o", "1.q": "q", "1.v": "v", "1.o": "o"}


class Odd(nn.Module):
    """Linears whose weight is not a plain stored matrix."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.scale = nn.Parameter(torch.ones(16, 1))
        self.register_buffer("state", torch.randn(16, 16))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        match self.case:
            case "computed":
                return F.linear(x, self.weight * self.scale)
            case "input":
                return F.linear(x, w)
            case "state":
                y = F.linear(x, self.state)
                self.state.add_(1)
                return y
            case "vector":
                return F.linear(x, self.weight[0]) + F.linear(x, self.scale[:, 0])
            case "transposed":
                return x @ self.weight
            case _:
                return torch.mm(x, self.weight.t())


REFUSALS = {
    "computed": "computed weight",
    "input": "weight is an input of the call",
    "state": "weight is state",
    "vector": "computed weight",
    "transposed": "weight is stored transposed",
    "decomposed": "matrix product is not raised to a linear",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_near_misses_are_refused_with_the_reason(case: str) -> None:
    found = find_linears(GraphView(functional(Odd(case), torch.randn(3, 16), torch.randn(16, 16))))
    assert not found.sites
    assert found.nearest_miss is not None
    assert found.nearest_miss.reason == REFUSALS[case]
    assert found.nearest_miss.source


def test_a_stored_vector_is_refused() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    (refusal,) = find_linears(GraphView(functional(Vector(), torch.randn(3, 16)))).refusals
    assert (refusal.reason, refusal.facts["shape"]) == ("weight is not 2-D", [16])


def test_nothing_specialises_a_dynamic_size() -> None:
    program = exported("wan")
    before = {str(symbol): str(limits) for symbol, limits in program.range_constraints.items()}
    find_linears(GraphView(program))
    assert {str(symbol): str(limits) for symbol, limits in program.range_constraints.items()} == before
    assert any(site.describe()["tokens"].startswith("1 x 16*s") for site in find_linears(GraphView(program)).sites)
