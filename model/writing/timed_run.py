"""A generation that was timed, and what the command says of it."""

from typing import TYPE_CHECKING, NamedTuple

from model.writing.options import EXIT_DIFFERENT

if TYPE_CHECKING:
    from model.decoding.generation import Generation


class Run(NamedTuple):
    """One timed generation.

    Attributes:
        generation: what came out.
        drafts: what drafted: so many heads, head 1 among them, a second model, or an adapter.
        tried: how often each draft of a forward was verified after all before it had been kept;
            None = whenever they had.
        most_drafts: tokens that were drafted for each forward, at most.
        seconds: that it took.
        first_s: seconds until the first token of each prompt was there.
        notes: lines that the decoder adds to the statistics.
    """

    generation: "Generation"
    drafts: str
    tried: list[int] | None
    most_drafts: int
    seconds: float
    first_s: float
    notes: list[str]

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all prompts per second, reading the prompts included."""
        return self.generation.num_tokens / self.seconds

    def summary(self) -> str:
        """One line of counts."""
        result = self.generation
        return (
            f"{self.drafts}: {result.num_tokens} tokens, {result.forwards} forwards, "
            f"{result.tokens_per_forward:.2f} tokens per forward, {self.tokens_per_s:.1f} tokens/s"
        )

    def statistics(self) -> list[str]:
        """Lines about time and drafts."""
        result = self.generation
        later_s = self.seconds - self.first_s
        each = 1000 * later_s / (result.forwards - 1) if result.forwards > 1 else 0.0
        lines = [f"first token after {1000 * self.first_s:.1f} ms, then {each:.2f} ms per forward"]
        if result.logprobs is not None:
            mean = sum(map(sum, result.logprobs)) / result.num_tokens
            lines.append(f"mean logarithmic probability of a token, by head 1: {mean:.4f}")
        lines += self.notes
        sizes = [len(block) for blocks in result.blocks for block in blocks[1:]]
        for draft in range(1, self.most_drafts + 1):
            tried = sum(size >= draft for size in sizes)
            if self.tried is not None:
                tried = self.tried[draft - 1]
            kept = sum(size > draft for size in sizes)
            share = f"{kept / tried:.0%}" if tried else "-"
            name = f"draft of head {draft + 1}" if "head" in self.drafts else f"draft {draft}"
            lines.append(f"{name}: kept {kept} of {tried} times ({share})")
        return lines


def print_comparison(plain: Run, speculative: Run) -> int:
    """Say whether both runs gave the same tokens; give the exit status."""
    differences = [
        (prompt, position)
        for prompt, (a, b) in enumerate(
            zip(plain.generation.tokens, speculative.generation.tokens, strict=True), 1
        )
        if (position := _first_difference(a, b)) is not None
    ]
    speed_up = speculative.tokens_per_s / plain.tokens_per_s
    if not differences:
        print(f"outputs are equal, speed-up {speed_up:.2f}")
        return 0
    prompt, position = differences[0]
    print(
        f"outputs DIFFER, first at new token {position + 1} of prompt {prompt}; in bf16 two tokens "
        "may be equally likely up to rounding, so try --dtype fp32"
    )
    return EXIT_DIFFERENT


def _first_difference(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    matching = [x == y for x, y in zip(a, b, strict=False)]
    return matching.index(False) if False in matching else len(matching)
