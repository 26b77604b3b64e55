"""Several sources in one set: their order, folders, totals and weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.building.build import build
from data_prep.building.options import BuildOptions, Source
from data_prep.building.plan import UnitList, make_plan
from data_prep.errors import DataError
from data_prep.shards.manifest import Manifest, load_manifest
from data_prep.verify import find_problems
from tests.data_prep.conftest import Silence

Write = Callable[..., Path]
ReadTree = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def sources(tmp_path: Path, texts: list[str], write_jsonl: Write) -> tuple[Source, ...]:
    """A .jsonl source, a directory, and a .jsonl with another key."""
    (tmp_path / "tree").mkdir()
    for number, text in enumerate(texts[100:140]):
        (tmp_path / "tree" / f"{number:03d}.txt").write_text(text)
    other = tmp_path / "other.jsonl"
    content = write_jsonl(texts[200:], "draft.jsonl").read_bytes()
    other.write_bytes(content.replace(b'{"text"', b'{"body"'))
    return (
        Source("web", (write_jsonl(texts[:100]),)),
        Source("tree", (tmp_path / "tree",)),
        Source("papers", (other,), text_key="body"),
    )


def build_sources(output: Path, sources: tuple[Source, ...], **options: object) -> Manifest:
    """Build a set of several sources."""
    settings: dict[str, object] = {"workers": 1, "unit_bytes": 3000, "validation_fraction": 0.1}
    return build(
        BuildOptions(output, "bytes", sources=sources, **settings | options),  # type: ignore[arg-type]
        Silence(),
    )


def test_units_keep_to_one_source(tmp_path: Path, sources: tuple[Source, ...]) -> None:
    """Units and files count on from source to source, and the list on disk gives each back."""
    options = BuildOptions(tmp_path / "out", "bytes", sources=sources, unit_bytes=3000)
    plan = make_plan(options)
    assert [planned.unit.number for planned in plan.units] == list(range(len(plan.units)))
    assert [planned.source for planned in plan.units] == sorted(p.source for p in plan.units)
    for planned in plan.units:
        for segment in planned.unit.segments:
            assert plan.files[segment.file] == segment.input
            assert plan.file_sources[segment.file] == planned.source
    build_sources(tmp_path / "out", sources)
    listed = UnitList(tmp_path / "out")
    assert [listed[number] for number in range(len(listed))] == plan.units


def test_each_source_has_its_folder_and_totals(
    tmp_path: Path, sources: tuple[Source, ...], texts: list[str]
) -> None:
    """Shards lie in shards/SPLIT/SOURCE; source ledgers and splits add up to those of the set."""
    manifest = build_sources(tmp_path / "out", sources)
    assert [source.name for source in manifest.sources] == ["web", "tree", "papers"]
    assert [source.totals.documents for source in manifest.sources] == [100, 40, 100]
    assert all(f"/{shard.source}/" in shard.path for shard in manifest.shards)
    for name, split in manifest.splits.items():
        parts = [source.splits[name] for source in manifest.sources]
        assert sum(part.tokens for part in parts) == split.tokens
        assert sum(part.shards for part in parts) == split.shards
    assert manifest.totals.text_bytes == sum(
        len(text.encode()) for text in texts[:140] + texts[200:]
    )
    assert {entry.source for entry in manifest.inputs} == {"web", "tree", "papers"}
    assert list(find_problems(tmp_path / "out")) == []


def test_one_source_is_as_before(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Callable[..., Manifest]
) -> None:
    """A single source named in a file has the fingerprint of the same --input."""
    path = write_jsonl(texts)
    given = build_set(path, output="a", unit_bytes=3000, validation_fraction=0.1)
    named = build_sources(tmp_path / "b", (Source("web", (path,)),))
    assert named.fingerprint == given.fingerprint


def test_new_weights_rewrite_the_manifest_alone(
    tmp_path: Path, sources: tuple[Source, ...], read_tree: ReadTree
) -> None:
    """Weights stand in the manifest; changing them touches no shard and no fingerprint."""
    first = build_sources(tmp_path / "out", sources)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.arrow")}
    weighted = tuple(
        Source(source.name, source.inputs, weight, text_key=source.text_key)
        for source, weight in zip(sources, (1.0, 2.0, 0.5), strict=True)
    )
    second = build_sources(tmp_path / "out", weighted)
    assert [source.weight for source in load_manifest(tmp_path / "out").sources] == [1, 2, 0.5]
    assert second.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_changed_sources_are_refused(tmp_path: Path, sources: tuple[Source, ...]) -> None:
    """New, gone, renamed and reordered sources and another key of one are named."""
    build_sources(tmp_path / "out", sources[:2])
    with pytest.raises(DataError, match="new source: papers"):
        build_sources(tmp_path / "out", sources)
    with pytest.raises(DataError, match="gone source: tree"):
        build_sources(tmp_path / "out", sources[:1])
    with pytest.raises(DataError, match="the order of the sources"):
        build_sources(tmp_path / "out", sources[1::-1])
    other = Source("web", sources[0].inputs, text_key="body")
    with pytest.raises(DataError, match="source web: text_key: 'text' then, 'body' now"):
        build_sources(tmp_path / "out", (other, sources[1]))


def test_a_file_belongs_to_one_source(tmp_path: Path, sources: tuple[Source, ...]) -> None:
    """The same file in two sources would be counted twice, so it is refused."""
    twice = (sources[0], Source("again", sources[0].inputs))
    with pytest.raises(DataError, match=r"corpus\.jsonl is in the sources web and again"):
        build_sources(tmp_path / "out", twice)
    assert not (tmp_path / "out").exists()
