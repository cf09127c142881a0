"""The registry: implementations by name, as entry points, and the specs of encoders.

Encoders, fusion methods, data sets, modalities and tasks are entry points of the groups below. The built-in ones are entry
points of mopefuse's own distribution, found in the same way as those of plugins. Listing imports nothing; a name clash or a
broken plugin is an error only when that name is loaded.

A name is plain (``conditional``) or includes its distribution (``mopefuse-audio:contrast``). A plain name resolves to the
built-in of that name, else to the plugin that provides it, if there is only one. Runs record the full name, which includes
the distribution of a plugin, so that it resolves to the same implementation regardless of later installations.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distributions, entry_points, version
from typing import Any

from mopefuse.core.error_codes import ConfigCode, EncoderCode, PluginCode
from mopefuse.errors import ConfigError, EncoderError, MopefuseError, Notice, PluginError, did_you_mean

ENCODERS, FUSION, DATASETS = "mopefuse.encoders", "mopefuse.fusion", "mopefuse.datasets"
MODALITIES, TASKS = "mopefuse.modalities", "mopefuse.tasks"
SEGMENTATION = "mopefuse.fusion.segmentation"
RETRIEVAL = "mopefuse.fusion.retrieval"
KINDS = {
    ENCODERS: "encoder scheme",
    FUSION: "fusion method",
    DATASETS: "data set",
    MODALITIES: "modality",
    TASKS: "task",
    SEGMENTATION: "segmentation method",
    RETRIEVAL: "retrieval method",
}
OURS = "mopefuse"


@dataclass(frozen=True)
class Spec:
    """A parsed encoder spec, ``scheme:name[?key=value&...]``.

    The scheme is a full name: that of a plugin starts with its distribution (``mopefuse-audio:audio``). The scheme defines
    the meaning of the name, which may contain colons.
    """

    scheme: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        query = "&".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.scheme}:{self.name}" + (f"?{query}" if query else "")


def parse_spec(text: str) -> Spec:
    """Parse a spec.

    In ``a:b:c``, `a` is the scheme if it is a built-in one; else the distribution, if it provides a scheme `b` or there is no
    scheme `a`; else the scheme.

    Raises:
        ConfigError: no scheme, no name, or options that are not distinct ``key=value`` pairs.
    """
    head, has_query, query = text.strip().partition("?")
    scheme, has_scheme, name = head.partition(":")
    if not (scheme and has_scheme and name):
        if head and not has_scheme and os.path.isdir(os.path.expanduser(head)):  # False for an impossible name
            raise ConfigError(ConfigCode.NOT_AN_ENCODER_SPEC, f"{text!r} is a folder without a scheme", fix=f"write hf:{text}")
        raise ConfigError(
            ConfigCode.NOT_AN_ENCODER_SPEC,
            f"{text!r} is not an encoder spec",
            fix="write scheme:name, for example timm:vit_base or hf:bert-base",
        )
    options: dict[str, str] = {}
    for pair in query.split("&") if has_query else []:
        key, _, value = pair.partition("=")
        if not (key and value) or key in options:
            raise ConfigError(
                ConfigCode.BAD_SPEC_OPTION,
                f"cannot read the option {pair!r}",
                where=text,
                fix="write each option once, in the form ?key=value&key=value",
            )
        options[key] = value
    return Spec(*_scheme_and_name(scheme, name), options)


def _scheme_and_name(first: str, rest: str) -> tuple[str, str]:
    claims, (second, _, name) = find_candidates(ENCODERS, first), rest.partition(":")
    built_in = bool(claims) and distribution(claims[0]) == OURS
    if second and name and not built_in and (not claims or find_candidates(ENCODERS, f"{first}:{second}")):
        return full_name(ENCODERS, f"{first}:{second}"), name
    return full_name(ENCODERS, first), rest


# -- what is installed


@cache
def available(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Map every name of a group to the entry points that provide it, mopefuse's own first, without importing them."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(_installed(group), key=lambda p: (distribution(p) != OURS, p.name, distribution(p))):
        claims = found.setdefault(point.name, [])
        if (point.value, distribution(point)) not in [(claim.value, distribution(claim)) for claim in claims]:
            claims.append(point)  # an editable install can list a distribution twice
    return {name: tuple(points) for name, points in sorted(found.items())}


def _installed(group: str) -> list[EntryPoint]:
    try:
        return list(entry_points(group=group))
    except (TypeError, ValueError):  # some package has unreadable metadata: skip that package
        first = {_name_of(dist): dist for dist in reversed(list(distributions()))}
        return [point for dist in first.values() for point in _readable(dist) if point.group == group]


def _readable(dist: Distribution) -> list[EntryPoint]:
    try:
        return list(dist.entry_points)
    except (TypeError, ValueError):
        warnings.warn(f"the entry points of {_name_of(dist)} cannot be read; reinstall or uninstall it", Notice, stacklevel=1)
        return []


def groups() -> set[str]:
    """Every installed group of entry points whose name starts with ``mopefuse.``, including unknown ones."""
    try:
        found = set(entry_points().groups)
    except (TypeError, ValueError):
        found = {point.group for dist in distributions() for point in _readable(dist)}
    return {group for group in found if group.startswith(f"{OURS}.")} | KINDS.keys()


def distribution(point: EntryPoint) -> str:
    """Normalised name of the distribution that an entry point belongs to."""
    return _name_of(point.dist)


@cache
def _name_of(dist: Distribution | None) -> str:
    name = None
    with suppress(OSError, KeyError):  # no metadata
        name = dist.name if dist is not None else None
    return normalise_distribution(name) if name else "unknown distribution"


def normalise_distribution(name: str) -> str:
    """Normalise the name of a distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_candidates(group: str, name: str) -> tuple[EntryPoint, ...]:
    """Entry points that a name may resolve to: the built-in one, else those of all plugins; for ``dist:name`` that one."""
    owner, is_full, plain = name.rpartition(":")
    points = available(group).get(plain, ())
    if is_full:
        return tuple(point for point in points if distribution(point) == normalise_distribution(owner))[:1]
    return points[:1] if points and distribution(points[0]) == OURS else points


