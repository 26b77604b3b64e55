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
from model.hugging_face.early_exit import LowerLayers
from model.hugging_face.identity import (
    ImportedIdentity,
    TokenizerOrigin,
    load_identity,
    read_identity,
)
from model.hugging_face.importing import ImportedWeights, LlamaFolder
from model.memory.sizes import MEMORY
from pipeline.checkpoint.file_names import FOLDER, IMPORTED, TOKENIZER
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
    folder = _open_folder(config)
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
            found.append(_with_early_exit(_read_identity(directory, shards), config))

    from_main(read, CheckpointError)
    return "".join(kept.model_dump_json(indent=1) + "\n" for kept in found if kept) or None


def _with_early_exit(kept: ImportedIdentity, config: RunConfig) -> ImportedIdentity:
    """The same, and of an adapter's run which model the adapter drafts for."""
    if config.train.freeze != "early_exit":
        return kept
    logger.info("hashing all weights of %s, which the adapter drafts for", config.train.init_from)
    assert config.train.init_from is not None
    early_exit = LowerLayers(config.train.init_from).early_exit(config.model)
    return kept.model_copy(update={"early_exit": early_exit})


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
    folder = _open_folder(config)
    folder.check(config.model)
    return describe_import(folder, config)


def describe_import(folder: LlamaFolder, config: RunConfig) -> list[str]:
    """What is taken from the folder and what is not, one line each."""
    if config.train.freeze == "early_exit":
        return _describe_early_exit(folder, config)
    model = config.model
    heads, new = model.future_tokens, folder.new_heads(model)
    taken = heads - len(new)
    told = f"heads 1 to {taken}" if taken > 1 else "head 1" if taken else "no head"
    lines = [f"weights from {folder.directory}: {model.trunk_layers} trunk layers and {told}"]
    if new:
        lines.append(_describe_new_heads(folder, config, new))
    if heads < folder.heads and not new:
        lines.append(f"heads {heads + 1} to {folder.heads} of {folder.directory} are left out")
    rows = config.model.vocab_size - folder.sizes.vocab_size
    if rows:
        lines.append(
            f"the last {rows} of {config.model.vocab_size} rows of embedding and unembedding are "
            f"fresh: its vocabulary has {folder.sizes.vocab_size}"
        )
    if folder.sizes.tied:
        lines.append("its embedding is its unembedding, too; here they are two and may part")
    if config.model.memory is not None:
        begun = "goes on from its own" if folder.holds(f"{MEMORY}initial", model) else "is fresh"
        alone = ", and it alone is trained" if config.train.freeze == "all_but_memory" else ""
        lines.append(f"the memory {begun}{alone}")
    if config.train.freeze == "trunk":
        lines.append(f"only heads 2 to {heads} are trained; its next-token model stays as it is")
    return lines


def _describe_early_exit(folder: LlamaFolder, config: RunConfig) -> list[str]:
    """What an adapter stands on, and what it begins as."""
    layer, last = config.model.trunk_layers, config.model.layers - 1
    copied = f"a copy of its layer {layer}"
    if last > layer:
        copied = f"a copy of its layers {layer} to {last}"
    began = "fresh" if config.train.init_heads == "fresh" else copied
    return [
        f"weights from {folder.directory}: the first {layer} of its {folder.sizes.layers} layers, "
        "embedding and LM head",
        f"the early-exit adapter on them is {began}; it alone is trained",
    ]


def _describe_new_heads(folder: LlamaFolder, config: RunConfig, new: list[int]) -> str:
    """What the heads that the folder lacks begin as."""
    model, fresh = config.model, config.train.init_heads == "fresh"
    one = len(new) == 1
    which = f"head {new[0]} is" if one else f"heads {new[0]} to {new[-1]} are"
    if model.head_kind == "linear":
        identity = "the identity" if one else "identities"
        if fresh and 1 in new and not one:
            return f"head 1 is the identity, and heads 2 to {new[-1]} are fresh"
        return f"{which} {'fresh' if fresh and 1 not in new else identity}"
    if fresh:
        return f"{which} fresh"
    if model.head_kind == "anticausal":
        return f"the unembeddings of {which.removesuffix(' are').removesuffix(' is')} are copies"
    last = folder.sizes.layers - 1
    copied = f"its layer {last}" if model.head_layers == 1 else "its last layers"
    return f"{which} {'a copy' if one else 'copies'} of {copied}, the next-token head"


def _open_folder(config: RunConfig) -> LlamaFolder:
    """The folder of `train.init_from`, unless it is one of a run.

    Raises:
        ConfigError: it is, or it cannot be imported.
        CheckpointError: a file is missing or unreadable.
    """
    directory = config.train.init_from
    assert directory is not None
    if (directory / FOLDER).is_dir() or directory.parent.name == FOLDER:
        raise ConfigError(
            f"train.init_from={directory} is a checkpoint, or a run with checkpoints, not a model; "
            f"export it with python -m pipeline.export {directory} EXPORT and give that folder"
        )
    return LowerLayers(directory) if config.train.freeze == "early_exit" else LlamaFolder(directory)


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
