"""How attention is checked: every backend's error against float64, beside the error that its dtype alone brings."""

import os
from dataclasses import dataclass, replace
from itertools import count

import torch

from kernels.attention import alibi_slopes, attention
from kernels.attention.reference import _tiled_backward
from scripts.fuzz_attention import Outcome, compare


def fresh_seed() -> int:
    """A new seed every run; pytest shows it when the test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return seed


@dataclass
class Case:
    seq_q: int
    seq_k: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 1
    causal: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    scale: float | None = None
    value_head_dim: int | None = None  # None: head_dim
    window: int | tuple[int | None, int | None] | None = None
    documents: tuple[int, ...] = ()  # lengths, turned round by one more in each row of the batch
    as_cu_seqlens: bool = False
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    deterministic: bool = False

    def tensors(self, seed: int) -> tuple[torch.Tensor, ...]:
        """q, k, v, and the gradients of the output and of the log-sum-exp."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape, dtype=self.dtype):
            return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(dtype)

        value_head_dim = self.value_head_dim or self.head_dim
        q = normal(self.batch, self.seq_q, self.heads, self.head_dim)
        k, v = (normal(self.batch, self.seq_k, self.kv_heads, d) for d in (self.head_dim, value_head_dim))
        dout = normal(self.batch, self.seq_q, self.heads, value_head_dim)
        return q, k, v, dout, normal(self.batch, self.heads, self.seq_q, dtype=torch.float32)

    def features(self, dtype: torch.dtype | None = None) -> dict:
        """All arguments of `attention` but q, k, v, backend and return_lse; sinks in `dtype`, a leaf of the graph."""
        options = dict(causal=self.causal, scale=self.scale, window=self.window, softcap=self.softcap, dropout_p=self.dropout_p)
        options["deterministic"] = self.deterministic
        if self.documents and self.as_cu_seqlens:
            ends = torch.tensor((0, *self.documents)).cumsum(0)
            options["cu_seqlens"] = ends.to(self.device, torch.int32)
        elif self.documents:
            turned = [torch.tensor(self.documents).roll(row) for row in range(self.batch)]
            rows = [torch.arange(len(self.documents)).repeat_interleave(lengths) for lengths in turned]
            options["document_ids"] = torch.stack(rows).to(self.device, torch.int32)
        if self.alibi:
            options["alibi_slopes"] = alibi_slopes(self.heads, self.device)
        if self.sinks:
            options["sinks"] = torch.linspace(-1, 2, self.heads, device=self.device, dtype=dtype or torch.float32).requires_grad_()
        return options


DROPOUT_SEED = 20  # of torch's generator before each call, so that all backends draw the same mask


def run(backend: str, case: Case, q, k, v, dout, dlse=None) -> dict[str, torch.Tensor]:
    """Output and gradients; with dlse also the log-sum-exp, whose gradient then flows too."""
    inputs = {name: x.detach().requires_grad_() for name, x in zip("qkv", (q, k, v))}
    options = case.features(torch.float64 if q.dtype is torch.float64 else None)
    torch.manual_seed(DROPOUT_SEED)
    out = attention(**inputs, **options, backend=backend, return_lse=dlse is not None)
    if case.sinks:
        inputs["sinks"] = options["sinks"]
    out, lse = out if dlse is not None else (out, None)
    outputs, gradients = ((out,), (dout,)) if lse is None else ((out, lse), (dout, dlse))
    results = {"out": out, **{f"d{name}": x for name, x in zip(inputs, torch.autograd.grad(outputs, inputs.values(), gradients))}}
    return results if lse is None else results | {"lse": lse}


