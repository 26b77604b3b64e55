"""The console script, and the check that Python finds Headway's own packages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import NEIGHBORS, __version__, check_neighbors

ROOT = Path(__file__).resolve().parent.parent
STRANGER = "raise SystemExit('the stranger was run')\n"


def _python(*arguments: str, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _add_stranger(folder: Path, name: str, *, package: bool) -> Path:
    """A module or package of somebody else, which says so when it is run; gives its file."""
    file = folder / name / "__init__.py" if package else folder / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(STRANGER)
    return file


def test_it_runs_as_a_module_from_anywhere(tmp_path: Path) -> None:
    """`python -m headway` is the console script."""
    done = _python("-m", "headway", "--version", cwd=tmp_path, path=[ROOT])
    assert (done.returncode, done.stdout) == (0, f"headway {__version__}\n"), done.stderr
    done = _python("-m", "headway", "verify", "nowhere", cwd=tmp_path, path=[ROOT])
    assert done.returncode == 1
    assert done.stderr.startswith("nowhere is not a directory")


@pytest.mark.parametrize("package", [True, False], ids=["package", "module"])
@pytest.mark.parametrize("name", ["pipeline", *NEIGHBORS])
def test_a_stranger_that_comes_first_is_named(tmp_path: Path, name: str, package: bool) -> None:
    """One line with the stranger's path, Headway's own, and what to do; nothing of it is run."""
    stranger = _add_stranger(tmp_path / "theirs", name, package=package)
    done = _python("-m", "headway", "--version", cwd=tmp_path, path=[tmp_path / "theirs", ROOT])
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the package '{name}' is {stranger}, not Headway's own")
    assert f"own {ROOT / name}" in done.stderr
    assert "PYTHONPATH" in done.stderr
    assert "virtual environment of its own" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "was run" not in done.stderr + done.stdout


def test_a_stranger_in_the_current_folder_is_named(tmp_path: Path) -> None:
    """`python -m` looks in the current folder first, where a file model.py is nothing unusual."""
    stranger = _add_stranger(tmp_path, "model", package=False)
    done = _python("-m", "pipeline.train", "--help", cwd=tmp_path, path=[ROOT])
    assert done.returncode == 1
    assert f"the package 'model' is {stranger}, not Headway's own" in done.stderr
    assert "from another folder" in done.stderr


def test_a_folder_without_modules_is_no_stranger(tmp_path: Path) -> None:
    """Python prefers a package to a folder of the same name, for example one with checkpoints."""
    (tmp_path / "model").mkdir()
    done = _python("-m", "headway", "--version", cwd=tmp_path, path=[tmp_path, ROOT])
    assert done.returncode == 0, done.stderr


def test_a_missing_neighbor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not there at all has the same error."""
    monkeypatch.setattr("pipeline.NEIGHBORS", ("a_package_that_is_not_there",))
    with pytest.raises(ImportError, match=r"'a_package_that_is_not_there' is not there, not"):
        check_neighbors(tmp_path)


def test_all_packages_of_the_installation_are_checked() -> None:
    """A package that setup.py gains is looked at, too."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = re.search(r"^PACKAGES = \((.+)\)$", text, re.MULTILINE)
    assert found is not None
    assert set(re.findall(r'"(\w+)"', found[1])) == {"pipeline", *NEIGHBORS}
