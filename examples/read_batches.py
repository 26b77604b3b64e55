"""Training batches of a shard set: `python examples/read_batches.py [DIR]`.

The order of samples is a pure function of the shards and the seed, so the position in the data is
one integer: a run that resumes, or that changes its number of ranks, reads on with that.
"""

import argparse
from pathlib import Path

import torch

from data_prep.loading.loader import Batch, BatchLayout, TokenLoader
from data_prep.loading.sequences import SequenceFormat
from data_prep.shards.shard_set import ShardSet

HEADS = 4
GLOBAL_BATCH = 8


def loader_of(shards: ShardSet, rank: int, ranks: int) -> TokenLoader:
    """What one of `ranks` data-parallel ranks reads from; all ranks together read 8 samples."""
    return TokenLoader(
        shards,
        SequenceFormat(sequence_length=64, future_tokens=HEADS),
        BatchLayout(
            micro_size=GLOBAL_BATCH // ranks,
            accumulation=1,
            data_rank=rank,
            data_size=ranks,
        ),
        seed=1234,
    )


def main() -> None:
    """Show one batch, then read the same step in three ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, nargs="?", default=Path("runs/examples/shards"))
    shards = ShardSet.open(parser.parse_args().shards, "train")

    loader = loader_of(shards, 0, 1)
    (batch,) = loader.step_batches(next_sample=0)
    print(f"tokens {list(batch.tokens.shape)}, labels {list(batch.labels.shape)}: a row per head")
    print("sample 0, position 0:", batch.tokens[0, 0].item(), end=" -> ")
    print("targets of heads 1 to 4:", batch.labels[:, 0, 0].tolist())

    # Step 5 by walking there, as training does (a thread reads ahead) ...
    steps = loader.prefetch(range(0, 6 * GLOBAL_BATCH, GLOBAL_BATCH))
    for _ in range(6):
        (walked,) = next(steps)
    steps.close()
    # ... by jumping there, as a resumed run does ...
    (jumped,) = loader_of(shards, 0, 1).step_batches(next_sample=5 * GLOBAL_BATCH)
    # ... and on two ranks, which share the same global batch.
    halves: list[Batch] = []
    for rank in range(2):
        halves += loader_of(shards, rank, 2).step_batches(next_sample=5 * GLOBAL_BATCH)

    assert torch.equal(walked.tokens, jumped.tokens)
    assert torch.equal(walked.tokens, torch.cat([half.tokens for half in halves]))
    print("step 5 has the same samples: walked to, jumped to, and read by two ranks")


if __name__ == "__main__":
    main()
