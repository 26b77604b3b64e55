"""From a checkpoint to a checked export folder."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from data_prep.errors import DataError
from data_prep.shards.manifest import load_manifest
from data_prep.tokenization.tokenizer import Tokenizer
from foundation.bounded_files import read_bounded
from model.errors import CheckpointError
from model.hugging_face.acceptance import ACCEPTANCE_NAME
from model.hugging_face.early_exit import EARLY_EXIT_NAME, EarlyExit
from model.hugging_face.folder import ExportDescription
from model.hugging_face.identity import ImportedIdentity, load_identity
from pipeline.checkpoint.file_names import IMPORTED, TOKENIZER, WEIGHTS
from pipeline.checkpoint.files import checkpoint_path, verify
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.sharded_tensors import read_weights, weights_in
from pipeline.checkpoint.train_state import TrainState, read_state
from pipeline.config.run_config import RunConfig
from pipeline.exporting.acceptance import measure_acceptance
from pipeline.exporting.identity import Identity, kept_identity, own_identity
from pipeline.exporting.layer_by_layer import compare_layers
from pipeline.exporting.merging import MergedFiles, without_adapters
from pipeline.exporting.model_card import metrics_until, model_card
from pipeline.exporting.tensors import check_names, check_values
from pipeline.exporting.whole_model import RELATIVE_TOLERANCE, Parity, compare
from pipeline.exporting.writing import write_export

# Models of more bytes in fp32 are compared layer by layer only, and never whole in memory.
WHOLE_MODEL_BYTES = 2 << 30
_TOKENIZER_BYTES = 1 << 30


_NAMES_CHECKED = ", names and shapes are those of transformers' classes"


class _Trained(NamedTuple):
    """What is exported."""

    checkpoint: Path
    config: RunConfig
    state: TrainState
    tokenizer: Tokenizer
    description: ExportDescription
    identity: Identity
    early_exit: EarlyExit | None


def export_checkpoint(
    checkpoint: Path,
    directory: Path,
    *,
    dtype: str | None,
    eos_token: str | None,
    report: Callable[[str], None],
) -> tuple[Parity, ...]:
    """Export a checkpoint and compare the result with it; see `pipeline.export.export`."""
    trained = _read(checkpoint_path(checkpoint), dtype, eos_token)
    results: list[Parity] = []
    agreement: list[str] = []
    records = metrics_until(trained.checkpoint.absolute().parents[1], trained.state.step)
    write_export(
        directory,
        trained.description,
        weights_in(_open_weights(trained), trained.description.model, trained.checkpoint),
        tokenizer=trained.tokenizer.content,
        identity=trained.identity,
        card=model_card(
            trained.config, trained.state, trained.description, records, trained.identity.card
        ),
        add=lambda folder: agreement.extend(_add_files(folder, trained)),
        check=lambda folder: results.extend(_checked(folder, trained)),
    )
    model = trained.description.model
    report(
        f"exported {trained.checkpoint} (step {trained.state.step}) to {directory}: "
        f"{model.num_parameters():,} parameters in {trained.description.dtype}, "
        f"{model.future_tokens} heads"
    )
    names = "" if trained.config.model.memory else _NAMES_CHECKED
    report(f"every tensor is the checkpoint's{names}")
    for line in (*(parity.summary() for parity in results), *agreement):
        report(line)
    return tuple(results)


def _read(checkpoint: Path, dtype: str | None, eos_token: str | None) -> _Trained:
    """Everything but the weights, of a checkpoint that is whole."""
    if problems := verify(checkpoint):
        raise CheckpointError(
            f"{checkpoint} is damaged: {'; '.join(problems[:3])}; export another checkpoint"
        )
    config, state = read_config(checkpoint), read_state(checkpoint)
    tokenizer = _tokenizer(checkpoint / TOKENIZER, config, eos_token)
    imported = load_identity(checkpoint / IMPORTED)
    positions = config.data.sequence_length
    description = ExportDescription.model_validate(
        {
            "model": without_adapters(config.model),
            "dtype": dtype or state.layout.precision,
            # An import fixes what is rotated how far, so the model still knows these positions.
            "sequence_length": max(positions, imported.positions) if imported else positions,
            "eos_token": tokenizer.eos_token,
            "eos_id": tokenizer.eos_id,
            "run": config.run.name,
            "step": state.step,
        }
    )
    identity = _identity(config, description, tokenizer.content, imported)
    early_exit = imported.early_exit if imported else None
    return _Trained(checkpoint, config, state, tokenizer, description, identity, early_exit)


def _identity(
    config: RunConfig,
    description: ExportDescription,
    tokenizer: bytes,
    imported: ImportedIdentity | None,
) -> Identity:
    """The imported model's, else that of a model trained from nothing."""
    if imported is not None:
        return kept_identity(description, tokenizer, imported)
    own = own_identity(description, tokenizer, crosses_documents=not config.data.document_mask)
    if config.train.init_from is not None:
        lost = "nothing: its checkpoint was saved before such things were kept"
        own.card.insert(0, (f"Kept of `{config.train.init_from.name}`", lost))
    return own


