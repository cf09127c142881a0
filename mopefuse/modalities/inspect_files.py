"""Check many files, with all processors or, where they come over a network, many at once.

Shapes: I files.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mopefuse.errors import MopefuseError
from mopefuse.modalities.file_infos import FileInfos
from mopefuse.modalities.file_source import FileSource, as_source
from mopefuse.modalities.files import FileInfo, Files, processor_count

if TYPE_CHECKING:  # bundles run without pydantic
    from mopefuse.config.schema import Data as DataConfig

_AT_ONCE = 512


def inspect_files(
    modality: Files,
    files: FileSource | Sequence[Path],
    names: Sequence[str],
    config: DataConfig,
    *,
    known: FileInfos | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> FileInfos:
    """Check files.

    Args:
        known: earlier results for `names` (I,); unchanged files are not read again.
        advance: called with (files checked, files to check).
    """
    source = as_source(files)
    found = FileInfos.unknown(len(names)) if known is None else known
    changed = [
        number
        for number, (name, stamp) in enumerate(zip(names, found.stamps(), strict=True))
        if known is None or stamp.size < 0 or not source.is_unchanged(name, stamp)
    ]
    if not changed:
        return found
    found, numbers, done = found.copy(), iter(changed), 0
    with ThreadPoolExecutor(source.at_once or processor_count()) as pool:  # decoding releases the GIL
        while some := [*islice(numbers, _AT_ONCE)]:
            looks = pool.map(lambda number: _look(modality, source, names[number], config), some)
            for number, info in zip(some, looks, strict=True):
                found.set(number, info)
                done += 1
                advance(done, len(changed))
    return found


def _look(modality: Files, files: FileSource, name: str, config: DataConfig) -> FileInfo:
    info = FileInfo()
    try:
        stamp = files.stamp(name, where="", what=modality.name)
        info = info._replace(size=stamp.size, mtime=stamp.version)
        content = files.read(name, where="", what=modality.name)
        info = info._replace(digest=hashlib.blake2b(content, digest_size=16).digest())
        began = time.perf_counter()
        seen = modality.inspect(content, name, config)
        took = round(1000 * (time.perf_counter() - began))
        return seen._replace(size=info.size, mtime=info.mtime, digest=info.digest, milliseconds=took)
    except MopefuseError as error:
        return info._replace(code=error.code, what=error.what, fix=error.fix)
