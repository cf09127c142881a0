"""A pushed run works for others: the same predictions, complete or refused, and nothing is sent that was not listed first."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, run_cli
from fake_hub import OWNER, READER, FakeHub
from huggingface_hub import close_session
from PIL import Image

import mopefuse
from mopefuse.core.artifact import publish, verify
from mopefuse.export import push
from mopefuse.runs.locate import get_kind, locate

REPO, MODEL = "org/model", "hf-hub:org/model"
ADAPTER = {"README.md", "config.yaml", "model.json", "weights.safetensors", "manifest.json"}
TEXT = "what is the red digit"

Move = Callable[..., None]
Files = dict[str, bytes]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub
        close_session()


@pytest.fixture
def move(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Move:
    """A function that turns this process into one on another machine, which knows only `hub` and has its own caches."""

    def to(machine: str, *, token: str = OWNER, offline: bool = False) -> None:
        hub.known_here(monkeypatch, tmp_path / machine, token, offline=offline)

    to("mine")
    return to


@pytest.fixture(scope="module")
def adapter(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run; tests must not change it."""
    return adapter_of(trained, tmp_path_factory.mktemp("adapters") / "one")


@pytest.fixture(scope="module")
def other(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a differently trained run; tests must not change it."""
    folder = tmp_path_factory.mktemp("adapters")
    done = call("train", *TINY, "--data", pairs, "--out", folder / "run", "--steps", "2", "--seed", "9")
    assert done.returncode == 0, done.stderr
    return adapter_of(folder / "run", folder / "other")


def adapter_of(run: Path, folder: Path) -> Path:
    assert call("export", run, "--format", "adapter", "-o", folder).returncode == 0
    return folder


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def question(pairs: Path) -> tuple[object, ...]:
    return "--image", pairs / "images" / "test-0.png", "--text", TEXT


def predict(model: object, pairs: Path) -> dict[str, Any]:
    done = call("predict", model, *question(pairs))
    assert done.returncode == 0, done.stderr
    prediction: dict[str, Any] = json.loads(done.stdout)
    return prediction


def only_object(text: str) -> dict[str, Any]:
    assert len(text.splitlines()) == 1, text
    value: dict[str, Any] = json.loads(text)
    return value


# -- push and load


@pytest.mark.process
def test_another_machine_gets_the_same_predictions_also_offline(
    trained: Path, pairs: Path, hub: FakeHub, tmp_path: Path
) -> None:
    """In separate processes, as in practice, because huggingface_hub reads the environment when it is imported."""
    mine, theirs = hub.environment(tmp_path / "mine"), hub.environment(tmp_path / "theirs", READER)
    pushed = run_cli("push", trained, REPO, "--json", **mine)
    assert pushed.returncode == 0, pushed.stderr
    result = only_object(pushed.stdout)
    assert (result["ok"], result["repo"], result["private"], result["url"]) == (True, REPO, True, f"{hub.url}/{REPO}")
    expected = predict(trained, pairs)
    offline = hub.environment(tmp_path / "theirs", "", offline=True)
    for environment in (theirs, offline):
        done = run_cli("predict", MODEL, *question(pairs), **environment)
        assert done.returncode == 0, done.stderr
        prediction = json.loads(done.stdout)
        assert prediction["label"] == expected["label"]
        assert prediction["probabilities"] == pytest.approx(expected["probabilities"], abs=2e-5)


# -- what is sent


def test_only_the_adapter_is_sent_in_one_commit(trained: Path, pairs: Path, hub: FakeHub, move: Move) -> None:
    done = call("push", trained, REPO, "--json")
    assert done.returncode == 0, done.stderr
    repo = hub.repos[REPO]
    assert (repo.files.keys(), len(repo.commits), repo.private) == (ADAPTER, 1, True)
    result = only_object(done.stdout)
    assert result["files"] == {name: len(content) for name, content in repo.files.items()}
    assert repo.files["README.md"].startswith(b"---\nlibrary_name: mopefuse\n") and b"# model\n" in repo.files["README.md"]
    everything = b"\0".join(repo.files.values())
    assert str(pairs).encode() in (trained / "config.yaml").read_bytes(), "otherwise the test proves nothing"
    for path in (pairs, trained):
        assert str(path).encode() not in everything and str(path.parent).encode() not in everything


def test_the_files_are_listed_before_anything_is_sent(trained: Path, hub: FakeHub, move: Move) -> None:
    move("mine", token=READER)  # the first attempt to send ends the process
    done = call("push", trained, REPO)
    assert (done.returncode, done.stdout) == (5, "")
    shown = re.findall(r"^  (\S+)  (\d\S* k?B)$", done.stderr, re.MULTILINE)
    assert {name for name, _ in shown} == ADAPTER, done.stderr
    assert done.stderr.index("to org/model (private, new):") < done.stderr.index("MF-ENC-58")
    assert hub.repos == {}


def test_a_dry_run_sends_nothing(trained: Path, hub: FakeHub, move: Move) -> None:
    done = call("push", trained, REPO, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    result = only_object(done.stdout)
    assert (set(result["files"]), result["url"]) == (ADAPTER, None)
    assert hub.requests == [f"GET /api/models/{REPO}"]


@pytest.mark.parametrize(("word", "code", "commits"), [("n", 1, 0), ("y", 0, 1)])
def test_on_a_terminal_push_asks_for_confirmation(
    word: str, code: int, commits: int, adapter: Path, hub: FakeHub, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO(f"{word}\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    done = call("push", adapter, REPO)
    assert done.returncode == code, done.stderr
    assert "upload these files?" in done.stderr
    assert done.stdout.strip() == ("pushed: hf-hub:org/model" if commits else "")
    assert len(hub.repos[REPO].commits if REPO in hub.repos else ()) == commits
    assert bool(hub.sent()) == bool(commits)


def test_a_public_repository_is_written_to_only_on_request(adapter: Path, other: Path, hub: FakeHub, move: Move) -> None:
    assert call("push", adapter, REPO, "--public").returncode == 0
    assert not hub.repos[REPO].private
    hub.requests.clear()
    done = call("push", other, REPO, "--json")
    assert done.returncode == 3 and only_object(done.stdout)["error"]["code"] == "MF-CFG-73"
    assert hub.sent() == [] and hub.repos[REPO].files == files_of(adapter)
    assert call("push", other, REPO, "--public").returncode == 0
    assert hub.repos[REPO].files == files_of(other) and len(hub.repos[REPO].commits) == 2


def test_a_private_repository_stays_private(adapter: Path, other: Path, hub: FakeHub, move: Move) -> None:
    assert call("push", adapter, REPO).returncode == 0
    done = call("push", other, MODEL, "--public", "--json")  # the name may include the prefix
    assert done.returncode == 0 and only_object(done.stdout)["private"] is True
    assert hub.repos[REPO].private and hub.repos[REPO].files == files_of(other)


@pytest.mark.parametrize("kind", ["adapter", "bundle"])
def test_an_export_is_pushed_unchanged(kind: str, adapter: Path, hub: FakeHub, move: Move, tmp_path: Path) -> None:
    folder = tmp_path / "exported"

    def write(to: Path) -> None:
        (to / "parts").mkdir()
        for name, content in files_of(adapter).items():
            if name != "manifest.json":
                (to / name).write_bytes(content)
        (to / "parts" / "one.json").write_text("{}")

    publish(folder, write, {"kind": kind})
    before = files_of(folder)
    (folder / "notes.txt").write_text("mine alone")
    done = call("push", folder, REPO)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].files == before
    fetched = locate(MODEL)
    assert get_kind(fetched) == kind and verify(fetched, kind=kind) and files_of(fetched) == before


def test_a_damaged_folder_is_not_pushed(adapter: Path, hub: FakeHub, move: Move, tmp_path: Path) -> None:
    for name, content in files_of(adapter).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "weights.safetensors").write_bytes(altered(files_of(adapter)["weights.safetensors"]))
    done = call("push", tmp_path, REPO)
    assert done.returncode == 6 and "weights.safetensors" in done.stderr
    assert call("push", tmp_path / "nowhere", REPO).returncode == 6
    assert call("push", adapter, REPO, "--checkpoint", "last").returncode == 6, "an adapter has only one checkpoint"
    assert hub.requests == []


def altered(content: bytes) -> bytes:
    """Return the same number of bytes, with one bit of the last weight flipped."""
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name", ["model", "org/model/more", "org/model@v1", "org/..", "org/", "-/model", "org/a b"])
def test_an_invalid_repository_name_is_refused(name: str, trained: Path, hub: FakeHub, move: Move) -> None:
    done = call("push", "--json", "--", trained, name)
    assert done.returncode == 3 and only_object(done.stdout)["error"]["code"] == "MF-CFG-72", done.stderr
    assert hub.requests == []


# -- errors of the hub


@pytest.mark.parametrize(
    ("token", "fails", "code"),
    [
        ("wrong", {}, "MF-ENC-58"),
        (READER, {}, "MF-ENC-58"),
        ("", {}, "MF-ENC-58"),
        (OWNER, {"/commit/main": 403}, "MF-ENC-58"),
        (OWNER, {REPO: 503}, "MF-ENC-44"),
    ],
)
def test_a_push_refused_by_the_hub_is_explained(
    token: str, fails: dict[str, int], code: str, adapter: Path, hub: FakeHub, move: Move
) -> None:
    move("mine", token=token)
    hub.fails = fails
    done = call("push", adapter, REPO, "--json")
    error = only_object(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (5, code)
    assert REPO in error["message"] and error["hint"]
    assert "Traceback" not in done.stderr
    assert not (REPO in hub.repos and hub.repos[REPO].commits)


def test_without_a_token_a_repository_is_not_reported_as_new(adapter: Path, hub: FakeHub, move: Move) -> None:
    hub.commit(REPO, files_of(adapter))
    hub.repos[REPO].private = True
    move("mine", token="")
    done = call("push", adapter, REPO, "--dry-run")
    assert (done.returncode, "new" in done.stderr) == (5, False), done.stderr


@pytest.mark.parametrize("how", ["gone", "silent", "offline"])
def test_an_unreachable_hub_is_explained(
    how: str, adapter: Path, pairs: Path, hub: FakeHub, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "gone":
        hub.stop()
    if how == "silent":
        monkeypatch.setattr(push, "_SECONDS", 0.2)
        monkeypatch.setattr("mopefuse.core.hub._TIMEOUT", 0.2)
        hub.pause = 1.0
    move("mine", offline=how == "offline")
    done = call("push", adapter, REPO)
    assert done.returncode == 5 and "MF-ENC-59" in done.stderr, done.stderr
    done = call("predict", MODEL, *question(pairs))
    assert done.returncode == 5 and ("MF-ENC-36" if how == "offline" else "MF-ENC-37") in done.stderr, done.stderr
    assert "pretrained" not in done.stderr, "the fix for encoders does not apply to a model"


# -- reading


def test_every_command_accepts_a_model_from_the_hub(
    trained: Path, adapter: Path, pairs: Path, hub: FakeHub, move: Move, tmp_path: Path
) -> None:
    hub.commit(REPO, files_of(adapter))
    found = [call("eval", m, "--data", pairs, "--json", "-o", tmp_path / "out.jsonl") for m in (trained, MODEL)]
    own, theirs = (only_object(done.stdout) for done in found)
    assert theirs["metrics"] == own["metrics"] and theirs["per_label"] == own["per_label"]
    assert theirs["run"] == MODEL
    assert predict(MODEL, pairs) == predict(trained, pairs)
    with Image.open(pairs / "images" / "test-0.png") as image:
        predictions = [mopefuse.load(model, device="cpu").predict([image], [TEXT]) for model in (trained, MODEL)]
    assert predictions[0] == predictions[1]
    assert predict(adapter_of(Path(MODEL), tmp_path / "again"), pairs) == predict(trained, pairs)
    assert files_of(tmp_path / "again")["weights.safetensors"] == hub.repos[REPO].files["weights.safetensors"]
    swapped = call("swap-encoder", MODEL, "--comp", "tiny:text-b", "--data", pairs, "-o", tmp_path / "swapped", "--json")
    assert swapped.returncode == 0, swapped.stderr
    assert json.loads((tmp_path / "swapped" / "swap.json").read_text())["from"] == MODEL
    done = call("eval", MODEL, "--data", pairs, "--json")
    assert only_object(done.stdout)["predictions"] is None and files_of(locate(MODEL)) == files_of(adapter), "it is unchanged"


def test_a_cached_model_is_not_downloaded_again(adapter: Path, pairs: Path, hub: FakeHub, move: Move) -> None:
    hub.commit(REPO, files_of(adapter))
    first = predict(MODEL, pairs)
    loaded = [request for request in hub.requests if request.startswith("GET")]
    assert len(loaded) == len(ADAPTER) == len(set(loaded)), "each file once"
    hub.requests.clear()
    assert predict(MODEL, pairs) == first and hub.requests == []
    move("mine", offline=True)
    assert predict(MODEL, pairs) == first
    (locate(MODEL) / "weights.safetensors").unlink()  # damaged, and restored from the cache of huggingface_hub
    assert predict(MODEL, pairs) == first and hub.requests == []


def test_a_revision_is_honoured(adapter: Path, other: Path, pairs: Path, hub: FakeHub, move: Move) -> None:
    old, new = predict(adapter, pairs), predict(other, pairs)
    assert old != new
    commit = hub.commit(REPO, files_of(adapter), tag="v1")
    hub.commit(REPO, files_of(other), tag="v2/final")
    assert [predict(f"{MODEL}@{name}", pairs) for name in ("v1", commit, "v2/final", "main")] == [old, old, new, new]
    move("mine", offline=True)
    assert [predict(f"{MODEL}@{name}", pairs) for name in ("v1", commit, "v2/final", "main")] == [old, old, new, new]
    assert predict(MODEL, pairs) == new
    move("mine")
    done = call("predict", f"{MODEL}@v3", *question(pairs))
    assert done.returncode == 5 and "MF-ENC-43" in done.stderr and "'v3'" in done.stderr


def test_a_cached_model_stays_the_same_when_the_repository_changes(
    adapter: Path, other: Path, pairs: Path, hub: FakeHub, move: Move
) -> None:
    hub.commit(REPO, files_of(adapter))
    old = predict(MODEL, pairs)
    commit = hub.commit(REPO, files_of(other))
    assert predict(MODEL, pairs) == old != predict(f"{MODEL}@{commit}", pairs) == predict(other, pairs)


def test_files_of_two_commits_are_never_mixed(adapter: Path, other: Path, pairs: Path, hub: FakeHub, move: Move) -> None:
    hub.commit(REPO, files_of(adapter))
    hub.fails = {"weights.safetensors": 500}
    done = call("predict", MODEL, *question(pairs))
    assert done.returncode == 5 and "MF-ENC-44" in done.stderr, done.stderr
    hub.fails = {}
    hub.commit(REPO, files_of(other))
    assert predict(MODEL, pairs) == predict(adapter, pairs), "the rest of the files of the same commit"


def test_a_missing_or_inaccessible_repository_is_an_error(adapter: Path, pairs: Path, hub: FakeHub, move: Move) -> None:
    for name in ("org/none", "a/b/c", ""):
        done = call("predict", f"hf-hub:{name}", *question(pairs))
        assert done.returncode == 5 and "MF-ENC-40" in done.stderr, done.stderr
    hub.commit(REPO, files_of(adapter))
    hub.repos[REPO].private = True
    for token, code in (("", "MF-ENC-39"), ("wrong", "MF-ENC-41")):
        move("mine", token=token)
        done = call("predict", MODEL, *question(pairs))
        assert done.returncode == 5 and code in done.stderr and "HF_TOKEN" in done.stderr, done.stderr
    move("mine", token=READER)
    assert predict(MODEL, pairs) == predict(adapter, pairs)


# -- repositories that are refused


def naming(name: str) -> Callable[[bytes], bytes]:
    """A manifest that lists one more file."""
    more = f'"files": {{"{name}": {{"size": 4, "sha256": "{hashlib.sha256(b"evil").hexdigest()}"}},'
    return lambda manifest: manifest.replace(b'"files": {', more.encode())


SPOILT: dict[str, tuple[dict[str, Any], str]] = {  # name of a file to its content, or to a function that changes it
    "no manifest": ({"manifest.json": None}, "does not hold a mopefuse model"),
    "a manifest that is no JSON": ({"manifest.json": b"<html>"}, "manifest.json is damaged"),
    "no list of files": ({"manifest.json": b'{"format": 1, "kind": "adapter"}'}, "lists no files"),
    "a way up": ({"manifest.json": naming("../evil"), "../evil": b"evil"}, "outside its folder"),
    "an absolute path": ({"manifest.json": naming("/tmp/evil"), "/tmp/evil": b"evil"}, "outside its folder"),
    "other weights": ({"weights.safetensors": b"evil"}, "weights.safetensors has changed since it was written"),
    "one bit of the weights": ({"weights.safetensors": altered}, "sha256 differs"),
    "a missing file": ({"model.json": None}, "lacks model.json"),
    "something else": (
        {"manifest.json": lambda text: text.replace(b'"adapter"', b'"index"')},
        "does not hold a mopefuse model",
    ),
    "a newer format": (
        {"manifest.json": lambda text: text.replace(b'"format": 2,', b'"format": 99,', 1)},
        "written by a newer version of mopefuse",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_an_invalid_repository_is_refused_and_not_cached(
    what: str, adapter: Path, pairs: Path, hub: FakeHub, move: Move, tmp_path: Path
) -> None:
    changes, message = SPOILT[what]
    files = files_of(adapter)
    spoilt = {name: change(files[name]) if callable(change) else change for name, change in changes.items()}
    hub.commit(REPO, {name: content for name, content in (files | spoilt).items() if content is not None})
    for command in (["predict", MODEL, *question(pairs)], ["eval", MODEL, "--data", pairs]):
        done = call(*command)
        assert done.returncode == 6, done.stderr
        assert message in done.stderr and REPO in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr
        assert "fix: " in done.stderr and "Traceback" not in done.stderr
    assert not [request for request in hub.requests if "evil" in request] and not list(tmp_path.rglob("evil"))
    assert not list(tmp_path.glob("mine/mopefuse/models/*"))
