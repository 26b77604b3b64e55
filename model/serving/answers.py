"""Answers in the form of OpenAI's API, whole or in pieces."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from model.serving.row_text import Delta, TokenNote


class Answer(ABC):
    """What all answers to one request share.

    Args:
        model: its name.
        with_notes: whether tokens' logarithmic probabilities are given.
        marks: fields beside OpenAI's, of all its objects.
    """

    prefix: str
    whole_object: str
    piece_object: str

    def __init__(self, model: str, with_notes: bool, marks: Mapping[str, Any]) -> None:
        self._with_notes = with_notes
        self._common = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            **marks,
        }

    def whole(self, rows: Sequence[Sequence[Delta]], usage: dict[str, int]) -> dict[str, Any]:
        """All texts at once, from their deltas."""
        choices = [
            self._choice(
                index,
                Delta(
                    "".join(delta.text for delta in deltas),
                    [note for delta in deltas for note in delta.notes],
                    deltas[-1].finish,
                ),
            )
            for index, deltas in enumerate(rows)
        ]
        return {**self._common, "object": self.whole_object, "choices": choices, "usage": usage}

    def piece(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object of a stream."""
        return {**self._common, "object": self.piece_object, "choices": list(choices), **more}

    def begin(self, rows: int) -> list[dict[str, Any]]:
        """Choices that a stream begins with."""
        return []

    @abstractmethod
    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """A text of a whole answer."""

    @abstractmethod
    def choice_piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """What a stream says of one text."""


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = piece_object = "text_completion"

    def __init__(self, model: str, with_notes: bool, marks: Mapping[str, Any]) -> None:
        super().__init__(model, with_notes, marks)
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return self.choice_piece(index, delta)

    def choice_piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """What a stream says of one text."""
        notes = self._notes(index, delta.notes) if self._with_notes else None
        return {
            "index": index,
            "text": delta.text,
            "logprobs": notes,
            "finish_reason": delta.finish,
        }

    def _notes(self, index: int, notes: Sequence[TokenNote]) -> dict[str, Any]:
        offsets = []
        for note in notes:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(note.text)
        return {
            "tokens": [note.text for note in notes],
            "token_logprobs": [note.logprob for note in notes],
            # Of tokens that are spelled alike, pieces of characters, the likeliest one counts.
            "top_logprobs": [dict(reversed(note.likeliest)) for note in notes],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object, piece_object = "chat.completion", "chat.completion.chunk"

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._notes(delta.notes),
            "finish_reason": delta.finish,
        }

    def begin(self, rows: int) -> list[dict[str, Any]]:
        """Who speaks."""
        begun = {"role": "assistant", "content": ""}
        return [{"index": row, "delta": begun, "finish_reason": None} for row in range(rows)]

    def choice_piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """What a stream says of one text."""
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._notes(delta.notes),
            "finish_reason": delta.finish,
        }

    def _notes(self, notes: Sequence[TokenNote]) -> dict[str, Any] | None:
        if not self._with_notes:
            return None
        content = [
            {
                **_token(note.text, note.logprob),
                "top_logprobs": [_token(text, logprob) for text, logprob in note.likeliest],
            }
            for note in notes
        ]
        return {"content": content, "refusal": None}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Counts of one request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
