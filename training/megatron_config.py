"""The configuration of a run of scripts/megatron_pretrain.py: that of train.py, and how Megatron-Core shares the model out."""

from typing import ClassVar, Literal

from pydantic import PositiveInt

from model.checkpointing import Checkpointing
from model.gpt import count_recomputed
from training.compositions import Row
from training.config import Config, SampleSection, Section, Sharing, ZeroSection


class MegatronSection(Section):
    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    sequence_parallel: bool = False
    recompute_attention: bool = False
    attention: Literal["ours", "megatron"] = "ours"


def _divided(c: "MegatronConfig") -> bool:
    model, ranks = c.model.resolved(), c.megatron.tensor_parallel
    # Of fewer key heads than ranks Megatron gives each rank one, and its share of the projection's rows, wherever a head ends.
    rows = (model.heads + 2 * model.kv_heads) * model.head_dim
    return any(number % ranks for number in (model.heads, rows, model.ffn_size, model.vocab_size)) or bool(model.kv_heads % ranks and ranks % model.kv_heads)


ROWS = (
    Row(("megatron.tensor_parallel", "model.heads", "model.kv_heads", "model.ffn_size", "model.vocab_size"),
        _divided,
        "{megatron.tensor_parallel} ranks do not divide heads, kv_heads, ffn_size or vocab_size, nor share each of fewer kv_heads evenly",
        "use a divisor of all four, or of kv_heads a multiple, or change them (vocab_size may have unused rows)",
        example=("megatron.tensor_parallel=5",), instead=("megatron.tensor_parallel=1",)),
    Row(("megatron.pipeline_parallel", "model.layers"),
        lambda c: c.model.layers % c.megatron.pipeline_parallel != 0,
        "{model.layers} layers do not divide into {megatron.pipeline_parallel} stages",
        "use a divisor of layers",
        example=("megatron.pipeline_parallel=5",), instead=("megatron.pipeline_parallel=1",)),
    Row(("megatron.sequence_parallel", "megatron.tensor_parallel", "model.sequence_length"),
        lambda c: c.megatron.sequence_parallel and (c.megatron.tensor_parallel == 1 or c.model.sequence_length % c.megatron.tensor_parallel != 0),
        "the ranks of a tensor-parallel group share the sequence: there must be several, and {model.sequence_length} tokens divide by their number",
        "use tensor_parallel: 2, or sequence_parallel: false",
        example=("megatron.sequence_parallel=true",), instead=("megatron.sequence_parallel=false",)),
    Row(("megatron.attention", "attention.deterministic"),
        lambda c: c.megatron.attention == "megatron" and c.attention.deterministic,
        "Megatron's own attention is PyTorch's matrix products, and promises nothing of the kind",
        "use attention: ours",
        example=("megatron.attention=megatron", "attention.deterministic=true", "attention.backend=tiled"), instead=("megatron.attention=ours",)),
    Row(("attention.document_mask",),
        lambda c: c.attention.document_mask,
        "samples are not packed sequences to Megatron here",
        "use false, or train.py",
        example=("attention.document_mask=true",), instead=("attention.document_mask=false",)),
    Row(("model.positions",),
        lambda c: c.model.positions == "alibi",
        "Megatron has no ALiBi",
        "use learned or rope, or train.py",
        example=("model.positions=alibi",), instead=("model.positions=rope",)),
    Row(("model.init_from", "model.huggingface"),
        lambda c: c.model.init_from is not None or c.model.huggingface is not None,
        "Megatron's model begins with the weights that model.gpt.GPT draws from run.seed",
        "make both null, or use train.py",
        example=("model.huggingface=a/b",), instead=("model.huggingface=null",)),
    Row(("train.precision", "train.bf16_states"),
        lambda c: c.train.precision == "fp16" or c.train.bf16_states,
        "Megatron's optimizer is set up here for bf16 with fp32 master weights, and for fp32",
        "use train.precision: bf16 and bf16_states: false, or train.py",
        example=("train.precision=fp16",), instead=("train.precision=bf16",)),
    Row(("parallel.sequence",),
        lambda c: c.parallel.sequence > 1,
        "Megatron's processes share a sequence by megatron.sequence_parallel",
        "use 1, with megatron.tensor_parallel and megatron.sequence_parallel",
        example=("parallel.sequence=2",), instead=("parallel.sequence=1",)),
    Row(("train.mlp_tile",),
        lambda c: c.train.mlp_tile is not None,
        "Megatron computes its MLPs whole",
        "use null, or train.py",
        example=("train.mlp_tile=128",), instead=("train.mlp_tile=null",)),
    Row(("train.checkpoint_offload",),
        lambda c: c.train.checkpoint_offload,
        "what Megatron keeps of a layer stays in the GPU's memory",
        "use false, or train.py",
        example=("train.checkpoint_offload=true", "train.activation_checkpointing=full"), instead=("train.checkpoint_offload=false",)),
    Row(("train.activation_checkpointing", "megatron.recompute_attention"),
        lambda c: c.train.activation_checkpointing not in ("none", "full"),
        "Megatron recomputes whole layers (full), or by megatron.recompute_attention attention alone, which it calls selective",
        "use none or full",
        example=("train.activation_checkpointing=selective", "attention.backend=sdpa"), instead=("train.activation_checkpointing=full",)),
    Row(("megatron.recompute_attention", "train.activation_checkpointing"),
        lambda c: c.megatron.recompute_attention and c.train.activation_checkpointing == "full",
        "whole layers are computed again, attention with them",
        "use recompute_attention: false, or train.activation_checkpointing: none",
        example=("megatron.recompute_attention=true", "train.activation_checkpointing=full"), instead=("megatron.recompute_attention=false",)),
    Row(("optimizer.name",),
        lambda c: c.optimizer.name != "adamw",
        "Megatron's distributed optimizer is set up here for AdamW",
        "use adamw, or train.py",
        example=("optimizer.name=muon",), instead=("optimizer.name=adamw",)),
    Row(("zero.stage", "zero.offload_optimizer", "zero.offload_parameters", "zero.reduce_dtype"),
        # What else is there, sizes and distances, is ZeRO's way to be fast, and comes with the files of train.py.
        lambda c: any(getattr(c.zero, name) != getattr(ZeroSection(), name) for name in ("stage", "offload_optimizer", "offload_parameters", "reduce_dtype")),
        "Megatron's distributed optimizer stands in ZeRO's place and reads none of its keys",
        "leave these at their defaults",
        example=("zero.stage=1",), instead=("zero.stage=3",)),
    Row(("sample.tokens",),
        lambda c: c.sample.tokens > 0,
        "a model shared out by Megatron does not sample here",
        "use 0",
        example=("sample.tokens=8",), instead=("sample.tokens=0",)),
)


