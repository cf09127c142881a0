"""Names to implementations: entry points, and the specs that users type.

Encoders, fusion methods and data sets are entry points of the groups below. The built-in ones are entry points of our
own distribution and come through the same door as plugins. Listing imports nothing; a clash or a broken plugin is an
error only for who asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mopefuse.errors import ConfigError, EncoderError, PluginError, did_you_mean

ENCODERS, FUSION, DATASETS = "mopefuse.encoders", "mopefuse.fusion", "mopefuse.datasets"
OURS = "mopefuse"


@dataclass(frozen=True)
class Spec:
    """``scheme:name[?key=value&...]``, parsed. Only the first colon counts: the name is the scheme's own business."""

    scheme: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        query = "&".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.scheme}:{self.name}" + (f"?{query}" if query else "")


def parse_spec(text: str) -> Spec:
    """`text` as a `Spec`.

    Raises:
        ConfigError: no scheme, no name, or options that are not distinct ``key=value`` pairs.
    """
    head, has_query, query = text.strip().partition("?")
    scheme, has_scheme, name = head.partition(":")
    if not (scheme and has_scheme and name):
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
    return Spec(scheme, name, options)


@cache
def available(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Every name of a group with the entry points that claim it, our own first. Imports none of them."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=group), key=lambda p: (distribution(p) != OURS, p.name)):
        claims = found.setdefault(point.name, [])
        if point not in claims:  # an editable install can list a distribution twice
            claims.append(point)
    return {name: tuple(points) for name, points in sorted(found.items())}


def distribution(point: EntryPoint) -> str:
    """The name of the installed distribution that an entry point comes from."""
    return point.dist.name if point.dist is not None else "unknown distribution"


def require(needs: Iterable[Mapping[str, str]], *, where: str) -> None:
    """Refuse an artefact whose encoders or method come from plugins that are not installed.

    Args:
        needs: ``group``, ``name`` and ``distribution`` of the entry points, as the artefact records them.

    Raises:
        PluginError: it names the distribution to install.
    """
    for need in needs:
        if need["name"] not in available(need["group"]):
            what = f"this run needs the plugin {need['distribution']}, which brings {need['name']!r} and is not installed"
            raise PluginError(3, what, where=where, fix=f"pip install {need['distribution']}")


def load(group: str, name: str) -> Any:
    """What the entry point `name` of `group` stands for. A built-in wins over plugins of the same name.

    Raises:
        ConfigError: no such name (EncoderError for encoders); the nearest ones are offered.
        PluginError: two plugins claim the name, or the one that does cannot be imported.
    """
    points = available(group).get(name, ())
    kind = group.partition(".")[2].rstrip("s")
    if not points:
        if group == ENCODERS:
            raise EncoderError(13, f"there is no scheme {name!r}", fix=did_you_mean(name, available(group)))
        raise ConfigError(13, f"there is no {kind} {name!r}", fix=did_you_mean(name, available(group)))
    if len(points) > 1 and distribution(points[0]) != OURS:
        owners = " and ".join(distribution(point) for point in points)
        raise PluginError(1, f"the {kind} {name!r} is claimed by {owners}", fix="uninstall one of them")
    point = points[0]
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        if distribution(point) == OURS:
            raise
        raise PluginError(
            2,
            f"the {kind} {name!r} of {distribution(point)} cannot be imported: {type(error).__name__}: {error}",
            where=point.value,
            fix=f"upgrade or uninstall {distribution(point)}",
        ) from error
