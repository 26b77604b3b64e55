"""Exports of any content: text is generated from them, or one clear error says why not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from foundation.durable_files import FileEntry, entry_of
from model import generate
from model.hugging_face.folder import RECORD_NAME
from model.hugging_face.importing import LlamaFolder
from tests.support.damage import DAMAGES, Damage, damaged_copy
from tests.support.hostile import Ended, call_command, check_ended, fuzzed, refusal_of, untouched
from tests.support.tiny_export import VOCABULARY, export_tiny
from tests.support.tiny_model import tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export; generating from it has loaded the libraries."""
    export = tmp_path_factory.mktemp("exports") / "export"
    export_tiny(export)
    assert run(export).code == 0
    return export


def run(export: Path, *options: str) -> Ended:
    """`python -m model.generate EXPORT --prompt ab`, four tokens."""
    given = [str(export), "--prompt", "ab", "--max-new-tokens", "4", *options]
    with untouched(export.parent):
        return call_command(generate.main, given)


def seal(export: Path) -> None:
    """Give the record the sizes and checksums of what is there, if it still is a record."""
    import json

    path = export / RECORD_NAME
    try:
        record: Any = json.loads(path.read_bytes()) if path.is_file() else None
        for name in record["files"]:
            found = export / name
            content = found.read_bytes() if found.is_file() and not found.is_symlink() else b""
            entry: FileEntry = entry_of(content)
            record["files"][name] = {"bytes": entry.size, "xxh3_128": entry.xxh3}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return
    path.write_text(json.dumps(record))


@fuzzed(60, damages=st.lists(DAMAGES, min_size=1, max_size=2), sealed=st.booleans())
def test_any_export(export: Path, damages: list[Damage], sealed: bool) -> None:
    """Damage of every kind to every file, with a record that knows it not, or that hides it."""
    config = tiny_config(vocab_size=VOCABULARY)
    with damaged_copy(export, *damages) as copy:
        if sealed:
            seal(copy)
        run(copy)
        run(copy, "--temperature", "1")
        refusal_of(lambda: imported(copy, config))


def imported(folder: Path, config: Any) -> None:
    """What a run with train.init_from does before it reads tensors."""
    found = LlamaFolder(folder)
    found.check(config)
    found.verify()


@fuzzed(
    30,
    option=st.sampled_from(["--temperature", "--seed", "--heads", "--max-new-tokens"]),
    value=st.sampled_from(
        ["1e-38", "1e-45", "5e-324", "1e300", "nan", "inf", "-inf", "1e-4", "1e4"]
    )
    | st.sampled_from(["9" * 400, "-1", "0", "18446744073709551616", "9223372036854775808", "x"])
    | st.floats().map(str),
)
def test_any_options(export: Path, option: str, value: str) -> None:
    """Numbers that overflow, underflow or are none."""
    run(export, f"{option}={value}", *([] if option == "--temperature" else ["--temperature=1"]))


@pytest.mark.parametrize("temperature", ["1e-38", "1e-45", "5e-324", "1e300", "nan", "inf"])
def test_temperatures_that_fp32_cannot_use(export: Path, temperature: str) -> None:
    """They are refused with the range."""
    ended = run(export, f"--temperature={temperature}")
    assert ended.code == 1
    assert "must be 0 or a positive number from 0.001 to 1,000" in ended.errors


@pytest.mark.parametrize("temperature", ["0.001", "1000"])
def test_the_outermost_temperatures_work(export: Path, temperature: str) -> None:
    """What is not refused can be sampled at."""
    assert run(export, f"--temperature={temperature}").code == 0


@pytest.mark.parametrize("prompt", ["", "\x00", "\x1b[2J", "\n\n", "\u2028", "\U0010ffff" * 3])
def test_any_prompt(export: Path, prompt: str) -> None:
    """Every text is one."""
    assert call_command(generate.main, [str(export), "--prompt", prompt]).code == 0


def test_prompts_that_are_no_text(export: Path) -> None:
    """Bytes that are not UTF-8, through the real command."""
    command = [sys.executable, "-m", "model.generate", os.fspath(export), "--prompt"]
    done = subprocess.run(
        [*command, b"ab\xff"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    check_ended(Ended(done.returncode, done.stdout, done.stderr))
    assert "prompt 1 is not UTF-8 text" in done.stderr
