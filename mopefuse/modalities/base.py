"""What a modality is: how its values stand in rows, are read, compared and shown. Nothing here needs torch.

The name of an entry point in the group ``mopefuse.modalities`` is that of the modality: what encoders give as `modality`, and
the column of a table that has its values unless another is named. A plugin's modality is imported when a table has its
column, or an encoder of it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mopefuse.core import registry
from mopefuse.errors import DataError, PluginError, did_you_mean

if TYPE_CHECKING:  # a bundle is asked where there is no pydantic
    from mopefuse.config.schema import Data as DataConfig

BY_POSITION = {"image": "images", "text": "texts"}
"""The modalities whose values the Python interface takes by position, to the names of these arguments; others are called as
they are."""


class Modality:
    """One kind of input. A subclass says what its values are; of files, see `mopefuse.modalities.files.Files`.

    Attributes:
        name: of its entry point. plural: for messages.
        kind: what the Python interface takes for one, for messages. give: what to do where it got something else.
        meant: names that its column has elsewhere.
        leaked: the kind of finding that a value in two splits is, see `mopefuse.data.findings.KINDS`.
        is_file: whether a row names a file; else the value is in the row.
        is_picture: whether `read` gives a PIL image, which can be augmented, kept decoded, and shown.
        prompt_length, lr: defaults of a main encoder that reads it, tokens of a prompt and learning rate.
    """

    name: str = ""
    plural: ClassVar[str] = "values"
    kind: ClassVar[str] = "a value"
    give: ClassVar[str] = "give another"
    meant: ClassVar[tuple[str, ...]] = ()
    leaked: ClassVar[str] = "leaked-value"
    is_file: ClassVar[bool] = False
    is_picture: ClassVar[bool] = False
    prompt_length: ClassVar[int] = 4
    lr: ClassVar[float] = 5e-4

    def read(self, value: str, roots: Sequence[Path], *, where: str, config: DataConfig) -> Any:
        """What an encoder's preprocessing takes, of what a row says.

        Args:
            roots: folders that files may be in, the data root first. where: file, line and id of the row.
        """
        return value

    def nothing(self) -> Any:
        """A value that says nothing: what an encoder gets where a row has none."""
        raise NotImplementedError

    def examples(self) -> list[Any]:
        """A few values, as `read` gives them: of several sizes, for the contract of encoders."""
        raise NotImplementedError

    def accepts(self, value: Any) -> bool:
        """Whether a value from Python can be one."""
        return True

    def is_single(self, value: Any) -> bool:
        """Whether what Python hands over is one value rather than a list of them."""
        return isinstance(value, str | Path)

    def prepare(self, value: Any, *, where: str) -> Any:
        """A value from Python as `read` gives the same value of a row.

        Args:
            where: the sample, for messages.
        """
        return value

    def alike(self, value: str) -> str:
        """What two values in rows have in common that say the same."""
        return value

    def prompt_bound(self, patch_size: int, width: int) -> float:
        """v, where prompts of a main encoder that reads it start in U(-v, v)."""
        return 0.3


def of(name: str) -> Modality:
    """The modality of a name.

    Raises:
        ConfigError: there is none. PluginError: its plugin cannot be imported, or gives something else.
    """
    return _made(registry.load(registry.MODALITIES, name), name)


@cache
def _made(kind: Any, name: str) -> Modality:
    if not (isinstance(kind, type) and issubclass(kind, Modality)):
        what = f"the modality {name!r} is no subclass of mopefuse.modalities.base.Modality"
        raise PluginError(7, what, fix="mend the plugin, or uninstall it")
    made = kind()
    made.name = name
    return made


def names() -> tuple[str, ...]:
    """Every modality that is installed, by name. Imports none."""
    return tuple(registry.available(registry.MODALITIES))


# -- what Python hands over


def by_argument(values: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Values by modality as arguments of ``collate``: the inverse of `named`."""
    return {BY_POSITION.get(name, name): each for name, each in values.items()}


def named(by_position: Sequence[Any], more: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Lists of values by modality: those given by position (see `BY_POSITION`, None where left out) and those given by name.

    A single value is a list of one.

    Raises:
        DataError: an unknown modality, or what is neither a value nor several.
    """
    for name in more:
        if name not in names():
            raise DataError(91, f"there is no modality {name!r}", fix=did_you_mean(name, names()))
    first = {name: values for name, values in zip(BY_POSITION, by_position, strict=True) if values is not None}
    return {name: _listed(of(name), values) for name, values in {**first, **more}.items()}


def _listed(modality: Modality, values: Any) -> list[Any]:
    if modality.is_single(values):
        return [values]
    if isinstance(values, Iterable) and not isinstance(values, Mapping | str | bytes):
        return list(values)
    what = f"{modality.plural} are a list, or {modality.kind}, got {type(values).__name__}"
    raise DataError(210, what, fix=modality.give)


def count_of(values: Mapping[str, Sequence[Any]]) -> int:
    """How many samples these are.

    Raises:
        DataError: not as many of one modality as of another.
    """
    sizes = {name: len(each) for name, each in values.items()}
    if len(set(sizes.values())) > 1:
        said = " and ".join(f"{size} {of(name).plural}" for name, size in sizes.items())
        *others, last = sizes
        fix = f"give one {last} for each {others[0]}"
        raise DataError(17, f"{said} are no pairs", fix=fix)
    return next(iter(sizes.values()), 0)


def require_kinds(values: Mapping[str, Sequence[Any]]) -> None:
    """Refuse values that are not what their modality takes; None, where a sample has none, is.

    Raises:
        DataError: the first that is not.
    """
    modalities = {name: of(name) for name in values}
    for sample in zip(*values.values(), strict=True):
        for modality, value in zip(modalities.values(), sample, strict=True):
            if value is not None and not modality.accepts(value):
                kinds = " and ".join(one.kind for one in modalities.values())
                got = " and ".join(type(one).__name__ for one in sample)
                raise DataError(18, f"a pair is {kinds}, got {got}", fix=modality.give)


def or_nothing(name: str, values: Sequence[Any]) -> list[Any]:
    """Values with one that says nothing where there is None."""
    return [of(name).nothing() if value is None else value for value in values]


def prepared(name: str, values: Sequence[Any]) -> list[Any]:
    """Values from Python as rows give them, see `Modality.prepare`; None stays.

    Raises:
        DataError: one that cannot be read.
    """
    one = of(name)
    return [None if value is None else one.prepare(value, where=f"sample {i}") for i, value in enumerate(values)]


def require_given(name: str, values: Mapping[str, Sequence[Any]], who: str) -> Sequence[Any]:
    """The values of a modality that somebody reads.

    Raises:
        DataError: there are none.
    """
    if name not in values:
        got = " and ".join(values) or "nothing"
        raise DataError(92, f"{who} reads {name}, and got {got}", fix=f"give {of(name).plural}, or None for each sample")
    return values[name]
