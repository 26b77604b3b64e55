"""Study: what is a memory of earlier segments worth to a small model, on long documents?

`python -m benchmarks.studies.hmt [--quick]` trains the same model with a memory, with the memory of
the segment before alone, and without, on equally many tokens, and asks each about long streams.
"""

import itertools
import json
import math
import random
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.studies.hmt.documents import Streams, long_texts, streams, taking_turns
from benchmarks.studies.hmt.reading import (
    losses_in_windows,
    losses_with_memory,
    losses_without_memories,
    most_bytes,
    recalls,
)
from benchmarks.studies.runner import Figures, Study, Trained, main, shard
from model.hugging_face.loading import load_export
from model.inference.loading import load_network
from model.language_model import MultiTokenModel

_MOST_CHARACTERS, _QUICK_CHARACTERS = 9_000_000, 900_000
_VOCABULARY = 512
_SEGMENT = 64
# Windows of the models without a memory: of the one that is trained on so many tokens, a segment
# and its sensory tokens, and of the one that is trained on whole sequences.
_STRIDES = {72: 8, 576: 288}
_LENGTH = 36 * _SEGMENT
_ASKED, _QUICK_ASKED = 16, 2
# Borders between groups of segments; sequences of the training have nine.
_PLACES = (0, 1, 2, 4, 9, 18, 36)
_DISTANCES = (0, 1, 2, 4, 8, 16, 36)
_LENGTHS, _QUICK_LENGTHS = (576, 2304, 9216), (576, 2304)


def prepare(folder: Path, quick: bool) -> dict[str, Path]:
    """Shards of long documents, half of them two that take turns; one in ten is held out."""
    path = folder / "texts.jsonl"
    if not (folder / "shards" / "manifest.json").exists():
        roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
        roots.append(Path("/usr/include"))
        texts = long_texts(roots, _QUICK_CHARACTERS if quick else _MOST_CHARACTERS)
        (folder / "held_out.json").write_text(json.dumps(texts[::10]))
        learnt = [text for number, text in enumerate(texts) if number % 10]
        half = len(learnt) // 2
        pairs = zip(learnt[:half:2], learnt[1:half:2], strict=False)
        learnt[:half] = [taking_turns(*pair) for pair in pairs]
        with path.open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in learnt)
    return {
        "texts": shard(
            folder / "shards", "--input", str(path), "--tokenizer", f"train:{_VOCABULARY}"
        )
    }


def measure(trained: Trained, quick: bool) -> Figures:
    """Perplexity by kind of stream and by position, what is recalled, bytes that are kept."""
    loaded = load_export(trained.export, torch.float32)
    texts = json.loads((trained.shards.parent / "held_out.json").read_text())
    asked = texts[: _QUICK_ASKED if quick else _ASKED]
    kinds = streams(loaded.tokenizer, asked, _LENGTH + 1, _SEGMENT)
    window = loaded.record.description.sequence_length
    figures = {"parameters": float(loaded.model.config.num_parameters())}
    for kind, found in kinds.items():
        figures |= _perplexities(loaded.model, kind, found, window)
        memory = loaded.model.config.memory
        if memory is not None and memory.retrieval:
            figures |= _recalled(loaded.model, kind, found.tokens[:, :_LENGTH])
    return figures | _bytes_kept(trained, window, quick)


def _perplexities(model: MultiTokenModel, kind: str, found: Streams, window: int) -> Figures:
    counted, figures = found.counted[:, 1:], {}
    if model.config.memory is not None:
        losses = losses_with_memory(model, found.tokens)
        cleared = losses_without_memories(model, found.tokens)
        figures[f"{kind}_cleared"] = math.exp(cleared[counted].mean())
    else:
        losses = losses_in_windows(model, found.tokens, window, _STRIDES[window])
        blocks = losses_in_windows(model, found.tokens, window, window)
        figures[f"{kind}_blocks"] = math.exp(blocks[counted].mean())
    figures[kind] = math.exp(losses[counted].mean())
    for first, stop in itertools.pairwise(_PLACES):
        part = slice(first * _SEGMENT, stop * _SEGMENT)
        figures[f"{kind}_{stop}"] = math.exp(losses[:, part][counted[:, part]].mean())
    return figures


def _recalled(model: MultiTokenModel, kind: str, tokens: Tensor) -> Figures:
    """Shares of segments by how far back lies what they recall, and what stands there."""
    numbers, shares = recalls(model, tokens)
    distances = torch.arange(2, 2 + len(numbers)).unsqueeze(1) - numbers
    figures = {
        f"recall_{kind}_{stop}": ((distances > first) & (distances <= stop)).float().mean().item()
        for first, stop in itertools.pairwise(_DISTANCES)
    }
    figures[f"recall_{kind}_share"] = shares.mean().item()
    figures[f"recall_{kind}_even"] = (distances % 2 == 0).float().mean().item()
    figures[f"recall_{kind}_odd_segments"] = (numbers % 2 == 1).float().mean().item()
    return figures


def _bytes_kept(trained: Trained, window: int, quick: bool) -> Figures:
    """MiB at most while texts of several lengths are read."""
    network = load_network(trained.export, torch.float32, torch.device("cpu"), memory=True).network
    generator = random.Random(3)
    figures = {}
    for length in _QUICK_LENGTHS if quick else _LENGTHS:
        kept = min(length, window) if window == min(_STRIDES) else length
        tokens = [generator.randrange(_VOCABULARY) for _ in range(kept)]
        figures[f"mib_{length}"] = most_bytes(network, tokens) / 2**20
    return figures


def _by_place(prefix: str, borders: tuple[int, ...]) -> dict[str, str]:
    """Figures by position or distance, with the numbers that each is of."""
    return {
        f"{prefix}_{stop}": str(stop) if stop == first + 1 else f"{first + 1} to {stop}"
        for first, stop in itertools.pairwise(borders)
    }


STUDY = Study(
    folder=Path(__file__).parent,
    title="A memory of earlier segments",
    prepare=prepare,
    measure=measure,
    columns={
        "concatenated": "perplexity, concatenated",
        "concatenated_cleared": "with no memories",
        "concatenated_blocks": "in windows without overlap",
        "interleaved": "interleaved",
        "interleaved_cleared": "with no memories",
        "interleaved_blocks": "in windows without overlap",
        "diluted": "diluted",
        "recall_concatenated_share": "share of the memory that is recalled",
        "recall_interleaved_even": "interleaved: recalls at even distances",
        "recall_diluted_odd_segments": "diluted: recalls of filler",
        **{f"mib_{length}": f"MiB, {length:,} tokens read" for length in _LENGTHS},
        "parameters": "parameters",
    },
    curves={
        "Perplexity by segment, concatenated": _by_place("concatenated", _PLACES),
        "Perplexity by segment, interleaved": _by_place("interleaved", _PLACES),
        "Segments by the distance of what they recall, concatenated": _by_place(
            "recall_concatenated", _DISTANCES
        ),
        "Segments by the distance of what they recall, interleaved": _by_place(
            "recall_interleaved", _DISTANCES
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
