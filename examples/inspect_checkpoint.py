"""The weights in a checkpoint: `python examples/inspect_checkpoint.py [RUN|CHECKPOINT]`.

Works on any machine, whatever layout the run had: ranks' shares are put together, one parameter at
a time. (`headway inspect` shows step, layout and health.)
"""

import argparse
from collections import Counter
from pathlib import Path

from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.files import checkpoint_path, verify
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.sharded_tensors import read_weights
from pipeline.checkpoint.train_state import read_state


def main() -> None:
    """Print every parameter, and how many belong to each part of the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", default=Path("runs/examples/run"))

    # A run's folder stands for its newest checkpoint.
    checkpoint = checkpoint_path(parser.parse_args().path)
    assert verify(checkpoint) == [], "every file is as the manifest says"
    config, state = read_config(checkpoint), read_state(checkpoint)
    print(f"{checkpoint}: step {state.step}, {state.tokens:,} tokens\n")

    parts: Counter[str] = Counter()
    for name, weight in read_weights(checkpoint / WEIGHTS, config.model):
        shape = " x ".join(map(str, weight.shape))
        rms = weight.square().mean().sqrt().item()
        print(f"{name:56} {shape:>10}  root mean square {rms:.4f}")
        parts[name.partition(".")[0]] += weight.numel()

    print()
    for part, count in parts.most_common():
        print(f"{part:12} {count:10,} parameters")
    assert sum(parts.values()) == config.model.num_parameters()


if __name__ == "__main__":
    main()
