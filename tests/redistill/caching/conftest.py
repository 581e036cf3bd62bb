"""A scratch folder in memory."""

from tests.faults.conftest import ram

__all__ = ["ram"]
