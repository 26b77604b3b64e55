"""The engine's contract with DeepSpeed and megatron-core, on the oldest and newest versions.

Each version is installed beside the others and put first on the path of a pytest of its own.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.deepspeed_internals import TESTED_VERSIONS

ROOT = Path(__file__).parents[3]
# What breaks when a private part, or a layer, means something else: shares and moments of all ZeRO
# levels, skipped steps, parity over accumulation, tensor parallelism and stages, elastic resume.
CONTRACT = (
    "tests/pipeline/engine/test_deepspeed_internals.py",
    "tests/pipeline/engine/test_parity.py",
    "tests/pipeline/distributed/test_faults.py::test_poisoned_step_leaves_no_trace",
    "tests/pipeline/stages/test_stage_parity.py",
    "tests/pipeline/checkpoint/test_elastic_resume.py",
)


def _bounds(name: str) -> tuple[str, str]:
    """Oldest and newest version of a library that setup.py allows."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = re.search(rf'"{name}>=([\d.]+),<=([\d.]+)"', text)
    assert found is not None, f"setup.py bounds {name} on both sides"
    return found[1], found[2]


VERSIONS = [
    (name, bound) for name in ("deepspeed", "megatron-core") for bound in sorted({*_bounds(name)})
]


def test_the_error_names_the_versions_of_setup() -> None:
    """What a user is told to install is what an installation allows."""
    oldest, newest = _bounds("deepspeed")
    assert f">={oldest},<={newest}" == TESTED_VERSIONS


@pytest.mark.stress
@pytest.mark.parametrize(("name", "version"), VERSIONS, ids=lambda value: str(value))
def test_the_contract_holds(tmp_path: Path, name: str, version: str) -> None:
    """Every test of the contract passes with this version of one library."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    environment = os.environ | {"DS_BUILD_OPS": "0"}
    command = [*pip, str(tmp_path), "--no-build-isolation", f"{name}=={version}"]
    subprocess.run(command, check=True, env=environment, timeout=900)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    code = f"import {name.replace('-core', '.core')} as library; print(library.__version__)"
    used = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert used.stdout.split()[-1] == version
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CONTRACT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert ast.literal_eval(re.findall(r"(\d+) passed", done.stdout)[-1]) > 60
