"""Names to implementations: entry points, and the specs that users type.

Encoders, fusion methods, data sets and modalities are entry points of the groups below. The built-in ones are entry
points of our own distribution and come through the same door as plugins. Listing imports nothing; a clash or a broken
plugin is an error only for who asks for it.

A name is plain (``conditional``) or names its distribution too (``mopefuse-audio:contrast``). A plain name stands for the
built-in of that name, else for the plugin that claims it, if only one does. What a run records is the full name: plain of
a built-in, with the distribution of a plugin, so that it stands for the same whatever is installed later.
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
from pathlib import Path
from typing import Any

from mopefuse.errors import ConfigError, EncoderError, MopefuseError, Notice, PluginError, did_you_mean

ENCODERS, FUSION, DATASETS = "mopefuse.encoders", "mopefuse.fusion", "mopefuse.datasets"
MODALITIES = "mopefuse.modalities"
KINDS = {ENCODERS: "encoder scheme", FUSION: "fusion method", DATASETS: "data set", MODALITIES: "modality"}
OURS = "mopefuse"
API, API_GROUP = 1, "mopefuse.api"
"""The version of what plugins build on, and the group in which a plugin names those that it is written for."""


@dataclass(frozen=True)
class Spec:
    """``scheme:name[?key=value&...]``, parsed. The name is the scheme's own business and may have colons.

    The scheme is a full name: that of a plugin begins with its distribution (``mopefuse-audio:audio``).
    """

    scheme: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        query = "&".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.scheme}:{self.name}" + (f"?{query}" if query else "")


def parse_spec(text: str) -> Spec:
    """`text` as a `Spec`.

    In ``a:b:c``, `a` is the scheme if it is a built-in one; else the distribution, if it brings a scheme `b` or there is no
    scheme `a`; else the scheme.

    Raises:
        ConfigError: no scheme, no name, or options that are not distinct ``key=value`` pairs.
    """
    head, has_query, query = text.strip().partition("?")
    scheme, has_scheme, name = head.partition(":")
    if not (scheme and has_scheme and name):
        if head and not has_scheme and Path(os.path.expanduser(head)).is_dir():
            what = f"{text!r} is a folder, and does not say which library its model is of"
            raise ConfigError(11, what, fix=f"write hf:{text}")
        raise ConfigError(
            11, f"{text!r} is not an encoder", fix="write scheme:name, for example timm:vit_base or hf:bert-base"
        )
    options: dict[str, str] = {}
    for pair in query.split("&") if has_query else []:
        key, _, value = pair.partition("=")
        if not (key and value) or key in options:
            raise ConfigError(
                12, f"cannot read the option {pair!r}", where=text, fix="write each option once, as ?key=value&key=value"
            )
        options[key] = value
    return Spec(*_scheme_and_name(scheme, name), options)


def _scheme_and_name(first: str, rest: str) -> tuple[str, str]:
    claims, (second, _, name) = claimed(ENCODERS, first), rest.partition(":")
    built_in = bool(claims) and distribution(claims[0]) == OURS
    if second and name and not built_in and (not claims or claimed(ENCODERS, f"{first}:{second}")):
        return full_name(ENCODERS, f"{first}:{second}"), name
    return full_name(ENCODERS, first), rest


# -- what is installed


@cache
def available(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Every name of a group with the entry points that claim it, our own first. Imports none of them."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(_installed(group), key=lambda p: (distribution(p) != OURS, p.name, distribution(p))):
        claims = found.setdefault(point.name, [])
        if (point.value, distribution(point)) not in [(claim.value, distribution(claim)) for claim in claims]:
            claims.append(point)  # an editable install can list a distribution twice
    return {name: tuple(points) for name, points in sorted(found.items())}


def _installed(group: str) -> list[EntryPoint]:
    try:
        return list(entry_points(group=group))
    except (TypeError, ValueError):  # some package's list of entry points cannot be read: without that package
        first = {_name_of(dist): dist for dist in reversed(list(distributions()))}
        return [point for dist in first.values() for point in _readable(dist) if point.group == group]


def _readable(dist: Distribution) -> list[EntryPoint]:
    try:
        return list(dist.entry_points)
    except (TypeError, ValueError):
        warnings.warn(f"the entry points of {_name_of(dist)} cannot be read; reinstall or uninstall it", Notice, stacklevel=1)
        return []


def groups() -> set[str]:
    """Every group of entry points that is called as ours are, also those that nobody asks for."""
    try:
        found = set(entry_points().groups)
    except (TypeError, ValueError):
        found = {point.group for dist in distributions() for point in _readable(dist)}
    return {group for group in found if group.startswith(f"{OURS}.")} | KINDS.keys()


def distribution(point: EntryPoint) -> str:
    """The name of the installed distribution that an entry point comes from, as package indexes normalise it."""
    return _name_of(point.dist)


@cache
def _name_of(dist: Distribution | None) -> str:
    name = None
    with suppress(OSError, KeyError):  # no metadata
        name = dist.name if dist is not None else None
    return canonical(name) if name else "unknown distribution"


def canonical(name: str) -> str:
    """The name of a distribution in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def claimed(group: str, name: str) -> tuple[EntryPoint, ...]:
    """What a name can stand for: the built-in alone, else all plugins that claim it; of ``dist:name``, that one."""
    owner, is_full, plain = name.rpartition(":")
    points = available(group).get(plain, ())
    if is_full:
        return tuple(point for point in points if distribution(point) == canonical(owner))[:1]
    return points[:1] if points and distribution(points[0]) == OURS else points


