"""Our attention in Megatron-Core against Megatron's own, in float32; what only a GPU would run is stood in for (tests.model.cuda_stand_in)."""

import runpy
import sys

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

import model.megatron
from model.megatron import FlashAttention, with_our_attention
from tests.model.cuda_stand_in import cuda_on_cpu

LENGTH, BATCH, HEADS, HEAD_DIM = 24, 2, 4, 16
CAUSAL = AttnMaskType.causal


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with cuda_on_cpu():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def configuration(groups=HEADS, *, kind=TransformerConfig, **keys):
    sizes = {"num_layers": 2, "hidden_size": HEADS * HEAD_DIM, "num_attention_heads": HEADS, "num_query_groups": groups}
    return kind(**sizes | {"attention_dropout": 0.0, "hidden_dropout": 0.0, "use_cpu_initialization": True} | keys)


def ours(config, *, mask=CAUSAL, kind="self", backend="tiled", layer=2, **keys):
    return FlashAttention(config=config, layer_number=layer, attn_mask_type=mask, attention_type=kind, backend=backend, **keys)


def projected(groups=HEADS, length=LENGTH, batch=BATCH):
    """Query, key and value as Megatron makes them: slices of one projection [seq, batch, groups, heads / groups + 2, head_dim]."""
    torch.manual_seed(0)
    qkv = torch.randn(length, batch, groups, HEADS // groups + 2, HEAD_DIM, requires_grad=True)
    q, k, v = qkv.split([HEADS // groups, 1, 1], dim=3)
    return qkv, q.reshape(length, batch, HEADS, HEAD_DIM), k.squeeze(3), v.squeeze(3)


def outputs_and_gradients(core, groups=HEADS):
    qkv, *heads = projected(groups)
    out = core(*heads, None)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out, qkv.grad


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("keys", "arguments"), [
    ({}, {}),
    ({"window_size": (5, 0)}, {}),
    ({"window_size": (5, 0), "window_attn_skip_freq": 2}, {}),
    ({}, {"softmax_scale": 0.3}),
    ({"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}, {}),
    ({"softmax_type": "off-by-one"}, {}),
    ({"softmax_type": "learnable", "init_method": torch.nn.init.normal_}, {}),
])  # fmt: skip
def test_it_computes_what_megatrons_own_attention_computes(groups, keys, arguments):
    config = configuration(groups, **keys)
    own = DotProductAttention(config, 2, CAUSAL, "self", **arguments)
    tested = ours(config, **arguments)
    tested.load_state_dict(own.state_dict())
    for found, expected in zip(outputs_and_gradients(tested, groups), outputs_and_gradients(own, groups), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    for found, expected in zip(tested.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_the_projection_is_read_in_place(monkeypatch):
    seen = []
    monkeypatch.setattr(model.megatron, "attention", lambda *tensors, **options: seen.extend(tensors) or tensors[0])
    _, q, k, v = projected()
    assert ours(configuration())(q, k, v, None).shape == (LENGTH, BATCH, HEADS * HEAD_DIM)
    for given, taken in zip((q, k, v), seen, strict=True):
        assert taken.shape == (BATCH, LENGTH, HEADS, HEAD_DIM) and taken.data_ptr() == given.data_ptr()
        assert taken.stride() == tuple(given.stride(dimension) for dimension in (1, 0, 2, 3))


def test_without_a_mask_every_query_sees_all():
    config = configuration()
    own, tested = DotProductAttention(config, 1, AttnMaskType.no_mask, "self"), ours(config, mask=AttnMaskType.no_mask)
    for found, expected in zip(outputs_and_gradients(tested), outputs_and_gradients(own), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    _, q, k, v = projected()
    last = ours(config)(q[-1:], k, v, None, attn_mask_type=AttnMaskType.no_mask)  # as in decoding
    torch.testing.assert_close(last, own(q, k, v, None)[-1:], rtol=1e-5, atol=5e-6)


def test_padding_behind_a_packed_sequence_is_not_seen():
    core = ours(configuration(2))
    _, q, k, v = (x.squeeze(1) for x in projected(2, batch=1))
    begins, padded = (torch.tensor(each, dtype=torch.int32) for each in ([0, 5, 6, 20], [0, 8, 10, LENGTH]))
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=begins, cu_seqlens_kv=begins, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded)
    found = core(q, k, v, None, packed_seq_params=packed)
    for first, length in zip(padded, begins.diff(), strict=False):
        part = slice(first, first + length)
        torch.testing.assert_close(found[part], core(*(x[part].unsqueeze(1) for x in (q, k, v)), None).squeeze(1), rtol=1e-5, atol=5e-6)
    with pytest.raises(ValueError, match="would see the padding behind it .*; pack without padding"):
        ours(configuration(2), mask=AttnMaskType.no_mask)(q, k, v, None, packed_seq_params=packed)


@pytest.mark.parametrize("keys", [{}, {"window_size": (3, 0)}])
def test_packed_sequences_do_not_see_each_other(keys):
    core = ours(configuration(2, **keys))
    _, q, k, v = (x.squeeze(1) for x in projected(2, batch=1))
    begins = torch.tensor([0, 5, 6, LENGTH], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=begins, cu_seqlens_kv=begins.clone(), max_seqlen_q=18, max_seqlen_kv=18)
    alone = [core(*(x[first:last].unsqueeze(1) for x in (q, k, v)), None).squeeze(1) for first, last in zip(begins, begins[1:], strict=False)]
    torch.testing.assert_close(core(q, k, v, None, packed_seq_params=packed), torch.cat(alone), rtol=1e-5, atol=5e-6)
    other = PackedSeqParams(qkv_format="thd", cu_seqlens_q=begins, cu_seqlens_kv=begins + begins % 5)
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_kv differ"):
        core(q, k, v, None, packed_seq_params=other)
    with pytest.raises(ValueError, match="qkv_format=sbhd is not known; use thd"):
        core(q, k, v, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))


def test_dropout_draws_from_the_generator_of_this_tensor_parallel_rank():
    tracker, (_, q, k, v) = tensor_parallel.get_cuda_rng_tracker(), projected()
    for sequence_parallel in (False, True):
        core = ours(configuration(attention_dropout=0.5))
        core.config.sequence_parallel = sequence_parallel
        before, outside = tracker.get_states(), torch.get_rng_state()
        first = core(q, k, v, None)
        moved = not torch.equal(before["model-parallel-rng"], tracker.get_states()["model-parallel-rng"])
        assert moved is not sequence_parallel  # then the whole layer runs in it already
        assert torch.equal(outside, torch.get_rng_state()) is not sequence_parallel
        assert not torch.equal(first, core(q, k, v, None))
        tracker.set_states(before)
        torch.set_rng_state(outside)
        assert torch.equal(first, core(q, k, v, None))
        assert torch.equal(core.eval()(q, k, v, None), core(q, k, v, None))
    averaged = torch.stack([core.train()(q, k, v, None) for _ in range(300)]).mean(0)
    torch.testing.assert_close(averaged, core.eval()(q, k, v, None), rtol=0, atol=0.4)


def losses_and_gradients(spec, **keys):
    torch.manual_seed(0)
    gpt = GPTModel(configuration(2, **keys), spec, vocab_size=64, max_sequence_length=LENGTH)
    assert isinstance(gpt.decoder.layers[1].self_attention.core_attention, DotProductAttention)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % 64
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    losses = gpt(tokens, torch.arange(LENGTH).expand(2, -1), None, labels=tokens.roll(-1, 1))
    losses.mean().backward()
    return losses, *(parameter.grad for parameter in gpt.parameters())


def test_a_gpt_of_megatron_has_the_same_loss_and_gradients_with_it():
    own = get_gpt_layer_local_spec()
    for found, expected in zip(losses_and_gradients(with_our_attention(own, "tiled")), losses_and_gradients(own), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", [
    {"recompute_granularity": "selective"},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
])  # fmt: skip
def test_recomputation_draws_the_same_dropout(recompute):
    spec = with_our_attention(get_gpt_layer_local_spec(), "tiled")
    kept, again = losses_and_gradients(spec, attention_dropout=0.3), losses_and_gradients(spec, attention_dropout=0.3, **recompute)
    for found, expected in zip(again, kept, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("keys", "arguments", "told"), [
    ({}, {"kind": "cross"}, "attention_type=cross"),
    ({}, {"mask": AttnMaskType.padding}, "attn_mask_type=padding: .*use causal or no_mask"),
    ({"context_parallel_size": 2}, {}, "context_parallel_size=2: .*use 1"),
    ({"window_size": (5, 2)}, {}, r"window_size=\(5, 2\): .*make the second number 0"),
    ({"log_max_attention_logit": True}, {}, "log_max_attention_logit: .*turn them off"),
    ({"fp8_dot_product_attention": True}, {}, "fp8_dot_product_attention, .*turn them off"),
    ({"kind": MLATransformerConfig}, {"k_channels": 24, "v_channels": 16}, "multi_latent_attention: .*num_query_groups"),
    ({}, {"k_channels": 24}, "k_channels: unknown"),
    ({}, {"backend": "hopper"}, "attention.backend=hopper runs on cuda, not on cpu"),
    ({"attention_dropout": 0.1}, {"backend": "sdpa"}, "attention.backend=sdpa .*dropout"),
    ({}, {"backend": "magic"}, "magic"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused_when_the_model_is_built(keys, arguments, told):
    with pytest.raises(ValueError, match=f"(?s){told}"):
        ours(configuration(**keys), **arguments)


def test_the_dtype_is_that_of_the_flags_which_the_finished_model_is_wrapped_by(monkeypatch):
    mixed, full = configuration(bf16=True), configuration()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(model.megatron, "compute_capability", lambda device: (9, 0))
    assert ours(mixed, backend="sdpa_flash").backend == "sdpa_flash"
    with pytest.raises(ValueError, match="needs float16 or bfloat16, not float32"):
        ours(full, backend="sdpa_flash")


def test_masks_and_biases_are_refused():
    _, q, k, v = projected()
    core = ours(configuration())
    with pytest.raises(ValueError, match="attention_mask: our attention reads none"):
        core(q, k, v, torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_bias: our attention reads none"):
        core(q, k, v, None, attention_bias=torch.zeros(1, 1, LENGTH, LENGTH))
    with pytest.raises(ValueError, match="1 queries and 24 keys: .*causal_bottom_right"):
        core(q[-1:], k, v, None)
    torch.testing.assert_close(core(q[-2:], k, v, None, attn_mask_type=AttnMaskType.causal_bottom_right), core(q, k, v, None)[-2:])


def test_without_megatron_core_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.packed_seq_params", None)
    with pytest.raises(ModuleNotFoundError, match="megatron-core is missing: python -m pip install -r requirements-megatron.txt"):
        runpy.run_path(model.megatron.__file__)
