"""Every command of data_prep ends with one clear line, whatever it is given, whatever happens."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import export_megatron, inspect, report, verify
from data_prep.building import build as build_module
from data_prep.building.unit import encode_unit
from data_prep.errors import DataError, print_error, run_command
from data_prep.shard import main
from data_prep.shards import shard_checks
from data_prep.shards.manifest import Manifest

Write = Callable[..., Path]
LONG = "x" * 300
FAR = "/".join(["y" * 200] * 30)
COMMANDS = {
    "verify": verify.main,
    "inspect": inspect.main,
    "report": report.main,
    "export_megatron": lambda given: export_megatron.main([*given, "out/megatron"]),
}


@pytest.mark.parametrize("value", [LONG, FAR, "a\0b", "a\udcff", "a\nb", "a\x1b[31mb"])
@pytest.mark.parametrize(
    "option", ["--input", "--output", "--tokenizer", "--source", "--config", "--eos-token"]
)
def test_odd_values_of_options(
    tmp_path: Path, texts: list[str], write_jsonl: Write, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, option: str, value: str,
) -> None:  # fmt: skip
    """Too long, NUL, not UTF-8, of several lines or with signs for the terminal: one line."""
    monkeypatch.chdir(tmp_path)
    given = {"--input": str(write_jsonl(texts[:3])), "--output": "out", "--tokenizer": "bytes"}
    arguments = [part for pair in (given | {option: value}).items() for part in pair]
    code = main([*arguments, "--workers", "1"])
    printed = capsys.readouterr()
    is_odd_folder = option == "--output" and value in ("a\nb", "a\x1b[31mb")
    assert code == (0 if is_odd_folder else 1), printed.err
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (not is_odd_folder)
    assert len(printed.err) < 2000
    assert "\x1b" not in printed.err + printed.out


@pytest.mark.parametrize("name", [LONG, FAR, "a\0b", "a\udcff"])
@pytest.mark.parametrize("command", COMMANDS)
def test_odd_names_of_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    command: str, name: str,
) -> None:  # fmt: skip
    """There is no such set, which is said in one line."""
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[command]([name]) == 1
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert len(printed) < 2000 or command == "verify"


@pytest.mark.parametrize("name", [LONG, "a\0b"])
def test_odd_names_of_pages(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Callable[..., Manifest],
    capsys: pytest.CaptureFixture[str], name: str,
) -> None:  # fmt: skip
    """The page that cannot be written is named."""
    build_set(write_jsonl(texts))
    assert report.main([str(tmp_path / "out"), "--output", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write ")


def test_the_output_is_deleted_meanwhile(
    tmp_path: Path, texts: list[str], write_jsonl: Write, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Somebody removes the folder in the middle: the build says so and ends."""
    output = tmp_path / "out"

    def deleting(job: object, number: int) -> object:
        if number == 2:
            output.rename(tmp_path / "elsewhere")
        return encode_unit(job, number)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "encode_unit", deleting)
    arguments = ["--input", str(write_jsonl(texts)), "--output", str(output), "--tokenizer"]
    assert main([*arguments, "bytes", "--workers", "1", "--unit-bytes", "4000"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(output) in errors[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("closed", ["a.jsonl", "folder", "closed"])
def test_no_permission(
    tmp_path: Path, texts: list[str], write_jsonl: Write, capsys: pytest.CaptureFixture[str],
    closed: str,
) -> None:  # fmt: skip
    """On an input, its folder or the output: the path and the reason."""
    write_jsonl(texts, "a.jsonl")
    write_jsonl(texts, "folder/b.jsonl")
    (tmp_path / "closed").mkdir()
    (tmp_path / closed).chmod(0)
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "folder")]
    output = str(tmp_path / "closed" / "out")
    assert main(["--input", *inputs, "--output", output, "--tokenizer", "bytes"]) == 1
    printed = capsys.readouterr().err
    (tmp_path / closed).chmod(0o700)
    assert f"{tmp_path / closed}" in printed
    assert "Permission denied" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(("command", "step"), [("verify", "read_shard"), ("inspect", "_read")])
def test_ctrl_c(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Callable[..., Manifest],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest, command: str, step: str,
) -> None:  # fmt: skip
    """Exit status 130 and one line, of the commands that read a whole set, too."""
    build_set(write_jsonl(texts))
    # A job in the background of a shell ignores Ctrl-C, and so would these tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    module = {"verify": shard_checks, "inspect": inspect}[command]
    monkeypatch.setattr(module, step, lambda _: signal.raise_signal(signal.SIGINT))
    arguments = [str(tmp_path / "out"), *(["--search", "x"] if command == "inspect" else [])]
    assert COMMANDS[command](arguments) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_long_and_odd_messages_are_shown_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that a terminal would act on, and no page full of a name."""
    print_error(DataError(f"\x1b[2J{'a' * 9000}\udcff\nsecond"))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: \\x1b[2Jaaa")
    assert first.endswith("a\\udcff")
    assert len(first) < 1700
    assert second == "error: second"


def test_errors_of_the_system_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What no message foresees still names its path and its reason."""

    def run() -> int:
        return len(os.listdir("/nowhere/at all"))

    assert run_command(run) == 1
    assert capsys.readouterr().err == (
        "error: /nowhere/at all: No such file or directory; check that it is there, its name and "
        "its permissions, and run the same command again\n"
    )
