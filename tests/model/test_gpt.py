import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from model import gpt
from model.checkpointing import Checkpointing
from model.config import AttentionConfig, GPTConfig
from model.gpt import GPT, IGNORED_LABEL, count_parameters, count_recomputed, rotary_table, rotate
from model.offload import Offload
from model.tiling import in_tiles
from tests.model.test_loss import Largest
from training.flops import hardware_flops_per_token, model_flops_per_token

END_OF_TEXT = 0
SMALL = {"layers": 2, "hidden_size": 32, "heads": 4, "vocab_size": 50, "sequence_length": 16}
DIALECTS = {
    "gpt2": {},
    "llama": {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False, "kv_heads": 2},
    "mqa": {"kv_heads": 1, "head_dim": 16, "ffn_size": 48},
}


def build(attention=None, mlp_tile=None, **fields) -> GPT:
    torch.manual_seed(0)
    attention = AttentionConfig(**{"backend": "eager", **(attention or {})})
    return GPT(GPTConfig(**{**SMALL, **fields}).resolved(), attention, end_of_text=END_OF_TEXT, mlp_tile=mlp_tile)


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
    "window": {"attention": {"window": 4}},
    "documents": {"attention": {"document_mask": True}},
    "alibi": {"positions": "alibi"},
    "all": {"positions": "alibi", "kv_heads": 2, "attention": {"window": 4, "document_mask": True}},
}


