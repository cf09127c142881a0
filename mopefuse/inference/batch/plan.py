"""The plan of a batch prediction: which rows of which tables become which file of the output.

It follows from the inputs and the settings alone, so that a prediction that was stopped continues where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.error_codes import CheckpointCode, ConfigCode, DataCode
from mopefuse.errors import CheckpointError, ConfigError, DataError, MopefuseError, error_from_dict
from mopefuse.inference.batch.inputs import InputFile, Span, divide

KIND, VERSION = "mopefuse-batch", 1
_AT_ONCE = 16  # files that are divided together
_OVERWRITE = "choose another --out, or add --overwrite to predict everything again"


@dataclass(frozen=True)
class Partition:
    """Rows of one table, which become one file. Args: name: of that file, without suffix. digest: of what it depends on."""

    name: str
    file: InputFile
    span: Span
    digest: str


@dataclass(frozen=True)
class Plan:
    """What to predict.

    Args:
        settings: what predictions depend on, besides the inputs; by names that messages can use.
        files: the tables. spans: their partitions.
        problems: why tables cannot be divided into partitions, or some of them not be read, by their path.
    """

    settings: Mapping[str, Any]
    files: Sequence[InputFile]
    spans: Mapping[str, Sequence[Span]]
    problems: dict[str, MopefuseError] = field(default_factory=dict)

    @cached_property
    def partitions(self) -> list[Partition]:
        """All partitions, in the order of the input; their names sort in this order."""
        return list(self._partitions())

    def _partitions(self) -> Iterator[Partition]:
        key = cache.make_key(VERSION, *sorted(self.settings.items()))
        widths = len(str(len(self.files))), len(str(max(map(len, self.spans.values()), default=0)))
        for number, file in enumerate(self.files):
            for chunk, span in enumerate(self.spans.get(file.path, ())):
                name = f"part-{number:0{max(5, widths[0])}}-{chunk:0{max(5, widths[1])}}"
                yield Partition(name, file, span, cache.make_key(key, file, span))

    @property
    def rows(self) -> int:
        """Rows of all partitions."""
        return sum(partition.span.rows for partition in self.partitions)

    def note_problem(self, partition: Partition, error: MopefuseError) -> None:
        """Note that a table is damaged, if that is why a partition failed."""
        if isinstance(error, DataError) and error.number != DataCode.DATA_CHANGED:
            self.problems[partition.file.path] = error

    def as_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        files = [
            {"path": file.path, "size": file.size, "version": file.version, "partitions": list(self.spans.get(file.path, ()))}
            | ({"problem": self.problems[file.path].as_dict()} if file.path in self.problems else {})
            for file in self.files
        ]
        return {"kind": KIND, "format": VERSION, "rows": self.rows, "settings": dict(self.settings), "inputs": files}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Plan:
        """A plan that was written before.

        Raises:
            CheckpointError: it is damaged, or of another version.
        """
        try:
            if (value["kind"], value["format"]) != (KIND, VERSION):
                raise ValueError
            files = [InputFile(one["path"], one["size"], one["version"]) for one in value["inputs"]]
            spans = {one["path"]: [Span(*span) for span in one["partitions"]] for one in value["inputs"]}
            problems = {one["path"]: error_from_dict(one["problem"]) for one in value["inputs"] if "problem" in one}
            return cls(value["settings"], files, spans, problems)
        except (KeyError, TypeError, ValueError):
            what, fix = "the plan is damaged, or of another version of mopefuse", "choose another --out"
            raise CheckpointError(CheckpointCode.CONTENT_DAMAGED, what, where=where, fix=fix) from None


def make_plan(
    files: Sequence[InputFile],
    settings: Mapping[str, Any],
    rows: int,
    columns: Sequence[str],
    config: DataConfig,
    known: Plan | None = None,
) -> Plan:
    """Divide tables into partitions of at most `rows` rows. A table that is damaged becomes a problem of the plan.

    Args:
        columns: those that will be read. config: names of columns.
        known: a plan with the same settings, of some of the same tables.
    """
    before = {file: known.spans[file.path] for file in known.files if file.path not in known.problems} if known else {}

    def look(file: InputFile) -> Sequence[Span] | MopefuseError:
        try:
            return before[file] if file in before else divide(file, rows, columns, config)
        except MopefuseError as error:
            if error.exit_code != 4:
                raise
            return error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = dict(zip((file.path for file in files), pool.map(look, files), strict=True))
    spans = {path: one for path, one in found.items() if not isinstance(one, MopefuseError)}
    return Plan(settings, files, spans, {path: one for path, one in found.items() if isinstance(one, MopefuseError)})


def check_same(old: Plan, files: Sequence[InputFile], settings: Mapping[str, Any], where: str) -> None:
    """Check that what was begun can be continued: nothing changed, except tables that were damaged.

    Raises:
        ConfigError: a setting or an input is another one.
    """
    changed = [name for name in {**old.settings, **settings} if old.settings.get(name) != settings.get(name)]
    if changed:
        name, one, other = changed[0], old.settings.get(changed[0]), settings.get(changed[0])
        shown = "" if name in ("model", "gallery", "columns") else f" ({one} before, {other} now)"
        what = f"the predictions there were begun with another {name.replace('_', ' ')}{shown}"
        raise ConfigError(ConfigCode.BATCH_DIFFERS, what, where=where, fix=_OVERWRITE)
    paths = [file.path for file in files]
    if (before := [file.path for file in old.files]) != paths:
        extra = next(iter([path for path in paths if path not in before] or [path for path in before if path not in paths]), "")
        what = f"the predictions there were begun with other inputs (the first difference: {extra or 'their order'})"
        raise ConfigError(ConfigCode.BATCH_DIFFERS, what, where=where, fix=_OVERWRITE)
    for was, now in zip(old.files, files, strict=True):
        if was != now and was.path not in old.problems:
            what = f"{now.name} has changed since the predictions there were begun"
            raise ConfigError(ConfigCode.BATCH_DIFFERS, what, where=now.path, fix=_OVERWRITE)
