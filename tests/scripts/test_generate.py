"""scripts/generate.py: what it draws, with every attention, from batches of prompts of different lengths; and what it times."""

import json

import pytest
import torch

from model.config import AttentionConfig, GPTConfig
from model.conversion import export_config, export_state
from model.gpt import GPT
from scripts import generate
from training.tokenizers import load_tokenizer, save_for_transformers

PROMPTS = ["ROMEO:", "What light through yonder", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of bytes whose weights are large enough to prefer some of them."""
    from safetensors.torch import save_file

    config = GPTConfig(layers=2, hidden_size=32, heads=2, kv_heads=1, vocab_size=257, sequence_length=96, positions="rope", norm="rmsnorm",
                       activation="swiglu", bias=False, init_std=0.3).resolved()  # fmt: skip
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("model"), load_tokenizer("bytes")
    (folder / "config.json").write_text(json.dumps(export_config(config, AttentionConfig(), vocab_size=257, end_of_text=256)))
    save_file(export_state(dict(GPT(config).named_parameters()), config, vocab_size=257), folder / "model.safetensors", metadata={"format": "pt"})
    save_for_transformers(tokenizer, folder, model_max_length=96)
    return folder


@pytest.fixture
def drawn(folder, tmp_path):
    def draw(*arguments, prompts=PROMPTS) -> list[dict]:
        out = tmp_path / "out.json"
        assert generate.main([str(folder), "--prompt", *prompts, "--tokens", "12", "--device", "cpu", "--out", str(out), *arguments]) == 0
        return json.loads(out.read_text())["rows"]

    return draw


def test_every_attention_draws_the_same_and_is_timed(drawn, capsys):
    rows = drawn("--compare", "--temperature", "0")
    assert [row["attention"] for row in rows] == ["eager", "sdpa", "triton_flash"]
    assert rows[0]["tokens"] == rows[1]["tokens"] == rows[2]["tokens"] and len(rows[0]["tokens"]) == len(PROMPTS)
    assert all(row["first_token_ms"] > 0 and row["token_ms"] > 0 and row["new_tokens"] == 12 for row in rows)
    printed = capsys.readouterr().out
    assert "ROMEO:" in printed and "ms a token" in printed and "triton_flash against sdpa" in printed


def test_a_prompt_draws_in_a_batch_what_it_draws_alone(drawn):
    together = drawn("--temperature", "0")[0]["tokens"]
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        assert drawn("--temperature", "0", prompts=[prompt])[0]["tokens"] == [tokens]


def test_seed_temperature_top_k_and_top_p(drawn):
    def tokens(*arguments):
        return drawn(*arguments)[0]["tokens"]

    greedy, one, other = tokens("--temperature", "0"), tokens("--seed", "1", "--temperature", "2"), tokens("--seed", "2", "--temperature", "2")
    assert one != other and one != greedy and one == tokens("--seed", "1", "--temperature", "2")
    assert tokens("--top-k", "1") == tokens("--top-p", "1e-6") == tokens("--temperature", "1e-4") == greedy


def test_what_it_draws_are_our_gpts_likeliest(drawn, folder):
    """The whole way: tokenizer, padding, positions, cache."""
    from model.conversion import import_config, import_state
    from training.pretrained import read_config, read_state

    config = GPTConfig(**import_config(read_config(str(folder)))[0])
    ours, tokenizer = GPT(config, AttentionConfig(backend="eager")).eval(), load_tokenizer("bytes")
    ours.load_state_dict(import_state(read_state(str(folder)), config), strict=False)
    for prompt, found in zip(PROMPTS, drawn("--temperature", "0")[0]["tokens"], strict=True):
        tokens = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]
        for _ in range(12):
            tokens.append(int(ours(torch.tensor([tokens]))[0, -1].argmax()))
        expected = tokens[-12:]
        assert found == (expected[: expected.index(256)] if 256 in expected else expected)


def test_a_geometry_needs_no_weights(tmp_path):
    out = tmp_path / "out.json"
    config = tmp_path / "tiny.yaml"
    config.write_text("model: {layers: 1, hidden_size: 32, heads: 2, vocab_size: 64}\n")
    assert generate.main(["--geometry", str(config), "--batch", "2", "--prompt-tokens", "9", "--tokens", "5", "--device", "cpu", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["batch"], row["prompt_tokens"], row["new_tokens"]) == (2, 9, 5)


def test_mistakes_are_told(folder, tmp_path, capsys):
    def told(*arguments):
        assert generate.main([*map(str, arguments), "--device", "cpu"]) == 1
        return capsys.readouterr().err

    assert "generate: nowhere: no such folder" in told("nowhere", "--prompt", "x")
    assert f"generate: {tmp_path} has no config.json; scripts/export_hf.py" in told(tmp_path, "--prompt", "x")
    assert "has 6 tokens, and with --tokens 91 that is more than the model's 96 positions; use --tokens 90" in told(folder, "--prompt", "ROMEO:", "--tokens", "91")
    assert "has 97 tokens, and the model 96 positions; shorten it" in told(folder, "--prompt", "x" * 97)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert f"{tmp_path} has no tokenizer that transformers loads" in told(tmp_path, "--prompt", "x")
    for arguments, message in ((["--prompt", "x"], "give a model"), (["m", "--prompts", str(tmp_path / "none")], "No such file"),
                               (["m", "--prompt", "x", "--top-k", "-1"], "--top-k is 0 (all) or more")):  # fmt: skip
        with pytest.raises(SystemExit):
            generate.main(arguments)
        assert message in capsys.readouterr().err


def test_what_transformers_has_not_for_a_model_is_left_out_of_a_comparison_and_refused_by_name(folder, tmp_path, capsys):
    """Its Gemma 2 has no sdpa."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    Gemma2ForCausalLM(Gemma2Config(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                   intermediate_size=32, eos_token_id=256)).save_pretrained(tmp_path)  # fmt: skip
    save_for_transformers(load_tokenizer("bytes"), tmp_path, model_max_length=96)
    asked = [str(tmp_path), "--prompt", "ROMEO:", "What light", "--tokens", "4", "--temperature", "0", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    assert generate.main([*asked, "--compare"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["eager", "triton_flash"] and rows[0]["tokens"] == rows[1]["tokens"]
    assert "sdpa: left out, transformers has no sdpa for Gemma2ForCausalLM" in capsys.readouterr().out
    assert generate.main([*asked, "--attention", "sdpa"]) == 1
    assert "generate: transformers has no sdpa for Gemma2ForCausalLM" in capsys.readouterr().err
