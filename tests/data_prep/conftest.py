"""Small corpora and a silent observer for the data_prep tests."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import orjson
import pytest

from data_prep.building.build import build
from data_prep.building.options import BuildOptions, Source
from data_prep.inputs.input_files import find_inputs
from data_prep.inputs.reading import read_unit
from data_prep.inputs.records import Reading
from data_prep.inputs.units import plan_units
from data_prep.shards.manifest import Manifest

LINE = "def return self the of loss naïve été 数据 token 🎉 while import None 12345 == \n\t"
WORDS = LINE.split(" ")


class Silence:
    """An observer that says nothing."""

    def say(self, message: str) -> None:
        """Ignore a step."""

    def start(self, verb: str, total_bytes: int, units: int) -> None:
        """Ignore the start."""

    def finish(self, input_bytes: int, tokens: int, rejects: int) -> None:
        """Ignore progress."""

    def reading(self, text_bytes: int) -> None:
        """Ignore signs of life."""

    def skip(self, input_bytes: int) -> None:
        """Ignore what others did."""


def make_texts(count: int, seed: int) -> list[str]:
    """Deterministic documents of 1 to 60 words, all different."""
    rng = random.Random(seed)
    return [
        f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for number in range(count)
    ]


@pytest.fixture
def texts() -> list[str]:
    """Three hundred documents."""
    return make_texts(300, seed=7)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write texts as a .jsonl file below the test's folder."""

    def write(texts: Sequence[str], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
        return path

    return write


@pytest.fixture
def read_records() -> Callable[..., list[tuple[int, str | None, str]]]:
    """Give every record of some inputs in order: offset, text, reason."""

    def read(
        *paths: Path, unit_bytes: int = 1 << 20, reading: Reading | None = None
    ) -> list[tuple[int, str | None, str]]:
        found: list[tuple[int, str | None, str]] = []
        for unit in plan_units(find_inputs(paths), unit_bytes):
            for batch in read_unit(unit, reading or Reading("text")):
                assert len(batch.texts) == len(batch.offsets)
                records: list[tuple[int, str | None, str]] = [
                    (offset, text.decode(), "")
                    for offset, text in zip(batch.offsets, batch.texts, strict=True)
                ]
                records += [
                    (reject.offset, None, reject.reason)
                    for reject in batch.rejects
                    for _ in range(reject.records)
                ]
                found += sorted(records, key=lambda record: record[0])
        return found

    return read


@pytest.fixture
def build_set(tmp_path: Path) -> Callable[..., Manifest]:
    """Build a shard set in this process: bytes tokenizer, one worker, unless told otherwise."""

    def run(
        *inputs: Path, output: str = "out", tokenizer: str = "bytes", **options: object
    ) -> Manifest:
        settings: dict[str, object] = {"workers": 1, **options}
        return build(
            BuildOptions(
                inputs=inputs,
                output=tmp_path / output,
                tokenizer=tokenizer,
                **settings,  # type: ignore[arg-type]
            ),
            Silence(),
        )

    return run


@pytest.fixture
def build_mixture(
    tmp_path: Path, write_jsonl: Callable[..., Path], build_set: Callable[..., Manifest]
) -> Callable[..., Path]:
    """Build one set of several sources, of `name=texts` each, in many small shards."""

    def run(
        output: str = "mixed",
        weights: Mapping[str, float] | None = None,
        unit_bytes: int = 2000,
        **texts: Sequence[str],
    ) -> Path:
        sources = tuple(
            Source(name, (write_jsonl(part, f"{output}/{name}.jsonl"),), (weights or {}).get(name))
            for name, part in texts.items()
        )
        build_set(
            output=f"{output}/set", sources=sources, unit_bytes=unit_bytes, validation_fraction=0.2
        )
        return tmp_path / output / "set"

    return run


@pytest.fixture
def large_texts() -> list[str]:
    """Enough documents for a build to be killed in the middle."""
    return make_texts(9000, seed=11)


@pytest.fixture
def read_tree() -> Callable[[Path], dict[str, bytes]]:
    """Give every file below a folder with its bytes, but for the lock."""

    def read(directory: Path) -> dict[str, bytes]:
        return {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name != "lock"
        }

    return read
