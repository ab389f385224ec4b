"""attn_implementation="triton_flash" against transformers' own eager attention: what is seen, forward and backward, with and without caches."""

import json
import logging
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.generic import is_flash_attention_requested

import model.huggingface
from model.checkpointing import Checkpointing
from model.config import ModelFault
from model.huggingface import HuggingFaceModel, Visible, checkpoint_layers, count_parameters, count_recomputed, positions_in_documents, register
from model.offload import Offload
from tests.model.huggingface_models import CONFIGS, LENGTH, batches, build, logits_and_gradients

register()
register("tiled_by_name", backend="tiled")  # the kernels' specification, with all that they can do, on a CPU
CASES = list(batches())
HOLES = "attention_mask hides tokens between others"


@pytest.fixture
def said(caplog):
    """What is said from here on, as if nothing had been said before."""
    model.huggingface._say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="model.huggingface")
    return caplog


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_sees_in_every_batch_what_it_sees_with_eager_attention(name, case):
    batch = batches()[case]
    expected = logits_and_gradients(build(name, "eager"), batch)
    for attention in ("triton_flash", "tiled_by_name"):
        tested = build(name, attention)
        if case == "holes" and attention == "tiled_by_name":
            with pytest.raises(ValueError, match=f"attention.backend=tiled was asked for by name .* {HOLES}"):
                logits_and_gradients(tested, batch)
            continue
        for found, wanted in zip(logits_and_gradients(tested, batch), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


def test_the_batches_tell_masks_apart():
    """A mask that is left out changes the logits by far more than the tests allow."""
    for name in CONFIGS:
        eager = build(name, "eager")
        for case in ("left", "packed"):
            batch = batches()[case]
            real = batch.get("attention_mask", torch.ones(2, LENGTH)).bool()
            blind = {"input_ids": batch["input_ids"]} | ({"position_ids": batch["position_ids"], "attention_mask": real.long()} if case == "packed" else {})
            assert (eager(**batch, use_cache=False).logits - eager(**blind, use_cache=False).logits)[real].abs().max() > 1e-2, (name, case)


def test_the_kernel_itself_serves_every_model():
    done = subprocess.run([sys.executable, "-m", "tests.model.huggingface_interpreted"], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 2 * len(CONFIGS)
    for case, (of_logits, of_gradients) in errors.items():
        assert of_logits < 1e-5 and of_gradients < 1e-5, case


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_models_train_in_bf16_on_a_gpu_as_close_to_fp32_as_eager_attention_does(name):
    for case, batch in batches("cuda").items():
        expected = logits_and_gradients(build(name, "eager", "cuda"), batch)
        eager, ours = (logits_and_gradients(build(name, attention, "cuda").bfloat16(), batch) for attention in ("eager", "triton_flash"))
        for found, same_dtype, wanted in zip(ours, eager, expected, strict=True):
            assert (found - wanted).norm() <= 2 * (same_dtype - wanted).norm() + 1e-3 * wanted.norm(), (name, case)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_draws_eagers_tokens(name):
    tokens, padded = batches()["plain"]["input_ids"], batches()["left"]["attention_mask"]
    for options in ({}, {"attention_mask": padded}, {"cache_implementation": "static"}):
        drawn = [build(name, attention).eval().generate(tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, **options)
                 for attention in ("eager", "triton_flash")]  # fmt: skip
        assert torch.equal(*drawn), options


def test_a_cache_without_padding_needs_no_mask():
    """Prompt, then token by token, then several at once."""
    tokens = batches()["plain"]["input_ids"]
    for name in CONFIGS:
        ours, eager, cache = build(name, "tiled_by_name").eval(), build(name, "eager").eval(), None
        with torch.no_grad():
            expected, found = eager(tokens).logits, []
            for part in tokens.split([13, 1, 1, 9], dim=1):
                out = ours(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_sdpa_serves_where_the_kernel_cannot_and_it_is_said_once(said):
    llama = build("llama", "triton_flash")
    for _ in range(2):
        llama(**batches()["plain"])
        llama(**batches()["holes"])
    lines = [record.message for record in said.records]
    assert len(lines) == 2 and all("SDPA computes attention, because" in line for line in lines)
    assert "runs on cuda, not on cpu" in lines[0] and HOLES in lines[1]


def test_a_mask_of_the_users_own_is_heeded(said):
    tokens = batches()["plain"]["input_ids"]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7)
    mask = (mask | torch.eye(LENGTH, dtype=torch.bool))[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for name in ("llama", "gemma2"):
        found, expected = (build(name, attention)(tokens, attention_mask={"full_attention": additive, "sliding_attention": additive} if name == "gemma2" else additive)
                           for attention in ("triton_flash", "eager"))  # fmt: skip
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert any("the model or its user made the mask" in record.message for record in said.records)


def test_autocast_is_followed():
    """Under it a model's rotary embedding leaves queries and keys in float32, and the values in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (logits_and_gradients(build("llama", attention), batches()["left"]) for attention in ("tiled_by_name", "sdpa"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05 * theirs.abs().max().item())


def test_what_would_be_wrong_is_refused():
    llama = build("llama", "triton_flash")
    with pytest.raises(ValueError, match="takes packed sequences by their position_ids"):
        llama(batches()["plain"]["input_ids"][:1], cu_seq_lens_q=torch.tensor([0, 10, LENGTH], dtype=torch.int32))
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match="has no paged KV cache"):
        model.huggingface._attention("auto", llama, q, q, q, None, cache=object())
    with pytest.raises(ValueError, match="not where the model adds a bias to the scores"):
        model.huggingface._attention("auto", llama, q, q, q, torch.ones(1, 1, 4, 4, dtype=torch.bool), softcap=1.0, position_bias=q[..., :4])


def test_transformers_does_not_take_it_for_the_library_flash_attn():
    assert not is_flash_attention_requested(requested_attention_implementation="triton_flash")
    assert is_flash_attention_requested(requested_attention_implementation="flash_attention_2")
    assert not is_flash_attention_requested(build("llama", "triton_flash").config)


def test_a_mask_function_that_is_not_known_makes_a_mask():
    rules = model.huggingface._rules_of
    assert rules(lambda batch, head, query, key: key <= query) is None
    made = model.huggingface._visible(1, 4, 4, mask_function=lambda batch, head, query, key: key == query)
    assert isinstance(made, Visible) and made.rules is None
    assert torch.equal(made.mask[0, 0], torch.eye(4, dtype=torch.bool))


def test_a_model_of_transformers_is_called_as_ours_is():
    tokens = batches()["plain"]["input_ids"]
    wrapped = HuggingFaceModel(build("gpt2", "eager"))
    labels = tokens.roll(-1, 1).masked_fill(tokens % 5 == 0, -100)
    logits = wrapped(tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(wrapped(tokens, labels), expected)
    assert "model.transformer.h.0.attn.c_attn.weight" in wrapped.matrices and not any(name.endswith(".bias") or "ln_" in name for name in wrapped.matrices)
    counted = count_parameters(wrapped)
    assert counted["total"] - counted["matmul"] == 64 * 32  # learned positions; the tied embedding multiplies
    assert [each.__name__ for each in wrapped.block_types] == ["GPT2Block"]


def test_of_a_mixture_the_experts_that_compute_a_token_are_counted():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    config = AutoConfig.for_model("mixtral", **sizes, num_local_experts=4, num_experts_per_tok=1)
    with torch.device("meta"):
        wrapped = HuggingFaceModel(AutoModelForCausalLM.from_config(config))
    counted, again = count_parameters(wrapped), count_recomputed(wrapped, Checkpointing("full"))
    idle, embedding = 2 * 3 * 3 * 32 * 48, 64 * 32  # layers, experts, matrices of each
    assert counted == {"total": sum(p.numel() for p in wrapped.parameters()), "matmul": counted["total"] - embedding - idle}
    assert again == {"parameters": sum(p.numel() for p in wrapped.model.model.layers.parameters()) - idle, "layers": 2}


def test_every_mode_of_activation_checkpointing_gives_the_gradients_of_none():
    """And what is computed again is counted."""
    tokens, modes = batches()["plain"]["input_ids"], {
        "none": Checkpointing(), "full": Checkpointing("full"), "every_n": Checkpointing("every_n", every=2), "selective": Checkpointing("selective", backend="auto"),
        "matmuls": Checkpointing("selective", keep_matmuls=True, backend="sdpa"), "offload": Checkpointing("full", offload=Offload()),
        "deepspeed": Checkpointing("deepspeed", function=partial(checkpoint, use_reentrant=True)),
    }  # fmt: skip
    gradients, counted, ran = {}, {}, {}
    for name, checkpointing in modes.items():
        wrapped, forwards = HuggingFaceModel(build("qwen3", "sdpa").train()), []
        checkpoint_layers(wrapped.model, checkpointing)
        for layer in wrapped.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        wrapped(tokens, labels=tokens).backward()
        gradients[name], ran[name] = torch.cat([p.grad.flatten() for p in wrapped.parameters()]), len(forwards)
        counted[name] = count_recomputed(wrapped, checkpointing)
    layers = len(wrapped.model.model.layers)
    for name in modes:
        torch.testing.assert_close(gradients[name], gradients["none"], msg=lambda text, name=name: f"{name}: {text}")
    assert ran == {name: 2 * layers for name in modes} | {"none": layers, "every_n": layers + -(-layers // 2)}
    blocks = sum(p.numel() for p in wrapped.model.model.layers.parameters())
    assert counted["none"] == {"parameters": 0, "layers": 0} and counted["full"] == {"parameters": blocks, "layers": layers} == counted["deepspeed"]
    assert counted["selective"] == {"parameters": blocks, "layers": 0} and counted["every_n"]["layers"] == -(-layers // 2)
    assert counted["matmuls"] == {"parameters": sum(p.numel() for p in wrapped.model.model.layers.parameters() if p.ndim == 1), "layers": 0}


def test_selective_checkpointing_that_would_compute_attention_again_is_refused():
    wrapped = HuggingFaceModel(build("qwen3", "eager").train())
    checkpoint_layers(wrapped.model, Checkpointing("selective", backend="auto"))
    with pytest.raises(ModelFault, match="selective: attention.backend=auto ran none of"):
        wrapped(batches()["plain"]["input_ids"])


def test_documents_do_not_see_each_other_and_count_their_own_positions():
    tokens = torch.tensor([[5, 6, 0, 7, 8, 9, 0, 3]])
    assert positions_in_documents(tokens, 0).tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    wrapped = HuggingFaceModel(build("gpt2", "tiled_by_name"), end_of_text=0)
    alone = HuggingFaceModel(build("gpt2", "eager"))
    torch.testing.assert_close(wrapped(tokens)[:, 2:6], alone(tokens[:, 2:6]), rtol=1e-4, atol=1e-4)
