"""Plugins: a list of those installed, without importing them, and a template for a new one."""

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
from mopefuse.core.error_codes import PluginCode
from mopefuse.errors import PluginError

SKELETON = Path(__file__).parent / "skeleton"
_FILES = {  # files of the skeleton, by target path
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "module.py.txt": "$module.py",
    "test.py.txt": "tests/test_$module.py",
}


class Plugin(NamedTuple):
    """An entry point of another distribution than mopefuse."""

    distribution: str
    version: str
    group: str
    name: str
    value: str
    state: str  # "ok", or the reason why its plain name does not resolve to it; see `registry.resolution_status`


def installed() -> list[Plugin]:
    """List every entry point of a plugin, including unusable ones, without importing them."""
    points = [point for group in registry.groups() for claims in registry.available(group).values() for point in claims]
    found = []
    for point in points:
        owner = registry.distribution(point)
        if owner != registry.OURS:
            state = registry.resolution_status(point)
            found.append(Plugin(owner, registry.version_of(owner), point.group, point.name, point.value, state))
    return sorted(found)


def new(name: str, out: Path) -> Path:
    """Write the package ``mopefuse-<name>`` atomically into the folder `out`: an encoder, its test, a README.

    Returns:
        The folder of the package.

    Raises:
        PluginError: `name` is not a valid package name or is a built-in scheme, or the folder exists, or `out` does not.
    """
    _check_name(name)
    folder = out / f"mopefuse-{name}"
    if os.path.lexists(folder):
        raise PluginError(
            PluginCode.FOLDER_EXISTS,
            f"{folder} already exists",
            where="--out",
            fix="choose a different folder, or remove this one",
        )
    if not out.is_dir():
        raise PluginError(
            PluginCode.NO_PARENT_FOLDER,
            f"folder not found: {out}",
            where="--out",
            fix="create it, or choose a different folder",
        )
    words = {"name": name, "module": f"mopefuse_{name.replace('-', '_')}"}
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
        fix = f"write {nearest}" if nearest else "choose a single word, for example audio"
        what = f"{name!r} is not a valid plugin name: use lower-case letters, digits and single hyphens, starting with a letter"
        raise PluginError(PluginCode.BAD_NAME, what, where="NAME", fix=fix)
    if registry.find_candidates(registry.ENCODERS, name) and registry.full_name(registry.ENCODERS, name) == name:
        raise PluginError(
            PluginCode.BUILT_IN_NAME,
            f"{name} is a built-in encoder scheme",
            where="NAME",
            fix=f"choose a different name, such as {name}-2",
        )
