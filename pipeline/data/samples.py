"""The data of a run: shards that fit it, training samples and their mixture, validation samples."""

import hashlib
import logging
from typing import NamedTuple

from data_prep.errors import DataError
from data_prep.loading.loader import BatchLayout, TokenLoader
from data_prep.loading.sequences import cut_sequences
from data_prep.shards.shard_set import ShardSet
from model.errors import ConfigError
from pipeline.checkpoint.train_state import TrainState
from pipeline.config.data_section import WeightPhase
from pipeline.config.problems import listed
from pipeline.config.run_config import RunConfig
from pipeline.data.mixture_plan import weight_problems
from pipeline.data.sequence_format import sequence_format
from pipeline.data.validation import ValidationSamples
from pipeline.distributed.agreement import on_all_ranks
from pipeline.distributed.topology import Topology

logger = logging.getLogger(__name__)

_VERIFY_BELOW_BYTES = 2**30


class RunData(NamedTuple):
    """What a run reads.

    Attributes:
        shards: the training split.
        training: this rank's training samples.
        validation: this rank's validation samples; None when the run does not validate.
    """

    shards: ShardSet
    training: TokenLoader
    validation: ValidationSamples | None


def open_data(config: RunConfig, topology: Topology) -> RunData:
    """The shards, and this rank's samples of them; a collective.

    Raises:
        ConfigError: the run's settings do not fit its data.
        DataError: the shards are missing, damaged or too few.
    """

    def opened() -> RunData:
        shards = open_shards(config)
        training = training_samples(
            config, shards, data_rank=topology.data_rank, data_size=topology.data_size
        )
        return RunData(shards, training, validation_samples(config, shards, topology))

    return on_all_ranks(opened, ConfigError, DataError)


def open_shards(config: RunConfig) -> ShardSet:
    """The training split, checked against the model and the run's tokenizer.

    Raises:
        DataError: it is missing, incomplete, damaged, or does not fit.
    """
    shards = ShardSet.open(config.data.shards, config.data.train_split)
    if shards.total_bytes < _VERIFY_BELOW_BYTES:
        shards.verify()
    if shards.max_token_id >= config.model.vocab_size:
        raise DataError(
            f"{config.data.shards}: its tokenizer gives ids up to {shards.max_token_id}, but "
            f"model.vocab_size={config.model.vocab_size}; set model.vocab_size to at least "
            f"{shards.max_token_id + 1}, or use shards of another tokenizer"
        )
    wanted = config.data.tokenizer
    if wanted is not None:
        if not wanted.is_file():
            raise ConfigError(
                f"data.tokenizer={wanted} does not exist; give a tokenizer.json, or null to take "
                "the one of the shards"
            )
        digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
        if digest != shards.tokenizer_sha256:
            raise DataError(
                f"{config.data.shards} was made with another tokenizer than data.tokenizer="
                f"{wanted} (sha256 {shards.tokenizer_sha256[:12]} and {digest[:12]}); "
                "make the shards again with it, or set data.tokenizer to "
                f"{shards.tokenizer_path}"
            )
    return shards


def training_samples(
    config: RunConfig, shards: ShardSet, *, data_rank: int, data_size: int
) -> TokenLoader:
    """A rank's training samples.

    Args:
        config: the run.
        shards: its training split.
        data_rank: index of the rank among those that take their own samples.
        data_size: number of those.

    Raises:
        ConfigError: the weights do not fit the sources of the shards.
        DataError: the split is too small.
    """
    loader = TokenLoader(
        shards,
        sequence_format(config),
        BatchLayout(
            micro_size=config.batch.micro_size,
            accumulation=config.batch.accumulation,
            data_rank=data_rank,
            data_size=data_size,
        ),
        seed=config.run.seed,
    )
    phases, sequences = weight_phases(config, loader), loader.sequences_by_source
    where = f"{config.data.shards} ({config.data.train_split})"
    problems = weight_problems(phases, sequences, where)
    if problems:
        raise ConfigError(listed(problems))
    return loader


