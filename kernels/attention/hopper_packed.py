"""`attention_packed` on Hopper: `recipe::hopper_attention_packed_forward` reads Q, K and V where they lie in their projection, and its backward
writes their gradients into one buffer.
"""

import torch

from kernels.attention import hopper_backward, hopper_forward
from kernels.attention.operators import call, differentiable, operator
from kernels.attention.triton_packed import attention_packed_backward as portable_backward
from kernels.attention.triton_packed import outputs, slices


@operator(
    "hopper_attention_packed_forward(Tensor qkv, SymInt heads, SymInt kv_heads, bool causal, float scale, bool deterministic=False) "
    "-> (Tensor, Tensor)",
    outputs,
)
def attention_packed_forward(qkv, heads, kv_heads, causal, scale, deterministic=False):
    """`hopper_forward.attention_forward` of the slices of qkv [batch, seq, heads + 2 * kv_heads, head_dim]."""
    return hopper_forward.launch_forward(*slices(qkv, heads, kv_heads), causal, scale)


def _gradient(dout, dlse, qkv, *_):
    return qkv.new_empty(qkv.shape)


@operator(
    "hopper_attention_packed_backward(Tensor dout, Tensor? dlse, Tensor qkv, Tensor out, Tensor lse, SymInt heads, SymInt kv_heads, bool causal, "
    "float scale) -> Tensor",
    _gradient,
)
def attention_packed_backward(dout, dlse, qkv, out, lse, heads, kv_heads, causal, scale):
    """dqkv, shaped as qkv."""
    dqkv = _gradient(dout, dlse, qkv)
    tensors, gradients = slices(qkv, heads, kv_heads), slices(dqkv, heads, kv_heads)
    hopper_backward.launch_backward(dout, dlse, *tensors, out, lse, causal, scale, *gradients)
    return dqkv


def _save_for_backward(ctx, inputs, output):
    qkv, *ctx.numbers = inputs[:5]
    ctx.deterministic = inputs[5:] == (True,)
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse):
    qkv, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    if ctx.deterministic:
        dqkv, _ = call(portable_backward, dout, dlse, qkv, out, lse, *ctx.numbers)
    else:
        dqkv = call(attention_packed_backward, dout, dlse, qkv, out, lse, *ctx.numbers)
    return dqkv, None, None, None, None, None


differentiable(attention_packed_forward, _save_for_backward, _differentiate)
