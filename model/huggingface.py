"""Our attention in the models of Hugging Face's transformers, by the name ``triton_flash``.

    from model.huggingface import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="triton_flash")

transformers describes what a query may see by a function of indices, and asks the implementation for a mask made of it, once a forward pass.
Ours makes no mask where that function is one that the kernels know, and says in ``Visible`` what it is. Whatever else a model asks for is
computed by PyTorch's ``scaled_dot_product_attention`` under that very mask, and said once.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial, wraps
from typing import Any, Union

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels.attention import attention, choose, unsupported
from kernels.attention.masks import capped
from kernels.attention.tuning import compute_capability
from model.checkpointing import Checkpointing
from model.config import ModelFault
from model.gpt import IGNORED_LABEL

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.utils import generic
except ModuleNotFoundError:
    raise ModuleNotFoundError("the package transformers is missing: python -m pip install -r requirements-huggingface.txt") from None

NAME = "triton_flash"
OURS = ("hopper", "triton")  # what "auto" is served by; anything else is SDPA's work
_logger = logging.getLogger(__name__)


def register(name: str = NAME, *, backend: str = "auto") -> None:
    """Make ``attn_implementation=name`` work in every model of transformers that uses its AttentionInterface, forward and backward.

    Causal and full attention, sliding windows, grouped queries, softcap, sinks, dropout, left and right padding, packed sequences told by
    their position ids, and KV caches. ``torch.autocast`` is followed.

    Args:
        backend: of ``kernels.attention.BACKENDS``; what it cannot do raises ValueError. ``auto``: ``hopper`` where it can, else ``triton``, else
            SDPA, which is said once.
    """
    AttentionInterface.register(name, partial(_attention, backend))
    AttentionMaskInterface.register(name, _visible)  # without it transformers passes no mask at all, and padding would be seen
    _names.add(name)
    _tell_from_flash_attention()


_names: set[str] = set()


def _tell_from_flash_attention() -> None:
    """Let transformers not take a name of ours for the library flash-attn: whatever has "flash" in its name it would try to load, and give
    packed sequences to without any mask."""
    asked = generic.is_flash_attention_requested
    if hasattr(asked, "__wrapped__"):
        return

    @wraps(asked)
    def is_flash_attention_requested(config=None, requested_attention_implementation=None, **version):
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name not in _names and asked(config, requested_attention_implementation, **version)

    for module in list(sys.modules.values()):  # those that imported it by name; later ones will import this
        if getattr(module, "__dict__", {}).get(asked.__name__) is asked:
            setattr(module, asked.__name__, is_flash_attention_requested)


@dataclass(frozen=True, eq=False)
class Visible:
    """What the queries of one forward pass may see.

    rules: arguments of ``attention`` that say it; None where they cannot.
    why_not: the reason then.
    make_mask: makes bool [batch, 1, queries, keys], True where the query sees the key.
    shape: the mask's.
    """

    rules: dict[str, Any] | None
    why_not: str
    make_mask: Callable[[], torch.Tensor]
    shape: tuple[int, int, int, int]

    ndim = 4  # transformers asks, to tell a finished mask from a two-dimensional one of its user's

    @cached_property
    def mask(self) -> torch.Tensor:
        return self.make_mask()

    def contiguous(self) -> Union["Visible", torch.Tensor]:
        """What transformers calls before a forward pass that it may compile: a mask that is needed anyway is made outside of it."""
        return self if self.rules is not None else self.mask


# --- what a query may see -------------------------------------------------------------------------------------------


def _visible(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, mask_function: Callable | None = None,
    attention_mask: torch.Tensor | Visible | None = None, device: torch.device | str = "cpu", use_vmap: bool = False, **_,
) -> Visible:  # fmt: skip
    """In place of transformers' ``sdpa_mask``, whose arguments these are."""
    if isinstance(attention_mask, Visible):  # made before the forward pass, as generate() does for some caches
        return attention_mask
    make_mask = partial(
        sdpa_mask, batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
    )  # fmt: skip
    shape = (batch_size, 1, q_length, kv_length)
    rules = _rules_of(mask_function)
    if rules is None:
        return Visible(None, "the model has a mask of its own kind", make_mask, shape)
    hides = rules["causal"] or rules["window"] is not None
    if hides and (isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length):
        return Visible(None, "the last query does not stand at the last key, as in a static KV cache", make_mask, shape)
    if isinstance(rules["window"], int) and rules["window"] >= kv_length:
        rules["window"] = None
    if q_length == 1 and rules["window"] is None:  # the last query sees all keys
        rules["causal"] = False
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        if padding.shape[1] != kv_length:
            return Visible(None, "there are keys that attention_mask does not tell of", make_mask, shape)
        full, only_behind, in_one_piece = _look_at(padding)
        # A query in front of the padding does not see it anyway; what one in the padding sees is nobody's business.
        if not full and not (only_behind and rules["causal"] and q_length == kv_length):
            if q_length != kv_length:
                return Visible(None, "there is padding among the keys of a KV cache", make_mask, shape)
            if not in_one_piece or rules["document_ids"] is not None:
                return Visible(None, "attention_mask hides tokens between others", make_mask, shape)
            rules["document_ids"] = padding.int()
    return Visible(rules, "", make_mask, shape)


