"""Anatomy: the stages of any network, taps on them, and the cut between trunk and tail."""

from attar.anatomy.budget import Limit, Widths, refuse_impossible_limits, within_budget
from attar.anatomy.folding import switch_off_
from attar.anatomy.groups import Gate, Group, Structure, channel_groups
from attar.anatomy.split import Split, redraw_, replica, split
from attar.anatomy.stages import Anatomy, Stage, survey
from attar.anatomy.surgery import Kept, slice_
from attar.anatomy.taps import Recorder, Tap, overwritten, to_nchw

__all__ = [
    "Anatomy",
    "Gate",
    "Group",
    "Kept",
    "Limit",
    "Recorder",
    "Split",
    "Stage",
    "Structure",
    "Tap",
    "Widths",
    "channel_groups",
    "overwritten",
    "redraw_",
    "refuse_impossible_limits",
    "replica",
    "slice_",
    "split",
    "survey",
    "switch_off_",
    "to_nchw",
    "within_budget",
]
