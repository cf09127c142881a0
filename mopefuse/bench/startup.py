"""How long the command line takes to answer without work: what people wait for at every typo."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping

from mopefuse.bench.timing import Advance, Times

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
    """Seconds of each command in a process of its own, in turns; one round ahead warms the file cache."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            advance(name, number, rounds + 1)
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: Times.of(each) for name, each in seconds.items()}
