"""One rank's part of a training job: join the others, build everything, restore, train."""

import hashlib
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.errors import DataError
from data_prep.loader import ShardSet, TokenLoader
from model.errors import CheckpointError, ConfigError
from pipeline.checkpoint import WEIGHTS, CheckpointFolder, read_config
from pipeline.config import RESOLVED_CONFIG_NAME, Device, Precision, RunConfig, to_yaml
from pipeline.dry_run import describe
from pipeline.engine import Engine
from pipeline.launch import (
    RankInfo,
    device_index,
    is_communication_error,
    start_process_group,
)
from pipeline.metrics_writers import open_metrics_log
from pipeline.run_log import start_run_log
from pipeline.starting_weights import imported_weights
from pipeline.state import Layout, TrainState, read_state, resume_problems
from pipeline.stopping import StopRequest
from pipeline.throughput import Throughput
from pipeline.topology import Topology
from pipeline.trainer import Collaborators, Trainer
from pipeline.validation import ValidationSamples
from pipeline.watchdog import Watchdog

logger = logging.getLogger(__name__)

_VERIFY_BELOW_BYTES = 2**30


class Job:
    """A training job as this rank sees it.

    Args:
        config: the run.
        resume: `auto`, `none`, or the path of a checkpoint or run.
        info: this rank's place.
        device: kind of device.
        precision: arithmetic.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: str,
        info: RankInfo,
        device: Device,
        precision: Precision,
    ) -> None:
        self.config = config
        self.resume = resume
        self.info = info
        self.kind: Device = device
        self.precision: Precision = precision
        self.device = torch.device("cpu")
        self.place = f"rank {info.rank}/{info.world_size}"
        self._watchdog: Watchdog | None = None

    def run(self) -> str | None:
        """Train to the last step or to a signal; the signal's name, or None.

        Raises:
            ConfigError: the configuration does not fit this machine or its data.
            DataError: the shards are missing, damaged or too few.
            CheckpointError: the checkpoint to resume from cannot be used, or saving failed.
            TrainingError: the loss does not become finite again.
        """
        config = self.config
        start_run_log(config.run.dir, self.info.rank)
        shards = open_shards(config)
        if self.kind == "cuda":
            index = device_index(self.info, torch.cuda.device_count(), os.environ)
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
        start_process_group(self.info, self.device, config.train.timeout_s)
        topology = Topology(
            self.info, config.parallel.tensor, self.device, timeout_s=config.train.timeout_s
        )
        self.place = topology.describe()
        stop = StopRequest(self.device)
        state = self._new_state(shards, topology)
        loader, validation = _samples(config, shards, topology)
        self._watchdog = Watchdog(
            topology,
            timeout_s=config.train.heartbeat_timeout_s,
            step=lambda: state.step,
            abort=self._abort,
        )
        checkpoints = CheckpointFolder(config.run.dir, config.checkpoint.keep)
        source = self._find_checkpoint(checkpoints, state)
        imported = imported_weights(config, shards, topology) if source is None else None
        engine = Engine(config, topology, self.precision, imported)
        state = self._restore(engine, source, state)
        if source is not None:
            checkpoints.set_aside_after(state.step)
        self._announce(topology, state, source)
        metrics = open_metrics_log(config, rank=self.info.rank, resumed_step=state.step)
        try:
            throughput = Throughput(config, topology)
            parts = Collaborators(
                engine, loader, validation, checkpoints, metrics, throughput, stop
            )
            stopped_by = Trainer(config, state, parts).fit()
        finally:
            metrics.close()
        logger.info(
            "%s at step %d of %d, %s tokens",
            f"stopped by {stopped_by}" if stopped_by else "done",
            state.step,
            config.train.steps,
            f"{state.tokens:,}",
        )
        self._watchdog.close()
        dist.barrier()
        return stopped_by

    def explain(self, error: Exception) -> str:
        """An unforeseen error in one line; after a broken collective, who broke it."""
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        if self._watchdog is not None and is_communication_error(error):
            verdict = self._watchdog.explain()
            if verdict is not None:
                return f"stopping, because {verdict}"
        return f"{type(error).__name__}: {first_line}"

    def log_traceback(self) -> None:
        """Write the current exception with its traceback to this rank's log file only."""
        logger.debug("stopping after an error", exc_info=True)

    def _abort(self, verdict: str) -> None:
        """End a process whose main thread hangs in a collective."""
        print(f"error: {self.place}: stopping, because {verdict}", file=sys.stderr, flush=True)
        os._exit(1)

    def _new_state(self, shards: ShardSet, topology: Topology) -> TrainState:
        return TrainState(
            data_fingerprint=shards.fingerprint,
            data_seed=self.config.run.seed,
            sequence_length=self.config.data.sequence_length,
            layout=Layout(
                world_size=topology.info.world_size,
                data=topology.data_size,
                tensor=topology.tensor_size,
                stages=self.config.parallel.stages,
                zero=self.config.parallel.zero,
                precision=self.precision,
            ),
        )

    def _find_checkpoint(self, checkpoints: CheckpointFolder, state: TrainState) -> Path | None:
        """The checkpoint to start from, checked against this run; None for a new run."""
        if self.resume == "none":
            moved = checkpoints.set_aside(self.config.run.dir)
            if moved is not None:
                logger.info("earlier files of %s moved to %s", self.config.run.dir, moved)
            return None
        source = checkpoints.find(self.resume, report=logger.warning)
        if source is not None:
            problems = resume_problems(read_state(source), state)
            problems += model_problems(read_config(source), self.config)
            if problems:
                raise CheckpointError(
                    f"{source} does not fit this run ({'; '.join(problems)}); start with the "
                    "saved values, or with --resume none to begin anew"
                )
        return source

    def _restore(self, engine: Engine, source: Path | None, state: TrainState) -> TrainState:
        if source is None:
            return state
        engine.load(source / WEIGHTS)
        return read_state(source)

    def _announce(self, topology: Topology, state: TrainState, source: Path | None) -> None:
        """Say what is about to run, and where from; keep the resolved configuration."""
        if not topology.is_main:
            return
        summary = describe(
            self.config,
            world_size=self.info.world_size,
            device=self.kind,
            precision=self.precision,
        )
        head, _, rest = summary.partition("\nDeepSpeed ")
        for line in head.splitlines():
            logger.info("%s", line)
        logger.debug("DeepSpeed %s", rest)
        path = self.config.run.dir / RESOLVED_CONFIG_NAME
        path.write_text(to_yaml(self.config), encoding="utf-8")
        if source is None:
            logger.info("new run: step 0, tokens 0, next sample 0")
        else:
            logger.info(
                "resumed from %s: step %d, tokens %d, next sample %d",
                source,
                state.step,
                state.tokens,
                state.next_sample,
            )


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


