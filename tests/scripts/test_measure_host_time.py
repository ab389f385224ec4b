import json
import subprocess
import sys

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "scripts/measure_host_time.py", "--steps", "2"]


def test_the_parts_of_a_step_are_its_time_and_runs_are_collected(tmp_path):
    out = tmp_path / "host_time.json"
    out.write_text('["a run before"]')
    asked = ["--out", out, "--label", "a change", "--contenders", "plain", "ours_stays"]
    done = subprocess.run([*COMMAND, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    before, run = json.loads(out.read_text())
    assert (before, run["label"], run["processes"], [*run["microseconds"]]) == ("a run before", "a change", 1, ["plain", "ours_stays"])
    for spent in run["microseconds"].values():
        assert min(spent["forward"], spent["backward"]) > 0
        assert abs(4 * (spent["forward"] + spent["backward"]) + spent["rest"] - spent["step"]) <= 5, "but for rounding"
