"""Options of the command that generates text by joint decoding; light to import.

`JOINT_DECODERS` are the names that `--decoder` takes for it. `--beam-width` is that of beams.
"""

import argparse
from collections.abc import Callable
from typing import Any

from foundation.shown_text import printable
from model.errors import ConfigError
from model.joint_decoding.rule import PUBLISHED

JOINT_DECODERS = ("mtad",)

_MOST_WIDTH = 64


def add_joint_options(add: Callable[..., Any]) -> None:
    """Add them to a parser."""
    add(
        "--tau",
        type=float,
        metavar="T",
        help=f"mtad keeps drafts of a joint P/Q above T; 1 keeps none ({PUBLISHED.threshold:g})",
    )
    add(
        "--candidates",
        type=int,
        metavar="C",
        help=f"beams that mtad verifies, as one tree ({PUBLISHED.candidates})",
    )


def check_joint(options: argparse.Namespace) -> None:
    """See that the options are those of joint decoding, or of none; and set those not given.

    Raises:
        ConfigError: naming the first that is not.
    """
    given = {"--tau": options.tau, "--candidates": options.candidates}
    if options.decoder not in JOINT_DECODERS:
        if named := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"{named[0]} is of joint decoding; add --decoder {JOINT_DECODERS[0]}, or leave "
                f"{named[0]} out"
            )
        return
    _set_defaults(options)
    if not 1 <= options.beam_width <= _MOST_WIDTH:
        raise ConfigError(
            f"--beam-width {printable(str(options.beam_width))} must be from 1 to {_MOST_WIDTH}; "
            f"the default is {PUBLISHED.width}, 1 drafts one text"
        )
    if not 1 <= options.candidates <= options.beam_width:
        raise ConfigError(
            f"--candidates {printable(str(options.candidates))} must be from 1 to --beam-width "
            f"{options.beam_width}: they are the best of its beams"
        )
    if not 0 <= options.tau <= 1:
        raise ConfigError(
            f"--tau {options.tau:g} must be from 0 to 1; 1 is plain decoding, 0 keeps every draft, "
            f"the default is {PUBLISHED.threshold:g}"
        )
    _refuse_others(options)


def _set_defaults(options: argparse.Namespace) -> None:
    if options.beam_width is None:
        options.beam_width = PUBLISHED.width
    if options.candidates is None:
        options.candidates = PUBLISHED.candidates
    if options.tau is None:
        options.tau = PUBLISHED.threshold


def _refuse_others(options: argparse.Namespace) -> None:
    others = {
        "--heads 1": options.heads == 1,
        "--heads auto": isinstance(options.heads, str),
        "--tree": options.tree,
        "--lossy": options.lossy,
        "--early-exit": options.early_exit,
        "--length-penalty": options.length_penalty is not None,
        "--distinct-beams": options.distinct_beams,
        "--width-threshold": options.width_threshold is not None,
        "--min-width": options.min_width is not None,
        "--one-beam": options.one_beam,
        "--compare": options.compare,
    }
    if named := [name for name, is_set in others.items() if is_set]:
        raise ConfigError(
            f"{named[0]} does not go with --decoder {options.decoder}, which keeps or drops a beam "
            f"of several drafts by its joint probability; leave {named[0]} out"
        )