class MegatronConfig(Config):
    """One run.  ``configs/base.yaml`` documents every key but those of ``megatron``, which ``configs/megatron/base.yaml`` does."""

    megatron: MegatronSection = MegatronSection()
    sample: SampleSection = SampleSection(tokens=0)

    rows: ClassVar = (*Config.rows, *ROWS)

    @property
    def sharing(self) -> Sharing:
        return Sharing(self.megatron.tensor_parallel * self.megatron.pipeline_parallel, "a model", "megatron.tensor_parallel")

    @property
    def engine(self) -> str:
        layout = self.megatron
        return (f"Megatron: tensor {layout.tensor_parallel}{' with sequence parallelism' * layout.sequence_parallel} x pipeline {layout.pipeline_parallel}"
                f"{', its own attention' * (layout.attention == 'megatron')}{', attention recomputed' * layout.recompute_attention}")

    def recomputed(self) -> dict[str, int]:
        """What Megatron computes again in the backward pass: see model.gpt.count_recomputed."""
        if self.megatron.recompute_attention:
            return {"parameters": 0, "layers": self.model.layers}
        # Of a layer all, as DeepSpeed's recomputation does.
        return count_recomputed(self.model, Checkpointing("deepspeed" if self.train.activation_checkpointing == "full" else "none"))
