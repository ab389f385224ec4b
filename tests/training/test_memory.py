"""Predicted memory: beside every allocation of real training steps on two processes, and beside the tensors that the real model saves."""

import json
import re
from pathlib import Path

import pytest
import torch

from model import loss
from model.checkpointing import Checkpointing
from model.gpt import GPT
from model.offload import HostMemoryError
from tests.allocations import as_on_a_gpu
from tests.launching import deepspeed_run
from training import memory
from training.activations import Shape, block_keeps, checkpoint_keeps
from training.config import load_config
from training.distributed import LoneFault, UserFault

SMALL = [
    "model.layers=2", "model.hidden_size=128", "model.heads=2", "model.vocab_size=1024", "model.sequence_length=128",
    "train.global_batch_size=4",
    "zero.reduce_bucket_size=200000", "zero.prefetch_bucket_size=400000", "zero.persistence_threshold=1000", "attention.backend=sdpa",
]  # fmt: skip
FEW_WORDS = "model.vocab_size=128"  # so that the blocks, and not the loss, decide the peak
LLAMA = ["model.positions=rope", "model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false", "model.tied_embeddings=false"]
ONE = "train.global_batch_size=1"
FULL = "train.activation_checkpointing=full"
DEEP = ["model.layers=6", "zero.prefetch_bucket_size=200000"]  # 1.2M parameters in blocks
NEAR = ["zero.reuse_distance=400000"]
LONG = ["train.global_batch_size=1", "model.sequence_length=1024", FEW_WORDS, "model.layers=4"]
OFFLOADED = [FULL, "train.checkpoint_offload=true"]
TILES = ["train.mlp_tile=128"]
NEVER = ["zero.reuse_distance=0", "zero.prefetch_bucket_size=100000"]
CASES = [
    ["zero.stage=3"],
    ["zero.stage=3", FEW_WORDS, "attention.backend=eager"],
    ["zero.stage=3", FEW_WORDS, FULL],
    ["zero.stage=3", FEW_WORDS, *LLAMA],
    ["zero.stage=3", "train.bf16_states=true", "zero.reduce_dtype=bf16"],
    ["zero.stage=3", "zero.offload_optimizer=cpu"],
    ["zero.stage=2"],
    ["zero.stage=2", "zero.offload_optimizer=cpu", "train.gradient_accumulation_steps=2"],
    ["zero.stage=0", "train.precision=fp32", "train.gradient_accumulation_steps=2"],
    ["zero.stage=1", "train.gradient_accumulation_steps=2"],
    ["zero.stage=1", "train.precision=fp16"],
    ["zero.stage=0", "optimizer.name=muon"],
    [*LONG, *OFFLOADED, *TILES, "model.positions=rope", "parallel.sequence=2"],
    ["train.global_batch_size=2", *LONG[1:], *OFFLOADED, *TILES, *LLAMA],
]


