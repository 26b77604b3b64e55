"""The digest of source files: content and names count, places do not."""

import shutil
from pathlib import Path

from foundation.source_hash import bytes_digest, source_digest


def _package(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    (folder / "inner" / "b.py").write_text("y = 2\n")
    return folder


def test_a_copy_elsewhere_is_the_same_code(tmp_path: Path) -> None:
    """Compiled files and data beside the sources do not count, nor does the order of folders."""
    first, other = _package(tmp_path / "here" / "one"), _package(tmp_path / "here" / "two")
    digest = source_digest([first, other])
    copy = tmp_path / "there"
    shutil.copytree(tmp_path / "here", copy)
    (copy / "one" / "__pycache__").mkdir()
    (copy / "one" / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    assert source_digest([copy / "two", copy / "one"]) == digest


def test_any_change_shows(tmp_path: Path) -> None:
    """Of content, of a name, of where one file ends and the next begins; a file more or less."""
    package = _package(tmp_path / "one")
    seen = {source_digest([package])}
    (package / "a.py").write_text("x = 2\n")
    seen.add(source_digest([package]))
    (package / "a.py").rename(package / "c.py")
    seen.add(source_digest([package]))
    (package / "empty.py").touch()
    seen.add(source_digest([package]))
    assert len(seen) == 4
    assert bytes_digest(b"a") != bytes_digest(b"b")
