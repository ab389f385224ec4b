"""Continue prompts with a model that transformers loads: an export of scripts/export_hf.py, any folder, or a model of the Hugging Face Hub.

    python scripts/generate.py exported/NAME --prompt "ROMEO:" "JULIET:" --tokens 100 --temperature 0.8 --top-k 50 --seed 1
    python scripts/generate.py exported/NAME --prompts FILE --temperature 0              one prompt a line, greedily
    python scripts/generate.py --geometry gpt2-355m --compare --batch 8 --prompt-tokens 1024 --tokens 128 --out runs/generate.json

All prompts are one batch with a KV cache. --attention: triton_flash is ours (model.huggingface), eager and sdpa are transformers' own; --compare
runs all three, on the same prompts and with the same seed. --geometry draws the weights of a file in configs/ at random, and the prompts too: for
timing. Reported are the milliseconds to the first token, and from token to token (median), each waited for on the GPU.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from training.config import ConfigError, load_config  # noqa: E402
from training.files import write_atomically  # noqa: E402
from training.pretrained import INSTALL, PretrainedError, folder_of, read_config  # noqa: E402
from training.tracking import collect_environment  # noqa: E402

OURS = "triton_flash"
ATTENTION = ("eager", "sdpa", OURS)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        model, tokenizer = random_model(options) if options.geometry else load(options)
        batch = random_prompts(model, options) if options.geometry else encode(tokenizer, options.prompts)
        check_length(model, batch["input_ids"].shape[1], options.tokens)
        computed = attention_of(model, options)
    except (ModuleNotFoundError, PretrainedError, ConfigError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    rows = []
    for attention in computed:
        model.set_attn_implementation(attention)
        for _ in range(1 if options.compare else 0):  # compiles, allocates
            generate(model, batch, options)
        row = generate(model, batch, options)
        rows.append({"attention": attention, **row})
        if not options.geometry and not (options.compare and len(rows) > 1):
            for prompt, continuation in zip(options.prompts, tokenizer.batch_decode(row["tokens"], skip_special_tokens=True), strict=True):
                print(f"{prompt}{continuation}\n")
        print(f"{attention:>12}: {row['first_token_ms']:.2f} ms to the first token, {row['token_ms']:.3f} ms a token after it, "
              f"{row['batch']} x {row['prompt_tokens']} tokens of prompt and {row['new_tokens']} new ones", flush=True)
    if options.compare:
        for row in rows[:-1]:
            print(f"{OURS} against {row['attention']}: {row['first_token_ms'] / rows[-1]['first_token_ms']:.3f} times as fast to the first token, "
                  f"{row['token_ms'] / rows[-1]['token_ms']:.3f} after it; same tokens: {row['tokens'] == rows[-1]['tokens']}")
    if options.out:
        asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        write_atomically(options.out, json.dumps({"environment": collect_environment(), "options": asked, "rows": rows}, indent=1) + "\n")
        print(f"written to {options.out}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder, or ORGANISATION/MODEL[@REVISION]")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", default=[], dest="prompts", metavar="TEXT")
    source.add_argument("--prompts", type=Path, dest="file", metavar="FILE", help="one prompt a line")
    parser.add_argument("--tokens", type=int, default=64, help="new ones, fewer where a text ends; with --geometry exactly so many")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    parser.add_argument("--top-k", type=int, help="draw among so many of the likeliest; default: all")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest that together have this probability; default: all")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--attention", choices=ATTENTION, default=OURS)
    parser.add_argument("--compare", action="store_true", help="run every --attention, each twice, and time the second")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--geometry", metavar="CONFIG", help="a name in configs/, or a path")
    parser.add_argument("--batch", type=int, default=8, help="with --geometry")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="with --geometry")
    parser.add_argument("--out", type=Path, help="JSON of settings, tokens and times")
    options = parser.parse_args(arguments)
    if options.file:
        try:
            options.prompts = options.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompts {options.file}: {error}")
    if (options.model is None) == (options.geometry is None):
        parser.error("give a model, or --geometry")
    if options.model is not None and not options.prompts:
        parser.error("give --prompt or --prompts")
    if options.tokens < 1 or options.temperature < 0 or options.top_p is not None and not 0 < options.top_p <= 1:
        parser.error("--tokens is at least 1, --temperature 0 or more, --top-p above 0 and at most 1")
    if (options.top_k or 0) < 0 or options.batch < 1 or options.prompt_tokens < 1:
        parser.error("--top-k is 0 (all) or more, --batch and --prompt-tokens are at least 1")
    return options


def load(options: argparse.Namespace):
    """(model, tokenizer that pads on the left)."""
    from model.huggingface import register  # says how to install transformers

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    register()
    disable_progress_bar()
    read_config(options.model)
    folder = folder_of(options.model, ["*.json", "*.safetensors", "*.txt", "tokenizer*"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except ValueError:
        tokenizer = None
    # Of a folder without its files transformers may make one that knows no text.
    if tokenizer is None or set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise PretrainedError(f"{options.model} has no tokenizer that transformers loads; copy its files there, or export it anew with "
                              "scripts/export_hf.py --tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype]).to(options.device)
    return model.eval(), tokenizer


def random_model(options: argparse.Namespace):
    """(model of a configuration's geometry, None)."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError:
        raise PretrainedError(f"the package transformers is missing: {INSTALL}") from None
    from model.conversion import export_config
    from model.huggingface import register

    register()
    path = Path(options.geometry)
    needed = options.prompt_tokens + options.tokens
    config, _ = load_config(path if path.suffix else ROOT / "configs" / f"{path}.yaml",
                            [f"model.sequence_length={needed}", "train.global_batch_size=null", "train.micro_batch_size=1",
                             "train.gradient_accumulation_steps=1", "train.precision=fp32"])
    described = export_config(config.model, config.attention, vocab_size=config.model.vocab_size, end_of_text=0)
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described), dtype=DTYPES[options.dtype])
    return model.eval(), None


