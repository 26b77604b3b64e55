"""Files of any origin are read when they are regular, inside their folder, and not too large."""

import os
from pathlib import Path

import pytest

from foundation.bounded_files import check_inside, check_regular, is_name_inside, read_bounded
from foundation.durable_files import read_entry
from tests.support.hostile import limits


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\x00b", "a\nb", "\ud800", "x" * 256],
)
def test_names_that_lead_elsewhere(name: str) -> None:
    """Absolute, upward, unprintable and too long names are told from names below a folder."""
    assert not is_name_inside(name)
    assert is_name_inside("a/b.safetensors")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe is not waited for, a device not read to an end that it lacks."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zeros", "folder", "missing"):
        for read in (read_bounded, check_regular, read_entry):
            with limits(2), pytest.raises(OSError, match=r"regular|directory"):
                read(tmp_path / name)


def test_files_are_read_up_to_a_bound(tmp_path: Path) -> None:
    """A sparse file of a terabyte is refused without reading it."""
    (tmp_path / "whole").write_bytes(b"1234")
    assert read_bounded(tmp_path / "whole", 4) == b"1234"
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with limits(2), pytest.raises(OSError, match="larger than"):
        read_bounded(tmp_path / "sparse")


def test_links_out_of_a_folder_are_seen(tmp_path: Path) -> None:
    """Links within it are no fault, nor that the folder is itself reached through one."""
    inside, linked = tmp_path / "inside", tmp_path / "linked"
    inside.mkdir()
    linked.symlink_to(inside)
    (tmp_path / "secret").write_text("x")
    (inside / "out").symlink_to("../secret")
    (inside / "file").write_text("x")
    (inside / "within").symlink_to("file")
    check_inside(linked, linked / "within")
    check_inside(inside, linked / "file")
    with pytest.raises(OSError, match="leads out"):
        check_inside(linked, linked / "out")
