"""Slurm's sbatch, called for a job: its command line, its opinion before, its answer after."""

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from foundation.shown_text import printable
from model.errors import ConfigError

_LONGEST_ANSWER = 400  # letters
_SIGNAL = re.compile(r"(?:[RB]+:)*[A-Za-z0-9]+(?:@([0-9]+))?")
_DEFAULT_LEAD_S = 60  # of Slurm's --signal without @


class JobRequest(NamedTuple):
    """What sbatch is to be asked for.

    Attributes:
        script: the job script.
        config: the run's configuration, its argument.
        options: of sbatch, in order; later ones win.
        variables: environment that differs from the caller's.
    """

    script: Path
    config: Path
    options: tuple[str, ...]
    variables: Mapping[str, str]

    @property
    def command(self) -> list[str]:
        """The command line."""
        return ["sbatch", *self.options, str(self.script), str(self.config)]

    def shown(self) -> str:
        """The command line as one types it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command)])


def lint(request: JobRequest, environment: Mapping[str, str]) -> str:
    """What sbatch would do, without doing it; its own words.

    Raises:
        ConfigError: it refuses the job, or is not there.
    """
    return _answer(["--test-only"], request, environment)


def submit(request: JobRequest, environment: Mapping[str, str]) -> str:
    """Put the job into the queue; its number.

    Raises:
        ConfigError: sbatch refuses the job.
    """
    return _answer(["--parsable"], request, environment).partition(";")[0]


def _answer(first: Sequence[str], request: JobRequest, environment: Mapping[str, str]) -> str:
    name, *rest = request.command
    try:
        done = subprocess.run(
            [name, *first, *rest],
            env={**environment, **request.variables},
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise ConfigError(
            f"sbatch cannot be called here ({error.strerror}); submit on a login node of the "
            "cluster, or use --print"
        ) from error
    said = " ".join((done.stderr + done.stdout).split())
    if done.returncode:
        raise ConfigError(
            f"sbatch refuses the job: {printable(said, _LONGEST_ANSWER)}; change the options after "
            "-- or those of the job script"
        )
    return said


def signal_problem(options: Sequence[str], script: Path) -> str | None:
    """Why the job would be warned of its time limit as soon as it starts; None when it would not.

    Args:
        options: of sbatch.
        script: the job script, whose own options they win over.
    """
    written = re.findall(r"^#SBATCH +(\S+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    limit_s = seconds_of(_last("time", "t", [*written, *options]) or "")
    signal = _SIGNAL.fullmatch(_last("signal", None, [*written, *options]) or "")
    if limit_s is None or signal is None:
        return None
    lead_s = int(signal[1] or _DEFAULT_LEAD_S)
    if lead_s < limit_s:
        return None
    return (
        f"--time of {limit_s} s is not above the {lead_s} s of --signal, so the job would be "
        "warned as soon as it starts; give a longer --time, or --signal=B:USR1@SECONDS below it"
    )


def _last(name: str, letter: str | None, options: Sequence[str]) -> str | None:
    """The value of an option where it was given last: `--name=V`, `--name V`, `-lV` or `-l V`."""
    value = None
    for option, following in zip(options, [*options[1:], ""], strict=True):
        if option.startswith(f"--{name}="):
            value = option.partition("=")[2]
        elif option == f"--{name}" or (letter and option == f"-{letter}"):
            value = following
        elif letter and re.match(rf"-{letter}[^-]", option):
            value = option[2:].removeprefix("=")
    return value


def seconds_of(limit: str) -> int | None:
    """A time limit of Slurm's in seconds; None when it is none, or has no end.

    Its forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
    days-hours:minutes:seconds.
    """
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in parts) or (dash and not days.isdecimal()):
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)
