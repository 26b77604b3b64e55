"""The application: paths, who may use them, and what they answer."""

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

import tokenizers
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from foundation.shown_text import printable
from model.decoding import batch
from model.decoding.chain import RowOptions
from model.decoding.stopping import StopStrings
from model.serving.answers import Answer, ChatAnswer, CompletionAnswer, usage
from model.serving.bodies import ChatBody, CommonBody, CompletionBody, Limits, parse_body
from model.serving.decoders import Decoders
from model.serving.engine import Engine, Row
from model.serving.errors import ApiError
from model.serving.events import EventStream, read_body, while_connected
from model.serving.lanes import Alone
from model.serving.metrics import CONTENT_TYPE, Metrics
from model.serving.prompts import Prompts
from model.serving.row_text import Delta, RowText

T = TypeVar("T")
_USUAL_TOKENS = 16  # of a completion that does not say how many
_SEEDS = 1 << 63
_GONE = 499  # a client that did not wait; nobody reads it


class Served(NamedTuple):
    """What is served.

    Attributes:
        name: of the model.
        tokenizer: spells tokens.
        eos_ids: tokens that end a text.
        prompts: makes tokens of prompts.
        engine: runs rows.
        decoders: that requests may ask for.
        metrics: counts.
        limits: of requests.
        marks: what answers say of texts whose request asks for no decoder.
        api_key: what clients must know; empty = nothing.
        patience_s: how long a body, or a client that reads, may take for a part.
    """

    name: str
    tokenizer: tokenizers.Tokenizer
    eos_ids: Collection[int]
    prompts: Prompts
    engine: Engine
    decoders: Decoders
    metrics: Metrics
    limits: Limits
    marks: Mapping[str, Any]
    api_key: str = ""
    patience_s: float = 60.0


class _Asked(NamedTuple):
    """A request that will be served."""

    requests: list[batch.Request]
    alone: Alone | None
    answer: Answer
    prompt_tokens: int
    stream: bool
    with_usage: bool


