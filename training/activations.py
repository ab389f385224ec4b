"""Bytes that a GPT's forward pass keeps for the backward pass, and what the backward pass holds beside them; derived in docs/memory.md.

T tokens of a micro batch on one GPU (batch B of S each, of which it has a part where processes share sequences), hidden width h, query
width Q = heads * head_dim, key width K = kv_heads * head_dim, feed-forward width f, e bytes an element.

Tests count the bytes of the real model's saved tensors against ``block_keeps``, and follow a whole training step with every allocation
against ``training.memory``.
"""

from dataclasses import dataclass
from math import ceil, lcm

from kernels.attention.reference import TILE
from model.checkpointing import Checkpointing
from model.config import AttentionConfig, GPTConfig
from model.gpt import ROTATED_AT_ONCE
from model.loss import tokens_at_once

FP32 = 4
STANDARD = "eager"  # the backend that stores the scores


@dataclass(frozen=True)
class Shape:
    """One micro batch on one GPU: model resolved, batch in sequences, e bytes an element of parameters and activations.

    sharing: processes that share a sequence, each with so many of its tokens. tile: tokens that a feed-forward network takes at a time.
    """

    model: GPTConfig
    attention: AttentionConfig
    batch: int
    e: int
    sharing: int = 1
    tile: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.model.sequence_length // self.sharing

    @property
    def tiled(self) -> bool:
        return self.tile is not None and self.tile < self.tokens

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
    def k_sent(self) -> int:
        """Bytes of the key heads as processes that share a sequence exchange them, some of them copied; without any, of the key heads."""
        return self.k * lcm(self.model.kv_heads, self.sharing) // self.model.kv_heads

    @property
    def f(self) -> int:
        return self.tokens * self.model.ffn_size * self.e

    @property
    def lse(self) -> int:
        """Log-sum-exp, one float32 a query and head."""
        return self.tokens * self.model.heads * FP32

    @property
    def scores(self) -> int:
        """Elements of the scores of the heads that a GPU computes, B heads S^2 without sharing."""
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
    projection, rotated = shape.q + 2 * shape.k_sent, shape.q + shape.k if model.positions == "rope" else 0
    if shape.sharing > 1:  # what is exchanged is new, and all that attention reads
        rotated = 0
    standard = shape.attention.backend == STANDARD
    for_products = 2 * shape.q + (shape.q if shape.batch > 1 else rotated or projection)
    swiglu = model.activation == "swiglu"
    keeps = {
        "block input": shape.stream,
        "norms": (1 if shape.tiled else 2) * (shape.stream + statistics),
        "queries, keys, values": for_products if standard else projection + rotated,
        "attention output": shape.q if shape.sharing == 1 else 2 * shape.q,  # before and after it is exchanged
        "residual between": shape.stream,
        # Gate and value, silu(gate), their product; or before and after GELU.
        "feed-forward": 0 if shape.tiled else 4 * shape.f if swiglu else 2 * shape.f,
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
    feed_forward = shape.stream + (2 * shape.f if shape.model.activation == "swiglu" else shape.f)
    if shape.tiled:
        feed_forward = 2 * shape.stream + _tile_backward(shape)
    freed = keeps["feed-forward"] + keeps["residual between"] + (0 if shape.tiled else keeps["norms"] // 2)
    kernel = shape.stream - freed + _kernel_backward(shape)
    of_attention = keeps.keys() - {"block input", "norms", "residual between", "feed-forward", "dropout masks"}
    after = shape.stream - freed - sum(keeps[part] for part in of_attention) + _after_kernel(shape)
    return max(feed_forward, kernel, after)


def _tile_backward(shape: Shape) -> int:
    """Bytes while one tile of a feed-forward network is computed again, and back; with the sums of its weights' gradients, and one tile's."""
    swiglu = shape.model.activation == "swiglu"
    inner = (6 if swiglu else 3) * shape.f + 3 * shape.stream  # what is kept of it, and gradients
    weights = (3 if swiglu else 2) * shape.model.hidden_size * shape.model.ffn_size
    return inner * shape.tile // shape.tokens + (FP32 + shape.e) * weights


def _kernel_backward(shape: Shape) -> int:
    """Gradients of the output and of queries, keys and values, and what the backend's backward pass holds beside them."""
    own = {
        STANDARD: (2 * FP32 - shape.e) * shape.scores,  # two of the scores' gradients; the probabilities that P V was taken of are freed
        "triton": 2 * shape.lse,  # delta and the base-2 log-sum-exp
        "tiled": (shape.q + 2 * shape.k_sent) // shape.e * FP32
        + 4 * shape.batch * shape.model.heads * min(TILE, shape.model.sequence_length) ** 2 * FP32,
    }.get(shape.attention.backend, 2 * shape.lse + shape.q // shape.e * FP32)  # and dQ, summed up in float32
    exchanged = shape.q if shape.sharing > 1 else 0  # the output's other form is done with
    return shape.q + shape.q + 2 * shape.k_sent + own - exchanged


def _after_kernel(shape: Shape) -> int:
    """Bytes from the gradients of queries, keys and values to that of their projection: copied into one tensor, exchanged, turned back."""
    gradients = shape.q + 2 * shape.k_sent
    rope = shape.model.positions == "rope"
    one_tensor = shape.attention.backend == "triton" and (shape.sharing > 1 or not rope)
    stages = [gradients if one_tensor else 2 * gradients]
    if shape.sharing > 1:
        stages.append((2 if shape.batch == 1 else 3) * gradients)
    if rope:
        stages.append(shape.k + rotation(shape))
    return max(stages)


def rotation(shape: Shape) -> int:
    """Bytes while queries and keys are turned, forward or back: before and after in their dtype, in float32 in between."""
    turned = shape.q + shape.k
    in_float32 = 3 * turned // shape.e * FP32
    if turned // shape.e <= ROTATED_AT_ONCE:
        return turned + in_float32
    return 2 * turned + max(turned, 3 * ROTATED_AT_ONCE * FP32)  # a part at a time; then the parts side by side become one


def rotating_forward(shape: Shape) -> int:
    """Bytes of a block in its forward pass, its input included, while queries and keys are turned."""
    keeps = block_keeps(shape)
    return keeps["block input"] + keeps["norms"] // (1 if shape.tiled else 2) + shape.k + rotation(shape)


def eager_forward(shape: Shape) -> int:
    """Bytes of a block in the forward pass of standard attention, which holds two tensors of scores beside what it keeps."""
    keeps = block_keeps(shape)
    later = keeps["feed-forward"] + (0 if shape.tiled else keeps["norms"] // 2) + keeps["residual between"] + keeps["attention output"]
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
