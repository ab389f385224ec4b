"""What only a GPU can check, in at most nine minutes: every GPU test, kernel times beside PyTorch's, whether training learns; one JSON out.

    bash scripts/gpu_check.sh [OUT.json]

Exit code 0: all passed; 1: something failed; 2: no GPU here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.tracking import collect_environment  # noqa: E402

TIMEOUTS = {"tests": 330, "kernel_times": 80, "training": 130}  # seconds, together nine minutes

TOKENS, HIDDEN = 16384, 2048  # batch * seq and heads * head_dim of every timed case
BACKENDS = ("hopper", "triton", "sdpa_flash", "sdpa_cudnn")
ROUNDS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "runs/gpu_check.json", metavar="OUT.json")
    parser.add_argument("--kernel-times", action="store_true", help=argparse.SUPPRESS)  # this program's own second step
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA GPU here; run it on a machine that has one", file=sys.stderr)
        return 2
    if options.kernel_times:
        options.out.write_text(json.dumps(time_kernels()))
        return 0
    result = {"environment": collect_environment()}
    with tempfile.TemporaryDirectory() as folder:
        for name, step in (("tests", run_tests), ("kernel_times", run_kernel_times), ("training", run_training)):
            print(f"gpu_check: {name} ...", flush=True)
            start = time.monotonic()
            result[name] = step(Path(folder), start + TIMEOUTS[name])
            result[name]["seconds"] = round(time.monotonic() - start, 1)
    result["passed"] = all(result[name]["passed"] for name in TIMEOUTS)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result), f"written to {options.out}", sep="\n")
    return 0 if result["passed"] else 1


def command(arguments: list, deadline: float) -> tuple[int | str, str]:
    """Exit code ("timeout" past the deadline) and the output's end."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(list(map(str, arguments)), cwd=ROOT, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=max(1, deadline - time.monotonic()))
        return process.returncode, output[-4000:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the launcher's children too
        return "timeout", process.communicate()[0][-4000:]


def run_tests(folder: Path, deadline: float) -> dict:
    report = folder / "tests.xml"
    # Several at a time: most of a test's seconds go into compiling its kernels, on the CPU.
    code, output = command([sys.executable, "-m", "pytest", "-q", "-n", "6", "--dist", "loadgroup", "-m", "gpu", "tests", f"--junitxml={report}"], deadline)
    if code not in (0, 1) or not report.exists():
        return {"passed": False, "exit_code": code, "output": output}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failures = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": (problem.get("message") or "")[:500]}
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    return {"passed": code == 0 and counts["tests"] > counts["skipped"], **counts, "failed": failures}


def run_kernel_times(folder: Path, deadline: float) -> dict:
    report = folder / "times.json"
    code, output = command([sys.executable, __file__, "--kernel-times", report], deadline)
    if code != 0:
        return {"passed": False, "exit_code": code, "output": output}
    return {"passed": True, "unit": "TFLOP/s", "rows": json.loads(report.read_text())}


def time_kernels() -> list[dict]:
    """Medians of interleaved rounds; FLOPs are 4 batch heads seq^2 head_dim forward, 2.5 times that backward, half of both if causal."""
    rows = []
    for head_dim in (64, 128):
        for causal in (True, False):
            for seq in (1024, 4096, 16384):
                row = {"head_dim": head_dim, "causal": causal, "seq": seq, "batch": TOKENS // seq, "heads": HIDDEN // head_dim}
                flops = 4 * TOKENS * seq * HIDDEN / (2 if causal else 1)
                for name, milliseconds in time_case(**row).items():
                    row[name] = {"forward": flops / milliseconds["forward"] / 1e9, "backward": 2.5 * flops / milliseconds["backward"] / 1e9}
                rows.append(row)
    return rows


def time_case(head_dim: int, causal: bool, seq: int, batch: int, heads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each backend that can do it, bfloat16."""
    from triton.testing import do_bench

    from kernels.attention import attention, unsupported

    q, k, v = (torch.randn(batch, seq, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    dout = torch.randn_like(q)
    asked = dict(device_type="cuda", dtype=q.dtype, head_dim=head_dim, compute_capability=torch.cuda.get_device_capability())
    measured = {name: {"forward": [], "backward": []} for name in BACKENDS if unsupported(name, **asked) is None}
    for _ in range(ROUNDS):
        for name, times in measured.items():

            def forward(backend=name):
                return attention(q, k, v, causal=causal, backend=backend)

            def backward(out=forward()):
                return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

            times["forward"].append(do_bench(forward, warmup=10, rep=40, return_mode="median"))
            times["backward"].append(do_bench(backward, warmup=10, rep=60, return_mode="median"))
    return {name: {which: median(rounds) for which, rounds in times.items()} for name, times in measured.items()}


def run_training(folder: Path, deadline: float) -> dict:
    """A hundred steps through the launcher, in bf16 on the backend that auto takes and in fp32 on ours, against the stored losses."""
    corpus = folder / "corpus"
    prepare = [sys.executable, "scripts/prepare_data.py", "--source", "shakespeare", "--tokenizer", "bytes", "--out", corpus]
    check = [sys.executable, "scripts/check_convergence.py", f"data.corpus={corpus}"]
    outputs = []
    for arguments in (prepare, [*check, "train.precision=bf16"], [*check, "attention.backend=triton"]):
        code, output = command(arguments, deadline)
        if code != 0:
            return {"passed": False, "command": " ".join(map(str, arguments)), "exit_code": code, "output": output}
        outputs.append(output)
    return {"passed": True, "bf16": outputs[1].splitlines(), "fp32": outputs[2].splitlines()}


def summary(result: dict) -> str:
    """The result as a short table."""
    tests, times, training = result["tests"], result["kernel_times"], result["training"]
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "triton"))
    lines = [f"{environment['gpu_name']}, {versions}, git {environment['git_sha']}"]
    for name in TIMEOUTS:
        lines.append(f"{'passed' if result[name]['passed'] else 'FAILED'}  {name:12} {result[name]['seconds']:6.1f} s")
    if "tests" in tests:
        lines.append(f"tests: {tests['tests']} run, {tests['failures'] + tests['errors']} failed, {tests['skipped']} skipped")
        lines += [f"  {failure['test']}: {failure['message'].splitlines()[0] if failure['message'] else ''}" for failure in tests["failed"]]
    lines += [line for precision in ("bf16", "fp32") if precision in training for line in (training[precision][0], training[precision][-1])]
    lines += [step["output"] for step in (tests, times, training) if "output" in step]
    if "rows" in times:
        lines.append("TFLOP/s forward/backward, bf16      " + "".join(f"{name:>14}" for name in BACKENDS))
        for row in times["rows"]:
            cells = (f"{row[name]['forward']:.0f}/{row[name]['backward']:.0f}" if name in row else "-" for name in BACKENDS)
            mask = "causal" if row["causal"] else "full"
            lines.append(f"  head_dim {row['head_dim']:>3}  {mask:6}  seq {row['seq']:>5}     " + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
