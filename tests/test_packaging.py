"""What an installation holds: the packages, the console script, and all that they import."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pipeline import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("foundation", "data_prep", "model", "pipeline")
# Used when they are there, or by a command that is an extra.
OPTIONAL = {"wandb", "liger_kernel", "lm_eval", "transformer_engine", "starlette", "uvicorn"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of what it is made of, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for neighbor in ("tests", "benchmarks", "examples", "configs", "slurm"):
        (source / neighbor).mkdir()
        (source / neighbor / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "headway.py", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "--wheel-dir", target, source], check=True, timeout=300)
    (path,) = target.glob("*.whl")
    return path


def test_the_wheel_holds_exactly_the_packages_and_the_script(wheel: Path) -> None:
    """Tests, configurations and scripts stay outside; no module or template is forgotten."""
    with zipfile.ZipFile(wheel) as content:
        modules = {name for name in content.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for pattern in ("*.py", "*.j2")
        for path in (ROOT / package).rglob(pattern)
    }
    typed = {f"{package}/py.typed" for package in PACKAGES}
    assert modules == expected | typed | {"headway.py"}


def test_the_wheel_has_the_console_script(wheel: Path) -> None:
    """`headway` is the one program of an installation."""
    with zipfile.ZipFile(wheel) as content:
        (name,) = (n for n in content.namelist() if n.endswith(".dist-info/entry_points.txt"))
        lines = content.read(name).decode().split("\n")
    assert [line for line in lines if line] == ["[console_scripts]", "headway = headway:main"]


def test_the_wheel_carries_its_license_and_version(wheel: Path) -> None:
    """The metadata name the project, its Python and its license, and the text is in it.

    The classifier makes an index refuse an upload: the packages' names are common ones.
    """
    with zipfile.ZipFile(wheel) as content:
        (metadata,) = (n for n in content.namelist() if n.endswith(".dist-info/METADATA"))
        text = content.read(metadata).decode()
        assert any(name.endswith("LICENSE") for name in content.namelist())
    assert re.search(r"^Name: headway$", text, re.MULTILINE)
    assert re.search(rf"^Version: {re.escape(__version__)}$", text, re.MULTILINE)
    assert re.search(r"^Classifier: Private :: Do Not Upload$", text, re.MULTILINE)
    assert re.search(r"^Requires-Python: >=3\.11$", text, re.MULTILINE)
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", text, re.MULTILINE)


def _requirements(text: str) -> set[str]:
    """Names in a list of requirements, in their normal form."""
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in text.splitlines())
    return {_normal(name.group()) for name in names if name}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _required() -> set[str]:
    """What setup.py asks for without an extra."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    given = {word.arg: word.value for word in call.keywords}
    return _requirements("\n".join(ast.literal_eval(given["install_requires"])))


def _third_party_imports() -> Iterator[str]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield node.module.partition(".")[0]


def test_everything_imported_is_required_by_setup() -> None:
    """An installation by the metadata alone can run every module."""
    installed = packages_distributions()
    names = set(_third_party_imports()) - set(sys.stdlib_module_names) - set(PACKAGES) - OPTIONAL
    distributions = {name: {_normal(d) for d in installed.get(name, [name])} for name in names}
    assert {name: d for name, d in distributions.items() if not d & _required()} == {}


def test_constraints_pin_every_requirement_to_one_version() -> None:
    """An installation with constraints.txt gets what was tested, on any machine."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    loose = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert loose == []
    assert _required() - _requirements("\n".join(lines)) == set()
