"""Several machines, played by several torchruns on this one: caches of their own, restarts after any process has died."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import call, make_pairs, ranks
from test_sharding import assert_equal_runs

from mopefuse.core.folder_lock import FolderLock
from mopefuse.errors import ConfigError

PLAIN = "prompts.dropout=0 prompts.token_dropout=0 router.noise=false head_dropout=0 train.log_every=1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data", counts={"train": 20, "val": 7, "test": 5})


def command(data: Path, out: Path, *more: str) -> list[str]:
    """Train with cached features and prefixes, without dropout, which depends on the number of processes."""
    plain = [part for one in PLAIN for part in ("--set", one)]
    fixed = ["train", "--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu", "--batch", "9", "--experts", "4"]
    return [*fixed, "--head-features", "all", "--data", str(data), "--out", str(out), *plain, *more]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Nodes:
    """Torchruns that belong to one job, each with its own cache folder.

    Args:
        nodes: as ``--nnodes``. per_node: processes of each. folder: for caches and what is printed.
    """

    def __init__(self, folder: Path, arguments: list[str], *, nodes: str = "2", per_node: int = 2) -> None:
        self._folder, self._arguments, self._elastic, self._port = folder, arguments, ":" in nodes, free_port()
        self._options = ["--nnodes", nodes, "--nproc-per-node", str(per_node), "--max-restarts", "9", "--rdzv-backend", "c10d"]
        self._options += ["--rdzv-endpoint", f"localhost:{self._port}", "--rdzv-id", "job", "--local-addr", "127.0.0.1"]
        self._options += ["--rdzv-conf", "last_call_timeout=1,join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=5"]
        self._options += ["--monitor-interval", "0.05"]
        self.agents: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", *self._options, "-m", "mopefuse", *self._arguments]
        environment = {"OMP_NUM_THREADS": "1", "MOPEFUSE_CACHE": str(self._folder / f"cache-{node}")}
        if self._elastic:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as docs/how-to/distributed.md says
        with (self._folder / f"node-{node}.txt").open("ab") as printed:
            self.agents[node] = subprocess.Popen(launcher, env=os.environ | environment, stdout=printed, stderr=printed)
        while node == 0 and self.agents[0].poll() is None:  # the first node is that of --rdzv-endpoint
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
                return
            time.sleep(0.05)

    def workers(self, node: int) -> list[int]:
        """Process ids of the workers of a node."""
        pid = self.agents[node].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"mopefuse" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait for all nodes; returns their exit codes."""
        ends = time.monotonic() + timeout
        return [agent.wait(ends - time.monotonic()) for agent in self.agents.values()]

    def printed(self) -> str:
        return "".join(file.read_text(errors="replace")[-3000:] for file in sorted(self._folder.glob("node-*.txt")))

    def close(self) -> None:
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.kill()  # its workers end, too
                agent.wait()


