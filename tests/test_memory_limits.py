"""Sizes that exceed any machine's memory are refused, and running out of memory is an error with its own code, not a bug."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, plain_config
from pydantic import BaseModel

from mopefuse.config.schema import RunConfig
from mopefuse.config.section import is_section
from mopefuse.config.setting_paths import nest
from mopefuse.core import device as devices
from mopefuse.core.dependencies import convert_error
from mopefuse.errors import ConfigError, ResourceError
from mopefuse.fusion import build

TINY = {"main": "tiny:vision", "comp": "tiny:text"}


def integers(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Paths of all settings that may be an integer."""
    found = []
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            found += integers(field.annotation, f"{prefix}{name}.")
        elif field.annotation in (int, int | None):
            found.append(f"{prefix}{name}")
    return found


@pytest.mark.parametrize("path", [path for path in integers() if not path.endswith("seed")])
def test_every_integer_setting_has_an_upper_bound(path: str) -> None:
    with pytest.raises(ConfigError, match=path.rpartition(".")[2]):
        plain_config({**TINY, **nest(path, 10**12)})


def test_layer_indices_that_no_encoder_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers"):
        plain_config({**TINY, "prompts": {"layers": "last:1000000000000"}})


@pytest.mark.parametrize("flags", [("--top", 10**23), ("--batch", 10**23)])
def test_integers_on_the_command_line_are_bounded(trained: Path, pairs: Path, flags: tuple[object, ...]) -> None:
    assert call("predict", trained, pairs / "test.jsonl", *flags).returncode == 2


def test_experts_that_do_not_fit_into_memory_are_refused_before_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda device: 10**9)
    config = plain_config({**TINY, "prompts": {"experts": 4096, "dynamic": 4096}})
    with pytest.raises(ResourceError) as caught:
        build.build_model(config, 3)
    assert caught.value.where == "prompts.experts=4096, prompts.dynamic=4096"
    assert "needed" in caught.value.what


def test_a_model_that_cannot_be_allocated_is_an_error_with_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("mopefuse.fusion.conditional.PromptStack", refuse)
    with pytest.raises(ResourceError, match="no memory for the model") as caught:
        build.build_model(plain_config({**TINY, "prompts": {"static": 4000}}), 3)
    assert caught.value.where == "prompts.static=4000"


def torch_refuses() -> None:
    torch.empty(2**60)


def unmapped() -> None:
    raise ImportError("libthing.so.1: failed to map segment from shared object")


def unmapped_within() -> None:
    try:
        unmapped()
    except ImportError as error:
        raise RuntimeError("Failed to import transformers.models.bert") from error


def no_thread() -> None:
    raise RuntimeError("can't start new thread")


def no_pages() -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.parametrize("action", [torch_refuses, unmapped, unmapped_within, no_thread, no_pages, lambda: bytearray(2**62)])
def test_running_out_of_memory_gives_exit_code_7(action: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one is up to the library)
        action()
    known = convert_error(caught.value)
    assert known is not None and known.exit_code == 7 and "memory" in f"{known}".lower()
    assert convert_error(RuntimeError("shapes do not fit")) is None
    assert convert_error(ImportError("no module named x")) is None


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v limits address space on Linux")
@pytest.mark.parametrize("megabytes", [150, 600, 1500, 3000])
@pytest.mark.parametrize("command", ["train", "predict", "--help"])
def test_a_process_with_little_address_space_ends_with_one_line(
    megabytes: int, command: str, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    arguments = {
        "train": f"train --main tiny:vision --comp tiny:text --device cpu --steps 1 --data {pairs} --out {tmp_path / 'run'}",
        "predict": f"predict {trained} {pairs / 'test.jsonl'} -o {tmp_path / 'predictions.jsonl'} --device cpu",
        "--help": "--help",
    }[command]
    shell = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -m mopefuse {arguments}"
    done = subprocess.run(
        ["sh", "-c", shell], capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert "internal error" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.returncode in ((0,) if command == "--help" else (0, 7)), done.stderr
    if done.returncode == 7:
        assert done.stderr.splitlines()[-1].startswith("error[MF-RES-")
        assert "memory" in done.stderr or "address-space limit" in done.stderr
        assert not (tmp_path / "predictions.jsonl").exists()
