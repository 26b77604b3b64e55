"""What a run remembers of its shards, so that other shards can be refused with the difference."""

from pydantic import BaseModel, ConfigDict

from data_prep.shards.shard_set import ShardSet

FINGERPRINT_CHARACTERS = 16


class SourceSummary(BaseModel):
    """Sizes and contents of one source of a split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    documents: int
    shards: int
    fingerprint: str


class DataSummary(BaseModel):
    """Sizes and contents of a split.

    Attributes:
        tokenizer_sha256: of its tokenizer.json.
        sources: in the order of the stream.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer_sha256: str
    sources: dict[str, SourceSummary]


def summarize(shards: ShardSet) -> DataSummary:
    """The summary of a split."""
    streams = {name: shards.of_source(name) for name in shards.sources}
    return DataSummary(
        tokenizer_sha256=shards.tokenizer_sha256,
        sources={
            name: SourceSummary(
                tokens=stream.num_tokens,
                documents=stream.num_documents,
                shards=len(stream.shards),
                fingerprint=stream.fingerprint[:FINGERPRINT_CHARACTERS],
            )
            for name, stream in streams.items()
        },
    )


def differences(saved: DataSummary, current: DataSummary) -> list[str]:
    """In what two splits differ, in words; empty when they are alike."""
    found = []
    if saved.tokenizer_sha256 != current.tokenizer_sha256:
        before, now = saved.tokenizer_sha256[:12], current.tokenizer_sha256[:12]
        found.append(f"another tokenizer (sha256 {before}, now {now})")
    found += [f"source {name} is gone" for name in saved.sources if name not in current.sources]
    found += [f"source {name} is new" for name in current.sources if name not in saved.sources]
    for name, source in saved.sources.items():
        if name in current.sources and source != current.sources[name]:
            found.append(f"source {name}: {_difference(source, current.sources[name])}")
    if not found and list(saved.sources) != list(current.sources):
        found.append(f"the sources were in the order {', '.join(saved.sources)}")
    return found


def _difference(before: SourceSummary, now: SourceSummary) -> str:
    changed = [
        f"{getattr(before, field):,} {field}, now {getattr(now, field):,}"
        for field in ("tokens", "documents", "shards")
        if getattr(before, field) != getattr(now, field)
    ]
    return "; ".join(changed) or "the same sizes, but other documents or another order"
