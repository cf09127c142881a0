"""Plugins that are really installed by pip, into their own folder: valid ones, and every kind of broken one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from mopefuse.core import registry

MARK = "import pathlib; pathlib.Path(__file__).with_suffix('.imported').touch()\n"
ENCODER = """
from mopefuse.encoders import Spec
from mopefuse.encoders.tiny import TinyEncoder

class Toy(TinyEncoder):
    factor = {factor}

    def __init__(self, spec):
        super().__init__(Spec("tiny", spec.name, spec.options))
        self.spec = spec
        self.norm.weight.data.mul_(self.factor)
"""
BOTH = """
from mopefuse.fusion.late_concat import LateConcat

class Both(LateConcat):
    pass

def make(folder, *, seed=0):
    return {{"{who}": seed}}
"""
TALKS = """
import os, subprocess, sys
print("from print")
sys.__stdout__.write("from sys.__stdout__")
os.write(1, b"from the descriptor")
subprocess.run(["echo", "from a process"])
"""
GREETS = """
class Greets(Toy):
    def __init__(self, spec):
        super().__init__(spec)
        print("from the constructor")
"""
_SITES: set[str] = set()
ENCODERS, FUSION, DATASETS = "mopefuse.encoders", "mopefuse.fusion", "mopefuse.datasets"
CLAIMS = {ENCODERS: {"toy": "Toy"}, FUSION: {"both": "Both"}, DATASETS: {"made": "make"}}
PLUGINS: dict[str, tuple[dict[str, dict[str, str]], str]] = {
    "one": (CLAIMS, ENCODER.format(factor=1) + BOTH.format(who="one")),
    "two": (CLAIMS, ENCODER.format(factor=2) + BOTH.format(who="two")),
    "evil": ({ENCODERS: {"tiny": "Toy"}}, ENCODER.format(factor=3)),
    "raises": ({ENCODERS: {"raises": "X"}}, "raise RuntimeError('no such device\\nsecond line')"),
    "exits": ({ENCODERS: {"exits": "X"}}, "import sys; sys.exit(0)"),
    "hangs": ({ENCODERS: {"hangs": "X"}}, "import time\nwhile True: time.sleep(1)"),
    "talks": ({ENCODERS: {"talks": "Greets"}}, TALKS + ENCODER.format(factor=1) + GREETS),
    "lost": ({"mopefuse.encoder": {"lost": "Toy"}, FUSION: {"no-method": "Toy"}}, "Toy = 7"),
}
"""Suffix of a distribution to its entry points (the value is an attribute of its module) and its module."""


def module_of(plugin: str) -> str:
    """Return the module of a plugin."""
    return f"mopefuse_{plugin.replace('-', '_')}"


def sources(folder: Path, plugins: Iterable[str]) -> list[Path]:
    """Write a project folder for each plugin, as its author would have it."""
    projects = []
    for plugin in plugins:
        points, code = PLUGINS[plugin]
        project, module = folder / plugin, module_of(plugin)
        project.mkdir(parents=True)
        lines = ["[build-system]", 'requires = ["setuptools"]', 'build-backend = "setuptools.build_meta"', "[project]"]
        lines += [f'name = "Mopefuse_{plugin}"', 'version = "1.5"', f"[tool.setuptools]\npy-modules = [{module!r}]"]
        for group, names in points.items():
            lines.append(f'[project.entry-points."{group}"]')
            lines += [f'{name} = "{module}{attribute and f":{attribute}"}"' for name, attribute in names.items()]
        (project / "pyproject.toml").write_text("\n".join(lines))
        (project / f"{module}.py").write_text(MARK + code)
        projects.append(project)
    return projects


def pip_install(target: Path, *projects: Path) -> Path:
    """Install into a folder without a network."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *map(str, projects)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all of `PLUGINS` are installed; tests must not change it, except for the marks of imported
    plugins."""
    folder = tmp_path_factory.mktemp("plugins")
    return pip_install(folder / "site", *sources(folder / "projects", PLUGINS))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For plugins in this process: add a folder to the path with `add_site`; undone afterwards."""
    yield monkeypatch
    monkeypatch.undo()
    forget()


def forget() -> None:
    """Clear the caches of what is installed."""
    registry.available.cache_clear()
    registry._warn_of_shadowed.cache_clear()
    for name, module in list(sys.modules.items()):
        if str(Path(getattr(module, "__file__", None) or "/").parent) in _SITES:
            del sys.modules[name]


def add_site(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make the plugins that are installed in a folder available in this process."""
    monkeypatch.syspath_prepend(str(folder))
    _SITES.add(str(folder))
    forget()


def imported(site: Path) -> set[str]:
    """Return the modules of plugins that were imported since the last call."""
    marks = list(site.glob("*.imported"))
    for mark in marks:
        mark.unlink()
    return {mark.stem.removeprefix("mopefuse_") for mark in marks}
