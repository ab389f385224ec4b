"""GPT as GPT-2, Llama and Mistral: the same logits, by transformers and back."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model.config import AttentionConfig, GPTConfig
from model.conversion import export_config, export_state, import_config, import_state
from model.gpt import GPT

SMALL = {"layers": 2, "hidden_size": 48, "heads": 4, "vocab_size": 80, "sequence_length": 32, "ffn_size": 72}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "rope_theta": 3000.0, "norm_eps": 1e-4}
DIALECTS = {
    "gpt2": ({}, {}), "gpt2 untied": ({"tied_embeddings": False}, {}),
    "llama": (LLAMA, {}), "llama grouped, untied, biased": (LLAMA | {"kv_heads": 2, "head_dim": 16, "tied_embeddings": False, "bias": True}, {}),
    "mistral": (LLAMA | {"kv_heads": 2}, {"window": 9}),
}  # fmt: skip
END_OF_TEXT, TOKENS = 70, 71  # ids of the tokenizer; the model's other rows pad


def perturbed(config: GPTConfig, attention: AttentionConfig) -> GPT:
    """Every weight drawn: as they are initialised, norms and biases would hide mistakes."""
    model, generator = GPT(config, attention).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.normal(float(parameter.ndim == 1), 0.3, parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_logits_are_equal_in_transformers_and_after_the_way_back(dialect):
    architecture, seen = DIALECTS[dialect]
    config, attention = GPTConfig(**SMALL, **architecture).resolved(), AttentionConfig(backend="eager", **seen)
    ours = perturbed(config, attention)
    tokens = torch.randint(TOKENS, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = ours(tokens)[..., :TOKENS]

    described = export_config(config, attention, vocab_size=TOKENS, end_of_text=END_OF_TEXT)
    state = export_state(dict(ours.named_parameters()), config, vocab_size=TOKENS)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described), attn_implementation="eager").eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tied_embeddings else set())
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))

    fields, window = import_config(theirs.config.to_dict())
    back = GPTConfig(**fields)
    assert back == config.model_copy(update={"vocab_size": TOKENS}) and window == attention.window
    again = GPT(back, attention).eval()
    again.load_state_dict(import_state(theirs.state_dict(), back), strict=not config.tied_embeddings)
    assert torch.equal(again(tokens), expected)


def test_gpt2s_own_files_leave_the_first_part_of_the_names_out_and_hold_masks():
    config = GPTConfig(**SMALL).resolved()
    state = export_state(dict(GPT(config).named_parameters()), config, vocab_size=80)
    published = {name.removeprefix("transformer."): weight for name, weight in state.items()} | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    assert import_state(published, config).keys() == import_state(state, config).keys()


def test_weights_that_are_missing_or_unknown_are_refused():
    config = GPTConfig(**SMALL).resolved()
    state = export_state(dict(GPT(config).named_parameters()), config, vocab_size=80)
    state["transformer.h.2.ln_1.weight"] = state.pop("transformer.h.1.ln_1.weight")
    with pytest.raises(ValueError, match=r"missing: transformer.h.1.ln_1.weight; unexpected: transformer.h.2.ln_1.weight"):
        import_state(state, config)


@pytest.mark.parametrize("architecture, seen", [
    ({"positions": "alibi"}, {}), ({"bias": False}, {}), ({"kv_heads": 2}, {}), ({}, {"window": 4}), (LLAMA | {"norm": "layernorm"}, {}),
    (LLAMA | {"bias": True}, {"window": 4})])  # fmt: skip
def test_an_architecture_without_counterpart_is_refused(architecture, seen):
    with pytest.raises(ValueError, match="no model of transformers is this one"):
        export_config(GPTConfig(**SMALL | architecture).resolved(), AttentionConfig(**seen), vocab_size=80, end_of_text=0)


@pytest.mark.parametrize("described, told", [
    ({"model_type": "bert"}, "bert is none of gpt2, llama, mistral"),
    ({"model_type": "gpt2", "activation_function": "relu"}, "relu is none of gelu_new"),
    ({"model_type": "llama", "vocab_size": 8, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type llama3"),
    ({"model_type": "llama", "vocab_size": 8, "attention_bias": True}, "attention_bias and mlp_bias differ")])  # fmt: skip
def test_a_model_that_ours_is_not_is_refused(described, told):
    with pytest.raises(ValueError, match=told):
        import_config(described)


def test_what_a_config_json_leaves_out_is_transformers_default():
    fields, _ = import_config({"model_type": "gpt2"})
    assert GPTConfig(**fields) == GPTConfig(vocab_size=50257).resolved()
