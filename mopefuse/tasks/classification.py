"""What the two classification tasks share: encoded labels, probabilities, and how predictions are written.

With up to `MAX_LABELS` labels a line of ``predictions.jsonl`` has the probability of every label. With more labels it has those
of the `KEPT` most probable, the predicted and the true labels, most probable first. Accuracy, F1 and the log-likelihood of the
true labels can still be computed from that, and a million lines with 10,000 labels take about 1 GB instead of 200 GB.

Shapes: B samples of a batch, S of a split, N labels, Z (sample, label) pairs to write.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mopefuse.core.formatting import json_text
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.tasks.base import Array, Labelled, Task

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from torch import Tensor

    from mopefuse.metrics.bootstrap import Outcome

MAX_LABELS, KEPT = 100, 20


class Classification(Task):
    """A label is one class of several, or a set of them."""

    @abstractmethod
    def probabilities(self, logits_SN: Tensor) -> Tensor:
        """The probability of each label (S, N), in float32."""

    @abstractmethod
    def chosen(self, logits_SN: Tensor, thresholds: Thresholds = THRESHOLD) -> Tensor:
        """Whether a label is predicted (S, N)."""

    @abstractmethod
    def actual(self, targets: Tensor, labels: int) -> Tensor:
        """Whether a sample has a label (S, N)."""

    def count_labels(self, targets: Tensor, labels: int) -> Tensor:
        """Count the samples with each label (N,)."""
        return self.actual(targets, labels).sum(dim=0)

    @abstractmethod
    def class_weights(self, counts_N: Tensor, samples: int) -> Tensor:
        """Weights that give every class the same total weight, 1 on average over samples (scikit-learn's "balanced").

        Args:
            counts_N: number of samples with each label. samples: S.
        """

    @property
    @abstractmethod
    def key(self) -> str:
        """The key of predicted labels in a prediction."""

    def encode(self, names: Sequence[str], known: Sequence[str]) -> Array:
        """Return the position of each label in `known`, (U,) int64."""
        number = {label: i for i, label in enumerate(known)}
        return np.array([number[name] for name in names], dtype=np.int64)

    def unknown_labels(self, names: Iterable[str], known: Sequence[str]) -> list[str]:
        """Those of some labels that are not in `known`."""
        numbered = set(known)
        return [name for name in names if name not in numbered]

    def constant(self, counts: Mapping[str, int], labels: Sequence[str]) -> tuple[str, Tensor]:
        """The most frequent label, see `Task.constant`."""
        import torch

        label = min(counts, key=lambda name: (-counts[name], name))
        outputs_N = torch.full((len(labels),), -10.0)
        outputs_N[labels.index(label)] = 10.0
        return f"always “{label}”, the most frequent label in training", outputs_N

    def outcome(self, outputs_SN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD) -> Outcome:
        """See `Task.outcome`."""
        from mopefuse.metrics.bootstrap import LabelOutcome

        return LabelOutcome(
            _sparse(self.chosen(outputs_SN, thresholds)), _sparse(self.actual(targets, outputs_SN.shape[-1]))
        )

    def changed(self, before_SN: Tensor, after_SN: Tensor, thresholds: Thresholds = THRESHOLD) -> Tensor:
        """See `Task.changed`."""
        return (self.chosen(before_SN, thresholds) != self.chosen(after_SN, thresholds)).any(dim=-1)

    def predict(
        self, decoded_N: Sequence[float], labels: Sequence[str], thresholds: Sequence[float], top: int | None = None
    ) -> dict[str, Any]:
        """``{"label" | "labels", "probabilities": {label: p}}``."""
        likeliest = sorted(range(len(decoded_N)), key=lambda i: (-decoded_N[i], i))
        chosen = self._predicted(decoded_N, likeliest, thresholds)
        probabilities = {labels[i]: round(decoded_N[i], 6) for i in likeliest[:top]}
        return {self.key: self.as_written([labels[i] for i in chosen]), "probabilities": probabilities}

    @abstractmethod
    def _predicted(self, p_N: Sequence[float], likeliest: Sequence[int], thresholds: Sequence[float]) -> list[int]:
        """The numbers of the predicted labels, given all numbers, the likeliest first."""

    def table_header(self, labels: Sequence[str]) -> list[str]:
        """See `Task.table_header`."""
        return ["label", *(f"p({label})" for label in labels)]

    def table_cells(self, prediction: Mapping[str, Any], labels: Sequence[str]) -> list[Any]:
        """See `Task.table_cells`; several labels are separated by ``|``."""
        chosen = prediction.get(self.key, "")
        probabilities: Mapping[str, float] = prediction.get("probabilities", {})
        cell = chosen if isinstance(chosen, str) else "|".join(chosen)
        return [cell, *(probabilities.get(label, "") for label in labels)]

    def collect(
        self, index_B: Tensor, outputs_BN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD
    ) -> tuple[Tensor, ...]:
        """The (sample, label) pairs to write for a batch, sample by sample.

        Returns:
            Positions of the samples (B,) and the number of pairs of each (B,); label, probability, and whether it is predicted
            of each pair (Z,).
        """
        import torch

        p_BN, chosen_BN = self.probabilities(outputs_BN), self.chosen(outputs_BN, thresholds)
        kept_BN = torch.ones_like(chosen_BN)
        if p_BN.shape[1] > MAX_LABELS:
            true_BN = self.actual(targets, p_BN.shape[1])
            kept_BN = (chosen_BN | true_BN).scatter_(1, p_BN.topk(KEPT, dim=-1).indices, True)
        label_Z = kept_BN.nonzero()[:, 1].int()
        return index_B, kept_BN.sum(dim=1), label_Z, p_BN[kept_BN], chosen_BN[kept_BN]

    def prediction_lines(
        self, parts: Iterable[Sequence[Tensor]], rows: Sequence[Labelled], labels: Sequence[str]
    ) -> Iterator[str]:
        """``{"id", "label" | "labels", "probabilities": {label: p}, "true"}``; see `Task.prediction_lines`."""
        for index, pairs in sorted(pair for part in parts for pair in _pairs_by_sample(*part)):
            row = rows[index]
            chosen = [labels[number] for number, _, yes in pairs if yes]
            if len(labels) > MAX_LABELS:
                pairs = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
            probabilities = {labels[number]: round(p, 6) for number, p, _ in pairs}
            written = {self.key: self.as_written(chosen), "probabilities": probabilities, "true": self.as_written(row.labels)}
            yield json_text({"id": row.id, **written}) + "\n"

    def read_outcome(self, lines: Iterable[tuple[int, Mapping[str, Any]]], samples: int, labels: Sequence[str]) -> Outcome:
        """See `Task.read_outcome`."""
        from mopefuse.metrics.bootstrap import LabelOutcome

        column_of = {label: column for column, label in enumerate(labels)}
        predicted, actual = ((array("q"), array("q")) for _ in range(2))  # rows and columns of each
        for sample, line in lines:
            for (rows, columns), written in ((predicted, line[self.key]), (actual, line["true"])):
                found = [written] if isinstance(written, str) else written
                columns.extend([column_of[label] for label in dict.fromkeys(found)])
                rows.extend([sample] * (len(columns) - len(rows)))
        return LabelOutcome(*(_ones(*places, (samples, len(labels))) for places in (predicted, actual)))


def _sparse(labels_SN: Tensor) -> csr_array:
    from scipy.sparse import csr_array

    return csr_array(labels_SN.numpy().astype(np.float64))


def _ones(rows: array[int], columns: array[int], shape: tuple[int, int]) -> csr_array:
    """A sparse table with 1 at some places."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(rows)), (np.asarray(rows), np.asarray(columns))), shape=shape)


def _pairs_by_sample(
    index_B: Tensor, count_B: Tensor, label_Z: Tensor, p_Z: Tensor, chosen_Z: Tensor
) -> Iterator[tuple[int, list[tuple[int, float, bool]]]]:
    """(position in the split, [(label index, probability, whether predicted), ...]) of each sample."""
    pairs = list(zip(label_Z.tolist(), p_Z.tolist(), chosen_Z.tolist(), strict=True))
    first = 0
    for index, count in zip(index_B.tolist(), count_B.tolist(), strict=True):
        yield index, pairs[first : first + count]
        first += count
