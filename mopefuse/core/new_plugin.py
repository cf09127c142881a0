"""Plugins: what is installed, found out without importing any, and a complete one to begin with."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import unicodedata
from pathlib import Path
from string import Template
from typing import NamedTuple

from mopefuse.core import registry
from mopefuse.errors import PluginError

SKELETON = Path(__file__).parent / "skeleton"
_FILES = {  # of the skeleton, to where they go
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "module.py.txt": "$module.py",
    "test.py.txt": "tests/test_$module.py",
}


class Plugin(NamedTuple):
    """An entry point that is not our own."""

    distribution: str
    version: str
    group: str
    name: str
    value: str
    state: str  # "ok", or why its plain name does not give it; see `registry.state`


def installed() -> list[Plugin]:
    """Every entry point of a plugin, also those that cannot be used. Imports none of them."""
    groups = registry.groups() - {registry.API_GROUP}
    points = [point for group in groups for claims in registry.available(group).values() for point in claims]
    found = []
    for point in points:
        owner = registry.distribution(point)
        if owner != registry.OURS:
            state = registry.state(point)
            found.append(Plugin(owner, registry.version_of(owner), point.group, point.name, point.value, state))
    return sorted(found)


def new(name: str, out: Path) -> Path:
    """Write the package ``mopefuse-<name>`` into the folder `out`: an encoder, its test, a README.

    The folder appears whole or not at all.

    Returns:
        The folder of the package.

    Raises:
        PluginError: `name` is no name for a package or that of a built-in, or there is something where it would go.
    """
    _check_name(name)
    folder = out / f"mopefuse-{name}"
    if os.path.lexists(folder):
        raise PluginError(10, f"{folder} is there already", where="--out", fix="name another folder, or move that one away")
    if not out.is_dir():
        raise PluginError(11, f"there is no folder {out}", where="--out", fix="make it, or name another folder")
    words = {"name": name, "module": f"mopefuse_{name.replace('-', '_')}", "api": str(registry.API)}
    words["encoder"] = "".join(part.capitalize() for part in name.split("-")) + "Encoder"
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{folder.name}-") as beside:
        building = Path(beside) / "new"
        for source, target in _FILES.items():
            path = building / Template(target).substitute(words)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = (SKELETON / source).read_text(encoding="utf-8")
            path.write_text(Template(text).substitute(words), encoding="utf-8", newline="\n")
        shutil.move(building, folder)
    return folder


def _check_name(name: str) -> None:
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    nearest = re.sub("[^a-z0-9]+", "-", ascii_only.lower()).strip("-").removeprefix("mopefuse-")
    nearest = re.sub("^[0-9-]+", "", nearest)
    if name != nearest or not name:
        fix = f"write {nearest}" if nearest else "write a word, for example audio"
        what = f"{name!r} is no name for a plugin: lower-case letters, digits and single hyphens, a letter first"
        raise PluginError(8, what, where="NAME", fix=fix)
    if registry.claimed(registry.ENCODERS, name) and registry.full_name(registry.ENCODERS, name) == name:
        raise PluginError(9, f"{name} is a built-in encoder scheme", where="NAME", fix=f"write {name}-2 or another name")
