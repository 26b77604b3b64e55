"""A running batch: rows join it and leave it between forwards, and no row waits for another."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from model.decoding.chain import RowOptions, Step
from model.decoding.stopping import Ending, StopStrings


class Decoder(Protocol):
    """A way of decoding."""

    def options(self, rows: int) -> list[RowOptions]:
        """Those of rows whose own are not given."""
        ...

    def open(self, rows: int, capacity: int) -> None:
        """Make room for `rows` rows at once of `capacity` tokens each; none is there yet."""
        ...

    def join(self, prompts: Sequence[Sequence[int]], rows: Sequence[RowOptions]) -> Step:
        """Read the prompts of new rows; the first tokens of each."""
        ...

    def step(self) -> Step:
        """One forward; the next tokens of each row, at least one."""
        ...

    def keep(self, order: Sequence[int]) -> None:
        """Row `order[i]` becomes row i, the others are gone."""
        ...


class Request(NamedTuple):
    """One text to come.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: its limit, at least 1.
        eos_id: token, or tokens, that end it, wherever in a block they come; None = no token does.
        stop: ends it with the token that completes one of its strings.
        options: how it is decoded.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    eos_id: int | Collection[int] | None = None
    stop: StopStrings | None = None
    options: RowOptions = RowOptions()


class Piece(NamedTuple):
    """What one forward gave one text.

    Attributes:
        row: its number; of `stream` that of its prompt, from 0.
        tokens: its new tokens, at least one.
        logprobs: of each; None unless asked for.
        forward: number of the forward, from 1; each that reads prompts counts, too.
        likeliest: for each token the likeliest ones there, see `Step`; None unless asked for.
        ended: whether it is the text's last.
        at_limit: whether nothing but its limit ended it.
    """

    row: int
    tokens: list[int]
    logprobs: list[float] | None
    forward: int
    likeliest: list[list[tuple[int, float]]] | None = None
    ended: bool = False
    at_limit: bool = False


class _Row(NamedTuple):
    number: int
    ending: Ending
    likeliest: int | None


class Batch:
    """Rows that are decoded together.

    Each row gets what it would get alone: the same tokens, by greedy decoding and by sampling with
    its seed.

    Args:
        decoder: a way of decoding, used by this batch alone.
        rows: how many there may be at once.
        capacity: tokens that a row may have, its prompt's among them.
        on_step: called with the number of rows before each step; may set the decoder up for it.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        capacity: int,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        decoder.open(rows, capacity)
        self._decoder = decoder
        self._on_step = on_step
        self._rows: list[_Row] = []
        self._forward = 0
        self.most_rows = rows
        self.capacity = capacity

    @property
    def rows(self) -> list[int]:
        """Numbers of the rows that are there."""
        return [row.number for row in self._rows]

    def join(self, requests: Mapping[int, Request]) -> list[Piece]:
        """Let rows join under numbers that are free; the first piece of each."""
        assert len(self._rows) + len(requests) <= self.most_rows, "no room for so many rows"
        for request in requests.values():
            assert len(request.prompt) >= 1, "empty prompt"
            assert request.max_new_tokens >= 1, request.max_new_tokens
            assert len(request.prompt) + request.max_new_tokens <= self.capacity, self.capacity
        before = len(self._rows)
        step = self._decoder.join(
            [request.prompt for request in requests.values()],
            [request.options for request in requests.values()],
        )
        self._rows += [
            _Row(
                number,
                Ending(request.max_new_tokens, request.eos_id, request.stop),
                request.options.likeliest,
            )
            for number, request in requests.items()
        ]
        return self._taken(step, before)

    def step(self) -> list[Piece]:
        """One forward; the next piece of every row. Rows that end leave."""
        if self._on_step is not None:
            self._on_step(len(self._rows))
        return self._taken(self._decoder.step(), 0)

    def leave(self, numbers: Collection[int]) -> None:
        """Let rows leave before they have ended."""
        self._let_stay([row.number not in numbers for row in self._rows])

    def _taken(self, step: Step, first: int) -> list[Piece]:
        """Pieces of the rows from place `first` on."""
        self._forward += 1
        pieces = [
            _piece(row, step, place, self._forward) for place, row in enumerate(self._rows[first:])
        ]
        self._let_stay([not row.ending.ended for row in self._rows])
        return pieces

    def _let_stay(self, stays: Sequence[bool]) -> None:
        order = _staying(stays)
        if len(order) < len(stays):
            self._decoder.keep(order)
            self._rows = [self._rows[place] for place in order]


def _piece(row: _Row, step: Step, place: int, forward: int) -> Piece:
    tokens = step.tokens[place]
    count = row.ending.take(tokens)
    logprobs = likeliest = None
    if row.likeliest is not None and step.logprobs is not None and step.likeliest is not None:
        logprobs = step.logprobs[place][:count]
        likeliest = [others[: row.likeliest] for others in step.likeliest[place][:count]]
    ending = row.ending
    return Piece(
        row.number, tokens[:count], logprobs, forward, likeliest, ending.ended, ending.at_limit
    )


def _staying(active: Sequence[bool]) -> list[int]:
    """The order in which rows stay: the last ones take the places of those that leave.

    So that few rows move. Example: of 0 1 2 3 4 the rows 1 and 2 leave: 0 4 3.
    """
    order = list(range(len(active)))
    place = 0
    while place < len(order):
        if active[order[place]]:
            place += 1
            continue
        last = order.pop()
        if place < len(order):
            order[place] = last
    return order
