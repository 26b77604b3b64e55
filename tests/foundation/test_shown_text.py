"""Text of any origin in a message is short, in one line, and harmless to a terminal."""

from hypothesis import given
from hypothesis import strategies as st

from foundation.shown_text import printable, reason, told
from tests.support.hostile import check_message


@given(st.text(min_size=1) | st.sampled_from(["\x1b[2J", "\ud800", "a\nb", "\u2028", "x" * 10**6]))
def test_any_text_can_be_shown(text: str) -> None:
    """What can be shown stays as it is, up to a length."""
    shown = printable(text)
    check_message(f"is {shown}")
    assert shown.isprintable()
    assert shown == text or not text.isprintable() or text.startswith(shown.removesuffix("..."))


def test_errors_are_one_short_line() -> None:
    """The system's own words, with the path where nothing else names it."""
    error = OSError(36, "File name too long", "x" * 5000)
    assert reason(error) == "File name too long"
    assert told(error).endswith("...: File name too long")
    assert reason(ValueError("a\n" * 3000)) == printable("a " * 3000)
    assert told(OSError("a\nb")) == "a b"
