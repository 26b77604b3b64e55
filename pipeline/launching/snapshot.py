"""What a job was submitted with: code and configuration, copied into the run's folder.

    runs/NAME/submissions/0001/
      config.yaml   the run, resolved: the file and every --set
      code/         the packages and job scripts; .venv is a link to the interpreter's environment

A job that waits for days, or is queued again after weeks, runs what it was submitted with, whatever
became of the checkout meanwhile.
"""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from foundation.durable_files import write_whole
from foundation.shown_text import told
from model.errors import ConfigError
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME
from pipeline.config.run_config import RunConfig, to_yaml

SUBMISSIONS = "submissions"
_ROOT = Path(__file__).resolve().parents[2]
_COPIED = ("foundation", "data_prep", "model", "pipeline", "slurm")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


class Snapshot(NamedTuple):
    """A copy of what a job runs.

    Attributes:
        folder: that of the submission.
        config: the resolved configuration.
        script: the job script.
    """

    folder: Path
    config: Path
    script: Path


def job_script(root: Path = _ROOT) -> Path:
    """The job script for training, beside the code.

    Raises:
        ConfigError: it is not there, as in an installed package.
    """
    path = root / "slurm" / "pretrain_7b.sh"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: job scripts are in the checkout, not in the installed "
            "package; call python -m pipeline.submit in a checkout"
        )
    return path


def take_snapshot(config: RunConfig) -> Snapshot:
    """Copy code and configuration to a new folder of the run's submissions.

    Raises:
        ConfigError: the copy cannot be written, or there are no job scripts.
    """
    script = job_script().relative_to(_ROOT)
    parent = (config.run.dir / SUBMISSIONS).absolute()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _new_folder(parent)
        code = folder / "code"
        for name in _COPIED:
            shutil.copytree(_ROOT / name, code / name, ignore=_LEFT_OUT)
        # The environment of this interpreter, for jobs that get no variable of the caller's.
        (code / ".venv").symlink_to(sys.prefix)
        path = folder / RESOLVED_CONFIG_NAME
        write_whole(path, to_yaml(config).encode())
    except OSError as error:
        raise ConfigError(
            f"code and configuration cannot be copied into run.dir={config.run.dir} "
            f"({told(error)}); make the folder writable, or set another run.dir"
        ) from error
    return Snapshot(folder, path, code / script)


def _new_folder(parent: Path) -> Path:
    """The folder of the next number; two callers at once get two."""
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    number = max(numbers, default=0) + 1
    while True:
        try:
            folder = parent / f"{number:04d}"
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