def weight_phases(config: RunConfig, loader: TokenLoader) -> tuple[WeightPhase, ...]:
    """The schedule of weights: the configuration's, else the set's own, else by tokens."""
    if config.data.weight_phases:
        return config.data.weight_phases
    weights = loader.weights_by_tokens()
    for source in loader.shards.manifest.sources:
        # All sources of a set have weights or none has.
        if source.weight is not None and source.name in weights:
            weights[source.name] = source.weight
    return (WeightPhase(step=0, weights=weights),)


def describe_samples(config: RunConfig, loader: TokenLoader, state: TrainState) -> list[str]:
    """Mixture, packing and skipped batches of a run, in words; no line for what is not used.

    Args:
        config: the run.
        loader: its training samples.
        state: where the run is.
    """
    lines = []
    data, sequences = config.data, loader.sequences_by_source
    if len(sequences) == 1 and data.weight_phases:
        (name,) = sequences
        lines.append(f"no effect     data weights: {name} is the only source of these shards")
    if len(sequences) > 1:
        if data.review is None:
            for segment in loader.mixture.segments:
                shares = ", ".join(f"{name} {segment.share(name):.2%}" for name in sequences)
                lines.append(f"mixture from sample {segment.first_sample:,}: {shares}")
        elif any(source.weight is not None for source in loader.shards.manifest.sources):
            lines.append("no effect     weights of the shards: data.review goes over all alike")
        sizes = ", ".join(f"{name} {count:,}" for name, count in sequences.items())
        lines.append(
            f"sequences of {data.sequence_length:,} tokens in an epoch of each source: {sizes}"
        )
    if data.packing != "concat":
        name = "best-fit packing" if data.packing == "best_fit" else "a sequence for each document"
        lines.append(
            f"{name}: {loader.num_samples:,} sequences, {loader.padding_share:.2%} padding"
        )
    if loader.shards.has_targets:
        shards = loader.shards
        lines.append(
            f"loss on {shards.num_targets / max(shards.num_tokens, 1):.2%} of the tokens: "
            "completions and their ends, no prompts"
        )
    lines += [
        f"data.skip_batches: batches {first} to {last} of the data order "
        + ("lie behind, no effect" if last <= state.batches else "are not trained on")
        for first, last in data.skip_batches
    ]
    if state.next_sample and data.review is None:
        counts = loader.mixture.counts(state.next_sample)
        epochs = ", ".join(
            f"{name} {counts[name] / max(sequences[name], 1):.3f}" for name in sequences
        )
        lines.append(f"epochs behind: {epochs}")
    return lines


def validation_samples(
    config: RunConfig, shards: ShardSet, topology: Topology
) -> ValidationSamples | None:
    """This rank's validation samples; None when the run does not validate.

    Args:
        config: the run.
        shards: its training split.
        topology: the grid of ranks.

    Raises:
        DataError: the validation split is damaged.
    """
    if not config.eval.every_steps:
        return None
    data, name = config.data, config.data.eval_split
    sequences = tokens = 0
    held_out: ShardSet | None = None
    if name in shards.manifest.splits:
        held_out = ShardSet.open(data.shards, name)
        tokens = held_out.num_tokens
        sequences = sum(
            cut_sequences(held_out.of_source(source), sequence_format(config)).count
            for source in held_out.sources
        )
    # The same on all ranks, which have read the same files.
    if held_out is None or sequences < topology.data_size:
        logger.warning(
            "training without validation: %s has %d tokens in its split %r, less than a window of "
            "data.sequence_length=%d for each of %d data-parallel ranks; make the shards again "
            "with a larger --validation-fraction",
            data.shards,
            tokens,
            name,
            data.sequence_length,
            topology.data_size,
        )
        return None
    return ValidationSamples(
        config, held_out, data_rank=topology.data_rank, data_size=topology.data_size
    )
