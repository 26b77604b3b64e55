"""The keys of `model.memory`: how a model reads its input in segments and what it keeps of them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# What the names of a memory's parameters begin with, in a model and in an export.
MEMORY = "memory."
PARAMETERS = ("initial", "summary", "query", "key")

MemoryMode = Literal["strict_prev", "paper", "strict_score"]

# Far above any use; below, what is computed from them takes no time.
_MOST = 1 << 24
_DEFAULT_SENSORY = 32  # the paper's, where segments are that long

Tokens = Annotated[int, Field(gt=0, le=_MOST)]


def _default_summary(fields: dict[str, Any]) -> int:
    return max(1, int(fields["segment"]) // 2)


def _default_sensory(fields: dict[str, Any]) -> int:
    return min(_DEFAULT_SENSORY, int(fields["segment"]))


class MemorySizes(BaseModel):
    """A memory of earlier segments (Hierarchical Memory Transformer, He et al. 2024).

    The trunk reads a segment of L tokens between two copies of a prompt that is made from the
    memories of earlier segments, and its last position gives the memory of this one.

    Attributes:
        segment: L, tokens of a segment.
        summary: j, tokens whose summary asks for memories; half a segment unless given.
        sensory: k, last tokens of the segment before that are read again; 32 unless given, or all
            of a shorter segment; 0 = none.
        cache: N, memories that are kept, the last ones.
        width: d_h, of the query and the keys of the retrieval; null = model.hidden_size.
        mode: which tokens the summary is of. strict_prev = the last j of the segment before, so
            that no prediction sees a later token; paper = the first j of the segment itself, as
            published, so that positions before j see a little of the tokens up to there;
            strict_score = the same, but only positions from j on have targets.
        bptt: D, segments that the gradient of a segment's loss goes back, through their memories.
        retrieval: false = no retrieval: the prompt is the memory of the segment before (stage 1).
        adapter_rank: r, of low-rank adapters on the products of the trunk's layers, which are
            trained with the memory where all else is frozen; 0 = none.
        adapter_alpha: what they add is weighed with adapter_alpha / r.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    segment: Tokens
    summary: Tokens = Field(default_factory=_default_summary)
    sensory: Annotated[int, Field(ge=0, le=_MOST)] = Field(default_factory=_default_sensory)
    cache: Tokens = 300
    width: Tokens | None = None
    mode: MemoryMode = "strict_prev"
    bptt: Annotated[int, Field(ge=0, le=_MOST)] = 2
    retrieval: bool = True
    adapter_rank: Annotated[int, Field(ge=0, le=_MOST)] = 0
    adapter_alpha: float = Field(default=32.0, gt=0)

    @field_validator("summary", "sensory")
    @classmethod
    def _lies_in_a_segment(cls, tokens: int, info: ValidationInfo) -> int:
        segment = info.data.get("segment")
        if segment is not None and tokens > segment:
            raise ValueError(
                f"{info.field_name}={tokens} is more than the {segment} tokens of a segment; "
                f"set it to at most model.memory.segment={segment}"
            )
        return tokens

    @property
    def recent(self) -> int:
        """Last tokens of a segment that the next one needs."""
        of_before = self.retrieval and self.mode == "strict_prev"
        return max(self.sensory, self.summary if of_before else 0)

    def key_width(self, hidden_size: int) -> int:
        """d_h."""
        return self.width or hidden_size

    def num_parameters(self, hidden_size: int) -> int:
        """What a memory adds to a model: the initial memory, and for the retrieval T, W_q, W_k.

        Example: of width 4,096 with d_h = 4,096, 33,562,624.
        """
        if not self.retrieval:
            return hidden_size
        return 2 * hidden_size + 2 * hidden_size * self.key_width(hidden_size)

    def num_segments(self, length: int) -> int:
        """Segments of so many tokens; the last one may be shorter."""
        return -(-length // self.segment)


def memory_shapes(sizes: MemorySizes, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the parameters, as `model.memory.prompts.MemoryWeights` has them."""
    names = PARAMETERS if sizes.retrieval else PARAMETERS[:1]
    rows = (1, 1, sizes.key_width(hidden_size), sizes.key_width(hidden_size))
    return {name: (count, hidden_size) for name, count in zip(names, rows, strict=False)}
