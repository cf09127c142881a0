"""Predict a table in partitions while a process with the model is killed, and compare with ``mopefuse predict``.

    python scripts/batch_predict_kill.py [--rows 20000] [--engines local ray] [--kills 1] [--partition-rows 1024]

Makes digit questions with tiny encoders and a table that repeats their rows under new ids, in several files. For each engine,
once a third of the partitions is complete, a process that holds the model gets SIGKILL. The script fails unless every row is
in the output exactly once, equal to what ``mopefuse predict`` writes for each file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

FILES = 4
TITLES = {"local": b"multiprocessing.spawn", "ray": b"ray::MapWorker(MapBatches(_Predict))"}


def main() -> int:
    """Run all engines; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--engines", nargs="+", default=["local", "ray"], choices=["local", "ray"])
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--partition-rows", type=int, default=1024)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="mopefuse-batch-") as name:
        folder = Path(name)
        tables = make_tables(folder, arguments.rows)
        expected, began = [], time.monotonic()
        for number, table in enumerate(tables):
            cli("predict", folder / "run", table, "-o", folder / f"one-{number}.jsonl")
            expected += (folder / f"one-{number}.jsonl").read_text().splitlines()
        rate = len(expected) / (time.monotonic() - began)
        print(f"mopefuse predict: {len(expected):,} rows, {rate:.1f} per second, including {FILES} starts", flush=True)
        good = [check(folder, tables, engine, expected, arguments) for engine in arguments.engines]
    return 0 if all(good) else 1


def cli(*words: object) -> str:
    """Run the command line, and return what it prints."""
    command = [sys.executable, "-m", "mopefuse", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_tables(folder: Path, count: int) -> list[Path]:
    """Train a tiny model, and write `FILES` tables that have `count` rows together."""
    cli("data", "make", "digit-questions", folder / "digits", "--train", 400, "--val", 100, "--test", 1000)
    tiny = ("--main", "tiny:vision", "--comp", "tiny:text", "--experts", 2, "--device", "cpu")
    cli("train", *tiny, "--data", folder / "digits", "--steps", 10, "--out", folder / "run")
    rows = [json.loads(line) for line in (folder / "digits" / "test.jsonl").read_text().splitlines()]
    tables = []
    for number in range(FILES):
        table = folder / "digits" / f"table-{number}.jsonl"
        mine = range(number * count // FILES, (number + 1) * count // FILES)
        lines = [json.dumps({**rows[at % len(rows)], "id": f"row-{at:07d}"}) + "\n" for at in mine]
        table.write_text("".join(lines))
        tables.append(table)
    return tables


def check(folder: Path, tables: list[Path], engine: str, expected: list[str], arguments: argparse.Namespace) -> bool:
    """Predict with an engine and kill its processes meanwhile; print and return whether the output is right."""
    out = folder / f"out-{engine}"
    how = ["-o", out, "--engine", engine, "--partition-rows", arguments.partition_rows, "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "mopefuse", "predict", str(folder / "run"), *map(str, [*tables, *how])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    killed: set[int] = set()
    partitions = sum(-(-len(table.read_text().splitlines()) // arguments.partition_rows) for table in tables)
    while process.poll() is None:
        time.sleep(0.2)
        complete = len(list((out / "_records").glob("*.json")))
        if len(killed) < arguments.kills and complete >= partitions * (len(killed) + 1) / (arguments.kills + 2):
            fresh = [pid for pid in processes_below(process.pid, TITLES[engine]) if pid not in killed]
            if fresh:
                os.kill(fresh[0], signal.SIGKILL)
                killed.add(fresh[0])
                print(f"{engine}: killed process {fresh[0]} after {complete} of {partitions} partitions", flush=True)
    printed = process.stdout.read() if process.stdout else ""
    summary = json.loads(printed) if process.returncode == 0 else {}
    found = [line for part in sorted(out.glob("part-*.jsonl")) for line in part.read_text().splitlines()]
    ids = [json.loads(line)["id"] for line in found]
    wanted = [json.loads(line)["id"] for line in expected]
    good = process.returncode == 0 and ids == wanted and len(killed) == arguments.kills
    equal = sum(one == other for one, other in zip(found, expected, strict=False))
    print(
        f"{engine}: exit code {process.returncode}, {len(found):,} rows, {len(set(ids)):,} ids, in the order of the input: "
        f"{ids == wanted}, equal to mopefuse predict: {equal:,}; {summary.get('rows_per_second')} rows per second",
        flush=True,
    )
    return good and equal == len(expected)


def processes_below(root: int, title: bytes) -> list[int]:
    """Processes that `root` started, directly or through others, whose command line has a title."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes()

    def is_below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return [pid for pid, command in titles.items() if title in command and pid != root and is_below(pid)]


if __name__ == "__main__":
    sys.exit(main())
