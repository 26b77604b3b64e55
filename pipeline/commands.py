"""Command line: every command under one name, `headway COMMAND ...`.

`headway train X` is `python -m pipeline.train X`: the same function with the same arguments, output
and exit code. Only the module of the command that is called gets imported, so `headway --help`
takes no time and `headway shard` never waits for torch. `inspect` and `report` are two commands
each, one of data_prep and one of pipeline; what PATH is decides which.
"""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline import __version__

PROGRAM = "headway"
EXIT_USAGE = 2
_MANIFEST_BYTES = 1 << 30
Kind = Literal["shard set", "run"]
_KINDS: tuple[Kind, ...] = ("shard set", "run")


class Command(NamedTuple):
    """A command of the list.

    Attributes:
        summary: what it does, in a few words.
        modules: one module; or two, for a shard set and for a run or checkpoint.
        function: called with the arguments and the program's name; gives the exit code.
    """

    summary: str
    modules: tuple[str, ...]
    function: str = "main"


COMMANDS = {
    "shard": Command("tokenize a corpus into a shard set", ("data_prep.shard",)),
    "verify": Command("check a shard set from end to end", ("data_prep.verify",)),
    "inspect": Command(
        "show what is in a shard set, a run or a checkpoint",
        ("data_prep.inspect", "pipeline.inspect"),
    ),
    "report": Command(
        "write an HTML page about a shard set or a run", ("data_prep.report", "pipeline.report")
    ),
    "export-megatron": Command(
        "write a shard set as Megatron's .bin and .idx", ("data_prep.export_megatron",)
    ),
    "plan": Command("say whether a run fits a cluster, and how long it takes", ("pipeline.plan",)),
    # `run` ends the process itself, as `python -m pipeline.train` does.
    "doctor": Command("say whether a cluster is fit for a run", ("pipeline.doctor",), "run"),
    "train": Command("pretrain, or resume from a checkpoint", ("pipeline.train",), "run"),
    "submit": Command("check a run and put it into Slurm's queue", ("pipeline.submit",)),
    "export": Command("write a checkpoint as a Hugging Face model", ("pipeline.export",)),
    "generate": Command("generate text from an export", ("model.generate",)),
    "serve": Command("serve an export over HTTP, like OpenAI's API", ("model.serve",)),
    "evaluate": Command("measure what a model is worth", ("pipeline.evaluate",)),
    "quickstart": Command("run everything once, in minutes", ("pipeline.quickstart",)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give its exit code. `train` ends the process instead of returning."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(describe())
        return 0
    if given[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    name, rest = given[0], given[1:]
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return _refuse(
            f"{PROGRAM} has no command '{name}'; {hint}the commands are {', '.join(COMMANDS)}"
        )
    prog = f"{PROGRAM} {name}"
    if len(command.modules) == 1:
        return _call(command.modules[0], command.function, rest, prog)
    return _run_by_path(command, rest, prog)


def describe() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROGRAM} COMMAND ...", ""]
    lines += [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", f"{PROGRAM} COMMAND --help lists a command's options; --version, the version."]
    return "\n".join(lines)


def kind_of(path: Path) -> Kind:
    """Whether a folder is a shard set, or a run, its checkpoints or one of them.

    Raises:
        ValueError: it is none of these, or both; says what was looked for.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file; give its folder, {path.parent}")
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist; give the folder of a shard set, run or checkpoint"
        )
    is_set = (path / "shards" / "train").is_dir() or (path / "journal").is_dir()
    is_run = (
        any((path / name).is_file() for name in ("metrics.jsonl", "state.json", "latest"))
        or any((path / name).is_dir() for name in ("checkpoints", "tensors"))
        or any(path.glob("step_*/state.json"))
    )
    if not is_set and not is_run:
        # All else may be lost; the manifests have the same name, but list different things.
        listed = _manifest_keys(path)
        is_set, is_run = "shards" in listed, "files" in listed
    if is_set and is_run:
        raise ValueError(
            f"{path} holds both a shard set and a run; call python -m data_prep.COMMAND or "
            "python -m pipeline.COMMAND, and keep shards and runs in folders of their own"
        )
    if not is_set and not is_run:
        raise ValueError(
            f"{path} is neither a shard set (manifest.json and shards/) nor a run or checkpoint "
            "(checkpoints/, metrics.jsonl or state.json); give the folder of one of these"
        )
    return "shard set" if is_set else "run"


def _manifest_keys(path: Path) -> set[str]:
    from foundation.json_text import read_json  # here and below: --help imports this file alone

    try:
        content = read_json(path / "manifest.json", _MANIFEST_BYTES)
    except (OSError, ValueError):
        return set()
    return set(content) if isinstance(content, dict) else set()


def _run_by_path(command: Command, arguments: Sequence[str], prog: str) -> int:
    """Call the command for what PATH is: the first argument that is a shard set or a run."""
    paths = [Path(argument) for argument in arguments if not argument.startswith("-")]
    if not paths and not {"-h", "--help"}.isdisjoint(arguments):
        return _show_help_of_both(command, prog)
    if not paths:
        return _refuse(f"{prog} needs a PATH: the folder of a shard set, a run or a checkpoint")
    from foundation.shown_text import told

    found: Kind | None = None
    reasons: list[str] = []
    for path in paths:
        try:
            found = kind_of(path)
            break
        except OSError as error:
            reasons.append(told(error))
        except ValueError as error:
            reasons.append(str(error))
    if found is None:
        return _refuse(reasons[0])
    return _call(command.modules[_KINDS.index(found)], command.function, arguments, prog)


def _show_help_of_both(command: Command, prog: str) -> int:
    for kind, module in zip(_KINDS, command.modules, strict=True):
        print(f"== {prog} PATH, where PATH is a {kind}{' or checkpoint' * (kind == 'run')}\n")
        try:
            _call(module, command.function, ["--help"], prog)
        except SystemExit as end:
            if end.code:
                raise
        print()
    return 0


def _call(module: str, function: str, arguments: Sequence[str], prog: str) -> int:
    called: Any = getattr(importlib.import_module(module), function)
    code: int = called(list(arguments), prog)
    return code


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
