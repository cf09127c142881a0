"""Transposes the logits of a split: written batch by batch, read label by label; in memory, or in a file if there are many.

Shapes: S samples of the split, B of them in a batch, N labels, n labels of a block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from mopefuse.core.atomic_files import disk_error

IN_MEMORY = 256 * 2**20
"""Bytes of logits kept in memory; more go to a temporary file, which takes 4 bytes for each sample and label."""
BLOCK = 32 * 2**20
"""Bytes of a block of labels, and of the write buffer."""


class Spool:
    """Takes logits (B, N) of consecutive samples; returns those of all samples (S, n), a block of labels at a time.

    Args:
        folder: folder of the temporary file, which is unnamed and so disappears even if the process is killed.

    Raises:
        ResourceError: the disk is full or not writable.
    """

    def __init__(self, samples: int, labels: int, folder: Path) -> None:
        self._samples, self._labels, self._folder = samples, labels, folder
        self._width = max(1, min(labels, BLOCK // (4 * samples)))
        self._large = 4 * samples * labels > IN_MEMORY
        self._file: IO[bytes] | None = None  # only ever opened in the main process
        self._waiting: list[Tensor] = []
        self._bytes, self._written = 0, 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk, which `add` has already reported
                self._file.close()

    def add(self, logits_BN: Tensor) -> None:
        """Append the logits of the next samples."""
        self._waiting.append(logits_BN.float())
        self._bytes += 4 * logits_BN.numel()
        if self._large and self._bytes >= BLOCK:
            self._write()

    def _write(self) -> None:
        logits_BN = torch.cat(self._waiting)
        try:
            self._file = self._file or tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed on exit)
            for first in range(0, self._labels, self._width):
                block_Bn = logits_BN[:, first : first + self._width].contiguous()
                self._file.seek(4 * (first * self._samples + self._written * block_Bn.shape[1]))
                self._file.write(block_Bn.numpy().data)
            self._file.flush()
        except OSError as error:
            raise disk_error(error, self._folder) from error
        self._waiting, self._bytes, self._written = [], 0, self._written + len(logits_BN)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """For each block in order, its first label and the logits (S, n) of all samples."""
        if not self._large:
            logits_SN = torch.cat(self._waiting)
            for first in range(0, self._labels, self._width):
                yield first, logits_SN[:, first : first + self._width]
            return
        if self._waiting:
            self._write()
        assert self._file is not None
        for first in range(0, self._labels, self._width):
            width = min(self._width, self._labels - first)
            self._file.seek(4 * first * self._samples)
            block = bytearray(self._file.read(4 * width * self._samples))
            yield first, torch.frombuffer(block, dtype=torch.float32).reshape(self._samples, width)
