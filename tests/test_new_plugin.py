"""Starting a plugin: the package that ``mopefuse plugins new`` writes, and the names that are public."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, run_cli
from plugin_cases import add_site, pip_install

from mopefuse.core import new_plugin as plugins
from mopefuse.errors import PluginError

pytest_plugins = ["plugin_cases"]


def stdout_json(done: subprocess.CompletedProcess[str]) -> Any:
    """Parse stdout as a single JSON value."""
    return json.loads(done.stdout)



@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A new plugin as written, and where it is installed."""
    folder = tmp_path_factory.mktemp("new")
    done = call("plugins", "new", "mel-2", "--out", folder, "--json")
    assert done.returncode == 0, done.stderr
    package = folder / "mopefuse-mel-2"
    assert stdout_json(done) == {"ok": True, "folder": str(package)}
    return package, pip_install(folder / "site", package)


def test_a_new_plugin_is_a_complete_package(fresh: tuple[Path, Path]) -> None:
    files = {"pyproject.toml", "README.md", "mopefuse_mel_2.py", "tests/test_mopefuse_mel_2.py"}
    assert files <= {str(path.relative_to(fresh[0])) for path in fresh[0].rglob("*")}
    assert [path.name for path in fresh[0].parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.process
def test_a_new_plugin_passes_its_own_test_and_can_be_inspected(fresh: tuple[Path, Path], tmp_path: Path) -> None:
    package, site = fresh
    environment = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package / "tests")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    done = run_cli("encoders", "inspect", "mel-2:small", "--json", **environment)
    assert done.returncode == 0, done.stderr
    facts = stdout_json(done)
    assert (facts["spec"], facts["use"], facts["modality"]) == ("mopefuse-mel-2:mel-2:small", "main or comp", "text")
    listed = stdout_json(run_cli("plugins", "list", "--json", **environment))["plugins"]
    assert ("mopefuse-mel-2", "0.1.0", "mel-2", "ok") in [
        (p["distribution"], p["version"], p["name"], p["state"]) for p in listed
    ]


@pytest.mark.process
def test_the_contract_test_of_a_new_plugin_can_fail(fresh: tuple[Path, Path], tmp_path: Path) -> None:
    """With attention to padding, a text's features depend on its batch."""
    package = shutil.copytree(fresh[0], tmp_path / "package")
    module = package / "mopefuse_mel_2.py"
    code = module.read_text()
    assert code.count("attn_mask=mask_B11L") == 1
    module.write_text(code.replace("attn_mask=mask_B11L", "attn_mask=None"))
    command = [sys.executable, "-c", "import mopefuse.testing as t; t.check_encoder('mel-2:small')"]
    paths = f"{package}{os.pathsep}{fresh[1]}"
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert "depends on the rest of its batch" in done.stderr or "gives a different feature" in done.stderr


def test_a_new_plugin_trains_as_either_encoder(
    fresh: tuple[Path, Path], pairs: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    add_site(here, fresh[1])
    for main, comp in (("mel-2:small", "tiny:vision"), ("tiny:vision", "mel-2:small")):
        run = tmp_path / main.partition(":")[0]
        done = call("train", *TINY[4:], "--main", main, "--comp", comp, "--data", pairs, "--out", run, "--steps", 2)
        assert done.returncode == 0, done.stderr
        assert call("eval", run).returncode == 0


def test_a_new_plugin_imports_only_public_names(fresh: tuple[Path, Path]) -> None:
    modules = re.findall(r"(?:from|import) ([\w.]+)", (fresh[0] / "mopefuse_mel_2.py").read_text())
    assert "mopefuse.encoders" in modules
    assert [name for name in modules if "._" in name] == []


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("Audio", "write audio"),
        ("my audio", "write my-audio"),
        ("audio_net", "write audio-net"),
        ("--audio--", "write audio"),
        ("2d", "write d"),
        ("mopefuse-audio", "write audio"),
        ("../evil", "write evil"),
        ("a/b", "write a-b"),
        ("été", "write ete"),
        ("a\nb", "write a-b"),
        ("audio\n", "write audio"),
        ("", "choose a single word, for example audio"),
        ("音", "choose a single word, for example audio"),
        ("tiny", "choose a different name, such as tiny-2"),
    ],
)
def test_an_invalid_package_name_is_refused_with_a_suggestion(tmp_path: Path, name: str, fix: str) -> None:
    with pytest.raises(PluginError) as caught:
        plugins.new(name, tmp_path)
    assert caught.value.fix == fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_new_plugin_overwrites_nothing(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "mopefuse-audio"
    {"folder": place.mkdir, "file": place.touch, "dangling link": lambda: place.symlink_to("nowhere")}[kind]()
    done = call("plugins", "new", "audio", "--out", tmp_path)
    assert (done.returncode, done.stderr[:19]) == (9, "error[MF-PLUG-10]: ")
    assert list(tmp_path.iterdir()) == [place]
    assert place.is_symlink() == (kind == "dangling link")


def test_a_new_plugin_needs_an_existing_folder(tmp_path: Path) -> None:
    done = call("plugins", "new", "audio", "--out", tmp_path / "nowhere")
    assert (done.returncode, done.stderr[:19]) == (9, "error[MF-PLUG-11]: ")
    assert list(tmp_path.iterdir()) == []


# -- names that plugin authors import


@pytest.mark.parametrize("package", ["mopefuse.encoders", "mopefuse.fusion"])
@pytest.mark.process
def test_public_names_exist_and_are_imported_lazily(package: str) -> None:
    code = (
        f"import sys, {package} as p; assert 'torch' not in sys.modules; "
        "assert all(hasattr(p, name) for name in p.__all__); assert 'torch' in sys.modules; p.Nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"AttributeError: module '{package}' has no attribute 'Nothing'" in done.stderr
