"""The contract that every task must satisfy; see `mopefuse.tasks.base.Task`. Checks are in `task_checks`."""

from __future__ import annotations

from collections.abc import Sequence

from mopefuse.core import registry
from mopefuse.tasks.base import Task, get_task
from mopefuse.testing._contract import Part, enforce
from mopefuse.testing.task_checks import TaskChecks


def check_task(task: str | Task, *, rows: Sequence[Sequence[str]], known: Sequence[str]) -> Task:
    """Check that a task satisfies the contract of `mopefuse.tasks.base.Task`; it is returned.

    Args:
        task: its registered name, or an object of it, such as one that was fitted.
        rows: labels of some rows, as they are written in data; ten or more, not all the same.
        known: the labels of a model.

    Raises:
        AssertionError: the first part of the contract that is broken: what, where, and how to fix it.
    """
    name = task if isinstance(task, str) else task.name
    found = registry.load(registry.TASKS, name)
    assert isinstance(found, type) and issubclass(found, Task), (
        f"{name}: is not a subclass of mopefuse.tasks.base.Task · fix: use a subclass in the entry point"
    )
    made = get_task(task) if isinstance(task, str) else task
    enforce(_parts(TaskChecks(name, made, rows, known)))
    return made


def _parts(check: TaskChecks) -> list[Part]:
    return [
        Part("describes itself", check.attributes, "set name, metric, metrics and metric_title"),
        Part("is restored from its facts", check.facts, "record in facts() everything that __init__ takes"),
        Part("encodes labels sample by sample", check.encoding, "let targets() and stack_labels() compute the same"),
        Part("has a loss for each sample", check.loss, "return a loss (B,) in float32 without averaging over the batch"),
        Part("has metrics that batches do not change", check.metrics, "count in integers, and store the rest by sample"),
        Part("averages predictions", check.averages, "average what outputs predict, not always the outputs"),
        Part("writes and reads predictions", check.predictions, "write in prediction_lines() what read_outcome() needs"),
    ]
