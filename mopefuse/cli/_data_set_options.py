"""Commands whose options depend on the data set that they are given: each data set declares its own options.

Nothing is imported for ``mopefuse data prepare --help``; ``mopefuse data prepare NAME --help`` lists the options of that data
set too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mopefuse.core.error_codes import PluginCode
from mopefuse.errors import PluginError

if TYPE_CHECKING:
    from mopefuse.data.options import Option

_PARAMS, _GIVEN, _CLASH = (f"mopefuse.data_set_{what}" for what in ("params", "options", "clash"))  # keys of a context's `meta`


class DataSetCommand(TyperCommand):
    """A command with an argument NAME, a data set, that also takes the options which that data set declares."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own parameters, the options of the data set, and ``--help``."""
        *own, help_option = super().get_params(ctx)
        return [*own, *ctx.meta.get(_PARAMS, ()), help_option]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; options of the data set go to `given_options`.

        Raises:
            DataError: the data set has no such option. PluginError: it cannot be imported.
        """
        from mopefuse.core.registry import DATASETS, find_candidates

        name = next((arg for arg in args if find_candidates(DATASETS, arg)), None)
        if name is None:  # no such data set, which the command reports
            ctx.ignore_unknown_options = ctx.allow_extra_args = True
            return super().parse_args(ctx, args)
        self._add_options(ctx, name, args)
        rest = super().parse_args(ctx, args)
        found = {param.name: ctx.params.pop(param.name) for param in ctx.meta[_PARAMS]}
        ctx.meta[_GIVEN] = {key: value for key, value in found.items() if value is not None}
        return rest

    def _add_options(self, ctx: Any, name: str, args: list[str]) -> None:
        from mopefuse.core.registry import DATASETS, load
        from mopefuse.data.options import declared_options, unknown_option

        options = declared_options(load(DATASETS, name))
        own = self.get_params(ctx)
        taken = {word for param in own for word in (param.name, *param.opts)}
        clashing = [option for option in options if {option.name, option.flag} & taken]
        if clashing:  # reported by `given_options`: a data set for another command may well have such an option
            ctx.meta[_CLASH] = name, clashing[0].flag
        ctx.meta[_PARAMS] = _params([option for option in options if option not in clashing])
        known = {flag for param in self.get_params(ctx) for flag in (*param.opts, *param.secondary_opts)}
        for arg in args[: args.index("--")] if "--" in args else args:
            flag = arg.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                raise unknown_option(name, flag, options, known)


def given_options(ctx: typer.Context) -> dict[str, Any]:
    """The options of the data set that were given on the command line, by name.

    Raises:
        PluginError: the data set declares an option with the same name as one of the command's own.
    """
    if _CLASH in ctx.meta:
        name, flag = ctx.meta[_CLASH]
        what = f"the data set {name!r} declares the option {flag}, which the command already has"
        raise PluginError(PluginCode.OPTION_NAME_TAKEN, what, where=name, fix="rename the option in the plugin")
    return dict(ctx.meta.get(_GIVEN, {}))


def _params(options: Iterable[Option]) -> list[Any]:
    """Make Typer's parameters from declared options."""

    def stand_in(**values: Any) -> None:
        """Has a parameter for each option, from which Typer makes its own."""

    stand_in.__signature__ = inspect.Signature([_parameter(option) for option in options])  # type: ignore[attr-defined]
    stand_in.__annotations__ = {}
    maker = typer.Typer(add_completion=False, rich_markup_mode=None)
    maker.command()(stand_in)
    return list(typer.main.get_command(maker).params)


def _parameter(option: Option) -> inspect.Parameter:
    flag = f"{option.flag}/--no-{option.flag[2:]}" if option.default is True else option.flag
    default = "" if option.default is None or option.kind is bool else f" [default: {option.default}]"
    typer_option = typer.Option(
        flag,
        metavar="|".join(option.choices) or None,
        help=f"{option.help}{default}",
        min=option.minimum,
        show_default=False,
    )
    kind: Any = option.kind
    annotation = Annotated[kind | None, typer_option]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
