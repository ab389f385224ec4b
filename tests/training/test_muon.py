"""Muon on one process; tests/training/test_zero.py has it under ZeRO, tests/training/test_checkpoints.py its checkpoints."""

import pytest
import torch

from model.config import GPTConfig
from model.gpt import GPT, hidden_layers, parameter_groups
from training.muon import Matrix, MuonWithAdamW, orthogonalise

SHAPES = [(16, 16), (16, 48), (64, 16)]


def groups_of(parameters, kept=(), **settings):
    muon = {"params": parameters, "algorithm": "muon", "momentum": 0.9, "weight_decay": 0.1}
    return [muon | settings] + [{"params": list(kept), "algorithm": "adamw", "weight_decay": 0.1}] * bool(kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonalise(matrix) @ right.T
    assert 0.6 < float(inside.diagonal().min()) and float(inside.diagonal().max()) < 1.3
    torch.testing.assert_close(inside, inside.diagonal().diag(), atol=1e-3, rtol=0)
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torchs_muon(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = MuonWithAdamW(groups_of([ours]), [Matrix(*shape, (shape[0],))], dtype=torch.bfloat16, fused=False)
    reference = torch.optim.Muon([theirs], momentum=0.9, weight_decay=0.1)
    for rate in (0.02, 0.1, 0.05):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rate
        optimizer.step()
        reference.step()
    # The factor of tall matrices is multiplied in bf16 here.
    torch.testing.assert_close(ours, theirs, atol=2e-3 if shape[0] > shape[1] else 1e-6, rtol=0)
    assert float((ours - start).detach().abs().max()) > 0.05


def test_stacked_matrices_are_orthogonalised_by_themselves():
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(24, 16))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.data.split([16, 8])]
    whole.grad = torch.randn(24, 16)
    for part, gradient in zip(parts, whole.grad.split([16, 8]), strict=True):
        part.grad = gradient.clone()
    MuonWithAdamW(groups_of([whole], lr=0.02), [Matrix(24, 16, (16, 8))], dtype=torch.float32, fused=False).step()
    MuonWithAdamW(groups_of(parts, lr=0.02), [Matrix(16, 16, (16,)), Matrix(8, 16, (8,))], dtype=torch.float32, fused=False).step()
    assert torch.equal(whole, torch.cat(parts))


def test_the_others_take_torchs_adamw_and_a_parameter_without_gradient_stays():
    torch.manual_seed(0)
    matrix, bias, plain = torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(8)), torch.nn.Parameter(torch.zeros(8))
    plain.data.copy_(bias.data)
    optimizer = MuonWithAdamW(groups_of([matrix], [bias], lr=0.02), [Matrix(8, 8, (8,))], dtype=torch.float32, fused=False)
    reference = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1)
    optimizer.param_groups[1]["lr"] = 1e-2
    before = matrix.detach().clone()
    for _ in range(3):
        bias.grad = torch.randn(8)
        plain.grad = bias.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(bias, plain) and torch.equal(matrix, before)


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_matrices_are_those_of_the_blocks(tied):
    model = GPT(GPTConfig(layers=2, hidden_size=32, heads=4, kv_heads=2, vocab_size=50, sequence_length=16, activation="swiglu", tied_embeddings=tied).resolved())
    hidden, decayed, kept = (group["params"] for group in parameter_groups(model, hidden_apart=True))
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(hidden) == 8 and all(names[id(p)].startswith("blocks.") and p.dim() == 2 for p in hidden)
    assert [names[id(p)] for p in decayed] == ["token_embedding.weight", "position_embedding.weight"] + ["head.weight"] * (not tied)
    assert all(p.dim() == 1 for p in kept) and len(hidden) + len(decayed) + len(kept) == len(names)
    assert [layer.parts for layer in hidden_layers(model)[:4]] == [(32, 16, 16), (32,), (128, 128), (32,)]
    assert all(sum(layer.parts) == layer.out_features for layer in hidden_layers(model))
