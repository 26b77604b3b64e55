"""Command line: a checkpoint to a Hugging Face folder, `python -m pipeline.export CHECKPOINT DIR`.

Reads any layout on one CPU process, in the memory of about one layer and the largest matrix. Before
the folder gets its name the command checks it:

- names and shapes are those that transformers' plain Llama and the class of all heads expect;
- every tensor is the checkpoint's, rounded once, bit by bit;
- logits of every head, layer by layer: transformers' layers with the folder's tensors against
  training's layers with the checkpoint's;
- for models up to 2 GiB in fp32, logits again with whole models: transformers on the folder
  as a plain Llama, the class of all heads, and our model on the folder.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import DataError
from foundation.command_line import exit_status
from model.errors import CheckpointError, ConfigError
from pipeline.checkpoint.files import checkpoint_path
from pipeline.exporting.target import check_target

if TYPE_CHECKING:
    from pipeline.exporting.whole_model import Parity

EPILOG = """\
examples:
  PROG runs/7b export
  PROG runs/7b/checkpoints/step_00005000 export --dtype bf16

exit status: 0 the export is written and compared, 1 the checkpoint or the folder cannot be used (in
one line), 2 wrong arguments, 130 after Ctrl-C
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.export") -> int:
    """Run the command; give its exit status."""
    options = _parse(arguments, prog)
    # megatron-core warns of parts that are not installed and that nothing here uses.
    warnings.filterwarnings("ignore", category=UserWarning)

    def run() -> None:
        export(
            options.checkpoint,
            options.directory,
            dtype=options.dtype,
            eos_token=options.eos_token,
            report=print,
        )

    return exit_status(
        run,
        CheckpointError,
        ConfigError,
        DataError,
        interrupted="interrupted; nothing was exported",
    )


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(
            "Write a checkpoint as a Hugging Face Llama with the extra heads beside it, and\n"
            "compare its logits with the checkpoint's."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a step folder, or a run's folder for its newest")
    add("directory", type=Path, metavar="DIR", help="where to; an earlier export is replaced")
    add("--dtype", choices=("fp32", "bf16"), help="of the written weights (as trained)")
    add("--eos-token", metavar="TOKEN", help="end of document (as in the shards)")
    return parser.parse_args(arguments)


def export(
    checkpoint: Path,
    directory: Path,
    *,
    dtype: str | None = None,
    eos_token: str | None = None,
    report: Callable[[str], None],
) -> "tuple[Parity, ...]":
    """Export a checkpoint and compare the result with it.

    Args:
        checkpoint: a step folder, a run's folder, or its checkpoints folder.
        directory: where to.
        dtype: `fp32` or `bf16`; None = the precision of the run.
        eos_token: name of the end-of-document token; None = the one of the shards.
        report: told what was done, line by line.

    Returns:
        The comparison of logits layer by layer, and for a small model that of whole models.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, the target may not be replaced
            or written, or tensors or logits differ; the target is then as it was.
        DataError: the tokenizer has no known end-of-document token.
    """
    check_target(directory)
    checkpoint = checkpoint_path(checkpoint)
    # Imported here so that --help and mistakes do not wait for torch and megatron-core.
    from pipeline.exporting.exporter import export_checkpoint

    return export_checkpoint(checkpoint, directory, dtype=dtype, eos_token=eos_token, report=report)


if __name__ == "__main__":
    sys.exit(main())
