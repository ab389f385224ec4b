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

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.plot_attention import by_pass, table  # noqa: E402
from training.tracking import collect_environment  # noqa: E402

TIMEOUTS = {"tests": 310, "kernel_times": 100, "training": 130}  # seconds, together nine minutes
WORKERS = min(12, os.cpu_count() or 1)  # several tests at a time: most of a test's seconds go into compiling its kernels, on the CPU
BACKENDS, SEQS = ("hopper", "triton", "sdpa_flash", "sdpa_cudnn"), (1024, 4096, 16384)  # that are timed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "runs/gpu_check.json", metavar="OUT.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA GPU here; run it on a machine that has one", file=sys.stderr)
        return 2
    result = {"environment": collect_environment()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, step in (("tests", run_tests), ("kernel_times", run_kernel_times), ("training", run_training)):
            print(f"gpu_check: {name} ...", flush=True)
            start = time.monotonic()
            result[name] = step(Path(folder), start + TIMEOUTS[name])
            result[name]["seconds"] = round(time.monotonic() - start, 1)
            result["passed"] = all(name in result and result[name]["passed"] for name in TIMEOUTS)
            options.out.write_text(json.dumps(result, indent=1) + "\n")  # what was seen is not lost when the rest is cut off
            print(f"{verdict(result[name])}  {name:12} {result[name]['seconds']:6.1f} s", flush=True)
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
    tests = [sys.executable, "-m", "pytest", "-v", "-n", WORKERS, "--dist", "loadgroup", "-m", "gpu", "tests", f"--junitxml={report}"]
    code, output = command(tests, deadline)
    if code not in (0, 1) or not report.exists():
        return {"passed": False, "exit_code": code, "output": output}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failures = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": what_it_says(problem)}
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    return {"passed": code == 0 and counts["tests"] > counts["skipped"], **counts, "failed": failures}


def what_it_says(problem: ElementTree.Element) -> str:
    """The end of a failure's message, where a launch tells its cause; a worker that crashed has no more than a title."""
    lines = [line for line in (problem.text or "").splitlines() if line.startswith("E ")]
    return "\n".join(lines)[-3000:] or problem.get("message") or ""


def run_kernel_times(folder: Path, deadline: float) -> dict:
    report = folder / "times.json"
    measure = [sys.executable, "scripts/benchmark_attention.py", "--out", report, "--passes", "forward", "backward", "--rounds", "3"]
    code, output = command([*measure, "--seqs", *SEQS, "--backends", *BACKENDS], deadline)
    if code != 0:
        return {"passed": False, "exit_code": code, "output": output}
    return {"passed": True, **json.loads(report.read_text())}


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


def verdict(step: dict) -> str:
    return "passed" if step["passed"] else "FAILED"


def summary(result: dict) -> str:
    """The result as a short table."""
    tests, times, training = result["tests"], result["kernel_times"], result["training"]
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "triton"))
    lines = [f"{environment['gpu_name']}, {versions}, git {environment['git_sha']}"]
    for name in TIMEOUTS:
        lines.append(f"{verdict(result[name])}  {name:12} {result[name]['seconds']:6.1f} s")
    if "tests" in tests:
        lines.append(f"tests: {tests['tests']} run, {tests['failures'] + tests['errors']} failed, {tests['skipped']} skipped")
        lines += [f"  {failure['test']}: {failure['message'].partition(chr(10))[0][:300]}" for failure in tests["failed"]]
    lines += [line for precision in ("bf16", "fp32") if precision in training for line in (training[precision][0], training[precision][-1])]
    lines += [step["output"] for step in (tests, times, training) if "output" in step]
    if "rows" in times:
        lines += [table(rows, "TFLOP/s", times) for rows in by_pass(times["rows"]).values()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
