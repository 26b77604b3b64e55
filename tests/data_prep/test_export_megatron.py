"""Other readers of shards: megatron-core reads the export, Hugging Face datasets the shards."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from data_prep import export_megatron
from data_prep.shards.manifest import Manifest
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import bytes_tokenizer


@pytest.mark.parametrize("tokenizer", ["bytes", "train:400"])
def test_megatron_core_reads_every_document(
    tmp_path: Path,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokenizer: str,
) -> None:
    """Over many shards: document i of IndexedDataset is document i of the split."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    monkeypatch.setattr(export_megatron, "COPIED_TOKENS", 100)
    build_set(write_jsonl(texts[:80]), tokenizer=tokenizer, unit_bytes=2000)
    prefix = str(tmp_path / "megatron" / "corpus")
    assert export_megatron.main([str(tmp_path / "out"), prefix]) == 0
    shards = ShardSet.open(tmp_path / "out", "train")
    assert f"{shards.num_documents:,} documents" in capsys.readouterr().out
    assert len(shards.shards) > 3
    read = IndexedDataset(prefix)
    lengths = shards.document_lengths()
    ends = np.cumsum(lengths)
    assert len(read) == shards.num_documents
    assert read.document_indices.tolist() == list(range(shards.num_documents + 1))
    assert np.array_equal(read.sequence_lengths, lengths)
    for number, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        assert np.array_equal(read[number], shards.read(end - length, length))
    assert Path(prefix + ".bin").stat().st_size == shards.num_tokens * read[0].itemsize


def test_uint32_tokens_become_int32(
    tmp_path: Path, write_jsonl: Callable[..., Path], build_set: Callable[..., Manifest]
) -> None:
    """Megatron has no unsigned type of four bytes; the values are the same."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = json.loads(bytes_tokenizer())
    tokenizer["model"]["vocab"]["far"] = 70_000
    (tmp_path / "wide.json").write_text(json.dumps(tokenizer))
    build_set(
        write_jsonl(["ab", "c"]), tokenizer=str(tmp_path / "wide.json"), validation_fraction=0
    )
    shards = ShardSet.open(tmp_path / "out", "train")
    assert shards.dtype == np.uint32
    export_megatron.export(shards, str(tmp_path / "wide"))
    found = IndexedDataset(str(tmp_path / "wide"))
    assert found[0].dtype == np.int32
    assert found[0].tolist() + found[1].tolist() == shards.read(0, 5).tolist()


def test_an_empty_split_is_refused(
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing to export is said, and no file is left."""
    build_set(write_jsonl(["only"]), validation_fraction=0)
    arguments = [str(tmp_path / "out"), str(tmp_path / "x"), "--split", "validation"]
    assert export_megatron.main(arguments) == 1
    assert "no documents in its split validation" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_hugging_face_datasets_reads_the_shards(
    tmp_path: Path,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
) -> None:
    """`load_dataset("arrow")` takes the files as they are: one row per document."""
    build_set(write_jsonl(texts[:60]), unit_bytes=3000)
    shards = ShardSet.open(tmp_path / "out", "train")
    files = [str(shards.directory / shard.path) for shard in shards.shards]
    assert len(files) > 1
    loaded = datasets.load_dataset(
        "arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == shards.num_documents
    tokens = [token for row in loaded for token in row["tokens"]]
    assert tokens == shards.read(0, shards.num_tokens).tolist()
    assert set(loaded.column_names) == {"tokens", "src", "row"}
