"""Many smooth convex problems minimised side by side: limited-memory BFGS with a diagonal preconditioner.

Nocedal and Wright, Numerical Optimization, 2nd ed. 2006: algorithm 7.4, with backtracking (algorithm 3.1). Every problem
has its own step lengths and history, and leaves the computation as soon as it is solved.

Shapes: G problems, A of them not yet solved, P parameters of each, M remembered steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SUFFICIENT = 1e-4  # least decrease, as a share of what the slope predicts
_BACKTRACKS = 12


class Evaluation(NamedTuple):
    """Values (A,), gradients (A, P), and positive estimates of the Hessians' diagonals (A, P), all in float64."""

    value_A: Tensor
    gradient_AP: Tensor
    curvature_AP: Tensor

    def take(self, rows: Tensor) -> Evaluation:
        """Some of the problems."""
        return Evaluation(*(tensor[rows] for tensor in self))


Objective = Callable[[Tensor, Tensor], Evaluation]
"""From parameters (A, P) of the problems with the numbers (A,) to their evaluation."""


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
    """The minima (G, P) of all problems.

    A problem is solved when neither the last step nor the predicted gain of the next one exceeds `tolerance`, relative to
    its value. One that cannot be improved at the precision of its values, or not within `max_iter` steps, stays where it is.

    Args:
        start_GP: in float64.
        noise: relative rounding error of a value; where values differ by less, slopes tell which is smaller.
        memory: M, steps that are remembered.
        advance: called before each step with the estimated share of the work that is done.
    """
    x_GP = start_GP.clone()
    history = _History(x_GP, memory)
    progress_G = _Progress(len(x_GP))
    index_A = torch.arange(len(x_GP))
    now = objective(x_GP, index_A)
    fell_A = torch.zeros_like(now.value_A)
    for _ in range(max_iter):
        direction_AP = history.direction(index_A, now)
        slope_A = (direction_AP * now.gradient_AP).sum(dim=-1)
        goal_A = tolerance * now.value_A.abs()
        advance(progress_G.update(index_A, -slope_A / 2 / goal_A))
        going_A = (-slope_A / 2 > goal_A) | (fell_A > goal_A)
        if not going_A.any():
            break
        index_A, now, slope_A, direction_AP = index_A[going_A], now.take(going_A), slope_A[going_A], direction_AP[going_A]
        x_AP = x_GP[index_A]
        new_AP, new, moved_A = _search(objective, index_A, x_AP, direction_AP, slope_A, now, noise)
        history.add(index_A, new_AP - x_AP, new.gradient_AP - now.gradient_AP)
        x_GP[index_A] = new_AP
        fell_A = (now.value_A - new.value_A)[moved_A]
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
    """Backtracking from the full step: new parameters, their evaluation, and whether a better point was found (A,).

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
        new_slope = (found.gradient_AP * direction_AP[left]).sum(dim=-1)
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


class _History:
    """The latest steps of every problem, and how its gradient changed with each."""

    def __init__(self, x_GP: Tensor, memory: int) -> None:
        self.step_MGP = x_GP.new_zeros(memory, *x_GP.shape)
        self.change_MGP = torch.zeros_like(self.step_MGP)
        self.inverse_MG = x_GP.new_zeros(memory, len(x_GP))  # of step times change; 0 where there is none
        self.slots: list[int] = []  # the oldest first

    def add(self, index_A: Tensor, step_AP: Tensor, change_AP: Tensor) -> None:
        """Remember a step, unless the gradient did not grow along it, which rounding alone can cause."""
        slot = len(self.slots) if len(self.slots) < len(self.inverse_MG) else self.slots.pop(0)
        self.slots.append(slot)
        product_A = (step_AP * change_AP).sum(dim=-1)
        convex_A = product_A > 1e-10 * step_AP.norm(dim=-1) * change_AP.norm(dim=-1)
        self.inverse_MG[slot] = 0.0
        self.inverse_MG[slot, index_A] = torch.where(convex_A, 1 / product_A, 0.0)
        self.step_MGP[slot, index_A], self.change_MGP[slot, index_A] = step_AP, change_AP

    def direction(self, index_A: Tensor, now: Evaluation) -> Tensor:
        """The quasi-Newton direction (A, P), by the two loops of algorithm 7.4."""
        q_AP, along = -now.gradient_AP, {}
        for slot in reversed(self.slots):
            along[slot] = self.inverse_MG[slot, index_A] * (self.step_MGP[slot, index_A] * q_AP).sum(dim=-1)
            q_AP -= along[slot][:, None] * self.change_MGP[slot, index_A]
        r_AP = q_AP / now.curvature_AP
        if self.slots:
            r_AP *= self._scale(self.slots[-1], index_A, now)[:, None]
        for slot in self.slots:
            back_A = self.inverse_MG[slot, index_A] * (self.change_MGP[slot, index_A] * r_AP).sum(dim=-1)
            r_AP += (along[slot] - back_A)[:, None] * self.step_MGP[slot, index_A]
        return r_AP

    def _scale(self, slot: int, index_A: Tensor, now: Evaluation) -> Tensor:
        """What the preconditioner is multiplied with (A,), so that it is right along the latest step (equation 7.20)."""
        inverse_A = self.inverse_MG[slot, index_A]
        scale_A = 1 / (inverse_A * (self.change_MGP[slot, index_A] ** 2 / now.curvature_AP).sum(dim=-1))
        return torch.where(inverse_A > 0, scale_A, 1.0)


class _Progress:
    """How far the predicted gain of each problem has come from its first value to its goal, on a logarithmic scale."""

    def __init__(self, problems: int) -> None:
        self.first_G = torch.zeros(problems, dtype=torch.double)
        self.share_G = torch.zeros(problems, dtype=torch.double)

    def update(self, index_A: Tensor, ratio_A: Tensor) -> float:
        """The mean share, given the ratio of gain to goal of the problems that are not solved."""
        distance_A = ratio_A.log().clamp(min=0).nan_to_num(0.0)
        self.first_G[index_A] = torch.maximum(self.first_G[index_A], distance_A)
        whole_A = self.first_G[index_A]
        now_A = torch.where(whole_A > 0, 1 - distance_A / whole_A.clamp(min=1e-12), 1.0)
        others = torch.ones_like(self.share_G)
        others[index_A] = torch.maximum(self.share_G[index_A], now_A)
        self.share_G = others
        return float(others.mean())
