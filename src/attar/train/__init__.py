"""Training: from a spec to a run folder with a better student in it."""

from __future__ import annotations

from attar.train.build import build_methods, build_model, build_source, load_teacher
from attar.train.evaluate import Metrics, evaluate, evaluate_run, retrieve_run
from attar.train.loop import fit
from attar.train.retrieval import Retrieval, measure_retrieval
from attar.train.stopping import Interrupted
from attar.train.student import Student, load_student

__all__ = [
    "Interrupted",
    "Metrics",
    "Retrieval",
    "Student",
    "build_methods",
    "build_model",
    "build_source",
    "evaluate",
    "evaluate_run",
    "fit",
    "load_student",
    "load_teacher",
    "measure_retrieval",
    "retrieve_run",
]