def _look_at(padding: torch.Tensor) -> tuple[bool, bool, bool]:
    """Of bool [batch, keys], True for tokens: whether nothing is padding, it all stands behind the tokens, each row's tokens are neighbours."""
    begins = padding[:, 1:] & ~padding[:, :-1]
    pieces = begins.sum(1) + padding[:, 0]
    return tuple(torch.stack((padding.all(), ~begins.any() & padding[:, 0].all(), (pieces <= 1).all())).tolist())


def _rules_of(mask_function: Callable | None) -> dict[str, Any] | None:
    """Arguments of ``attention`` for a function made in transformers.masking_utils; None where it is none of those known here.

    They are closures, known by name and by what they close over: one that changed is not recognised, and its mask is made.
    """
    rules: dict[str, Any] = {"causal": False, "window": None, "document_ids": None}
    pending, packed, remapped = [mask_function], False, False
    while pending:
        function = pending.pop()
        if getattr(function, "__module__", None) != "transformers.masking_utils":
            return None
        name = function.__qualname__
        held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
        if name == "causal_mask_function":
            rules["causal"] = True
        elif name == "and_masks.<locals>.and_mask":
            pending += held["mask_functions"]
        elif name == "sliding_window_overlay.<locals>.inner_mask":
            rules["window"] = held["sliding_window"]
        elif name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
            rules["window"] = (held["sliding_window"], held["sliding_window"])
        elif name == "packed_sequence_mask_function.<locals>.inner_mask":
            packed, rules["document_ids"] = True, held["packed_sequence_mask"].int()
        elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
            # Positions within a sequence, where distances are those of the indices.
            remapped = True
            pending.append(held["mask_function"])
        elif name != "bidirectional_mask_function":
            return None
    if isinstance(rules["window"], int) and not rules["causal"] or remapped and not packed:
        return None
    return rules


# --- attention ------------------------------------------------------------------------------------------------------


