"""Measure a server of many adapters on this machine: throughput against one adapter, latencies, errors and memory.

    python scripts/serve_load.py [--models 64] [--seconds 10] [--rounds 3] [--soak 180] [--require 0.9]

Makes adapters with random weights for one pair of frozen encoders, starts ``mopefuse serve --adapters`` on a free port, and
sends requests from several connections, each with one image and one text that are drawn from a pool. Phases with all adapters
and phases with one of them alternate, so that noise of the machine meets both. Everything is bounded and stays on loopback.

``--soak SECONDS`` then sends requests as fast as they are answered, and compares the memory of server and worker in the last
third with that in the second. The script fails if a request was not answered with 200, if memory grew by more than a tenth,
or if the ratio of throughputs is below ``--require``.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

import mopefuse

WORDS = "read the top left bottom right red green blue yellow digit number please now tell me which".split()


def make_adapters(folder: Path, arguments: argparse.Namespace) -> int:
    """Save adapters that differ in all their weights; returns the number of parameters of one."""
    model = mopefuse.build_fusion(main=arguments.main, comp=arguments.comp, num_labels=10, **json.loads(arguments.settings))
    generator = torch.Generator().manual_seed(0)
    for number in range(arguments.models):
        with torch.no_grad():
            for name, tensor in model.trainable_state_dict().items():
                if "keys" not in name:
                    tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
        mopefuse.save_adapter(model, folder / f"adapter-{number}", labels=[str(digit) for digit in range(10)])
    return sum(parameter.numel() for parameter in model.trainable_parameters())


def make_pool(count: int) -> list[dict[str, str]]:
    """Images, as base64 of PNG files of 64 x 64 pixels, and texts."""
    drawn, pool = random.Random(0), []
    for seed in range(count):
        content = io.BytesIO()
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64)).save(content, "PNG")
        text = " ".join(drawn.choices(WORDS, k=drawn.randrange(3, 10)))
        pool.append({"image": base64.b64encode(content.getvalue()).decode(), "text": text})
    return pool


class Load:
    """Connections that send one request after the other."""

    def __init__(self, port: int, clients: int, pool: list[dict[str, str]], models: int) -> None:
        self._port, self._clients, self._pool, self._models = port, clients, pool, models
        self.failures: list[str] = []

    def run(self, seconds: float, models: int) -> list[float]:
        """Send requests to `models` of the models for some seconds; returns their latencies in seconds."""
        found: list[list[float]] = [[] for _ in range(self._clients)]
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(at, until, models, found[at])) for at in range(self._clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [latency for own in found for latency in own]

    def _client(self, seed: int, until: float, models: int, latencies: list[float]) -> None:
        drawn = random.Random(seed + round(1000 * until))
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while time.monotonic() < until:
            body = json.dumps({"model": f"adapter-{drawn.randrange(models)}", "top": 3, **drawn.choice(self._pool)})
            start = time.perf_counter()
            try:
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
            except OSError as error:
                self.failures.append(repr(error))
                connection.close()
                continue
            latencies.append(time.perf_counter() - start)
            if response.status != 200 or b"probabilities" not in content:
                self.failures.append(f"{response.status}: {content[:200]!r}")
        connection.close()


def start_server(folder: Path, arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    """Start the server, and wait until it is ready; returns its process and port."""
    command = [sys.executable, "-m", "mopefuse", "serve", "--adapters", str(folder), "--port", "0"]
    command += ["--max-batch", str(arguments.batch), "--threads", "1", "--log-format", "json"]
    command += ["--max-wait-ms", str(arguments.wait_ms), "--device", arguments.device]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = 0
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
            break
    threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            pass
        time.sleep(0.2)
    process.kill()
    raise SystemExit("the server did not become ready")


def memory(process: subprocess.Popen[str]) -> int:
    """Resident memory of the server and its workers, in bytes."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    pages = (Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1] for pid in (process.pid, *children))
    return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


def compare(load: Load, arguments: argparse.Namespace) -> float:
    """Alternate between one model and all of them; prints a table and returns the ratio of the median throughputs."""
    rates: dict[int, list[float]] = {1: [], arguments.models: []}
    latencies: dict[int, list[float]] = {1: [], arguments.models: []}
    for models in rates:
        load.run(2 + arguments.models / 50, models)  # loads them
    for _ in range(arguments.rounds):
        for models, own in rates.items():
            found = load.run(arguments.seconds, models)
            own.append(len(found) / arguments.seconds)
            latencies[models] += found
    print("adapters  requests/s  p50 ms  p99 ms")
    for models, own in rates.items():
        p50, p99 = (1000 * float(np.quantile(latencies[models], level)) for level in (0.5, 0.99))
        print(f"{models:8}  {median(own):10.1f}  {p50:6.1f}  {p99:6.1f}")
    ratio = median(rates[arguments.models]) / median(rates[1])
    print(f"throughput with {arguments.models} adapters against one: {ratio:.2f}")
    return ratio


def soak(load: Load, process: subprocess.Popen[str], arguments: argparse.Namespace) -> float:
    """Send requests for a while; returns the growth of memory between the second and the last third."""
    parts = []
    for _ in range(3):
        before = time.monotonic()
        found = load.run(arguments.soak / 3, arguments.models)
        parts.append(memory(process))
        rate = len(found) / (time.monotonic() - before)
        print(f"soak: {len(found)} requests, {rate:.1f} a second, {parts[-1] / 2**20:.0f} MB")
    return parts[2] / parts[1] - 1


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--main", default="tiny:vision")
    parser.add_argument("--comp", default="tiny:text")
    parser.add_argument("--settings", default='{"film": false, "head_hidden": 0, "head_features": "all"}', help="JSON")
    parser.add_argument("--clients", type=int, default=32, help="connections")
    parser.add_argument("--batch", type=int, default=32, help="--max-batch of the server")
    parser.add_argument("--wait-ms", type=float, default=20.0, help="--max-wait-ms of the server")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--require", type=float, default=0.0, help="smallest ratio of throughputs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_adapters(folder, arguments)
        print(f"{arguments.models} adapters of {parameters:,} parameters for {arguments.main} and {arguments.comp}")
        process, port = start_server(folder, arguments)
        try:
            load = Load(port, arguments.clients, make_pool(500), arguments.models)
            ratio = compare(load, arguments)
            growth = soak(load, process, arguments) if arguments.soak else 0.0
        finally:
            process.terminate()
            process.wait(timeout=60)
    problems: list[Any] = load.failures[:5]
    problems += [f"memory grew by {growth:.0%}"] if growth > 0.1 else []
    problems += [f"the ratio {ratio:.2f} is below {arguments.require}"] if ratio < arguments.require else []
    print("\n".join(map(str, problems)) or "every request was answered")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
