"""Text files to a shard set, from Python: `python examples/tokenize_corpus.py [FOLDER]`.

The same as the command `headway shard --input FOLDER --output DIR --tokenizer train:1024`.
"""

import argparse
import sys
from pathlib import Path

from data_prep.shard import main as shard
from data_prep.shards.shard_set import ShardSet

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Tokenize a folder, then show what the set holds; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "pipeline")
    parser.add_argument("--output", type=Path, default=Path("runs/examples/shards"))
    given = parser.parse_args()

    # Restartable: killed anywhere, the same call does what is missing.
    status = shard(
        [
            *("--input", str(given.folder)),
            *("--output", str(given.output)),
            *("--tokenizer", "train:1024"),
            *("--validation-fraction", "0.1"),
            *("--workers", "1"),
        ]
    )
    if status:
        return status

    shards = ShardSet.open(given.output, "train")
    print(f"\n{shards.num_documents} documents, {shards.num_tokens:,} tokens to train on")
    # Documents lie end to end in one stream of tokens; each ends with eos_id.
    first = shards.read(0, int(shards.document_lengths()[0]))
    assert first[-1] == shards.eos_id
    print(f"the first document has {len(first):,} tokens and begins with")
    print(shards.open_tokenizer().decode(first[:32]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
