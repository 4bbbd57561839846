"""The contract suite that every method, attar's or a user's, must pass."""

from attar.testing.contract import MethodContract

__all__ = ["MethodContract"]
