"""Options of the command that evaluates a model: the parser, and what values must be."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from foundation.shown_text import printable
from model.errors import CheckpointError, ConfigError
from model.hugging_face.folder import RECORD_NAME

_MOST_SHOTS = 8
# What training leaves in the folder of a run or of a checkpoint, and an export never has.
_OF_A_RUN = ("checkpoints", "metrics.jsonl", "state.json", "tensors", "latest")

EPILOG = """\
examples:
  PROG export --data data/corpus
  PROG export --text book.txt notes.jsonl --prompts 32 --json figures.json
  PROG export --problems HumanEval.jsonl.gz --samples 20 --k 1,10 --temperature 0.8
  PROG export --lm-eval my_task --include-path tasks

exit status: 0 the figures are printed, 1 the model, a file or an option cannot be used (in one
line), 2 wrong arguments, 130 after Ctrl-C
"""


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The options of a command line; exits where they cannot be read."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(
            "Say what a model is worth: loss and bits per byte of each head on text that it was\n"
            "not trained on, tokens per forward, and how many problems its code solves. Give one\n"
            "or several of --data, --text, --problems and --lm-eval."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="an export, or another Hugging Face Llama")
    add("--json", type=Path, metavar="FILE", help="write all figures there, too")
    add("--dtype", choices=("fp32", "bf16"), help="arithmetic (as stored)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (auto)")
    _add_text(parser)
    _add_problems(parser)
    _add_harness(parser)
    options = parser.parse_args(arguments)
    if not (options.data or options.text or options.problems or options.lm_eval):
        parser.error("one of --data, --text, --problems and --lm-eval is required")
    return options


def _add_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("text that it was not trained on").add_argument
    add("--data", type=Path, metavar="SHARDS", help="a shard set; its sources are kinds of text")
    add("--split", default="validation", metavar="NAME", help="which part of it (validation)")
    add(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text, a document each, or JSON lines, a document a line; .gz too",
    )
    add("--text-key", default="text", metavar="KEY", help="of JSON lines: the text (text)")
    add(
        "--kind-key",
        default="source",
        metavar="KEY",
        help="of JSON lines: the kind of text, else the file's name (source)",
    )
    add(
        "--documents",
        choices=("auto", "joined", "apart"),
        default="auto",
        help="whether a document sees the ones before it (auto: as the model was trained)",
    )
    add("--window", type=int, metavar="W", help="tokens read at once (as it was trained)")
    add("--stride", type=int, metavar="N", help="tokens between the starts of windows (W)")
    add("--max-tokens", type=int, metavar="N", help="of each kind of text, from its first (all)")
    add("--prompts", type=int, default=16, metavar="N", help="of each kind, to decode from (16)")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="of a prompt (32)")
    add("--new-tokens", type=int, default=64, metavar="N", help="after a prompt, at most (64)")


def _add_problems(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("programming problems").add_argument
    add("--problems", type=Path, metavar="FILE", help=".jsonl[.gz] of HumanEval or MBPP")
    add("--shots", type=int, default=0, metavar="N", help="solved tasks before each of MBPP (0)")
    add("--samples", type=int, default=1, metavar="N", help="completions of each problem (1)")
    add("--k", default="1", metavar="K[,K]", help="for pass@k, each at most --samples (1)")
    add("--temperature", type=float, default=0.2, metavar="T", help="0 = the likeliest token (0.2)")
    add("--top-p", type=float, default=0.95, metavar="P", help="draw from the likeliest P (0.95)")
    add("--seed", type=int, default=0, metavar="S", help="of the completions (0)")
    add("--heads", type=int, metavar="K", help="that draft; changes the speed alone (all)")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="of a completion (512)")
    add("--time-limit", type=float, default=5.0, metavar="S", help="of a program, seconds (5)")
    add("--memory-mib", type=int, default=512, metavar="N", help="of each of its processes (512)")
    add("--workers", type=int, metavar="N", help="programs that run at once (CPUs)")
    add("--results", type=Path, metavar="FILE", help="write every completion and its verdict there")
    add(
        "--allow-unsandboxed",
        action="store_true",
        help="where programs cannot be locked up, run them with all that your account may do",
    )


def _add_harness(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("lm-evaluation-harness").add_argument
    add("--lm-eval", metavar="TASK[,TASK]", help="tasks, run on trunk and head 1")
    add("--include-path", type=Path, metavar="FOLDER", help="with YAML files of your own tasks")
    add("--limit", type=int, metavar="N", help="documents of each task (all)")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences of a forward (8)")


def check(options: argparse.Namespace) -> None:
    """See that the folder and the numbers make sense.

    Raises:
        CheckpointError: the folder holds no exported model.
        ConfigError: naming the first option that does not make sense.
    """
    check_folder(options.directory)
    for name in (
        *("window", "stride", "max_tokens", "prompt_tokens", "new_tokens", "samples", "heads"),
        *("max_new_tokens", "memory_mib", "workers", "limit", "batch_size"),
    ):
        value = getattr(options, name)
        if value is not None and not 1 <= value < 1 << 40:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} {value} must be at least 1; give a larger number")
    if options.prompts < 0:
        raise ConfigError(f"--prompts {options.prompts} must be at least 0; 0 decodes nothing")
    if not 0 <= options.shots <= _MOST_SHOTS:
        raise ConfigError(
            f"--shots {options.shots} must be from 0 to {_MOST_SHOTS}; 3 is MBPP's usual form"
        )
    if not 0 <= options.seed < 1 << 63:
        raise ConfigError(f"--seed {options.seed} must be from 0 to 2^63 - 1; the default is 0")
    if not 0.1 <= options.time_limit <= 3600:
        raise ConfigError(
            f"--time-limit {options.time_limit:g} must be from 0.1 to 3,600 seconds; the default "
            "is 5"
        )
    _check_sampling(options)
    for name in ("json", "results"):
        path = getattr(options, name)
        if path is not None and path.is_dir():
            raise ConfigError(f"--{name} {path} is a folder; give the name of a file")


def _check_sampling(options: argparse.Namespace) -> None:
    if options.temperature != 0 and not 1e-3 <= options.temperature <= 1e3:
        raise ConfigError(
            f"--temperature {options.temperature:g} must be 0 or from 0.001 to 1,000; the default "
            "is 0.2"
        )
    if options.temperature == 0 and options.samples > 1:
        raise ConfigError(
            f"--temperature 0 gives the same completion {options.samples} times; give --samples 1 "
            "or a temperature above 0"
        )
    if not 0 < options.top_p <= 1:
        raise ConfigError(
            f"--top-p {options.top_p:g} must be above 0 and at most 1; 1 draws from all tokens"
        )
    ks_of(options)


def check_folder(directory: Path) -> None:
    """See that a folder may hold a model.

    Raises:
        CheckpointError: it is none, or that of a training run.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a folder; give an export, or another Hugging Face Llama"
        )
    found = [name for name in _OF_A_RUN if (directory / name).exists()]
    if found and not (directory / RECORD_NAME).is_file():
        raise CheckpointError(
            f"{directory} is of a training run (it has {found[0]}), not an exported model; export "
            f"it first: python -m pipeline.export {directory} EXPORT"
        )


def ks_of(options: argparse.Namespace) -> list[int]:
    """The k of pass@k, rising.

    Raises:
        ConfigError: they are not numbers from 1 to the number of samples.
    """
    texts = options.k.split(",")
    if not all(text.strip().isdecimal() and len(text) < 10 for text in texts):
        raise ConfigError(f"--k {printable(options.k)} is no list of numbers; write --k 1,10")
    ks = sorted({int(text) for text in texts})
    if ks[0] < 1 or ks[-1] > options.samples:
        raise ConfigError(
            f"--k {printable(options.k)} must be from 1 to --samples {options.samples}: pass@k is "
            "about k of them; give more samples or a smaller k"
        )
    return ks


def workers_of(options: argparse.Namespace) -> int:
    """Programs that run at once."""
    count: int = options.workers or len(os.sched_getaffinity(0))
    return count
