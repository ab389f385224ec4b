"""The specification: attention as it is defined (`eager`), and FlashAttention in plain PyTorch, written for reading (`tiled`).

Notation, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691): S scores, P probabilities, O output, L log-sum-exp of a row of S,
dX the gradient of the loss with respect to X. All of it is for one head; the code carries batch and heads in the leading dimensions.
docs/attention.md derives what `tiled` computes, and points at its lines.
"""

import torch

from kernels.attention.dropout import keep_mask
from kernels.attention.masks import Rules, all_visible, biased, capped, keys_seen, queries_seeing, visible

# Queries, and keys, per tile. Memory beyond inputs and outputs: O(TILE^2) a head; the backward adds the whole dQ in float32.
TILE = 128


def eager(q, k, v, *, rules: Rules, sinks: torch.Tensor | None, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Standard attention, O = softmax(S) V; stores all scores, softmax in float32 at least. Shapes as in `attention`."""
    (batch, seq_q, heads, _), (seq_k, kv_heads) = q.shape, k.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    everything = range(seq_q), range(seq_k)
    scores = capped((q @ k.mT).to(_accumulator(q.dtype)) * rules.scale, rules.softcap)
    scores = biased(scores, rules, *everything)
    if rules.hides:
        hidden = ~visible(rules, *everything, q.device)
        # The lowest finite number, not -inf: the softmax of a row with nothing to attend to stays finite, and is then zeroed.
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, seq_q, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :seq_k]
    if rules.hides:
        weights = weights.masked_fill(hidden, 0.0)
    if rules.dropout_p > 0:
        weights = weights * keep_mask(rules.seed, rules.dropout_p, batch, heads, *everything) / (1 - rules.dropout_p)
    out = (weights.to(v.dtype) @ v).transpose(1, 2)
    if not return_lse:
        return out, None
    lse = torch.logsumexp(scores, dim=-1)
    return out, lse.masked_fill(hidden.all(dim=-1), -torch.inf) if rules.hides and sinks is None else lse


def tiled(q, k, v, *, rules: Rules, sinks: torch.Tensor | None, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FlashAttention-2 tile by tile, O(seq) memory: the online softmax forward, recomputation backward. Shapes as in `attention`.

    The Triton kernels do the same with exp2 in place of exp: their scores and row maxima carry a factor of log2(e).
    """
    out, lse = _Tiled.apply(q, k, v, sinks, rules)
    return out, lse if return_lse else None


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, rules):
        out, lse = _tiled_forward(q, k, v, sinks, rules)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.rules = rules
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return *_tiled_backward(*ctx.saved_tensors, dout, dlse, ctx.rules), None


def _tiled_forward(q, k, v, sinks, rules):
    """FlashAttention-2, Algorithm 1. The line numbers in the comments are the paper's."""
    (batch, seq_q, heads, _), (seq_k, kv_heads) = q.shape, k.shape[1:3]
    out, lse = q.new_empty(batch, seq_q, heads, v.shape[3]), q.new_empty(batch, heads, seq_q, dtype=_accumulator(q.dtype))
    q, o, k, v = (_by_group(x, kv_heads) for x in (q, out, k, v))  # views: what is written to o is in out, and to lse_rows in lse
    lse_rows = lse.unflatten(1, (kv_heads, -1)).unsqueeze(-1)

    for queries in _tiles(range(seq_q)):
        q_i = _load(q, queries)
        o_i = torch.zeros_like(_load(o, queries))  # not yet divided by l_i
        row_max, row_sum = _before_the_keys(lse_rows, queries, sinks)  # m_i and l_i
        for keys in _tiles(keys_seen(rules, queries, seq_k)):
            k_j, v_j = _load(k, keys), _load(v, keys)
            s, _ = _scores(q_i, k_j, queries, keys, rules)  # line 8
            new_max = torch.maximum(row_max, s.amax(dim=-1, keepdim=True))  # line 9, as the two below
            p = torch.exp(s - _finite(new_max))
            rescale = torch.exp(row_max - _finite(new_max))
            row_sum = rescale * row_sum + p.sum(dim=-1, keepdim=True)
            z = _dropout_factor(q, queries, keys, rules)
            o_i = rescale * o_i + (z * p) @ v_j  # line 10
            row_max = new_max
        o[..., queries.start : queries.stop, :] = o_i / row_sum.masked_fill(row_sum == 0, 1.0)  # line 12; rows that saw nothing: 0
        lse_rows[..., queries.start : queries.stop, :] = row_max + torch.log(row_sum)  # line 13
    return out, lse


