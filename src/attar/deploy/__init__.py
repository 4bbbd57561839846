"""The last mile: the stripped student as a file that runs on the board, proved, quantised and measured.

    >>> import attar.deploy
    >>> exported = attar.deploy.export_run("runs/one", "onnx", int8=True)  # doctest: +SKIP
    >>> logits = exported.runtime(images)  # doctest: +SKIP

Names are loaded when they are first used: a format's packages are wanted only by who uses it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attar.deploy.artefact import Candidate, Format, Runtime, Settings
    from attar.deploy.candidate import candidate_from, load_candidate
    from attar.deploy.export import Exported, export_run, load_export
    from attar.deploy.formats import FORMATS, find_format
    from attar.deploy.gate import Parity
    from attar.deploy.latency import measure_latency
    from attar.deploy.qat import quantization_aware

_HOMES = {
    "Candidate": "artefact",
    "Exported": "export",
    "FORMATS": "formats",
    "Format": "artefact",
    "Parity": "gate",
    "Runtime": "artefact",
    "Settings": "artefact",
    "candidate_from": "candidate",
    "export_run": "export",
    "find_format": "formats",
    "load_candidate": "candidate",
    "load_export": "export",
    "measure_latency": "latency",
    "quantization_aware": "qat",
}

__all__ = [
    "FORMATS",
    "Candidate",
    "Exported",
    "Format",
    "Parity",
    "Runtime",
    "Settings",
    "candidate_from",
    "export_run",
    "find_format",
    "load_candidate",
    "load_export",
    "measure_latency",
    "quantization_aware",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"attar.deploy.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'attar.deploy' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
