"""Where texts end."""

from tokenizers import Tokenizer

from model.decoding.stopping import Ending, StopStrings
from tests.support.tiny_export import byte_tokenizer


def stop_strings(*strings: str) -> tuple[StopStrings, Tokenizer]:
    """Stop strings over the tokenizer of bytes."""
    tokenizer = Tokenizer.from_buffer(byte_tokenizer())
    return StopStrings(tokenizer, strings), tokenizer


def test_a_block_is_cut_at_the_first_end() -> None:
    """The end-of-text token and the limit count wherever in a block they come."""

    def taken(ending: Ending, *blocks: list[int]) -> list[tuple[int, bool]]:
        return [(ending.take(block), ending.ended) for block in blocks]

    assert taken(Ending(10, eos_id=7), [1, 2, 3], [4, 7, 5]) == [(3, False), (2, True)]
    assert taken(Ending(4, eos_id=None), [7, 7, 7], [7, 7, 7]) == [(3, False), (1, True)]


def test_a_stop_string_ends_where_it_is_complete() -> None:
    """Over the borders of blocks and within characters of several bytes."""
    stop, tokenizer = stop_strings("\n\n", "é!")
    for text, kept in (("ab\n\ncd", "ab\n\n"), ("abé!cd", "abé!"), ("é\n!\né?", "é\n!\né?")):
        ids = tokenizer.encode(text).ids
        for size in (1, 2, 3, 20):
            ending = Ending(100, None, stop)
            taken: list[int] = []
            for start in range(0, len(ids), size):
                block = ids[start : start + size]
                taken += block[: ending.take(block)]
                if ending.ended:
                    break
            assert tokenizer.decode(taken) == kept
            assert ending.ended == (kept != text)
    assert stop.cut("ab\n\ncd") == "ab"
    assert stop.cut("xyé!") == "xy"
    assert stop.cut("xy\n") == "xy\n"


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    """Letters that may yet become a stop string are not shown."""
    stop, _ = stop_strings("END", "--")
    assert [stop.held_back(text) for text in ("abc", "abE", "abEN", "ab-", "abEx")] == [
        0,
        1,
        2,
        1,
        0,
    ]
