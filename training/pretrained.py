"""Models of the Hugging Face world: their folders found, what they are told of in a configuration, their weights put into ours.

``model.init_from`` begins our own GPT with the weights of a GPT-2, Llama or Mistral; ``model.huggingface`` trains a model of transformers as it is.
Both name a folder with a config.json and safetensors, or a model of the Hugging Face Hub, ORGANISATION/MODEL[@REVISION].
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.checkpointing import Checkpointing
from model.config import GPTConfig
from model.conversion import State, import_config, import_state

if TYPE_CHECKING:
    from training.config import Config, ModelSection

INSTALL = "python -m pip install -r requirements-huggingface.txt"
_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


class PretrainedError(ValueError):
    """A pretrained model that is not there or does not fit; the message names it and the remedy."""


def folder_of(name: str, files: Iterable[str]) -> Path:
    """The folder ``name``; or where a model of the Hub lies on this machine, once ``files`` (patterns) are fetched."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise PretrainedError(f"{name}: no such folder, and not the name of a model of the Hugging Face Hub, ORGANISATION/MODEL")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise PretrainedError(f"{name}: no such folder; to fetch it from the Hugging Face Hub: {INSTALL}") from None
    model, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(files)))
    except Exception as error:  # its classes are many
        raise PretrainedError(f"{name}: no such folder, and not to be had from the Hugging Face Hub: {' '.join(str(error).split())} "
                              "(a private or gated model needs the environment variable HF_TOKEN)") from None


# --- the configuration ----------------------------------------------------------------------------------------------


def resolve(model: "ModelSection", given: dict[str, Any], window: int | None) -> tuple["ModelSection", list[tuple[str, str]]]:
    """The architecture of ``model.init_from`` or ``model.huggingface`` in the place of what the run leaves open, at its default.

    given: what the run itself says in ``model``. window: attention.window.
    Returns it, and what contradicts it: (key, what and remedy).
    """
    given = {field: mine for field, mine in given.items() if mine != type(model).model_fields[field].default}
    key = "init_from" if model.init_from is not None else "huggingface"
    name = getattr(model, key)
    try:
        if key == "init_from":
            try:
                fields, its_window = import_config(read_config(name))
            except ValueError as error:
                remedy = "" if isinstance(error, PretrainedError) else "; model.huggingface trains it as it is"
                raise PretrainedError(f"{error}" + (f" in {name}/{_CONFIG}" if remedy else "") + remedy) from None
        else:
            fields, its_window = _fields_of_huggingface(name), window
    except PretrainedError as error:
        return model, [(f"model.{key}", str(error))]
    longest = fields.pop("sequence_length")
    if "sequence_length" not in given and (fields.get("positions") == "learned" or model.sequence_length > longest):
        fields["sequence_length"] = longest
    faults = []
    for field, its in fields.items():
        mine = given.get(field)
        if field not in given or mine == its or field == "init_std":
            continue
        if field == "vocab_size" and key == "init_from" and mine > its:  # rows that no text has
            fields[field] = mine
            continue
        faults.append((f"model.{field}", f"{mine}, and {name} has {its}; leave it out"))
    if "sequence_length" in given and given["sequence_length"] > longest and fields.get("positions", "learned") == "learned":
        faults.append(("model.sequence_length", f"{given['sequence_length']} are more than the {longest} positions of {name}; lower it"))
    if its_window != window and not (window is None and its_window >= fields.get("sequence_length", model.sequence_length)):
        faults.append(("attention.window", f"{window}, and {name} has {its_window}; take that"))
    if key == "huggingface":
        own = {"init_from", "huggingface", "sequence_length"} | fields.keys()
        faults += [(f"model.{field}", f"{mine} is for the project's own GPT, and {name}/{_CONFIG} says what this model is; leave it out")
                   for field, mine in given.items() if field not in own]
    return model.model_copy(update=fields), faults


def read_config(name: str) -> dict[str, Any]:
    """The config.json of a folder or of a model of the Hub."""
    file = folder_of(name, [_CONFIG]) / _CONFIG
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PretrainedError(f"{name} has no {_CONFIG}; scripts/export_hf.py writes such a folder of a checkpoint") from None
    except ValueError as error:
        raise PretrainedError(f"{file} is not JSON: {error}") from None


def _fields_of_huggingface(name: str) -> dict[str, Any]:
    text = huggingface_config(name).get_text_config(decoder=True)
    heads = text.num_attention_heads
    fields = {
        "layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads, "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "ffn_size": getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size,
        "vocab_size": text.vocab_size, "tied_embeddings": bool(text.tie_word_embeddings),
    }  # fmt: skip
    return fields | {"sequence_length": getattr(text, "max_position_embeddings", None) or 2**62}