def full_name(group: str, name: str) -> str:
    """Full name as runs record it; a name that is unknown or ambiguous is returned unchanged."""
    owners = {distribution(point) for point in find_candidates(group, name)}
    if len(owners) != 1:
        return name
    owner, plain = owners.pop(), name.rpartition(":")[2]
    return plain if owner == OURS else f"{owner}:{plain}"


def shortest_names(group: str) -> dict[str, EntryPoint]:
    """Map the shortest unambiguous name of every entry point of a group to the entry point."""
    found = {}
    for name, points in available(group).items():
        owners = [distribution(point) for point in points]
        for owner, point in zip(owners, points, strict=True):
            found[name if owner == OURS or len(set(owners)) == 1 else f"{owner}:{name}"] = point
    return found


def resolution_status(point: EntryPoint) -> str:
    """``ok``, or the reason why the plain name of a plugin's entry point does not resolve to it. Imports nothing."""
    if point.group not in KINDS:
        return "unknown group"
    if set(point.name) & set(":?=+"):  # separators in specs, repository names and missing shares
        return "unusable name"
    owners = {distribution(claim) for claim in available(point.group)[point.name]}
    if OURS in owners:
        return "shadowed by built-in"
    return "clash" if len(owners) > 1 else "ok"


# -- what a run needs


