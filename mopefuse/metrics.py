"""Metrics of a split, from logits and targets of all its samples: nothing is averaged over batches.

Shapes: S samples of the split, N labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score, precision_recall_fscore_support
from torch import Tensor

THRESHOLD = 0.5
"""Multi-label: a label is predicted from this probability on."""


def probabilities(logits_SN: Tensor, *, multi_label: bool) -> Tensor:
    """Softmax over labels, or a sigmoid each for multi-label data."""
    return logits_SN.float().sigmoid() if multi_label else logits_SN.float().softmax(dim=-1)


def selected_metric(*, multi_label: bool) -> str:
    """The metric that chooses the best checkpoint: accuracy, or macro-F1 for multi-label data."""
    return "f1_macro" if multi_label else "accuracy"


def compute(logits_SN: Tensor, targets: Tensor, *, multi_label: bool) -> dict[str, float]:
    """Metrics of a split, each in 0..1, and the mean loss.

    F1 macro is over the labels that the split has (`absent_labels` counts the others), and 0 if it has none; F1 samples
    counts a sample without labels as 1 if none is predicted, else as 0.
    """
    logits_SN = logits_SN.float()
    if multi_label:
        return _multi_label(logits_SN, targets)
    predicted, actual = logits_SN.argmax(dim=-1).numpy(), targets.numpy()
    present = np.unique(actual)
    return {
        "accuracy": float((predicted == actual).mean()),
        "f1_macro": float(f1_score(actual, predicted, labels=present, average="macro", zero_division=0)),
        "absent_labels": logits_SN.shape[1] - len(present),
        "loss": float(torch.nn.functional.cross_entropy(logits_SN, targets)),
    }


def _multi_label(logits_SN: Tensor, targets_SN: Tensor) -> dict[str, float]:
    predicted = (probabilities(logits_SN, multi_label=True) >= THRESHOLD).int().numpy()
    actual = targets_SN.int().numpy()
    present = np.flatnonzero(actual.any(axis=0))
    empty = ~actual.any(axis=1)
    samples = f1_score(actual[~empty], predicted[~empty], average="samples", zero_division=0) if (~empty).any() else 0.0
    macro = f1_score(actual, predicted, labels=present, average="macro", zero_division=0) if len(present) else 0.0
    right_empty = float((~predicted[empty].any(axis=1)).sum())
    return {
        "f1_micro": float(f1_score(actual, predicted, average="micro", zero_division=0)),
        "f1_macro": float(macro),
        "f1_samples": float((samples * (~empty).sum() + right_empty) / len(actual)),
        "absent_labels": int(logits_SN.shape[1] - len(present)),
        "loss": float(torch.nn.functional.binary_cross_entropy_with_logits(logits_SN, targets_SN)),
    }


def per_label(logits_SN: Tensor, targets: Tensor, labels: tuple[str, ...], *, multi_label: bool) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each label."""
    if multi_label:
        predicted = (probabilities(logits_SN, multi_label=True) >= THRESHOLD).int().numpy()
        scores = precision_recall_fscore_support(targets.int().numpy(), predicted, zero_division=0)
    else:
        scores = precision_recall_fscore_support(
            targets.numpy(), logits_SN.argmax(dim=-1).numpy(), labels=range(len(labels)), zero_division=0
        )
    rows = zip(labels, *scores, strict=True)
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in rows
    ]