@pytest.mark.parametrize("backend", ["eager", "tiled"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_what_attention_sees_is_what_was_asked_for(variant, backend):
    """The last layer's output, from its own queries, keys and values, by the definitions, one query at a time."""
    model, tokens = build(**variant), torch.randint(1, 50, (2, 16))
    tokens[0, [0, 5]] = tokens[1, [7, 8, 15]] = END_OF_TEXT
    layer, seen = model.blocks[-1].attention, {}
    layer.backend = backend
    layer.qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output))
    layer.projection.register_forward_pre_hook(lambda module, inputs: seen.update(out=inputs[0]))
    model(tokens)

    heads, kv_heads, asked = 4, variant.get("kv_heads", 4), variant.get("attention", {})
    q, k, v = seen["qkv"].view(2, 16, heads + 2 * kv_heads, 8).split([heads, kv_heads, kv_heads], dim=2)
    for row, query, head in itertools.product(range(2), range(16), range(heads)):
        keys = [key for key in range(query + 1)
                if query - key < asked.get("window", 16)
                and not ("document_mask" in asked and END_OF_TEXT in tokens[row, key + 1 : query + 1])]  # fmt: skip
        scores = torch.stack([q[row, query, head] @ k[row, key, head * kv_heads // heads] / 8**0.5 for key in keys])
        if variant.get("positions") == "alibi":
            scores = scores - (1 / 4, 1 / 16, 1 / 64, 1 / 256)[head] * torch.tensor([float(query - key) for key in keys])
        expected = scores.softmax(0) @ v[row, keys, head * kv_heads // heads]
        torch.testing.assert_close(seen["out"].view(2, 16, heads, 8)[row, query, head], expected)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_packed_documents_are_as_if_alone(positions):
    model = build(positions=positions, attention={"document_mask": True})
    tokens = torch.randint(1, 50, (2, 16))
    tokens[0, 6] = tokens[1, 11] = END_OF_TEXT
    packed = model(tokens)
    for row, start in ((0, 6), (1, 11)):
        torch.testing.assert_close(packed[row, :start], model(tokens[row : row + 1, :start])[0])
        torch.testing.assert_close(packed[row, start:], model(tokens[row : row + 1, start:])[0])
    model.end_of_text = None
    assert not torch.allclose(model(tokens)[0, 6:], packed[0, 6:])


def test_a_document_mask_needs_to_know_where_documents_end():
    with pytest.raises(ValueError, match="attention.document_mask.*end_of_text"):
        GPT(GPTConfig(**SMALL).resolved(), AttentionConfig(document_mask=True))


def test_alibi_has_no_position_table():
    assert build(positions="alibi").position_embedding is None


def test_attention_dropout_acts_while_training_alone_and_alike_in_every_backend():
    model, tokens = build(attention={"dropout": 0.5}), torch.randint(50, (2, 16))
    torch.manual_seed(3)
    dropped = model(tokens)
    assert not torch.allclose(model(tokens), dropped)
    for block in model.blocks:
        block.attention.backend = "tiled"
    torch.manual_seed(3)
    torch.testing.assert_close(model(tokens), dropped)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_attention_hands_on_that_its_gradients_must_be_the_same_bits(positions):
    with pytest.raises(ValueError, match="the same bits in every backward pass"):
        build(attention={"backend": "sdpa", "deterministic": True}, positions=positions)(torch.randint(50, (2, 16)))


MODES = {
    "full": Checkpointing("full"), "offloaded": Checkpointing("full", offload=Offload()),
    "every_n": Checkpointing("every_n", every=2), "selective": Checkpointing("selective", backend="sdpa"),
    "matmuls": Checkpointing("selective", backend="sdpa", keep_matmuls=True),
    # DeepSpeed's own, likewise reentrant, needs processes: tests/training/test_zero.py
    "deepspeed": Checkpointing("deepspeed", function=lambda block, x: checkpoint(block, x, use_reentrant=True)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [*DIALECTS.values(), *VARIANTS.values(), {"dropout": 0.2, "attention": {"dropout": 0.3}}],
                         ids=[*DIALECTS, *VARIANTS, "dropout"])  # fmt: skip
def test_checkpointing_changes_no_gradient(options, mode):
    if MODES[mode].mode == "selective":  # sdpa has none of the features
        options = {key: value for key, value in options.items() if key != "attention" and value != "alibi"}
    backend = "sdpa" if MODES[mode].mode == "selective" else "tiled"
    model = build(**{**options, "attention": {**options.get("attention", {}), "backend": backend}})
    tokens, labels = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    gradients = []
    for checkpointing in (Checkpointing(), MODES[mode]):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(3)
        model(tokens, labels).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


TILED = [mode for mode in ("none", *MODES) if mode != "matmuls"]  # which is refused


@pytest.mark.parametrize("mode", TILED)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_tiles_change_neither_loss_nor_gradients(dialect, mode):
    """And hooks see one gradient of each parameter; the last tile is shorter, and 32 tokens are no tiles of 32."""
    tokens, labels = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    seen, found = [], []
    for tile in (None, 5, 32):
        model = build(**DIALECTS[dialect], dropout=0.1, attention={"backend": "sdpa"}, mlp_tile=tile)
        model.checkpointing = MODES.get(mode, Checkpointing())
        counted = [0]
        for p in model.blocks.parameters():
            p.register_post_accumulate_grad_hook(lambda _, counted=counted: counted.__setitem__(0, counted[0] + 1))
        torch.manual_seed(3)
        loss = model(tokens, labels)
        loss.backward()
        seen.append(counted[0])
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert seen == [sum(1 for _ in model.blocks.parameters())] * 3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_tiles_keep_their_input_alone_and_never_the_inner_activations():
    def largest_and_kept(tile: int | None) -> tuple[int, int]:
        model, kept = build(layers=3, ffn_size=512, attention={"backend": "sdpa"}, mlp_tile=tile), []
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
                loss = model(torch.randint(50, (4, 16)), torch.randint(50, (4, 16)))
            loss.backward()
        return largest.elements, sum(kept)

    (largest, kept), (largest_in_tiles, kept_in_tiles) = largest_and_kept(None), largest_and_kept(8)
    assert largest == 64 * 512 and largest_in_tiles == 512 * 32, "a weight is what is left"
    assert kept - kept_in_tiles >= 3 * (2 * 64 * 512)


def test_tiles_of_a_transposed_input():
    x, weight, gradient = torch.randn(16, 2, 8).transpose(0, 1), torch.randn(8, 8, requires_grad=True), torch.randn(2, 16, 8)
    found = []
    for run in (lambda x: x @ weight, lambda x: in_tiles(lambda tile: tile @ weight, [weight], x, 5)):
        leaf = x.detach().requires_grad_()
        out = run(leaf)
        found.append((out, *torch.autograd.grad(out, (leaf, weight), gradient)))
    torch.testing.assert_close(found[1], found[0])


def test_rotation_of_a_part_at_a_time(monkeypatch):
    table, x = rotary_table(torch.arange(13), 8, 10000.0), torch.randn(2, 13, 3, 8)
    whole = rotate(x, table)
    monkeypatch.setattr(gpt, "ROTATED_AT_ONCE", 2 * 3 * 8 * 4)
    assert torch.equal(rotate(x, table), whole)


def test_angles_of_far_positions_are_exact():
    """Those of float32 are up to 0.06 off there. Frequencies 1 and 2**-8, which float32 has."""
    table = rotary_table(torch.tensor([999_983, 1_000_000]), 4, 2.0**16)
    for row, position in enumerate((999_983, 1_000_000)):
        assert table[0, row, 0].tolist() == pytest.approx([math.cos(position), math.cos(position / 256)], abs=1e-6)
        assert table[1, row, 0].tolist() == pytest.approx([math.sin(position), math.sin(position / 256)], abs=1e-6)


def test_checkpointing_keeps_less_the_more_it_computes_again():
    def kept_bytes(checkpointing: Checkpointing) -> int:
        model = build(layers=6, attention={"backend": "sdpa"})
        model.checkpointing = checkpointing
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            model(torch.randint(50, (4, 16)), torch.randint(50, (4, 16)))
        return sum(kept)

    none, full, every_n = (kept_bytes(mode) for mode in (Checkpointing(), MODES["full"], MODES["every_n"]))
    assert full < none / 3
    assert every_n == (none + full) / 2


def test_selective_checkpointing_refuses_what_it_would_not_keep():
    model = build(attention={"backend": "eager"})
    model.checkpointing = MODES["selective"]
    with pytest.raises(ValueError, match="attention.backend=sdpa ran none of aten::_scaled.* use attention.backend=triton"):
        model(torch.randint(50, (1, 16)), torch.randint(50, (1, 16)))


def test_shorter_sequences_than_the_position_table(model):
    assert model(torch.randint(50, (1, 1))).shape == (1, 1, 50)


def test_rotation_depends_on_distance_alone():
    """The inner product of rotated q and k is a function of their distance (Su et al. 2021, equation 16)."""
    table = rotary_table(torch.arange(64), 8, 10000.0)
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
    model.blocks[0].register_forward_pre_hook(lambda module, inputs, named: captured.append(named["rotary"]), with_kwargs=True)
    model(torch.randint(50, (1, 16)))
    assert captured[0].dtype == torch.float32


def test_tied_embeddings_are_one_parameter():
    tied, untied = build(), build(tied_embeddings=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 32


def test_gpt2_small_has_its_published_parameter_count():
    """124,439,808 with GPT-2's own vocabulary (Radford et al. 2019; counted by its released weights)."""
    assert count_parameters(GPTConfig(vocab_size=50257).resolved())["total"] == 124_439_808


@pytest.mark.parametrize("mode, tile", [*((mode, None) for mode in MODES), *((mode, 32) for mode in TILED)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flops_formulas_agree_with_counted_flops(dropout, mode, tile):
    """Model FLOPs without checkpointing, hardware FLOPs with it and with tiles, against every matrix product that PyTorch runs."""
    config = GPTConfig(layers=3, hidden_size=128, heads=4, vocab_size=512, sequence_length=64, dropout=dropout, bias=False).resolved()
    shape = {"matmul_parameters": count_parameters(config)["matmul"], "layers": 3, "attention_width": 128, "sequence_length": 64}
    chosen = MODES.get(mode, Checkpointing())
    selective = chosen.mode == "selective"

    def counted(checkpointing: Checkpointing, tile: int | None = None) -> float:
        model = GPT(config, AttentionConfig(backend="sdpa" if selective else "eager"), checkpointing=checkpointing, mlp_tile=tile)
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            model(torch.randint(512, (2, 64)), torch.randint(512, (2, 64))).backward()
        return counter.get_total_flops() / 128

    assert counted(Checkpointing()) == pytest.approx(model_flops_per_token(**shape), rel=0.005)
    recomputed = count_recomputed(config, chosen, tiled=tile is not None)
    expected = hardware_flops_per_token(**shape, recomputed_parameters=recomputed["parameters"], recomputed_layers=recomputed["layers"])
    assert counted(chosen, tile) == pytest.approx(expected, rel=0.005)


def _forward_flops(q, k, v, *_, **__):
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width


_aten = torch.ops.aten
_CPU_ATTENTION = {  # as the model's formula has it: 4 forward, 8 backward, without what the kernel computes again
    _aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dout, *arguments, **named: 2 * _forward_flops(*arguments),
}


def test_counts_of_parameters():
    counts = count_parameters(GPTConfig(**SMALL).resolved())
    assert counts["total"] - counts["matmul"] == 16 * 32
    untied = count_parameters(GPTConfig(**{**SMALL, **DIALECTS["llama"]}).resolved())
    assert untied["total"] - untied["matmul"] == 50 * 32
    recomputed = count_recomputed(GPTConfig(**{**SMALL, **DIALECTS["llama"]}).resolved(), Checkpointing("full"))
    assert recomputed == {"parameters": 2 * (32 * (4 + 2 * 2) * 8 + 32 * 32 + 32 * 256 + 2 * 32), "layers": 2}


def test_initial_loss_is_that_of_a_uniform_guess(model):
    tokens, labels = torch.randint(50, (4, 16)), torch.randint(50, (4, 16))
    assert float(model(tokens, labels).detach()) / 64 == pytest.approx(math.log(50), abs=0.1)
