"""Command line: a checkpoint to a Hugging Face folder, `python -m pipeline.export CHECKPOINT DIR`.

Reads any layout on one CPU process. The command itself compares logits with those of our model on
the checkpoint's weights: transformers on the written folder as a plain Llama, the folder's own
class of all heads, and our model on the folder, head by head. A folder that fails the comparison
never gets its name.
"""

import argparse
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.errors import DataError
from data_prep.manifest import load_manifest
from data_prep.tokenizer import Tokenizer
from model.errors import CheckpointError, ConfigError
from model.export_folder import ExportDescription, check_target
from pipeline.config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from model.language_model import MultiTokenModel

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130

# fp32 on the same weights in another order of additions; logits of a wrong model are off by more.
RELATIVE_TOLERANCE = 1e-4
_PARITY_ROWS = 2
_PARITY_TOKENS = 64


class Parity(NamedTuple):
    """Largest differences of logits.

    Attributes:
        transformers: head 1, `transformers` on the folder against our model on the checkpoint.
        all_heads: each head, the folder's own class in `transformers` against the same.
        reloaded: each head, our model on the folder against our model on the checkpoint.
        largest_logit: largest absolute logit, the scale of the differences.
    """

    transformers: float
    all_heads: tuple[float, ...]
    reloaded: tuple[float, ...]
    largest_logit: float

    @property
    def holds(self) -> bool:
        """Whether all differences are rounding; not so when one is not a number."""
        limit = RELATIVE_TOLERANCE * self.largest_logit
        differences = (self.transformers, *self.all_heads, *self.reloaded)
        return all(difference <= limit for difference in differences)

    def summary(self) -> str:
        """One line."""
        heads, reloaded = _shown(self.all_heads), _shown(self.reloaded)
        return (
            f"largest difference of logits (up to {self.largest_logit:.3g}): head 1 in "
            f"transformers {self.transformers:.2g}; heads 1 to {len(self.reloaded)} in its class "
            f"with all heads {heads}; reloaded {reloaded}"
        )


def _shown(differences: tuple[float, ...]) -> str:
    return ", ".join(f"{difference:.2g}" for difference in differences)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    options = _parse(arguments)
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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export",
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
) -> Parity:
    """Export a checkpoint and compare the result with it.

    Args:
        checkpoint: a step folder, a run's folder, or its checkpoints folder.
        directory: where to.
        dtype: `fp32` or `bf16`; None = the precision of the run.
        eos_token: name of the end-of-document token; None = the one of the shards.
        report: told what was done, line by line.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, the target may not be replaced
            or written, or the logits differ; the target is then as it was.
        DataError: the tokenizer has no known end-of-document token.
    """
    check_target(directory)
    # Imported here so that --help and mistakes do not wait for torch and megatron-core.
    from model.hf_format import write_export
    from pipeline.checkpoint import TOKENIZER, WEIGHTS, checkpoint_path, read_config, verify
    from pipeline.model_card import metrics_until, model_card
    from pipeline.state import read_state
    from pipeline.state_files import read_weights

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
    results = []

    def weights() -> Iterator[tuple[str, "Tensor"]]:
        return read_weights(checkpoint / WEIGHTS, config.model)

    def check(folder: Path) -> None:
        parity = compare(folder, description, weights())
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
        weights(),
        tokenizer=tokenizer.content,
        card=model_card(config, state, description, records),
        check=check,
    )
    report(
        f"exported {checkpoint} (step {state.step}) to {directory}: "
        f"{config.model.num_parameters():,} parameters in {description.dtype}, "
        f"{config.model.future_tokens} heads"
    )
    report(results[0].summary())
    return results[0]


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


def compare(
    folder: Path, description: ExportDescription, weights: Iterator[tuple[str, "Tensor"]]
) -> Parity:
    """Compare an export with the weights it was made from, in fp32, one model in memory at a time.

    Args:
        folder: the export.
        description: what it is of.
        weights: whole parameters that it was made from.
    """
    import torch

    from model.hf_format import DTYPES, build_model, load_export

    config = description.model
    generator = torch.Generator().manual_seed(0)
    shape = (_PARITY_ROWS, min(_PARITY_TOKENS, description.sequence_length))
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    stored = ((name, tensor.to(DTYPES[description.dtype])) for name, tensor in weights)
    expected = _logits(build_model(config, stored, torch.float32), tokens)
    reloaded = _logits(load_export(folder, torch.float32).model, tokens)
    plain = _transformers_logits(folder, tokens, all_heads=False)[0]
    heads = _transformers_logits(folder, tokens, all_heads=True)
    return Parity(
        transformers=float((plain - expected[0]).abs().max()),
        all_heads=tuple((heads - expected).abs().amax((1, 2, 3)).tolist()),
        reloaded=tuple((reloaded - expected).abs().amax((1, 2, 3)).tolist()),
        largest_logit=float(expected.abs().max()),
    )


def _logits(model: "MultiTokenModel", tokens: "Tensor") -> "Tensor":
    """`[n, B, S, V]` of all heads, from the same forward that training runs."""
    import torch

    with torch.no_grad():
        trunk_output = model(tokens)
        context = model.context(tokens.shape[1], tokens.device)
        hidden = [model.heads.hidden(k, trunk_output, context) for k in model.heads.numbers]
        return model.logits(torch.stack(hidden).transpose(1, 2))


def _transformers_logits(folder: Path, tokens: "Tensor", *, all_heads: bool) -> "Tensor":
    """`[1 or n, B, S, V]` of the folder as a plain Llama, or as its own class of all heads."""
    import torch
    import transformers

    from model.modeling_headway import HeadwayForCausalLM

    transformers.utils.logging.disable_progress_bar()
    kind = HeadwayForCausalLM if all_heads else transformers.AutoModelForCausalLM
    try:
        model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except ValueError as error:
        raise CheckpointError(f"transformers refuses the written model: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(problem):
            raise CheckpointError(
                f"transformers reports {problem} in the written model: "
                f"{sorted(map(str, found[problem]))[:3]}; nothing was exported"
            )
    with torch.no_grad():
        logits: Tensor
        if all_heads:
            logits = model.eval().all_head_logits(tokens).permute(2, 0, 1, 3)
        else:
            logits = model.eval()(tokens, use_cache=False).logits.unsqueeze(0)
    return logits


if __name__ == "__main__":
    sys.exit(main())
