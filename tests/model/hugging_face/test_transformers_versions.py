"""The class that exports carry, on the oldest transformers that is allowed and on the newest.

Each is installed, with what it needs itself, in a folder that is put first on the path of a pytest
of its own; the folder goes when the test ends.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Loading, saving, drafting and training on, here and where only transformers is; each kind of head.
CONTRACT = [
    f"tests/{name}.py"
    for name in (
        *("model/hugging_face/test_modeling_headway", "model/hugging_face/test_saved_folder"),
        *("model/hugging_face/test_generate_with_heads", "model/hugging_face/test_loss_of_heads"),
        *("model/hugging_face/test_generate_with_decoders", "pipeline/exporting/test_head_kinds"),
    )
]


def _oldest() -> str:
    """The lower bound of setup.py."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = re.search(r'"transformers>=([\d.]+)"', text)
    assert found is not None, "setup.py bounds transformers from below"
    return found[1]


@pytest.mark.stress
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_class_works(tmp_path: Path, which: str) -> None:
    """All tests of the class, with drafts and losses, pass with this version."""
    wanted = f"transformers=={_oldest()}.0" if which == "oldest" else "transformers"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "site")]
    # The Trainer imports datasets, which has to fit the same huggingface_hub.
    subprocess.run([*pip, wanted, "datasets"], check=True, timeout=900)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    used = subprocess.run(
        version,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert which == "newest" or used.stdout.strip() == f"{_oldest()}.0"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CONTRACT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert done.returncode == 0, f"transformers {used.stdout}{done.stdout[-3000:]}"
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 50
