"""Every command explains itself: each of its options, and for data_prep examples and exit codes."""

import shlex

import pytest

from docs.extensions.commands import MODULES, parser_of


@pytest.mark.parametrize("module", MODULES)
def test_every_option_has_a_text(module: str) -> None:
    """Whoever calls --help reads what each option is, and what the command does."""
    parser = parser_of(module)
    assert parser.description
    assert len(parser._actions) > 1
    assert [one.dest for one in parser._actions if not (one.help or "").strip()] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("data_prep.")])
def test_help_has_examples_that_parse(module: str) -> None:
    """Its examples are commands with its own options, and its exit codes are listed."""
    parser = parser_of(module)
    text = parser.format_help()
    assert "exit status: 0 " in text
    assert "130 after Ctrl-C" in text
    examples = [line.strip() for line in text.splitlines() if line.startswith(f"  {parser.prog} ")]
    assert examples
    for example in examples:
        parser.parse_args(shlex.split(example.removeprefix(parser.prog)))