def huggingface_config(name: str):
    """transformers' configuration of ``model.huggingface``."""
    read_config(name)
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError:
        raise PretrainedError(f"{name}: the package transformers is missing: {INSTALL}") from None
    try:
        return AutoConfig.from_pretrained(folder_of(name, ["*.json"]))
    except (ValueError, OSError) as error:
        raise PretrainedError(f"{name}: transformers has no model of it: {' '.join(str(error).split())}") from None


# --- weights --------------------------------------------------------------------------------------------------------


def read_state(name: str) -> State:
    """Every weight in the safetensors of a folder or of a model of the Hub, on the CPU."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise PretrainedError(f"{name}: the package safetensors is missing: {INSTALL}") from None
    folder = folder_of(name, [_CONFIG, _INDEX, "*.safetensors"])
    if (folder / _INDEX).is_file():
        files = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [_WEIGHTS]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise PretrainedError(f"{name} has no {missing[0]}; where transformers loads the model, its save_pretrained() writes one")
    try:
        return {key: tensor for file in files for key, tensor in load_file(folder / file).items()}
    except SafetensorError as error:
        raise PretrainedError(f"{name}: its safetensors cannot be read: {error}; fetch or export it anew") from None


def initial_weights(model: "ModelSection") -> State:
    """The weights of ``model.init_from`` by the names of ``GPT``.

    Learned positions beyond the sequence length are left out; rows of the embedding beyond the vocabulary of what they come from are missing.
    """
    fields, _ = import_config(read_config(model.init_from))
    try:
        state = import_state(read_state(model.init_from), GPTConfig(**fields))
    except PretrainedError:
        raise
    except ValueError as error:
        raise PretrainedError(f"model.init_from: {model.init_from} does not hold the weights that its {_CONFIG} tells of: {error}") from None
    if "position_embedding.weight" in state:
        state["position_embedding.weight"] = state["position_embedding.weight"][: model.sequence_length]
    return state


def load_weights(model: nn.Module, section: "ModelSection") -> None:
    """Put the weights of ``model.init_from`` into a GPT, perhaps partitioned by ZeRO-3; call it on every rank.

    Rows of the embedding that they do not have keep what they were drawn.
    """
    import deepspeed
    import torch.distributed as dist

    from training.distributed import together

    first = dist.get_rank() == 0
    state = together(lambda: initial_weights(section), here=first)
    for name, parameter in model.named_parameters():
        # Where nothing is partitioned, rank 0's weights are broadcast when the engine is built.
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            if first:
                parameter[: len(state[name])].copy_(state[name])


# --- models of transformers -----------------------------------------------------------------------------------------


def load_huggingface(config: "Config", checkpointing: Checkpointing, *, end_of_text: int | None):
    """The model of ``model.huggingface`` with its weights, whole, in the CPU's memory: ``model.huggingface.HuggingFaceModel``.

    Raises PretrainedError where a weight is missing, none of its own, or of another shape: transformers would draw it anew.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from model.huggingface import HuggingFaceModel, attention_for, checkpoint_layers

    disable_progress_bar()
    name = config.model.huggingface
    attention = attention_for(type(meta_huggingface(name).model), config.attention.backend, packed=config.attention.document_mask)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.train.precision]
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder_of(name, ["*.json", "*.safetensors"]), dtype=dtype, output_loading_info=True,
                                                            attn_implementation=attention)
    except (OSError, ValueError, SafetensorError) as error:
        raise PretrainedError(f"model.huggingface: transformers does not load {name} with attention.backend={config.attention.backend}: {error}") from None
    wrong = {what: found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[what]}
    if wrong:
        raise PretrainedError(f"model.huggingface: {name} does not fit {type(model).__name__}: {wrong}")
    try:
        checkpoint_layers(model, checkpointing)
    except ValueError as error:
        raise PretrainedError(f"model.huggingface: {error}") from None
    return HuggingFaceModel(model.train(), end_of_text=end_of_text if config.attention.document_mask else None)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Within it the model's dtype may change, but not that of its buffers: rotary frequencies rounded to bf16 would break long sequences."""
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)]
    yield
    for module, name, buffer in buffers:
        setattr(module, name, buffer.to(getattr(module, name).device))


def meta_huggingface(name: str):
    """The same without weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    from model.huggingface import HuggingFaceModel

    with torch.device("meta"):
        return HuggingFaceModel(AutoModelForCausalLM.from_config(huggingface_config(name)))


def count_huggingface(config: "Config", checkpointing: Checkpointing) -> tuple[dict[str, int], dict[str, int]]:
    """What ``model.gpt.count_parameters`` and ``count_recomputed`` say of GPT, of ``model.huggingface``."""
    from model.huggingface import count_parameters, count_recomputed

    model = meta_huggingface(config.model.huggingface)
    return count_parameters(model), count_recomputed(model, checkpointing)
