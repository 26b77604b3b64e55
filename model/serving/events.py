"""Work that ends when its client is gone, and streams of events."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model.serving.errors import ApiError

T = TypeVar("T")
# Times the largest body that are read to no purpose: a client that is still sending would not see
# why it was refused.
_MOST_DISCARDED = 8
_DONE = b"data: [DONE]\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do something, and cancel it when the client is gone.

    Args:
        receive: of a request whose body has been read.
        work: what to do.

    Raises:
        ClientDisconnect: the client was gone first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events, one for each object, and a last one that says so.

    Args:
        events: objects to send; an ApiError that it raises becomes the last event.
        patience_s: how long one of them may wait for a client to read.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], patience_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, unless the client goes or does not read."""
        try:
            await while_connected(receive, self._send_all(send))
        except (ClientDisconnect, TimeoutError, OSError):
            return  # there is nobody to tell

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await self._send_part(send, _line(event))
            await self._send_part(send, _DONE)
        except ApiError as error:
            await self._send_part(send, _line(error.body()))
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_part(self, send: Send, body: bytes) -> None:
        async with asyncio.timeout(self._patience_s):
            await send({"type": "http.response.body", "body": body, "more_body": True})


async def read_body(request: Request, most_bytes: int, patience_s: float) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it has more bytes, or does not come.
        ClientDisconnect: the client is gone.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(patience_s):
            async for part in request.stream():
                size += len(part)
                if size <= most_bytes:
                    parts.append(part)
                elif size > _MOST_DISCARDED * most_bytes:
                    break
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {patience_s:g} s; send it faster"
        ) from None
    if size > most_bytes:
        raise ApiError(
            413, f"the body has more than {most_bytes:,} bytes; send less", code="body_too_large"
        )
    return b"".join(parts)


def _line(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
