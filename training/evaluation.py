"""Validation loss and samples; every rank takes part, because under ZeRO-3 each forward gathers parameters from all."""

import math
from collections.abc import Iterable, Sequence

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from model.gpt import IGNORED_LABEL
from training.batches import Batch
from training.config import SampleSection
from training.tokenizers import Tokenizer


_SAMPLE_LENGTH_MULTIPLE = 64


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, batches: Iterable[Batch], token_bytes: np.ndarray) -> dict[str, float]:
    """Loss over validation batches, the same on every rank.

    Args:
        batches: this rank's (tokens, labels); as many on every rank.
        token_bytes: int64 [vocabulary], UTF-8 bytes of each token; 0 for end of text.

    Returns:
        ``val_loss`` in nats per target token, ``val_perplexity``, and ``val_bits_per_byte``, which alone compares across tokenizers.
    """
    engine.eval()
    bytes_of = torch.from_numpy(token_bytes).to(engine.device)
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for tokens, labels in batches:
        counted = labels[labels != IGNORED_LABEL]
        totals += torch.stack([engine(tokens, labels).double(), counted.numel() * totals.new_ones(()), bytes_of[counted].sum().double()])
    dist.all_reduce(totals)
    engine.train()
    return validation_results(*totals.tolist())


def validation_results(nats: float, targets: float, text_bytes: float) -> dict[str, float]:
    """What `evaluate` returns, of its sums over all ranks."""
    loss = nats / targets
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0)), "val_bits_per_byte": nats / math.log(2) / text_bytes}


def mixed(results: dict[str, dict[str, float]], shares: Sequence[float]) -> dict[str, float]:
    """Validation of a mixture from that of its corpora, by name: as in the training data, each weighs as much as its share.

    Returns what `evaluate` does, for a text mixed in these shares of tokens, and ``val_loss/NAME`` of each corpus; one corpus alone is as it is.
    """
    if len(results) == 1:
        return next(iter(results.values()))
    weights = [share / sum(shares) for share in shares]
    loss = sum(weight * each["val_loss"] for weight, each in zip(weights, results.values(), strict=True))
    bytes_per_token = sum(weight * each["val_loss"] / (math.log(2) * each["val_bits_per_byte"])
                          for weight, each in zip(weights, results.values(), strict=True))
    whole = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0)), "val_bits_per_byte": loss / math.log(2) / bytes_per_token}
    return whole | {f"val_loss/{name}": each["val_loss"] for name, each in results.items()}


@torch.no_grad()
def sample_text(engine: deepspeed.DeepSpeedEngine, tokenizer: Tokenizer, settings: SampleSection, *, sequence_length: int, seed: int) -> str:
    """Continue the prompt token by token with temperature and top-k sampling; temperature 0 takes the likeliest.

    Rank 0 draws, so that all go on and stop together: logits of unlike GPUs may differ in a bit. Stops at end of text, or after
    ``settings.tokens``.
    """
    engine.eval()
    generator = torch.Generator().manual_seed(seed)
    prompt = tokenizer.encode(settings.prompt).tolist() or [tokenizer.end_of_text]
    tokens = list(prompt)
    for _ in range(settings.tokens):
        window = tokens[-sequence_length:]
        # No position looks at the padding after it, and cuDNN's attention cannot do a single token.
        padding = [0] * (min(-len(window) % _SAMPLE_LENGTH_MULTIPLE, sequence_length - len(window)))
        logits = engine(torch.tensor([window + padding], device=engine.device))[0, len(window) - 1, : tokenizer.vocab_size]
        drawn = draw_token(logits.float().cpu(), settings, generator).to(engine.device)
        dist.broadcast(drawn, src=0)
        token = int(drawn)
        if token == tokenizer.end_of_text:
            break
        tokens.append(token)
    engine.train()
    return tokenizer.decode(tokens[len(prompt):])


def draw_token(logits: torch.Tensor, settings: SampleSection, generator: torch.Generator) -> torch.Tensor:
    """One token, int64 [1], from float32 logits [vocabulary]."""
    if settings.temperature == 0:
        return logits.argmax(keepdim=True)
    logits = (logits - logits.max()) / settings.temperature  # the maximum stays 0, however small the temperature
    if settings.top_k is not None and settings.top_k < len(logits):
        logits[logits < logits.topk(settings.top_k).values[-1]] = -torch.inf
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
