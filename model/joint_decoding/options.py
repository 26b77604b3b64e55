"""Options of the command that generates text by joint decoding; light to import.

`JOINT_DECODERS` are the names that `--decoder` takes for it. `--beam-width` is that of beams.
"""

import argparse
from collections.abc import Callable
from typing import Any

from foundation.shown_text import printable
from model.errors import ConfigError
from model.joint_decoding.rule import PUBLISHED, JointRule

JOINT_DECODERS = ("mtad",)

MOST_WIDTH = 64


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
    """See that the command's options are those of joint decoding, or of none.

    Those of joint decoding that were not given are set.

    Raises:
        ConfigError: naming the first that is not.
    """
    check_rule(options, "--tau", "--candidates")
    if options.decoder in JOINT_DECODERS:
        _refuse_others(options)


def check_rule(options: argparse.Namespace, *of_joint_decoding: str) -> None:
    """The same of the named options alone, and of the rule that they make."""
    given = [name for name in of_joint_decoding if getattr(options, _key(name)) is not None]
    if options.decoder not in JOINT_DECODERS:
        if given:
            raise ConfigError(
                f"{given[0]} is of joint decoding; add --decoder {JOINT_DECODERS[0]}, or leave "
                f"{given[0]} out"
            )
        return
    _set_defaults(options)
    if not 1 <= options.beam_width <= MOST_WIDTH:
        raise ConfigError(
            f"--beam-width {printable(str(options.beam_width))} must be from 1 to {MOST_WIDTH}; "
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


def check_drafts(options: argparse.Namespace, heads: int, *, second_model: bool = False) -> None:
    """See that something drafts; `heads` are in use.

    Raises:
        ConfigError: nothing does.
    """
    if options.decoder in JOINT_DECODERS and heads == 1 and not second_model:
        raise ConfigError(
            f"--decoder {options.decoder}, but of this export one head is used, which drafts "
            "nothing; use more heads, or give a second model by --draft"
        )


def rule_of(options: Any) -> JointRule:
    """The rule of options that are checked, or of what has attributes of the same names."""
    return JointRule(options.beam_width, options.candidates, options.tau)


def _key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _set_defaults(options: argparse.Namespace) -> None:
    if options.beam_width is None:
        options.beam_width = PUBLISHED.width
    if options.candidates is None:
        options.candidates = PUBLISHED.candidates
    if options.tau is None:
        options.tau = PUBLISHED.threshold


def _refuse_others(options: argparse.Namespace) -> None:
    others = {
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
