"""The numbers in docs/attention.md: what three mistakes in a FlashAttention do to its results. And the line numbers that it points at.

    python scripts/explain_attention.py           # prints the tables
    python scripts/explain_attention.py --write   # and writes them, and the lines, into docs/attention.md

All in float64 on the CPU, so that every digit printed is the mistake's and none is rounding's.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DOCUMENT = ROOT / "docs/attention.md"
REFERENCE = ROOT / "kernels/attention/reference.py"
SEQ, HEAD_DIM = 512, 64
POINTER = re.compile(r"`([^`]+)` \(\[line (\d+)\]\(\.\./kernels/attention/reference\.py#L(\d+)\)\)")
NUMBERS = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tensors(spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    """q, k, v and dO, [seq, head_dim] float64; `spread` is the standard deviation of the scores."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = torch.randn(4, SEQ, HEAD_DIM, generator=generator, dtype=torch.float64)
    return q * spread, k, v, do


def relative(x: torch.Tensor, exact: torch.Tensor) -> str:
    return f"{(x - exact).norm() / exact.norm():.1%}"


def forward(q, k, v, tile: int, rescale_accumulator: bool) -> torch.Tensor:
    """The online softmax, or without the one factor."""
    row_max, row_sum, o = torch.full((SEQ, 1), -torch.inf, dtype=q.dtype), torch.zeros(SEQ, 1, dtype=q.dtype), torch.zeros_like(v)
    for k_j, v_j in zip(k.split(tile), v.split(tile)):
        s = q @ k_j.mT / HEAD_DIM**0.5
        new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
        p, rescale = torch.exp(s - new_max), torch.exp(row_max - new_max)
        row_sum = rescale * row_sum + p.sum(-1, keepdim=True)
        o = (rescale * o if rescale_accumulator else o) + p @ v_j
        row_max = new_max
    return o / row_sum


def without_rescaling() -> list[list[str]]:
    rows = [["standard deviation of the scores", "1 tile of 512 keys", "4 tiles of 128", "16 tiles of 32"]]
    for spread in (0.5, 1.0, 3.0):
        q, k, v, _ = tensors(spread)
        exact = torch.softmax(q @ k.mT / HEAD_DIM**0.5, dim=-1) @ v
        torch.testing.assert_close(forward(q, k, v, 32, True), exact)
        rows.append([f"{spread}", *(relative(forward(q, k, v, tile, False), exact) for tile in (512, 128, 32))])
    return rows


def diagonal_tiles_unmasked() -> list[list[str]]:
    q, k, v, _ = tensors()
    scores = q @ k.mT / HEAD_DIM**0.5
    query, key = torch.arange(SEQ)[:, None], torch.arange(SEQ)
    causal = torch.softmax(scores.masked_fill(key > query, -torch.inf), dim=-1)
    rows = [["tile", "of the probability on keys to come: all queries", "first query", "last of a tile", "error of O"]]
    for tile in (16, 64, 128):
        wrong = torch.softmax(scores.masked_fill(key // tile > query // tile, -torch.inf), dim=-1)
        to_come = wrong.masked_fill(key <= query, 0).sum(-1)
        shares = to_come.mean(), to_come[0], to_come[tile - 1]
        rows.append([f"{tile} x {tile}", *(f"{share:.1%}" for share in shares), relative(wrong @ v, causal @ v)])
    return rows


def row_sum_of_one_tile() -> list[list[str]]:
    q, k, v, do = tensors()
    p, dp = torch.softmax(q @ k.mT / HEAD_DIM**0.5, dim=-1), do @ v.mT

    def gradients(delta):
        ds = p * (dp - delta) / HEAD_DIM**0.5
        return ds @ k, ds.mT @ q, ds.sum(-1).abs().mean()

    exact_dq, exact_dk, exact_sum = gradients((do * (p @ v)).sum(-1, keepdim=True))
    rows = [["row sum over", "error of dQ", "error of dK", "mean of abs(rowsum(dS))"]]
    rows.append(["the whole row", "0.0%", "0.0%", f"{exact_sum:.4f}"])
    for tile in (256, 128, 32):
        parts = [(p_j * dp_j).sum(-1, keepdim=True).expand_as(p_j) for p_j, dp_j in zip(p.split(tile, 1), dp.split(tile, 1))]
        dq, dk, of_row = gradients(torch.cat(parts, dim=1))
        rows.append([f"a tile of {tile} keys", relative(dq, exact_dq), relative(dk, exact_dk), f"{of_row:.4f}"])
    return rows


TABLES = {"accumulator": without_rescaling, "diagonal": diagonal_tiles_unmasked, "delta": row_sum_of_one_tile}


def markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def with_lines(text: str) -> str:
    """The document with the number of the one line of reference.py that contains each pointer's code."""
    lines = REFERENCE.read_text().splitlines()

    def pointer(match):
        found = [number for number, line in enumerate(lines, start=1) if match[1] in line]
        if len(found) != 1:
            raise SystemExit(f"explain_attention: {DOCUMENT.name} points at `{match[1]}`, which {len(found)} lines of {REFERENCE.name} hold")
        return f"`{match[1]}` ([line {found[0]}](../kernels/attention/reference.py#L{found[0]}))"

    return POINTER.sub(pointer, text)


def with_numbers(text: str) -> str:
    return NUMBERS.sub(lambda match: match[1] + markdown(TABLES[match[2]]()) + match[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        DOCUMENT.write_text(with_numbers(with_lines(DOCUMENT.read_text())))
    print("\n".join(f"{name}\n{markdown(make())}" for name, make in TABLES.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
