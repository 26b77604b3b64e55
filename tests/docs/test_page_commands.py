"""Commands and programs that the pages mark with `run` do run, in a small copy of the tree."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.run_config import load_config
from tests.docs.sandbox import Sandbox, made_by, make_once, small_config
from tests.support.command_server import CommandServer
from tests.support.long_forms import part_of
from tests.support.page_blocks import ROOT, Block, blocks_of, pages

RUNNABLE = {
    str(path.relative_to(ROOT)): list(blocks_of(path))
    for path in pages()
    if any(block.kind == "run" for block in blocks_of(path))
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    """Commands that start in a fraction of a second."""
    with CommandServer(tmp_path_factory.mktemp("commands")) as running:
        yield running


@pytest.fixture(scope="module")
def made(server: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sandbox with shards, a Llama, a finished run and its export."""
    sandbox = Sandbox(tmp_path_factory.mktemp("pages") / "made", server)
    make_once(sandbox)
    return sandbox.folder


@pytest.mark.parametrize(
    "page",
    part_of(sorted(RUNNABLE), lambda _, page: page != "docs/tutorials/heads_on_a_llama.md"),
    ids=str,
)
def test_blocks_of_the_page_run(
    page: str, server: CommandServer, made: Path, tmp_path: Path
) -> None:
    """One after the other, as a reader types them; each ends with the status that it should."""
    sandbox = Sandbox(tmp_path / "sandbox", server)
    run = [block for block in RUNNABLE[page] if block.kind in ("run", "file")]
    sandbox.fill(made, made_by(run))
    for block in run:
        sandbox.run(block)


def test_metrics_page_has_every_key(made: Path) -> None:
    """Each key that a run writes is explained; heads are k there."""
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    lines = (made / "runs/1b/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    written = {re.sub(r"head_\d+$", "head_k", key) for line in lines for key in json.loads(line)}
    assert len(written) >= 10
    assert written - explained == set()


@pytest.mark.parametrize("folder", ["data/corpus", "runs/1b", "runs/1b/checkpoints", "export"])
def test_files_page_names_every_file(folder: str, made: Path) -> None:
    """What commands leave behind is explained."""
    page = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    names = {re.sub(r"\d{5,}", "", path.name) for path in (made / folder).iterdir()}
    assert len(names) >= 2
    assert {name for name in names if name.rstrip("_") not in page} == set()


def test_there_are_pages_with_commands() -> None:
    """The README's and the reference's commands are among those that run."""
    assert {"README.md", "docs/reference/commands.md"} <= RUNNABLE.keys()


def test_small_configurations_are_valid_runs(server: CommandServer, tmp_path: Path) -> None:
    """Every configuration of the repository has a small form, with the same sections."""
    sandbox = Sandbox(tmp_path / "sandbox", server)
    names = [path.name for path in (ROOT / "configs").glob("*.yaml")]
    assert "1b.yaml" in names
    for name in names:
        small = load_config(sandbox.folder / "configs" / name)
        assert small.run.name == load_config(ROOT / "configs" / name).run.name
        assert small.model.hidden_size == 32


def test_a_failing_block_is_named(server: CommandServer, tmp_path: Path) -> None:
    """Position, status and output of what failed; a command in the middle counts, too."""
    sandbox = Sandbox(tmp_path / "sandbox", server)
    block = Block("page.md", 7, "bash", "run", "", "python -c 'raise SystemExit(5)'\necho on\n")
    with pytest.raises(AssertionError, match=r"page\.md:7: exit status 5, not 0"):
        sandbox.run(block)
    sandbox.run(block._replace(value="exits 5"))


def test_commands_behave_as_with_a_fresh_interpreter(server: CommandServer, tmp_path: Path) -> None:
    """Arguments, folder, variables, pipes, input and status pass through the fast client."""
    sandbox = Sandbox(tmp_path / "sandbox", server)
    program = "import os, sys; print(sys.argv[1], os.environ['X'], os.getcwd(), sys.stdin.read())"
    said = sandbox.shell(f'echo in | X=v python -c "{program}" a | tr a-z A-Z')
    assert said.split() == ["A", "V", str(sandbox.folder).upper(), "IN"]
    assert "kill" not in sandbox.shell("python -c 'import os; os.kill(os.getpid(), 9)' || true")


def test_page_that_makes_a_thing_starts_without_it() -> None:
    """What a page builds itself is not put there for it."""
    block = Block("page.md", 1, "bash", "run", "", "python x.py --output data/corpus --y\n")
    assert made_by([block]) == ["data/corpus"]
    train = "python -m pipeline.train configs/1b.yaml"
    assert made_by([block._replace(text=f"{train} --set train.steps=2\n")]) == ["runs/1b"]
    assert made_by([block._replace(text=f"{train} --set run.name=b\n")]) == []
    assert made_by([block._replace(text=f"{train} --dry-run\n")]) == []
    assert made_by([block._replace(text="python -m pipeline.export runs/1b export/\n")]) == [
        "export"
    ]


def test_small_configuration_keeps_what_it_does_not_shrink() -> None:
    """Optimizer and name are the repository's."""
    large = load_config(ROOT / "configs" / "1b.yaml").model_dump(mode="json")
    small = small_config(large)
    assert small["optimizer"] == large["optimizer"]
    assert small["model"]["future_tokens"] == large["model"]["future_tokens"]
