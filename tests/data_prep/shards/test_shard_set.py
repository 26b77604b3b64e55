"""Opening and reading a shard set; refusing one that is not whole."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.shards import open_files as shard_files
from data_prep.shards import shard_set
from data_prep.shards.manifest import Manifest
from data_prep.shards.shard_set import ShardSet
from tests.support.hostile import check_message, limits


@pytest.fixture
def directory(
    tmp_path: Path,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
) -> Path:
    """A set of many small shards."""
    build_set(write_jsonl(texts), unit_bytes=2000, shard_tokens=700, validation_fraction=0.1)
    return tmp_path / "out"


def first_shard(directory: Path) -> Path:
    """The first file of the train split."""
    return directory / ShardSet.open(directory, "train").manifest.shards[0].path


def test_reads_cross_shard_borders(directory: Path) -> None:
    """Any range of the stream equals the same range of all shards read one after the other."""
    shards = ShardSet.open(directory, "train")
    stream = shards.read(0, shards.num_tokens)
    assert len(shards.manifest.shards) > 20
    generator = np.random.default_rng(0)
    for _ in range(300):
        start, end = sorted(generator.integers(0, shards.num_tokens + 1, size=2).tolist())
        assert np.array_equal(shards.read(start, end - start), stream[start:end])
    assert shards.read(shards.num_tokens, 0).tolist() == []


def test_open_files_stay_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more shards than descriptors the oldest are closed, from several threads at once."""
    monkeypatch.setattr(shard_files, "MAX_OPEN_FILES", 3)
    before = len(os.listdir("/proc/self/fd"))
    shards = ShardSet.open(directory, "train")
    stream = shards.read(0, shards.num_tokens)
    results: list[bool] = []

    def read_all() -> None:
        parts = [shards.read(start, 50) for start in range(0, shards.num_tokens - 50, 50)]
        results.append(np.array_equal(np.concatenate(parts), stream[: 50 * len(parts)]))

    threads = [threading.Thread(target=read_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True, True, True]
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    shards.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_missing_sets_are_refused(tmp_path: Path, directory: Path) -> None:
    """No folder, no manifest and no such split each say how to get one."""
    with pytest.raises(DataError, match=r"not a directory; make the shards with .*shard\.py"):
        ShardSet.open(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        ShardSet.open(directory, "test")
    (directory / "manifest.json").unlink()
    with pytest.raises(DataError, match="incomplete"):
        ShardSet.open(directory, "train")


def test_broken_manifests_are_refused(directory: Path) -> None:
    """A manifest cut short, with an unknown key, or edited by hand is not believed."""
    path = directory / "manifest.json"
    content = path.read_text()
    path.write_text(content[: len(content) // 2])
    with pytest.raises(DataError, match="not a valid manifest"):
        ShardSet.open(directory, "train")
    layout = json.loads(content)
    path.write_text(json.dumps({**layout, "surprise": 1}))
    with pytest.raises(DataError, match=r"not a valid manifest \(surprise"):
        ShardSet.open(directory, "train")
    layout["shards"].reverse()
    path.write_text(json.dumps(layout))
    with pytest.raises(DataError, match="was edited"):
        ShardSet.open(directory, "train")


def test_missing_and_truncated_shards_are_refused(directory: Path) -> None:
    """A file that is shorter, longer or gone is refused at open, by name."""
    path = first_shard(directory)
    content = path.read_bytes()
    for wrong in (content[:-1], content + b"\0", b""):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=r"00000\.arrow has .* bytes, the manifest says"):
            ShardSet.open(directory, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"00000\.arrow is missing"):
        ShardSet.open(directory, "train")


def test_a_flipped_bit_is_found(directory: Path) -> None:
    """One flipped bit passes the size check and is refused by the checksum."""
    path = first_shard(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ShardSet.open(directory, "train")
    with pytest.raises(DataError, match=r"00000\.arrow is damaged: its checksum"):
        ShardSet.open(directory, "train", verify=True)


def test_another_tokenizer_is_refused(directory: Path) -> None:
    """A tokenizer.json that is not the one the shards were made with is noticed at open."""
    path = directory / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match="not the tokenizer"):
        ShardSet.open(directory, "train")


def test_a_shard_cut_while_in_use_is_an_error(directory: Path) -> None:
    """A file that shrinks after the check gives an error, never wrong tokens."""
    shards = ShardSet.open(directory, "train")
    shards.read(0, 1)
    os.truncate(first_shard(directory), 100)
    with pytest.raises(DataError, match="was cut while in use"):
        shards.read(0, 10)


def test_a_large_set_is_opened_by_its_listing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many shards a missing one is refused at open, a short one before its first byte."""
    monkeypatch.setattr(shard_files, "MAX_SIZES_AT_OPEN", 3)
    path = first_shard(directory)
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    shards = ShardSet.open(directory, "train")
    with pytest.raises(DataError, match=r"00000\.arrow has .* bytes, the manifest says"):
        shards.read(0, 1)
    assert shards.read(shards.num_tokens - 1, 1)[0] == shards.eos_id
    path.unlink()
    with pytest.raises(DataError, match=r"00000\.arrow is missing"):
        ShardSet.open(directory, "train")


@pytest.mark.parametrize("offsets_per_read", [2, 3, 7, 512])
def test_document_starts_come_from_the_offsets(
    directory: Path, monkeypatch: pytest.MonkeyPatch, offsets_per_read: int
) -> None:
    """In any range, across shards, they are the positions after end-of-document tokens."""
    monkeypatch.setattr(shard_set, "OFFSETS_PER_READ", offsets_per_read)
    shards = ShardSet.open(directory, "train")
    stream = shards.read(0, shards.num_tokens)
    starts = np.concatenate([[0], np.flatnonzero(stream == shards.eos_id)[:-1] + 1])
    assert len(starts) == shards.num_documents
    assert np.array_equal(np.cumsum(shards.document_lengths())[:-1], starts[1:])
    generator = np.random.default_rng(1)
    ranges = generator.integers(0, shards.num_tokens + 1, size=(300, 2))
    ranges[:100, 1] = np.minimum(ranges[:100, 0] + 20, shards.num_tokens)
    for start, end in np.sort(ranges, axis=1).tolist():
        expected = starts[(starts >= start) & (starts < end)]
        assert np.array_equal(shards.document_starts(start, end - start), expected)


def test_offsets_of_uneven_documents_are_found_in_few_reads(
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One giant document among thousands of short ones misleads the guess, not for long."""
    texts = ["ab"] * 3000 + ["c" * 200_000] + [str(number) for number in range(3000)]
    build_set(write_jsonl(texts, "uneven.jsonl"), output="uneven", validation_fraction=0)
    monkeypatch.setattr(shard_set, "OFFSETS_PER_READ", 16)
    shards = ShardSet.open(tmp_path / "uneven", "train")
    assert len(shards.shards) == 1
    reads: list[int] = []
    real = ShardSet._offsets

    def counted(shards: ShardSet, number: int, first: int, count: int) -> NDArray[np.int64]:
        reads.append(first)
        return real(shards, number, first, count)

    monkeypatch.setattr(ShardSet, "_offsets", counted)
    stream = shards.read(0, shards.num_tokens)
    for start in range(0, shards.num_tokens - 50, 997):
        reads.clear()
        found = shards.document_starts(start, 50)
        ends = np.flatnonzero(stream[max(start - 1, 0) : start + 49] == shards.eos_id)
        assert np.array_equal(found[found > 0], ends + max(start - 1, 0) + 1)
        assert len(reads) <= 22


def test_a_source_is_a_stream_of_its_own(directory: Path) -> None:
    """With one source its stream and fingerprint are the split's; an unknown one is refused."""
    whole = ShardSet.open(directory, "train")
    (name,) = whole.sources
    one = ShardSet.open(directory, "train", name)
    assert one.fingerprint == whole.of_source(name).fingerprint == whole.fingerprint
    assert np.array_equal(one.read(0, one.num_tokens), whole.read(0, whole.num_tokens))
    with pytest.raises(DataError, match=r"no source 'web'; it has corpus"):
        ShardSet.open(directory, "train", "web")


@pytest.mark.parametrize("kind", ["device", "pipe", "outside", "folder outside"])
@pytest.mark.parametrize("few", [True, False])
def test_only_files_of_the_set_are_read(
    directory: Path, tmp_path: Path, kind: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device, a pipe, and a link out of the folder are refused, however large the set."""
    if not few:
        monkeypatch.setattr(shard_files, "MAX_SIZES_AT_OPEN", 0)
    path = first_shard(directory)
    if kind == "folder outside":
        moved = path.parent.rename(tmp_path / "elsewhere")
        path.parent.symlink_to(moved)
    elif kind == "outside":
        path.symlink_to(path.rename(tmp_path / "elsewhere"))
    else:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with limits(5), pytest.raises(DataError, match=r"is no file of the set|is missing"):
        ShardSet.open(directory, "train").read(0, 10)


def test_a_link_within_the_set_is_read(directory: Path) -> None:
    """And so is a set that is itself reached through a link."""
    path = first_shard(directory)
    path.symlink_to(path.rename(path.with_name("moved")).name)
    linked = directory.with_name("linked")
    linked.symlink_to(directory)
    assert len(ShardSet.open(linked, "train").read(0, 10)) == 10


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../manifest.json", "shards/../../x", "a\0b", "x" * 300, "\x1b[2J"]
)
def test_names_in_the_manifest_stay_in_the_set(directory: Path, name: str) -> None:
    """Absolute, upward, unprintable and too long paths of shards, and such names of sources."""
    path = directory / "manifest.json"
    content = path.read_text()
    for key in ("path", "source"):
        layout = json.loads(content)
        layout["shards"][0][key] = name
        path.write_text(json.dumps(layout))
        with limits(5), pytest.raises(DataError) as caught:
            ShardSet.open(directory, "train")
        check_message(str(caught.value))


@pytest.mark.parametrize("kind", ["pipe", "device", "deep", "huge", "not text"])
def test_hostile_manifests_are_refused(directory: Path, kind: str) -> None:
    """Whatever has the manifest's name is read up to a bound, or not at all."""
    path = directory / "manifest.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 42)
    else:
        path.write_bytes(b'{"format": ' + b"[" * 100_000 if kind == "deep" else b'{"\xff": 1}')
    with limits(5), pytest.raises(DataError) as caught:
        ShardSet.open(directory, "train")
    check_message(str(caught.value))
