"""Files for contributors and their tools: they parse, and name only what exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foundation.yaml_text import parse_yaml
from pipeline import __version__
from pipeline.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML = [*FORMS, *WORKFLOWS, ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
TEXTS = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *(ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md", ROOT / "examples" / "README.md"),
    *YAML,
]
SECTIONS = ["Added", "Changed", "Fixed", "Removed"]
_FOLDERS = "benchmarks|configs|data_prep|examples|model|pipeline|slurm|tests|\\.ci|\\.github"
_PATH = re.compile(rf"(?<![\w./-])((?:{_FOLDERS})/[\w./-]*\w|[\w-]+\.(?:py|md|toml|sh|cff))\b")
# Files of an export, not of the repository.
_ELSEWHERE = {"modeling_headway.py"}


def _load(path: Path) -> Any:
    return parse_yaml(path.read_text(encoding="utf-8"))


def _make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_it_is_yaml_without_repeated_keys(path: Path) -> None:
    """Whatever reads it gets a mapping, the same one from every reader."""
    assert isinstance(_load(path), dict)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_it_names_exists(path: Path) -> None:
    """Paths, make targets and commands."""
    text = path.read_text(encoding="utf-8")
    named = {name for name in _PATH.findall(text) if name not in _ELSEWHERE}
    folders = (ROOT, path.parent, ROOT / "examples")
    assert {n for n in named if not any((folder / n).exists() for folder in folders)} == set()
    assert set(re.findall(r"`make ([a-z]+)", text)) - _make_targets() == set()
    commands = set(re.findall(r"`headway ([a-z][\w-]*)", text))
    assert commands - set(COMMANDS) == set()


def test_hooks_run_what_make_check_runs() -> None:
    """The configuration is valid to pre-commit, and each tool is called as in the Makefile."""
    path = ROOT / ".pre-commit-config.yaml"
    subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", str(path)], check=True, timeout=120
    )
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    hooks = [hook for repository in _load(path)["repos"] for hook in repository["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "mypy"}
    for hook in hooks:
        interpreter, _, module, *arguments = hook["entry"].split()
        assert interpreter == ".venv/bin/python"
        assert re.search(rf"^{module}==", pinned, re.MULTILINE)
        same = " ".join(["-m", module, *(a for a in arguments if a != "--force-exclude")])
        assert f"$(python) {same}" in makefile, hook["id"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_scripts_of_the_repository(path: Path) -> None:
    """Each step is an action of a fixed major version or an executable file; rights are few."""
    workflow = _load(path)
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
        else:
            script = ROOT / step["run"]
            assert script.is_file(), step["run"]
            assert script.stat().st_mode & 0o111, f"{script} is not executable"
    assert any(step.get("run") == ".ci/run" for step in steps)
    for name in re.findall(r"^ +([\w.]+\.(?:txt|py))$", path.read_text(), re.MULTILINE):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_what_forms_need(path: Path) -> None:
    """Name, description and fields with ids of their own, as the issue tracker wants them."""
    form = _load(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"].get("value" if field["type"] == "markdown" else "label")
        for option in field["attributes"].get("options", ()):
            assert option["label"]
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_pull_request_asks_for_every_proof() -> None:
    """Each row of the table in CONTRIBUTING.md has its line in the template."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## The proof a change owes") :].split("\n\n")[1]
    rows = table.splitlines()[2:]
    template = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    proof = template[template.index("## Proof") : template.index("## Checks")]
    assert proof.count("- [ ]") == len(rows)


def test_the_citation_is_of_this_version() -> None:
    """The fields that the format requires, this version, and the paper's authors and number."""
    citation = _load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert paper["authors"][0]["family-names"] == "Gloeckle"
    (number,) = (entry["value"].removeprefix("arXiv:") for entry in paper["identifiers"])
    assert f"arxiv.org/abs/{number}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_keeps_its_form() -> None:
    """The newest version is this one, with the four kinds of changes, none said twice."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert re.fullmatch(r"## \[(.+)\] - (unreleased|\d{4}-\d\d-\d\d)", versions[0])
    assert versions[0].startswith(f"## [{__version__}]")
    assert [line[4:] for line in lines if line.startswith("### ")] == SECTIONS * len(versions)
    entries = [line for line in lines if line.startswith("- ")]
    assert len(set(entries)) == len(entries) > 20
