"""Limited-memory BFGS with a diagonal preconditioner, for many smooth convex problems at once.

Nocedal and Wright, Numerical Optimization, 2nd ed. 2006: algorithm 7.4, with backtracking (algorithm 3.1). Every problem
has its own step lengths and history, and is dropped from the computation once it has converged.

Shapes: G problems, A active ones (not converged), P parameters of each, M stored steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SUFFICIENT = 1e-4  # least decrease, as a fraction of the decrease that the slope predicts
_BACKTRACKS = 12


class Evaluation(NamedTuple):
    """Values (A,), gradients (A, P) and positive estimates of the Hessians' diagonals (A, P) of an objective, in float64."""

    value_A: Tensor
    gradient_AP: Tensor
    curvature_AP: Tensor

    def take(self, rows: Tensor) -> Evaluation:
        """Select some of the problems."""
        return Evaluation(*(tensor[rows] for tensor in self))


Objective = Callable[[Tensor, Tensor], Evaluation]
"""Maps parameters (A, P) and the indices (A,) of their problems to an evaluation."""


def minimise(
    objective: Objective,
    start_GP: Tensor,
    *,
    tolerance: float,
    noise: float,
    max_iter: int,
    memory: int = 10,
    advance: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Minimise all problems from `start_GP` and return their minima (G, P).

    A problem has converged when neither the decrease of the last step nor the predicted decrease of the next one exceeds
    `tolerance` times its value. A problem that cannot be improved at the precision of its values, or within `max_iter`
    steps, keeps its last parameters.

    Args:
        start_GP: initial parameters, in float64.
        noise: relative rounding error of a value; values that differ by less are compared by their slopes.
        memory: M, the number of stored steps.
        advance: called before each step with the estimated fraction of the work that is done.
    """
    x_GP = start_GP.clone()
    history = _History(memory)
    progress_G = _Progress(len(x_GP))
    index_A = torch.arange(len(x_GP))
    now = objective(x_GP, index_A)
    decrease_A = torch.zeros_like(now.value_A)
    for _ in range(max_iter):
        direction_AP = history.direction(now)
        slope_A = _dot(direction_AP, now.gradient_AP)
        goal_A = tolerance * now.value_A.abs()
        advance(progress_G.update(index_A, -slope_A / 2 / goal_A))
        active_A = (-slope_A / 2 > goal_A) | (decrease_A > goal_A)
        if not active_A.any():
            break
        history.keep(active_A)
        index_A, now, slope_A, direction_AP = index_A[active_A], now.take(active_A), slope_A[active_A], direction_AP[active_A]
        x_AP = x_GP[index_A]
        new_AP, new, moved_A = _search(objective, index_A, x_AP, direction_AP, slope_A, now, noise)
        history.add(new_AP - x_AP, new.gradient_AP - now.gradient_AP)
        history.keep(moved_A)
        x_GP[index_A] = new_AP
        decrease_A = (now.value_A - new.value_A)[moved_A]
        index_A, now = index_A[moved_A], new.take(moved_A)
    return x_GP


def _search(
    objective: Objective,
    index_A: Tensor,
    x_AP: Tensor,
    direction_AP: Tensor,
    slope_A: Tensor,
    now: Evaluation,
    noise: float,
) -> tuple[Tensor, Evaluation, Tensor]:
    """Backtrack from the full step; return new parameters, their evaluation, and whether a better point was found (A,).

    A point is better by its value (Armijo's condition), or within the noise of values by its slope (Hager and Zhang,
    SIAM J. Optim. 16, 2005, condition 4.1).
    """
    new_AP, new = x_AP.clone(), Evaluation(*(tensor.clone() for tensor in now))
    step_A, moved_A = torch.ones_like(slope_A), torch.zeros_like(slope_A, dtype=torch.bool)
    left = torch.arange(len(index_A))
    for _ in range(_BACKTRACKS):
        step, slope, value = step_A[left], slope_A[left], now.value_A[left]
        trial_AP = x_AP[left] + step[:, None] * direction_AP[left]
        found = objective(trial_AP, index_A[left])
        new_slope = _dot(found.gradient_AP, direction_AP[left])
        better = found.value_A <= value + _SUFFICIENT * step * slope
        better |= (found.value_A <= value + noise * value.abs()) & (new_slope <= (2 * _SUFFICIENT - 1) * slope)
        done = left[better]
        new_AP[done], moved_A[done] = trial_AP[better], True
        for kept, tensor in zip(new, found, strict=True):
            kept[done] = tensor[better]
        left = left[~better]
        if not len(left):
            break
        step, slope, over = step[~better], slope[~better], (found.value_A - value)[~better]
        parabola = -slope * step**2 / (2 * (over - step * slope))  # its minimum
        step_A[left] = torch.minimum(torch.maximum(parabola.nan_to_num(0.0), 0.1 * step), 0.5 * step)
    return new_AP, new, moved_A


class _Pair(NamedTuple):
    """A step of each problem and the resulting change of its gradient."""

    step_AP: Tensor
    change_AP: Tensor
    inverse_A: Tensor  # 1 / (step . change); 0 for a pair that is not used


class _History:
    """The latest steps of the active problems, oldest first."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[_Pair] = []

    def keep(self, which_A: Tensor) -> None:
        """Keep only the problems in `which_A`."""
        if not which_A.all():
            self.pairs = [_Pair(*(tensor[which_A] for tensor in pair)) for pair in self.pairs]

    def add(self, step_AP: Tensor, change_AP: Tensor) -> None:
        """Store a step; it is ignored if the gradient did not grow along it, which only rounding errors can cause."""
        product_A = _dot(step_AP, change_AP)
        convex_A = product_A > 1e-10 * step_AP.norm(dim=-1) * change_AP.norm(dim=-1)
        self.pairs.append(_Pair(step_AP, change_AP, torch.where(convex_A, 1 / product_A, 0.0)))
        del self.pairs[: -self.memory]

    def direction(self, now: Evaluation) -> Tensor:
        """Compute the quasi-Newton direction (A, P), by the two loops of algorithm 7.4."""
        q_AP, along = -now.gradient_AP, list[Tensor]()
        for pair in reversed(self.pairs):
            along.append(pair.inverse_A * _dot(pair.step_AP, q_AP))
            q_AP.addcmul_(along[-1][:, None], pair.change_AP, value=-1)
        r_AP = q_AP / now.curvature_AP
        if self.pairs:
            r_AP *= self._scale(self.pairs[-1], now)[:, None]
        for pair in self.pairs:
            back_A = along.pop() - pair.inverse_A * _dot(pair.change_AP, r_AP)
            r_AP.addcmul_(back_A[:, None], pair.step_AP)
        return r_AP

    @staticmethod
    def _scale(pair: _Pair, now: Evaluation) -> Tensor:
        """Factor (A,) that makes the preconditioner exact along the latest step (equation 7.20)."""
        scale_A = 1 / (pair.inverse_A * _dot(pair.change_AP, pair.change_AP / now.curvature_AP))
        return torch.where(pair.inverse_A > 0, scale_A, 1.0)


def _dot(one_AP: Tensor, two_AP: Tensor) -> Tensor:
    """Dot product for each problem (A,)."""
    product_A: Tensor = torch.linalg.vecdot(one_AP, two_AP)
    return product_A


class _Progress:
    """Progress of each problem's predicted gain from its first value to its goal, on a logarithmic scale."""

    def __init__(self, problems: int) -> None:
        self.first_G = torch.zeros(problems, dtype=torch.double)
        self.share_G = torch.zeros(problems, dtype=torch.double)

    def update(self, index_A: Tensor, ratio_A: Tensor) -> float:
        """Return the mean progress, given the ratio of gain to goal of the active problems."""
        distance_A = ratio_A.log().clamp(min=0).nan_to_num(0.0)
        self.first_G[index_A] = torch.maximum(self.first_G[index_A], distance_A)
        whole_A = self.first_G[index_A]
        now_A = torch.where(whole_A > 0, 1 - distance_A / whole_A.clamp(min=1e-12), 1.0)
        others = torch.ones_like(self.share_G)
        others[index_A] = torch.maximum(self.share_G[index_A], now_A)
        self.share_G = others
        return float(others.mean())