def configure(*settings: str, processes: int = 1):
    return load_config("configs/base.yaml", [*SMALL, *settings], world_size=processes)[0]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    followed = [{"settings": [*SMALL, *case], "logits_at_once": loss.LOGITS_AT_ONCE} for case in CASES]
    followed.append(followed[0] | {"logits_at_once": 65536})
    followed += [followed[0] | {"settings": [*SMALL, *DEEP, *distance]} for distance in (NEAR, NEVER)]
    rows = [["gpt2-124m", 2, [*SMALL[:5], "attention.backend=sdpa", "zero.stage=2"]], ["gpt2-124m", 2, ["attention.backend=none_such"]]]
    (folder / "asked.json").write_text(json.dumps({"followed": followed, "rows": rows}))
    done = deepspeed_run("tests/training/memory_worker.py", folder / "asked.json", folder / "seen.json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "seen.json").read_text())


@pytest.fixture(scope="module")
def followed(seen):
    return seen["followed"]


def predicted(config, processes: int) -> dict[str, int]:
    """The largest moment of each phase; on a CPU, where the host's memory is the device's."""
    estimate = memory.estimate(config, processes, workspace=0)
    phases = {"forward": 0, "backward": 0, "step": 0}
    for moment in estimate.moments:
        phase = "step" if "step" in moment.name else "forward" if moment.name == "loss" or "forward" in moment.name else "backward"
        phases[phase] = max(phases[phase], moment.bytes + sum(estimate.host.values()))
    return phases


def test_the_peak_is_that_of_every_allocation_followed(followed):
    for case, peaks in zip(CASES, followed, strict=False):
        assert max(predicted(configure(*case, processes=2), 2).values()) == pytest.approx(max(peaks.values()), rel=0.05), case


def test_the_loss_and_the_step_are_predicted_by_themselves(followed):
    for case, peaks in zip(CASES, followed, strict=False):
        expected = predicted(configure(*case, processes=2), 2)
        if FEW_WORDS not in case:  # then a block's forward pass may be above the loss, and the backward pass is above both
            assert expected["forward"] == pytest.approx(peaks["forward"], rel=0.01), case
        if not {"zero.stage=0", "zero.stage=1"} & set(case):  # gloo lets go of what stage 0, and 1 in bf16, reduced when it pleases
            assert expected["step"] == pytest.approx(peaks["step"], rel=0.03), case


def test_the_logits_of_a_part_of_the_tokens(followed, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 65536)
    whole, parts = followed[0]["forward"], followed[len(CASES)]["forward"]
    assert predicted(configure(processes=2), 2)["forward"] == pytest.approx(parts, rel=0.01) and parts < whole


def test_blocks_that_are_used_again_too_late_are_let_go_unless_gathering_ahead_has_passed_them(followed):
    everything, near, never = (predicted(configure(*DEEP, *distance, processes=2), 2) for distance in ([], NEAR, NEVER))
    for phase in ("forward", "backward"):
        for expected, peaks in zip((near, never), followed[-2:], strict=True):
            assert expected[phase] == pytest.approx(peaks[phase], rel=0.01)
        assert followed[-1][phase] < 0.95 * everything[phase]


def test_the_measuring_mode_trains_each_row_and_says_what_it_left_out(seen):
    trained, broken = seen["rows"]
    assert trained["left_out"].startswith("trained, but there is no GPU") and trained["predicted_bytes"] == sum(trained["parts"].values())
    assert "none_such is not known" in broken["left_out"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "dialect", [[], LLAMA, ["model.kv_heads=1"], [*LLAMA, "model.kv_heads=1"], ["model.dropout=0.1"], [ONE], [ONE, *LLAMA], TILES], ids=str
)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_block_keeps_what_the_formula_says(backend, dialect, precision, monkeypatch):
    """Every storage that autograd saves in one block more, parameters aside."""
    as_on_a_gpu(monkeypatch)
    config = configure("train.global_batch_size=2", *dialect, f"attention.backend={backend}", f"train.precision={precision}")
    shape = Shape(config.model, config.attention, config.train.micro_batch_size, memory.element_size(config), tile=config.train.mlp_tile)
    keeps = block_keeps(shape)
    if config.model.dropout:
        keeps["dropout masks"] *= shape.e  # on CPUs they are numbers
    assert saved(config, 3) - saved(config, 2) == pytest.approx(
        sum(keeps.values()), rel=4e-3
    )  # on CPUs LayerNorm keeps its statistics in bf16


@pytest.mark.parametrize("checkpointing", [Checkpointing("full"), Checkpointing("every_n", every=1)], ids=str)
def test_a_checkpointed_block_keeps_its_input(checkpointing):
    config = configure("train.global_batch_size=2")
    shape = Shape(config.model, config.attention, 2, 2)
    kept = saved(config, 3, checkpointing) - saved(config, 2, checkpointing)
    assert kept == pytest.approx(sum(checkpoint_keeps(shape, checkpointing).values()), rel=1e-3)


def saved(config, layers: int, checkpointing: Checkpointing = Checkpointing()) -> int:
    """Bytes of the storages that autograd holds after the forward pass of a model of so many layers, parameters aside."""
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    model = GPT(config.model.model_copy(update={"layers": layers}), config.attention, checkpointing=checkpointing,
                mlp_tile=config.train.mlp_tile).to(dtype)
    own, storages = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.zeros(config.train.micro_batch_size, config.model.sequence_length, dtype=torch.int64))
    assert logits.requires_grad
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


