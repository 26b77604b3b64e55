"""The verify command."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.shards.arrow_file import ShardRows, read_shard, write_shard
from data_prep.shards.manifest import (
    Manifest,
    ShardEntry,
    load_manifest,
    order_fingerprint,
    total_splits,
    write_manifest,
)
from data_prep.verify import find_problems, main


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


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("sources", 0, "weight"), 3.5),
        (("sources", 0, "text_key"), "body"),
        (("validation_fraction",), 0.5),
        (("tokenizer", "vocab_size"), 1000),
        (("tokenizer", "spec"), "bytes"),
        (("inputs", 0, "path"), "/elsewhere/corpus.jsonl"),
        (("inputs", 0, "mtime_ns"), 5),
        (("dedup",), "exact"),
    ],
)
def test_an_edited_manifest_is_found(
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    keys: tuple[str | int, ...],
    value: object,
) -> None:
    """What no shard depends on is held against the sum that the build kept of its manifest."""
    path = directory / "manifest.json"
    layout = json.loads(path.read_text())
    inner = layout
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(layout, indent=1))
    assert main([str(directory)]) == 1
    assert "manifest.json was edited" in capsys.readouterr().err


def test_a_vocabulary_is_held_against_the_tokenizer(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without the journal, as in a copied set."""
    manifest = load_manifest(directory)
    (directory / "journal" / "committed.json").unlink()
    wrong = manifest.tokenizer.model_copy(update={"vocab_size": 401})
    write_manifest(directory, manifest.model_copy(update={"tokenizer": wrong}))
    assert main([str(directory)]) == 1
    assert "tokenizer's vocab_size is 400, the manifest says 401" in capsys.readouterr().err


def test_all_damage_is_reported(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a missing, a cut or a changed shard nor a lost tokenizer hides the others."""
    first, second, third, fourth = (
        directory / shard.path for shard in load_manifest(directory).shards[:4]
    )
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    third.write_bytes(third.read_bytes()[:-1] + b"?")
    fourth.unlink()
    fourth.mkdir()
    (directory / "tokenizer.json").write_bytes(b"{}")
    assert main([str(directory)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5
    for path, problem in (
        (directory / "tokenizer.json", "is not the tokenizer"),
        (first, "is missing"),
        (second, "bytes, the manifest says"),
        (third, "is damaged"),
        (fourth, "is not a regular file"),
    ):
        assert any(line.startswith(f"{path} ") and problem in line for line in errors)


def test_every_flipped_byte_is_named_in_a_line(directory: Path) -> None:
    """Wherever a set is damaged, verify says so and goes on; it never ends in a traceback."""
    files = [directory / "manifest.json", directory / "tokenizer.json"]
    files += sorted((directory / "shards").rglob("*.arrow"))[:2]
    rng = random.Random(22)
    for _ in range(200):
        path = rng.choice([files[0], *files])
        content = path.read_bytes()
        damaged, position = bytearray(content), rng.randrange(len(content))
        damaged[position] ^= rng.choice([1 << rng.randrange(8), 0xFF])
        path.write_bytes(damaged)
        try:
            problems = list(find_problems(directory, sample=3))
        except DataError as error:
            problems = [str(error)]
        assert problems, (path, position)
        assert all("\n" not in problem for problem in problems)
        path.write_bytes(content)


@pytest.mark.parametrize("path", ["../b.arrow", "/dev/zero", "shards/a\x00b", "shards//a", ""])
def test_shards_outside_of_the_set_are_not_read(directory: Path, path: str) -> None:
    """A manifest that names another file is refused before that file is touched."""
    layout = json.loads((directory / "manifest.json").read_text())
    layout["shards"][0]["path"] = path
    (directory / "manifest.json").write_text(json.dumps(layout))
    with pytest.raises(DataError, match="does not stay in the folder"):
        list(find_problems(directory))