def random_prompts(model, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(options.seed)
    return {"input_ids": torch.randint(1, model.config.vocab_size, (options.batch, options.prompt_tokens), generator=generator)}


def encode(tokenizer, prompts: list[str]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, int64 [prompts, tokens]; an empty prompt is the end of a text."""
    return dict(tokenizer([prompt or tokenizer.eos_token for prompt in prompts], return_tensors="pt", padding=True))


def check_length(model, prompt: int, new: int) -> None:
    """Raises PretrainedError where the model has fewer positions: learned ones are looked up beyond their table, others were never trained."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and prompt + new > longest:
        raise PretrainedError(f"the longest prompt has {prompt} tokens, and with --tokens {new} that is more than the model's {longest} positions; "
                              f"use --tokens {longest - prompt}" if prompt < longest else
                              f"the longest prompt has {prompt} tokens, and the model {longest} positions; shorten it")


def attention_of(model, options: argparse.Namespace) -> list[str]:
    """Those to run; with --compare without what transformers has not for this model, which is said."""
    found = []
    for attention in ATTENTION if options.compare else (options.attention,):
        try:
            model.set_attn_implementation(attention)
            # Of a model outside of transformers' AttentionInterface it sets nothing, and says nothing.
            why = None if model.config._attn_implementation == attention else "it has attention of its own"
        except ValueError as error:
            why = str(error).split(". ")[0]
        if why is None:
            found.append(attention)
        else:
            why = f"transformers has no {attention} for {type(model).__name__}: {why}"
            if not options.compare:
                raise PretrainedError(f"{why}; use --attention {'eager' if attention == OURS else OURS}")
            print(f"{attention:>12}: left out, {why}", flush=True)
    return found


class Clock:
    """A stopping criterion that stops nothing and looks at the clock after every token."""

    def __init__(self, device: str):
        self.device = device
        self.times = [self.now()]

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(self.now())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


@torch.inference_mode()
def generate(model, batch: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """New tokens of every prompt, without padding, and the milliseconds they took."""
    batch = {"attention_mask": torch.ones_like(batch["input_ids"])} | batch
    end = None if options.geometry else model.generation_config.eos_token_id
    drawing = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if options.temperature > 0:
        drawing = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k or 0, "top_p": options.top_p}
    torch.manual_seed(options.seed)
    clock = Clock(options.device)
    out = model.generate(
        **{name: tensor.to(options.device) for name, tensor in batch.items()}, max_new_tokens=options.tokens, eos_token_id=end,
        pad_token_id=0 if end is None else end if isinstance(end, int) else end[0], stopping_criteria=[clock], use_cache=True, **drawing,
    )  # fmt: skip
    length = batch["input_ids"].shape[1]
    ends = {end} if isinstance(end, int) else set(end or ())
    tokens = [until(row, ends) for row in out[:, length:].tolist()]
    steps = [1e3 * (after - before) for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return {"batch": len(out), "prompt_tokens": length, "new_tokens": len(steps), "first_token_ms": steps[0],
            "token_ms": median(steps[1:]) if len(steps) > 1 else float("nan"), "tokens": tokens}


def until(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


if __name__ == "__main__":
    sys.exit(main())
