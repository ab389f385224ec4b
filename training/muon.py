"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the hidden matrices, AdamW for all else, under every ZeRO stage.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal one, so it needs the matrix whole, and ZeRO gives each process a
flat piece of many.  Here each process is sent the pieces of its share of the matrices, orthogonalises those, and sends the pieces back.
Clipping and the gradient norm stay what they are for AdamW, because nothing happens before the step: DeepSpeed's own Muon, which puts
the orthogonalised momentum in the gradient's place, takes both of that (0.19.8: stage_1_and_2.py, stage3.py).
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.utils.tensor_fragment import fragment_address

from training.distributed import gather

_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # the post's


@dataclass(frozen=True)
class Matrix:
    """A parameter [rows, columns]; ``parts``: the rows of each matrix stacked in it (queries, keys and values), each orthogonalised by itself."""

    rows: int
    columns: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Where a flat tensor of this process holds its piece of a matrix.

    start: the piece's first element in the flat tensor. lengths: elements of every rank's piece, whose order is that of the matrix.
    """

    matrix: Matrix
    start: int
    lengths: tuple[int, ...]


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of a matrix U S V^T, nearly: five Newton-Schulz iterations leave singular values between about 0.7 and 1.2; same shape and dtype."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for parameter groups whose ``algorithm`` is ``muon``, torch's AdamW for the others.

    A Muon group also has ``lr``, ``momentum`` and ``weight_decay``.  Parameters are whole matrices, the same on every process, or, once
    ``shards`` says what is in them, ZeRO's flat pieces.

    Args:
        groups: parameter groups.
        matrices: those of the Muon groups' parameters, in order.
        dtype: of the orthogonalisation: bf16 as in the post, fp32 where all else is.
        fused: AdamW's.
    """

    def __init__(self, groups: list[dict], matrices: list[Matrix], *, dtype: torch.dtype, fused: bool):
        self._adamw = torch.optim.AdamW(groups, lr=0.0, fused=fused)
        super().__init__(self._adamw.param_groups, {})
        self.matrices, self.dtype = matrices, dtype
        self.shards: dict[torch.Tensor, list[Shard]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        muon = [group for group in self.param_groups if group["algorithm"] == "muon"]
        matrices = iter(self.matrices)
        for group in muon:
            for parameter in group["params"]:
                matrix = None if parameter.dim() == 1 else next(matrices)
                if parameter.grad is not None:
                    self._step(parameter, matrix, group)
        self._adamw.param_groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        self._adamw.state = self.state
        self._adamw.step()

    def _step(self, parameter: torch.Tensor, matrix: Matrix | None, group: dict) -> None:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
        momentum = state["exp_avg"]
        # DeepSpeed converts checkpoints by the names of Adam's states: the second moment is the first once more, which costs no memory.
        state["exp_avg_sq"] = momentum
        state["step"] += 1
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        direction = parameter.grad.lerp(momentum, group["momentum"]).to(self.dtype)
        if matrix is not None:
            update = _update_of(direction, matrix)
        else:
            update = self._exchanged(direction, self.shards.get(parameter, []))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])

    def _exchanged(self, flat: torch.Tensor, shards: list[Shard]) -> torch.Tensor:
        """The updates of a flat tensor's pieces: matrix by matrix, as many at a time as there are processes, one on each."""
        world, rank = dist.get_world_size(), dist.get_rank()
        result = torch.zeros_like(flat)
        for first in range(0, len(shards), world):
            turn = shards[first : first + world]
            sent = [shard.lengths[rank] for shard in turn] + [0] * (world - len(turn))
            mine = turn[rank] if rank < len(turn) else None
            received = list(mine.lengths) if mine else [0] * world
            pieces = torch.cat([flat[shard.start : shard.start + length] for shard, length in zip(turn, sent, strict=False)])
            whole = flat.new_empty(sum(received))
            dist.all_to_all_single(whole, pieces, received, sent)
            if mine:
                whole = _update_of(whole.view(mine.matrix.rows, mine.matrix.columns), mine.matrix).flatten()
            dist.all_to_all_single(pieces, whole, sent, received)
            for shard, piece in zip(turn, pieces.split(sent), strict=False):
                result[shard.start : shard.start + len(piece)] = piece
        return result


def _update_of(direction: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Each part orthogonalised, times sqrt(max(1, rows / columns)), which gives tall matrices the same root mean square as square ones."""
    return torch.cat([orthogonalise(part) * max(1.0, part.shape[0] / part.shape[1]) ** 0.5 for part in direction.split(matrix.parts)])


def find_shards(optimizer: MuonWithAdamW, zero: object, parameters: list[torch.nn.Parameter]) -> None:
    """Tell the optimizer what DeepSpeed's ``zero`` of stage 1, 2 or 3 has put into its flat tensors; call it on every rank.

    parameters: those of the optimizer's matrices, in order.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        # Stage 3 cuts each parameter into equal pieces; a flat tensor is the row of this rank's, padded to that size.
        flat_of = {id(p): flat for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True) for p in group}
        pieces, ends = [], Counter()
        for parameter in parameters:
            flat, size = flat_of[id(parameter)], parameter.partition_numel()
            pieces.append((flat, ends[flat], min(size, max(0, parameter.ds_numel - dist.get_rank() * size))))
            ends[flat] += size
    else:
        # Stages 1 and 2 put the parameters of a group in one row, and cut that into equal pieces wherever the cut falls.
        (flat,) = optimizer.param_groups[0]["params"]
        addresses = [p._hp_mapping.get_hp_fragment_address() if p._hp_mapping else fragment_address(numel=0, start=0) for p in parameters]
        pieces = [(flat, address.start, address.numel) for address in addresses]
    lengths = zip(*gather([length for _, _, length in pieces]), strict=True)
    for matrix, (flat, start, _), of_ranks in zip(optimizer.matrices, pieces, lengths, strict=True):
        optimizer.shards.setdefault(flat, []).append(Shard(matrix, start, of_ranks))
