"""A decoder-only transformer in the two dialects people train: GPT-2 (learned positions, LayerNorm, GELU) and Llama (RoPE, RMSNorm, SwiGLU, GQA)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from kernels.attention import alibi_slopes, attention, attention_packed
from model.checkpointing import Checkpointing
from model.config import AttentionConfig, GPTConfig
from model.loss import linear_cross_entropy
from model.sequence import SequenceGroup
from model.tiling import in_tiles

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default ignore_index
ROTATED_AT_ONCE = 2**28  # elements, 1 GiB in the float32 that they are turned in


class GPT(nn.Module):
    """GPT with pre-normalised residual blocks.

    Args:
        config: a resolved architecture (``GPTConfig.resolved()``).
        attention: what a token sees, and by which kernel.
        end_of_text: the tokenizer's id between two documents; read, and needed, where ``attention.document_mask`` is set. It opens the
            document that follows, whose first token it predicts without any other context; what stands before the first one in a
            sample is one document, or the rest of one. Learned positions count on from document to document.
        checkpointing: what the blocks keep for the backward pass.
        mlp_tile: how many tokens the feed-forward networks take at a time; None: all.
        sequence: the processes that share a sequence; None: this one has all of it.
    """

    def __init__(
        self,
        config: GPTConfig,
        attention: AttentionConfig = AttentionConfig(),
        *,
        end_of_text: int | None = None,
        checkpointing: Checkpointing = Checkpointing(),
        mlp_tile: int | None = None,
        sequence: SequenceGroup | None = None,
    ):
        super().__init__()
        if attention.document_mask and end_of_text is None:
            raise ValueError("attention.document_mask: where a document ends is not known; give GPT the tokenizer's end_of_text")
        self.config = config
        self.end_of_text = end_of_text if attention.document_mask else None
        self.checkpointing, self.sequence = checkpointing, sequence
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.sequence_length, config.hidden_size) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, attention, mlp_tile) for _ in range(config.layers))
        self.final_norm = make_norm(config)
        self.head = Head(config.hidden_size, config.vocab_size, bias=False)
        # The weights follow from torch's seed alone, on every device: modules, as they are made, draw from the generator of theirs.
        self._generator = torch.Generator().manual_seed(torch.initial_seed())
        # Inside __init__, because under deepspeed.zero.Init parameters are partitioned when it returns, and only
        # nn.Module.apply gathers them for the visited function: loops over parameters would write into empty tensors.
        self.apply(self._initialise)
        del self._generator
        if config.tied_embeddings:
            self.head.weight = self.token_embedding.weight

    def _initialise(self, module: nn.Module) -> None:
        """GPT-2 initialisation: N(0, std), residual projections scaled by 1/sqrt(2 * layers) (Radford et al. 2019, section 2.3)."""
        if isinstance(module, nn.Linear):
            residual_scale = (2 * self.config.layers) ** -0.5 if getattr(module, "writes_to_residual", False) else 1.0
            self._draw(module.weight, self.config.init_std * residual_scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            self._draw(module.weight, self.config.init_std)

    @torch.no_grad()
    def _draw(self, weight: torch.Tensor, std: float) -> None:
        if not weight.is_meta:
            weight.copy_(torch.normal(0.0, std, weight.shape, generator=self._generator))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, or the summed cross-entropy when labels are given.

        Args:
            tokens: int64 [batch, sequence], sequence <= config.sequence_length.
            labels: int64 [batch, sequence], the token that follows each position; ``IGNORED_LABEL`` where none counts. Of processes that
                share a sequence each has all tokens, and the labels of its own part of the positions, [batch, sequence / processes].

        Returns:
            logits [batch, sequence, vocab_size] in the parameters' dtype; or a float32 scalar, the *sum* of the
            cross-entropies in nats, so that callers can divide by the number of targets of a whole global batch. Without labels every
            process computes the whole sequence.
        """
        group = None if labels is None else self.sequence
        context, positions = {}, torch.arange(tokens.shape[1], device=tokens.device)
        if self.end_of_text is not None:
            context["document_ids"] = (tokens == self.end_of_text).cumsum(1, dtype=torch.int32)
        if self.config.positions == "alibi":
            slopes = alibi_slopes(self.config.heads, tokens.device)  # no buffer, for the reason that rotary_table gives
            context["alibi_slopes"] = slopes if group is None else group.part(slopes, 0)
        if group is not None:
            context["group"] = group
            tokens, positions = group.part(tokens, 1), group.part(positions, 0)
        x = self.token_embedding(tokens)
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        elif self.config.positions == "rope":
            context["rotary"] = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            if self.checkpointing.includes(index) and torch.is_grad_enabled():
                x = self.checkpointing.run(block, x, context)
            else:
                x = block(x, **context)  # by keyword, as ``Checkpointing.run`` does and says why
        return self.head(self.final_norm(x), labels)


