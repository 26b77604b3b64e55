"""One rank's part of a training job: join the others, build everything, restore, train."""

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.loading.data_summary import summarize
from data_prep.shards.shard_set import ShardSet
from model.errors import CheckpointError
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME, WEIGHTS
from pipeline.checkpoint.folder import CheckpointFolder, read_config
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint.train_state import (
    Layout,
    TrainState,
    layout_changes,
    read_state,
    resume_problems,
)
from pipeline.config.run_config import Device, Precision, RunConfig, to_yaml
from pipeline.data.mixture_plan import follow_plan
from pipeline.data.samples import (
    describe_samples,
    open_shards,
    training_samples,
    validation_samples,
    weight_stages,
)
from pipeline.distributed.rendezvous import (
    RankInfo,
    device_index,
    is_communication_error,
    start_process_group,
)
from pipeline.distributed.signals import StopRequest
from pipeline.distributed.topology import Topology
from pipeline.distributed.watchdog import Watchdog
from pipeline.engine.engine import Engine
from pipeline.engine.init_from import imported_weights
from pipeline.engine.staged_engine import build_engine
from pipeline.reporting.metrics_writers import open_metrics_log
from pipeline.reporting.run_log import start_run_log
from pipeline.reporting.run_summary import describe
from pipeline.reporting.throughput import Throughput
from pipeline.stages.plan import plan_text
from pipeline.trainer import Collaborators, Trainer

logger = logging.getLogger(__name__)


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
        self._engine: Engine | None = None

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
            self.info,
            config.parallel.tensor,
            self.device,
            plan=config.stage_plan,
            timeout_s=config.train.timeout_s,
        )
        self.place = topology.describe()
        stop = StopRequest(self.device)
        state = self._new_state(shards, topology)
        loader = training_samples(config, shards, topology)
        validation = validation_samples(config, shards, topology)
        self._watchdog = Watchdog(
            topology,
            timeout_s=config.train.heartbeat_timeout_s,
            step=lambda: state.step,
            waiting_for=lambda: self._engine.waiting_for if self._engine else None,
            abort=self._abort,
        )
        checkpoints = CheckpointFolder(config.run.dir, config.checkpoint)
        source = self._find_checkpoint(checkpoints, state)
        imported = imported_weights(config, shards, topology, resumed=source is not None)
        engine = self._engine = build_engine(config, topology, self.precision, imported)
        state = self._restore(engine, source, state)
        if source is not None:
            checkpoints.set_aside_after(state.step)
        follow_plan(loader, weight_stages(config, loader), state)
        self._announce(topology, state, source, describe_samples(config, loader, state))
        metrics = open_metrics_log(config, rank=self.info.rank, resumed_step=state.step)
        try:
            throughput = Throughput(config, topology)
            saver = Saver(checkpoints, config, self.device, shards.tokenizer_path, state.step)
            parts = Collaborators(engine, loader, validation, saver, metrics, throughput, stop)
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
        waited = self._waited()  # before the verdict comes, which takes a while
        if self._watchdog is not None and is_communication_error(error):
            verdict = self._watchdog.explain()
            if verdict is not None:
                return f"stopping, because {verdict}{waited}"
        return f"{type(error).__name__}: {first_line}"

    def log_traceback(self) -> None:
        """Write the current exception with its traceback to this rank's log file only."""
        logger.debug("stopping after an error", exc_info=True)

    def _abort(self, verdict: str) -> None:
        """End a process whose main thread hangs in a collective."""
        line = f"error: {self.place}: stopping, because {verdict}{self._waited()}"
        print(line, file=sys.stderr, flush=True)
        os._exit(1)

    def _waited(self) -> str:
        """What this rank waits for, to end an error with."""
        transfer = self._engine.waiting_for if self._engine else None
        return f"; this rank was waiting for {transfer or 'the other ranks, between transfers'}"

    def _new_state(self, shards: ShardSet, topology: Topology) -> TrainState:
        return TrainState(
            data_fingerprint=shards.fingerprint,
            data_seed=self.config.run.seed,
            sequence_length=self.config.data.sequence_length,
            packing=self.config.data.packing,
            data=summarize(shards),
            layout=Layout(
                world_size=topology.info.world_size,
                data=topology.data_size,
                tensor=topology.tensor_size,
                stages=topology.num_stages,
                stage_plan=plan_text(topology.plan),
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
            saved, saved_config = read_state(source), read_config(source)
            problems = resume_problems(saved, state)
            problems += model_problems(saved_config, self.config)
            if problems:
                raise CheckpointError(
                    f"{source} does not fit this run ({'; '.join(problems)}); start with the "
                    "saved values, or with --resume none to begin anew"
                )
            before = saved_config.global_batch_size(saved.layout.data)
            now = self.config.global_batch_size(state.layout.data)
            if before != now:
                logger.warning(
                    "a step was %d samples and is %d from now on: the data goes on where it was, "
                    "but schedule, skipped batches and weight changes count steps",
                    before,
                    now,
                )
        return source

    def _restore(self, engine: Engine, source: Path | None, state: TrainState) -> TrainState:
        if source is None:
            return state
        saved = read_state(source)
        if changes := layout_changes(saved.layout, state.layout):
            logger.info("resuming in another layout than saved: %s", ", ".join(changes))
        engine.load(source / WEIGHTS)
        # A checkpoint of an earlier version has no summary yet; the fingerprints agree.
        return saved.model_copy(update={"data": state.data, "layout": state.layout})

    def _announce(
        self, topology: Topology, state: TrainState, source: Path | None, samples: list[str]
    ) -> None:
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
        for line in head.splitlines() + samples:
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
            before, now = read_config(source).data.document_mask, self.config.data.document_mask
            if before != now:
                logger.warning(
                    "data.document_mask was %s up to here and is %s from here on",
                    str(before).lower(),
                    str(now).lower(),
                )


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
