"""One rank's part of a training job: join, open data, restore, wire, train."""

import functools
import logging
import os
import socket
import sys

import torch
import torch.distributed as dist

from data_prep.loading.data_summary import summarize
from data_prep.shards.shard_set import ShardSet
from model.errors import TrainingError
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.resume_point import ResumePoint, find_resume_point
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint.train_state import Layout, Rollback, TrainState
from pipeline.config.changes import Change, config_changes
from pipeline.config.run_config import Device, Precision, RunConfig, to_yaml
from pipeline.data.mixture_plan import plan_mixture
from pipeline.data.samples import (
    RunData,
    describe_samples,
    open_data,
    weight_phases,
)
from pipeline.distributed.agreement import from_all
from pipeline.distributed.identity import Identity
from pipeline.distributed.launch import Launch
from pipeline.distributed.lease import Lease
from pipeline.distributed.meeting import start_process_group
from pipeline.distributed.rendezvous import RankInfo, device_index
from pipeline.distributed.signals import EXIT_STOPPED, StopRequest
from pipeline.distributed.topology import Topology
from pipeline.distributed.watchdog import Watchdog
from pipeline.engine.build import build_engine
from pipeline.engine.engine import Engine
from pipeline.engine.init_from import imported_identity, imported_weights
from pipeline.guard.policy import GoBack
from pipeline.guard.progress import Progress
from pipeline.guard.stall import StallWatch
from pipeline.guard.straggler import Stragglers
from pipeline.launching.explanation import Explanation, explain
from pipeline.launching.notification import Ending, notify_as_rank
from pipeline.launching.verdict import Outcome, Verdict, blamed_host
from pipeline.reporting.metrics_writers import open_metrics_log
from pipeline.reporting.run_log import start_run_log
from pipeline.reporting.run_summary import summarize_run
from pipeline.reporting.throughput import Throughput
from pipeline.review.review import Review
from pipeline.review.schedule import ReviewSchedule, with_steps
from pipeline.stages.plan import plan_text
from pipeline.trainer import Collaborators, Trainer

logger = logging.getLogger(__name__)