def describe_plugins(names: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Describe the plugins among (group, name) pairs, for `require`."""
    points = [point for group, name in sorted(set(names)) for point in find_candidates(group, name)[:1]]
    return [
        {"group": point.group, "name": point.name, "distribution": owner, "version": version_of(owner)}
        for point in points
        if (owner := distribution(point)) != OURS
    ]


def require(needs: Iterable[Mapping[str, str]], *, where: str) -> None:
    """Check that the plugins of an artifact are installed.

    Args:
        needs: plugins as the artifact records them, see `describe_plugins`.

    Raises:
        PluginError: a plugin is missing; the message gives its distribution and version.
    """
    for need in needs:
        owner, made_with = need["distribution"], need.get("version", "")
        if find_candidates(need["group"], f"{owner}:{need['name']}"):
            continue
        installed = version_of(owner)
        problem = f"the installed version {installed} does not provide it" if installed else "it is not installed"
        package = f"{owner} {made_with}".strip()
        what = f"this run needs the plugin {package}, which provides {need['name']!r}; {problem}"
        raise PluginError(
            PluginCode.REQUIRED_PLUGIN_MISSING, what, where=where, fix=f"pip install {package.replace(' ', '==')}"
        )


def version_of(owner: str) -> str:
    """Version of a distribution; empty if it is not installed."""
    try:
        return version(owner)
    except PackageNotFoundError:
        return ""


# -- loading


def load(group: str, name: str) -> Any:
    """Load the implementation of a name. A built-in takes precedence over plugins of the same name.

    Raises:
        ConfigError: no such name (EncoderError for encoders); the message suggests similar ones.
        PluginError: several plugins provide the name, or the one that does cannot be imported.
    """
    points = find_candidates(group, name)
    owners = sorted({distribution(point) for point in points})
    if not points:
        raise _unknown(group, name)
    if len(owners) > 1:
        more = ":NAME" if group == ENCODERS else ""
        fix = f"write {' or '.join(f'{owner}:{name}{more}' for owner in owners)}"
        if group == MODALITIES:  # encoders and columns use plain names only
            fix = "uninstall one of them"
        raise PluginError(PluginCode.NAME_CLASH, f"the {KINDS[group]} {name!r} is provided by {' and '.join(owners)}", fix=fix)
    if owners == [OURS]:
        _warn_of_shadowed(group, points[0].name)
        return points[0].load()
    return _load_plugin(points[0])


def check_name(group: str, name: str) -> None:
    """Check that a name exists; imports nothing.

    Raises:
        ConfigError: see `load`.
    """
    if not find_candidates(group, name):
        raise _unknown(group, name)


def _unknown(group: str, name: str) -> MopefuseError:
    owner, is_full, plain = name.rpartition(":")
    near, installed = did_you_mean(name, shortest_names(group)), version_of(owner) if is_full else ""
    if installed:
        return PluginError(
            PluginCode.NAME_NOT_PROVIDED, f"{owner} {installed} provides no {KINDS[group]} {plain!r}", where=name, fix=near
        )
    if is_full:
        return PluginError(PluginCode.NOT_INSTALLED, f"the plugin {owner} is not installed", where=name, fix=near)
    if group == ENCODERS:
        return EncoderError(EncoderCode.UNKNOWN_SCHEME, f"unknown scheme {name!r}", fix=near)
    return ConfigError(ConfigCode.UNKNOWN_NAME, f"unknown {KINDS[group]} {name!r}", fix=near)


@cache
def _warn_of_shadowed(group: str, name: str) -> None:
    """Warn once that plugins provide the name of a built-in."""
    others = sorted({distribution(point) for point in available(group)[name]} - {OURS})
    if others:
        what = f"the built-in {KINDS[group]} {name!r} is used; for that of {' and '.join(others)}, write {others[0]}:{name}"
        warnings.warn(what, Notice, stacklevel=3)


def _load_plugin(point: EntryPoint) -> Any:
    owner = distribution(point)
    try:
        with redirect_stdout_to_stderr():
            return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, and the exceptions by which test runners skip
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        what = f"the {KINDS[point.group]} {point.name!r} of {owner} cannot be imported: {reason}"
        raise PluginError(PluginCode.IMPORT_FAILED, what, where=point.value, fix=f"upgrade or uninstall {owner}") from error


@contextmanager
def redirect_stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout, which is for results, to stderr within the context, also for child processes."""
    stdout, original = sys.stdout, None
    stdout.flush()
    with suppress(OSError):  # a process may have no stdout or stderr
        original = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        stdout.flush()
        if original is not None:
            os.dup2(original, 1)
            os.close(original)
