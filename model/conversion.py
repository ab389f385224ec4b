"""GPT as Hugging Face's GPT-2, Llama or Mistral, and back: architecture to config.json, weights to their names and shapes.

Needs neither transformers nor the files: a config.json is a dict, a state a dict of tensors. What has no counterpart is refused.
"""

from collections.abc import Iterator
from typing import Any

import torch

from model.config import AttentionConfig, GPTConfig

State = dict[str, torch.Tensor]
_MODELS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def export_config(config: GPTConfig, attention: AttentionConfig, *, vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """The config.json of a resolved architecture.

    vocab_size: the tokenizer's; rows of the embedding beyond it are left behind.
    Raises ValueError where neither GPT-2 nor Llama, or Mistral for a window, is this architecture.
    """
    model_type = _model_type(config, attention)
    common = {
        "architectures": [_MODELS[model_type]], "model_type": model_type, "vocab_size": vocab_size, "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings, "bos_token_id": end_of_text, "eos_token_id": end_of_text, "dtype": "float32",
    }  # fmt: skip
    if model_type == "gpt2":
        return common | {
            "n_layer": config.layers, "n_embd": config.hidden_size, "n_head": config.heads, "n_inner": config.ffn_size,
            "n_positions": config.sequence_length, "layer_norm_epsilon": config.norm_eps, "activation_function": "gelu_new",
            "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": attention.dropout,
        }  # fmt: skip
    return common | {
        "num_hidden_layers": config.layers, "hidden_size": config.hidden_size, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.sequence_length, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "rope_theta": config.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": attention.dropout,
        **({"sliding_window": attention.window} if model_type == "mistral" else {"attention_bias": config.bias, "mlp_bias": config.bias}),
    }  # fmt: skip


def _model_type(config: GPTConfig, attention: AttentionConfig) -> str:
    dialect = (config.positions, config.norm, config.activation)
    if dialect == ("rope", "rmsnorm", "swiglu") and not (config.bias and attention.window is not None):
        return "llama" if attention.window is None else "mistral"
    plain_heads = config.kv_heads == config.heads and config.heads * config.head_dim == config.hidden_size
    if dialect == ("learned", "layernorm", "gelu") and config.bias and plain_heads and attention.window is None:
        return "gpt2"
    raise ValueError(
        f"no model of transformers is this one: model.positions={config.positions}, norm={config.norm}, activation={config.activation}, "
        f"bias={config.bias}, {config.heads} heads of {config.head_dim} and {config.kv_heads} of keys in {config.hidden_size}, "
        f"attention.window={attention.window}. GPT-2 is learned, layernorm, gelu with biases, without grouped queries and window; Llama is rope, "
        "rmsnorm, swiglu; with a window and without biases that is Mistral"
    )


def import_config(described: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Fields of ``GPTConfig``, and ``attention.window``, of a config.json; its sequence_length is the most that the model takes.

    Raises ValueError for a model that ``GPT`` is not.
    """
    model_type = described.get("model_type")
    if model_type not in _MODELS:
        raise ValueError(f"model_type {model_type} is none of {', '.join(_MODELS)}")
    defaults = {"tie_word_embeddings": model_type == "gpt2", "initializer_range": 0.02, **_DEFAULTS[model_type]}
    of = defaults | {key: value for key, value in described.items() if value is not None or defaults.get(key) is None}
    for key, allowed in _ONLY[model_type].items():
        if of.get(key) not in allowed:
            raise ValueError(f"{key} {of.get(key)} is none of {', '.join(map(str, allowed))}")
    shared = {"vocab_size": of["vocab_size"], "tied_embeddings": of["tie_word_embeddings"], "init_std": of["initializer_range"]}
    if model_type == "gpt2":
        return shared | {
            "layers": of["n_layer"], "hidden_size": of["n_embd"], "heads": of["n_head"], "kv_heads": of["n_head"],
            "head_dim": of["n_embd"] // of["n_head"], "ffn_size": of.get("n_inner") or 4 * of["n_embd"], "sequence_length": of["n_positions"],
            "positions": "learned", "norm": "layernorm", "norm_eps": of["layer_norm_epsilon"], "activation": "gelu", "bias": True,
        }, None  # fmt: skip
    rope = of.get("rope_parameters") or of.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind}, and model.positions=rope has the default alone")
    bias = of.get("attention_bias", False)
    if bias != of.get("mlp_bias", False):
        raise ValueError("attention_bias and mlp_bias differ, and model.bias is one for both")
    return shared | {
        "layers": of["num_hidden_layers"], "hidden_size": of["hidden_size"], "heads": of["num_attention_heads"],
        "kv_heads": of.get("num_key_value_heads") or of["num_attention_heads"],
        "head_dim": of.get("head_dim") or of["hidden_size"] // of["num_attention_heads"], "ffn_size": of["intermediate_size"],
        "sequence_length": of["max_position_embeddings"], "positions": "rope",
        "rope_theta": float(rope.get("rope_theta") or of.get("rope_theta") or 10000.0), "norm": "rmsnorm", "norm_eps": of["rms_norm_eps"],
        "activation": "swiglu", "bias": bias,
    }, of.get("sliding_window")  # fmt: skip


# What transformers takes where a config.json leaves it out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    },
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8},
}  # fmt: skip
# What has to be so for GPT to be the same function.
_ONLY = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    "llama": {"hidden_act": ("silu",)},
    "mistral": {"hidden_act": ("silu",)},
}  # fmt: skip


# --- weights --------------------------------------------------------------------------------------------------------


def export_state(state: State, config: GPTConfig, *, vocab_size: int) -> State:
    """Weights by Hugging Face's names, contiguous; those of a tied head and rows beyond ``vocab_size`` are left out."""
    exported: State = {}
    for theirs, (ours, rows, transposed) in _names(config):
        weight = state[ours]
        if ours in ("token_embedding.weight", "head.weight"):
            rows = slice(vocab_size)
        weight = weight if rows is None else weight[rows]
        exported[theirs] = (weight.T if transposed else weight).contiguous()
    return exported


def import_state(state: State, config: GPTConfig) -> State:
    """Weights by the names of ``GPT``, without those of a tied head.

    config: the architecture of ``import_config``.
    Raises ValueError where a weight is missing or none of this model's.
    """
    # GPT-2's own files leave the first part of the names out, and hold the causal masks of old.
    state = {name if name.startswith(("transformer.", "lm_head.", "model.")) or config.positions == "rope" else f"transformer.{name}": weight
             for name, weight in state.items()}  # fmt: skip
    found: dict[str, list[torch.Tensor]] = {}
    missing = []
    names = dict(_names(config))
    for theirs, (ours, _, transposed) in names.items():
        if theirs in state:
            found.setdefault(ours, []).append(state[theirs].T if transposed else state[theirs])
        else:
            missing.append(theirs)
    # A tied head may be there once more; masks and rotary frequencies are no weights.
    tolerated = ("lm_head.weight",) * config.tied_embeddings
    unexpected = [name for name in state if name not in names and name not in tolerated
                  and not name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))]  # fmt: skip
    if missing or unexpected:
        raise ValueError(f"weights missing: {_some(missing)}; unexpected: {_some(unexpected)}")
    return {ours: parts[0] if len(parts) == 1 else torch.cat(parts) for ours, parts in found.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def _names(config: GPTConfig) -> Iterator[tuple[str, tuple[str, slice | None, bool]]]:
    """Hugging Face's name of every weight, with ours, which rows of ours it is, and whether it is transposed (GPT-2's Conv1D)."""
    dialect = _gpt2_names if config.positions == "learned" else _llama_names
    yield from dialect(config)
    if not config.tied_embeddings:
        yield "lm_head.weight", ("head.weight", None, False)


def _gpt2_names(config: GPTConfig) -> Iterator[tuple[str, tuple[str, slice | None, bool]]]:
    yield "transformer.wte.weight", ("token_embedding.weight", None, False)
    yield "transformer.wpe.weight", ("position_embedding.weight", None, False)
    modules = {"ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.projection", "ln_2": "ffn_norm",
               "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"}  # fmt: skip
    for layer in range(config.layers):
        for theirs, ours in modules.items():
            for kind in ("weight", "bias"):
                yield f"transformer.h.{layer}.{theirs}.{kind}", (f"blocks.{layer}.{ours}.{kind}", None, kind == "weight" and "c_" in theirs)
    for kind in ("weight", "bias"):
        yield f"transformer.ln_f.{kind}", (f"final_norm.{kind}", None, False)


def _llama_names(config: GPTConfig) -> Iterator[tuple[str, tuple[str, slice | None, bool]]]:
    yield "model.embed_tokens.weight", ("token_embedding.weight", None, False)
    q, k = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linear = {
        "self_attn.q_proj": ("attention.qkv", slice(0, q)), "self_attn.k_proj": ("attention.qkv", slice(q, q + k)),
        "self_attn.v_proj": ("attention.qkv", slice(q + k, q + 2 * k)), "self_attn.o_proj": ("attention.projection", None),
        "mlp.gate_proj": ("ffn.up", slice(0, config.ffn_size)), "mlp.up_proj": ("ffn.up", slice(config.ffn_size, 2 * config.ffn_size)),
        "mlp.down_proj": ("ffn.down", None),
    }  # fmt: skip
    for layer in range(config.layers):
        for theirs, (ours, rows) in linear.items():
            for kind in ("weight", "bias") if config.bias else ("weight",):
                yield f"model.layers.{layer}.{theirs}.{kind}", (f"blocks.{layer}.{ours}.{kind}", rows, False)
        yield f"model.layers.{layer}.input_layernorm.weight", (f"blocks.{layer}.attention_norm.weight", None, False)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (f"blocks.{layer}.ffn_norm.weight", None, False)
    yield "model.norm.weight", ("final_norm.weight", None, False)