class Head(nn.Linear):
    """Logits, or their loss. A module of its own with its own weight, which ZeRO-3 gathers where a module is called."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """x: [batch, sequence, hidden]; labels and what is returned: see ``GPT.forward``."""
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x.flatten(0, 1), self.weight, labels.flatten(), IGNORED_LABEL)


class Block(nn.Module):
    """One transformer layer: attention and feed-forward, each normalised first and added to the residual stream."""

    def __init__(self, config: GPTConfig, attention: AttentionConfig, mlp_tile: int | None = None):
        super().__init__()
        self.mlp_tile = mlp_tile
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config, attention)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, **context: torch.Tensor) -> torch.Tensor:
        """x: [batch, sequence, hidden]; context: what ``SelfAttention`` takes beside it."""
        x = x + self.dropout(self.attention(self.attention_norm(x), **context))
        return x + self.dropout(self.feed_forward(x))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The feed-forward network of the normalised x, [batch, sequence, hidden]."""
        if self.mlp_tile is None or x.shape[:-1].numel() <= self.mlp_tile:
            return self.ffn(self.ffn_norm(x))
        return in_tiles(lambda tile: self.ffn(self.ffn_norm(tile)), [*self.ffn_norm.parameters(), *self.ffn.parameters()], x, self.mlp_tile)


class SelfAttention(nn.Module):
    """Causal self-attention; fewer key/value heads than query heads make it GQA, one makes it MQA (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig, attention: AttentionConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.window, self.dropout = attention.window, attention.dropout
        self.backend, self.deterministic = attention.backend, attention.deterministic
        parts = (config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim)
        self.qkv = nn.Linear(config.hidden_size, sum(parts), bias=config.bias)
        self.qkv.parts = parts
        self.projection = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=config.bias)
        self.projection.parts = (config.hidden_size,)
        self.projection.writes_to_residual = True

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        group: SequenceGroup | None = None,
    ) -> torch.Tensor:
        """x: [batch, sequence, hidden], and so is what is returned; rotary: see ``rotary_table``; the others: see ``attention``.

        With a group x and rotary are of this process's part of the sequence, alibi_slopes of its part of the heads.
        """
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim))
        options = {
            "causal": True, "window": self.window, "document_ids": document_ids, "alibi_slopes": alibi_slopes,
            "dropout_p": self.dropout if self.training else 0.0, "backend": self.backend, "deterministic": self.deterministic,
        }  # fmt: skip
        if rotary is None and group is None:
            out = attention_packed(qkv, heads=self.heads, kv_heads=self.kv_heads, **options)
        else:
            qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
            q, k = (qk if rotary is None else rotate(qk, rotary)).split([self.heads, self.kv_heads], dim=2)
            if group is None:
                out = attention(q, k, v, **options)
            else:
                qkv, heads, kv_heads = group.gather_tokens(q, k, v)
                out = group.gather_heads(attention_packed(qkv, heads=heads, kv_heads=kv_heads, **options))
        return self.projection(out.flatten(2))


class FeedForward(nn.Module):
    """The position-wise network: GELU in its tanh form as in GPT-2, or SwiGLU (Shazeer 2020) with gate and value in one product."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        parts = (config.ffn_size,) * (2 if config.activation == "swiglu" else 1)
        self.up = nn.Linear(config.hidden_size, sum(parts), bias=config.bias)
        self.up.parts = parts
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.bias)
        self.down.parts = (config.hidden_size,)
        self.down.writes_to_residual = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        if self.activation == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(x, approximate="tanh"))


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