# --- the page -----------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs/memory.md").read_text(encoding="utf-8")


def rows_after(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading of the page."""
    table = re.search(r"^\|.*?(?=\n\n)", PAGE[PAGE.index(heading) :], re.M | re.S)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("column, dialect", [(1, []), (2, [*LLAMA, "model.kv_heads=1"])])
def test_the_page_says_what_a_block_keeps(column, dialect):
    config = configure(*dialect, "train.global_batch_size=2")
    model, keeps = config.model, block_keeps(Shape(config.model, config.attention, 2, 2))
    symbols = {
        "T": 2 * model.sequence_length,
        "h": model.hidden_size,
        "e": 2,
        "H": model.heads,
        "f": model.ffn_size,
        "Q": model.heads * model.head_dim,
        "K": model.kv_heads * model.head_dim,
    }
    rows = {row[0]: eval(row[column].strip("`"), symbols) for row in rows_after("## What a block keeps")}
    symbols.pop("__builtins__")
    assert rows == keeps
    if not dialect:
        assert sum(keeps.values()) == symbols["T"] * (32 * symbols["h"] + 4 * symbols["H"] + 16)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_page_says_what_each_stage_holds(processes):
    for stage, *expressions in rows_after("## DeepSpeed's share"):
        config = configure(f"zero.stage={stage}", processes=processes)
        loss = next(moment for moment in memory.estimate(config, processes).moments if moment.name == "loss")
        total = memory.Parameters.of(config.model).total
        for part, expression in zip(("parameters", "gradients", "optimizer states"), expressions, strict=True):
            assert loss.parts.get(part, 0) == pytest.approx(eval(expression.strip("`"), {"P": total, "N": processes}), rel=2e-3), (
                stage,
                part,
            )


def test_the_page_says_what_long_contexts_take():
    none = ["train.checkpoint_offload=false", "train.mlp_tile=null", "train.compile=false", "train.activation_checkpointing=none"]
    steps = [(1, none), (1, none[:3]), (1, none[1:3]), (1, []), (4, ["parallel.sequence=4", "model.sequence_length=4000000"])]
    for (processes, settings), (_, peak, _, longest) in zip(steps, rows_after("## Long contexts"), strict=True):
        config = load_config("configs/gpt-1.3b-long.yaml", settings, world_size=processes, assumed_gpu=(9, 0))[0]
        found = memory.largest_sequence(config, processes, memory.capacity("H200"))
        on_host = sum(memory.estimate(memory.changed(config, {"model.sequence_length": found}), processes).host.values())
        assert float(re.match(r"[\d,]+", peak)[0].replace(",", "")) == round(memory.estimate(config, processes).peak.bytes / memory.GIB)
        assert longest.startswith(f"{found:,}") and ("(" in longest) == (on_host > 0)
        assert not on_host or f"({on_host / memory.GIB:.0f} GiB o" in longest


# --- what fits, what helps ------------------------------------------------------------------------------------------------


def gpt(*settings: str, processes: int = 2):
    return load_config("configs/gpt-1.3b.yaml", [*settings], world_size=processes, assumed_gpu=(9, 0))[0]


def test_the_largest_micro_batch_and_sequence_fit_and_the_next_do_not():
    config, available = gpt(), memory.capacity("NVIDIA H200")

    def peak(**settings):
        return memory.estimate(memory.changed(config, {key.replace("__", "."): value for key, value in settings.items()}), 2).peak.bytes

    micro = memory.largest_micro_batch(config, 2, available)
    assert peak(train__micro_batch_size=micro) <= available < peak(train__micro_batch_size=micro + 1)
    sequence = memory.largest_sequence(config, 2, available)
    assert (
        peak(train__micro_batch_size=1, model__sequence_length=sequence)
        <= available
        < peak(train__micro_batch_size=1, model__sequence_length=sequence + 128)
    )
    assert memory.largest_micro_batch(config, 2, 2**30) == 0 and memory.capacity("Unheard-of 9000") is None


def test_savings_are_those_of_the_changed_configuration_and_compose():
    config = gpt("attention.backend=eager", "train.activation_checkpointing=none")
    found = memory.savings(config, 2)
    now = memory.estimate(config, 2).peak.bytes
    assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True) and len(found) >= 5
    assert len({next(iter(settings)) for settings, _ in found}) == len(found), "one for each kind"
    for settings, saved in found:
        changed = memory.changed(config, settings)
        assert saved == now - memory.estimate(changed, 2).peak.bytes > 0
        again, _ = load_config(
            "configs/gpt-1.3b.yaml",
            ["attention.backend=eager", "train.activation_checkpointing=none", *memory.told(settings).split()],
            world_size=2,
            assumed_gpu=(9, 0),
        )
        assert again.train.global_batch_size == config.train.global_batch_size
    assert {"attention.backend": "auto"} in [settings for settings, _ in found]


@pytest.mark.parametrize(
    "now", [["train.activation_checkpointing=every_n", "train.checkpoint_every=2"], ["train.activation_checkpointing=selective", "train.keep_matmuls=true"]]
)
def test_what_only_the_present_checkpointing_reads_is_let_go_of_with_it(now):
    less = next(settings for settings, _ in memory.savings(gpt(*now), 2) if "train.activation_checkpointing" in settings)
    again = gpt(*now, *memory.told(less).split())
    assert again.train.activation_checkpointing == "full" and again.train.checkpoint_offload and memory.changed(gpt(*now), less).train == again.train


def test_what_a_setting_costs_elsewhere_stands_beside_what_it_saves():
    config = gpt("train.micro_batch_size=1", "train.activation_checkpointing=none", "train.bf16_states=false")
    lines = dict(line.split(": ", 1) for line in memory.helpful(config, 2))
    assert lines.pop("train.bf16_states=true").endswith(" less (it costs some loss: docs/modes.md)")
    for settings, said in lines.items():
        host = sum(memory.estimate(gpt("train.micro_batch_size=1", *settings.split()), 2).host.values())
        assert host > 0 and said.endswith(f"less ({memory.gib(host)} of the host for each process)")


def test_what_long_contexts_take_is_proposed_where_it_helps():
    long = ["model.positions=rope", "model.sequence_length=131072", "train.micro_batch_size=1", "train.global_batch_size=4", "zero.reuse_distance=0"]
    found = dict((next(iter(settings)), settings) for settings, _ in memory.savings(gpt(*long), 2))
    assert found["train.checkpoint_offload"] == {"train.checkpoint_offload": True}
    assert found["train.mlp_tile"] == {"train.mlp_tile": memory.MLP_TILE, "train.compile": False}
    assert found["parallel.sequence"]["train.gradient_accumulation_steps"] == 2 * gpt(*long).train.gradient_accumulation_steps
    for settings in found.values():
        assert gpt(*long, *memory.told(settings).split()).train.global_batch_size == 4


def test_a_host_without_room_for_what_waits_there_is_told_before_it_runs_out():
    config, inputs = gpt("train.checkpoint_offload=true"), 24 * 8 * 2048 * 2048 * 2
    memory.check_host(config, 4, 2, 2 * inputs)
    with pytest.raises(UserFault, match="train.checkpoint_offload: 2 processes of this host would keep 3.00 GiB in its memory, and it has 3.00 GiB; shorten"):
        memory.check_host(config, 4, 2, 2 * inputs - 1)
    memory.check_host(gpt(), 4, 2, 0)
    memory.check_host(memory.changed(config, {"model.huggingface": "a/b"}), 4, 2, 0)  # of which nothing is predicted
    with pytest.raises(UserFault, match="^zero.offload_optimizer, zero.offload_parameters: 2 .* and it has 1.00 GiB; spread the run over more hosts"):
        memory.check_host(gpt("zero.offload_optimizer=cpu", "zero.offload_parameters=cpu"), 2, 2, 2**30)
    assert 2**28 < memory.host_capacity() < 2**50


def test_the_summary_says_peak_fit_and_what_helps():
    memory_line, fits, less = memory.summary(gpt(), 2, "NVIDIA H200")
    assert memory_line.startswith("memory ") and "optimizer states" in memory_line and "at the peak, which is the loss" in memory_line
    assert re.search(r"micro batches up to \d+ .* sequences up to [\d,]+ in micro batches of 1$", fits)
    _, _, fits, _ = memory.summary(gpt("train.checkpoint_offload=true"), 2, "NVIDIA H200")
    micro, on_host = re.search(r"micro batches up to (\d+) at sequence length 2,048 \((.*?) of the host for each process\), .*\(\d.* of the host", fits).groups()
    assert on_host == memory.gib(24 * int(micro) * 2048 * 2048 * 2)
    assert len(less.split(";")) == 3
    lines = memory.summary(gpt("zero.offload_optimizer=cpu"), 2, "CPU")
    assert lines[1].startswith("host ") and len(lines) == 3, "of an unknown device nobody knows what fits"


def test_another_model_is_refused_by_name_and_compiled_blocks_are_said_to_differ():
    other = memory.changed(gpt(), {"model.huggingface": "a/b"})
    with pytest.raises(UserFault, match="model.huggingface: memory is predicted of the project's own GPT alone"):
        memory.estimate(other, 2)
    (line,) = memory.summary(other, 2, "NVIDIA H200")
    assert line.startswith("memory model.huggingface: ")
    assert "GiB in tensors" in (told := memory.explanation(other, 2, "CUDA out of memory. GPU 0 has", 2**37)) and memory.NOT_OURS in told
    for compiled in (True, False):
        line = memory.summary(gpt(f"train.compile={str(compiled).lower()}"), 2, "NVIDIA H200")[0]
        assert ("for blocks as written" in line) is compiled


@pytest.mark.parametrize(
    "settings, allocated, part",
    [
        ((), 2**37, "logits"),
        ((), 2**30, "optimizer states"),
        (
            (
                "attention.backend=eager",
                "train.micro_batch_size=1",
                "train.gradient_accumulation_steps=null",
                "model.sequence_length=32768",
            ),
            2**37,
            "attention's scores",
        ),
    ],
)
def test_running_out_of_memory_names_the_part_that_grew_and_what_helps(settings, allocated, part):
    told = memory.explanation(
        gpt(*settings), 2, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 B", allocated
    )
    assert f"The part that grew: {part}, " in told and "Tried to allocate 2.00 GiB, with" in told and "GPU 0" not in told
    assert len(re.findall(r"^  \w+\.\w+=.*: [\d.]+ GiB less(?: \(.*\))?$", told, re.M)) == 3


def test_an_out_of_memory_error_becomes_one_message_on_the_rank_that_met_it():
    of_cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), of_cublas):
        with pytest.raises(LoneFault, match="out of GPU memory: .*What helps most, predicted:"):
            with memory.out_of_memory_explained(gpt(), 2):
                raise error
    with pytest.raises(LoneFault, match="^could not be pinned$"):
        with memory.out_of_memory_explained(gpt(), 2):
            raise HostMemoryError("could not be pinned")
    with pytest.raises(RuntimeError, match="^another$"):
        with memory.out_of_memory_explained(gpt(), 2):
            raise RuntimeError("another")
