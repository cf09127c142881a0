"""Selection of device and precision, as far as it can be tested on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mopefuse.cli.app import main
from mopefuse.core import device as devices
from mopefuse.errors import ConfigError

PRODUCT = """
import os, sys, torch
from mopefuse.core import device
device.resolve("cpu")
tiny = torch.tensor([1e-20])
print(float(tiny * tiny) > 0)
"""


@pytest.mark.process
@pytest.mark.parametrize(("variables", "kept"), [({}, "True"), ({devices.FLUSH: "0"}, "True"), ({devices.FLUSH: "1"}, "False")])
def test_denormal_numbers_are_flushed_on_request(variables: dict[str, str], kept: str) -> None:
    """Weights of masked attention, e^-100, otherwise make products a hundred times as slow."""
    if not can_flush():
        pytest.skip("this processor cannot flush denormals")
    environment = {name: value for name, value in os.environ.items() if name != devices.FLUSH} | variables
    done = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == kept


def test_the_command_line_flushes_denormal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.FLUSH, raising=False)
    monkeypatch.setattr(sys, "argv", ["mopefuse", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ[devices.FLUSH] == "1"
    monkeypatch.delenv(devices.FLUSH)


def can_flush() -> bool:
    try:
        return torch.set_flush_denormal(True)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:", "cpu:0"])
def test_an_unavailable_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown device|device not found"):
        devices.resolve(name)


def test_precision_is_as_requested_and_auto_is_float32_without_a_gpu() -> None:
    cpu = torch.device("cpu")
    assert [devices.precision(name, cpu) for name in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with devices.autocast("auto", cpu):
        assert not torch.is_autocast_enabled("cpu")
    with devices.autocast("bf16", cpu):
        assert torch.is_autocast_enabled("cpu")


def test_moving_a_model_to_a_cpu_keeps_its_memory_format() -> None:
    convolution = torch.nn.Conv2d(4, 4, 3).requires_grad_(False)
    devices.move_to_device(convolution, torch.device("cpu"))
    assert convolution.weight.is_contiguous()
