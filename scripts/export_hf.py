"""Turn a checkpoint into a folder that Hugging Face's transformers loads: config.json, safetensors, tokenizer, no code of ours.

    python scripts/export_hf.py runs/NAME exported/NAME
    python scripts/export_hf.py runs/NAME/checkpoints/step_00000100 exported/NAME --dtype bfloat16

Of any ZeRO stage, precision and number of processes, on a machine without GPUs too. A run's folder stands for its newest checkpoint. Our GPT becomes
a GPT-2, a Llama, or with attention.window a Mistral; a model trained by model.huggingface stays what it is. Rows that pad the vocabulary
beyond the tokenizer's are left behind. Where transformers is installed the folder is loaded again: nothing may be missing or unexpected, and
in float32 its logits are compared with ours. Exit code 0: exported; 1: not.
"""

import argparse
import json
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from model.conversion import State, export_config, export_state  # noqa: E402
from model.gpt import GPT  # noqa: E402
from training.checkpoints import Checkpoint, read_weights  # noqa: E402
from training.config import Config  # noqa: E402
from training.corpus import CorpusError  # noqa: E402
from training.distributed import UserFault  # noqa: E402
from training.manifest import faults_of, named_checkpoints  # noqa: E402
from training.mixture import Mixture  # noqa: E402
from training.pretrained import INSTALL, folder_of, huggingface_config  # noqa: E402
from training.tokenizers import Tokenizer, load_tokenizer, save_for_transformers  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "chat_template*", "generation_config.json")
LARGEST_DIFFERENCE = 1e-5  # of logits, in units of the largest, or of 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--tokenizer", help="name or folder, as prepare_data.py takes it; default: that of the run's corpus")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default: float32, as the checkpoint's")
    options = parser.parse_args(arguments)
    try:
        print(export(options.checkpoint, options.out, tokenizer=options.tokenizer, dtype=options.dtype))
    except (UserFault, ValueError) as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 1
    return 0


def export(source: Path, out: Path, *, tokenizer: str | None = None, dtype: str = "float32") -> str:
    """Write the folder ``out``, whole or not at all; what was written and how it was checked, a line each."""
    found = named_checkpoints(source)
    if not found:
        raise UserFault(f"{source}: no checkpoint here; give the folder of a run, its checkpoints, or one checkpoint")
    if out.exists():
        raise UserFault(f"{out}: exists already; remove it, or choose another folder")
    if faults := faults_of(found[0]):
        raise UserFault(f"{found[0]} is damaged: {'; '.join(faults)}")
    checkpoint = Checkpoint.read(found[0])
    if "megatron" in checkpoint.saved["config"]:
        raise UserFault(f"{found[0]} is of scripts/megatron_pretrain.py; those of train.py alone can be exported")
    if find_spec("safetensors") is None:
        raise UserFault(f"the package safetensors is missing: {INSTALL}")
    config = Config.model_validate(checkpoint.saved["config"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as partial:
        folder = Path(partial, "export")
        folder.mkdir()
        write = write_gpt if config.model.huggingface is None else write_huggingface
        said = write(checkpoint, config, folder, tokenizer, getattr(torch, dtype))
        folder.rename(out)
    return f"{checkpoint.folder} -> {out}, {dtype}\n{said}"


# --- the project's GPT ----------------------------------------------------------------------------------------------


def write_gpt(checkpoint: Checkpoint, config: Config, folder: Path, tokenizer_name: str | None, dtype: torch.dtype) -> str:
    from safetensors.torch import save_file

    tokenizer = find_tokenizer(config, tokenizer_name)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserFault(f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, and the model {config.model.vocab_size}; give --tokenizer the one "
                        "that it was trained with")
    described = export_config(config.model, config.attention, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text)
    described["dtype"] = str(dtype).removeprefix("torch.")
    state = read_weights(checkpoint, config, scratch=folder.parent)
    exported = export_state(state, config.model, vocab_size=tokenizer.vocab_size)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    # transformers asks for the framework's name.
    save_file({name: weight.to(dtype) for name, weight in exported.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    save_for_transformers(tokenizer, folder, model_max_length=config.model.sequence_length)
    facts = f"{described['architectures'][0]}, {sum(weight.numel() for weight in exported.values()):,} parameters, tokenizer {tokenizer.name}"
    return f"{facts}\n{compare(folder, config, state, tokenizer.vocab_size, exact=dtype == torch.float32)}"


def find_tokenizer(config: Config, name: str | None) -> Tokenizer:
    if name is not None:
        return load_tokenizer(name)
    try:
        return Mixture.open(config.data.weights()).load_tokenizer()
    except CorpusError as error:
        raise UserFault(f"the run's tokenizer lies with its corpus: {error}; or name it: --tokenizer gpt2, bytes, or a folder with its tokenizer.json"
                        ) from None


@torch.no_grad()
def compare(folder: Path, config: Config, state: State, vocab_size: int, *, exact: bool) -> str:
    """Load the folder as its user will, and hold its logits against ours, both computed by standard attention in float32 on the CPU."""
    if find_spec("transformers") is None:
        return f"not loaded again: the package transformers is missing ({INSTALL})"
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    theirs, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    wrong = {what: names for what, names in found.items() if names}
    if wrong:
        raise UserFault(f"transformers does not load every weight as it is: {wrong}")
    attention = config.attention.model_copy(update={"backend": "eager", "document_mask": False})
    ours = GPT(config.model, attention)
    ours.load_state_dict(state | ({"head.weight": state["token_embedding.weight"]} if config.model.tied_embeddings else {}))
    tokens = torch.randint(vocab_size, (2, min(config.model.sequence_length, 128)), generator=torch.Generator().manual_seed(0))
    expected = ours.eval()(tokens)[..., :vocab_size]
    difference, largest = (theirs.eval()(tokens).logits - expected).abs().max().item(), expected.abs().max().item()
    if exact and difference > LARGEST_DIFFERENCE * max(1.0, largest):
        raise UserFault(f"logits differ by {difference:.2g} (the largest is {largest:.3g})")
    return (f"loaded by transformers, nothing missing or unexpected; logits of 2 x {tokens.shape[1]} random tokens differ by {difference:.2g} at most "
            f"(the largest is {largest:.3g})")


# --- a model of transformers ----------------------------------------------------------------------------------------


def write_huggingface(checkpoint: Checkpoint, config: Config, folder: Path, tokenizer_name: str | None, dtype: torch.dtype) -> str:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(huggingface_config(config.model.huggingface), dtype=dtype)
    state = read_weights(checkpoint, config, scratch=folder.parent)
    missing, unexpected = model.load_state_dict({name.removeprefix("model."): weight for name, weight in state.items()}, strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise UserFault(f"the checkpoint does not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}")
    model.save_pretrained(folder)
    if tokenizer_name is not None:
        save_for_transformers(load_tokenizer(tokenizer_name), folder, model_max_length=config.model.sequence_length)
    else:
        origin = folder_of(config.model.huggingface, TOKENIZER_FILES)
        for file in {file for pattern in TOKENIZER_FILES for file in origin.glob(pattern)}:
            shutil.copy(file, folder)
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"


if __name__ == "__main__":
    sys.exit(main())
