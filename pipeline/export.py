"""Command line: a checkpoint to a Hugging Face folder, `python -m pipeline.export CHECKPOINT DIR`.

Reads any layout on one CPU process, in the memory of about one layer and the largest matrix. Before
the folder gets its name the command checks it:

- names and shapes are those that transformers' plain Llama and the class of all heads expect;
- every tensor is the checkpoint's, rounded once, bit by bit;
- logits of every head, layer by layer: transformers' layers with the folder's tensors against
  training's layers with the checkpoint's;
- for models up to `WHOLE_MODEL_BYTES`, logits again with whole models: transformers on the folder
  as a plain Llama, the class of all heads, and our model on the folder.
"""

import argparse
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import DataError
from data_prep.shards.manifest import load_manifest
from data_prep.tokenization.tokenizer import Tokenizer
from model.errors import CheckpointError, ConfigError
from model.hugging_face.folder import ExportDescription
from pipeline.config.run_config import RunConfig
from pipeline.exporting.target import check_target

if TYPE_CHECKING:
    from pipeline.exporting.whole_model import Parity

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130

# Models of more bytes in fp32 are compared layer by layer only.
WHOLE_MODEL_BYTES = 2 << 30


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.export") -> int:
    """Run the command; give its exit status."""
    options = _parse(arguments, prog)
    # megatron-core warns of parts that are not installed and that nothing here uses.
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        export(
            options.checkpoint,
            options.directory,
            dtype=options.dtype,
            eos_token=options.eos_token,
            report=print,
        )
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; nothing was exported", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(
            "Write a checkpoint as a Hugging Face Llama with the extra heads beside it, and "
            "compare its logits with the checkpoint's."
        ),
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
    # Imported here so that --help and mistakes do not wait for torch and megatron-core.
    from pipeline.checkpoint.file_names import TOKENIZER, WEIGHTS
    from pipeline.checkpoint.files import checkpoint_path, verify
    from pipeline.checkpoint.folder import read_config
    from pipeline.checkpoint.sharded_tensors import read_weights
    from pipeline.checkpoint.train_state import read_state
    from pipeline.exporting.model_card import metrics_until, model_card
    from pipeline.exporting.whole_model import RELATIVE_TOLERANCE
    from pipeline.exporting.writing import write_export

    checkpoint = checkpoint_path(checkpoint)
    if problems := verify(checkpoint):
        raise CheckpointError(
            f"{checkpoint} is damaged: {'; '.join(problems[:3])}; export another checkpoint"
        )
    config, state = read_config(checkpoint), read_state(checkpoint)
    tokenizer = _tokenizer(checkpoint / TOKENIZER, config, eos_token)
    description = ExportDescription.model_validate(
        {
            "model": config.model,
            "dtype": dtype or state.layout.precision,
            "sequence_length": config.data.sequence_length,
            "eos_token": tokenizer.eos_token,
            "eos_id": tokenizer.eos_id,
            "run": config.run.name,
            "step": state.step,
        }
    )
    results: list[Parity] = []

    def check(folder: Path) -> None:
        for parity in _checks(folder, description, checkpoint / WEIGHTS):
            if not parity.holds:
                raise CheckpointError(
                    f"{checkpoint} was not exported: the written model differs from it, "
                    f"{parity.summary()}; allowed is {RELATIVE_TOLERANCE:g} of the largest logit"
                )
            results.append(parity)

    records = metrics_until(checkpoint.absolute().parents[1], state.step)
    write_export(
        directory,
        description,
        read_weights(checkpoint / WEIGHTS, config.model),
        tokenizer=tokenizer.content,
        card=model_card(config, state, description, records),
        check=check,
    )
    report(
        f"exported {checkpoint} (step {state.step}) to {directory}: "
        f"{config.model.num_parameters():,} parameters in {description.dtype}, "
        f"{config.model.future_tokens} heads"
    )
    report("every tensor is the checkpoint's, names and shapes are those of transformers' classes")
    for parity in results:
        report(parity.summary())
    return tuple(results)


def _checks(folder: Path, description: ExportDescription, weights: Path) -> "Iterator[Parity]":
    """Check a finished folder's tensors, then give its logits' differences in one or two ways."""
    from pipeline.checkpoint.sharded_tensors import StateFiles, read_weights
    from pipeline.exporting.layer_by_layer import compare_layers
    from pipeline.exporting.tensors import check_names, check_values
    from pipeline.exporting.whole_model import compare

    files = StateFiles(weights, description.model)
    check_names(folder)
    check_values(folder, description, files)
    yield compare_layers(folder, description, files)
    if 4 * description.model.num_parameters() <= WHOLE_MODEL_BYTES:
        yield compare(folder, description, read_weights(weights, description.model))


def _tokenizer(path: Path, config: RunConfig, eos_token: str | None) -> Tokenizer:
    """The checkpoint's tokenizer with the end-of-document token that its shards were made with."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); export another checkpoint"
        ) from error
    return Tokenizer(content, eos_token or _eos_of_shards(config, content), str(path))


def _eos_of_shards(config: RunConfig, tokenizer: bytes) -> str | None:
    """What the shard set says; None when it is gone or was made anew with another tokenizer."""
    try:
        entry = load_manifest(config.data.shards).tokenizer
    except DataError:
        return None
    return entry.eos_token if entry.sha256 == hashlib.sha256(tokenizer).hexdigest() else None


if __name__ == "__main__":
    sys.exit(main())