def model_problems(saved: RunConfig, current: RunConfig) -> list[str]:
    """Sizes in which a saved model differs from this run's, one line each."""
    before, now = saved.model.model_dump(), current.model.model_dump()
    fixed = [key for key in before if key not in ("head_weights", "init_std", "embedding_init_std")]
    return [
        f"model.{key}: saved with {before[key]}, this run has {now[key]}"
        for key in fixed
        if before[key] != now[key]
    ] + _freeze_problems(saved, current)


def _freeze_problems(saved: RunConfig, current: RunConfig) -> list[str]:
    before, now = saved.train.freeze, current.train.freeze
    if before == now:
        return []
    return [
        f"train.freeze: saved with {before}, this run has {now}, and the optimizer's states would "
        "not fit; export the checkpoint and begin a run with train.init_from"
    ]


def _samples(
    config: RunConfig, shards: ShardSet, topology: Topology
) -> tuple[TokenLoader, ValidationSamples | None]:
    loader = TokenLoader(
        shards,
        sequence_length=config.data.sequence_length,
        future_tokens=config.model.future_tokens,
        seed=config.run.seed,
        micro_batch_size=config.batch.micro_size,
        accumulation=config.batch.accumulation,
        data_parallel_rank=topology.data_rank,
        data_parallel_size=topology.data_size,
    )
    if not config.eval.every_steps:
        return loader, None
    # Decided from the manifest alone, so that all ranks decide alike.
    split = shards.manifest.splits.get(config.data.eval_split)
    tokens = split.tokens if split else 0
    windows = (tokens - config.model.future_tokens) // config.data.sequence_length
    if windows < topology.data_size:
        logger.warning(
            "training without validation: %s has %d tokens in its split %r, less than a window of "
            "data.sequence_length=%d for each of %d data-parallel ranks; make the shards again "
            "with a larger --validation-fraction",
            config.data.shards,
            tokens,
            config.data.eval_split,
            config.data.sequence_length,
            topology.data_size,
        )
        return loader, None
    validation = ValidationSamples(
        config, data_rank=topology.data_rank, data_size=topology.data_size
    )
    return loader, validation
