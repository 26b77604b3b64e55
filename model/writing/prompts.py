"""The prompts of a command line as tokens."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.errors import ConfigError

if TYPE_CHECKING:
    from model.inference.loading import LoadedNetwork


def encode_prompts(
    texts: Sequence[str], max_new_tokens: int, loaded: "LoadedNetwork", begin: int | None
) -> list[list[int]]:
    """Ids of each prompt; an empty one becomes the token that begins a text, if there is one."""
    prompts = []
    for number, text in enumerate(texts, 1):
        if not _is_unicode(text):
            raise ConfigError(
                f"prompt {number} is not UTF-8 text; convert it to UTF-8, or give another --prompt"
            )
        ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            if begin is None:
                raise ConfigError(
                    f"prompt {number} is empty, and this model was not trained to begin a text: "
                    "bos_token_id in its config.json is null; give the beginning of one"
                )
            ids = [begin]
        prompts.append(ids)
    longest, limit = max(map(len, prompts)), loaded.record.description.sequence_length
    if longest + max_new_tokens > limit and loaded.network.config.memory is None:
        print(
            f"note: a prompt of {longest} tokens and {max_new_tokens} new ones may pass position "
            f"{limit}, the last one the model was trained on; the text may get worse from there",
            file=sys.stderr,
        )
    return prompts


def _is_unicode(text: str) -> bool:
    """Whether it is text; bytes of a command line that are none come as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
