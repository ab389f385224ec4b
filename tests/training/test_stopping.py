"""StopRequests on its own; what a whole run does with them is in test_reliability.py."""

import subprocess
import sys

ONE_CTRL_C = """
import os, signal, sys, time
from pathlib import Path
from training.stopping import StopRequests

stop = StopRequests(Path(sys.argv[1]), grace_seconds=30)
stop.begin_loop()
is_up, up = os.pipe()
child = os.fork()
if child == 0:
    os.write(up, b".")
    time.sleep(0.5)
    os._exit(0)
os.read(is_up, 1)
for process in (child, os.getpid()):
    os.kill(process, signal.SIGINT)
os.waitpid(child, 0)
print(stop.reason)
"""


def test_one_ctrl_c_that_reaches_a_forked_writer_too_is_no_second_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", ONE_CTRL_C, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "SIGINT\n"), done.stderr