def _add_files(folder: Path, trained: _Trained) -> Iterator[str]:
    """Write what only some exports have; a line about each."""
    if trained.early_exit is not None:
        text = trained.early_exit.model_dump_json(indent=1) + "\n"
        (folder / EARLY_EXIT_NAME).write_text(text, "utf-8")
        layer, layers = trained.early_exit.layer, trained.early_exit.model_layers
        yield (
            f"it holds an early-exit adapter on layer {layer} of the {layers} of "
            f"{trained.early_exit.model}, for --early-exit of python -m model.generate"
        )
    yield from _add_acceptance(folder, trained)


def _add_acceptance(folder: Path, trained: _Trained) -> Iterator[str]:
    """Write down how often the heads are right on held-out text, and say it, or why not."""
    heads = trained.config.model.future_tokens
    if heads == 1 or trained.config.model.memory is not None:  # whose heads do not draft
        return
    try:
        if _is_large(trained.description):
            raise CheckpointError("the model has more than 2 GiB in fp32; give a number of heads")
        found = measure_acceptance(
            folder, trained.config, trained.description, trained.tokenizer.content
        )
    except (CheckpointError, DataError, ValidationError) as error:
        why = "no position can be compared" if isinstance(error, ValidationError) else error
        yield f"agreement of the heads is not measured, so --heads auto takes all: {why}"
        return
    (folder / ACCEPTANCE_NAME).write_text(found.model_dump_json(indent=1) + "\n", "utf-8")
    expected = ", ".join(f"{found.tokens_per_forward(k):.2f}" for k in range(1, heads + 1))
    yield (
        f"on {found.agreed[0]:,} held-out positions 1 to {heads} heads give {expected} expected "
        "tokens per forward"
    )


def _checked(folder: Path, trained: _Trained) -> Iterator[Parity]:
    """Check a finished folder's tensors, then its logits in one or two ways.

    Raises:
        CheckpointError: they are not the checkpoint's.
    """
    for parity in _compared(folder, trained):
        if not parity.holds:
            raise CheckpointError(
                f"{trained.checkpoint} was not exported: the written model differs from it, "
                f"{parity.summary()}; allowed is {RELATIVE_TOLERANCE:g} of the largest logit"
            )
        yield parity


def _open_weights(trained: _Trained) -> MergedFiles:
    return MergedFiles(trained.checkpoint / WEIGHTS, trained.config.model)


def _compared(folder: Path, trained: _Trained) -> Iterator[Parity]:
    description, files = trained.description, _open_weights(trained)
    if description.model.memory is None:
        check_names(folder)
    check_values(folder, description, files)
    yield compare_layers(folder, description, files)
    # No class of transformers runs a whole model with a memory.
    if description.model.memory is None and not _is_large(description):
        weights = read_weights(trained.checkpoint / WEIGHTS, description.model)
        yield compare(folder, description, weights)


def _is_large(description: ExportDescription) -> bool:
    return 4 * description.model.num_parameters() > WHOLE_MODEL_BYTES


def _tokenizer(path: Path, config: RunConfig, eos_token: str | None) -> Tokenizer:
    """The checkpoint's tokenizer with the end-of-document token that its shards were made with."""
    try:
        content = read_bounded(path, _TOKENIZER_BYTES)
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