def full_name(group: str, name: str) -> str:
    """A name as runs record it; one that nobody claims, or several do, as it is."""
    owners = {distribution(point) for point in claimed(group, name)}
    if len(owners) != 1:
        return name
    owner, plain = owners.pop(), name.rpartition(":")[2]
    return plain if owner == OURS else f"{owner}:{plain}"


def to_write(group: str) -> dict[str, EntryPoint]:
    """Every entry point of a group by what is to be written for it: its name, or the full one where that is taken."""
    found = {}
    for name, points in available(group).items():
        owners = [distribution(point) for point in points]
        for owner, point in zip(owners, points, strict=True):
            found[name if owner == OURS or len(set(owners)) == 1 else f"{owner}:{name}"] = point
    return found


def state(point: EntryPoint) -> str:
    """``ok``, or why the plain name of a plugin's entry point does not give what it stands for. Imports nothing."""
    if point.group not in KINDS:
        return "unknown group"
    if set(point.name) & set(":?=+"):  # signs of specs, addresses and shares
        return "unusable name"
    owner, owners = distribution(point), {distribution(claim) for claim in available(point.group)[point.name]}
    if str(API) not in apis(owner):
        return "other API"
    if OURS in owners:
        return "shadowed by built-in"
    return "clash" if len(owners) > 1 else "ok"


def apis(owner: str) -> tuple[str, ...]:
    """The versions of the plugin interface that a distribution is written for: 1 where it says nothing."""
    said = [name for name, points in available(API_GROUP).items() if owner in map(distribution, points)]
    return tuple(said) or ("1",)


# -- what a run needs


