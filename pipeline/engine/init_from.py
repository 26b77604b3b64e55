"""What a new run begins with when `train.init_from` names a model: checked and reported."""

import logging
from pathlib import Path

import tokenizers
import torch.distributed as dist

from data_prep.errors import DataError
from data_prep.shards.shard_set import ShardSet
from foundation.shown_text import reason
from model.errors import CheckpointError, ConfigError
from model.hugging_face.config import read_llama_config
from model.hugging_face.identity import (
    ImportedIdentity,
    TokenizerOrigin,
    load_identity,
    read_identity,
)
from model.hugging_face.importing import ImportedWeights, LlamaFolder
from pipeline.checkpoint.file_names import IMPORTED, TOKENIZER
from pipeline.config.run_config import RunConfig
from pipeline.distributed.agreement import from_main
from pipeline.distributed.topology import Topology

logger = logging.getLogger(__name__)


def imported_weights(
    config: RunConfig, shards: ShardSet, topology: Topology, *, resumed: bool
) -> ImportedWeights | None:
    """The initial weights that `train.init_from` gives.

    None when the key is not set, or when the run is resumed and its checkpoint has the weights.

    A collective: rank 0 checks the files' contents for all.

    Raises:
        ConfigError: the model cannot be imported, or its sizes are not the run's.
        CheckpointError: its files are damaged or incomplete.
        DataError: the shards were made with another tokenizer.
    """
    if config.train.init_from is None:
        return None
    if resumed:
        logger.info("train.init_from=%s is not read: the run goes on", config.train.init_from)
        return None
    folder = LlamaFolder(config.train.init_from)
    folder.check(config.model)
    _check_tokenizer(folder, shards)
    _verify_once(folder, topology)
    for line in describe_import(folder, config):
        logger.info("%s", line)
    return ImportedWeights(
        folder,
        config.model,
        new_heads=config.train.init_heads,
        tensor_rank=topology.tensor_rank,
        tensor_size=topology.tensor_size,
    )


def imported_identity(config: RunConfig, shards: ShardSet, resumed_from: Path | None) -> str | None:
    """What the model that the run began with is beside its weights, as JSON for its checkpoints.

    A resumed run goes on with what its checkpoint has.

    A collective: rank 0, which writes it, reads; other ranks have None.

    Raises:
        CheckpointError: a file cannot be read.
    """
    directory = config.train.init_from
    found: list[ImportedIdentity | None] = []

    def read() -> None:
        if resumed_from is not None:
            found.append(load_identity(resumed_from / IMPORTED))
        elif directory is not None:
            found.append(_read_identity(directory, shards))

    from_main(read, CheckpointError)
    return "".join(kept.model_dump_json(indent=1) + "\n" for kept in found if kept) or None


def _read_identity(directory: Path, shards: ShardSet) -> ImportedIdentity:
    own = directory / TOKENIZER
    origin: TokenizerOrigin = "unknown"
    try:
        if own.is_file():
            same = own.read_bytes() == shards.tokenizer_path.read_bytes()
            origin = "same" if same else "larger"
        vocab_size = read_llama_config(directory).vocab_size
        kept = read_identity(directory, vocab_size=vocab_size, tokenizer=origin)
    except (OSError, ValueError, ConfigError) as error:
        why = str(error) if isinstance(error, ConfigError) else reason(error)
        raise CheckpointError(f"{directory} cannot be read ({why}); give a whole model") from error
    for name, why in kept.left_out.items():
        logger.warning("%s of %s is not kept for exports: %s", name, directory, why)
    return kept


def planned_import(config: RunConfig) -> list[str]:
    """What a new run would take from where, for a dry run; empty when it takes nothing.

    Raises:
        ConfigError: the model cannot be imported, or its sizes are not the run's.
        CheckpointError: its files are incomplete.
    """
    directory = config.train.init_from
    if directory is None:
        return []
    if not directory.exists():
        return [f"weights from {directory}: not on this machine, so not looked at"]
    folder = LlamaFolder(directory)
    folder.check(config.model)
    return describe_import(folder, config)


def describe_import(folder: LlamaFolder, config: RunConfig) -> list[str]:
    """What is taken from the folder and what is not, one line each."""
    heads, held = config.model.future_tokens, folder.heads
    taken = f"heads 1 to {min(heads, held)}" if min(heads, held) > 1 else "head 1"
    lines = [f"weights from {folder.directory}: {folder.trunk_layers} trunk layers and {taken}"]
    if heads > held:
        new = f"head {heads} is" if heads == held + 1 else f"heads {held + 1} to {heads} are"
        kind = "a copy" if heads == held + 1 else "copies"
        copied = f"{kind} of its layer {folder.trunk_layers}, the next-token head"
        lines.append(f"{new} {'fresh' if config.train.init_heads == 'fresh' else copied}")
    if heads < held:
        lines.append(f"heads {heads + 1} to {held} of {folder.directory} are left out")
    rows = config.model.vocab_size - folder.sizes.vocab_size
    if rows:
        lines.append(
            f"the last {rows} of {config.model.vocab_size} rows of embedding and unembedding are "
            f"fresh: its vocabulary has {folder.sizes.vocab_size}"
        )
    if folder.sizes.tied:
        lines.append("its embedding is its unembedding, too; here they are two and may part")
    if config.train.freeze == "trunk":
        lines.append(f"only heads 2 to {heads} are trained; its next-token model stays as it is")
    return lines


def _check_tokenizer(folder: LlamaFolder, shards: ShardSet) -> None:
    """Tokens of the model's tokenizer must have the same ids in the shards; more are welcome."""
    path = folder.directory / TOKENIZER
    if not path.is_file():
        logger.warning(
            "%s has no %s: whether the shards were made with the model's tokenizer is not known",
            folder.directory,
            TOKENIZER,
        )
        return
    try:
        wanted = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
        found = tokenizers.Tokenizer.from_file(str(shards.tokenizer_path)).get_vocab()
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{path} cannot be compared with the tokenizer of the shards ({error}); "
            "put the model's own tokenizer.json there"
        ) from error
    different = [token for token, number in wanted.items() if found.get(token) != number]
    if different:
        raise DataError(
            f"{shards.tokenizer_path} is not the tokenizer of train.init_from={folder.directory}: "
            f"{len(different)} of its {len(wanted)} tokens have another id or none (the first: "
            f"{different[0]!r}); make the shards with --tokenizer {path}"
        )


def _verify_once(folder: LlamaFolder, topology: Topology) -> None:
    problem: list[str | None] = [None]
    if topology.is_main:
        try:
            folder.verify()
        except CheckpointError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(problem[0])
