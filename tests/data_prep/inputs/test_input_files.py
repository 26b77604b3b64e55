"""Inputs to files."""

import gzip
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import DataError
from data_prep.inputs.input_files import find_inputs
from data_prep.inputs.reading import read_unit
from data_prep.inputs.records import Reading
from data_prep.inputs.units import plan_units


def test_directory_is_walked_sorted_without_caches(tmp_path: Path) -> None:
    """A directory gives its text files by sorted path; caches, packages and binaries stay out."""
    for name in (
        "b.py", "a.txt", "sub/c.rs", "sub/__pycache__/x.py", ".git/y.py", "z.so", "Makefile",
        "lib/site-packages/p.py", "data.jsonl", "notes.json", "x.tar.gz", "y.py.bz2",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "dangling.py").symlink_to("nowhere")

    def names(*globs: str, exclude: tuple[str, ...] = ()) -> list[str]:
        files = find_inputs([tmp_path], globs, exclude)
        return [Path(file.path).relative_to(tmp_path).as_posix() for file in files]

    assert names() == ["Makefile", "a.txt", "b.py", "data.jsonl", "sub/c.rs"]
    assert names("*.py") == ["b.py"]
    assert names("*.json") == ["notes.json"]
    assert names("**/*.rs", "*.so") == ["z.so", "sub/c.rs"]
    assert names(exclude=("sub", "*.jsonl")) == ["Makefile", "a.txt", "b.py"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "does not exist"),
        ("a.parquet", "not a whole .parquet file"),
        ("a.tar.gz", "is not a format that can be read"),
        ("a.gz", "is not a format that can be read"),
        ("a.jsonl.bz2", "is not a format that can be read"),
        ("a.parquet.gz", "is not a format that can be read"),
        ("empty", "--glob"),
    ],
)
def test_unusable_inputs_are_refused(tmp_path: Path, name: str, message: str) -> None:
    """A missing path, an unread format and a directory without text each say what to do."""
    (tmp_path / "empty").mkdir()
    if name.startswith("a."):
        (tmp_path / name).write_bytes(b"PAR1 and no end")
    with pytest.raises(DataError, match=message):
        find_inputs([tmp_path / name])


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """A file whose name cannot be recorded is named in bytes; --exclude leaves it out."""
    for name in (b"a.py", b"caf\xe9.py", "b\xa0ü.py".encode()):
        (tmp_path / os.fsdecode(name)).write_bytes(b"pass")
    with pytest.raises(DataError, match=r"caf\\xe9\.py.*is not UTF-8"):
        find_inputs([tmp_path])
    assert len(find_inputs([tmp_path], exclude=["caf*"])) == 2


def test_a_file_given_twice_is_refused(write_jsonl: Callable[..., Path]) -> None:
    """The same file by name and through its directory would be counted twice."""
    path = write_jsonl(["a"])
    with pytest.raises(DataError, match="twice"):
        find_inputs([path.parent, path])


def test_an_input_that_changes_during_the_job_is_refused(write_jsonl: Callable[..., Path]) -> None:
    """A file that is no longer the planned one ends the job instead of mixing two versions."""
    path = write_jsonl(["a", "b"])
    (unit,) = plan_units(find_inputs([path]), 1 << 20)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match="changed while"):
        list(read_unit(unit, Reading("text")))


def text_lines(count: int) -> bytes:
    """Records that compress badly, several megabytes for tens of thousands."""
    rng = random.Random(1)
    return b"".join(b'{"text": "%x"}\n' % rng.getrandbits(800) for _ in range(count))


def append_member(path: Path) -> None:
    """Another gzip member at the end."""
    path.write_bytes(path.read_bytes() + gzip.compress(text_lines(1)))


def overwrite(path: Path) -> None:
    """Other content of the same size."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"x" * 100)


def cut(path: Path) -> None:
    """The second half lost."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [append_member, overwrite, cut, Path.unlink])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.arrow", "a.parquet"])
def test_an_input_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    """However a file is changed between its first and its last record, its name is the error."""
    path, lines = tmp_path / name, text_lines(30_000)
    if name in ("a.arrow", "a.parquet"):
        rows = pa.table({"text": [line.decode() for line in lines.splitlines()]})
        if name == "a.arrow":
            with pa.ipc.new_file(str(path), rows.schema) as writer:
                writer.write_table(rows, max_chunksize=1000)
        else:
            pq.write_table(rows, path, row_group_size=1000)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    (unit,) = plan_units(find_inputs([path]), 1 << 30)
    batches = read_unit(unit, Reading("text"))
    assert next(batches).texts
    time.sleep(0.02)  # so that a clock with coarse steps gives another modification time
    change(path)
    with pytest.raises(DataError, match=rf"{name} changed while the job was running"):
        list(batches)
