"""The optimizer's schedule, and the device of its state."""

from __future__ import annotations

import pytest
import torch
from conftest import plain_config

from mopefuse.training.optimizer import compute_lr_factor, load_optimizer_state


def test_the_optimiser_state_is_moved_to_the_device_of_its_parameters() -> None:
    """All of it: the fused optimizer on a GPU rejects a step that is on the CPU."""
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    state = {"a/step": torch.tensor(3.0), "a/exp_avg": torch.zeros(2), "a/exp_avg_sq": torch.zeros(2)}
    load_optimizer_state(optimizer, {id(parameter): "a"}, state, where="memory")
    assert {key: value.device.type for key, value in optimizer.state[parameter].items()} == {
        "step": "meta", "exp_avg": "meta", "exp_avg_sq": "meta"
    }  # fmt: skip


def test_learning_rate_schedules_match_their_definitions() -> None:
    def at(schedule: str, step: int, **more: float) -> float:
        values = {"main": "x:y", "comp": "x:y", "train": {"schedule": schedule, **more}}
        return compute_lr_factor(plain_config(values).train, step, 100)

    assert [at("paper", step) for step in (0, 29, 30, 59, 60, 99)] == pytest.approx([1, 1, 0.4, 0.4, 0.16, 0.16])
    assert [at("constant", step) for step in (0, 99)] == [1, 1]
    assert [at("cosine", step) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert [at("one-cycle", step) for step in (0, 30, 100)] == pytest.approx([0.04, 1, 0])
    assert at("cosine", 4, warmup=0.1) == pytest.approx(5 / 11)
