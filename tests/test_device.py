"""Where a model runs and in which precision, as far as a CPU can show it."""

from __future__ import annotations

import pytest
import torch

from mopefuse import device as devices
from mopefuse.errors import ConfigError


def test_on_a_cpu_numbers_too_small_to_matter_are_zero() -> None:
    """Weights of masked attention, e^-100, make products a hundred times as slow where they are kept."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    torch.set_flush_denormal(False)
    tiny = torch.tensor([1e-20])
    assert float(tiny * tiny) > 0
    devices.resolve("cpu")
    assert float(tiny * tiny) == 0


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:", "cpu:0"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no device"):
        devices.resolve(name)


def test_precision_is_what_is_asked_for_and_plain_where_no_gpu_is() -> None:
    cpu = torch.device("cpu")
    assert [devices.precision(name, cpu) for name in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with devices.autocast("auto", cpu):
        assert not torch.is_autocast_enabled("cpu")
    with devices.autocast("bf16", cpu):
        assert torch.is_autocast_enabled("cpu")


def test_placing_a_model_on_a_cpu_leaves_its_memory_as_it_is() -> None:
    convolution = torch.nn.Conv2d(4, 4, 3).requires_grad_(False)
    devices.place(convolution, torch.device("cpu"))
    assert convolution.weight.is_contiguous()
