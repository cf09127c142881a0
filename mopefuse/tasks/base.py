"""What a label is. A task decides loss, targets, metrics, thresholds, and the form of a prediction.

To add a task, write one module with a subclass of `Task` and name it in the entry-point group ``mopefuse.tasks``. Nothing here
imports torch before a method needs it, because exported bundles are run without it.

Shapes: B samples of a batch, S of a split, N outputs of a model for a sample, Z labels of several samples together, U names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from numpy.typing import NDArray

from mopefuse.core import registry
from mopefuse.core.error_codes import CheckpointCode, ConfigCode, PluginCode
from mopefuse.errors import CheckpointError, ConfigError, PluginError, did_you_mean
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds

if TYPE_CHECKING:
    from torch import Tensor

    from mopefuse.config.schema import RunConfig
    from mopefuse.metrics.bootstrap import Outcome
    from mopefuse.metrics.tally import Tally

Array = NDArray[Any]


class Labelled(Protocol):
    """A row, as far as predictions are written for it."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def labels(self) -> Sequence[str]:
        """Its labels, as they are written in the data."""


class TrainingTargets(Protocol):
    """The targets of the training split, as far as a task learns from them before training."""

    def numbers(self) -> Array:
        """What `Task.encode` returned for each row (S, T); for a mask its height and width in pixels (S, 2)."""