def build_app(served: Served) -> Starlette:
    """The application."""
    served.metrics.watch("running", lambda: served.engine.running)
    served.metrics.watch("running_beams", lambda: served.engine.running_beams)
    served.metrics.watch("waiting", lambda: served.engine.waiting)
    paths = _Paths(served)
    return Starlette(
        routes=[
            Route("/health", paths.health, methods=["GET"]),
            Route("/metrics", paths.metrics, methods=["GET"]),
            Route("/v1/models", paths.known(paths.models), methods=["GET"]),
            Route("/v1/models/{name:path}", paths.known(paths.model), methods=["GET"]),
            Route("/v1/completions", paths.known(paths.completions), methods=["POST"]),
            Route("/v1/chat/completions", paths.known(paths.chat), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _no_path, Exception: _unforeseen},
    )


class _Paths:
    """What each path does."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._began = int(time.time())

    def known(
        self, path: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A path for those who know the key; refusals become error objects."""

        async def guarded(request: Request) -> Response:
            start_s = time.monotonic()
            try:
                self._check_key(request)
                response = await path(request)
            except ApiError as error:
                response = error.response()
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            labels = f'path="{request.scope["route"].path}",status="{response.status_code}"'
            self._served.metrics.count("requests_total", labels=labels)
            if not isinstance(response, EventStream):
                self._served.metrics.took("request_seconds", time.monotonic() - start_s)
            return response

        return guarded

    async def health(self, request: Request) -> Response:
        """Whether new requests are taken."""
        why_not = self._served.engine.refusing
        return JSONResponse({"status": why_not or "ok"}, 503 if why_not else 200)

    async def metrics(self, request: Request) -> Response:
        """Counts for Prometheus."""
        return PlainTextResponse(self._served.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """The one model, by its name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._described())

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        body = await self._body(CompletionBody, request)
        most = self._served.limits.rows // (body.n or 1)
        prompts = await asyncio.to_thread(self._served.prompts.of_completion, body.prompt, most)
        asked = self._asked(CompletionAnswer, body, prompts, _USUAL_TOKENS, body.logprobs)
        return await self._answered(request, asked)

    async def chat(self, request: Request) -> Response:
        """Answer in a chat."""
        body = await self._body(ChatBody, request)
        prompt = await asyncio.to_thread(self._served.prompts.of_chat, body.messages)
        if body.max_completion_tokens is not None:
            body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
        likeliest = (body.top_logprobs or 0) if body.logprobs else None
        asked = self._asked(ChatAnswer, body, [prompt], None, likeliest)
        return await self._answered(request, asked)

    def _check_key(self, request: Request) -> None:
        key = self._served.api_key
        if not key:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the server's as Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    def _check_model(self, name: str) -> None:
        if name != self._served.name:
            raise ApiError(
                404,
                f"the model {printable(name)} is not here; ask for {self._served.name}",
                param="model",
                code="model_not_found",
            )

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._began,
            "owned_by": "headway",
            "max_model_len": self._served.limits.positions,
        }

    async def _body(self, kind: type[T], request: Request) -> T:
        served = self._served
        content = await read_body(request, served.limits.body_bytes, served.patience_s)
        body: Any = parse_body(kind, content, served.limits)  # type: ignore[type-var]
        self._check_model(body.model)
        return body

    def _asked(
        self,
        kind: type[Answer],
        body: CommonBody,
        prompts: Sequence[list[int]],
        usual_tokens: int | None,
        likeliest: int | None,
    ) -> _Asked:
        served = self._served
        alone, marks = served.decoders.of(body, likeliest)
        answer = kind(served.name, likeliest is not None, marks or served.marks)
        stop = StopStrings(served.tokenizer, body.stops) if body.stops else None
        seed = secrets.randbits(63) if body.seed is None else body.seed
        sampling = body.sampling()
        requests: list[batch.Request] = []
        for prompt in prompts:
            room = served.prompts.room(prompt, body.max_tokens, usual_tokens)
            for _ in range(body.n or 1):
                options = RowOptions(sampling, (seed + len(requests)) % _SEEDS, likeliest)
                requests.append(batch.Request(prompt, room, served.eos_ids, stop, options))
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        counted = sum(map(len, prompts))
        return _Asked(requests, alone, answer, counted, bool(body.stream), with_usage)

    async def _answered(self, request: Request, asked: _Asked) -> Response:
        if not asked.stream:
            return await while_connected(request.receive, self._whole(asked))
        events = self._events(asked)
        first = await anext(events)  # so that a full queue is a refusal, not an event
        return EventStream(_again(first, events), self._served.patience_s)

    async def _whole(self, asked: _Asked) -> Response:
        deltas: list[list[Delta]] = [[] for _ in asked.requests]
        texts = [self._row_text(request) for request in asked.requests]
        with self._served.engine.rows(asked.requests, asked.alone) as rows:
            for row, text, found in zip(rows, texts, deltas, strict=True):
                async for piece in row:
                    if not found:
                        self._first_token(row)
                    found.append(text.add(piece))
        counts = usage(asked.prompt_tokens, sum(text.num_tokens for text in texts))
        return JSONResponse(asked.answer.whole(deltas, counts))

    async def _events(self, asked: _Asked) -> AsyncGenerator[dict[str, Any], None]:
        """Objects of a stream; the first comes as soon as the rows have their places."""
        answer, start_s = asked.answer, time.monotonic()
        texts = [self._row_text(request) for request in asked.requests]
        with self._served.engine.rows(asked.requests, asked.alone) as rows:
            yield answer.piece(answer.begin(len(rows)))
            async with aclosing(_merged(rows)) as pieces:
                async for index, piece in pieces:
                    if not texts[index].num_tokens:
                        self._first_token(rows[index])
                    delta = texts[index].add(piece)
                    if delta.text or delta.notes or delta.finish:
                        yield answer.piece([answer.choice_piece(index, delta)])
        if asked.with_usage:
            counts = usage(asked.prompt_tokens, sum(text.num_tokens for text in texts))
            yield answer.piece([], usage=counts)
        self._served.metrics.took("request_seconds", time.monotonic() - start_s)

    def _row_text(self, request: batch.Request) -> RowText:
        served = self._served
        return RowText(served.tokenizer, request.prompt, served.eos_ids, request.stop)

    def _first_token(self, row: Row) -> None:
        self._served.metrics.took("first_token_seconds", time.monotonic() - row.asked_s)


async def _merged(rows: Sequence[Row]) -> AsyncGenerator[tuple[int, batch.Piece], None]:
    """Pieces of several rows as they come, with the row's place."""
    waiting = {asyncio.ensure_future(row.next()): place for place, row in enumerate(rows)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place, piece = waiting.pop(task), task.result()
                if not piece.ended:
                    waiting[asyncio.ensure_future(rows[place].next())] = place
                yield place, piece
    finally:
        for task in waiting:
            task.cancel()


async def _again(
    first: dict[str, Any], events: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(events):
        if first["choices"]:
            yield first
        async for event in events:
            yield event


async def _no_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown = f"{request.method} {printable(request.url.path)}"
    known = "/v1/completions, /v1/chat/completions, /v1/models, /health and /metrics"
    return ApiError(error.status_code, f"there is no {shown}; there are {known}").response()


async def _unforeseen(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server has a fault; see its log").response()
