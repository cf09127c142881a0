"""Options that set a setting, made from the table `mopefuse.config.flags` and the schema of the configuration.

A command that has such options is a function with a parameter ``settings``, registered with `add_command`. The options are
made when the command runs or shows its help, so that ``mopefuse --help`` need not import the schema.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from mopefuse.config.flags import Flag, flag_of, flags_for
from mopefuse.core.error_codes import ConfigCode

Settings = dict[str, Any]
"""Settings that were given on the command line: dotted path to value."""


def add_command(
    app: typer.Typer, name: str, function: Callable[..., None], *, group: str = "", defaults: bool = True
) -> None:
    """Register a command with the parameters of `function` and, in the place of ``settings``, the flags of the table.

    Args:
        group: command group that `name` belongs to, such as ``data``.
        defaults: whether the help shows the defaults of the schema; False if a run determines them.
    """

    class Command(_SettingsCommand):
        flags = flags_for(f"{group} {name}".strip())
        target = staticmethod(function)
        shows_defaults = defaults

    def described() -> None:
        """Stands for `function` in the list of commands."""

    described.__doc__ = function.__doc__
    app.command(name, cls=Command)(described)


class _SettingsCommand(TyperCommand):
    """A command whose options are made when they are first needed, and listed in its help under the headings of the table."""

    flags: ClassVar[tuple[Flag, ...]]
    target: ClassVar[Callable[..., None]]
    shows_defaults: ClassVar[bool]

    @cached_property
    def _complete(self) -> Any:
        """The command that Typer makes of `target` and the options of the table."""
        maker = typer.Typer(add_completion=False, rich_markup_mode=None)
        options = {flag.path: _option(flag, default=self.shows_defaults) for flag in self.flags}
        maker.command()(_with_options(self.target, options))
        return typer.main.get_command(maker)

    @property
    def params(self) -> Any:
        """All options and arguments."""
        return self._complete.params

    @params.setter
    def params(self, value: Any) -> None:
        """Ignore the assignment: the base class sets the parameters of `described`, which has none."""

    @property
    def callback(self) -> Any:
        """The function that runs the command."""
        return self._complete.callback

    @callback.setter
    def callback(self, value: Any) -> None:
        """Ignore the assignment: the base class sets `described`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each heading, in the order in which they first appear."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                plain = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(param, "rich_help_panel", None) or plain, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _with_options(function: Callable[..., None], options: Mapping[str, inspect.Parameter]) -> Callable[..., None]:
    """`function` with an option for each setting instead of its parameter ``settings``.

    Args:
        options: dotted path of a setting to its option.
    """
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += options.values() if parameter.name == "settings" else [own]

    def complete(**values: Any) -> None:
        given = {path: values.pop(option.name) for path, option in options.items()}
        function(settings=_checked(given), **values)

    complete.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    complete.__annotations__ = {}
    return complete


def _option(flag: Flag, *, default: bool) -> inspect.Parameter:
    """The option of a flag, as a parameter that Typer understands; `default`: whether its help shows the default."""
    from mopefuse.config.messages import choices, command_line_type, help_text
    from mopefuse.config.method_defaults import CONDITIONAL_BY_PATH
    from mopefuse.config.schema import setting

    field = setting(flag.path)
    metavar = flag.metavar or "|".join(choices(field)) or None
    text = help_text(field, default=default, of_method=CONDITIONAL_BY_PATH.get(flag.path))
    names = flag.name if not flag.off else f"{flag.name}/{flag.off}"
    option = typer.Option(names, metavar=metavar, help=text, rich_help_panel=flag.panel, show_default=False)
    kind = command_line_type(field)
    name = flag.name.removeprefix("--").replace("-", "_")
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _checked(values: Mapping[str, Any]) -> Settings:
    """The settings that were given; ``--column`` of a built-in modality becomes that modality's own setting.

    Raises:
        ConfigError: ``--column`` cannot be read or contradicts another flag, or there is no folder ``--image-root``.
    """
    given = {path: value for path, value in values.items() if value not in (None, [])}
    for root in given.get("data.image_roots", ()):
        _require_folder(root)
    if "data.columns" not in given:
        return given
    from mopefuse.config.schema import COLUMN_SETTINGS
    from mopefuse.errors import ConfigError

    columns = _parse_columns(given.pop("data.columns"))
    for modality, setting in COLUMN_SETTINGS.items():
        column, path = columns.pop(modality, None), f"data.{setting}"
        if column is not None and given.get(path, column) != column:
            flag = flag_of(path)
            what = f"{flag} {given[path]} and --column {modality}={column} specify two columns for one modality"
            raise ConfigError(ConfigCode.COLUMN_NAMED_TWICE, what, where=f"{flag}, --column", fix="remove one of them")
        given |= {path: column} if column is not None else {}
    return given | ({"data.columns": columns} if columns else {})


def _require_folder(root: str) -> None:
    from mopefuse.errors import ConfigError

    if not Path(root).is_dir():
        raise ConfigError(
            ConfigCode.PARENT_FOLDER_MISSING, f"folder not found: {root}", where="--image-root", fix="check the path"
        )


def _parse_columns(texts: list[str]) -> dict[str, str]:
    """``MODALITY=NAME`` texts as a dictionary.

    Raises:
        ConfigError: one is not written like that, or a modality is named twice.
    """
    from mopefuse.errors import ConfigError

    found: dict[str, str] = {}
    for text in texts:
        modality, _, name = (part.strip() for part in text.partition("="))
        if not (modality and name) or modality in found:
            fix = "write each once, in the form --column MODALITY=NAME, for example --column audio=clip"
            raise ConfigError(ConfigCode.BAD_COLUMN_OPTION, f"cannot read the column {text!r}", where="--column", fix=fix)
        found[modality] = name
    return found


def data_section(settings: Settings) -> dict[str, Any]:
    """The settings of the section `data`, by their names in it."""
    return {path.removeprefix("data."): value for path, value in settings.items() if path.startswith("data.")}
