"""Options of the command that generates text: the parser, and what values must be."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from foundation.bounded_files import read_bounded
from foundation.shown_text import printable
from model.beams.options import BEAM_DECODERS, DRAFTED, add_beam_options, check_beams
from model.errors import ConfigError
from model.joint_decoding.options import JOINT_DECODERS, add_joint_options, check_joint
from model.writing.draft_options import MOST_DRAFTS, add_draft_options, check_draft_options

EXIT_DIFFERENT = 3

_MOST_NEW_TOKENS = 1 << 20
_WIDEST_TREE = 8
_MOST_TOP_K = 1000
_EXIT_STEPS = 6
_EXIT_THRESHOLD = 0.6

AUTO = "auto"
HEADS_HELP = "heads to use, 1 = plain decoding, auto = as many as pay on this machine (all)"

EPILOG = """\
examples:
  PROG export --prompt "def main():"
  PROG export --prompt "Once" --heads 3 --max-new-tokens 200 --temperature 0.8 --seed 1
  PROG export --prompt "import os" --compare
  PROG export --prompt "import os" --decoder beam --beam-width 4
  PROG export --prompt "import os" --decoder dsbd --draft smaller --stats
  PROG export --prompt "import os" --decoder mtad --draft smaller --tau 0.5 --stats

