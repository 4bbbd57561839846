"""Tasks: what labels, the supervised loss and the metrics mean."""

from attar.tasks.classification import Classification

__all__ = ["Classification"]
