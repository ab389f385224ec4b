"""scripts/evaluate.py: the texts it reads, and our perplexity of them; beside lm-eval's it is in tests/docs/test_huggingface_page.py."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from scripts import evaluate


def test_texts_are_read_and_what_is_none_is_told(tmp_path, capsys):
    lines = tmp_path / "a.jsonl"
    texts = ["one\u2028line", "", "two"]
    lines.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n\n" for text in texts), encoding="utf-8")
    assert evaluate.read_texts(lines) == ["one\u2028line", "two"]
    (tmp_path / "a.txt").write_text("a\n\nb")
    assert evaluate.read_texts(tmp_path / "a.txt") == ["a\n\nb"]
    for name, content, message in (("b.jsonl", '{"text": "a"}\n{"txt": "b"}', 'line 2: not {"text": "..."}'), ("c.jsonl", "{", "line 1: not JSON"),
                                   ("d.txt", "", "no text in it"), ("e.txt", b"\x8b", "not UTF-8")):  # fmt: skip
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=f"--text {tmp_path / name}.*{re.escape(message)}"):
            evaluate.read_texts(tmp_path / name)
    assert evaluate.main([str(tmp_path), "--text", str(lines)]) == 1
    assert f"evaluate: {tmp_path} has no config.json; scripts/export_hf.py" in capsys.readouterr().err


def test_a_text_follows_the_tokenizers_begin_which_is_not_its_end(tmp_path):
    """As lm-eval has it, which takes what the tokenizer adds besides."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from training.tokenizers import load_tokenizer

    described = Tokenizer.from_str(load_tokenizer("bytes").tokenizer_json())
    described.add_special_tokens(["<s>"])
    described.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    PreTrainedTokenizerFast(tokenizer_object=described, eos_token="<|endoftext|>", bos_token="<s>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
                                 bos_token_id=257, eos_token_id=[256, 0], initializer_range=0.3)).save_pretrained(tmp_path)  # fmt: skip
    text = "What light?"
    found = evaluate.perplexity(SimpleNamespace(model=str(tmp_path), device="cpu"), [text])
    tokens = torch.tensor([[257, 257, *text.encode()]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    nats = (len(text) + 1) * model(tokens, labels=tokens).loss.item()
    assert found["bits_per_byte"] == pytest.approx(nats / len(text) / math.log(2), rel=1e-5)