exit status: 0 the text is printed, 1 the model or a prompt cannot be used (in one line), 2 wrong
arguments, 3 --compare found different outputs
"""


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The options of a command line; exits where they cannot be read."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Continue prompts with an exported model; its own heads speed it up.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="what python -m pipeline.export has written")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given many times")
    add("--prompt-file", type=Path, metavar="FILE", help="one more prompt from a file, - = stdin")
    add(
        "--decoder",
        choices=(*BEAM_DECODERS, *JOINT_DECODERS),
        help="beam: the best of several texts; dsbd: so, drafted; mtad: lossy, joint probability",
    )
    add_beam_options(add)
    add_joint_options(add)
    add("--heads", type=heads_option, metavar="K", help=HEADS_HELP)
    add(
        "--tree",
        type=int,
        default=0,
        metavar="R",
        help="also verify the heads' next likeliest tokens, ranks up to R in sum (0: a chain)",
    )
    add(
        "--lossy",
        metavar="RULE",
        help="keep drafts that head 1 would not have chosen: top-K, such as top-2, or typical",
    )
    add_draft_options(add)
    add(
        "--early-exit",
        type=Path,
        metavar="DIR",
        help="an adapter on the model's first layers drafts, instead of the heads",
    )
    add(
        "--exit-threshold",
        type=float,
        metavar="P",
        help=f"it drafts on while its likeliest token has more than P ({_EXIT_THRESHOLD:g})",
    )
    add("--exit-steps", type=int, metavar="N", help=f"its drafts per forward ({_EXIT_STEPS})")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="for each prompt (64)")
    add("--temperature", type=float, metavar="T", help="0 = the likeliest token (0; with dsbd, 1)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest share P (1)")
    add("--min-p", type=float, default=0.0, metavar="P", help="none below P x the likeliest (0)")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 makes tokens that the text has less likely (1)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="of the first prompt, S+1 of the second, for a temperature above 0 (0)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text, may be repeated")
    add("--load-memory", type=Path, metavar="FILE", help="go on with a text that was read before")
    add("--save-memory", type=Path, metavar="FILE", help="keep what a model with a memory has read")
    add("--dtype", choices=("fp32", "bf16"), help="arithmetic (as exported)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (auto)")
    add("--ids", action="store_true", help="print the ids of the new tokens, too")
    add("--stream", action="store_true", help="print the text as it comes; of one prompt")
    add("--stats", action="store_true", help="print times, and how often drafts were kept")
    add(
        "--compare",
        action="store_true",
        help=f"run with 1 head and with K; exit status {EXIT_DIFFERENT} when the outputs differ",
    )
    options = parser.parse_args(arguments)
    if options.temperature is None:
        options.temperature = 1.0 if options.decoder == DRAFTED else 0.0
    if not options.prompt and options.prompt_file is None:
        parser.error("one of --prompt and --prompt-file is required")
    return options


def heads_option(text: str) -> int | str:
    """`auto`, or a number."""
    return AUTO if text == AUTO else int(text)


def choose_number(wanted: int | str | None, available: int) -> int:
    """The number of heads of an option `--heads`; all that there are, unless it says a number.

    Raises:
        ConfigError: there are not so many.
    """
    if not isinstance(wanted, int):
        return available
    if not 1 <= wanted <= available:
        raise ConfigError(
            f"--heads {printable(str(wanted))}, but this export has {available}; use 1 to "
            f"{available}"
        )
    return wanted


def check(options: argparse.Namespace) -> None:
    """See that the numbers make sense.

    Raises:
        ConfigError: naming the first option that does not.
    """
    _check_numbers(options)
    heads, tree, lossy = options.heads, options.tree, options.lossy
    check_draft_options(options, {"--heads": heads, "--tree": tree, "--lossy": lossy})
    _check_early_exit(options)
    _check_sampling(options)
    check_joint(options)
    if options.decoder not in JOINT_DECODERS:
        check_beams(options)


def _check_numbers(options: argparse.Namespace) -> None:
    if isinstance(options.heads, int) and options.heads < 1:
        raise ConfigError(f"--heads {options.heads} must be at least 1; 1 is plain decoding")
    if not 1 <= options.max_new_tokens <= _MOST_NEW_TOKENS:
        raise ConfigError(
            f"--max-new-tokens {printable(str(options.max_new_tokens))} must be at least 1 and "
            f"at most {_MOST_NEW_TOKENS:,}; the default is 64"
        )
    # Outside, probabilities in fp32 are all zero, or all equal.
    if options.temperature != 0 and not 1e-3 <= options.temperature <= 1e3:
        raise ConfigError(
            f"--temperature {options.temperature:g} must be 0 or a positive number from "
            "0.001 to 1,000; "
            "0 takes the likeliest token, 1 samples from the model as it is"
        )
    if not 0 <= options.seed < 1 << 63:
        given = printable(str(options.seed))
        raise ConfigError(f"--seed {given} must be from 0 to 2^63 - 1; the default is 0")
    if any(not stop for stop in options.stop):
        raise ConfigError("--stop is empty, so no text would begin; give some text or leave it out")
    if options.compare and options.temperature > 0:
        raise ConfigError(
            f"--compare needs --temperature 0, not {options.temperature:g}: sampled outputs agree "
            "in distribution, not token by token; leave one of the two out"
        )


def _check_early_exit(options: argparse.Namespace) -> None:
    given = {"--exit-threshold": options.exit_threshold, "--exit-steps": options.exit_steps}
    if options.early_exit is None and (named := [n for n, v in given.items() if v is not None]):
        raise ConfigError(
            f"{named[0]} is of an --early-exit, and none is given; name the adapter's folder, or "
            f"leave {named[0]} out"
        )
    if options.exit_threshold is None:
        options.exit_threshold = _EXIT_THRESHOLD
    if options.exit_steps is None:
        options.exit_steps = _EXIT_STEPS
    if not 0 <= options.exit_threshold <= 1:
        raise ConfigError(
            f"--exit-threshold {options.exit_threshold:g} must be from 0 to 1; 0 always drafts "
            f"--exit-steps tokens, 1 drafts one, the default is {_EXIT_THRESHOLD:g}"
        )
    if not 1 <= options.exit_steps <= MOST_DRAFTS:
        raise ConfigError(
            f"--exit-steps {printable(str(options.exit_steps))} must be from 1 to {MOST_DRAFTS}; "
            f"the default is {_EXIT_STEPS}"
        )
    others = (options.heads, options.tree, options.lossy, options.draft_model)
    if options.early_exit is not None and any(others):
        raise ConfigError(
            "--early-exit drafts instead of the heads, so it goes without --heads, --tree, --lossy "
            "and --draft-model; leave these out"
        )


def _check_sampling(options: argparse.Namespace) -> None:
    if options.top_k < 0:
        raise ConfigError(f"--top-k {options.top_k} must be at least 0; 0 draws from all tokens")
    if not 0 < options.top_p <= 1:
        raise ConfigError(
            f"--top-p {options.top_p:g} must be above 0 and at most 1; 1 draws from all tokens"
        )
    if not 0 <= options.min_p <= 1:
        raise ConfigError(f"--min-p {options.min_p:g} must be from 0 to 1; 0 draws from all tokens")
    if not 1e-3 <= options.repetition_penalty <= 1e3:
        raise ConfigError(
            f"--repetition-penalty {options.repetition_penalty:g} must be from 0.001 to 1,000; "
            "1 is none"
        )
    if options.lossy is not None and (options.tree or options.compare):
        raise ConfigError(
            "--lossy gives another text than head 1 alone, so it goes without --tree and "
            "--compare; leave --lossy out"
        )
    if options.lossy is not None and lossy_top_k(options.lossy) is None:
        raise ConfigError(
            f"--lossy {printable(options.lossy)} is no rule; give typical, or top-K with K from 2 "
            f"to {_MOST_TOP_K:,}, such as top-2"
        )
    if not 0 <= options.tree <= _WIDEST_TREE:
        raise ConfigError(
            f"--tree {options.tree} must be from 0 to {_WIDEST_TREE}; 0 is a chain of drafts"
        )
    filters = {"--top-k": options.top_k != 0, "--top-p": options.top_p != 1}
    filters["--min-p"] = options.min_p != 0
    if options.temperature == 0 and (given := [name for name, is_set in filters.items() if is_set]):
        raise ConfigError(
            f"{given[0]} has no effect at temperature 0, where the likeliest token is taken; add "
            f"--temperature 1 or leave {given[0]} out"
        )


def check_memory(options: argparse.Namespace, *, has_memory: bool) -> None:
    """See that the options are those of a model with a memory, or of one without.

    Raises:
        ConfigError: naming the first that is not.
    """
    files = {"--load-memory": options.load_memory, "--save-memory": options.save_memory}
    if not has_memory:
        if given := [name for name, path in files.items() if path is not None]:
            raise ConfigError(
                f"{given[0]} is of models with a memory (model.memory), and this one has none; "
                f"leave {given[0]} out"
            )
        return
    drafts = {
        "--heads": isinstance(options.heads, int) and options.heads > 1,
        "--tree": options.tree,
        "--lossy": options.lossy,
        "--draft-model": options.draft_model,
        "--early-exit": options.early_exit,
        "--decoder": options.decoder,
        "--compare": options.compare,
        "--stats": options.stats,
    }
    if given := [name for name, is_set in drafts.items() if is_set]:
        raise ConfigError(
            f"{given[0]} is of drafts, and a model with a memory decodes without them; leave "
            f"{given[0]} out"
        )
    if options.save_memory is not None and len(options.prompt) != 1:
        raise ConfigError(
            f"--save-memory keeps what one text leaves behind, not of {len(options.prompt)} "
            "prompts; give one --prompt"
        )


def lossy_top_k(rule: str) -> int | None:
    """K of `top-K`, 0 of `typical`; None of anything else."""
    if rule == "typical":
        return 0
    match = re.fullmatch(r"top-([0-9]{1,5})", rule)
    return int(match[1]) if match and 2 <= int(match[1]) <= _MOST_TOP_K else None


def check_stream(options: argparse.Namespace) -> None:
    """Raises ConfigError when there is not one text to show; prompts are all read."""
    if options.stream and (len(options.prompt) != 1 or options.compare):
        raise ConfigError(
            f"--stream shows one text as it comes, not {len(options.prompt)} prompts or --compare; "
            "leave --stream out"
        )


def read_prompt(path: Path) -> str:
    """The text of a file, or of stdin; other bytes than UTF-8 come as halves of characters."""
    content = sys.stdin.buffer.read() if str(path) == "-" else read_bounded(path)
    return content.decode("utf-8", "surrogateescape")