class Job:
    """A training job as this rank sees it.

    Args:
        config: the run.
        resume: `auto`, `none`, or the path of a checkpoint or run.
        info: this rank's position.
        device: kind of device.
        precision: arithmetic.
        launch: what this host shows of the job.

    Attributes:
        verdict: where this rank says how the run ended.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: str,
        info: RankInfo,
        device: Device,
        precision: Precision,
        launch: Launch,
    ) -> None:
        self.config = config
        self.resume = resume
        self.info = info
        self._launch = launch
        self.kind: Device = device
        self.precision: Precision = precision
        self.position = f"rank {info.rank}/{info.world_size}"
        self._checkpoints = CheckpointFolder(config.run.dir, config.checkpoint)
        self.verdict = Verdict(config.run.dir, os.environ, info.rank)
        self._lease = Lease(
            config.run.dir, os.environ, lost=functools.partial(self._abort, outcome="failed")
        )
        self._stop = StopRequest()
        self._watchdog: Watchdog | None = None
        self._progress = Progress.of_run(config.train)
        self._stall_watch: StallWatch | None = None
        self._engine: Engine | None = None
        self._state: TrainState | None = None
        self._changes: list[Change] = []
        self._imported: str | None = None
        self._review: Review | None = None

    def run(self) -> str | None:
        """Train to the last step or to a signal; the signal's name, or None.

        Raises:
            ConfigError: the configuration does not fit this machine or its data.
            DataError: the shards are missing, damaged or too few.
            CheckpointError: the checkpoint to resume from cannot be used, or saving failed.
            TrainingError: the loss does not become finite again.
        """
        try:
            return self._run(self._join())
        finally:
            self._lease.release()

    def _run(self, topology: Topology) -> str | None:
        """All that happens while this job holds the run's folder."""
        data = open_data(self.config, topology)
        if (review := self.config.data.review) is not None:
            schedule = ReviewSchedule(review, data.training.num_samples)
            self.config = with_steps(self.config, schedule, data.training.global_batch_size)
        engine, state = self._restore(topology, data)
        while True:
            trainer = self._wire(topology, data, engine, state)
            try:
                stopped_by = trainer.fit()
            except GoBack as wish:
                state = self._go_back(topology, data, engine, state, wish)
            else:
                self._leave(state, stopped_by)
                return stopped_by
            finally:
                trainer.parts.metrics.close()

    def _join(self) -> Topology:
        """Meet the other ranks; from here on a rank that is gone is noticed."""
        config = self.config
        start_run_log(config.run.dir, self.info.rank)
        self._stop.listen()
        device = torch.device("cpu")
        if self.kind == "cuda":
            index = device_index(self.info, torch.cuda.device_count(), os.environ)
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
            # Nothing reads memory that was not written.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        identity = Identity.of_this_process(
            config.model_dump(mode="json"), device=self.kind, precision=self.precision
        )
        start_process_group(self.info, device, config.train.timeout_s, self._launch, identity)
        topology = Topology(
            self.info,
            config.parallel.tensor,
            device,
            plan=config.stage_plan,
            timeout_s=config.train.timeout_s,
        )
        self.position = topology.describe()
        self._watchdog = Watchdog(
            topology,
            timeout_s=config.train.heartbeat_timeout_s,
            step=lambda: self._state.step if self._state else None,
            waiting_for=self._waiting_for,
            abort=self._abort,
        )
        self._stragglers = Stragglers(topology, from_all(socket.gethostname()))
        self._stall_watch = StallWatch(
            topology,
            self._progress,
            host=socket.gethostname(),
            run_dir=config.run.dir,
            straggler=self._stragglers.told,
            abort=self._abort,
        )
        self._lease.acquire()
        if topology.is_main:
            self.verdict.clear()
        self._lease.check_shared()
        return topology

    def _restore(self, topology: Topology, data: RunData) -> tuple[Engine, TrainState]:
        """The engine and the progress of this run: a checkpoint's, or those of a new run."""
        config = self.config
        fresh = self._new_state(data.shards, topology)
        point = find_resume_point(self._checkpoints, self.resume, config, fresh)
        imported = imported_weights(config, data.shards, topology, resumed=point is not None)
        self._imported = imported_identity(config, data.shards, point.path if point else None)
        engine = self._engine = build_engine(config, topology, self.precision, imported)
        state = fresh
        if point is not None:
            state = self._load(engine, point, fresh)
            self._changes = config_changes(point.config, config)
        self._begin_at(state, data)
        if config.data.review is not None:
            self._review = Review(
                config,
                data.training,
                topology.device,
                checkpoint=None if point is None else point.path,
                next_sample=state.next_sample,
            )
        if topology.is_main:
            self._announce(state, point, describe_samples(config, data.training, state))
        return engine, state

    def _load(self, engine: Engine, point: ResumePoint, fresh: TrainState) -> TrainState:
        """Put the engine where a checkpoint was; the progress it had."""
        engine.load(point.weights)
        state = point.state_now(fresh)
        self._checkpoints.set_aside_after(state.step)
        return state

    def _begin_at(self, state: TrainState, data: RunData) -> None:
        """Let the data go on from here."""
        self._state = state
        if self.config.data.review is not None:
            return  # which has an order of its own
        mixture = plan_mixture(data.training, weight_phases(self.config, data.training), state)
        if mixture is not None:
            data.training.mixture = mixture
            state.mixture = list(mixture.segments)
            state.samples_by_source = mixture.counts(state.next_sample)

    def _go_back(
        self, topology: Topology, data: RunData, engine: Engine, left: TrainState, wish: GoBack
    ) -> TrainState:
        """Put everything where the last checkpoint was; the batches since then are left out."""
        self._progress.enter("start")  # a checkpoint is read, which takes as long as at the start
        fresh = self._new_state(data.shards, topology)
        point = find_resume_point(self._checkpoints, "auto", self.config, fresh)
        if point is None:
            raise TrainingError(
                f"{wish}, and the checkpoint to go back to is gone from "
                f"{self._checkpoints.directory}; start the run again with --resume PATH"
            )
        state = self._load(engine, point, fresh)
        batches = (state.batches + 1, wish.last_batch)
        rollback = Rollback(step=wish.step, batches=batches, reason=wish.reason)
        # The checkpoint does not know of those since it was saved.
        state.rollbacks = [*left.rollbacks, rollback]
        self._begin_at(state, data)
        logger.warning(
            "rolled back from step %d to step %d: %s; batches %d to %d are left out",
            wish.step,
            state.step,
            wish.reason,
            *batches,
        )
        then, now = ([list(r.batches) for r in s.rollbacks] for s in (left, state))
        self._changes = [Change("rollbacks", then, now, f"batches left out: {wish}")]
        return state

    def _wire(
        self, topology: Topology, data: RunData, engine: Engine, state: TrainState
    ) -> Trainer:
        """The loop, with everything that it drives."""
        config = self.config
        return Trainer(
            config,
            state,
            Collaborators(
                engine=engine,
                loader=data.training,
                validation=data.validation,
                saver=Saver(
                    self._checkpoints,
                    config,
                    topology.device,
                    data.shards.tokenizer_path,
                    state.step,
                    imported=self._imported,
                    took=functools.partial(self._progress.took, "save"),
                ),
                metrics=open_metrics_log(
                    config,
                    rank=self.info.rank,
                    resumed_step=state.step,
                    changes=self._changes,
                ),
                throughput=Throughput(config, topology, self._stragglers),
                stop=self._stop,
                progress=self._progress,
                review=self._review,
            ),
        )

    def _leave(self, state: TrainState, stopped_by: str | None) -> None:
        ended = f"stopped by {stopped_by}" if stopped_by else "done"
        logger.info(
            "%s at step %d of %d, %s tokens",
            ended,
            state.step,
            self.config.steps,
            f"{state.tokens:,}",
        )
        if stopped_by and "TORCHELASTIC_RUN_ID" in os.environ:
            logger.info(
                "this is a clean stop and the run is saved; torchrun knows only exit code 0 as a "
                "success and will report a failure with exit code %d below: start the same command "
                "again to go on",
                EXIT_STOPPED,
            )
        if self._stall_watch is not None:
            self._stall_watch.close()
        if self._watchdog is not None:
            self._watchdog.close()
        dist.barrier()
        if self.info.rank == 0:
            self.record(
                "stopped" if stopped_by else "done",
                f"{ended} at step {state.step} of {self.config.steps}",
                exit_code=EXIT_STOPPED if stopped_by else 0,
            )

    def record(
        self, outcome: Outcome, message: str, *, exit_code: int, host: str | None = None
    ) -> None:
        """Say how it ended, in the run's folder and by run.notify; the first rank's word holds."""
        step = self._state.step if self._state else None
        if self.verdict.record(outcome, message, exit_code=exit_code, host=host, step=step):
            notify_as_rank(self.config.run, Ending(outcome, message, step), os.environ)

    def explain(self, error: Exception) -> Explanation:
        """An unforeseen error in one line; after a broken collective, who broke it."""
        find_culprit = self._watchdog.explain if self._watchdog is not None else lambda: None
        waited = self._waited()  # before the verdict comes, which takes a while
        return explain(error, socket.gethostname(), waited, find_culprit)

    def log_traceback(self) -> None:
        """Write the current exception with its traceback to this rank's log file only."""
        logger.debug("stopping after an error", exc_info=True)

    def _abort(self, verdict: str, outcome: Outcome = "lost") -> None:
        """End a process whose main thread hangs in a collective."""
        line = f"{self.position}: stopping, because {verdict}{self._waited()}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        self.record(outcome, line, exit_code=1, host=blamed_host(verdict))
        os._exit(1)

    def _waiting_for(self) -> str | None:
        return self._engine.execution.waiting_for if self._engine else None

    def _waited(self) -> str:
        """What this rank waits for, to end an error with."""
        transfer = self._waiting_for() or "the other ranks, between transfers"
        return f"; this rank was waiting for {transfer}"

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

    def _announce(self, state: TrainState, point: ResumePoint | None, samples: list[str]) -> None:
        """Say what is about to run, and where from; keep the resolved configuration."""
        summary = summarize_run(
            self.config,
            world_size=self.info.world_size,
            device=self.kind,
            precision=self.precision,
        )
        phases = []
        if self._review is not None:
            batch = self.config.global_batch_size(state.layout.data)
            phases = self._review.schedule.lines(batch, self.config.data.sequence_length)
        for line in summary.lines + phases + samples:
            logger.info("%s", line)
        logger.debug("DeepSpeed's effective values:\n%s", summary.deepspeed)
        self._checkpoints.make()
        path = self.config.run.dir / RESOLVED_CONFIG_NAME
        path.write_text(to_yaml(self.config), encoding="utf-8")
        if point is None:
            logger.info("new run: step 0, tokens 0, next sample 0")
        else:
            logger.info(
                "resumed from %s: step %d, tokens %d, next sample %d",
                point.path,
                state.step,
                state.tokens,
                state.next_sample,
            )
