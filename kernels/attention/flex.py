"""PyTorch's FlexAttention (arXiv 2412.05496) under our signature: our rules, compiled into its Triton kernels."""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from kernels.attention.masks import Rules
from kernels.attention.reference import eager

# It is compiled anew for every shape and rule, and past this many PyTorch stops compiling: with fullgraph=True it then raises; without, it
# would run FlexAttention uncompiled, with all scores in memory, and say nothing.
SIGNATURES = 1000


def flex(q, k, v, *, rules: Rules, sinks: torch.Tensor | None, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shapes as in `attention`. Block masks are kept; of documents, those of the last ones (see `masks.document_bounds`)."""
    if not (q.numel() and k.numel()):  # FlexAttention refuses empty tensors, and there is nothing to compute
        return eager(q, k, v, rules=rules, sinks=sinks, return_lse=return_lse)
    attend = flex_attention if _runs_as_it_is(q.device) else _compiled(flex_attention)
    needs_lse = return_lse or sinks is not None
    result = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=_score_mod(rules),
        block_mask=_block_mask(rules, q.shape[0], q.shape[1], k.shape[1], q.device) if rules.hides else None,
        scale=rules.scale,
        enable_gqa=True if q.shape[2] != k.shape[2] else False,
        return_aux=AuxRequest(lse=True) if needs_lse else None,
    )
    if not needs_lse:
        return result.transpose(1, 2), None
    out, lse = result[0].transpose(1, 2), result[1].lse
    if sinks is not None:  # its share of the sum of the exponentials is exp(sink) / (exp(sink) + exp(lse))
        sink = sinks.to(lse.dtype)[:, None]
        out = (out * torch.sigmoid(lse - sink).transpose(1, 2).unsqueeze(-1)).to(q.dtype)
        lse = torch.logaddexp(lse, sink)
    return out, lse if return_lse else None


def _runs_as_it_is(device) -> bool:
    """Inside another compilation; and on the CPU, where it has no backward pass, and tests alone call it."""
    return torch.compiler.is_compiling() or device.type == "cpu"


@lru_cache
def _compiled(function):
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), SIGNATURES))
    return torch.compile(function, dynamic=False, fullgraph=True)


def _score_mod(rules: Rules):
    if rules.softcap is None and rules.alibi_slopes is None:
        return None
    softcap, slopes, offset = rules.softcap, rules.alibi_slopes, rules.offset
    slope_of = (lambda batch, head: slopes[0, head]) if slopes is None or len(slopes) == 1 else (lambda batch, head: slopes[batch, head])

    def score_mod(score, batch, head, query, key):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slope_of(batch, head) * (query + offset - key).abs()
        return score

    return score_mod


def _mask_mod(rules: Rules):
    """`masks.visible`, for one query and key."""
    left, right, offset, start, end = rules.left, rules.right, rules.offset, rules.doc_start, rules.doc_end

    def mask_mod(batch, head, query, key):
        seen = key >= 0
        if left is not None:
            seen = seen & (key >= query + offset - left)
        if right is not None:
            seen = seen & (key <= query + offset + right)
        if start is not None:
            seen = seen & (key >= start[batch, query]) & (key < end[batch, query])
        return seen

    return mask_mod


# The last documents' bounds, and masks made of them: {what else a mask depends on: the mask}. A mask holds on to its bounds.
_last: list = [None, {}]


def _block_mask(rules, batch, seq_q, seq_k, device):
    if torch.compiler.is_compiling():
        return _make_block_mask(rules, batch, seq_q, seq_k, device)
    shape = rules.left, rules.right, rules.offset, seq_q, seq_k
    if rules.doc_start is None:
        return _kept_block_mask(*shape, device)
    if _last[0] is not rules.doc_start:
        _last[:] = rules.doc_start, {}
    if shape not in _last[1]:
        _last[1][shape] = _make_block_mask(rules, batch, seq_q, seq_k, device)
    return _last[1][shape]


@lru_cache(maxsize=128)
def _kept_block_mask(left, right, offset, seq_q, seq_k, device):
    return _make_block_mask(Rules(1.0, offset, left, right), None, seq_q, seq_k, device)


def _make_block_mask(rules, batch, seq_q, seq_k, device):
    make = create_block_mask if _runs_as_it_is(device) else _compiled(create_block_mask)  # uncompiled it stores a mask of every score
    return make(_mask_mod(rules), batch if rules.doc_start is not None else None, None, seq_q, seq_k, device=device)