def rotary_table(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Cosines and sines of RoPE's angles (Su et al. 2021, equation 34) at int64 [sequence]: float32 [2, sequence, 1, head_dim / 2].

    Computed anew each forward, not a buffer: a bf16 engine would round a buffer's angles, which breaks long sequences. Frequencies are
    float32, as those that published weights were trained with, angles float64: at position 1,000,000 those of float32 are up to 0.06 off.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = torch.outer(positions.double(), frequency.double())
    return torch.stack((angle.cos().float(), angle.sin().float())).unsqueeze(2)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Turn channel pairs (i, i + head_dim/2) of x [batch, sequence, heads, head_dim] by each position's angle; x's dtype out."""
    length = max(1, ROTATED_AT_ONCE // x[:, 0].numel())
    if x.shape[1] <= length or torch.compiler.is_compiling():  # which fuses what stands in float32 here
        return _rotate(x, rotary)
    return torch.cat([_rotate(part, angles) for part, angles in zip(x.split(length, 1), rotary.split(length, 1), strict=True)], dim=1)


def _rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def hidden_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of the blocks, neither embeddings nor head; ``parts`` of each: the rows of the matrices stacked in its weight."""
    return [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]


def parameter_groups(model: nn.Module, *, hidden_apart: bool = False) -> list[dict]:
    """The optimizer's groups: matrices, which decay; and biases and norm gains, which set scales and not directions and do not.

    With ``hidden_apart`` the matrices of ``hidden_layers`` stand before them in a group of their own, in that order.
    Chosen by module type: under ZeRO-3 a partitioned parameter has shape [0], so its number of dimensions says nothing.
    """
    hidden = [m.weight for m in hidden_layers(model)] if hidden_apart else []
    apart = {id(p) for p in hidden}
    if hasattr(model, "matrices"):  # a HuggingFaceModel, whose modules are of any type
        matrices = {id(p) for name, p in model.named_parameters() if name in model.matrices}
    else:
        matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))} - apart
    decayed = [p for p in model.parameters() if id(p) in matrices]
    kept = [p for p in model.parameters() if id(p) not in matrices | apart]
    return [{"params": group} for group in ([hidden] if hidden_apart else []) + [decayed, kept]]


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters of a resolved architecture, counted on the meta device.

    Returns:
        ``total``; and ``matmul``, those that multiply every token (the position table is only looked up, and so is the input embedding
        unless it is also the head).
    """
    with torch.device("meta"):
        model = GPT(config)
    total = sum(p.numel() for p in model.parameters())
    looked_up = 0 if model.position_embedding is None else model.position_embedding.weight.numel()
    if not config.tied_embeddings:
        looked_up += model.token_embedding.weight.numel()
    return {"total": total, "matmul": total - looked_up}


def count_recomputed(config: GPTConfig, checkpointing: Checkpointing, *, compiled: bool = False, tiled: bool = False) -> dict[str, int]:
    """What is computed again: ``parameters`` that multiply every token once more, and ``layers`` of attention.

    tiled: whether feed-forward networks are computed in tiles, which compute them again too.
    """
    with torch.device("meta"):
        blocks = GPT(config).blocks
    recomputed = [block for index, block in enumerate(blocks) if checkpointing.includes(index)]
    modules = [module for block in recomputed for module in block.modules()]
    parameters = _count(recomputed)
    selective = checkpointing.mode == "selective"
    # PyTorch's recomputation stops at the last tensor that the backward reads, unless its dropout follows: the last product's input, or
    # what is cut into tiles; the compiler leaves out what is not read. DeepSpeed's computes the whole block.
    stops = (config.dropout == 0 or compiled) and checkpointing.mode != "deepspeed"
    if tiled:
        parameters += _count(part for block in blocks for part in (block.ffn_norm, block.ffn))
    if selective and checkpointing.keep_matmuls:
        parameters -= _count(module for module in modules if isinstance(module, nn.Linear))
    elif stops:
        parameters -= _count(part for block in recomputed for part in ((block.ffn_norm, block.ffn) if tiled else (block.ffn.down,)))
    return {"parameters": parameters, "layers": 0 if selective else len(recomputed)}


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
