"""What `benchmarks/gpu.sh` keeps: of which sources and machine, and what damage does to it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_store
from benchmarks.gpu_store import Store, alone_in, commit, sources, write_tables

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clear() -> None:
    commit.cache_clear()
    sources.cache_clear()


def test_what_was_found_counts_for_the_same_machine(tmp_path: Path) -> None:
    """On another it is measured again, and is there to be read."""
    (tmp_path / "one").mkdir()
    Store(tmp_path / "one", "card A; torch 1").write("zero", {"complete": True})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert Store(tmp_path / "one", "card A; torch 1").current("zero")["complete"]
    other = Store(tmp_path / "two", "card B; torch 1")
    assert other.current("zero") == {}
    assert other.read("zero")["machine"].startswith("card A; torch 1; ")


def test_what_was_found_counts_for_the_same_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed or not; a file of results changes nothing."""
    tree = tmp_path / "tree"
    (tree / "model" / "inner").mkdir(parents=True)
    (tree / "benchmarks" / "results").mkdir(parents=True)
    code = tree / "model" / "inner" / "code.py"
    code.write_text("1\n")
    monkeypatch.setattr(gpu_store, "ROOT", tree)
    first = sources()
    sources.cache_clear()
    (tree / "benchmarks" / "results" / "zero.json").write_text("{}")
    assert sources() == first
    sources.cache_clear()
    code.write_text("2\n")
    assert sources() != first
    assert commit() == gpu_store.NO_COMMIT


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No program of that name, and it is no failure."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == gpu_store.NO_COMMIT


@pytest.mark.parametrize("content", ["", '{"rows": {"a', "[1]", "null", "\0\0\0", '{"rows": {}}'])
def test_a_damaged_file_is_nothing(tmp_path: Path, content: str) -> None:
    """The piece is measured again, and its file replaced."""
    store = Store(tmp_path, "card A")
    (tmp_path / "zero.json").write_text(content)
    assert store.read("zero") == store.current("zero") == {}
    store.write("zero", {"rows": {}})
    assert store.current("zero")["rows"] == {}


def test_one_call_measures_into_a_folder(tmp_path: Path) -> None:
    """The second is told so; whatever ends the first, the next may."""
    hold = "import sys, time; from pathlib import Path; from benchmarks.gpu_store import alone_in; "
    hold += f"held = alone_in(Path({str(tmp_path)!r})); held.__enter__(); "
    hold += "print('held', flush=True); time.sleep(90)"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError), alone_in(tmp_path):
            pass
        first.kill()
    with alone_in(tmp_path):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_leaves_the_tables_that_were_there(tmp_path: Path) -> None:
    """The new ones are written aside first."""
    readme = tmp_path / "README.md"
    text = "before\n<!-- gpu begin -->\nold\n<!-- gpu end -->\nafter\n"
    readme.write_text(text)
    os.symlink("/dev/full", tmp_path / "README.md.partial")
    with pytest.raises(OSError, match="No space left"):
        write_tables(readme, "new")
    assert readme.read_text() == text


def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured."""
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError), alone_in(tmp_path):
        pass


def test_tables_where_no_file_is(tmp_path: Path) -> None:
    """It is made; a second call replaces them."""
    write_tables(tmp_path / "README.md", "first")
    write_tables(tmp_path / "README.md", "second")
    text = (tmp_path / "README.md").read_text()
    assert "second" in text
    assert "first" not in text


def test_what_is_written_is_json_with_where_it_comes_from(tmp_path: Path) -> None:
    """So that a file speaks for itself."""
    Store(tmp_path, "card A").write("zero", {"rows": {}})
    found = json.loads((tmp_path / "zero.json").read_text())
    assert found.keys() == {"rows", "commit", "machine", "of"}
