"""The thread that runs the batch, and the queue before it.

Requests come from the server's event loop and their pieces go back there. A row that waits joins as
soon as there is room; one whose client is gone leaves at the next step. What a client does not
read waits in its row's queue, which its limit of tokens bounds: no row waits for a reader. Rows
with a decoder of their own wait in a queue of their own, and run beside the batch.
"""

import asyncio
import collections
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from model.decoding.batch import Batch, Piece, Request
from model.serving.errors import ApiError
from model.serving.lanes import Alone, Lanes
from model.serving.metrics import Metrics

logger = logging.getLogger(__name__)

# Positions that prompts which join at once may fill, so that running rows do not wait for long.
_MOST_JOINING = 4096
_LONGEST_RETRY_S = 60


class Row:
    """One text that was asked for; its pieces come in order."""

    def __init__(self, number: int, request: Request, alone: Alone | None = None) -> None:
        self.number = number
        self.request = request
        self.alone = alone
        self.asked_s = time.monotonic()
        self.pieces: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        self.begun = self.over = False

    async def next(self) -> Piece:
        """The next piece.

        Raises:
            ApiError: there are no more, since something failed.
        """
        found = await self.pieces.get()
        if isinstance(found, ApiError):
            raise found
        return found

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """All pieces to the last."""
        while True:
            piece = await self.next()
            yield piece
            if piece.ended:
                return


class _Event(NamedTuple):
    row: Row
    what: Piece | ApiError


