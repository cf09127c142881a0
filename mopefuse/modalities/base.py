"""The base class of modalities: how values are stored in rows, read and compared. Nothing here needs torch.

The name of an entry point in the group ``mopefuse.modalities`` is the name of the modality: the attribute `modality` of its
encoders, and the default name of its column in tables. The modality of a plugin is imported when a table has its column, or an
encoder of it is created.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mopefuse.core import registry
from mopefuse.core.error_codes import DataCode, PluginCode
from mopefuse.errors import DataError, PluginError, did_you_mean

if TYPE_CHECKING:  # bundles run without pydantic
    from mopefuse.config.schema import Data as DataConfig
    from mopefuse.modalities.file_source import FileSource

BY_POSITION = {"image": "images", "text": "texts"}
"""Modalities that the Python interface takes by position, with the names of these arguments. The arguments of others have the
name of the modality."""


class Modality:
    """One kind of input. Subclasses define its values; for values in files, see `mopefuse.modalities.files.Files`.

    Attributes:
        name: name of its entry point. plural: plural of the name, for messages.
        value_description: description of one value from Python, for messages.
        type_fix: how to fix a value of another type, for messages.
        common_columns: common names of its column, for suggestions.
        leak_kind: the kind of finding for a value that is in two splits, see `mopefuse.data.findings.KINDS`.
        is_file: whether rows name a file instead of containing the value.
        is_picture: whether `read` returns a PIL image, which can be augmented, cached and shown.
        prompt_length, lr: defaults for a main encoder of this modality: prompt tokens, and learning rate.
    """

    name: str = ""
    plural: ClassVar[str] = "values"
    value_description: ClassVar[str] = "a value"
    type_fix: ClassVar[str] = "pass a value of the expected type"
    common_columns: ClassVar[tuple[str, ...]] = ()
    leak_kind: ClassVar[str] = "leaked-value"
    is_file: ClassVar[bool] = False
    is_picture: ClassVar[bool] = False
    prompt_length: ClassVar[int] = 4
    lr: ClassVar[float] = 5e-4

    def read(self, value: str, files: FileSource | Sequence[Path], *, where: str, config: DataConfig) -> Any:
        """Read a value for an encoder's preprocessing.

        Args:
            value: value in the row. files: where files are, or the folders that may contain them, the data folder first.
            where: file, line and id of the row, for messages.

        Raises:
            DataError: the value cannot be read.
        """
        return value

    def blank_value(self) -> Any:
        """A blank value, which encoders get where a row lacks the modality."""
        raise NotImplementedError

    def examples(self) -> list[Any]:
        """A few values of several sizes, as `read` returns them, for tests of encoders."""
        raise NotImplementedError

    def accepts(self, value: Any) -> bool:
        """Whether a value from Python has an accepted type."""
        return True

    def is_single(self, value: Any) -> bool:
        """Whether an argument from Python is a single value rather than a list of values."""
        return isinstance(value, str | Path)

    def prepare(self, value: Any, *, where: str) -> Any:
        """Convert a value from Python to what `read` returns.

        Args:
            where: the sample, for messages.

        Raises:
            DataError: the value cannot be read.
        """
        return value

    def normalise(self, value: str) -> str:
        """Remove unimportant differences from a value of a row, so that equivalent values become equal."""
        return value

    def prompt_bound(self, patch_size: int, width: int) -> float:
        """The bound v of the uniform distribution U(-v, v) that initialises prompts of a main encoder of this modality.

        Args:
            patch_size: in pixels. width: width of the encoder.
        """
        return 0.3


def digest(value: str) -> bytes:
    """The 16 bytes that represent a value in `Split.keys` and `Split.loose_keys`."""
    return hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def picture_among(names: Iterable[str]) -> str:
    """The first modality of pictures; empty if there is none."""
    return next((name for name in names if get_modality(name).is_picture), "")


def get_modality(name: str) -> Modality:
    """Get a modality by its name.

    Raises:
        ConfigError: it is not installed. PluginError: its plugin cannot be imported, or is not a modality.
    """
    return _create(registry.load(registry.MODALITIES, name), name)


@cache
def _create(kind: Any, name: str) -> Modality:
    if not (isinstance(kind, type) and issubclass(kind, Modality)):
        what = f"the modality {name!r} is not a subclass of mopefuse.modalities.base.Modality"
        raise PluginError(PluginCode.NOT_A_SUBCLASS, what, fix="correct the plugin, or uninstall it")
    modality: Modality = kind()
    modality.name = name
    return modality


def modality_names() -> tuple[str, ...]:
    """The names of all installed modalities; none is imported."""
    return tuple(registry.available(registry.MODALITIES))


# -- arguments from Python


def to_arguments(values: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Convert values by modality to arguments of ``collate``: the inverse of `from_arguments`."""
    return {BY_POSITION.get(name, name): listed for name, listed in values.items()}


