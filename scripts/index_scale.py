"""Measure the index of a large table: time and memory to build it, and time to open it from the cache.

``python scripts/index_scale.py --rows 10000000`` writes a Parquet file of synthetic rows (id, text, path of an image, one of
1,000 labels) to a temporary folder and prints the figures. They do not include the images, which are decoded at a speed that
`mopefuse data check` prints.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute
from pyarrow import parquet

WORDS = ("red", "shoe", "With", "white", "laces", "size", "for", "men", "women", "trail", "running", "light", "blue", "Bag")
AT_ONCE = 1_000_000
COLUMNS = ("text", "image")


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--step", choices=("build", "open"), help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure(arguments.table, arguments.step)))
        return
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rows.parquet"
        write(table, arguments.rows)
        environment = {**os.environ, "MOPEFUSE_CACHE": f"{folder}/cache"}
        for step in ("build", "open"):
            command = [sys.executable, __file__, "--step", step, "--table", str(table)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            rate = f", {found['rows'] / found['seconds']:,.0f} rows/s" if step == "build" else ""
            memory = f"at most {found['gigabytes']:.2f} GB of memory"
            print(f"{step}: {found['rows']:,} rows in {found['seconds']:.2f} s{rate}, {memory}", flush=True)


def write(path: Path, rows: int) -> None:
    """Write synthetic rows."""
    random, words = np.random.default_rng(0), arrow.array(WORDS)
    with parquet.ParquetWriter(path, arrow.schema([(name, arrow.string()) for name in ("id", "text", "img", "label")])) as file:
        for first in range(0, rows, AT_ONCE):
            numbers = arrow.array(np.arange(first, min(first + AT_ONCE, rows)))
            name = numbers.cast(arrow.string())
            some = [words.take(arrow.array(random.integers(0, len(WORDS), len(numbers)))) for _ in range(6)]
            label = arrow.array(random.integers(0, 1000, len(numbers))).cast(arrow.string())
            text = compute.binary_join_element_wise(*some, name, " ")
            image = compute.binary_join_element_wise("images/", name, ".jpg", "")
            file.write_table(arrow.table([name, text, image, label], schema=file.schema))


def measure(path: Path, step: str) -> dict[str, float]:
    """Build or open the index; returns rows, seconds, and the most memory that this process had."""
    from mopefuse.config.schema import Data
    from mopefuse.core import cache
    from mopefuse.data import index_cache
    from mopefuse.data.index_build import read_rows
    from mopefuse.data.storage.shards import open_files
    from mopefuse.data.tables import find_tables

    config = Data(path=str(path))
    find_tables(path, config)  # imports, and the digest of the file, which is kept
    began = time.perf_counter()
    table = find_tables(path, config)[""]
    files = open_files(path, config, [table])
    key = index_cache.make_key(cache.make_key(table.digest), files, config)
    if step == "build":
        index_cache.save(key, read_rows(table, "train", COLUMNS, config), files)
    index = index_cache.load(key, table)
    seconds = time.perf_counter() - began
    assert index is not None
    last = len(index.lines_S) - 1
    assert index.store.row(last)["id"] == index.ids[last] == str(last)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"rows": len(index.lines_S), "seconds": seconds, "gigabytes": memory}


if __name__ == "__main__":
    main()
