import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import GPTConfig
from model.gpt import GPT, IGNORED_LABEL, count_parameters, rotary_table, rotate
from training.flops import hardware_flops_per_token, model_flops_per_token

SMALL = {"layers": 2, "hidden_size": 32, "heads": 4, "vocab_size": 50, "sequence_length": 16}
DIALECTS = {
    "gpt2": {},
    "llama": {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False, "kv_heads": 2},
    "mqa": {"kv_heads": 1, "head_dim": 16, "ffn_size": 48},
}


def build(backend="eager", **fields) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **fields}).resolved(), attention_backend=backend)


@pytest.fixture(params=DIALECTS.values(), ids=DIALECTS)
def model(request):
    return build(**request.param)


def test_a_token_never_sees_what_follows_it(model):
    tokens = torch.randint(50, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_summed_loss_counts_what_is_not_ignored(model):
    tokens, labels = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    labels[0, :7] = IGNORED_LABEL
    logits = model(tokens).log_softmax(-1)
    expected = -sum(logits[row, i, labels[row, i]] for row in range(2) for i in range(16) if labels[row, i] != IGNORED_LABEL)
    torch.testing.assert_close(model(tokens, labels), expected)


def test_backends_give_the_same_model(model):
    tokens = torch.randint(50, (2, 13))
    expected = model(tokens)
    for backend in ("tiled", "sdpa"):
        for block in model.blocks:
            block.attention.backend = backend
        torch.testing.assert_close(model(tokens), expected)


VARIANTS = {
    "window": {"attention_window": 4},
    "documents": {"end_of_text": 0},
    "alibi": {"positions": "alibi"},
    "dropout": {"attention_dropout": 0.3},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request):
    return build_variant(**request.param)


def build_variant(**options) -> GPT:
    torch.manual_seed(0)
    fields = {key: options.pop(key) for key in ("positions", "layers") if key in options}
    return GPT(GPTConfig(**{**SMALL, **fields}).resolved(), attention_backend="tiled", **options)


def test_variants_of_attention_learn_the_same_recomputed(variant):
    tokens = torch.randint(50, (2, 16))
    tokens[:, 5] = 0
    losses, gradients = [], []
    for backend, mode in (("tiled", "none"), ("tiled", "full"), ("eager", "none")):
        variant.activation_checkpointing = mode
        for block in variant.blocks:
            block.attention.backend = backend
        variant.zero_grad()
        torch.manual_seed(3)
        losses.append(variant(tokens, tokens.roll(-1, 1)))
        losses[-1].backward()
        gradients.append([p.grad.clone() for p in variant.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_a_window_hides_what_lies_before_it():
    model = build_variant(attention_window=4, layers=1)
    tokens = torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    same = (model(tokens) - model(changed)).abs().amax(-1)[0] < 1e-6
    assert same.tolist() == [True] * 5 + [False] * 4 + [True] * 7


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_packed_documents_are_as_if_alone(positions):
    model = build_variant(end_of_text=0, positions=positions)
    tokens = torch.randint(1, 50, (1, 16))
    tokens[0, 6] = 0
    torch.testing.assert_close(model(tokens), torch.cat((model(tokens[:, :7]), model(tokens[:, 7:])), dim=1))
    model.end_of_text = None
    assert not torch.allclose(model(tokens)[:, 7:], model(tokens[:, 7:]))


def test_alibi_has_no_position_table_and_tells_positions_apart():
    model = build_variant(positions="alibi")
    assert model.position_embedding is None
    repeated, other = torch.tensor([[5, 9, 7, 7]]), torch.tensor([[9, 5, 7, 7]])
    assert not torch.allclose(model(repeated)[0, -1], model(other)[0, -1], atol=1e-5)


def test_attention_dropout_acts_while_training_alone():
    model, tokens = build_variant(attention_dropout=0.5), torch.randint(50, (2, 16))
    assert not torch.allclose(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_full_checkpointing_changes_no_gradient(model):
    tokens, labels = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    gradients = []
    for mode in ("none", "full"):
        model.activation_checkpointing = mode
        model.zero_grad()
        model(tokens, labels).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_full_checkpointing_keeps_block_inputs_only():
    def kept_bytes(mode: str) -> int:
        model = build(layers=6)
        model.activation_checkpointing = mode
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            model(torch.randint(50, (4, 16)), torch.randint(50, (4, 16)))
        return sum(kept)

    assert kept_bytes("full") < kept_bytes("none") / 3


def test_shorter_sequences_than_the_position_table(model):
    assert model(torch.randint(50, (1, 1))).shape == (1, 1, 50)


def test_rotation_depends_on_distance_alone():
    """The inner product of rotated q and k is a function of their distance (Su et al. 2021, equation 16)."""
    table = rotary_table(64, 8, 10000.0, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 8)
    at = lambda x, position: rotate(x.expand(1, 64, 1, 8), table)[0, position, 0]  # noqa: E731
    for distance in (0, 1, 17):
        products = [at(q, start + distance) @ at(k, start) for start in (0, 5, 40)]
        torch.testing.assert_close(products[0], products[1])
        torch.testing.assert_close(products[0], products[2])
    torch.testing.assert_close(at(q, 3).norm(), q.norm())
    assert abs(float(at(q, 20) @ at(k, 3) - at(q, 3) @ at(k, 3))) > 1e-4


def test_rotary_angles_are_exact_in_bf16_models():
    model = build(positions="rope").bfloat16()
    captured = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: captured.append(inputs[1]))
    model(torch.randint(50, (1, 16)))
    assert captured[0].dtype == torch.float32


def test_tied_embeddings_are_one_parameter():
    tied, untied = build(), build(tied_embeddings=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 32


def test_gpt2_small_has_its_published_parameter_count():
    """124,439,808 with GPT-2's own vocabulary (Radford et al. 2019; counted by its released weights)."""
    assert count_parameters(GPTConfig(vocab_size=50257).resolved())["total"] == 124_439_808


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flops_formulas_agree_with_counted_flops(dropout):
    """Model FLOPs without checkpointing, hardware FLOPs with it, against every matrix product that PyTorch runs."""
    config = GPTConfig(layers=4, hidden_size=128, heads=4, vocab_size=512, sequence_length=64, dropout=dropout).resolved()
    parameters = count_parameters(config)
    shape = {"matmul_parameters": parameters["matmul"], "layers": 4, "attention_width": 128, "sequence_length": 64}

    def counted(mode: str) -> float:
        model = GPT(config, attention_backend="eager", activation_checkpointing=mode)
        with FlopCounterMode(display=False) as counter:
            model(torch.randint(512, (2, 64)), torch.randint(512, (2, 64))).backward()
        return counter.get_total_flops() / 128

    assert counted("none") == pytest.approx(model_flops_per_token(**shape), rel=0.01)
    expected = hardware_flops_per_token(**shape, recomputed_parameters=parameters["recomputed"], activation_checkpointing="full")
    assert counted("full") == pytest.approx(expected, rel=0.01)


def test_counts_of_parameters():
    counts = count_parameters(GPTConfig(**SMALL).resolved())
    assert counts["total"] - counts["matmul"] == 16 * 32
    untied = count_parameters(GPTConfig(**{**SMALL, **DIALECTS["llama"]}).resolved())
    assert untied["total"] - untied["matmul"] == 50 * 32
    assert untied["recomputed"] == 2 * (32 * (4 + 2 * 2) * 8 + 32 * 32 + 32 * 256 + 2 * 32)


def test_initial_loss_is_that_of_a_uniform_guess(model):
    tokens, labels = torch.randint(50, (4, 16)), torch.randint(50, (4, 16))
    assert float(model(tokens, labels).detach()) / 64 == pytest.approx(math.log(50), abs=0.1)