class Task(ABC):
    """What a label is. A task equals its name: ``model.task == "multi-label"``.

    Attributes:
        name: the name of its entry point. metric: the metric that selects checkpoints; larger is better.
        metric_title: the same as it is written in a sentence.
        metrics: the metrics by which runs can be compared, the most important first. The class has all that a model of the task
            can have.
        more_metrics: other metrics, which can select checkpoints and be quality gates, but have no confidence intervals.
        uses_thresholds: whether a threshold decides which labels are predicted, so that it can be tuned.
        label_kind: what a label is in the data: a class, a number, or the path of a mask; rows that are pairs have none.
        output_axes: number of axes of the outputs (B, N, ...) of a model.
        rival: the simplest method, with which others are compared.
        methods: the group of entry points with the fusion methods that can learn the task.
        linear_name: name of the linear model that is fitted in closed form.
        ways: what stands in place of labels, if rows have none.
        compares_samples: whether the loss compares the samples of a batch, and a prediction those of the whole split.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    metric_title: ClassVar[str]
    metrics: tuple[str, ...]
    more_metrics: ClassVar[tuple[str, ...]] = ()
    uses_thresholds: ClassVar[bool] = False
    label_kind: ClassVar[Literal["class", "number", "mask", "pair"]] = "class"
    output_axes: ClassVar[int] = 2
    rival: ClassVar[str] = "linear"
    methods: ClassVar[str] = registry.FUSION
    linear_name: ClassVar[str] = "logistic regression"
    ways: ClassVar[tuple[str, ...]] = ()
    compares_samples: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    @property
    def is_classification(self) -> bool:
        """Whether a label is a class, so that there are probabilities, classes to balance and a calibration."""
        return self.label_kind == "class"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return self.name == other
        return isinstance(other, Task) and self.facts() == other.facts()

    def __hash__(self) -> int:
        return hash(self.name)

    def facts(self) -> dict[str, Any]:
        """What a run records of the task, from which `task_from_facts` makes it again."""
        return {"name": self.name}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Task:
        """The task of a run, from `facts`."""
        return cls()

    def fitted(self, targets: TrainingTargets, config: RunConfig) -> Task:
        """The task of a model that is to be trained, with the settings of its run and what it needs of its training labels.

        Args:
            targets: those of the training split.

        Raises:
            ConfigError: a setting that has no meaning for the task. DataError: nothing can be learned from the targets.
        """
        return self

    def with_statistics(self, numbers: Array) -> Task:
        """The same task with what it needs of the training labels.

        Args:
            numbers: see `TrainingTargets.numbers`.
        """
        return self

    def adapted_to(self, found: Task) -> Task:
        """The same task for data other than those of training, whose labels are read as those of `found` are."""
        return self

    def outputs(self, labels: Sequence[str]) -> int:
        """N, the number of outputs of a model for a sample."""
        return len(labels)

    def selecting_metric(self, wanted: str | None) -> str:
        """The metric that selects checkpoints: the one that a run asks for, or `metric`.

        Raises:
            ConfigError: the task has no such metric.
        """
        known = (*self.metrics, *self.more_metrics, "loss")
        if wanted is not None and wanted not in known:
            what = f"{self} has no metric {wanted!r}"
            raise ConfigError(ConfigCode.UNKNOWN_METRIC, what, where="--select", fix=did_you_mean(wanted, known))
        return wanted or self.metric

    @abstractmethod
    def describe(self, labels: Sequence[str]) -> str:
        """Describe what is predicted in a few words, such as "one of 7 labels"."""

    # -- data

    @abstractmethod
    def encode(self, names: Sequence[str], known: Sequence[str]) -> Array:
        """Numbers (U,) that stand for labels as they are written in the data.

        Args:
            known: the labels of the model, in the order of its outputs.

        Raises:
            KeyError: a label that the model does not know.
        """

    @abstractmethod
    def targets(self, start_B1: Array, number_Z: Array, count: int) -> Tensor:
        """The targets of samples, the first dimension of which is B.

        Args:
            start_B1: where the numbers of each sample start in `number_Z`, and where the last ones end (B + 1,).
            number_Z: from `encode`. count: N.
        """

    @abstractmethod
    def unknown_labels(self, names: Iterable[str], known: Sequence[str]) -> list[str]:
        """Those of some labels that `encode` would refuse."""

    def as_written(self, labels: Sequence[Any]) -> Any:
        """The labels of a sample in the form in which data and predictions write them: a list, or the only one."""
        return list(labels)

    @abstractmethod
    def check_label(self, label: Any, count: int, where: str) -> None:
        """Check the label of a row of a `mopefuse.PairDataset`.

        Args:
            count: number of labels of the model, 0 if it is not known.

        Raises:
            DataError: the model cannot learn it.
        """

    @abstractmethod
    def stack_labels(self, labels: Sequence[Any], count: int) -> Tensor:
        """The targets of rows of a `mopefuse.PairDataset`, as `targets` returns them."""

    # -- training

    @abstractmethod
    def loss(self, outputs_BN: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of each sample (B,), in float32.

        Args:
            weights: of classes, from `mopefuse.tasks.classification.Classification.class_weights`.
        """

    @abstractmethod
    def average(self, each: Sequence[Tensor]) -> Tensor:
        """Outputs (B, N) that predict the mean of what several outputs (B, N) predict."""

    # -- evaluation

    @abstractmethod
    def tally(self, samples: int, outputs: int) -> Tally:
        """An accumulator of metrics for a split of S samples, with N outputs each."""

    def count(self, outputs_SN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD) -> Tally:
        """Count a whole split at once."""
        import torch

        tally = self.tally(*outputs_SN.shape)
        tally.add(torch.arange(len(outputs_SN)), outputs_SN, targets, thresholds)
        return tally

    def compute(self, outputs_SN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD) -> dict[str, float]:
        """Compute the metrics of a whole split at once."""
        return self.count(outputs_SN, targets, thresholds).metrics()

    @abstractmethod
    def outcome(self, outputs_SN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD) -> Outcome:
        """What a bootstrap over samples needs to compute `metrics`."""

    @abstractmethod
    def changed(self, before_SN: Tensor, after_SN: Tensor, thresholds: Thresholds = THRESHOLD) -> Tensor:
        """Whether (S,) the prediction for a sample differs between two outputs."""

    @abstractmethod
    def constant(self, counts: Mapping[str, int], labels: Sequence[str]) -> tuple[str, Tensor]:
        """The best prediction that is the same for all samples, in words and as outputs (N,).

        Args:
            counts: number of training rows with each label, or of pixels of each class.
        """

    # -- predictions

    @abstractmethod
    def decode(self, outputs_BN: Array) -> Array:
        """What a model predicts: the probability (B, N) of each label, or each value."""

    @abstractmethod
    def predict(
        self, decoded_N: Sequence[float], labels: Sequence[str], thresholds: Sequence[float], top: int | None = None
    ) -> dict[str, Any]:
        """The prediction for a sample, from one row of `decode`.

        Args:
            top: number of labels in "probabilities", the most likely first; None for all.
        """

    @abstractmethod
    def table_header(self, labels: Sequence[str]) -> list[str]:
        """Columns of predictions in a table, between id and error."""

    @abstractmethod
    def table_cells(self, prediction: Mapping[str, Any], labels: Sequence[str]) -> list[Any]:
        """The cells of a prediction under `table_header`; empty ones for a row with an error."""

    @abstractmethod
    def collect(
        self, index_B: Tensor, outputs_BN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD
    ) -> tuple[Tensor, ...]:
        """What `prediction_lines` needs of a batch, as tensors that processes exchange; `index_B` is the first of them."""

    @abstractmethod
    def prediction_lines(
        self, parts: Iterable[Sequence[Tensor]], rows: Sequence[Labelled], labels: Sequence[str]
    ) -> Iterator[str]:
        """Lines of JSON with id, prediction and true label, in the order of the split.

        Args:
            parts: what `collect` returned for one batch of each process, or for all batches if the task `compares_samples`.
            rows: all rows of the split.
        """

    @abstractmethod
    def read_outcome(self, lines: Iterable[tuple[int, Mapping[str, Any]]], samples: int, labels: Sequence[str]) -> Outcome:
        """The outcome of a split from the content of `prediction_lines`.

        Args:
            lines: the position of each sample in the outcome, and its line. samples: S.

        Raises:
            KeyError, TypeError: they are not predictions of this task.
        """


