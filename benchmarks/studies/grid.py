"""The runs of a study: one configuration, and the keys that take several values."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SEED = "run.seed"
INIT_FROM = "train.init_from"
ARM = "arm"


class Grid(NamedTuple):
    """What a study trains.

    Attributes:
        run: a run's configuration, by section.
        axes: by key, as `section.key`, the values it takes; every combination is a point.
        points: further points as settings, instead of combinations where it is not empty.
        pretrain: by name, settings of runs whose exports points begin with; a point names the one
            of its own seed with `train.init_from`.
        variant: of the study that this is; empty for the study itself.
        arms: by name, settings that a point takes all at once with `arm`.
    """

    run: dict[str, Any]
    axes: dict[str, list[Any]]
    points: list[dict[str, Any]]
    pretrain: dict[str, dict[str, Any]]
    variant: str = ""
    arms: Mapping[str, dict[str, Any]] = {}

    def settings(self) -> Iterator[dict[str, Any]]:
        """The settings of every point."""
        seeds = self.axes.get(SEED, [1])
        if self.points:
            for point, seed in itertools.product(self.points, seeds):
                yield {**point, SEED: seed}
            return
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def expanded(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a point with those of its arm, if any, in place of the arm's name."""
        own = {key: value for key, value in settings.items() if key != ARM}
        return {**(self.arms[settings[ARM]] if ARM in settings else {}), **own}


def load_grid(path: Path, *, quick: bool = False, variant: str = "") -> Grid:
    """Read `grid.yaml`: `run`, `axes`, `points`, `pretrain`, `arms`; what else is there changes it.

    `quick`, for a try in a minute, and each of `variants` by its name, hold settings by dotted key,
    and an own `axes`, `points`, `pretrain` or `arms`.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    changes = dict(content["variants"][variant]) if variant else {}
    if quick:
        changes = dict(content["quick"])
    axes = changes.pop("axes", content.get("axes", {}))
    points = changes.pop("points", content.get("points", []))
    pretrain = changes.pop("pretrain", content.get("pretrain", {}))
    arms = changes.pop("arms", content.get("arms", {}))
    return Grid(configured(content["run"], changes), axes, points, pretrain, variant, arms)


def variants(path: Path) -> list[str]:
    """Names of the variants of a study."""
    return list(yaml.safe_load(path.read_text(encoding="utf-8")).get("variants", {}))


def configured(run: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with settings, given as `section.key`, put in."""
    sections = {name: dict(section) for name, section in run.items()}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def point_name(settings: Mapping[str, Any]) -> str:
    """A point as people and file names say it: `future_tokens=4,seed=1`."""
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