def from_arguments(by_position: Sequence[Any], more: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Convert arguments to lists of values by modality; a single value becomes a list of one.

    Args:
        by_position: in the order of `BY_POSITION`, None if omitted. more: arguments by name.

    Raises:
        DataError: an unknown modality, or an argument that is neither a value nor a list of values.
    """
    for name in more:
        if name not in modality_names():
            raise DataError(
                DataCode.UNKNOWN_MODALITY, f"unknown modality {name!r}", fix=did_you_mean(name, modality_names())
            )
    positional = {name: values for name, values in zip(BY_POSITION, by_position, strict=True) if values is not None}
    return {name: _listed(get_modality(name), values) for name, values in {**positional, **more}.items()}


def _listed(modality: Modality, values: Any) -> list[Any]:
    if modality.is_single(values):
        return [values]
    if isinstance(values, Iterable) and not isinstance(values, Mapping | str | bytes):
        return list(values)
    what = f"{modality.plural} must be a list, or {modality.value_description}; got {type(values).__name__}"
    raise DataError(DataCode.BAD_VALUES, what, fix=modality.type_fix)


def count_samples(values: Mapping[str, Sequence[Any]]) -> int:
    """Count the samples.

    Raises:
        DataError: modalities have different numbers of values.
    """
    sizes = {name: len(listed) for name, listed in values.items()}
    if len(set(sizes.values())) > 1:
        counts = " and ".join(f"{size} {get_modality(name).plural}" for name, size in sizes.items())
        *others, last = sizes
        fix = f"pass one {last} for each {others[0]}"
        raise DataError(DataCode.NO_PAIRS, f"the numbers of values differ: {counts}", fix=fix)
    return next(iter(sizes.values()), 0)


def require_types(values: Mapping[str, Sequence[Any]]) -> None:
    """Check the types of values; None is accepted for a missing value.

    Raises:
        DataError: a value has a type that its modality does not accept.
    """
    modalities = {name: get_modality(name) for name in values}
    for sample in zip(*values.values(), strict=True):
        for modality, value in zip(modalities.values(), sample, strict=True):
            if value is not None and not modality.accepts(value):
                kinds = " and ".join(expected.value_description for expected in modalities.values())
                got = " and ".join(type(item).__name__ for item in sample)
                raise DataError(DataCode.BAD_PAIR, f"a sample must be {kinds}; got {got}", fix=modality.type_fix)


def fill_missing(name: str, values: Sequence[Any]) -> list[Any]:
    """Replace each None by a blank value."""
    return [get_modality(name).blank_value() if value is None else value for value in values]


def prepare_values(name: str, values: Sequence[Any]) -> list[Any]:
    """Convert values from Python, see `Modality.prepare`; None stays.

    Raises:
        DataError: a value cannot be read.
    """
    modality = get_modality(name)
    return [None if value is None else modality.prepare(value, where=f"sample {i}") for i, value in enumerate(values)]


def require_values(name: str, values: Mapping[str, Sequence[Any]], consumer: str) -> Sequence[Any]:
    """Get the values of a modality that `consumer` reads.

    Raises:
        DataError: there are no values of it.
    """
    if name not in values:
        got = f"only {' and '.join(values)}" if values else "nothing"
        raise DataError(
            DataCode.WRONG_VALUE_KIND,
            f"{consumer} reads {name}, but got {got}",
            fix=f"pass {get_modality(name).plural} too, one for each sample",
        )
    return values[name]
