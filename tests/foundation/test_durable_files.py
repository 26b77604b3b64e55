"""Files that are whole under their name or not there, and entries that tell one from another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from foundation.durable_files import (
    BLOCK_BYTES,
    FileEntry,
    entry_of,
    read_entry,
    remove_leftovers,
    whole_file,
    write_whole,
)

ROOT = Path(__file__).parents[2]


def test_the_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between any two of the three leaves the old file or the whole new one."""
    path = tmp_path / "new" / "folder" / "x.json"
    events: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def recorded_sync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        events.append(("rename", str(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_whole(path, b"content")
    temporary = events[0][1]
    assert Path(temporary).parent == path.parent
    assert events == [("sync", temporary), ("rename", temporary), ("sync", str(path.parent))]
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    """A full disk or Ctrl-C half-way: the old content stays, and nothing lies beside it."""
    path = tmp_path / "x"
    write_whole(path, b"old")

    def write_half() -> None:
        with whole_file(path) as temporary:
            temporary.write_bytes(b"ne")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    """SIGKILL before the rename: the old file is whole, and its leftover can be removed."""
    path = tmp_path / "sub" / "x"
    write_whole(path, b"old")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from foundation.durable_files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"
    assert len(list(path.parent.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert list(path.parent.iterdir()) == [path]


def test_leftovers_are_told_by_their_whole_name(tmp_path: Path) -> None:
    """Only names with a random token go; other people's .tmp files and links stay."""
    write_whole(tmp_path / "x", b"content")
    (tmp_path / "x.0123abcd.tmp").write_bytes(b"left by a kill")
    for name in ("notes.tmp", "x.0123abc.tmp", "x.0123ABCD.tmp"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "x.89abcdef.tmp").symlink_to(tmp_path / "notes.tmp")
    (tmp_path / "folder.89abcdef.tmp").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before - {"x.0123abcd.tmp"}


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_written_through(tmp_path: Path, dangling: bool) -> None:
    """The file behind a link gets the content, also when there was none; the link stays."""
    target, link = tmp_path / "elsewhere" / "x", tmp_path / "x"
    target.parent.mkdir()
    if not dangling:
        target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """Both write all of theirs; the later rename wins."""
    path = tmp_path / "x"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1])
@pytest.mark.parametrize("from_disk", [True, False])
def test_an_entry_is_size_and_checksum(tmp_path: Path, size: int, from_disk: bool) -> None:
    """Read in blocks it is that of the content as a whole."""
    path = tmp_path / "x"
    content = os.urandom(size)
    path.write_bytes(content)
    expected = FileEntry(size, xxhash.xxh3_128_hexdigest(content))
    assert read_entry(path, from_disk=from_disk) == entry_of(content) == expected


def test_reading_from_the_disk_forgets_what_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is asked to drop the file's pages first, and only then."""
    path = tmp_path / "x"
    write_whole(path, b"content")
    asked: list[tuple[int, int, int]] = []

    def advise(_descriptor: int, offset: int, length: int, advice: int) -> None:
        asked.append((offset, length, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    read_entry(path, from_disk=False)
    assert asked == []
    read_entry(path)
    assert asked == [(0, 0, os.POSIX_FADV_DONTNEED)]
