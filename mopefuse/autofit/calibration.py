"""Temperature scaling: one number that makes the probabilities of a classifier as confident as they are right.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017. The logits are divided by a temperature T that minimises the
log-loss on samples that the model was not trained on; predicted labels stay the same. T is folded into the last linear layer of
the head, so that prediction and export need not know of it. With several heads (an average of regressions), all are divided by
the same T before their probabilities are averaged.

Shapes: K samples, N labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopefuse.fusion.wide_head import WideHead
from mopefuse.metrics import classification as metrics
from mopefuse.tasks.classification import Classification

_WIDEST = 10.0  # T and 1 / T are at most this
_STEPS = 200  # tried on either side of 1
_MAX_SAMPLES = 20_000


@dataclass(frozen=True)
class Calibration:
    """The temperature of a model, and what it changed on the samples that it was chosen on.

    Args:
        basis: these samples, in words. error: expected calibration error. loss: log-loss.
    """

    temperature: float
    basis: str
    rows: int
    error_before: float
    error_after: float
    loss_before: float
    loss_after: float

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return asdict(self)


def calibrate(task: Classification, heads: Sequence[Tensor], targets: Tensor, basis: str) -> Calibration:
    """Choose the temperature with the least log-loss.

    Args:
        heads: logits (K, N) of each head, whose probabilities are averaged.
        targets: of the samples.
    """
    some = slice(None, None, max(1, len(targets) // _MAX_SAMPLES))
    few, few_targets = [head_KN[some] for head_KN in heads], targets[some]
    exponents = torch.linspace(-1, 1, 2 * _STEPS + 1, dtype=torch.double)
    temperatures = sorted((_WIDEST**exponents).tolist(), key=lambda value: abs(value - 1))  # T = 1 wins ties
    best = min(temperatures, key=lambda value: _loss(task, _scaled(task, few, value), few_targets))
    before, after = _scaled(task, heads, 1.0), _scaled(task, heads, best)
    return Calibration(
        temperature=best,
        basis=basis,
        rows=len(targets),
        error_before=calibration_error(task, before, targets),
        error_after=calibration_error(task, after, targets),
        loss_before=_loss(task, before, targets),
        loss_after=_loss(task, after, targets),
    )


def _scaled(task: Classification, heads: Sequence[Tensor], temperature: float) -> Tensor:
    """The logits (K, N) of the mean of the heads' probabilities at a temperature."""
    each = [head_KN / temperature for head_KN in heads]
    return each[0] if len(each) == 1 else task.average(each)


def _loss(task: Classification, logits_KN: Tensor, targets: Tensor) -> float:
    return float(task.loss(logits_KN, targets).double().mean())


def calibration_error(task: Classification, logits_KN: Tensor, targets: Tensor) -> float:
    """The expected calibration error of probabilities."""
    return metrics.calibration(task.probabilities(logits_KN), targets).error


def fold_temperature(head: nn.Module, temperature: float) -> bool:
    """Divide the logits of a head, or of each of several, by a temperature; False if its last layers are not linear."""
    layers = _last_layers(head)
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return False
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.div_(temperature)
    return True


def _last_layers(head: nn.Module) -> list[nn.Module]:
    if isinstance(head, WideHead):
        return [head.linear, head.output]
    if isinstance(head, nn.ModuleDict):
        return list(head.values())
    return [head[-1] if isinstance(head, nn.Sequential) else head]
