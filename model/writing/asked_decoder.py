"""A decoder that one request to the server, or one call of the class, asks for by itself.

Names, defaults and limits are those of the command's options.
"""

from typing import NamedTuple

from foundation.shown_text import printable
from model.beams.options import (
    BEAM_DECODERS,
    DRAFTED,
    LENGTH_PENALTY,
    MIN_WIDTH,
    MOST_LENGTH_PENALTY,
    MOST_WIDTH,
    THRESHOLD,
    WIDTH,
)
from model.decoding.sampling import Sampling
from model.joint_decoding.options import JOINT_DECODERS
from model.joint_decoding.rule import PUBLISHED

DECODERS = (*BEAM_DECODERS, *JOINT_DECODERS)

_OF_BEAMS = ("beam_width", "length_penalty", "distinct_beams")
_SETTINGS = {
    "beam": _OF_BEAMS,
    DRAFTED: (*_OF_BEAMS, "width_threshold", "min_width", "one_beam"),
    "mtad": ("beam_width", "tau", "candidates"),
}
_DEFAULTS = {
    "beam_width": WIDTH,
    "length_penalty": LENGTH_PENALTY,
    "distinct_beams": False,
    "width_threshold": THRESHOLD,
    "min_width": MIN_WIDTH,
    "one_beam": False,
    "tau": PUBLISHED.threshold,
    "candidates": PUBLISHED.candidates,
}


class SettingError(Exception):
    """A setting that cannot be.

    Args:
        name: of the setting.
        message: its value, the rule and what to do.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class AskedDecoder(NamedTuple):
    """A decoder and its settings; None = the default."""

    decoder: str
    beam_width: int | None = None
    length_penalty: float | None = None
    distinct_beams: bool | None = None
    width_threshold: float | None = None
    min_width: int | None = None
    one_beam: bool | None = None
    tau: float | None = None
    candidates: int | None = None

    @property
    def of_beams(self) -> bool:
        """Whether a text is the best of several, known when all have ended."""
        return self.decoder in BEAM_DECODERS

    @property
    def drafts(self) -> bool:
        """Whether it needs somebody who drafts."""
        return self.decoder != "beam"

    @property
    def lossy(self) -> bool:
        """Whether texts are of another law than the model's own, or its beams'."""
        return not self.of_beams or bool(self.one_beam)


def checked(
    asked: AskedDecoder, sampling: Sampling, *, drafts: int, most_width: int = MOST_WIDTH
) -> AskedDecoder:
    """The decoder with all its settings.

    Args:
        asked: what is asked for.
        sampling: how its text is chosen.
        drafts: how many tokens ahead somebody can draft; 0 = nobody drafts.
        most_width: of beams.

    Raises:
        SettingError: naming the first setting that cannot be.
    """
    if asked.decoder not in DECODERS:
        names = ", ".join(DECODERS[:-1])
        raise SettingError(
            "decoder",
            f"{printable(str(asked.decoder))} is none; give {names} or {DECODERS[-1]}, or leave it "
            "out",
        )
    check_names(asked._asdict(), asked.decoder)
    given = {name: value for name, value in asked._asdict().items() if value is not None}
    whole = AskedDecoder(**{**_DEFAULTS, **given})
    if asked.drafts and drafts < 1:
        raise SettingError(
            "decoder",
            f"{asked.decoder} needs somebody who drafts, and one head alone does not; use more "
            "heads or a draft model, or another decoder",
        )
    _check_types(whole)
    _check_ranges(whole, most_width)
    _check_sampling(whole, sampling)
    return whole


def check_names(settings: dict[str, object], decoder: str | None) -> None:
    """See that the settings that are given are of the decoder; others may be among them.

    Raises:
        SettingError: naming the first that is not.
    """
    for name in _DEFAULTS:
        if settings.get(name) is None or (decoder and name in _SETTINGS[decoder]):
            continue
        owners = " or ".join(other for other, names in _SETTINGS.items() if name in names)
        instead = f"which {decoder} does not have" if decoder else "and none is asked for"
        raise SettingError(name, f"is of the decoder {owners}, {instead}; leave {name} out")


def _check_types(asked: AskedDecoder) -> None:
    """A whole number may stand for any, and nothing else for another kind."""
    for name, usual in _DEFAULTS.items():
        value = getattr(asked, name)
        if type(value) is not type(usual) and not (type(value) is int and type(usual) is float):
            kind = {bool: "true or false", int: "a whole number"}.get(type(usual), "a number")
            raise SettingError(name, f"{printable(repr(value))} must be {kind}")


def _check_ranges(asked: AskedDecoder, most_width: int) -> None:
    width = asked.beam_width or 0
    ranges: dict[str, tuple[float, float]] = {
        "beam_width": (1, min(most_width, MOST_WIDTH)),
        "length_penalty": (-MOST_LENGTH_PENALTY, MOST_LENGTH_PENALTY),
        "width_threshold": (0, 1),
        "min_width": (1, width),
        "tau": (0, 1),
        "candidates": (1, width),
    }
    for name, (least, most) in ranges.items():
        value = getattr(asked, name)
        if name in _SETTINGS[asked.decoder] and not least <= value <= most:
            rule = f"must be from {least:g} to {most:g}"
            if name in ("min_width", "candidates"):
                rule += ", the beam_width"
            shown = f"{value:g}" if isinstance(value, float) else printable(f"{value}")
            raise SettingError(name, f"{shown} {rule}")


def _check_sampling(asked: AskedDecoder, sampling: Sampling) -> None:
    if asked.of_beams and sampling.repetition_penalty != 1:
        raise SettingError(
            "repetition_penalty",
            f"{sampling.repetition_penalty:g} does not go with the decoder {asked.decoder}, whose "
            "beams are compared as whole texts; leave it out",
        )
    if asked.decoder == DRAFTED and sampling.greedy:
        raise SettingError(
            "temperature",
            "0 leaves the decoder dsbd nothing to draw; give another one, or the decoder beam",
        )
    if asked.of_beams and asked.distinct_beams and sampling.greedy:
        raise SettingError(
            "distinct_beams",
            "is of beams that are drawn, and at temperature 0 the likeliest are kept; give another "
            "temperature, or leave it out",
        )
