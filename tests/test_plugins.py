"""Really installed plugins: what valid ones can do, and that broken ones do not affect anything else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, run_cli
from plugin_cases import PLUGINS, add_site, imported, module_of

from mopefuse.core import doctor, registry
from mopefuse.errors import ConfigError, PluginError

pytest_plugins = ["plugin_cases"]
STATES = {
    ("mopefuse.encoder", "lost", "lost"): "unknown group",
    ("mopefuse.encoders", "evil", "tiny"): "shadowed by built-in",
    ("mopefuse.encoders", "exits", "exits"): "ok",
    ("mopefuse.encoders", "hangs", "hangs"): "ok",
    ("mopefuse.encoders", "one", "toy"): "clash",
    ("mopefuse.encoders", "raises", "raises"): "ok",
    ("mopefuse.encoders", "talks", "talks"): "ok",
    ("mopefuse.encoders", "two", "toy"): "clash",
    ("mopefuse.fusion", "lost", "no-method"): "ok",
    ("mopefuse.fusion", "one", "both"): "clash",
    ("mopefuse.fusion", "two", "both"): "clash",
    ("mopefuse.datasets", "one", "made"): "clash",
    ("mopefuse.datasets", "two", "made"): "clash",
}


def stdout_json(done: subprocess.CompletedProcess[str]) -> Any:
    """Parse stdout as a single JSON value."""
    return json.loads(done.stdout)


def only(site: Path, tmp_path: Path, *plugins: str) -> Path:
    """A folder in which only some of the plugins are installed."""
    folder = tmp_path / "-".join(["site", *plugins])
    folder.mkdir()
    for plugin in plugins:
        shutil.copy(site / f"{module_of(plugin)}.py", folder)
        (info,) = site.glob(f"{module_of(plugin)}-*.dist-info")
        shutil.copytree(info, folder / info.name)
    return folder


# -- broken plugins are listed and do not affect anything else


@pytest.mark.parametrize("args", [("plugins", "list"), ("plugins", "list", "--json"), ("encoders",), ("encoders", "--json")])
@pytest.mark.process
def test_listing_imports_no_plugin(site: Path, args: tuple[str, ...]) -> None:
    imported(site)
    done = run_cli(*args, PYTHONPATH=str(site))
    assert (done.returncode, done.stderr) == (0, "")
    missing = [name for name in PLUGINS if f"mopefuse-{name}" not in done.stdout and (name != "lost" or args[0] == "plugins")]
    assert missing == []
    assert imported(site) == set()


@pytest.mark.process
def test_the_list_shows_what_each_entry_point_resolves_to(site: Path) -> None:
    listed = stdout_json(run_cli("plugins", "list", "--json", PYTHONPATH=str(site)))
    found = {(p["group"], p["distribution"].removeprefix("mopefuse-"), p["name"]): p["state"] for p in listed["plugins"]}
    assert {claim: state for claim, state in found.items() if claim[1] in PLUGINS} == STATES
    toy = next(p for p in listed["plugins"] if (p["distribution"], p["name"]) == ("mopefuse-two", "toy"))
    assert (toy["version"], toy["value"]) == ("1.5", "mopefuse_two:Toy")


def test_without_plugins_the_list_explains_how_to_start(here: pytest.MonkeyPatch) -> None:
    here.setattr(registry, "distribution", lambda point: registry.OURS)
    assert "mopefuse plugins new" in call("plugins", "list").stdout
    assert stdout_json(call("plugins", "list", "--json"))["plugins"] == []


def test_built_ins_work_next_to_broken_plugins(site: Path) -> None:
    imported(site)
    done = run_cli("encoders", "inspect", "tiny:vision", "--json", PYTHONPATH=str(site))
    assert done.returncode == 0
    assert stdout_json(done)["fingerprint"] == stdout_json(call("encoders", "inspect", "tiny:vision", "--json"))["fingerprint"]
    assert done.stderr == (
        "notice: the built-in encoder scheme 'tiny' is used; for that of mopefuse-evil, write mopefuse-evil:tiny\n"
    )
    assert imported(site) == set()


@pytest.mark.parametrize(
    ("plugin", "reason"), [("raises", "RuntimeError: no such device"), ("exits", "SystemExit: 0")]
)
def test_a_plugin_that_cannot_be_imported_is_a_one_line_error_when_it_is_used(
    site: Path, plugin: str, reason: str
) -> None:
    done = run_cli("encoders", "inspect", f"{plugin}:x", PYTHONPATH=str(site))
    assert (done.returncode, done.stdout) == (9, "")
    assert done.stderr == (
        f"error[MF-PLUG-02]: the encoder scheme '{plugin}' of mopefuse-{plugin} cannot be imported: {reason} · "
        f"mopefuse_{plugin}:X · fix: upgrade or uninstall mopefuse-{plugin}\n"
    )


def test_output_of_a_plugin_is_not_mixed_with_results(site: Path, here: pytest.MonkeyPatch) -> None:
    done = run_cli("encoders", "inspect", "talks:vision", "--json", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert stdout_json(done)["modality"] == "image"
    for said_by_it in ("from print", "from sys.__stdout__", "from the descriptor", "from a process", "from the constructor"):
        assert said_by_it in done.stderr
    add_site(here, site)
    done = call("encoders", "inspect", "talks:vision", "--json")  # where sys.stdout is not the file descriptor
    assert stdout_json(done)["modality"] == "image"
    assert "from print" in done.stderr and "from the constructor" in done.stderr


@pytest.mark.process
def test_a_plugin_that_hangs_is_stopped_by_ctrl_c(site: Path) -> None:
    imported(site)
    command = [sys.executable, "-m", "mopefuse", "encoders", "inspect", "hangs:x"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(site)}, text=True, **pipes) as process:
        until = time.monotonic() + 60
        while "hangs" not in imported(site) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("stopped: by Ctrl-C")


def test_doctor_names_the_entry_points_that_fail_or_hang(site: Path, tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    broken = only(site, tmp_path, "raises", "hangs")
    add_site(here, broken)
    here.setenv("PYTHONPATH", str(broken))
    here.setattr(doctor, "_CHECKS", {})
    here.setattr(doctor, "_DEVICES", "")
    here.setattr(doctor, "_TIMEOUT", 3)
    problems = stdout_json(call("doctor", "--json"))["problems"]
    assert [problem for problem in problems if "hangs = mopefuse_hangs:X of mopefuse-hangs: no result within" in problem]
    assert [problem for problem in problems if "raises = mopefuse_raises:X of mopefuse-raises: " in problem]
    assert len([problem for problem in problems if "raises" in problem or "hangs" in problem]) == 2


def test_a_package_with_unreadable_entry_points_is_ignored(
    site: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    folder = only(site, tmp_path, "one", "talks")
    (info,) = folder.glob("mopefuse_talks-*")
    (info / "entry_points.txt").write_text("[anything]\nno equals sign\n")
    add_site(here, folder)
    with pytest.warns(UserWarning, match="talks cannot be read"):
        assert "toy" in registry.available(registry.ENCODERS)
    done = run_cli("plugins", "list", "--json", PYTHONPATH=str(folder))
    listed = {plugin["distribution"] for plugin in stdout_json(done)["plugins"]}
    assert {"mopefuse-one", "mopefuse-talks"} & listed == {"mopefuse-one"}
    assert done.stderr == "notice: the entry points of mopefuse-talks cannot be read; reinstall or uninstall it\n"
    assert {"tiny", "timm"} <= registry.available(registry.ENCODERS).keys()


# -- name conflicts


@pytest.mark.parametrize(
    ("args", "code", "what", "fix"),
    [
        (
            ("encoders", "inspect", "toy:vision"), "MF-PLUG-01",
            "the encoder scheme 'toy' is provided by mopefuse-one and mopefuse-two",
            "write mopefuse-one:toy:NAME or mopefuse-two:toy:NAME",
        ),
        (
            ("data", "make", "made", "{tmp}"), "MF-PLUG-01",
            "the data set 'made' is provided by mopefuse-one and mopefuse-two", "write mopefuse-one:made or mopefuse-two:made",
        ),
        (
            ("train", *TINY, "--data", "{pairs}", "--out", "{tmp}/run", "--method", "both"), "MF-PLUG-01",
            "the fusion method 'both' is provided by mopefuse-one and mopefuse-two",
            "write mopefuse-one:both or mopefuse-two:both",
        ),
        (
            ("encoders", "inspect", "mopefuse-one:toys:vision"), "MF-PLUG-05",
            "mopefuse-one 1.5 provides no encoder scheme 'toys'", "did you mean mopefuse-one:toy, ",
        ),
        (
            ("data", "make", "mopefuse-ten:made", "{tmp}"), "MF-PLUG-06",
            "the plugin mopefuse-ten is not installed", "did you mean mopefuse-two:made, mopefuse-one:made?",
        ),
        (
            ("train", *TINY, "--data", "{pairs}", "--out", "{tmp}/run", "--method", "no-method"), "MF-PLUG-07",
            "the fusion method 'no-method' is not a subclass of mopefuse.fusion.Fusion", "fix the plugin, or uninstall it",
        ),
    ],
)  # fmt: skip
def test_an_unusable_name_is_an_error_that_says_what_to_write(
    site: Path, pairs: Path, tmp_path: Path, here: pytest.MonkeyPatch, args: tuple[str, ...], code: str, what: str, fix: str
) -> None:
    add_site(here, site)
    done = call(*(str(arg).format(tmp=tmp_path, pairs=pairs) for arg in args), "--json")
    error = stdout_json(done)["error"]
    assert (done.returncode, error["code"], error["message"]) == (9, code, what)
    assert error["hint"].startswith(fix)


@pytest.mark.parametrize(("owner", "factor"), [("one", 1), ("two", 2), ("evil", 3)])
def test_a_full_name_selects_the_encoder_of_its_distribution(
    site: Path, here: pytest.MonkeyPatch, owner: str, factor: int
) -> None:
    from mopefuse.encoders import create_encoder

    add_site(here, site)
    scheme = f"mopefuse-{owner}:{'tiny' if owner == 'evil' else 'toy'}"
    encoder = create_encoder(f"{scheme}:vision?pool=mean")
    assert (encoder.factor, str(encoder.spec)) == (factor, f"{scheme}:vision?pool=mean")


def test_a_full_name_accepts_any_spelling_of_the_distribution(site: Path, here: pytest.MonkeyPatch) -> None:
    add_site(here, site)
    assert str(registry.parse_spec("Mopefuse_ONE:toy:vision")) == "mopefuse-one:toy:vision"
    assert registry.full_name(registry.FUSION, "Mopefuse.Two:both") == "mopefuse-two:both"


@pytest.mark.parametrize("owner", ["one", "two"])
def test_a_full_name_selects_the_data_set_of_its_distribution(
    site: Path, tmp_path: Path, here: pytest.MonkeyPatch, owner: str
) -> None:
    add_site(here, site)
    assert stdout_json(call("data", "make", f"mopefuse-{owner}:made", tmp_path, "--seed", 5, "--json"))["rows"] == {owner: 5}


# -- runs


def test_a_run_keeps_its_plugins_regardless_of_later_installations(
    site: Path, pairs: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    """Trained by plain names when only one plugin provided them; a second plugin makes the names ambiguous, but not the run."""
    run, swapped = tmp_path / "run", tmp_path / "swapped"
    plain = ("train", *TINY, "--main", "toy:vision", "--method", "both", "--data", pairs, "--out", run)
    add_site(here, only(site, tmp_path, "one"))
    done = call(*plain, "--steps", 1)
    assert done.returncode == 0, done.stderr
    config = (run / "config.yaml").read_text()
    assert "main: mopefuse-one:toy:vision\n" in config
    assert "method: mopefuse-one:both\n" in config
    manifest = json.loads((run / "manifest.json").read_text())
    of = {"distribution": "mopefuse-one", "version": "1.5"}
    assert manifest["plugins"] == [
        {"group": "mopefuse.encoders", "name": "toy", **of}, {"group": "mopefuse.fusion", "name": "both", **of}
    ]  # fmt: skip
    assert manifest["encoders"]["main"]["spec"] == "mopefuse-one:toy:vision"
    assert call(*plain, "--steps", 2, "--resume").returncode == 0, "a plain name is not a change of the recorded one"
    add_site(here, site)
    assert call("eval", run).returncode == 0
    full = ("--main", "mopefuse-one:toy:vision", "--method", "mopefuse-one:both")
    assert call("train", *TINY, *full, "--data", pairs, "--out", run, "--steps", 3, "--resume").returncode == 0
    assert call("swap-encoder", run, "--main", "toy:vision", "-o", swapped).returncode == 9
    done = call("swap-encoder", run, "--main", "mopefuse-two:toy:vision", "-o", swapped)
    assert done.returncode == 0, done.stderr
    assert json.loads((swapped / "swap.json").read_text())["encoders"]["main"] == "mopefuse-two:toy:vision"
    assert [need["distribution"] for need in json.loads((swapped / "manifest.json").read_text())["plugins"]] == [
        "mopefuse-two", "mopefuse-one"
    ]  # fmt: skip


def test_a_run_recorded_with_plain_names_can_be_resumed(
    site: Path, pairs: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    add_site(here, only(site, tmp_path, "one"))
    command = ("train", *TINY, "--main", "toy:vision", "--data", pairs, "--out", run)
    assert call(*command, "--steps", 1).returncode == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("mopefuse-one:toy:", "toy:"))
    assert "main: toy:vision\n" in config.read_text()
    done = call(*command, "--steps", 2, "--resume")
    assert done.returncode == 0, done.stderr


NEED = {"group": "mopefuse.encoders", "name": "toy", "distribution": "mopefuse-ten", "version": "0.3"}


@pytest.mark.parametrize(
    ("need", "what", "fix"),
    [
        ({}, "mopefuse-ten 0.3, which provides 'toy'; it is not installed", "pip install mopefuse-ten==0.3"),
        ({"version": ""}, "mopefuse-ten, which provides 'toy'; it is not installed", "pip install mopefuse-ten"),
        (
            {"distribution": "mopefuse-talks"},
            "mopefuse-talks 0.3, which provides 'toy'; the installed version 1.5 does not provide it",
            "pip install mopefuse-talks==0.3",
        ),
    ],
)
def test_a_missing_plugin_is_an_error_with_the_version_to_install(
    site: Path, here: pytest.MonkeyPatch, need: dict[str, str], what: str, fix: str
) -> None:
    """A plugin of the same name from another distribution is not accepted instead."""
    add_site(here, site)
    with pytest.raises(PluginError) as caught:
        registry.require([NEED | need], where="runs/a")
    assert (caught.value.code, caught.value.what) == ("MF-PLUG-03", f"this run needs the plugin {what}")
    assert (caught.value.where, caught.value.fix) == ("runs/a", fix)


def test_a_plugin_of_the_recorded_distribution_is_accepted(site: Path, here: pytest.MonkeyPatch) -> None:
    add_site(here, site)
    registry.require([NEED | {"distribution": owner} for owner in ("mopefuse-one", "Mopefuse_Two")], where="")


# -- unknown names


def test_an_unknown_name_gives_a_suggestion_that_works(site: Path, here: pytest.MonkeyPatch) -> None:
    add_site(here, site)
    with pytest.raises(ConfigError) as caught:
        registry.load(registry.FUSION, "bothh")
    assert caught.value.what == "unknown fusion method 'bothh'"
    names = registry.shortest_names(registry.FUSION)
    assert "both" not in names
    assert {"mopefuse-one:both", "mopefuse-two:both", "conditional"} <= names.keys()
