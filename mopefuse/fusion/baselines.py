"""Simple models on frozen features, compared on held-out samples: where the training of a fusion method starts.

They are a logistic regression for each encoder, their average, one on all features, and an MLP. On small data the
validation split alone would choose by luck, so that samples of the training split, each predicted by models that were fitted
without it, are used as well (cross-validation).

Cross-attention to the output tokens of the main encoder takes longer to fit. It is fitted once, and preferred to the best of
the others if it is better on validation by more than noise.

Shapes: S samples, F features of all sides, N labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopefuse.fusion.mlp_fit import Network, NetworkSettings, epochs_for, fit_network
from mopefuse.fusion.regression import Advance, FitSettings, Fold, score, score_by_sample, set_up, standard_state
from mopefuse.fusion.token_reader_fit import Reading, ReadingSettings, fit_reading
from mopefuse.metrics.names import write_metric
from mopefuse.metrics.significance import difference_in_errors, is_probably_better

_FOLDS = 5
_MANY_HELD_OUT = 500  # validation samples that suffice without cross-validation
_MANY_TO_FIT = 5000  # training samples up to which cross-validation takes seconds
_MORE_DROPOUT = 0.5  # of the second cross-attention

Weights = tuple[Tensor, Tensor]
"""Weight (N, F) and bias (N,) of a linear model on all features."""
Model = Network | Weights | Reading


class Baseline(NamedTuple):
    """A fitted model on frozen features.

    Attributes:
        name: such as "logistic regression on main".
        score: the selected metric on the held-out samples.
        error: the standard error of the scores of these samples, see `mopefuse.metrics.tally.Tally.by_sample`.
        loss: the mean loss on them.
        val_score: the selected metric on the validation split.
        val_S: the score of each validation sample.
    """

    name: str
    model: Model
    score: float
    error: float
    loss: float
    val_score: float
    val_S: Tensor


class Held(NamedTuple):
    """A pair of disjoint sets: models are fitted on one and predict the other."""

    train: Fold
    out: Fold


def hold_out(train: Fold, val: Fold, seed: int) -> list[Held]:
    """Return the folds of a cross-validation of `train`, if the data are small, and last the pair (train, val)."""
    samples, pairs = len(train.targets), [Held(train, val)]
    if len(val.targets) >= _MANY_HELD_OUT or not 2 * _FOLDS <= samples <= _MANY_TO_FIT:
        return pairs
    fold_S = torch.arange(samples)[torch.randperm(samples, generator=torch.Generator().manual_seed(seed))] % _FOLDS
    folds = [(fold_S != number, fold_S == number) for number in range(_FOLDS)]
    return [Held(*(train.rows(chosen_S.nonzero()[:, 0]) for chosen_S in fold)) for fold in folds] + pairs


class _Comparison:
    """Fits models on each pair of `hold_out` and scores their predictions of all held-out samples."""

    def __init__(self, train: Fold, val: Fold, how: FitSettings, seed: int) -> None:
        self.how, self.sides = how, tuple(train.features)
        self.known = {side: train.statistics(side) for side in self.sides}
        self.pairs = hold_out(train, val, seed)
        self.actual = torch.cat([pair.out.targets[torch.arange(len(pair.out.targets))] for pair in self.pairs])

    def regression(self, group: Sequence[str], advance: Advance) -> tuple[Baseline, Tensor]:
        """Fit a logistic regression on the features of some sides; returns it and its held-out logits."""
        name = f"{self.how.task.linear_name} on " + " and ".join(group)
        buffers = {side: self.known[side] for side in group}
        strengths = sorted(self.how.settings.strengths)
        problems = [
            (set_up(pair.train.design(buffers, self.how.labels), pair.train.targets, self.how), pair.out)
            for pair in self.pairs
        ]
        found: list[tuple[Baseline, Tensor]] = []
        for number, strength in enumerate(strengths):
            parts = []
            for done, (problem, out) in enumerate(problems):
                advance(name, (number + done / len(problems)) / len(strengths))
                fitted = problem.solve(strength, self.how.settings.max_iter, lambda share: None)
                parts.append(out.design(buffers, self.how.labels).logits(*fitted))
            found.append(self._scored(name, self._widen(group, fitted), parts))
            if _overfits([one for one, _ in found]):
                break
        return max(found, key=lambda one: one[0].score)

    def network(self, settings: NetworkSettings, advance: Advance) -> Baseline:
        """Fit an MLP on all features, and choose the epoch."""
        name = "MLP on " + " and ".join(self.sides)
        parts: list[list[Tensor]] = [[] for _ in range(max(epochs_for(len(pair.train.targets)) for pair in self.pairs))]
        best: Baseline | None = None
        for done, pair in enumerate(self.pairs):
            design, out = (fold.design(self.known, self.how.labels) for fold in pair)
            for epoch, network in enumerate(fit_network(design, pair.train.targets, self.how, settings)):
                advance(name, (done + epoch / len(parts)) / len(self.pairs))
                parts[epoch].append(network.logits_of(out))
                if done == len(self.pairs) - 1:
                    found, _ = self._scored(name, network, parts[epoch])
                    best = found if best is None or found.score > best.score else best
        assert best is not None
        return best

    def reading(self, settings: ReadingSettings, advance: Advance) -> Baseline:
        """Fit cross-attention to the tokens of the main encoder, and choose dropout and epoch by the loss on validation.

        The right dropout depends on the data, and the loss shows it with less noise than the score.
        """
        (train, val), name = self.pairs[-1], "cross-attention to the output tokens of main"
        actual = val.targets[torch.arange(len(val.targets))]
        rates = sorted({settings.attention.dropout, _MORE_DROPOUT})

        def fit() -> Iterator[Baseline]:
            for done, dropout in enumerate(rates):
                changed = settings._replace(attention=settings.attention.model_copy(update={"dropout": dropout}))
                report = lambda share, done=done: advance(name, (done + share) / len(rates))  # noqa: E731
                for model, logits_SN in fit_reading(train, val, self.known, self.how, changed, report):
                    yield self._scored(name, model, [logits_SN], actual)[0]

        return min(fit(), key=lambda one: one.loss)

    def average(self, of: Sequence[tuple[Baseline, Tensor]]) -> Baseline:
        """Average the logits of regressions: the geometric mean of their probabilities, normalised."""
        linear = [one.model for one, _ in of if not isinstance(one.model, Reading)]
        weights_NF, biases_N = (torch.stack([model[part] for model in linear]).mean(dim=0) for part in (0, 1))
        logits_SN = torch.stack([logits_SN for _, logits_SN in of]).mean(dim=0)
        return self._scored(f"average of one {self.how.task.linear_name} per encoder", (weights_NF, biases_N), [logits_SN])[0]

    def _scored(
        self, name: str, model: Model, parts: Sequence[Tensor], actual: Tensor | None = None
    ) -> tuple[Baseline, Tensor]:
        """Score held-out logits, of which those of the validation split are the last.

        Args:
            actual: targets; default: those of all held-out samples.
        """
        logits_SN, actual = torch.cat(list(parts)), self.actual if actual is None else actual
        loss = float(self.how.task.loss(logits_SN, actual).mean())
        score_S = score_by_sample(logits_SN, actual, self.how).double()
        error = float(score_S.std(correction=0)) / math.sqrt(len(score_S))
        last = slice(-len(self.pairs[-1].out.targets), None)
        val_score = score(logits_SN[last], actual[last], self.how)
        val_S = score_by_sample(logits_SN[last], actual[last], self.how)
        return Baseline(name, model, score(logits_SN, actual, self.how), error, loss, val_score, val_S), logits_SN

    def _widen(self, group: Sequence[str], weights: Weights) -> Weights:
        """Add zero weights for the features of sides that are not in `group`."""
        parts = iter(weights[0].split([len(self.known[side]["mean_C"]) for side in group], dim=1))
        zeros = {side: weights[0].new_zeros(self.how.labels, len(self.known[side]["mean_C"])) for side in self.sides}
        return torch.cat([next(parts) if side in group else zeros[side] for side in self.sides], dim=1), weights[1]


def _overfits(found: Sequence[Baseline]) -> bool:
    """Whether the last two of some models have a higher loss and no higher score than those before.

    Args:
        found: in order of decreasing regularisation.
    """
    if len(found) < 3:
        return False
    earlier, last = found[:-2], found[-2:]
    loss, score = min(one.loss for one in earlier), max(one.score for one in earlier)
    return all(one.loss > loss and one.score <= score for one in last)


class Baselines(NamedTuple):
    """Fitted baselines, simplest first.

    Attributes:
        standard: statistics of the features, by the names of `Fusion.standard`'s buffers.
        samples: number of samples on which they were compared.
        folds: number of folds of the cross-validation; 0 without.
        metric: the metric that selects models.
        reading: cross-attention, scored on the validation split; None if it was not fitted.
    """

    fitted: list[Baseline]
    standard: Mapping[str, Tensor]
    samples: int
    folds: int
    metric: str
    reading: Baseline | None = None

    @property
    def best(self) -> Baseline:
        """`reading` if it exceeds `best_simple` on validation by more than noise, else that."""
        simple, reading = self.best_simple, self.reading
        return reading if reading and is_probably_better(reading.val_S, simple.val_S) else simple

    @property
    def best_simple(self) -> Baseline:
        """The baseline with the lowest loss among those whose score is within a standard error of the best score.

        A difference within the noise of the score is decided by the loss, which is less noisy.
        """
        leader = max(self.fitted, key=lambda one: one.score)
        return min((one for one in self.fitted if one.score >= leader.score - leader.error), key=lambda one: one.loss)

    @property
    def trained_from(self) -> Baseline:
        """The baseline from which training starts: `reading` if it is the best, else the one with the lowest loss.

        One that merely memorised the training split leaves nothing to learn there.
        """
        return self.best if self.best is self.reading else min(self.fitted, key=lambda one: one.loss)

    def summary(self) -> str:
        """Lines for the user: the chosen baseline, the scores of the others, and where training starts."""
        simple, reading, shown = self.best_simple, self.reading, partial(write_metric, self.metric)
        how = f"{self.folds}-fold cross-validation and validation" if self.folds else "validation"
        of = f"the best of {len(self.fitted)} models" if len(self.fitted) > 1 else "the only model"
        best = f"{simple.name}, {of} on frozen features by {how}: {shown(simple.score)}"
        others = ", ".join(f"{one.name} {shown(one.score)}" for one in self.fitted if one is not simple)
        if reading is not None and self.best is reading:
            versus = f"{shown(reading.val_score)} on validation, {simple.name} {shown(simple.val_score)}"
            lines = [f"step 0: {reading.name}, {versus}", "; ".join(filter(None, (f"on pooled features: {best}", others)))]
        else:
            lines = [f"step 0: {best}", *([f"others: {others}"] if others else [])]
        if any(one.score > simple.score for one in self.fitted):
            lines.append("among scores within a standard error of the best, the lowest loss decides")
        if reading is not None and self.best is not reading:
            versus = f"{shown(reading.val_score)} on validation, step 0 {shown(simple.val_score)}"
            lines.append(f"not better by more than noise: {reading.name} ({versus})")
        if self.trained_from is not self.best:
            lines.append(f"training starts from {self.trained_from.name}, which has the lowest loss")
        return "\n  ".join(lines)

    def facts(self) -> dict[str, Any]:
        """Plain values, as in ``start.json``."""
        table = [{"name": one.name, "score": one.score, "loss": one.loss} for one in self.fitted]
        chosen = {"best": self.best.name, "trained_from": self.trained_from.name}
        facts = {**chosen, "samples": self.samples, "folds": self.folds, "baselines": table}
        if self.reading is None:
            return facts
        reading, simple = self.reading, self.best_simple
        compared = {"score": reading.val_score, "best_other": simple.val_score, "samples": len(reading.val_S)}
        errors = difference_in_errors(reading.val_S, simple.val_S)
        return {**facts, "cross_attention": {"name": reading.name, **compared, "standard_errors": errors}}


def fit_baselines(
    train: Fold,
    val: Fold,
    how: FitSettings,
    network: NetworkSettings | None,
    advance: Advance,
    *,
    seed: int,
    reading: ReadingSettings | None = None,
) -> Baselines:
    """Fit and compare the baselines on features of all sides.

    Args:
        network: settings of the MLP; None for no MLP.
        seed: of the folds.
        reading: settings of the cross-attention, which also needs the tokens of both splits; None for none.
    """
    comparison = _Comparison(train, val, how, seed)
    sides = comparison.sides
    single = [comparison.regression([side], advance) for side in sides]
    fitted = [one for one, _ in single]
    if len(sides) > 1:
        fitted += [comparison.average(single), comparison.regression(sides, advance)[0]]
    if network is not None:
        fitted.append(comparison.network(network, advance))
    folds = len(comparison.pairs) - 1
    has_tokens = train.tokens is not None and val.tokens is not None
    read = comparison.reading(reading, advance) if reading is not None and has_tokens else None
    samples, metric = len(comparison.actual), how.task.metric
    return Baselines(fitted, standard_state(comparison.known), samples, folds, metric, read)
