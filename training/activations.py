"""Bytes that a GPT's forward pass keeps for the backward pass, and what the backward pass holds beside them; derived in docs/memory.md.

T tokens of a micro batch (batch B of S each), hidden width h, query width Q = heads * head_dim, key width K = kv_heads * head_dim,
feed-forward width f, e bytes an element. Tests count the bytes of the real model's saved tensors against ``block_keeps``, and follow a
whole training step with every allocation against ``training.memory``.
"""

from dataclasses import dataclass
from math import ceil

from kernels.attention.reference import TILE
from model.checkpointing import Checkpointing
from model.config import AttentionConfig, GPTConfig
from model.loss import tokens_at_once

FP32 = 4
STANDARD = "eager"  # the backend that stores the scores


@dataclass(frozen=True)
class Shape:
    """One micro batch on one GPU: model resolved, batch in sequences, e bytes an element of parameters and activations."""

    model: GPTConfig
    attention: AttentionConfig
    batch: int
    e: int

    @property
    def tokens(self) -> int:
        return self.batch * self.model.sequence_length

    @property
    def stream(self) -> int:
        """Bytes of the residual stream, T h e: what one block hands to the next."""
        return self.tokens * self.model.hidden_size * self.e

    @property
    def q(self) -> int:
        return self.tokens * self.model.heads * self.model.head_dim * self.e

    @property
    def k(self) -> int:
        return self.tokens * self.model.kv_heads * self.model.head_dim * self.e

    @property
    def f(self) -> int:
        return self.tokens * self.model.ffn_size * self.e

    @property
    def lse(self) -> int:
        """Log-sum-exp, one float32 a query and head."""
        return self.tokens * self.model.heads * FP32

    @property
    def scores(self) -> int:
        """Elements of all heads' scores, B heads S^2."""
        return self.tokens * self.model.sequence_length * self.model.heads

    @property
    def hidden(self) -> int:
        """Bytes of eager's mask, one a pair of positions."""
        return self.model.sequence_length**2 * (self.batch if self.attention.document_mask else 1)


def block_keeps(shape: Shape) -> dict[str, int]:
    """Bytes by part that one block keeps when it is not checkpointed, its input included."""
    model = shape.model
    statistics = FP32 * (2 if model.norm == "layernorm" else 1) * shape.tokens  # mean and 1/std, or 1/rms alone
    # RoPE's result is new; the projection stays for the values in it. Standard attention copies all three for its products, K and V once
    # for every query head, and needs the projection no more; of one sequence Q is multiplied where it lies.
    projection, rotated = shape.q + 2 * shape.k, shape.q + shape.k if model.positions == "rope" else 0
    standard = shape.attention.backend == STANDARD
    for_products = 2 * shape.q + (shape.q if shape.batch > 1 else rotated or projection)
    swiglu = model.activation == "swiglu"
    keeps = {
        "block input": shape.stream,
        "norms": 2 * (shape.stream + statistics),
        "queries, keys, values": for_products if standard else projection + rotated,
        "attention output": shape.q,
        "residual between": shape.stream,
        "feed-forward": 4 * shape.f if swiglu else 2 * shape.f,  # gate and value, silu(gate), their product; or before and after GELU
    }
    if standard:
        # The probabilities twice: in float32 for the softmax, in the model's dtype for their product with V.
        keeps |= {"probabilities": (FP32 + shape.e) * shape.scores, "mask": shape.hidden}
    else:
        keeps["log-sum-exp"] = shape.lse
    if model.dropout:
        keeps["dropout masks"] = 2 * shape.tokens * model.hidden_size  # one byte an element
    return keeps


def checkpoint_keeps(shape: Shape, checkpointing: Checkpointing) -> dict[str, int]:
    """Bytes by part that a checkpointed block keeps on the GPU."""
    keeps = {"block input": shape.stream}
    if checkpointing.mode == "selective":
        keeps |= {"attention output": shape.q, "log-sum-exp": shape.lse}
        if checkpointing.keep_matmuls:
            up = shape.f * (2 if shape.model.activation == "swiglu" else 1)
            keeps["products of linear layers"] = shape.q + 2 * shape.k + shape.stream + up + shape.stream
    return keeps


def block_backward(shape: Shape) -> int:
    """Bytes that the backward pass of one block holds at most beside what the block keeps, without gradients of parameters.

    Walked from the block's end, each stage with the gradients that are alive less the parts that are freed by then.
    """
    keeps = block_keeps(shape)
    swiglu = shape.model.activation == "swiglu"
    feed_forward = shape.stream + (2 * shape.f if swiglu else shape.f)
    freed = keeps["feed-forward"] + keeps["norms"] // 2
    attention = 2 * shape.stream + _attention_backward(shape) - freed  # of the residual stream and of its sum with the branch
    return max(feed_forward, attention)


def _attention_backward(shape: Shape) -> int:
    """Gradient of the output, and what the backend's backward pass holds until the gradient of the projection is there."""
    gradients = shape.q + 2 * shape.k
    joined = 0 if shape.attention.backend == "triton" and shape.model.positions != "rope" else gradients  # autograd copies three into one
    rotation = 2 * (shape.q + shape.k) // shape.e * FP32 if shape.model.positions == "rope" else 0
    own = {
        STANDARD: (2 * FP32 - shape.e) * shape.scores,  # two of the scores' gradients; the probabilities that P V was taken of are freed
        "triton": 2 * shape.lse,  # delta and the base-2 log-sum-exp
        "tiled": (shape.q + 2 * shape.k) // shape.e * FP32
        + 4 * shape.batch * shape.model.heads * min(TILE, shape.model.sequence_length) ** 2 * FP32,
    }.get(shape.attention.backend, 2 * shape.lse + shape.q // shape.e * FP32)  # and dQ, summed up in float32
    return shape.q + gradients + max(joined, own, rotation)


def eager_forward(shape: Shape) -> int:
    """Bytes of a block in the forward pass of standard attention, which holds two tensors of scores beside what it keeps."""
    keeps = block_keeps(shape)
    later = keeps["feed-forward"] + keeps["norms"] // 2 + keeps["residual between"] + keeps["attention output"]
    return sum(keeps.values()) - later + 2 * FP32 * shape.scores


def loss_forward(shape: Shape) -> dict[str, int]:
    """Bytes by part while the loss is computed; see ``model.loss``: logits of so many tokens at a time, and at once their gradient."""
    vocabulary, weight = shape.model.vocab_size, shape.model.vocab_size * shape.model.hidden_size
    at_once = min(shape.tokens, tokens_at_once(vocabulary))
    parts = ceil(shape.tokens / at_once)
    logits = at_once * vocabulary * shape.e
    of_x = shape.stream * (parts - 1) // parts
    moments = (
        {
            "logits": logits * (2 if parts == 1 else 3),
            "gradients of the loss": FP32 * weight + of_x,
        },  # those of the part before are still there
        {"logits": logits, "gradients of the loss": 2 * FP32 * weight + shape.stream},
        {"logits": logits, "gradients of the loss": FP32 * weight + 2 * shape.stream},
    )
    # The final norm's output; its input is the last block's.
    return {"final norm": 2 * shape.stream} | max(moments, key=lambda moment: sum(moment.values()))


def loss_backward(shape: Shape) -> dict[str, int]:
    """Bytes by part when the loss's gradients are scaled."""
    weight = shape.model.vocab_size * shape.model.hidden_size
    cast = 0 if shape.e == FP32 else shape.e * weight
    return {"final norm": shape.stream, "gradients of the loss": 2 * FP32 * weight + cast + 2 * shape.stream}
