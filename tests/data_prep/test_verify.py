"""The verify command."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.arrow_file import ShardRows, read_shard, write_shard
from data_prep.shards.manifest import (
    Manifest,
    ShardEntry,
    load_manifest,
    order_fingerprint,
    total_splits,
    write_manifest,
)
from data_prep.verify import main


@pytest.fixture
def directory(
    tmp_path: Path,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
) -> Path:
    """A set with trained BPE."""
    build_set(write_jsonl(texts), tokenizer="train:400", unit_bytes=8000)
    return tmp_path / "out"


def forge(directory: Path, change: Callable[[ShardRows], ShardRows]) -> None:
    """Rewrite the first shard with other contents and a manifest that agrees with it."""
    manifest = load_manifest(directory)
    first = manifest.shards[0]
    rows, metadata = read_shard(directory / first.path)
    copy = rows._replace(tokens=rows.tokens.copy())
    written = write_shard(directory / first.path, change(copy), metadata)
    entry = ShardEntry.of(first.path, first.split, first.source, first.unit, written)
    shards = [entry, *manifest.shards[1:]]
    facts = (manifest.tokenizer.sha256, manifest.tokenizer.eos_id, manifest.dtype, shards)
    changed = {
        "shards": shards,
        "fingerprint": order_fingerprint(*facts),
        "splits": total_splits(*facts),
        "sources": [manifest.sources[0].model_copy(update={"splits": total_splits(*facts)})],
    }
    write_manifest(directory, manifest.model_copy(update=changed))


def test_a_good_set_passes(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fresh set has no problem, with its input file and without it."""
    assert main([str(directory)]) == 0
    source = Path(load_manifest(directory).inputs[0].path)
    source.unlink()
    assert main([str(directory), "--sample", "1000"]) == 0
    assert capsys.readouterr().err == ""


def change_token(rows: ShardRows) -> ShardRows:
    """Another word in the first document."""
    rows.tokens[1] = 70 if rows.tokens[1] != 70 else 71
    return rows


def add_eos(rows: ShardRows) -> ShardRows:
    """An end of document inside the first document."""
    rows.tokens[1] = 0
    return rows


def exceed(rows: ShardRows) -> ShardRows:
    """An id above the vocabulary."""
    rows.tokens[1] = 60_000
    return rows


def drop_row(rows: ShardRows) -> ShardRows:
    """The last document lost."""
    return ShardRows(
        rows.tokens[: rows.offsets[-2]], rows.offsets[:-1], rows.src[:-1], rows.row[:-1]
    )


def wrong_source(rows: ShardRows) -> ShardRows:
    """A document from a file that is not in the manifest."""
    return rows._replace(src=np.full_like(rows.src, 9))


def empty_document(rows: ShardRows) -> ShardRows:
    """The first document without a token, its tokens in the second."""
    offsets = rows.offsets.copy()
    offsets[1] = 0
    return rows._replace(offsets=offsets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty_document, "offsets do not rise from 0 to"),
        (change_token, "document 0 does not decode back"),
        (add_eos, "end-of-document tokens for"),
        (exceed, "id 60000 is above 399"),
        (drop_row, "documents are in the shards"),
        (wrong_source, "names input 9 of 1"),
    ],
)
def test_each_kind_of_fault_is_named(
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[ShardRows], ShardRows],
    message: str,
) -> None:
    """Faults that checksums cannot see, because the manifest agrees with them, are found."""
    forge(directory, change)
    assert main([str(directory)]) == 1
    assert message in capsys.readouterr().err


def test_damage_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit, a wrong ledger and a missing manifest are one line each."""
    entry = load_manifest(directory).shards[1]
    path = directory / entry.path
    content = bytearray(path.read_bytes())
    content[entry.values_offset] ^= 1
    path.write_bytes(content)
    assert main([str(directory)]) == 1
    assert "is damaged" in capsys.readouterr().err
    manifest = directory / "manifest.json"
    layout = json.loads(manifest.read_text())
    layout["totals"]["records"] += 1
    manifest.write_text(json.dumps(layout))
    assert main([str(directory)]) == 1
    assert "not documents + empty + duplicates + rejects" in capsys.readouterr().err
    manifest.unlink()
    assert main([str(directory)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_totals_are_checked_by_source(
    build_mixture: Callable[..., Path], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each source is listed; totals, and documents of another source, are held against shards."""
    directory = build_mixture(web=texts[:40], code=texts[40:60])
    assert main([str(directory)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"source web: \d+ shards, 40 documents, [\d,]+ tokens", out)
    assert re.search(r"source code: \d+ shards, 20 documents", out)
    manifest = load_manifest(directory)
    web, code = manifest.sources
    ledger = web.totals.model_copy(update={"documents": 41, "records": 41})
    inputs = [entry.model_copy(update={"source": "code"}) for entry in manifest.inputs]
    changed = {
        "sources": [web.model_copy(update={"totals": ledger}), code],
        "inputs": inputs,
    }
    write_manifest(directory, manifest.model_copy(update=changed))
    assert main([str(directory)]) == 1
    err = capsys.readouterr().err
    assert "source web: 0 documents are in the shards, 41 in its totals" in err
    assert "web.jsonl, which is of source code" in err
