"""Options of a second model that drafts, of the commands that write and serve text."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foundation.shown_text import printable
from model.errors import ConfigError

MOST_DRAFTS = 64
_DRAFTS = 4


def add_draft_options(add: Callable[..., Any]) -> None:
    """Add them to a parser."""
    add(
        "--draft-model",
        "--draft",
        type=Path,
        metavar="DIR",
        help="a smaller model of the same tokenizer drafts, instead of the heads",
    )
    add("--drafts", type=int, metavar="N", help=f"tokens it drafts per forward ({_DRAFTS})")


def check_draft_options(options: argparse.Namespace, of_heads: Mapping[str, object]) -> None:
    """See that they make sense, and set how many tokens are drafted.

    Args:
        options: of the command.
        of_heads: its options of drafts by the heads, by name; those that are true were given.

    Raises:
        ConfigError: naming the first option that does not.
    """
    if options.draft_model is None and options.drafts is not None:
        raise ConfigError(
            f"--drafts {printable(str(options.drafts))} is of a --draft-model, and none is given; "
            "heads draft one token each, so give --heads instead"
        )
    options.drafts = _DRAFTS if options.drafts is None else options.drafts
    if not 1 <= options.drafts <= MOST_DRAFTS:
        raise ConfigError(
            f"--drafts {printable(str(options.drafts))} must be from 1 to {MOST_DRAFTS}; the "
            f"default is {_DRAFTS}"
        )
    given = [name for name, is_set in of_heads.items() if is_set]
    if options.draft_model is not None and given:
        raise ConfigError(
            f"--draft-model drafts instead of the heads, so it goes without {given[0]}; leave one "
            "of the two out"
        )