def _tiled_backward(q, k, v, sinks, out, lse, dout, dlse, rules):
    """FlashAttention-2, Algorithm 2, which recomputes P from L; plus the gradients of L itself and of the sinks. (dq, dk, dv, dsinks)

    The softmax's gradient is dS = P * (dP - D), D = rowsum(P * dP) = rowsum(dO * O) (section 3.1): D needs the whole row, and O holds it.
    As dL/dS = P, a gradient of L adds P * dL: it is D - dL that is subtracted. A sink is a score whose value vector is 0: its dP is 0.

    Names: dq, dk, dv are whole gradients, dk_j and dv_j a tile's sums; do is dout with its heads by group, do_i a tile of it.
    """
    kv_heads, seq_q, seq_k = k.shape[2], q.shape[1], k.shape[1]
    delta = (dout.to(lse.dtype) * out).sum(dim=-1).transpose(1, 2) - dlse  # line 4
    # A query that saw nothing has P = 0, but 0 * NaN is NaN, and the gradient of its -inf may be that (logaddexp's is).
    delta = delta.masked_fill(lse == -torch.inf, 0.0)
    dsinks = None if sinks is None else -(torch.exp(sinks[:, None] - lse) * delta).sum(dim=(0, 2)).to(sinks.dtype)
    delta, lse = (x.unflatten(1, (kv_heads, -1)).unsqueeze(-1) for x in (delta, lse))
    q, k, v, do = (_by_group(x, kv_heads) for x in (q, k, v, dout))
    dq = q.new_zeros(q.shape, dtype=lse.dtype)  # summed up over the key tiles; dk and dv are written once
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)

    for keys in _tiles(range(seq_k)):
        k_j, v_j = _load(k, keys), _load(v, keys)
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        for queries in _tiles(queries_seeing(rules, keys, seq_q)):
            q_i, do_i = _load(q, queries), _load(do, queries)
            s, slope = _scores(q_i, k_j, queries, keys, rules)  # line 10
            p = torch.exp(s - _finite(_load(lse, queries)))  # line 11
            z = _dropout_factor(q, queries, keys, rules)
            dv_j += ((z * p).mT @ do_i).sum(dim=2, keepdim=True)  # line 12; summed over the query heads that share this key head
            dp = z * (do_i @ v_j.mT)  # line 13
            ds = p * (dp - _load(delta, queries))  # line 14
            ds = rules.scale * slope * ds  # from here on of the products Q K^T, which the scale and the cap made scores of
            dq[..., queries.start : queries.stop, :] += ds @ k_j  # line 15
            dk_j += (ds.mT @ q_i).sum(dim=2, keepdim=True)  # line 16
        dk[..., keys.start : keys.stop, :] = dk_j
        dv[..., keys.start : keys.stop, :] = dv_j
    return *(x.flatten(1, 2).transpose(1, 2) for x in (dq.to(q.dtype), dk, dv)), dsinks


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


def _tiles(rows):
    return [range(i, min(i + TILE, rows.stop)) for i in range(rows.start, rows.stop, TILE)]


def _before_the_keys(lse_rows, queries, sinks):
    """Maximum and sum of the exponentials that a row starts with: none, or that of its sink, which no value goes with."""
    row = torch.zeros_like(_load(lse_rows, queries))
    if sinks is None:
        return row - torch.inf, row
    return row + sinks.to(row.dtype).view(1, *row.shape[1:3], 1, 1), row + 1.0


def _scores(q_i, k_j, queries, keys, rules):
    """(the tile's scores, -inf where the query does not see the key; their derivative with respect to the scaled products)."""
    s = capped(rules.scale * q_i @ k_j.mT, rules.softcap)
    slope = 1.0 if rules.softcap is None else 1 - (s / rules.softcap) ** 2  # tanh' = 1 - tanh^2
    s = biased(s.flatten(1, 2), rules, queries, keys).view_as(s)
    if not all_visible(rules, queries, keys):
        s = s.masked_fill(~visible(rules, queries, keys, s.device).unsqueeze(2), -torch.inf)
    return s, slope


def _finite(x):
    """-inf becomes the lowest finite number: a row that has seen nothing gets exp(-inf - finite) = 0, where exp(-inf + inf) is NaN."""
    return x.clamp(min=torch.finfo(x.dtype).min)


def _dropout_factor(q, queries, keys, rules):
    """Z of the tile: 1 / (1 - dropout_p) where a probability is kept, 0 where it is dropped; q is by group."""
    if rules.dropout_p == 0:
        return 1.0
    batch, kv_heads, group = q.shape[:3]
    keep = keep_mask(rules.seed, rules.dropout_p, batch, kv_heads * group, queries, keys)
    return keep.unflatten(1, (kv_heads, group)).to(_accumulator(q.dtype)) / (1 - rules.dropout_p)
