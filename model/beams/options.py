"""Options of the command that generates text by beams; light to import.

`BEAM_DECODERS` are the names that `--decoder` takes for them.
"""

import argparse
from collections.abc import Callable
from typing import Any

from foundation.shown_text import printable
from model.errors import ConfigError

DRAFTED = "dsbd"
BEAM_DECODERS = ("beam", DRAFTED)

WIDTH = 4
MOST_WIDTH = 64
LENGTH_PENALTY = 1.0
MOST_LENGTH_PENALTY = 10.0
THRESHOLD = 0.9
MIN_WIDTH = 1


def add_beam_options(add: Callable[..., Any]) -> None:
    """Add them to a parser."""
    add("--beam-width", type=int, metavar="W", help=f"beams of a text, at most ({WIDTH})")
    add(
        "--length-penalty",
        type=float,
        metavar="A",
        help=f"the best beam has the greatest score / length^A ({LENGTH_PENALTY:g})",
    )
    add(
        "--distinct-beams",
        action="store_true",
        help="beams of a temperature above 0 are drawn without replacement",
    )
    add(
        "--width-threshold",
        type=float,
        metavar="T",
        help=f"dsbd: as many beams as drafts give with probability T ({THRESHOLD:g})",
    )
    add("--min-width", type=int, metavar="N", help=f"dsbd: but at least N ({MIN_WIDTH})")
    add(
        "--one-beam",
        action="store_true",
        help="dsbd: only the likeliest beam is kept after each forward; less memory, another law",
    )


def check_beams(options: argparse.Namespace) -> None:
    """See that the options are those of beams, or of no beams; and set those that were not given.

    Raises:
        ConfigError: naming the first that is not.
    """
    _refuse_without_decoder(options)
    if options.decoder not in BEAM_DECODERS:
        return
    _set_defaults(options)
    if not 1 <= options.beam_width <= MOST_WIDTH:
        raise ConfigError(
            f"--beam-width {printable(str(options.beam_width))} must be from 1 to {MOST_WIDTH}; "
            f"the default is {WIDTH}, 1 keeps one beam"
        )
    if not abs(options.length_penalty) <= MOST_LENGTH_PENALTY:
        raise ConfigError(
            f"--length-penalty {options.length_penalty:g} must be from -{MOST_LENGTH_PENALTY:g} "
            f"to {MOST_LENGTH_PENALTY:g}; 0 compares sums, 1 means, more favours long texts"
        )
    if options.distinct_beams and options.temperature == 0:
        raise ConfigError(
            "--distinct-beams is of beams that are drawn, and at temperature 0 the likeliest are "
            "kept, which are distinct; add --temperature 1, or leave it out"
        )
    _refuse_others(options)
    if options.decoder == DRAFTED:
        _check_speculation(options)


def check_drafting(options: argparse.Namespace, heads: int) -> None:
    """See that somebody drafts; `heads` are the model's.

    Raises:
        ConfigError: nobody does.
    """
    if options.decoder == DRAFTED and options.draft_model is None and heads < 2:
        raise ConfigError(
            "--decoder dsbd needs a drafter, and this export has only head 1, which verifies; add "
            "--draft with a smaller model of the same tokenizer, or use --decoder beam"
        )


def _refuse_without_decoder(options: argparse.Namespace) -> None:
    of_beams = {
        "--beam-width": options.beam_width is not None,
        "--length-penalty": options.length_penalty is not None,
        "--distinct-beams": options.distinct_beams,
    }
    of_drafts = {
        "--width-threshold": options.width_threshold is not None,
        "--min-width": options.min_width is not None,
        "--one-beam": options.one_beam,
    }
    named = [name for name, is_set in of_beams.items() if is_set]
    if named and options.decoder not in BEAM_DECODERS:
        raise ConfigError(
            f"{named[0]} is of beams, and --decoder asks for none; add --decoder beam, or "
            f"leave {named[0]} out"
        )
    named = [name for name, is_set in of_drafts.items() if is_set]
    if named and options.decoder != DRAFTED:
        raise ConfigError(
            f"{named[0]} is of beams that are drafted; add --decoder dsbd, or leave {named[0]} out"
        )


def _set_defaults(options: argparse.Namespace) -> None:
    if options.beam_width is None:
        options.beam_width = WIDTH
    if options.length_penalty is None:
        options.length_penalty = LENGTH_PENALTY
    if options.width_threshold is None:
        options.width_threshold = THRESHOLD
    if options.min_width is None:
        options.min_width = MIN_WIDTH


def _check_speculation(options: argparse.Namespace) -> None:
    if options.temperature == 0:
        raise ConfigError(
            "--decoder dsbd draws beams, and at temperature 0 there is nothing to draw; add "
            "--temperature 1, or use --decoder beam"
        )
    if not 0 <= options.width_threshold <= 1:
        raise ConfigError(
            f"--width-threshold {options.width_threshold:g} must be from 0 to 1; less makes wider "
            f"layers that fail more often, the default is {THRESHOLD:g}"
        )
    if not 1 <= options.min_width <= options.beam_width:
        raise ConfigError(
            f"--min-width {printable(str(options.min_width))} must be from 1 to --beam-width "
            f"{options.beam_width}; {options.beam_width} makes every layer as wide"
        )


def _drafts(heads: int | str) -> bool:
    """Whether so many heads leave any to draft; `auto` weighs drafts of one text alone."""
    return isinstance(heads, int) and heads > 1


def _refuse_others(options: argparse.Namespace) -> None:
    others = {
        "--heads": options.heads and not (options.decoder == DRAFTED and _drafts(options.heads)),
        "--tree": options.tree,
        "--lossy": options.lossy,
        "--early-exit": options.early_exit,
        "--draft-model": options.decoder != DRAFTED and options.draft_model,
        "--repetition-penalty": options.repetition_penalty != 1,
        "--compare": options.compare,
        "--stream": options.stream,
    }
    if named := [name for name, is_set in others.items() if is_set]:
        raise ConfigError(
            f"{named[0]} does not go with --decoder {options.decoder}, whose beams are compared as "
            f"whole texts; leave {named[0]} out"
        )
