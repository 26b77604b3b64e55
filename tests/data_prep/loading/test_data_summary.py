"""What a run remembers of its data, and how other data is told from it."""

from collections.abc import Callable
from pathlib import Path

from data_prep.loading.data_summary import DataSummary, SourceSummary, differences, summarize
from data_prep.shards.shard_set import ShardSet

WEB = SourceSummary(tokens=1000, documents=10, shards=1, fingerprint="aa")
CODE = SourceSummary(tokens=2000, documents=20, shards=2, fingerprint="bb")


def summary(tokenizer: str = "t" * 64, **sources: SourceSummary) -> DataSummary:
    """A summary of these sources."""
    return DataSummary(tokenizer_sha256=tokenizer, sources=sources)


def test_equal_data_has_no_difference() -> None:
    """Also after a round trip through a checkpoint's JSON."""
    before = summary(web=WEB, code=CODE)
    assert differences(before, DataSummary.model_validate_json(before.model_dump_json())) == []


def test_each_difference_is_named() -> None:
    """Tokenizer, sources that came and went, sizes, contents, order."""
    before = summary(web=WEB, code=CODE)
    larger = WEB.model_copy(update={"tokens": 1500, "shards": 2, "fingerprint": "cc"})
    other = CODE.model_copy(update={"fingerprint": "dd"})
    found = differences(before, summary("u" * 64, web=larger, code=other, books=WEB))
    assert found == [
        "another tokenizer (sha256 tttttttttttt, now uuuuuuuuuuuu)",
        "source books is new",
        "source web: 1,000 tokens, now 1,500; 1 shards, now 2",
        "source code: the same sizes, but other documents or another order",
    ]
    assert differences(before, summary(code=CODE)) == ["source web is gone"]
    assert differences(before, summary(code=CODE, web=WEB)) == [
        "the sources were in the order web, code"
    ]


def test_a_summary_counts_what_is_there(
    texts: list[str], build_mixture: Callable[..., Path]
) -> None:
    """Sizes of each source of the split, a prefix of its fingerprint."""
    shards = ShardSet.open(build_mixture(web=texts[:40], code=texts[40:50]), "train")
    found = summarize(shards)
    assert list(found.sources) == ["web", "code"]
    assert sum(source.tokens for source in found.sources.values()) == shards.num_tokens
    assert sum(source.documents for source in found.sources.values()) == shards.num_documents
    assert shards.of_source("code").fingerprint.startswith(found.sources["code"].fingerprint)
    reordered = ShardSet.open(build_mixture("b", web=texts[39::-1], code=texts[40:50]), "train")
    (difference,) = differences(found, summarize(reordered))
    assert difference.startswith("source web: the same sizes, but") or "shards, now" in difference
