"""Benchmark of data parallelism: a training step of one global batch on several processes (gloo on CPUs, NCCL on GPUs)."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection

import torch

from mopefuse.bench.pair import random_batch
from mopefuse.bench.timing import Advance, Times, Turns
from mopefuse.bench.variants import Subject, Variant, build_encoders
from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.error_codes import ResourceCode
from mopefuse.errors import ResourceError
from mopefuse.fusion.build import full_specs


def bench_parallel(
    config: RunConfig,
    *,
    batch: int,
    text_length: int,
    processes: tuple[int, ...] = (1, 2),
    rounds: int = 5,
    advance: Advance = lambda what, done, total: None,
) -> dict[int, Times]:
    """Time a step by number of processes, among which the batch and the CPU threads are divided.

    Raises:
        ResourceError: a process died.
    """
    config = full_specs(config)
    found = {}
    for number, count in enumerate(processes):
        advance(f"processes {count}", number, len(processes))
        found[count] = _time_step(count, config, batch, text_length, rounds)
    return found


def _time_step(count: int, config: RunConfig, batch: int, text_length: int, rounds: int) -> Times:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    threads = max(1, torch.get_num_threads() // count)
    share = max(1, batch // count)
    port = _free_port()
    started = [
        context.Process(target=_work, args=(rank, count, port, threads, config, share, text_length, rounds, there))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    there.close()
    try:
        seconds: tuple[float, ...] = here.recv()
    except EOFError:
        raise ResourceError(
            ResourceCode.BENCH_PROCESS_ENDED, f"one of the {count} processes died", where="bench ddp", fix="lower --batch"
        ) from None
    finally:
        for process in started:
            process.join()
    return Times.from_seconds(seconds)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _work(
    rank: int, count: int, port: int, threads: int, config: RunConfig, share: int, text_length: int, rounds: int,
    connection: Connection,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with distributed.process_group():
        device = devices.resolve(config.device)
        encoders = build_encoders(config, device)
        batch = random_batch(encoders, share, text_length, device)
        subject = Subject(Variant("conditional"), config, encoders, batch, device)

        def step() -> None:
            distributed.barrier()
            subject.step()

        times = Turns(device, rounds, warm_up=1).time({"step": step})
    if rank == 0:
        connection.send(times["step"].seconds)
    connection.close()
