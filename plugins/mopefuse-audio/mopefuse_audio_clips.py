"""The modality `audio`: files that libsndfile reads (WAV, FLAC, OGG, MP3), named by a column of a table.

Every clip is decoded once when a data set is checked or indexed; later only as much of it as the encoder uses.

Shapes: T samples of a clip.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
from numpy.typing import NDArray

from mopefuse.config.schema import Data
from mopefuse.errors import DataError
from mopefuse.modalities.files import FileInfo, Files

MAX_SAMPLES = 300_000_000  # samples of a clip, all channels together: 100 minutes in stereo at 25 kHz
_BLOCK = 1 << 20  # samples decoded at a time, to be checked
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """A file of audio, not yet decoded. Clips of the same content are equal.

    Args:
        content: content of the file. name: its name in the row. where: file, line and id of the row.
    """

    content: bytes
    name: str = field(compare=False)
    where: str = field(default="", compare=False)

    def start(self, seconds: float) -> tuple[Samples, int]:
        """Samples (T, channels) of the first seconds, and their rate.

        Raises:
            DataError: it cannot be decoded.
        """
        try:
            with soundfile.SoundFile(io.BytesIO(self.content)) as file:
                rate = int(file.samplerate)
                samples: Samples = file.read(math.ceil(seconds * rate), dtype="float32", always_2d=True)
                return samples, rate
        except (soundfile.SoundFileError, ValueError) as error:
            raise self.unreadable(str(error)) from None

    def check(self) -> None:
        """Decode the whole file to check it, and discard the result.

        Raises:
            DataError: it cannot be decoded, is cut short, has no samples or too many, or some that are not finite.
        """
        try:
            with soundfile.SoundFile(io.BytesIO(self.content)) as file:
                count = file.frames * file.channels
                if count > MAX_SAMPLES:
                    what = f"{self.name} has {count:,} samples, more than {MAX_SAMPLES:,}"
                    raise DataError(201, what, where=self.where, fix="cut it into shorter clips")
                self._check_samples(file)
        except (soundfile.SoundFileError, ValueError) as error:
            raise self.unreadable(str(error)) from None

    def _check_samples(self, file: soundfile.SoundFile) -> None:
        read = 0
        for block in file.blocks(blocksize=_BLOCK, dtype="float32", always_2d=True):
            read += len(block)
            if not np.isfinite(block).all():
                raise self.unreadable("it has samples that are not finite")
        if not read:
            raise self.unreadable("it has no samples")
        if read < file.frames or re.search(r"^\s*data\s*:\s*\d+ \(should be ", file.extra_info, re.MULTILINE):
            raise self.unreadable("it is cut short")

    def unreadable(self, why: str) -> DataError:
        """The error for a file that is not a clip."""
        reason = "it is empty" if not self.content else why.rpartition(": ")[2].rstrip(".") or "unknown reason"
        what = f"{self.name} is not readable audio ({reason})"
        return DataError(200, what, where=self.where, fix="replace or remove the file; WAV, FLAC, OGG and MP3 are read")


class Audio(Files):
    """A file of audio. From Python, a clip is a path, or samples (T,) or (T, channels) and their rate in Hz."""

    plural: ClassVar[str] = "clips"
    value_description: ClassVar[str] = "a path, or samples and their rate"
    type_fix: ClassVar[str] = "pass clips as paths, or as (samples, rate)"
    common_columns: ClassVar[tuple[str, ...]] = ("clip", "wav", "sound", "audio_path", "file_name", "file", "path")

    def decode(self, content: bytes, name: str, *, where: str, config: Data) -> Clip:
        """See `Files.decode`; the encoder decides how much of the clip is used."""
        return Clip(content, name, where)

    def inspect(self, content: bytes, name: str, config: Data) -> FileInfo:
        """See `Files.inspect`."""
        Clip(content, name).check()
        return FileInfo()

    def blank_value(self) -> tuple[Samples, int]:
        """A second of silence."""
        return np.zeros(16000, dtype=np.float32), 16000

    def examples(self) -> list[Any]:
        """Noise of several lengths and rates."""
        random, sizes = np.random.default_rng(1), ((9000, 16000), (3000, 8000), (20, 16000))
        return [(random.standard_normal(size).astype(np.float32), rate) for size, rate in sizes]

    def accepts(self, value: Any) -> bool:
        """Accepts paths, clips, and samples with their rate."""
        return isinstance(value, str | Path | Clip) or _is_samples(value)

    def is_single(self, value: Any) -> bool:
        """Whether it is a path, a clip, or samples with their rate; a tuple of two such values is a list."""
        return isinstance(value, str | Path | Clip) or _is_samples(value)

    def prepare(self, value: Any, *, where: str) -> Any:
        """Read the file of a path, as for a row. A path is trusted: it may lie in any folder.

        Raises:
            DataError: the file cannot be read.
        """
        return clip_of(value, where=where) if isinstance(value, str | Path) else value


def _is_samples(value: Any) -> bool:
    """Whether a value is a pair of samples and their rate in Hz."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and not isinstance(value[0], str | Path | Clip | tuple)
        and isinstance(value[1], int | float | np.number)
    )


def clip_of(path: str | Path, *, where: str = "") -> Clip:
    """The clip in a file.

    Args:
        where: the sample, for messages.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return Clip(Path(path).read_bytes(), str(path), where)
    except OSError as error:
        raise DataError(
            202, f"{path} cannot be read: {error.strerror}", where=where, fix="use the path of an audio file"
        ) from None
