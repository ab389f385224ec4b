"""`attention_packed` in portable Triton: `recipe::attention_packed_forward` reads Q, K and V where they lie in their projection, and its
backward writes their gradients into one buffer.
"""

import torch

from kernels.attention.operators import call, differentiable, operator
from kernels.attention.triton_backward import launch_backward
from kernels.attention.triton_forward import (
    FEATURES_SCHEMA,
    Features,
    feature_gradients,
    keep_for_backward,
    kept_for_backward,
    launch_forward,
)


def slices(packed, heads, kv_heads):
    return packed.split([heads, kv_heads, kv_heads], dim=2)


def outputs(qkv, heads, *_):
    batch, seq, _, head_dim = qkv.shape
    return qkv.new_empty((batch, seq, heads, head_dim)), qkv.new_empty((batch, heads, seq), dtype=torch.float32)


@operator(
    f"attention_packed_forward(Tensor qkv, SymInt heads, SymInt kv_heads, bool causal, float scale, {FEATURES_SCHEMA}) -> (Tensor, Tensor)",
    outputs,
)
def attention_packed_forward(qkv, heads, kv_heads, causal, scale, *features):
    """`attention_forward` of the slices of qkv [batch, seq, heads + 2 * kv_heads, head_dim]."""
    return launch_forward(*slices(qkv, heads, kv_heads), causal, scale, Features(*features))


def _gradients(dout, dlse, qkv, out, lse, heads, kv_heads, causal, scale, *features):
    return qkv.new_empty(qkv.shape), lse.new_empty(0 if Features(*features).sinks is None else heads)


@operator(
    "attention_packed_backward(Tensor dout, Tensor? dlse, Tensor qkv, Tensor out, Tensor lse, SymInt heads, SymInt kv_heads, bool causal, "
    f"float scale, {FEATURES_SCHEMA}) -> (Tensor, Tensor)",
    _gradients,
)
def attention_packed_backward(dout, dlse, qkv, out, lse, heads, kv_heads, causal, scale, *features):
    """(dqkv, shaped as qkv, and dsinks, as `attention_backward` gives it)."""
    dqkv = qkv.new_empty(qkv.shape)
    tensors, gradients = slices(qkv, heads, kv_heads), slices(dqkv, heads, kv_heads)
    return dqkv, launch_backward(dout, dlse, *tensors, out, lse, causal, scale, Features(*features), *gradients)


def _save_for_backward(ctx, inputs, output):
    qkv, ctx.heads, ctx.kv_heads, *others = inputs
    keep_for_backward(ctx, (qkv, *output), *others)


def _differentiate(ctx, dout, dlse):
    qkv, out, lse, causal, scale, features = kept_for_backward(ctx)
    dout = torch.zeros_like(out) if dout is None else dout
    dqkv, dsinks = call(attention_packed_backward, dout, dlse, qkv, out, lse, ctx.heads, ctx.kv_heads, causal, scale, *features)
    return dqkv, None, None, None, None, *feature_gradients(features, dsinks)


differentiable(attention_packed_forward, _save_for_backward, _differentiate)
