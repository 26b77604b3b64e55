"""EleutherAI's lm-evaluation-harness on the plain Hugging Face form of a model."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from foundation.shown_text import printable, reason
from model.errors import ConfigError


class HarnessOptions(NamedTuple):
    """What the harness is asked for.

    Attributes:
        tasks: names of tasks, of its own or of `include_path`.
        include_path: a folder with the YAML files of further tasks; None = none.
        limit: documents of each task; None = all.
        batch_size: sequences of a forward.
        dtype: to compute in, `fp32` or `bf16`; None = as stored.
        device: to compute on, under torch's name.
    """

    tasks: Sequence[str]
    include_path: Path | None
    limit: int | None
    batch_size: int
    dtype: str | None
    device: str


_DTYPES = {None: "auto", "fp32": "float32", "bf16": "bfloat16"}


def check_installed() -> None:
    """See that the harness is there.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--lm-eval needs lm-evaluation-harness, which is not installed; install Headway with "
            "its extra: pip install -e '.[evaluate]'"
        )


def run_harness(directory: Path, options: HarnessOptions) -> dict[str, dict[str, Any]]:
    """Run tasks on trunk and head 1, as transformers loads them.

    Args:
        directory: the model's folder.
        options: which tasks, and how.

    Returns:
        Metrics by task.

    Raises:
        ConfigError: the harness is not installed, or has no such task.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = None if options.include_path is None else str(options.include_path)
    manager = TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    if unknown := [task for task in options.tasks if task not in known]:
        raise ConfigError(
            f"--lm-eval has no task {printable(unknown[0])!r}; check its name, or give the folder "
            "of its YAML file by --include-path"
        )
    try:
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(directory), "dtype": _DTYPES[options.dtype]},
            tasks=list(options.tasks),
            task_manager=manager,
            limit=options.limit,
            batch_size=options.batch_size,
            device=options.device,
            log_samples=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--lm-eval: the harness stopped ({reason(error)})") from error
    results = found["results"] if found else {}
    return {task: _plain(metrics) for task, metrics in results.items()}


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts of a task, `acc,none` as `acc`."""
    return {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if isinstance(value, int | float | str) and key not in ("alias", "name")
    }
