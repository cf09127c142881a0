"""SIGKILL at every moment of a write: no partial file has a final name, the next call succeeds, and nothing is left over.

A moment is a change in the watched folder: a file is opened for writing, and the process dies before writing to it; or
a folder is created or a name changed or removed, and the process dies before that.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dying
import pytest
from conftest import call, make_pairs, matrix, warm_server
from dying import die_at
from forks import end_of, fork
from PIL import Image
from prepare_cases import food101
from test_study import write_study
from test_train import config

from mopefuse.core import cache
from mopefuse.core.artifact import read_json, verify
from mopefuse.data.collate import Samples
from mopefuse.data.load import load_data
from mopefuse.data.sets.digit_questions import make
from mopefuse.encoders.base import create_encoder
from mopefuse.studies.compare import study_facts
from mopefuse.studies.study_file import STUDY_FILE
from mopefuse.training.train import train

MOMENTS = (0, 1, 2, 3, 5, 7, 10, 14, 19, 25, 32, 40, 60, 90, 130, 200)
Action = Callable[[], Any]


def kill_often(
    action: Action | tuple[object, ...],
    watched: Path,
    check: Action,
    *,
    at_least: int = 4,
    moments: tuple[int, ...] = MOMENTS,
) -> int:
    """Repeat an action and kill it, each time a little later, until it finishes; return the number of kills.

    Args:
        action: a function, called in forks of this process, or the arguments of a command that uses libraries which may have
            started threads in this process and would wait for them in a fork, as vl_convert does.
    """
    for kills, moment in enumerate(moments):

        def doomed(moment: int = moment) -> None:
            assert callable(action)
            die_at(moment, watched)
            action()

        if callable(action):
            code = end_of(fork(doomed))
        else:
            code = warm_server().run([dying.__file__, str(moment), str(watched), *map(str, action)]).returncode
        check()
        if code == 0:
            assert kills >= at_least, "it finished before it could be killed often enough"
            assert list(watched.rglob("*.tmp-*")) == [], "something is left over"
            return kills
        assert code == -signal.SIGKILL
    raise AssertionError("it never came to its end")


def cli(*arguments: object) -> Action:
    def run() -> None:
        done = call(*arguments)
        if done.returncode:
            raise AssertionError(done.stderr)

    return run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache for each test, so that each test writes to it."""
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- commands


