"""Anatomy: the stages of any network, taps on them, and the cut between trunk and tail."""

from attar.anatomy.split import Split, redraw_, replica, split
from attar.anatomy.stages import Anatomy, Stage, survey
from attar.anatomy.taps import Recorder, Tap, overwritten, to_nchw

__all__ = [
    "Anatomy",
    "Recorder",
    "Split",
    "Stage",
    "Tap",
    "overwritten",
    "redraw_",
    "replica",
    "split",
    "survey",
    "to_nchw",
]
