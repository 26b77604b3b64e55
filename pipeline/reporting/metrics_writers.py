"""Records shown elsewhere: TensorBoard, Weights & Biases, and which of them a run has."""

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from foundation.bounded_files import read_bounded
from model.errors import ConfigError
from pipeline.config.changes import Change
from pipeline.config.run_config import RunConfig
from pipeline.reporting.metrics import MetricsLog, MetricsWriter, Value
from pipeline.reporting.progress import ProgressLine

_WANDB_ID_NAME = "wandb_id"
_ID_BYTES = 1 << 12


class TensorBoardWriter:
    """Event files in `<run_dir>/tensorboard`; steps past the resumed one are superseded."""

    def __init__(self, run_dir: Path, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, rank 0 only

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, record: Mapping[str, Value]) -> None:
        """Add each value of a record as a scalar, losses and validation in groups."""
        step = record["step"]
        for key, value in record.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(_tag(key), float(value), step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run that a resumed job continues."""

    def __init__(self, run_dir: Path, *, project: str, config: RunConfig) -> None:
        require_wandb(project)
        import wandb

        id_file = run_dir / _WANDB_ID_NAME
        if not id_file.exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            id_file.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=config.run.name,
            id=read_bounded(id_file, _ID_BYTES).decode(errors="replace").strip(),
            resume="allow",
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )
        # Steps are a metric here: a resumed run may go back behind the last one it sent.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Value]) -> None:
        """Send one record."""
        self._run.log({_tag(k): v for k, v in record.items() if v is not None})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def require_wandb(project: str) -> None:
    """Refuse a Weights & Biases project where the package is missing.

    Raises:
        ConfigError: wandb cannot be imported.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f'log.wandb_project="{project}", but the package wandb is not installed; '
            "pip install wandb, or set log.wandb_project=null"
        )


def open_metrics_log(
    config: RunConfig, *, rank: int, resumed_step: int, changes: Sequence[Change] = ()
) -> MetricsLog:
    """The metrics log of a run with the writers it asks for.

    Args:
        config: The run.
        rank: This process; only rank 0 writes.
        resumed_step: Last step done before this start; 0 for a new run.
        changes: What the configuration differs in from that of the checkpoint.

    Raises:
        ConfigError: On every rank alike, when a writer is asked for that is not installed.
    """
    project = config.log.wandb_project
    if project is not None:
        require_wandb(project)
    if rank != 0:
        return MetricsLog(None, resumed_step=resumed_step)
    run_dir = config.run.dir
    writers: list[MetricsWriter] = []
    if config.log.tensorboard:
        writers.append(TensorBoardWriter(run_dir, resumed_step=resumed_step))
    if project is not None:
        writers.append(WandbWriter(run_dir, project=project, config=config))
    if config.log.progress:
        writers.append(ProgressLine(last_step=config.last_step, resumed_step=resumed_step))
    strict = config.checkpoint.on_error == "stop"
    return MetricsLog(
        run_dir,
        resumed_step=resumed_step,
        writers=writers,
        strict=strict,
        changes=[change._asdict() for change in changes],
    )


def _tag(key: str) -> str:
    """The name a value is grouped under: loss/head_1, eval/loss_head_1, else as it is."""
    for prefix, group in (("eval_", "eval/"), ("loss_", "loss/")):
        if key.startswith(prefix):
            return group + key.removeprefix(prefix)
    return key
