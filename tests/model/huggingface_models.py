"""Small models of transformers, randomly initialised, and the batches that attention has to see right."""

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

VOCABULARY, LENGTH = 64, 24
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48,
          "num_hidden_layers": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                               bos_token_id=0, eos_token_id=0),
    "llama": lambda: LlamaConfig(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**_SHAPE, sliding_window=8, attn_logit_softcapping=1.0, query_pre_attn_scalar=16),  # every second layer has the window
    "qwen3": lambda: Qwen3Config(**_SHAPE),
}  # fmt: skip


def build(name: str, attention: str, device: str = "cpu", *, layers: int = 2):
    """The same weights for every attention, large enough that it matters what is seen."""
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.normal(float(parameter.ndim == 1), 0.2, parameter.shape, generator=generator))
    return model.to(device)


def batches(device: str = "cpu") -> dict[str, dict[str, torch.Tensor]]:
    tokens = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    left, right, holes = (torch.ones_like(tokens) for _ in range(3))
    left[1, :7], right[1, -7:], holes[0, 5:7] = 0, 0, 0
    documents = torch.cat((torch.arange(10), torch.arange(LENGTH - 10)))[None].to(device)
    return {"plain": {"input_ids": tokens}, "left": {"input_ids": tokens, "attention_mask": left}, "right": {"input_ids": tokens, "attention_mask": right},
            "holes": {"input_ids": tokens, "attention_mask": holes}, "packed": {"input_ids": tokens, "position_ids": documents.expand(2, -1)}}


def logits_and_gradients(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens that are no padding; gradients of all parameters in one vector."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits[real].float()
    logits.square().mean().backward()
    return logits.detach(), torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])
