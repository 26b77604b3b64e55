"""Exact deduplication: the first of equal texts stays, whatever the cuts and the workers."""

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.building import dedup
from data_prep.building.build import build
from data_prep.building.options import BuildOptions, Source
from data_prep.errors import DataError
from data_prep.shards.manifest import Manifest
from data_prep.shards.shard_set import ShardSet
from data_prep.verify import find_problems
from tests.data_prep.conftest import Silence

Build = Callable[..., Manifest]
Write = Callable[..., Path]


def stream_of(directory: Path) -> bytes:
    """The train split of the bytes tokenizer, documents ended by a line end."""
    shards = ShardSet.open(directory, "train")
    return bytes(
        10 if token == shards.eos_id else token
        for token in shards.read(0, shards.num_tokens).tolist()
    )


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.lists(
        st.lists(st.sampled_from(["a", "b", "c", "dd", "", "e" * 40, None]), max_size=12),
        min_size=2, max_size=3,
    ),
    unit_bytes=st.integers(10, 120),
    partition_texts=st.integers(1, 8),
)  # fmt: skip
def test_the_first_of_equal_texts_stays(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    files: list[list[str | None]], unit_bytes: int, partition_texts: int,
) -> None:  # fmt: skip
    """Over records, units, files and sources, for any number of partitions, and it all adds up."""
    monkeypatch.setattr(dedup, "PARTITION_TEXTS", partition_texts)
    folder = tmp_path_factory.mktemp("dedup")
    sources = []
    files = [["z"], *files]
    for number, texts in enumerate(files):
        path = folder / f"{number}.jsonl"
        path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
        sources.append(Source(f"s{number}", (path,)))
    options = BuildOptions(
        folder / "out", "bytes", sources=tuple(sources), workers=1, validation_fraction=0.0,
        unit_bytes=unit_bytes, dedup="exact", max_bad_fraction=1.0,
    )  # fmt: skip
    manifest = build(options, Silence())
    everything = [text for texts in files for text in texts]
    documents = [text for text in everything if text]
    kept = list(dict.fromkeys(documents))
    assert stream_of(folder / "out") == "".join(f"{text}\n" for text in kept).encode()
    totals = manifest.totals
    assert totals.records == len(everything)
    assert totals.documents == len(kept)
    assert totals.duplicates == len(documents) - len(kept)
    assert totals.empty == everything.count("")
    assert totals.rejects == everything.count(None)
    assert list(find_problems(folder / "out")) == []
    assert not (folder / "out" / "journal" / "dedup").exists()
    times = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.arrow")}
    assert build(options, Silence()) == manifest
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_damaged_set_is_repaired_with_the_same_duplicates(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build
) -> None:
    """After the hashes are gone, a lost shard is made again as it was."""
    path = write_jsonl(texts[:100] + texts[:50] + texts)
    manifest = build_set(path, unit_bytes=3000, dedup="exact")
    assert manifest.totals.duplicates == 150
    shard = tmp_path / "out" / manifest.shards[-1].path
    content = shard.read_bytes()
    shard.unlink()
    assert build_set(path, unit_bytes=3000, dedup="exact") == manifest
    assert shard.read_bytes() == content


def test_duplicates_of_a_rejected_text_are_duplicates(write_jsonl: Write, build_set: Build) -> None:
    """A text that is rejected for a special token is rejected once."""
    path = write_jsonl(["a", "<|endoftext|>", "b", "<|endoftext|>"])
    totals = build_set(path, dedup="exact", special_tokens="reject", max_bad_fraction=1.0).totals
    assert (totals.documents, totals.rejects, totals.duplicates) == (2, 1, 1)


def test_dedup_of_another_kind_is_refused(
    texts: list[str], write_jsonl: Write, build_set: Build
) -> None:
    """Whether duplicates are in a set is one of the things that identify it."""
    path = write_jsonl(texts)
    build_set(path)
    with pytest.raises(DataError, match="dedup: 'none' then, 'exact' now"):
        build_set(path, dedup="exact")
