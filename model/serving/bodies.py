"""Bodies of requests: fields of OpenAI's API, and what their values may be.

A field that would change the text and is not built here is refused unless it has the value that
changes nothing; so no client believes that it was obeyed. Beyond OpenAI's there are `top_k`,
`min_p` and `repetition_penalty`, and `decoder` with its settings, see `model.serving.decoders`.
"""

import json
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation.shown_text import printable
from model.decoding.sampling import Sampling
from model.serving.errors import ApiError, refused

MOST_STOPS = 16
LONGEST_STOP = 256
MOST_LIKELIEST = 20
_LARGEST_SEED = 1 << 63

# Fields that are known and not built, each with values that change nothing.
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "web_search_options": (None,),
    "use_beam_search": (None, False),
    "num_beams": (None, 1),
}
# Fields that change no text.
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "verbosity"),
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Body = TypeVar("Body", bound="CommonBody")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream has beside its pieces."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CommonBody(_Strict):
    """Fields of both ways to ask; None is as if a field were not there."""

    model: str
    max_tokens: int | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: int | None = None
    min_p: Finite | None = None
    repetition_penalty: Finite | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    decoder: str | None = None
    beam_width: int | None = None
    length_penalty: Finite | None = None
    distinct_beams: bool | None = None
    width_threshold: Finite | None = None
    min_width: int | None = None
    one_beam: bool | None = None
    tau: Finite | None = None
    candidates: int | None = None

    @property
    def stops(self) -> list[str]:
        """Strings that end a text."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def sampling(self) -> Sampling:
        """How tokens are chosen; at temperature 1 unless the request says otherwise."""
        temperature = 1.0 if self.temperature is None else self.temperature
        chosen = Sampling(temperature, repetition_penalty=self.repetition_penalty or 1.0)
        if temperature == 0:
            return chosen
        return chosen._replace(
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
        )


class CompletionBody(CommonBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **name}


class ChatBody(CommonBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Limits(NamedTuple):
    """What a request may ask for.

    Attributes:
        body_bytes: of a request.
        positions: tokens of a prompt and its continuation together.
        rows: texts of one request.
    """

    body_bytes: int
    positions: int
    rows: int


def parse_body(kind: type[Body], content: bytes, limits: Limits) -> Body:
    """A body whose values make sense.

    Raises:
        ApiError: naming the first field that does not.
    """
    fields = _fields(content)
    for name in _WITHOUT_EFFECT:
        fields.pop(name, None)
    for name, neutral in _NOT_BUILT.items():
        if name in fields and fields.pop(name) not in neutral:
            usual = json.dumps(neutral[-1])
            raise refused(name, f"is not supported here; leave it out, or give {usual}")
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = printable(".".join(map(str, fault["loc"])))
        message = f"{printable(fault['msg'])}; see the API's reference"
        raise refused(where or "body", message) from None
    _check(body, limits)
    return body


def _fields(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content.decode("utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep; send plain fields") from None
    except ValueError as error:
        raise ApiError(
            400, f"the body is not JSON in UTF-8 ({printable(str(error))}); send an object"
        ) from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object; send one")
    return fields


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _check(body: CommonBody, limits: Limits) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "max_tokens": (1, limits.positions),
        "max_completion_tokens": (1, limits.positions),
        "temperature": (0, 1000),
        "top_p": (1e-9, 1),
        "top_k": (0, 1 << 31),
        "min_p": (0, 1),
        "repetition_penalty": (1e-3, 1e3),
        "n": (1, limits.rows),
        "seed": (-_LARGEST_SEED, _LARGEST_SEED - 1),
        "top_logprobs": (0, MOST_LIKELIEST),
    }
    if isinstance(body, CompletionBody):
        ranges["logprobs"] = (0, MOST_LIKELIEST)
    for name, (least, most) in ranges.items():
        value = getattr(body, name, None)
        if value is not None and not least <= value <= most:
            shown = printable(f"{value}")
            raise refused(name, f"{shown} must be from {least:g} to {most:g}")
    if body.temperature is not None and 0 < body.temperature < 1e-3:
        raise refused("temperature", f"{body.temperature:g} must be 0 or at least 0.001")
    if len(body.stops) > MOST_STOPS or any(
        not stop or len(stop) > LONGEST_STOP for stop in body.stops
    ):
        raise refused(
            "stop", f"takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} letters each"
        )
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options", "is for streams alone; set stream, or leave it out")
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs", "needs logprobs to be true")
