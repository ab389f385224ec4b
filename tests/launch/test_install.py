"""launch/install.sh: what it says on a machine that lacks something, and that it then leaves everything alone."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "cksum", "dirname", "grep", "mkdir", "rm", "sed")
REQUIREMENTS = ("requirements.txt", "constraints-common.txt", "constraints-cpu.txt")

NO_VENV_MODULE = "import sys; sys.modules['ensurepip'] = None"
NO_HEADERS = "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'"
PYTHON_3_9 = "import sys; sys.version_info = (3, 9, 2, 'final', 0)"


@pytest.fixture
def checkout(tmp_path):
    """A copy of what install.sh reads, and a PATH with a compiler and little else."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/install.sh", tmp_path / "launch")
    for name in REQUIREMENTS:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    compiler = tmp_path / "bin/g++"
    compiler.touch(mode=0o755)
    return tmp_path


def install(checkout, *, startup="", **environment):
    """Run install.sh where every Python first executes ``startup``; returns (exit code, error output)."""
    (checkout / "startup").mkdir()
    (checkout / "startup/sitecustomize.py").write_text(startup)
    environment = {"PATH": str(checkout / "bin"), "PYTHON": sys.executable, "PYTHONPATH": str(checkout / "startup"), **environment}
    result = subprocess.run(["bash", checkout / "launch/install.sh"], env=environment, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stderr


def test_missing_venv_module(checkout):
    code, message = install(checkout, startup=NO_VENV_MODULE)
    assert code == 1 and "lacks the venv module" in message
    assert f"apt install python3.{sys.version_info.minor}-venv" in message
    assert not (checkout / ".venv").exists()


def test_missing_headers(checkout):
    code, message = install(checkout, startup=NO_HEADERS)
    assert code == 1 and "there is no /nowhere/Python.h" in message
    assert f"apt install python3.{sys.version_info.minor}-dev" in message
    assert not (checkout / ".venv").exists()


def test_missing_compiler(checkout):
    (checkout / "bin/g++").unlink()
    code, message = install(checkout)
    assert code == 1 and "no C++ compiler was found" in message and "apt install g++" in message
    assert not (checkout / ".venv").exists()


def test_every_fault_is_reported_at_once(checkout):
    (checkout / "bin/g++").unlink()
    _, message = install(checkout, startup=f"{NO_VENV_MODULE}; {NO_HEADERS}")
    assert message.count("apt install") == 3


def test_python_of_another_version(checkout):
    code, message = install(checkout, startup=PYTHON_3_9)
    assert code == 1 and "Python 3.11 or 3.12 is needed" in message and f"{sys.executable} is Python 3.9" in message
    assert "PYTHON=/path/to/python3.12" in message


@pytest.mark.parametrize("python", ["/nowhere/python3.12", ""])
def test_no_python_at_all(checkout, python):
    code, message = install(checkout, PYTHON=python)
    assert code == 1 and "Python 3.11 or 3.12 is needed" in message and "does not run" in message


def test_a_command_that_cannot_run_is_passed_over(checkout):
    """Version managers put commands on PATH that only say which version is not selected."""
    broken = checkout / "bin/python3"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    (checkout / "bin/python3.11").symlink_to(sys.executable)
    _, message = install(checkout, PYTHON="", startup=NO_VENV_MODULE)
    assert "lacks the venv module" in message


def test_a_venv_of_the_users_own_is_kept(checkout):
    mine = checkout / ".venv/mine"
    mine.parent.mkdir()
    mine.touch()
    code, message = install(checkout)
    assert code == 1 and "was not made by launch/install.sh" in message and mine.exists()


def names(*files):
    """The package names in requirement files, spelled alike."""
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines() if line and line[0] not in "#-"]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}


@pytest.mark.parametrize("profile", ["constraints-cpu.txt", "constraints-gpu.txt"])
def test_every_requirement_is_pinned(profile):
    assert names("requirements.txt", "requirements-test.txt") <= names("constraints-common.txt", profile)


@pytest.mark.parametrize("script", [*ROOT.glob("launch/*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shell_syntax(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=10, env={"PATH": os.environ["PATH"]})
