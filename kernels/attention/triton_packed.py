"""Attention on a packed projection, in portable Triton: `recipe::attention_packed_forward`. Q, K and V are read where they lie, and their
gradients are written into one buffer: autograd, given slices of a projection, would copy three gradients into a fourth tensor.
"""

import torch

from kernels.attention.triton_backward import launch_backward
from kernels.attention.triton_forward import (
    FEATURES_SCHEMA,
    Features,
    feature_gradients,
    keep_for_backward,
    kept_for_backward,
    launch_forward,
)


def attention_packed(
    qkv: torch.Tensor, *, heads: int, kv_heads: int | None = None, causal: bool = True, scale: float | None = None, **features
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` on one projection: (out [batch, seq, heads, head_dim], log-sum-exp [batch, heads, seq] float32).

    qkv: [batch, seq, heads + 2 * kv_heads, head_dim], the heads of Q, then of K, then of V; or [batch, seq, 3, heads, head_dim]. float16,
    bfloat16 or float32, head_dim from 16 to 256. kv_heads: default heads. features: the fields of `triton_forward.Features`, by name.
    ValueError when qkv does not have that many heads.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    packed = qkv.flatten(2, 3) if qkv.ndim == 5 else qkv
    if packed.ndim != 4 or packed.shape[2] != heads + 2 * kv_heads or heads % kv_heads:
        expected = f"[batch, seq, {heads} + 2 * {kv_heads}, head_dim], heads a multiple of kv_heads"
        raise ValueError(f"attention_packed: qkv must be {expected}, got {list(qkv.shape)}")
    scale = packed.shape[3] ** -0.5 if scale is None else scale
    return attention_packed_forward(packed, heads, kv_heads, causal, scale, **features)


def _slices(packed, heads, kv_heads):
    return packed.split([heads, kv_heads, kv_heads], dim=2)


@torch.library.custom_op(
    "recipe::attention_packed_forward",
    mutates_args=(),
    schema=f"(Tensor qkv, SymInt heads, SymInt kv_heads, bool causal, float scale, {FEATURES_SCHEMA}) -> (Tensor, Tensor)",
)
def attention_packed_forward(qkv, heads, kv_heads, causal, scale, *features):
    """`attention_forward` of the slices of qkv [batch, seq, heads + 2 * kv_heads, head_dim]."""
    return launch_forward(*_slices(qkv, heads, kv_heads), causal, scale, Features(*features))


@attention_packed_forward.register_fake
def _outputs(qkv, heads, *_):
    batch, seq, _, head_dim = qkv.shape
    return qkv.new_empty((batch, seq, heads, head_dim)), qkv.new_empty((batch, heads, seq), dtype=torch.float32)


@torch.library.custom_op(
    "recipe::attention_packed_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor qkv, Tensor out, Tensor lse, SymInt heads, SymInt kv_heads, bool causal, float scale, "
    f"{FEATURES_SCHEMA}) -> (Tensor, Tensor)",
)
def attention_packed_backward(dout, dlse, qkv, out, lse, heads, kv_heads, causal, scale, *features):
    """(dqkv, shaped as qkv, and dsinks, as `attention_backward` gives it)."""
    dqkv = qkv.new_empty(qkv.shape)
    slices, gradients = _slices(qkv, heads, kv_heads), _slices(dqkv, heads, kv_heads)
    return dqkv, launch_backward(dout, dlse, *slices, out, lse, causal, scale, Features(*features), *gradients)


@attention_packed_backward.register_fake
def _gradients(dout, dlse, qkv, out, lse, heads, kv_heads, causal, scale, *features):
    return qkv.new_empty(qkv.shape), lse.new_empty(0 if Features(*features).sinks is None else heads)


def _save_for_backward(ctx, inputs, output):
    qkv, ctx.heads, ctx.kv_heads, causal, scale, *features = inputs
    keep_for_backward(ctx, (qkv, *output), causal, scale, Features(*features))


def _differentiate(ctx, dout, dlse):
    (qkv, out, lse), features = kept_for_backward(ctx)
    dout = torch.zeros_like(out) if dout is None else dout
    dqkv, dsinks = attention_packed_backward(dout, dlse, qkv, out, lse, ctx.heads, ctx.kv_heads, ctx.causal, ctx.scale, *features)
    return dqkv, None, None, None, None, *feature_gradients(features, dsinks)


attention_packed_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
