"""`benchmarks/gpu.sh` itself: which interpreter it takes, what it installs, where it is called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def _call(
    *arguments: str, script: Path = SCRIPT, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_it_is_bash() -> None:
    """It parses, and may be run."""
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("exit 1", "is not Python 3.11 or later; name an interpreter: PYTHON=..."),
        (
            "case $* in *find_spec*) echo yaml;; *torch*) echo No torch here >&2; exit 1;; esac",
            "has no torch; install the build for this GPU, or name an interpreter: PYTHON=... "
            "(No torch here)",
        ),
        (
            "case $* in *deepspeed,*) echo No module named hjson >&2; exit 1;; esac",
            "cannot import all it needs: No module named hjson",
        ),
    ],
)
def test_an_interpreter_that_will_not_do_is_named(
    tmp_path: Path, answer: str, message: str
) -> None:
    """Before anything is installed."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    done = _call("--device", "cpu", PYTHON=str(python))
    assert done.returncode == 1
    assert done.stderr == f"gpu.sh: {python} {message}\n"
    assert not done.stdout


def test_torch_of_a_virtual_environment_is_not_installed_again(tmp_path: Path) -> None:
    """The environment inside it sees it. No index is there: what lacks is named, not torch."""
    root = tmp_path / "a folder"
    for name in ("benchmarks/gpu.sh", "constraints.txt", "setup.py", "pipeline/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    machine = tmp_path / "machine"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", machine], check=True)
    (packages,) = machine.glob("lib/python3*/site-packages")
    (packages / "torch.py").write_text("__version__ = '2.11.0+cu130'\n")
    done = _call(
        *("--device", "cpu"),
        script=root / "benchmarks" / "gpu.sh",
        PYTHON=str(machine / "bin" / "python"),
        PYTHONPATH="",
        PIP_NO_INDEX="1",
    )
    assert done.returncode == 1
    assert "gpu.sh: the packages could not be installed; install by hand" in done.stderr
    assert "deepspeed" in done.stderr.splitlines()[-1]
    assert "torch==2.11.0\n" in (root / ".venv-gpu" / "constraints.txt").read_text()
    assert not (root / ".venv-gpu" / ".installed").exists()


def test_it_is_called_from_another_folder(tmp_path: Path) -> None:
    """Whose modules hide none of what it needs; --output is of the caller's folder."""
    for name in ("torch", "model", "benchmarks", "pydantic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong module')\n")
    done = _call(
        *("--device", "cpu", "--tables", "--output", "here"), cwd=tmp_path, PYTHON=sys.executable
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "results" / "gpu-cpu").is_dir()
