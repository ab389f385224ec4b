"""Our attention in the models of megatron-core, where ``DotProductAttention`` stands in a layer's specification.

    from model.megatron import with_our_attention
    spec = with_our_attention(get_gpt_layer_local_spec())
    model = GPTModel(config, spec, ...)

Written for megatron-core 0.16.1, whose other modules stay as they are: attention has no weights of its own, so tensor, pipeline and sequence
parallelism, recomputation and checkpoints are Megatron's.
"""

import copy
import logging
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist

from kernels.attention import attention, choose, unsupported
from kernels.attention.tuning import compute_capability

try:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.utils import is_layer_window_attention
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("megatron"):
        raise
    raise ModuleNotFoundError("the package megatron-core is missing: python -m pip install -r requirements-megatron.txt") from None

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)
_logger = logging.getLogger(__name__)


def with_our_attention(spec: ModuleSpec | TransformerBlockSubmodules, backend: str = "auto") -> ModuleSpec | TransformerBlockSubmodules:
    """A copy of a layer's or a block's specification whose self-attentions compute by ``FlashAttention``.

    backend: of ``kernels.attention.BACKENDS``.
    """
    spec = copy.deepcopy(spec)
    for layer in spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]:
        layer.submodules.self_attention.submodules.core_attention = partial(FlashAttention, backend=backend)
    return spec


class FlashAttention(DotProductAttention):
    """Core attention of Megatron: causal or full, GQA, sliding windows, packed sequences, dropout, sinks (``softmax_type``).

    Its parameters and how they are checkpointed are those of ``DotProductAttention``; so are the heads of each tensor-parallel rank.

    Args:
        backend: of ``kernels.attention.BACKENDS``; ``auto`` chooses for each call, and says when the first layer is built what it would
            choose for a plain one.
        The others: Megatron's.

    Raises:
        ValueError: what the configuration asks for and cannot be done, with the remedy; when the model is built.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        *,
        backend: str = "auto",
        **others,
    ):
        _refuse(config, layer_number, attn_mask_type, attention_type, others)
        super().__init__(config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type, pg_collection)
        self.backend = backend
        self.dropout_p = self.attention_dropout.p
        # Not self.softmax_scale, which apply_query_key_layer_scaling divides by the layer's number, to multiply the scores by it in float32.
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.window = _window(config, layer_number)
        self._choose_backend()

    def _choose_backend(self) -> None:
        config, on_gpu = self.config, torch.cuda.is_available()
        asked = {
            "device_type": "cuda" if on_gpu else "cpu",
            # Float16Module, around the finished model, goes by the flags.
            "dtype": torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else config.params_dtype,
            "head_dim": config.kv_channels,
            "compute_capability": compute_capability(torch.device("cuda", torch.cuda.current_device())) if on_gpu else None,
            "grouped": self.num_attention_heads_per_partition != self.num_query_groups_per_partition,
            "window": self.window not in (None, (None, 0)),
            "sinks": self.softmax_offset is not None,
            "dropout": self.dropout_p > 0,
            "deterministic": config.deterministic_mode,
        }
        if self.backend == "auto":
            chosen, why = choose(**asked)
            if self.layer_number == 1 and (not dist.is_initialized() or dist.get_rank() == 0):
                _logger.info("attention.backend: auto -> %s (%s)", chosen, why)
        elif reason := unsupported(self.backend, **asked):
            raise ValueError(reason)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query: [seq, batch, heads, head_dim], key and value: [seq, batch, kv_heads, head_dim], of this tensor-parallel rank, read in place.
        Packed in the format ``thd`` all three are without the batch.

        attention_mask: None; a mask of its own has no place here.
        attn_mask_type: that of this call; None: that of the model.

        Returns [seq, batch, heads * head_dim], packed [seq, heads * head_dim]; a view of [batch, seq, heads, head_dim].
        """
        if attention_mask is not None or attention_bias is not None:
            given = "attention_bias" if attention_mask is None else "attention_mask"
            raise ValueError(f"{given}: our attention reads none; pass None, and say what a query sees by the causal layer specification, config.window_size "
                             "or packed_seq_params")  # fmt: skip
        mask_type = _known(attn_mask_type or self.attn_mask_type)
        if mask_type is AttnMaskType.causal and len(query) != len(key):
            raise ValueError(f"{len(query)} queries and {len(key)} keys: where the first query stands is not said; give attn_mask_type=causal_bottom_right")
        packed = _cu_seqlens(packed_seq_params, causal=mask_type in _CAUSAL)
        if packed is not None:
            query, key, value = (x.unsqueeze(1) if x.ndim == 3 else x for x in (query, key, value))
        dropout_p = self.dropout_p if self.training else 0.0
        # Under sequence parallelism the whole layer runs in Megatron's generator of this rank.
        forked = dropout_p > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forked else nullcontext():
            out = attention(
                *(x.transpose(0, 1) for x in (query, key, value)),
                causal=mask_type in _CAUSAL,
                window=self.window,
                cu_seqlens=packed,
                sinks=self.softmax_offset,
                dropout_p=dropout_p,
                scale=self.scale,
                backend=self.backend,
                deterministic=self.config.deterministic_mode,
            )
        out = out.transpose(0, 1).flatten(2)
        return out if packed is None else out.squeeze(1)