class Engine:
    """Runs rows of a batch in a thread of its own.

    Args:
        new_batch: gives an empty batch; called again after a failure.
        queue: rows that may wait for room, of either kind.
        metrics: counts what happens.
        beams: of rows with a decoder of their own, at most.
    """

    def __init__(
        self, new_batch: Callable[[], Batch], queue: int, metrics: Metrics, beams: int = 0
    ) -> None:
        self._new_batch = new_batch
        self._batch = new_batch()
        self._queue = queue
        self._metrics = metrics
        self._changed = threading.Condition()
        self._waiting: collections.deque[Row] = collections.deque()
        self._waiting_alone: collections.deque[Row] = collections.deque()
        self._gone: set[int] = set()
        self._rows: dict[int, Row] = {}  # in the batch; of the thread alone
        self._rows_alone: dict[int, Row] = {}  # beside it; likewise
        self._lanes = Lanes(beams)  # what these are; likewise
        self._running = 0
        self._next_number = 0
        self._stopping = False
        self._refusing = ""
        self._seconds_per_row = 1.0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def most_rows(self) -> int:
        """Rows that run at once."""
        return self._batch.most_rows

    @property
    def running(self) -> int:
        """Rows in the batch, and beside it."""
        return self._running + len(self._rows_alone)

    @property
    def running_beams(self) -> int:
        """Beams of the rows beside the batch."""
        return self._lanes.most_beams - self._lanes.free_beams

    @property
    def waiting(self) -> int:
        """Rows that wait for room."""
        return len(self._waiting) + len(self._waiting_alone)

    @property
    def refusing(self) -> str:
        """Why nothing new is taken; empty when it is."""
        return self._refusing

    def start(self) -> None:
        """Begin, from within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def refuse(self, reason: str) -> None:
        """Take nothing new; what runs or waits goes on."""
        self._refusing = self._refusing or reason

    def stop(self) -> None:
        """End the thread after the step that runs; rows that are there get nothing more."""
        self.refuse("the server is stopping")
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def rows(self, requests: Sequence[Request], alone: Alone | None = None) -> Iterator[list[Row]]:
        """Rows for some requests, all or none; those that have not ended leave at the end.

        Args:
            requests: of the rows.
            alone: how each is decoded outside of the batch; None = they are rows of it.

        Raises:
            ApiError: there is no room, or nothing new is taken.
        """
        rows = self._submit(requests, alone)
        try:
            yield rows
        finally:
            with self._changed:
                numbers = {row.number for row in rows if not row.over}
                waiting = [*self._waiting, *self._waiting_alone]
                unbegun = numbers & {row.number for row in waiting}
                self._waiting = _without(self._waiting, unbegun)
                self._waiting_alone = _without(self._waiting_alone, unbegun)
                self._gone |= numbers - unbegun
            self._metrics.count("cancelled_total", len(unbegun))

    def _submit(self, requests: Sequence[Request], alone: Alone | None) -> list[Row]:
        if self._refusing:
            raise ApiError(
                503, f"{self._refusing}; try another one or later", code="stopping", retry_after_s=5
            )
        with self._changed:
            queue = self._waiting if alone is None else self._waiting_alone
            if len(queue) + len(requests) > self._queue + self._at_once(alone):
                self._metrics.count("refused_total")
                raise ApiError(
                    429,
                    f"{self.running} texts run and {len(queue)} wait, of {self._queue} "
                    "that may wait; try again later",
                    code="queue_full",
                    retry_after_s=self._retry_after_s(),
                )
            first = self._next_number
            self._next_number += len(requests)
            rows = [Row(first + place, request, alone) for place, request in enumerate(requests)]
            queue.extend(rows)
            self._changed.notify()
        return rows

    def _at_once(self, alone: Alone | None) -> int:
        """For how many rows more there is room now."""
        if alone is None:
            return max(self.most_rows - self._running - len(self._waiting), 0)
        taken = sum(row.alone.beams for row in self._waiting_alone if row.alone is not None)
        return max((self._lanes.free_beams - taken) // alone.beams, 0)

    def _retry_after_s(self) -> int:
        rounds = (self.waiting + self.running) / self.most_rows
        return max(1, min(math.ceil(rounds * self._seconds_per_row), _LONGEST_RETRY_S))

    def _run(self) -> None:
        """The thread: join, step, hand out, until told to stop."""
        while True:
            with self._changed:
                while not (self.waiting or self._rows or self._rows_alone or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    return
                gone, self._gone = self._gone, set()
            try:
                self._leave(gone & self._rows.keys())
                self._step(self._to_join())
            except Exception as error:  # the server outlives what a model or a device may do
                self._fail(error)
            self._leave_alone(gone & self._rows_alone.keys())
            self._step_alone()

    def _to_join(self) -> dict[int, Request]:
        """Rows that join now, from the longest waiting one."""
        joining: dict[int, Request] = {}
        longest = 0
        with self._changed:
            while self._waiting and len(self._rows) < self.most_rows:
                row = self._waiting[0]
                longest = max(longest, len(row.request.prompt))
                if joining and longest * (len(joining) + 1) > _MOST_JOINING:
                    break
                self._waiting.popleft()
                joining[row.number] = row.request
                self._rows[row.number] = row
            self._running = len(self._rows)
        return joining

    def _leave(self, gone: set[int]) -> None:
        if gone:
            self._batch.leave(gone)
            for number in gone:
                del self._rows[number]
            self._metrics.count("cancelled_total", len(gone))
            self._running = len(self._rows)

    def _step(self, joining: Mapping[int, Request]) -> None:
        if joining:
            self._hand_out(self._batch.join(joining), self._rows)
            self._metrics.count("prompt_tokens_total", sum(len(r.prompt) for r in joining.values()))
        if self._rows:
            self._metrics.count("forwards_total")
            self._metrics.count("forward_rows_total", len(self._rows))
            self._hand_out(self._batch.step(), self._rows)

    def _leave_alone(self, gone: set[int]) -> None:
        for number in gone:
            self._lanes.leave(number)
            del self._rows_alone[number]
        self._metrics.count("cancelled_total", len(gone))

    def _begin_alone(self) -> None:
        """Take the rows beside the batch that there is room for, from the longest waiting one."""
        with self._changed:
            while self._waiting_alone:
                row = self._waiting_alone[0]
                assert row.alone is not None
                if row.alone.beams > self._lanes.free_beams:
                    return
                self._waiting_alone.popleft()
                self._rows_alone[row.number] = row
                self._lanes.begin(row.number, row.request, row.alone)

    def _step_alone(self) -> None:
        """One forward of the row beside the batch whose turn it is."""
        self._begin_alone()
        if not self._rows_alone:
            return
        row = self._rows_alone[self._lanes.next()]
        try:
            pieces = self._lanes.step()
        except Exception as error:  # nor does the batch end with it
            self._fail_alone(row, error)
            return
        self._count_alone(row)
        if any(piece.ended for piece in pieces):
            self._lanes.leave(row.number)  # before its client can ask for more
        self._hand_out(pieces, self._rows_alone)

    def _count_alone(self, row: Row) -> None:
        assert row.alone is not None
        labels = f'decoder="{row.alone.decoder}"'
        if not row.begun:
            row.begun = True
            self._metrics.count("prompt_tokens_total", len(row.request.prompt))
            self._metrics.count("decoder_texts_total", labels=labels)
            return
        self._metrics.count("forwards_total")
        self._metrics.count("forward_rows_total")
        self._metrics.count("decoder_forwards_total", labels=labels)

    def _hand_out(self, pieces: Sequence[Piece], rows: dict[int, Row]) -> None:
        """Send pieces to their rows; those that have ended are no more among these."""
        now_s = time.monotonic()
        events = [_Event(rows[piece.row], piece) for piece in pieces]
        for row, piece in events:
            assert isinstance(piece, Piece)
            self._metrics.count("generated_tokens_total", len(piece.tokens))
            if piece.ended:
                row.over = True
                del rows[piece.row]
                self._metrics.count("finished_total")
                self._seconds_per_row += 0.1 * (now_s - row.asked_s - self._seconds_per_row)
        with self._changed:
            self._running = len(self._rows)
        self._send(events)

    def _fail_alone(self, row: Row, error: Exception) -> None:
        """Give up a row beside the batch."""
        logger.error("decoding failed; a text of its own decoder is given up", exc_info=error)
        self._metrics.count("failures_total")
        self._lanes.leave(row.number)
        del self._rows_alone[row.number]
        row.over = True
        self._send([_Event(row, _failure(error))])

    def _fail(self, error: Exception) -> None:
        """Give up what runs, and begin with an empty batch."""
        logger.error("decoding failed; %d texts are given up", len(self._rows), exc_info=error)
        self._metrics.count("failures_total")
        failure = _failure(error)
        rows, self._rows = list(self._rows.values()), {}
        for row in rows:
            row.over = True
        self._running = 0
        self._send([_Event(row, failure) for row in rows])
        try:
            self._batch = self._new_batch()
        except Exception as again:
            self.refuse(f"the server has failed ({again})")

    def _send(self, events: Sequence[_Event]) -> None:
        def put() -> None:
            for row, what in events:
                row.pieces.put_nowait(what)

        assert self._loop is not None, "not started"
        self._loop.call_soon_threadsafe(put)


def _failure(error: Exception) -> ApiError:
    return ApiError(500, f"decoding failed: {error}", code="decoding_failed")


def _without(rows: collections.deque[Row], numbers: set[int]) -> collections.deque[Row]:
    return collections.deque(row for row in rows if row.number not in numbers)
