"""Evaluate a model that transformers loads with lm-eval, the Language Model Evaluation Harness: an export of scripts/export_hf.py, a folder, a hub id.

    python scripts/evaluate.py exported/NAME --tasks hellaswag lambada_openai --batch-size 16 --out runs/NAME/lm_eval.json
    python scripts/evaluate.py exported/NAME --tasks mine --include tasks/      tasks/ holds lm-eval's YAML of the task "mine" and its data: offline
    python scripts/evaluate.py exported/NAME --text held_out.jsonl              perplexity of texts: {"text": ...} a line, or a .txt, one text

--text makes a task of the file, and beside lm-eval's perplexity computes ours: of the project's own GPT with the folder's weights (model.init_from),
of the same tokens, each text after the tokenizer's begin of text (or end, where it has none), in pieces of the model's length. The two agree, or
something was lost on the way; a model that is no GPT-2, Llama or Mistral has lm-eval's alone.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from model.config import AttentionConfig, GPTConfig  # noqa: E402
from model.conversion import import_config, import_state  # noqa: E402
from model.gpt import GPT  # noqa: E402
from training.files import write_atomically  # noqa: E402
from training.pretrained import INSTALL, PretrainedError, folder_of, read_config, read_state  # noqa: E402
from training.tracking import collect_environment  # noqa: E402

TEXT_TASK = "text"
TOKENIZER_FILES = ("*.json", "*.txt", "tokenizer*")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        results = evaluate(options)
    except (PretrainedError, OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    for task, metrics in results["lm_eval"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                print(f"{task:>24} {metric.removesuffix(',none'):<24} {value:.6g}")
    for metric, value in results.get("ours", {}).items():
        print(f"{'ours':>24} {metric:<24} {value:.6g}")
    if options.out:
        write_atomically(options.out, json.dumps({"environment": collect_environment(), "options": {k: str(v) for k, v in vars(options).items()},
                                                  **results}, indent=1, default=str) + "\n")
        print(f"written to {options.out}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, or ORGANISATION/MODEL[@REVISION]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", help="of lm-eval, or of --include")
    what.add_argument("--text", type=Path, help=".jsonl or .txt")
    parser.add_argument("--include", type=Path, help="folder of further tasks")
    parser.add_argument("--limit", type=int, help="documents of each task; default: all")
    parser.add_argument("--batch-size", type=int, default=8)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--attention", choices=["triton_flash", "sdpa", "eager"], default="triton_flash")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--out", type=Path, help="JSON of settings and results")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's results by task; with --text also ours."""
    read_config(options.model)  # a run's folder, say, has none
    if options.text:
        texts = read_texts(options.text)
        with tempfile.TemporaryDirectory() as folder:
            write_text_task(Path(folder), texts)
            results = {"lm_eval": lm_eval_results(options, [TEXT_TASK], Path(folder))}
        try:
            results["ours"] = perplexity(options, texts)
        except PretrainedError:
            raise
        except ValueError as error:
            print(f"evaluate: lm-eval's perplexity alone: {error}", file=sys.stderr)
        return results
    return {"lm_eval": lm_eval_results(options, options.tasks, options.include)}


def lm_eval_results(options: argparse.Namespace, tasks: list[str], include: Path | None) -> dict[str, Any]:
    if include is not None:  # what lies on this machine needs no network, and lm-eval would ask for it
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise PretrainedError(f"the package {error.name} is missing: {INSTALL}") from None
    from transformers.utils.logging import disable_progress_bar

    from model.huggingface import register

    register()
    disable_progress_bar()
    model = HFLM(pretrained=str(folder_of(options.model, ["*.safetensors", *TOKENIZER_FILES])), device=options.device,
                 dtype=options.dtype, batch_size=options.batch_size, attn_implementation=options.attention)
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise PretrainedError(f"--tasks {' '.join(unknown)}: no such task" + ("" if include is None else f" in {include}"))
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, limit=options.limit, bootstrap_iters=0, log_samples=False)
    return {task: metrics for task, metrics in results["results"].items()}


_METRICS = {"word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}


# --- perplexity of texts --------------------------------------------------------------------------------------------


def read_texts(file: Path) -> list[str]:
    """Those of the file that are not empty, which have no likelihood."""
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file}: not UTF-8 text: {error}") from None
    texts = [_text_of(line, f"--text {file}, line {number}") for number, line in enumerate(content.split("\n"), start=1) if line.strip()] \
        if file.suffix == ".jsonl" else [content]
    if not any(texts):
        raise ValueError(f"--text {file}: there is no text in it")
    return [text for text in texts if text]


def _text_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{place}: not {{"text": "..."}}; a file of plain text ends in .txt')
    return row["text"]


def write_text_task(folder: Path, texts: list[str]) -> None:
    """lm-eval's description of a task that asks for the likelihood of whole texts."""
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    described = {"task": TEXT_TASK, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
                 "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "", "doc_to_target": "{{text}}",
                 "metric_list": [{"metric": metric, "aggregation": aggregation, "higher_is_better": False} for metric, aggregation in _METRICS.items()]}
    (folder / f"{TEXT_TASK}.yaml").write_text(json.dumps(described), encoding="utf-8")  # JSON is YAML


@torch.inference_mode()
def perplexity(options: argparse.Namespace, texts: list[str]) -> dict[str, float]:
    """Of our GPT with the folder's weights, in float32: ``bits_per_byte`` and ``byte_perplexity`` as lm-eval has them, and per token."""
    from transformers import AutoTokenizer

    fields, window = import_config(read_config(options.model))
    config = GPTConfig(**fields)
    model = GPT(config, AttentionConfig(window=window)).to(options.device)
    model.load_state_dict(import_state(read_state(options.model), config), strict=not config.tied_embeddings)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder_of(options.model, TOKENIZER_FILES))
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # as lm-eval has it
    nats = tokens = 0
    for text in texts:
        ids = [begin, *tokenizer.encode(text)]
        for first in range(0, len(ids) - 1, config.sequence_length):
            last = min(first + config.sequence_length, len(ids) - 1)
            # The last piece, shorter than the others, sees as much before it as fits.
            seen = torch.tensor([ids[max(0, last - config.sequence_length) : last]], device=options.device)
            targets = torch.tensor(ids[first + 1 : last + 1], device=options.device)
            nats += F.cross_entropy(model(seen)[0, first - last :].double(), targets, reduction="sum").item()
            tokens += last - first
    per_byte = nats / sum(len(text.encode()) for text in texts)
    return {"byte_perplexity": math.exp(per_byte), "bits_per_byte": per_byte / math.log(2), "token_perplexity": math.exp(nats / tokens)}


if __name__ == "__main__":
    sys.exit(main())
