"""attar: make the network you already have more accurate at zero inference cost.

Names are loaded when they are first used, so that `import attar` and the command line's help do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attar import functional, lab, methods, testing, zoo
    from attar.distiller import Distiller
    from attar.errors import AttarError
    from attar.method import Batch, Method, Outputs, Phase, Probe, Terms
    from attar.tasks import Classification, Segmentation
    from attar.teacher import Normalization, Teacher

__all__ = [
    "AttarError",
    "Batch",
    "Classification",
    "Distiller",
    "Method",
    "Normalization",
    "Outputs",
    "Phase",
    "Probe",
    "Segmentation",
    "Teacher",
    "Terms",
    "functional",
    "lab",
    "methods",
    "testing",
    "zoo",
]

_HOMES = {
    "AttarError": "attar.errors",
    "Batch": "attar.method",
    "Classification": "attar.tasks",
    "Segmentation": "attar.tasks",
    "Distiller": "attar.distiller",
    "Method": "attar.method",
    "Normalization": "attar.teacher",
    "Outputs": "attar.method",
    "Phase": "attar.method",
    "Probe": "attar.method",
    "Teacher": "attar.teacher",
    "Terms": "attar.method",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"attar.{name}")
    raise AttributeError(f"module 'attar' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
