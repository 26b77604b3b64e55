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

from data_prep.building.build import build
from data_prep.building.options import BuildOptions
from data_prep.errors import DataError
from data_prep.inputs.input_files import LeftOut, find_inputs
from data_prep.inputs.reading import read_unit
from data_prep.inputs.records import Reading
from data_prep.inputs.units import plan_units
from tests.data_prep.conftest import Silence


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


def test_what_a_folder_holds_and_is_not_read_is_named(tmp_path: Path) -> None:
    """Links to nothing and to folders, pipes and other names are counted, each kind with a name."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name in ("a.txt", "b.json", "c.json", "noise", "d.skip"):
        (inputs / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (inputs / "linked").symlink_to(tmp_path / "elsewhere")
    (inputs / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(inputs / "pipe.txt")
    left_out = LeftOut()
    files = find_inputs([inputs], exclude=["*.skip"], left_out=left_out)
    assert [Path(file.path).name for file in files] == ["a.txt"]
    lines = left_out.lines()
    assert lines[0].startswith(f"note: not read: {inputs}/")
    assert lines[0].endswith(
        ".json has the suffix .json, which is taken only by --glob (and 1 more)"
    )
    assert set(lines[1:]) == {
        f"note: not read: {inputs}/{name}"
        for name in (
            "noise has no suffix",
            "linked is a link to a folder",
            "dangling.txt is a link to nothing",
            "pipe.txt is a pipe",
        )
    }


def test_a_build_says_what_it_did_not_read(tmp_path: Path) -> None:
    """The notes come before the work."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    (tmp_path / "in" / "b.json").write_text("{}")
    said: list[str] = []

    class Listener(Silence):
        def say(self, message: str) -> None:
            said.append(message)

    build(BuildOptions(tmp_path / "out", "bytes", (tmp_path / "in",), workers=1), Listener())
    assert "b.json has the suffix .json" in said[0]


@pytest.mark.parametrize("kind", ["pipe", "dangling", "long"])
def test_what_is_asked_for_by_name_must_be_a_file(tmp_path: Path, kind: str) -> None:
    """A pipe, a link to nothing and an impossible name are errors when they are named."""
    path = tmp_path / ("x" * 300 if kind == "long" else f"{kind}.jsonl")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    message = {
        "pipe": "is a pipe",
        "dangling": "is a link to nothing",
        "long": "File name too long",
    }
    with pytest.raises(DataError, match=message[kind]):
        find_inputs([path])


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    """Its files were asked for; --exclude says that they are not wanted."""
    inputs = tmp_path / "in"
    deep = inputs
    for _ in range(20):  # deeper than the longest path that the system opens
        deep = deep / ("d" * 240)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        for name in deep.relative_to(tmp_path).parts:
            os.mkdir(name, dir_fd=descriptor)
            inner = os.open(name, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
    finally:
        os.close(descriptor)
    (inputs / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"cannot read .*ddd: .*--exclude it"):
        find_inputs([inputs])
    assert len(find_inputs([inputs], exclude=["ddd*"])) == 1


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


def test_parts_of_a_shard_follow_its_start(tmp_path: Path) -> None:
    """By name alone 00000-001.arrow would come before 00000.arrow, whose tokens it continues."""
    names = ["00000.arrow", "00000-001.arrow", "00000-002.arrow", "00001.arrow", "a-b.arrow"]
    for name in reversed([*names, "a.arrow"]):
        (tmp_path / name).write_bytes(b"")
    found = [Path(file.path).name for file in find_inputs([tmp_path])]
    assert found == [*names, "a.arrow"]