def _attention(
    backend: str, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Visible | torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
    softcap: float | None = None, s_aux: torch.Tensor | None = None, position_bias: torch.Tensor | None = None, cache=None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' signature: query [batch, heads, queries, head_dim], key and value [batch, kv_heads, keys, head_dim]; s_aux: sinks.

    Returns [batch, queries, heads, head_dim], and None for the probabilities, which do not exist.
    """
    if cache is not None:
        raise ModelFault(f"attn_implementation={NAME} has no paged KV cache; use generate() or another attn_implementation for continuous batching")
    if torch.is_autocast_enabled(query.device.type):  # under it a model's own operations leave dtypes mixed
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    rules, why_not = _asked_for(module, query, key, attention_mask, is_causal)
    if kwargs.get("cu_seq_lens_q") is not None and (rules is None or rules["document_ids"] is None):
        raise ModelFault(f"attn_implementation={NAME} takes packed sequences by their position_ids, which start anew with each, without attention_mask "
                         "and with use_cache=False; cu_seq_lens_q alone would not be heeded")
    options = {"softcap": softcap, "sinks": s_aux, "dropout_p": dropout, "scale": scaling}
    if position_bias is not None:
        rules, why_not = None, "the model adds a bias to the scores"
    kernel = None
    if rules is not None:
        kernel, why_not = _kernel(backend, query, key, value, rules, options)
    if kernel is None and backend != "auto":
        raise ModelFault(f"attention.backend={backend} was asked for by name and cannot serve: {why_not}; auto leaves this to SDPA")
    plain = softcap is not None or s_aux is not None  # SDPA has neither
    if kernel is None:
        _say_once(f"attn_implementation={NAME}: {'plain PyTorch' if plain else 'SDPA'} computes attention, because {why_not}")
    if kernel or plain and rules is not None:
        return attention(*(x.transpose(1, 2) for x in (query, key, value)), backend=kernel or "auto", **rules, **options), None
    mask = attention_mask
    if isinstance(attention_mask, Visible):
        needed = rules is None or rules["window"] is not None or rules["document_ids"] is not None or rules["causal"] and query.shape[2] != key.shape[2]
        mask, is_causal = (attention_mask.mask, False) if needed else (None, rules["causal"])
    if plain:
        if mask is None or position_bias is not None:
            raise ModelFault(f"attn_implementation={NAME} has softcap and sinks, but not where {why_not}; use attn_implementation='eager'")
        return _plain(query, key, value, mask, **options), None
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
                                  position_bias=position_bias, **kwargs)


def _asked_for(module, query, key, attention_mask, is_causal) -> tuple[dict[str, Any] | None, str]:
    """Arguments of ``attention``, or None and why there are none."""
    if isinstance(attention_mask, Visible):
        return attention_mask.rules, attention_mask.why_not
    if attention_mask is not None:
        return None, "the model or its user made the mask"
    # Without any mask, causal means what it means to SDPA in transformers: the first query stands at the first key.
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
    if causal and query.shape[2] != key.shape[2]:
        return None, "there is no mask, and more keys than queries"
    return {"causal": causal, "window": None, "document_ids": None}, ""


def _kernel(backend, query, key, value, rules, options) -> tuple[str | None, str]:
    """Which of our kernels computes this; or None and why none does."""
    return _kernel_for(
        backend,
        device_type=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        compute_capability=compute_capability(query.device) if query.is_cuda else None,
        grouped=query.shape[1] != key.shape[1],
        unequal_causal=(rules["causal"] or rules["window"] is not None) and query.shape[2] != key.shape[2],
        window=rules["window"] is not None,
        document_ids=rules["document_ids"] is not None,
        softcap=options["softcap"] is not None,
        sinks=options["sinks"] is not None,
        dropout=options["dropout_p"] > 0,
    )


@cache
def _kernel_for(backend: str, **asked) -> tuple[str | None, str]:
    if backend != "auto":
        why_not = unsupported(backend, **asked)
        return (backend, "") if why_not is None else (None, why_not.removeprefix(f"attention.backend={backend} "))
    name, why = choose(**asked)
    return (name, "") if name in OURS else (None, (unsupported("triton", **asked) or why).split(";")[0].split(" (")[0])


def _plain(query, key, value, mask, *, softcap, sinks, dropout_p, scale) -> torch.Tensor:
    """Attention as its formula says, under a mask: bool, or added to the scores. Shapes as in ``_attention``."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = capped((query.float() @ key.float().mT) * (query.shape[3] ** -0.5 if scale is None else scale), softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    p = scores.softmax(-1)[..., : key.shape[2]]
    return (torch.dropout(p, dropout_p, train=True).to(value.dtype) @ value).transpose(1, 2).contiguous()


@cache
def _say_once(message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        _logger.warning(message)


# --- a model of transformers in the place of GPT --------------------------------------------------------------------


class HuggingFaceModel(torch.nn.Module):
    """A causal language model of transformers, called as ``model.gpt.GPT`` is.

    Args:
        model: made with an attn_implementation that follows ``attention.backend``: see ``attention_name``.
        end_of_text: the tokenizer's id between two documents, which then do not see each other, and whose positions count from 0 in
            each; None: a sample is one text.
    """

    def __init__(self, model: torch.nn.Module, *, end_of_text: int | None = None):
        super().__init__()
        self.model = model
        self.end_of_text = end_of_text
        self.matrices = frozenset(name for name, p in self.named_parameters() if p.ndim > 1)  # later ZeRO-3 leaves all of them flat

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, or the summed cross-entropy; see ``GPT.forward``."""
        packed = {} if self.end_of_text is None else {"position_ids": positions_in_documents(tokens, self.end_of_text)}
        logits = self.model(input_ids=tokens, use_cache=False, **packed).logits
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL)

    @property
    def block_types(self) -> list[type[torch.nn.Module]]:
        """Classes of the layers that are repeated."""
        names = set(self.model._no_split_modules or ())
        return list({type(module) for module in self.model.modules() if type(module).__name__ in names})


def attention_name(backend: str) -> str:
    """The attn_implementation of ``attention.backend``, registered where it is one of ours."""
    if backend in ("eager", "sdpa"):
        return backend
    name = NAME if backend == "auto" else f"{NAME}_{backend}"
    register(name, backend=backend)
    return name


def attention_for(kind: type[torch.nn.Module], backend: str, *, packed: bool) -> str | None:
    """The attn_implementation of ``attention.backend`` for a class of models; None where ``auto`` leaves it to attention of the model's own, which is said.

    packed: whether the model will be told of documents by their positions.
    Raises ModelFault for what a model outside of transformers' AttentionInterface has not: it would break off, or not heed it.
    """
    if kind.is_backend_compatible():
        return attention_name(backend)
    why = f"{kind.__name__} has attention of its own, outside of transformers' AttentionInterface"
    if packed:
        raise ModelFault(f"attention.document_mask: {why}, which need not heed documents; use false")
    if backend in ("eager", "sdpa"):
        return backend
    if backend != "auto":
        raise ModelFault(f"attention.backend={backend}: {why}; use auto, which leaves it to that")
    _say_once(f"attention.backend: auto -> the model's own, because {why}")
    return None


def checkpoint_layers(model: torch.nn.Module, checkpointing: Checkpointing) -> None:
    """Compute layers of a model of transformers again in the backward pass, as ``checkpointing`` says of blocks; nothing where its mode is none.

    Raises ValueError where transformers cannot checkpoint the model's layers.
    """
    if checkpointing.mode == "none":
        return
    model.activation_checkpointing_enable()
    layers = _layers(model)
    if not layers:
        raise ValueError(f"train.activation_checkpointing={checkpointing.mode}: transformers has no layers of {type(model).__name__} to compute again; use none")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = checkpointing.includes(index)
        layer._gradient_checkpointing_func = partial(_run_checkpointed, checkpointing)


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _run_checkpointed(checkpointing: Checkpointing, layer: Callable, x: torch.Tensor, *others: Any) -> Any:
    """``layer(x, *others)``: transformers binds what it gives by keyword."""
    return checkpointing.run(lambda x: layer(x, *others), x, {})


def count_recomputed(model: HuggingFaceModel, checkpointing: Checkpointing) -> dict[str, int]:
    """As ``model.gpt.count_recomputed``; a layer's last product counts, for which it is is the model's own affair."""
    again = [layer for index, layer in enumerate(_layers(model)) if checkpointing.includes(index)]
    parameters = sum(_of_a_token(model, layer, lambda p: p.ndim == 1 or not checkpointing.keep_matmuls) for layer in again)
    return {"parameters": parameters, "layers": 0 if checkpointing.mode == "selective" else len(again)}


def _of_a_token(model: HuggingFaceModel, module: torch.nn.Module, counts: Callable[[torch.nn.Parameter], bool] = lambda p: True) -> int:
    """How many parameters of the module compute a token: of a mixture's experts as many as the router chooses."""
    config = model.model.config.get_text_config(decoder=True)
    experts = next(filter(None, (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))), 1)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    named = [(f".{name}", p.numel()) for name, p in module.named_parameters() if counts(p)]
    return sum(n * chosen // experts if ".experts." in name else n for name, n in named)


def positions_in_documents(tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """int64 [batch, sequence]: how far each token stands behind the end of text before it, or the beginning; transformers then takes the
    sequence for packed."""
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return position - torch.where(tokens == end_of_text, position, 0).cummax(1).values


def count_parameters(model: HuggingFaceModel) -> dict[str, int]:
    """As ``model.gpt.count_parameters``; matmul without the experts that a token does not meet."""
    head = model.model.get_output_embeddings().weight
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is not head)
    total = sum(p.numel() for p in model.parameters())
    return {"total": total, "matmul": _of_a_token(model, model) - looked_up}
