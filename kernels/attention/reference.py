"""The specification: attention as it is defined (`eager`), and FlashAttention in plain PyTorch, written for reading (`tiled`).

Notation, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691): S scores, P probabilities, O output, L log-sum-exp of a row of S,
dX the gradient of the loss with respect to X. All of it is for one head; the code carries batch and heads in the leading dimensions.
"""

import torch

from kernels.attention.masks import causal_mask

# Queries, and keys, per tile. Memory beyond inputs and outputs: O(TILE^2) a head; the backward adds the whole dQ in float32.
TILE = 128


def eager(q, k, v, *, causal: bool, scale: float, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Standard attention, O = softmax(scale Q K^T) V; stores all scores, softmax in float32 at least. Shapes as in `attention`."""
    seq_q, seq_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.mT).to(_accumulator(q.dtype)) * scale
    if causal:
        hidden = ~causal_mask(range(seq_q), range(seq_k), seq_k - seq_q, q.device)
        # The lowest finite number, not -inf: the softmax of a row with nothing to attend to stays finite, and is then zeroed.
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if causal:
        weights = weights.masked_fill(hidden, 0.0)
    out = (weights.to(v.dtype) @ v).transpose(1, 2)
    if not return_lse:
        return out, None
    lse = torch.logsumexp(scores, dim=-1)
    return out, lse.masked_fill(hidden.all(dim=-1), -torch.inf) if causal else lse


def tiled(q, k, v, *, causal: bool, scale: float, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FlashAttention-2 tile by tile, O(seq) memory: the online softmax forward, recomputation backward. Shapes as in `attention`.

    The Triton kernels do the same with exp2 in place of exp: their scores and row maxima carry a factor of log2(e).
    """
    out, lse = _Tiled.apply(q, k, v, causal, scale)
    return out, lse if return_lse else None


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        out, lse = _tiled_forward(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return *_tiled_backward(*ctx.saved_tensors, dout, dlse, ctx.causal, ctx.scale), None, None


def _tiled_forward(q, k, v, causal, scale):
    """FlashAttention-2, Algorithm 1. The line numbers in the comments are the paper's."""
    (batch, seq_q, heads, _), (seq_k, kv_heads) = q.shape, k.shape[1:3]
    out, lse = q.new_empty(q.shape), q.new_empty(batch, heads, seq_q, dtype=_accumulator(q.dtype))
    q, o, k, v = (_by_group(x, kv_heads) for x in (q, out, k, v))  # views: what is written to o is in out, and to lse_rows in lse
    lse_rows = lse.unflatten(1, (kv_heads, -1)).unsqueeze(-1)

    for queries in _tiles(0, seq_q):
        q_i = _load(q, queries)
        row_max = torch.full_like(q_i[..., :1], -torch.inf)  # m_i
        row_sum = torch.zeros_like(row_max)  # l_i
        o_i = torch.zeros_like(q_i)  # not yet divided by l_i
        for keys in _tiles(0, _keys_seen(queries, seq_q, seq_k, causal)):
            k_j, v_j = _load(k, keys), _load(v, keys)
            s = _scores(q_i, k_j, queries, keys, seq_k - seq_q, causal, scale)  # line 8
            new_max = torch.maximum(row_max, s.amax(dim=-1, keepdim=True))  # line 9, as the two below
            p = torch.exp(s - _finite(new_max))
            rescale = torch.exp(row_max - _finite(new_max))
            row_sum = rescale * row_sum + p.sum(dim=-1, keepdim=True)
            o_i = rescale * o_i + p @ v_j  # line 10
            row_max = new_max
        o[..., queries.start : queries.stop, :] = o_i / row_sum.masked_fill(row_sum == 0, 1.0)  # line 12; rows that saw nothing: 0
        lse_rows[..., queries.start : queries.stop, :] = row_max + torch.log(row_sum)  # line 13
    return out, lse


def _tiled_backward(q, k, v, out, lse, dout, dlse, causal, scale):
    """FlashAttention-2, Algorithm 2, which recomputes P from L; plus the gradient of L itself.

    The softmax's gradient is dS = P * (dP - D), D = rowsum(P * dP) = rowsum(dO * O) (section 3.1): D needs the whole row, and O holds it.
    As dL/dS = P, a gradient of L adds P * dL: it is D - dL that is subtracted.

    Names: dq, dk, dv are whole gradients, dk_j and dv_j a tile's sums; do is dout with its heads by group, do_i a tile of it.
    """
    kv_heads, seq_q, seq_k = k.shape[2], q.shape[1], k.shape[1]
    delta = ((dout.to(lse.dtype) * out).sum(dim=-1).transpose(1, 2) - dlse).unflatten(1, (kv_heads, -1)).unsqueeze(-1)  # line 4
    lse = lse.unflatten(1, (kv_heads, -1)).unsqueeze(-1)
    q, k, v, do = (_by_group(x, kv_heads) for x in (q, k, v, dout))
    dq = q.new_zeros(q.shape, dtype=lse.dtype)  # summed up over the key tiles; dk and dv are written once
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)

    for keys in _tiles(0, seq_k):
        k_j, v_j = _load(k, keys), _load(v, keys)
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        for queries in _tiles(_first_query(keys, seq_q, seq_k, causal), seq_q):
            q_i, do_i = _load(q, queries), _load(do, queries)
            s = _scores(q_i, k_j, queries, keys, seq_k - seq_q, causal, scale)  # line 10
            p = torch.exp(s - _finite(_load(lse, queries)))  # line 11
            dv_j += (p.mT @ do_i).sum(dim=2, keepdim=True)  # line 12; summed over the query heads that share this key head
            dp = do_i @ v_j.mT  # line 13
            ds = p * (dp - _load(delta, queries))  # line 14
            dq[..., queries.start : queries.stop, :] += scale * ds @ k_j  # line 15
            dk_j += scale * (ds.mT @ q_i).sum(dim=2, keepdim=True)  # line 16
        dk[..., keys.start : keys.stop, :] = dk_j
        dv[..., keys.start : keys.stop, :] = dv_j
    return tuple(x.flatten(1, 2).transpose(1, 2) for x in (dq.to(q.dtype), dk, dv))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_group(x, kv_heads):
    """[batch, seq, heads, head_dim] as [batch, kv_heads, heads / kv_heads, seq, head_dim], a view.

    Keys have 1 in the third dimension, and broadcast over the query heads that share them.
    """
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _load(x, rows):
    tile = x[..., rows.start : rows.stop, :]
    return tile.to(_accumulator(tile.dtype))


def _tiles(start, stop):
    return [range(i, min(i + TILE, stop)) for i in range(start, stop, TILE)]


def _keys_seen(queries, seq_q, seq_k, causal):
    """Keys at and beyond this number are hidden from every query of the tile."""
    return max(0, queries.stop + seq_k - seq_q) if causal else seq_k


def _first_query(keys, seq_q, seq_k, causal):
    """Queries before this one see no key of the tile."""
    return max(0, keys.start - (seq_k - seq_q)) if causal else 0


def _scores(q_i, k_j, queries, keys, offset, causal, scale):
    s = scale * q_i @ k_j.mT
    if causal and keys.stop - 1 > queries.start + offset:
        s = s.masked_fill(~causal_mask(queries, keys, offset, s.device), -torch.inf)
    return s


def _finite(x):
    """-inf becomes the lowest finite number: a row that has seen nothing gets exp(-inf - finite) = 0, where exp(-inf + inf) is NaN."""
    return x.clamp(min=torch.finfo(x.dtype).min)
