"""`headway COMMAND`: the commands of all packages under one name."""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.extensions.commands import parser_of
from pipeline import __version__
from pipeline.checkpoint.file_names import FOLDER, step_folder
from pipeline.commands import COMMANDS, describe, kind_of, main
from pipeline.config.sections import CheckpointSection
from tests.support.checkpoint_cases import commit

ROOT = Path(__file__).parents[2]
PACKAGES = ("foundation", "data_prep", "model", "pipeline")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints and two lines of metrics."""
    directory = tmp_path / "run"
    for step in (2, 4):
        commit(directory, step, CheckpointSection(every_steps=2, keep=2), eval_loss=3.0)
    lines = [f'{{"step": {step}, "loss_head_1": {5.0 - step}}}\n' for step in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return directory


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def _modules_that_run() -> set[str]:
    """Modules of the packages with a `__main__` block."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
            if "__name__ == '__main__'" in tests:
                found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def test_every_command_of_the_packages_is_listed() -> None:
    """A module that can be run as a program has a name in the list, and nothing else has."""
    listed = {module for command in COMMANDS.values() for module in command.modules}
    assert listed == _modules_that_run() - {"pipeline.commands"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_arguments_and_the_name_it_was_called_by(name: str) -> None:
    """The functions are those that `python -m` calls; by default they go by that name."""
    for module in COMMANDS[name].modules:
        function = getattr(importlib.import_module(module), COMMANDS[name].function)
        arguments, prog = inspect.signature(function).parameters.values()
        assert arguments.default is None
        assert prog.default in (f"python -m {module}", f"python {module.replace('.', '/')}.py")


def test_the_list_imports_no_command() -> None:
    """`headway --help` starts in no time: of the packages, only the list itself is imported."""
    code = (
        "import sys; from pipeline.commands import main; main(['--help']); main(['--version']); "
        f"print(sorted(name for name in sys.modules if name.partition('.')[0] in {PACKAGES}))"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert describe() in done.stdout
    assert f"headway {__version__}\n" in done.stdout
    assert done.stdout.endswith("['pipeline', 'pipeline.commands']\n")


def test_no_help_waits_for_torch() -> None:
    """Every command's usage begins with how it was called, and is shown without torch."""
    code = """
import sys
from pipeline.commands import COMMANDS, main

for name in COMMANDS:
    try:
        code = main([name, "--help"])
    except SystemExit as end:
        code = end.code
    assert not code, (name, code)
    assert "torch" not in sys.modules, name
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert done.stdout.count(f"usage: headway {name} [") == len(command.modules), name


def test_without_a_command_the_list_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command is in it, with a summary."""
    assert main([]) == 0
    assert capsys.readouterr().out == describe() + "\n"
    for name, command in COMMANDS.items():
        assert any(
            line.split() == [name, *command.summary.split()] for line in describe().splitlines()
        )


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    assert main(["exprot", "runs/x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: headway has no command 'exprot'; did you mean 'export'? ")
    assert error.count("\n") == 1
    assert main(["zzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_a_shard_set_is_inspected_and_reported_by_data_prep(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options may stand before PATH, also such with a value that is no path."""
    assert main(["inspect", str(shards)]) == 0
    assert capsys.readouterr().out.startswith(f"{shards} (train)\n")
    assert main(["inspect", "--split", "validation", "--document", "0", str(shards)]) == 0
    assert "document  0" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["report", "--output", str(page), str(shards)]) == 0
    assert "shard set" in page.read_text()


def test_a_run_is_inspected_and_reported_by_the_pipeline(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, its checkpoints' folder or one of them; exit codes are the command's own."""
    assert main(["report", str(run_dir)]) == 0
    assert (run_dir / "report.html").is_file()
    for path in (run_dir, run_dir / FOLDER, step_folder(run_dir / FOLDER, 2)):
        assert main(["inspect", "--verify", str(path)]) == 0
    assert "every checksum" in capsys.readouterr().out
    (step_folder(run_dir / FOLDER, 4) / "state.json").unlink()
    assert main(["inspect", str(run_dir)]) == 1
    (run_dir / "metrics.jsonl").unlink()
    assert main(["report", str(run_dir)]) == 1
    assert "metrics.jsonl does not exist" in capsys.readouterr().err


def test_damaged_folders_are_still_told_apart(shards: Path, run_dir: Path, tmp_path: Path) -> None:
    """What one looks at is often damaged: the manifest alone tells, and so does all but it."""
    for name, source, kind in (
        ("set", shards, "shard set"),
        ("checkpoint", step_folder(run_dir / FOLDER, 4), "run"),
    ):
        bare, without = tmp_path / f"bare_{name}", tmp_path / f"no_manifest_{name}"
        bare.mkdir()
        shutil.copy(source / "manifest.json", bare)
        shutil.copytree(source, without)
        (without / "manifest.json").unlink()
        assert kind_of(bare) == kind_of(without) == kind, name


def test_shards_below_a_run_do_not_make_it_a_shard_set(shards: Path, run_dir: Path) -> None:
    """A run may keep its data in a folder named shards; a mixture of both in one is refused."""
    shutil.copytree(shards, run_dir / "shards")
    assert kind_of(run_dir) == "run"
    assert kind_of(run_dir / "shards") == "shard set"
    shutil.copytree(shards / "shards", run_dir / "shards", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds both a shard set and a run"):
        kind_of(run_dir)


def test_other_paths_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each: what it is, what was looked for, what to give; exit code 2."""
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "manifest.json").write_text("[]")
    for path, reason in (
        (tmp_path / "list", "is neither a shard set"),
        (tmp_path / "nowhere", "does not exist"),
        (run_dir / "metrics.jsonl", f"is a file; give its folder, {run_dir}"),
    ):
        for command in ("inspect", "report"):
            assert main([command, str(path)]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"error: {path} {reason}")
            assert error.count("\n") == 1
    assert main(["inspect", "--verify"]) == 2
    assert "needs a PATH" in capsys.readouterr().err


def test_train_ends_the_process_as_the_module_does(tmp_path: Path) -> None:
    """It exits with its own code at once: nothing that is registered for the exit can hang it."""
    code = """
import atexit, sys
from pipeline.commands import main

atexit.register(print, "at exit")
sys.exit(main(["train", sys.argv[1]]))
"""
    path = tmp_path / "nowhere.yaml"
    done = _python(code, str(path))
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert done.stderr.startswith("error: ")
    assert "at exit" not in done.stdout


@pytest.mark.parametrize("module", sorted({m for c in COMMANDS.values() for m in c.modules}))
def test_help_has_texts_examples_and_exit_codes(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option says what it does; the page ends with examples and what an exit code means."""
    parser = parser_of(module)
    assert all(action.help for action in parser._actions), module
    parser.print_help()
    page = capsys.readouterr().out
    assert "example:\n  " in page or "examples:\n  " in page
    assert "exit status: 0 " in page
    assert max(map(len, page.splitlines())) <= 110
