"""The tasks of the tests, by name."""

from __future__ import annotations

from mopefuse.tasks.base import get_task
from mopefuse.tasks.classification import Classification


def classes(name: str) -> Classification:
    """A classification task."""
    task = get_task(name)
    assert isinstance(task, Classification)
    return task


SINGLE, MULTI = classes("single-label"), classes("multi-label")


def task_of(multi: bool) -> Classification:
    """Multi-label or single-label."""
    return MULTI if multi else SINGLE