def test_a_killed_export_leaves_no_partial_files(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def whole() -> None:
        if (out / "adapter").exists():
            verify(out / "adapter", kind="adapter")

    def export() -> None:
        if not (out / "adapter").exists():
            cli("export", trained, "--format", "adapter", "-o", out / "adapter")()

    out.mkdir()
    kill_often(export, out, whole)
    assert call("export", "verify", out / "adapter").returncode == 0


@pytest.mark.soak
def test_a_killed_export_over_an_earlier_one_keeps_or_restores_it(trained: Path, tmp_path: Path) -> None:
    """The earlier export exists until the new one does, except between two renames, and then it is restored."""
    out = tmp_path / "out"
    out.mkdir()
    again = ("export", trained, "--format", "adapter", "-o", out / "adapter")
    assert call(*again).returncode == 0
    missing = 0

    def whole() -> None:
        nonlocal missing
        missing += not (out / "adapter").exists()
        if not (out / "adapter").exists():
            refused = call(*again)
            assert (refused.returncode, "--overwrite" in refused.stderr) == (3, True), "it was restored"
        verify(out / "adapter", kind="adapter")

    kill_often(cli(*again, "--overwrite"), out, whole)
    assert missing <= 1


@pytest.mark.parametrize("name", matrix(["predictions.jsonl", "predictions.csv"], ["predictions.jsonl"]))
def test_a_killed_predict_leaves_no_partial_file(trained: Path, pairs: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "out").mkdir()
    assert call("predict", trained, pairs / "test.jsonl", "-o", tmp_path / "whole" / name).returncode == 0
    expected = (tmp_path / "whole" / name).read_text()
    out = tmp_path / "out" / name

    def whole() -> None:
        assert not out.exists() or out.read_text() == expected

    kill_often(cli("predict", trained, pairs / "test.jsonl", "-o", out), out.parent, whole, at_least=2)
    assert out.read_text() == expected


@pytest.mark.soak
def test_a_killed_report_leaves_no_partial_page(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def whole() -> None:
        for file in out.rglob("*"):
            if file.suffix in (".html", ".svg"):
                assert file.read_text().rstrip().endswith(("</html>", "</svg>")), file
            if file.suffix == ".png":
                with Image.open(file) as image:
                    image.load()

    out.mkdir()
    report = ("report", trained, "--no-audit", "-o", out / "page.html", "--figures", out / "figures")
    kill_often(report, out, whole, moments=(*MOMENTS[::2], 200))
    assert (out / "page.html").is_file() and list((out / "figures").glob("*.png"))


@pytest.mark.soak
def test_a_killed_data_prepare_leaves_no_partial_data_set(tmp_path: Path) -> None:
    source, out = food101(tmp_path / "source"), tmp_path / "out"
    out.mkdir()

    def whole() -> None:
        if (out / "data").exists():
            assert read_json(out / "data" / "dataset.json")["rows"].keys() >= {"train", "val", "test"}

    kill_often(cli("data", "prepare", "food101", source, out / "data"), out, whole)
    assert call("data", "prepare", "food101", source, out / "data").returncode == 0, "it is exactly this preparation"


@pytest.mark.soak
def test_a_killed_data_make_leaves_no_partial_data_set(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    action = lambda: make(out / "data", train=8, val=4, test=4)  # noqa: E731

    def whole() -> None:
        if (out / "data").exists():
            action()  # which compares every file

    kill_often(action, out, whole)


@pytest.mark.soak
def test_a_killed_study_continues(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    file = write_study(tmp_path, pairs, seeds=[0], grid={"prompts.experts": [1]}, baseline=None)

    def whole() -> None:
        if (out / STUDY_FILE).exists():
            assert study_facts(out)["cells"][0]["state"] in ("waiting", "running", "finished")

    kill_often(("study", file, "--out", out, "--set", "train.max_steps=1"), out, whole, at_least=3)
    assert study_facts(out)["cells"][0]["state"] == "finished"


# -- the cache


def fill_cache(data: Path) -> tuple[Any, bytes]:
    """Build an index and decode images; return their content."""
    settings = config(data).data
    loaded = load_data(settings)
    samples = Samples(loaded, "train", {"main": ("image", create_encoder("tiny:vision").preprocess)}, settings)
    samples.cache_images(lambda *_: None)
    return loaded.fingerprint(), samples[0, 3]["main"].numpy().tobytes()


def whole_entries() -> list[str]:
    """The kinds of the entries in the cache, all of which are complete."""
    found = [(kind, folder) for kind, folder, _, _ in cache.entries() if ".tmp-" not in folder.name]
    for kind, folder in found:
        verify(folder, kind=kind)
    return sorted(kind for kind, _ in found)


def test_a_killed_process_leaves_no_partial_cache_entry(tmp_path: Path, own_cache: Path) -> None:
    data = make_pairs(tmp_path / "data")
    expected = fill_cache(data)
    own_cache.rename(tmp_path / "other")
    kill_often(lambda: fill_cache(data), own_cache, whole_entries)
    assert whole_entries() == ["images", "index", "index", "index"]
    assert fill_cache(data) == expected


@pytest.mark.soak
def test_several_processes_share_a_cache_while_some_are_killed(tmp_path: Path, own_cache: Path) -> None:
    data = make_pairs(tmp_path / "data")
    expected, kills = fill_cache(data), 0
    for round_ in range(3):
        own_cache.rename(tmp_path / f"other-{round_}")
        begin = time.monotonic() + 0.3

        def fill(moment: int | None, begin: float = begin) -> None:
            time.sleep(max(0.0, begin - time.monotonic()))
            if moment is not None:
                die_at(moment, own_cache)
            assert fill_cache(data) == expected

        children = {fork(lambda moment=moment: fill(moment)): moment for moment in (None, 2 + 3 * round_, None, 9 - round_)}
        for child, moment in children.items():
            end = end_of(child)
            assert end == 0 or (end, moment is None) == (-signal.SIGKILL, False)
            kills += end != 0
        whole_entries()
        assert fill_cache(data) == expected
        assert whole_entries() == ["images", "index", "index", "index"]
    assert kills >= 2, "a process that starts late finds the cache full, and has nothing left to write at its moment"


# -- a run


@pytest.mark.soak
def test_only_one_of_two_processes_trains_a_run(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data")
    settings = config(data)
    for resume in (False, True):
        run = tmp_path / f"run-{resume}"
        children = [fork(lambda: train(settings, run, resume=resume)) for _ in range(3)]  # noqa: B023 (done at once)
        ends = sorted(map(end_of, children))
        assert ends == [0, 3, 3] or (resume and ends in ([0, 0, 3], [0, 0, 0])), "the later process may find the run finished"
        assert read_json(run / "metrics.json")["steps"] == 6
        assert not (run / ".lock").exists()


@pytest.mark.soak
def test_a_run_killed_before_it_exists_can_be_started_again(tmp_path: Path) -> None:
    """The same command starts again, whatever an earlier process had written."""
    data = make_pairs(tmp_path / "data")
    expected = train(config(data, train__epochs=1), tmp_path / "whole")
    runs = tmp_path / "runs"
    runs.mkdir()
    action = lambda: train(config(data, train__epochs=1), runs / "run")  # noqa: E731

    def whole() -> None:
        if (runs / "run" / "checkpoints").is_dir() and list((runs / "run" / "checkpoints").glob("step-*[0-9]")):
            raise Published

    class Published(Exception):
        pass

    with pytest.raises(Published):
        kill_often(action, runs, whole, moments=tuple(range(40)))
    result = train(config(data, train__epochs=1), runs / "run", resume=True)
    assert result["metrics"] == expected["metrics"]
    assert json.loads((runs / "run" / "metrics.json").read_text())["metrics"] == expected["metrics"]
    assert list(runs.rglob("*.tmp-*")) == []
