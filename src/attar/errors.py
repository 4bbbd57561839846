"""The one kind of error that is the user's to mend, and the nearest-name helper that its sentences use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["AttarError", "did_you_mean", "unknown_name"]


class AttarError(ValueError):
    """A mistake the user can mend: its message is one sentence that says what is wrong and what to do.

    The command line prints the message alone and exits with 2; from Python it is an ordinary `ValueError`.
    """


def did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate closest to `name`, ignoring case, or None when none is close."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    return by_folded[close[0]] if close else None


def unknown_name(kind: str, name: str, candidates: Iterable[str]) -> AttarError:
    """Build the error for a name that does not exist: the nearest valid one, else the list of all (at most 12)."""
    candidates = list(candidates)
    nearest = did_you_mean(name, candidates)
    if nearest is not None:
        return AttarError(f"There is no {kind} '{name}': did you mean '{nearest}'?")
    listed = ", ".join(sorted(candidates)[:12]) + (", ..." if len(candidates) > 12 else "")
    return AttarError(f"There is no {kind} '{name}': choose one of {listed}.")
