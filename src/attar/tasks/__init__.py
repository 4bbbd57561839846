"""Tasks: what labels, the supervised loss and the metrics mean."""

from attar.tasks.classification import Classification
from attar.tasks.segmentation import Segmentation
from attar.tasks.task import Task

__all__ = ["Classification", "Segmentation", "Task"]
