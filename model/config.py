"""What a GPT is: its architecture, and what its attention sees and which kernel computes it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class ModelFault(ValueError):
    """What a run asks for and its model, once it runs, finds that it cannot do, on every process alike; the message is for the user."""


class GPTConfig(BaseModel):
    """Architecture of one decoder-only transformer.

    The defaults are GPT-2 small (124M).  ``kv_heads``, ``head_dim`` and ``ffn_size`` follow from the rest when null:
    ``heads``, ``hidden_size / heads`` and ``4 * hidden_size``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    heads: PositiveInt = 12
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    ffn_size: PositiveInt | None = None
    vocab_size: PositiveInt = 50304
    sequence_length: PositiveInt = 1024
    positions: Literal["learned", "rope", "alibi"] = "learned"
    rope_theta: float = Field(10000.0, gt=0)
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = Field(1e-5, gt=0)
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    tied_embeddings: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    init_std: float = Field(0.02, gt=0)

    def resolved(self) -> "GPTConfig":
        """The same architecture with every derived field filled in."""
        return self.model_copy(update={
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.hidden_size // self.heads,
            "ffn_size": self.ffn_size or 4 * self.hidden_size,
        })


class AttentionConfig(BaseModel):
    """What attention sees and which kernel computes it; no parameter depends on it.

    The backend changes speed and memory alone. A query sees its own key and, of those before it, the last ``window - 1`` (null: all), and
    with ``document_mask`` only those of its own document. ``dropout`` is that of the attention probabilities, while training.
    ``deterministic`` refuses a backend whose gradients may have other bits in every run, or has it add them up in a fixed order.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    backend: str = "auto"
    window: PositiveInt | None = None
    document_mask: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    deterministic: bool = False
