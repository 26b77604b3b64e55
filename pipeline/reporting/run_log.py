"""Where a run's log goes: rank 0 to the console, every rank to a file of its own."""

import logging
import sys
import warnings
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _RankFile(logging.FileHandler):
    """A rank's file; lines that do not fit on a full disk are lost, and do not fill stderr."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing when the disk is full; what matters is logged elsewhere, too."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Console(logging.Handler):
    """Writes to whatever stdout is now, so that lines stay clear of the live progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        sys.stdout.write(self.format(record) + "\n")
        sys.stdout.flush()


def rank_log(run_dir: Path, rank: int) -> Path:
    """The log file of a rank."""
    return run_dir / "logs" / f"rank_{rank:05d}.log"


def start_run_log(run_dir: Path, rank: int) -> Path:
    """Send log records of this process to `<run_dir>/logs/rank_00000.log`, rank 0 also to stdout.

    Returns:
        The file.
    """
    path = rank_log(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [_RankFile(path, encoding="utf-8")]
    if rank == 0:
        handlers.append(_Console(logging.INFO))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    # Libraries are heard from warnings on; this project's own debug lines go to the file.
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for package in ("pipeline", "data_prep", "model"):
        logging.getLogger(package).setLevel(logging.DEBUG)
    return path


def quieten_libraries() -> None:
    """Keep remarks of the libraries about absent GPU kernels out of the console.

    To be called before they are imported.
    """
    warnings.filterwarnings("ignore", module=r"megatron|deepspeed|torch")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