def needs(names: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """What `require` has to know of the plugins among (group, name) pairs."""
    points = [point for group, name in sorted(set(names)) for point in claimed(group, name)[:1]]
    return [
        {"group": point.group, "name": point.name, "distribution": owner, "version": version_of(owner)}
        for point in points
        if (owner := distribution(point)) != OURS
    ]


def require(needs: Iterable[Mapping[str, str]], *, where: str) -> None:
    """Refuse an artefact whose encoders or method come from plugins that are not installed.

    Args:
        needs: as the artefact records them, see `needs`; of older ones without a version.

    Raises:
        PluginError: it names the distribution and the version to install.
    """
    for need in needs:
        owner, made_with = need["distribution"], need.get("version", "")
        if claimed(need["group"], f"{owner}:{need['name']}"):
            continue
        there = version_of(owner)
        state = f"does not in version {there}, which is installed" if there else "is not installed"
        package = f"{owner} {made_with}".strip()
        what = f"this run needs the plugin {package}, which brings {need['name']!r} and {state}"
        raise PluginError(3, what, where=where, fix=f"pip install {package.replace(' ', '==')}")


def version_of(owner: str) -> str:
    """The version of an installed distribution; empty if it is not installed."""
    try:
        return version(owner)
    except PackageNotFoundError:
        return ""


# -- loading


def load(group: str, name: str) -> Any:
    """What the entry point `name` of `group` stands for. A built-in wins over plugins of the same name.

    Raises:
        ConfigError: no such name (EncoderError for encoders); the nearest ones are offered.
        PluginError: several plugins claim the name, or the one that does is of another API or cannot be imported.
    """
    points = claimed(group, name)
    owners = sorted({distribution(point) for point in points})
    if not points:
        raise _unknown(group, name)
    if len(owners) > 1:
        more = ":NAME" if group == ENCODERS else ""
        fix = f"write {' or '.join(f'{owner}:{name}{more}' for owner in owners)}"
        if group == MODALITIES:  # encoders and columns give it by its plain name
            fix = "uninstall one of them"
        raise PluginError(1, f"the {KINDS[group]} {name!r} is claimed by {' and '.join(owners)}", fix=fix)
    if owners == [OURS]:
        _tell_of_shadowed(group, points[0].name)
        return points[0].load()
    _require_api(owners[0])
    return _load_plugin(points[0])


def _unknown(group: str, name: str) -> MopefuseError:
    owner, is_full, plain = name.rpartition(":")
    near, there = did_you_mean(name, to_write(group)), version_of(owner) if is_full else ""
    if there:
        return PluginError(5, f"{owner} {there} brings no {KINDS[group]} {plain!r}", where=name, fix=near)
    if is_full:
        return PluginError(6, f"the plugin {owner} is not installed", where=name, fix=near)
    if group == ENCODERS:
        return EncoderError(13, f"there is no scheme {name!r}", fix=near)
    return ConfigError(13, f"there is no {KINDS[group]} {name!r}", fix=near)


@cache
def _tell_of_shadowed(group: str, name: str) -> None:
    """Once, that plugins claim the name of a built-in."""
    others = sorted({distribution(point) for point in available(group)[name]} - {OURS})
    if others:
        what = f"the {KINDS[group]} {name!r} is the built-in one; that of {' and '.join(others)} is {others[0]}:{name}"
        warnings.warn(what, Notice, stacklevel=3)


def _require_api(owner: str) -> None:
    """Refuse a distribution that is written for other versions of the plugin interface."""
    said = apis(owner)
    if str(API) in said:
        return
    newer = all(one.isdecimal() and int(one) > API for one in said)
    what = f"{owner} is written for version {' and '.join(said)} of the plugin interface, this mopefuse has version {API}"
    raise PluginError(4, what, where=f"entry points {API_GROUP}", fix=f"upgrade {OURS if newer else owner}")


def _load_plugin(point: EntryPoint) -> Any:
    owner = distribution(point)
    try:
        with nothing_on_stdout():
            return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, and what test runners raise to skip
        said = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        what = f"the {KINDS[point.group]} {point.name!r} of {owner} cannot be imported: {said}"
        raise PluginError(2, what, where=point.value, fix=f"upgrade or uninstall {owner}") from error


@contextmanager
def nothing_on_stdout() -> Iterator[None]:
    """Stdout is for results: what is printed meanwhile, also by a process that is started, goes to stderr."""
    stdout, kept = sys.stdout, None
    stdout.flush()
    with suppress(OSError):  # a process may have neither
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        stdout.flush()
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)