def with_rounded_output(case: Case, exact: dict[str, torch.Tensor], q, k, v, dout, dlse=None) -> dict[str, torch.Tensor]:
    """The gradients of float64 arithmetic that stores what FlashAttention does, O, in the dtype of the inputs: delta = rowsum(dO * O) is
    then as inexact as O, which plain PyTorch's gradients are not."""
    dtype = q.dtype
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    torch.manual_seed(DROPOUT_SEED)
    _, lse = attention(q.requires_grad_(), k, v, **case.features(torch.float64), backend="tiled", return_lse=True)
    node = lse.grad_fn  # of `tiled`, which keeps what its backward takes
    dlse = torch.zeros_like(lse) if dlse is None else dlse.double()
    with torch.no_grad():
        *inputs, _, lse = node.saved_tensors
        *gradients, dsinks = _tiled_backward(*inputs, exact["out"].to(dtype).double(), lse, dout, dlse, node.rules)
    return {name: x.to(dtype) for name, x in zip(("dq", "dk", "dv"), gradients)} | ({} if dsinks is None else {"dsinks": dsinks})


def check(backend: str, case: Case, *, with_lse: bool = False, tensors=None, times: float = 2, read=None) -> None:
    """error(backend) <= times * error(PyTorch in this dtype, or float64 with O in this dtype), in every tensor, for `tensors` (default:
    fresh ones), by the rule of scripts/fuzz_attention.py. read: what the hardware makes of its operands; float64 arithmetic of tensors so
    read then stands beside, too.
    """
    seed = fresh_seed()

    def outcome(draw: int) -> Outcome:
        *inputs, dout, dlse = case.tensors(seed + draw) if tensors is None else tensors
        gradients = (dout, dlse) if with_lse else (dout,)
        exact = run("eager", case, *(x.double() for x in (*inputs, *gradients)))
        beside = [run("eager", case, *inputs, *gradients), with_rounded_output(case, exact, *inputs, *gradients)]
        if read:
            beside.append(run("eager", case, *(x.double() for x in (*map(read, (*inputs, dout)), *gradients[1:]))))
        # `eager` alone stores the products q.k in its dtype, rounded to the nearest.
        rounding = torch.finfo(case.dtype).eps / 2 * largest_score(case, *inputs[:2]) if with_lse and backend == "eager" else 0.0
        return Outcome(run(backend, case, *inputs, *gradients), exact, beside, scores=rounding)

    faults, *_ = compare(map(outcome, count() if tensors is None else range(1)), times)
    assert not faults, f"{backend} {case}: {'; '.join(faults)}"


def largest_score(case: Case, q, k) -> float:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    products = q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1)
    return products.abs().amax().item() * (case.scale or q.shape[3] ** -0.5)


def check_scores_far_from_zero(backend: str) -> None:
    """Scores of hundreds and more, whose exponentials float32 does not hold; their rounding errors are relative errors of P."""
    case = Case(40, 40, scale=100.0)
    q, k, v, dout, _ = case.tensors(fresh_seed())
    results, exact = run(backend, case, q, k, v, dout), run("eager", case, *(x.double() for x in (q, k, v, dout)))
    largest_score = case.scale * (q.abs().transpose(1, 2) @ k.abs().permute(0, 2, 3, 1)).amax().item()
    assert largest_score > 500
    relative_error = 8 * torch.finfo(torch.float32).eps * largest_score
    for name in ("out", "dv"):  # the other gradients are near 0, as P is near 0 or 1
        largest = exact[name].abs().amax().item()
        torch.testing.assert_close(results[name].double(), exact[name], rtol=0, atol=relative_error * largest)
    assert results["dq"].isfinite().all() and results["dk"].isfinite().all()


def check_dynamic_shapes(backend: str, case: Case, compiler: str = "inductor") -> None:
    """One graph for several lengths, head counts and head_dims, the same numbers as without torch.compile."""

    def doubled(q, k, v):
        return 2 * attention(q, k, v, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=compiler)
    for changes in ({}, dict(seq_q=case.seq_q + 7, seq_k=case.seq_k + 7), dict(heads=6), dict(kv_heads=1), dict(head_dim=80)):
        q, k, v, dout, _ = replace(case, **changes).tensors(fresh_seed())
        inputs = [x.requires_grad_() for x in (q, k, v)]
        got, expected = compiled(*inputs), doubled(*inputs)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(expected, inputs, dout))