@pytest.fixture
def start_nodes(tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    started: list[Nodes] = []

    def start(*arguments: str, **options: object) -> Nodes:
        started.append(Nodes(tmp_path, list(arguments), **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for nodes in started:
        nodes.close()


@pytest.mark.process
def test_two_nodes_with_caches_of_their_own_equal_one_process(
    data: Path, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    """Each process computes a quarter of the features; each node computes all outputs of early layers, for itself."""
    more = ["--epochs", "2", "--warm-start", "linear", "--head-hidden", "0", "--set", "data.prefix_precision=float32"]
    nodes = start_nodes(*command(data, tmp_path / "run", *more))
    for node in (0, 1):
        nodes.start(node)
    assert nodes.wait() == [0, 0], nodes.printed()
    alone = ranks(1, *command(data, tmp_path / "one", *more), MOPEFUSE_CACHE=str(tmp_path / "cache-one"))
    assert alone.returncode == 0, alone.stderr
    assert_equal_runs(tmp_path / "one", tmp_path / "run", exact=False)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["processes"] == 4

    def rows(node: int | str, kind: str) -> list[int]:
        """Rows of each shard of the texts' features, or of the images' early layers."""
        found = (json.loads(file.read_text()) for file in (tmp_path / f"cache-{node}").glob(f"{kind}/*/*/manifest.json"))
        name = "text" if kind == "features" else "vision"
        return sorted(facts["rows"] for facts in found if name in facts["encoder"])

    # the 3 texts of train are divided among 4 processes; those of val are the same
    assert sorted(rows(0, "features") + rows(1, "features")) == [1, 1, 1]
    assert rows(0, "prefixes") == rows(1, "prefixes") == [3, 4, 10, 10]  # 20 images of train, 7 of val, by two processes each
    assert sum(rows("one", "prefixes")) == 27


def logged_step(run: Path) -> int:
    """The last step in the log of a run; -1 if there is none."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return -1


def wait_until(condition: Callable[[], bool], nodes: Nodes, timeout: float = 90) -> None:
    ends = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < ends, nodes.printed()
        time.sleep(0.005)


STEPS = 90


@pytest.fixture(scope="module")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps per epoch."""
    return make_pairs(tmp_path_factory.mktemp("pairs") / "more", counts={"train": 90, "val": 7, "test": 5})


@pytest.mark.soak
def test_a_run_whose_processes_are_killed_equals_an_undisturbed_one(
    more_data: Path, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    """First, torchrun restarts four processes, of which one is killed: bit for bit the same with as many processes.

    Then a node disappears and the other goes on with two processes, until it disappears, too, and the same command is started
    with three.
    """
    dice, run = random.Random(0), tmp_path / "run"
    more = ["--set", "train.checkpoint_every=7", "--resume", "--warm-start", "none", "--epochs", "1000"]
    more += ["--set", "train.schedule=constant", "--set", "train.warmup=0"]  # or more steps would change the first ones

    def step() -> int:
        return logged_step(run)

    def start(steps: int, count: str) -> Nodes:
        nodes = start_nodes(*command(more_data, run, *more, "--steps", str(steps)), nodes=count)
        for node in (0, 1):
            nodes.start(node)
        return nodes

    nodes = start(STEPS, "2")
    for number in range(3):
        wait_until(lambda: step() >= 20 * number + dice.randrange(10, 25), nodes)  # noqa: B023
        os.kill(dice.choice(nodes.workers(dice.randrange(2))), signal.SIGKILL)
        assert step() < STEPS - 10, "every process was killed in training"
        wait_until(lambda: len(nodes.workers(0)) + len(nodes.workers(1)) < 4, nodes)
        wait_until(lambda: len(nodes.workers(0)) + len(nodes.workers(1)) == 4, nodes)
    assert nodes.wait() == [0, 0], nodes.printed()
    undisturbed = ranks(4, *command(more_data, tmp_path / "four", *more, "--steps", str(STEPS)))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_equal_runs(tmp_path / "four", run, exact=True)

    nodes = start(2 * STEPS, "1:2")
    wait_until(lambda: step() > STEPS + 10, nodes)
    before = nodes.workers(0)
    nodes.agents.pop(1).kill()  # all four stop after their step, with a checkpoint
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before), nodes)
    at = step()
    assert at < 2 * STEPS - 20, "the node was killed in training"
    wait_until(lambda: step() > at + 5, nodes)
    workers = nodes.workers(0)
    assert len(workers) == 2
    nodes.agents.pop(0).kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), nodes)
    assert step() < 2 * STEPS, "both nodes were killed in training"
    again = ranks(3, *command(more_data, run, *more, "--steps", str(2 * STEPS)))
    assert again.returncode == 0, again.stderr
    undisturbed = call(*command(more_data, tmp_path / "one", *more, "--steps", str(2 * STEPS)))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_equal_runs(tmp_path / "one", run, exact=False)


def test_the_same_command_starts_continues_and_repeats_a_run(data: Path, tmp_path: Path) -> None:
    repeated = [*command(data, tmp_path / "run", "--warm-start", "none", "--steps", "2"), "--resume"]
    done = [call(*repeated) for _ in range(2)]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "already finished at step 2" in done[1].stderr
    assert "already finished" not in done[0].stderr


def test_a_job_takes_over_its_own_lock_from_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    lost = FolderLock(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "lost")
    lost.take()
    monkeypatch.setattr(socket, "gethostname", lambda: "other")
    for job in ("another job", "none", ""):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        with pytest.raises(ConfigError, match="is already writing to this run"):
            FolderLock(tmp_path).take()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert "took over the lock" in FolderLock(tmp_path).take()
    assert not lost.is_ours(), "a process that was cut off and goes on does not write any more"
