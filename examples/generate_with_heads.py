"""Export a run, then generate with 1 to n heads: `python examples/generate_with_heads.py [RUN]`.

The heads draft the next tokens and one forward checks them, so the text is that of head 1 alone,
in fewer forwards. (`headway export` and `headway generate --compare` do the same.)
"""

import argparse
import warnings
from collections import Counter
from pathlib import Path

from pipeline.export import export


def main() -> None:
    """Export, generate, and show how many tokens each forward gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/examples/run"))
    parser.add_argument("--output", type=Path, default=Path("runs/examples/export"))
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--new-tokens", type=int, default=48)
    given = parser.parse_args()

    # megatron-core warns, when it is imported, of parts that are not installed.
    warnings.filterwarnings("ignore", category=UserWarning)
    from model.decoding.generation import generate
    from model.inference.loading import load_network

    # Compares every tensor and every head's logits with the checkpoint before it is done.
    export(given.run, given.output, report=print)

    network, tokenizer, record, _ = load_network(given.output)
    prompt = tokenizer.encode(given.prompt, add_special_tokens=False).ids
    texts = []
    for heads in range(1, record.future_tokens + 1):
        result = generate(network, [prompt], heads=heads, max_new_tokens=given.new_tokens)
        # A block is what one forward gave: one token for sure, and the drafts that were right.
        blocks = Counter(len(block) for block in result.blocks[0])
        shares = ", ".join(f"{size} tokens: {count}" for size, count in sorted(blocks.items()))
        mean = result.tokens_per_forward
        print(f"{heads} of {record.future_tokens} heads: {mean:.2f} tokens per forward ({shares})")
        texts.append(tokenizer.decode(prompt + result.tokens[0]))

    assert len(set(texts)) == 1, "the same text with any number of heads"
    print(f"\n{texts[0]}")


if __name__ == "__main__":
    main()
