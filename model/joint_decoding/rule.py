"""How joint decoding drafts, and what it keeps; light to import."""

from typing import NamedTuple


class JointRule(NamedTuple):
    """Settings of `model.joint_decoding.decoder`; unless given as published.

    Attributes:
        width: beams of drafts.
        candidates: how many of them are verified, at most all; several are MMTAD.
        threshold: tau, from 0 to 1; 1 is plain decoding.
    """

    width: int = 4
    candidates: int = 1
    threshold: float = 0.5


PUBLISHED = JointRule()