def _refuse(config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, others: dict) -> None:
    """Raise ValueError for all that would be computed otherwise than asked."""
    faults = []
    if attention_type != "self":
        faults.append(f"attention_type={attention_type}: its padding is told by a mask; leave that layer its own core_attention")
    if config.context_parallel_size > 1:
        faults.append(f"context_parallel_size={config.context_parallel_size}: no rank sees the others' keys; use 1, with tensor and sequence parallelism")
    if config.multi_latent_attention:
        faults.append("multi_latent_attention: unlike head_dims of keys and values have no place here; use self-attention with num_query_groups")
    elif others:
        faults.append(f"{', '.join(others)}: unknown to our attention; use self-attention with num_query_groups")
    if config.qk_clip or config.log_max_attention_logit:
        faults.append("qk_clip, log_max_attention_logit: the scores are never stored, so their maximum is not known; turn them off")
    if config.fp8_dot_product_attention or config.fp8_multi_head_attention:
        faults.append("fp8_dot_product_attention, fp8_multi_head_attention: our kernels compute in the dtype of their inputs; turn them off")
    try:
        causal = _known(attn_mask_type) in _CAUSAL
        right = (_window(config, layer_number) or (None, 0))[1]
        if causal and right != 0:
            faults.append(f"window_size={tuple(config.window_size)}: a causal layer sees no key behind its query; make the second number 0")
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError("our attention in Megatron cannot do what is asked:\n" + "\n".join(f"  {each}" for each in faults))


def _known(mask_type: AttnMaskType) -> AttnMaskType:
    if mask_type not in (*_CAUSAL, AttnMaskType.no_mask):
        raise ValueError(f"attn_mask_type={mask_type.name}: what it hides is told by a mask, which our attention reads none of; use causal or no_mask, "
                         "and packed_seq_params in the place of padding")  # fmt: skip
    return mask_type


def _window(config: TransformerConfig, layer_number: int) -> tuple[int | None, int | None] | None:
    """(left, right) of this layer, None where there is no end; config.window_size writes that as -1."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    left, right = (None if number == -1 else number for number in config.window_size)
    return left, right


def _cu_seqlens(packed: PackedSeqParams | None, *, causal: bool) -> torch.Tensor | None:
    """Where each packed sequence begins, int32 [sequences + 1]; None without packing. Padding behind a sequence counts as part of it: under a
    causal mask no token sees it, and what it sees itself is not read."""
    if packed is None:
        return None
    if packed.qkv_format != "thd":
        raise ValueError(f"packed_seq_params: qkv_format={packed.qkv_format} is not known; use thd")
    if not causal and (packed.cu_seqlens_q_padded is not None or packed.cu_seqlens_kv_padded is not None):
        raise ValueError("packed_seq_params: without a causal mask a sequence would see the padding behind it (cu_seqlens_q_padded); pack without padding")
    begins, keys = (each if padded is None else padded for each, padded in (
        (packed.cu_seqlens_q, packed.cu_seqlens_q_padded), (packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded)))  # fmt: skip
    if keys is not begins and keys is not None and (keys.shape != begins.shape or keys.device.type == "cpu" and not torch.equal(keys, begins)):
        raise ValueError("packed_seq_params: cu_seqlens_q and cu_seqlens_kv differ; our attention packs self-attention, in which they are the same")
    return begins
