"""Benchmark of the start-up time of the command line, which a user waits for even after a typo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import partial

import torch

from mopefuse.bench.timing import Advance, Times, Turns

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "python itself": ("-c", "pass"),
    "mopefuse --help": ("-m", "mopefuse", "--help"),
    "mopefuse --version": ("-m", "mopefuse", "--version"),
    "a usage error": ("-m", "mopefuse", "train", "--no-such-option"),
    "a configuration error": ("-m", "mopefuse", "train", "--main", "tiny:vision", "--comp", "tiny:text", "--set", "seed=no"),
    "import mopefuse": ("-c", "import mopefuse"),
    "import torch": ("-c", "import torch"),
}


def bench_startup(*, rounds: int = 5, advance: Advance = lambda what, done, total: None) -> dict[str, Times]:
    """Time each command in a separate process, alternating; a first round warms the file cache and is not counted."""
    calls = {name: partial(_run, arguments) for name, arguments in COMMANDS.items()}
    return Turns(torch.device("cpu"), rounds, warm_up=1).time(calls, advance)


def _run(arguments: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
