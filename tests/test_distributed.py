"""Several processes: the same batches, the same gradients, and every sample counted once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from conftest import call, matrix, ranks, torchrun
from test_train import command, data, log, weights

from mopefuse.data.collate import epoch_batches, process_share

__all__ = ["data"]  # the fixture


def test_two_processes_equal_one(data: Path, tmp_path: Path) -> None:
    """20 samples in batches of 9 (the last has 2) and validation on 7 samples: nothing divides evenly."""
    plain = ["--set", "prompts.dropout=0", "--set", "router.noise=false"]
    for name, processes in (("one", 1), ("two", 2)):
        done = ranks(processes, *command(data, tmp_path / name, *plain))
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        # Compared by norm, since AdamW turns the rounding of a gradient close to 0 into a full step.
        difference = (one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-12)
        assert difference < 1e-3, f"{name}: {difference:.1e}"
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    ids = [json.loads(line)["id"] for line in (tmp_path / "two" / "predictions.jsonl").read_text().splitlines()]
    assert ids == [f"test-{i}" for i in range(5)]
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["processes"] == 2


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_sample_belongs_to_exactly_one_process(world: int) -> None:
    for batch in epoch_batches(seed=1, epoch=4, count=23, batch_size=8):
        shares = [process_share(batch, rank, world) for rank in range(world)]
        assert sorted(chain.from_iterable(shares)) == sorted(batch)
    everything, next_epoch, next_seed = (
        list(chain.from_iterable(epoch_batches(seed, epoch, 23, 8))) for seed, epoch in ((1, 4), (1, 5), (2, 5))
    )
    assert sorted(everything) == list(range(23))
    assert everything != next_epoch != next_seed


@pytest.mark.process
def test_only_the_main_process_prints(data: Path, tmp_path: Path) -> None:
    done = torchrun(2, *command(data, tmp_path / "run", "--json", "--steps", "2"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True, "one JSON object and nothing else"


SLOW_MAIN = """
import os, time
from mopefuse.runs.folder import RunFolder
if os.environ["RANK"] == "0":
    set_best = RunFolder.set_best
    def slowly(self, step):
        time.sleep(1)
        set_best(self, step)
    RunFolder.set_best = slowly
from mopefuse.cli.app import main
main()
"""


@pytest.mark.parametrize(
    "more", matrix([("--method", "linear"), ("--epochs", "0"), ("--steps", "2")], [("--steps", "2")]), ids=" ".join
)
def test_no_process_reads_the_best_checkpoint_before_it_is_written(
    data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_MAIN)
    plain = ["--set", "prompts.dropout=0", "--set", "router.noise=false", *more]
    done = ranks(2, *command(data, tmp_path / "run", *plain), program=(str(tmp_path / "slow.py"),))
    assert done.returncode == 0, done.stderr
    alone = call(*command(data, tmp_path / "alone", *plain))
    assert alone.returncode == 0, alone.stderr
    two, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "alone"))
    assert two["selected_step"] == one["selected_step"]
    assert two["metrics"]["test"] == pytest.approx(one["metrics"]["test"], abs=1e-4)


PATIENT = """
import os, signal, sys, time
from datetime import timedelta
from mopefuse.core import distributed
from mopefuse.errors import DataError

distributed._TIMEOUT = timedelta(seconds=2)
end = sys.argv[1]

def work():
    time.sleep(6)
    if end == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "raises":
        raise DataError(1, "the error of the main process")
    return "what it found"

began = time.monotonic()
result = None
try:
    with distributed.process_group():
        result = distributed.run_on_main(work)
        distributed.barrier()
except Exception as error:
    from mopefuse.core.dependencies import convert_error
    result = str(convert_error(error) or error)
print(f"{os.environ['RANK']}: {result}; after {time.monotonic() - began:.1f} s", flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("returns", ["what it found", "what it found"]),
        ("raises", ["the error of the main process", "the error of the main process"]),
        ("dies", [None, "another process failed"]),
    ],
)
def test_other_processes_wait_as_long_as_the_main_process_lives(tmp_path: Path, end: str, expected: list[str | None]) -> None:
    """Its work takes three times the timeout between processes. There is no launcher to end them."""
    (tmp_path / "patient.py").write_text(PATIENT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "patient.py"), end],
            env=os.environ | together | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank, process in enumerate(processes):
        printed, _ = process.communicate(timeout=120)
        assert printed.startswith(f"{rank}: {expected[rank]}" if expected[rank] else ""), printed
        assert bool(printed) == bool(expected[rank])
    assert (processes[0].returncode == -signal.SIGKILL) == (end == "dies")


UNEVEN = """
import os, time
from datetime import timedelta
from mopefuse.core import distributed

distributed._TIMEOUT = timedelta(seconds=2)
with distributed.process_group():
    if os.environ["RANK"] == "1":
        time.sleep(5)
    distributed.barrier()
    assert distributed.gather(os.environ["RANK"]) == ["0", "1"]
"""


@pytest.mark.process
def test_a_slower_process_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "uneven.py").write_text(UNEVEN)
    done = ranks(2, program=(str(tmp_path / "uneven.py"),))
    assert done.returncode == 0, done.stderr


_EXCHANGE = """
import torch
from mopefuse.core import distributed

with distributed.process_group():
    rank, world = distributed.rank(), distributed.world_size()
    distributed._PART = 32  # bytes, so that rows travel in several parts
    for count in (1, 2, 7, 8):
        rows_SW = torch.arange(3.0 * count).reshape(count, 3)
        assert distributed.gather_rows(rows_SW[rank::world], count).equal(rows_SW), (rank, count)
    own = (torch.full((rank,), rank), torch.arange(3 - rank, dtype=torch.float16), torch.tensor([rank == 1]))
    found = distributed.send_to_main(own)
    assert len(found) == (world if rank == 0 else 0)
    for source, theirs in enumerate(found):
        assert [tensor.tolist() for tensor in theirs] == [[source] * source, list(range(3 - source)), [source == 1]]
        assert [tensor.dtype for tensor in theirs] == [torch.int64, torch.float16, torch.bool]
"""


def test_tensors_of_different_lengths_arrive_in_order(tmp_path: Path) -> None:
    (tmp_path / "exchange.py").write_text(_EXCHANGE)
    done = ranks(3, program=(str(tmp_path / "exchange.py"),))
    assert done.returncode == 0, done.stderr