@cache
def get_task(name: str) -> Task:
    """The task of this name, before training.

    Raises:
        ConfigError: there is no such task. PluginError: the plugin that provides it cannot be used.
    """
    return _class(name)()


def as_task(task: str | Task) -> Task:
    """The task that is given by its name or as an object."""
    return task if isinstance(task, Task) else get_task(task)


def task_from_facts(facts: Mapping[str, Any]) -> Task:
    """The task of a run, from `Task.facts`.

    Raises:
        CheckpointError: they are damaged, or of a task that is not installed.
    """
    try:
        return _class(facts["name"]).from_facts(facts)
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        what, fix = f"the facts of the task are damaged: {error}", "restore the original file"
        raise CheckpointError(CheckpointCode.CONTENT_DAMAGED, what, where="task", fix=fix) from None


def with_task(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Add the task to the facts of a model that an earlier version recorded, which have ``multi_label`` in its place."""
    several = facts.get("multi_label")
    known = {"task": {"name": "multi-label" if several else "single-label"}} if isinstance(several, bool) else {}
    return {**known, **facts}


def task_names() -> tuple[str, ...]:
    """The names of all tasks that are installed."""
    return tuple(_sorted(registry.available(registry.TASKS)))


def _sorted(names: Iterable[str]) -> list[str]:
    """Sort the names of tasks, the most common one first."""
    return sorted(names, key=lambda name: (name != "single-label", name))


def all_metrics(*, more: bool = False) -> tuple[str, ...]:
    """The names of the metrics of all built-in tasks.

    Args:
        more: whether to include `Task.more_metrics`.
    """
    found = registry.available(registry.TASKS).items()
    ours = [name for name, points in found if registry.distribution(points[0]) == registry.OURS]
    tasks = [_class(name) for name in _sorted(ours)]
    return tuple(dict.fromkeys(name for task in tasks for name in (*task.metrics, *(task.more_metrics if more else ()))))


def _class(name: str) -> type[Task]:
    if not isinstance(name, str) or not registry.find_candidates(registry.TASKS, name):
        what = f"task must be one of {', '.join(task_names())}, got {name!r}"
        raise ConfigError(ConfigCode.UNKNOWN_TASK, what, where="task", fix=did_you_mean(str(name), task_names()))
    found = registry.load(registry.TASKS, name)
    if not (isinstance(found, type) and issubclass(found, Task)):
        what = f"the task {name!r} is not a subclass of mopefuse.tasks.base.Task"
        raise PluginError(PluginCode.NOT_A_SUBCLASS, what, fix="fix the plugin, or uninstall it")
    return found
