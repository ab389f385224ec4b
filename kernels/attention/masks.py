"""What a query may see, and what a score goes through on its way to the softmax: the one place that says it, for every backend.

Query i stands at key position i + offset, offset = seq_k - seq_q: the last query stands at the last key, so that a few new queries see all
the keys before them. It sees the keys from i + offset - left to i + offset + right (causal: right = 0) that belong to its document.
"""

from typing import NamedTuple
from weakref import ref

import torch


class Rules(NamedTuple):
    """The arguments of one call of `attention`, checked and in one form; None where a feature is not asked for."""

    scale: float
    offset: int  # seq_k - seq_q
    left: int | None = None  # keys that are seen before the query's own position; None: all
    right: int | None = None  # and behind it; 0 is causal
    doc_start: torch.Tensor | None = None  # int32 [batch, seq], the first key of each position's document
    doc_end: torch.Tensor | None = None  # and one past its last
    cu_seqlens: torch.Tensor | None = None  # int32 [documents + 1], where the documents were given in this form
    alibi_slopes: torch.Tensor | None = None  # float32 [1 or batch, heads]
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None  # int64 [2], key and offset of the dropout's Philox
    deterministic: bool = False

    @property
    def causal(self) -> bool:
        return self.left is None and self.right == 0

    @property
    def hides(self) -> bool:
        return self.left is not None or self.right is not None or self.doc_start is not None


def visible(rules: Rules, queries: range, keys: range, device: torch.device) -> torch.Tensor:
    """Boolean [1 or batch, 1, len(queries), len(keys)], True where the query may see the key."""
    position = torch.arange(queries.start, queries.stop, device=device)[:, None] + rules.offset
    key = torch.arange(keys.start, keys.stop, device=device)
    seen = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=device)
    if rules.left is not None:
        seen = seen & (key >= position - rules.left)
    if rules.right is not None:
        seen = seen & (key <= position + rules.right)
    if rules.doc_start is not None:
        start, end = (x[:, None, queries.start : queries.stop, None] for x in (rules.doc_start, rules.doc_end))
        seen = seen & (key >= start) & (key < end)
    return seen


def all_visible(rules: Rules, queries: range, keys: range) -> bool:
    """Whether every query of the tile sees every key of it: then it needs no mask. Documents are tensors, and not looked into."""
    before = rules.left is None or keys.start >= queries.stop - 1 + rules.offset - rules.left
    behind = rules.right is None or keys.stop - 1 <= queries.start + rules.offset + rules.right
    return before and behind and rules.doc_start is None


def keys_seen(rules: Rules, queries: range, seq_k: int) -> range:
    """No query of the tile sees a key outside this range."""
    start = 0 if rules.left is None else max(0, queries.start + rules.offset - rules.left)
    stop = seq_k if rules.right is None else min(seq_k, queries.stop + rules.offset + rules.right)
    return range(start, max(start, stop))


def queries_seeing(rules: Rules, keys: range, seq_q: int) -> range:
    """No query outside this range sees a key of the tile."""
    start = 0 if rules.right is None else max(0, keys.start - rules.right - rules.offset)
    stop = seq_q if rules.left is None else min(seq_q, keys.stop + rules.left - rules.offset)
    return range(start, max(start, stop))


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap * tanh(scores / softcap), between -softcap and softcap (Gemma 2, arXiv 2408.00118, section 2)."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def biased(scores: torch.Tensor, rules: Rules, queries: range, keys: range) -> torch.Tensor:
    """ALiBi (Press et al. 2022): minus the head's slope for each position between query and key; scores [batch, heads, queries, keys]."""
    if rules.alibi_slopes is None:
        return scores
    position = torch.arange(queries.start, queries.stop, device=scores.device)[:, None] + rules.offset
    key = torch.arange(keys.start, keys.stop, device=scores.device)
    return scores - rules.alibi_slopes[:, :, None, None].to(scores.dtype) * (key - position).abs()


def alibi_slopes(heads: int, device: torch.device | None = None) -> torch.Tensor:
    """float32 [heads], 2^(-8/n), 2^(-16/n), ..., 2^-8 for a power of two n = heads (Press et al. 2022, section 3).

    Otherwise the slopes of the power of two below, and as many as are missing of twice that power, every second one, as in their code.
    """
    whole = 2 ** (heads.bit_length() - 1)
    head = torch.arange(heads, device=device)
    return torch.exp2(-8 / whole * torch.where(head < whole, head + 1.0, head - whole + 0.5))


def document_bounds(document_ids: torch.Tensor | None, cu_seqlens: torch.Tensor | None, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(first key, one past the last key) of each position's document, int32 [batch, seq] each, without waiting for the GPU.

    A document is a run of equal ids in document_ids [batch, seq], or the positions cu_seqlens[n] to cu_seqlens[n + 1] - 1. The layers of a
    model ask for the same ids one after the other: the last answer is kept, and given again while their tensor is not written to.
    """
    given = cu_seqlens if document_ids is None else document_ids
    untracked = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or given.is_inference()
    if untracked or given.is_cuda and torch.cuda.is_current_stream_capturing():
        return _bounds_of_ids(document_ids) if cu_seqlens is None else _bounds_of_cu_seqlens(cu_seqlens, seq)
    key = given._version, seq, cu_seqlens is None
    if _last and _last[0]() is given and _last[1] == key:
        return _last[2]
    bounds = _bounds_of_ids(document_ids) if cu_seqlens is None else _bounds_of_cu_seqlens(cu_seqlens, seq)
    _last[:] = ref(given), key, bounds
    return bounds


_last: list = []


def _bounds_of_ids(ids):
    seq = ids.shape[1]
    position = torch.arange(seq, dtype=torch.int32, device=ids.device).expand(ids.shape)
    changes = ids[:, 1:] != ids[:, :-1]
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    start = torch.where(torch.cat((edge, changes), 1), position, 0).cummax(1).values
    end = torch.where(torch.cat((changes, edge), 1), position + 1, seq).flip(1).cummin(1).values.flip(1)
    return start, end


def _bounds_of_cu_seqlens(cu_seqlens, seq):
    position = torch.arange(seq, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, position, right=True).clamp(1, cu_seqlens.numel() - 1)
    return cu_seqlens[document - 1][None], cu_seqlens[document][None]
