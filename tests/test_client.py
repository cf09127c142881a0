"""The client of a server: the results of a loaded model, limits, keys and errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_cases import Local, local_server, save_models
from conftest import code_of
from PIL import Image
from serving_cases import running

import mopefuse
from mopefuse.core.error_codes import DataCode, RequestCode
from mopefuse.errors import ConfigError, DataError, PackageError, RequestError

TEXT = "read the green digit"
CLOSE = {"abs": 1e-5, "rel": 1e-6}  # large numbers have no more digits in float32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Local]:
    with local_server(models) as local:
        yield local


@pytest.fixture
def client(server: Local) -> Iterator[mopefuse.Client]:
    with mopefuse.Client(server.url, retries=0) as one:
        yield one


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Pictures of several formats and sizes; the second is stored sideways."""
    random = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "c.webp", "d.png", "e.png")]
    for place, path in enumerate(paths):
        pixels = random.integers(0, 256, (20 + 5 * place, 30, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if place == 1 else 1
        Image.fromarray(pixels).save(path, exif=exif)
    return paths


def assert_same(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """The same keys, labels, texts and order; numbers to 1e-5 or float32."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, np.ndarray):
                assert one[key].dtype == value.dtype and np.array_equal(one[key], value)
            elif isinstance(value, dict):
                assert one[key] == pytest.approx(value, **CLOSE) and list(one[key]) == list(value)
            elif key == "routing":
                assert np.allclose(one[key], value, atol=1e-5) and type(one[key]) is type(value)
            elif key in ("label", "labels"):
                assert one[key] == value
            else:
                assert one[key] == pytest.approx(value, **CLOSE)


# -- results


@pytest.mark.parametrize("name", ["single", "several", "number", "numbers", "mask", "pair"])
def test_predictions_are_those_of_the_loaded_model(name: str, models: Path, client: mopefuse.Client, files: list[Path]) -> None:
    texts = [f"{TEXT} {number}\r\nor that" for number in range(len(files))]
    found = client.predict(files, texts, model=name, routing=True)
    wanted = mopefuse.load(models / name, device="cpu").predict(files, texts, routing=True)
    assert_same(found, wanted)


def test_arrays_and_pil_images_of_any_mode_are_the_same_pictures(
    models: Path, client: mopefuse.Client, files: list[Path]
) -> None:
    opened = [Image.open(path) for path in files]
    grey = (np.arange(900, dtype=np.uint16) * 70).reshape(30, 30)
    pictures = [
        opened[0],
        opened[1],
        opened[2].convert("RGBA").resize((9, 9)),
        opened[3].convert("P"),
        np.asarray(opened[4]),
        np.asarray(opened[0].convert("L")),
        grey,
        str(files[1]),
    ]
    wanted = mopefuse.load(models / "single", device="cpu").predict(pictures, [TEXT] * len(pictures))
    assert_same(client.predict(pictures, [TEXT] * len(pictures), model="single"), wanted)


def test_single_values_none_and_top_are_as_with_a_loaded_model(
    models: Path, client: mopefuse.Client, files: list[Path]
) -> None:
    loaded = mopefuse.load(models / "absent", device="cpu")
    for arguments in ((files[0], TEXT), (np.zeros((8, 8, 3), np.uint8), TEXT), (files[:2], [TEXT, None])):
        assert_same(client.predict(*arguments, model="absent", top=2), loaded.predict(*arguments, top=2))
    assert client.predict([], [], model="absent") == []
    for wrong in ({"top": 0}, {"texts": [TEXT] * 2}, {"texts": 3}, {"sound": ["a"]}, {"images": [3]}):
        arguments = {"images": files[:1], "texts": [TEXT], **wrong}
        codes = [code_of(partial(one.predict, **arguments)) for one in (client, loaded)]
        assert codes[0] == codes[1] != ""


def test_a_client_has_a_model_and_lists_those_of_the_server(server: Local, models: Path, files: list[Path]) -> None:
    with mopefuse.Client(server.url + "/", model="several") as client:
        assert client.ready()
        assert {one["name"]: one["task"] for one in client.models()}["mask"] == "segmentation"
        assert "labels" in client.predict(files[:1], [TEXT])[0]
        assert "label" in client.predict(files[:1], [TEXT], model="single")[0]


def test_threads_can_share_a_client(models: Path, client: mopefuse.Client, files: list[Path]) -> None:
    texts = [f"{TEXT} {number}" for number in range(24)]
    wanted = mopefuse.load(models / "single", device="cpu").predict([files[0]] * 24, texts)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: client.predict(files[0], text, model="single")[0], texts))
    assert_same(found, wanted)


def test_rows_are_sent_in_as_many_requests_as_the_server_takes(models: Path, files: list[Path]) -> None:
    texts = [f"{TEXT} {number}" for number in range(20)]
    pictures = files * 4
    wanted = mopefuse.load(models / "single", device="cpu").predict(pictures, texts)
    with local_server(models, max_rows=6) as server, mopefuse.Client(server.url, model="single") as client:
        assert_same(client.predict(pictures, texts), wanted)
        assert server.rows() == [5, 5, 5, 5], "20, 10, and then 5"
        assert_same(client.predict(pictures, texts), wanted)
        refused = [record for record in server.log if record.status == 413]
        assert server.rows()[4:] == [5, 5, 5, 5] and len(refused) == 3, "the limit is remembered"
    largest = max(path.stat().st_size for path in files)
    small = local_server(models, max_body_mb=6 * largest / 2**20)
    with small as server, mopefuse.Client(server.url, model="single") as client:
        assert_same(client.predict(pictures, texts), wanted)
        assert 4 <= len(server.rows()) <= 10
        with pytest.raises(RequestError) as caught:
            client.predict([Image.effect_noise((300, 300), 90)], [TEXT])
        assert caught.value.number == RequestCode.BODY_TOO_LARGE


# -- errors


def test_a_row_that_is_refused_raises_or_is_an_error_in_its_place(client: mopefuse.Client, files: list[Path]) -> None:
    files[2].write_bytes(b"no picture")
    pictures = [files[0], files[2], files[1], Path("missing.png")]
    texts = [TEXT, TEXT, None, TEXT]
    found = client.predict(pictures, texts, model="single", errors="return")
    assert "label" in found[0]
    assert [type(one) for one in found[1:]] == [DataError] * 3
    expected = (DataCode.FILE_UNREADABLE, DataCode.MODALITY_REQUIRED, DataCode.FILE_NOT_FOUND)
    assert [one.number for one in found[1:]] == list(expected)
    assert [one.where for one in found[1:]] == ["sample 1, image", "sample 2, text", "sample 3"]
    assert all(one.what and one.fix for one in found[1:])
    with pytest.raises(DataError, match=r"is not a readable image.* · sample 1, image · fix: "):
        client.predict(pictures, texts, model="single")
    with pytest.raises(ConfigError, match="errors"):
        client.predict(errors="ignore")


@pytest.mark.parametrize(("name", "number"), [("singles", RequestCode.NO_SUCH_MODEL), (None, RequestCode.MODEL_NOT_NAMED)])
@pytest.mark.parametrize("errors", ["raise", "return"])
def test_an_unknown_model_is_an_error_of_the_call(
    client: mopefuse.Client, files: list[Path], name: str | None, number: int, errors: str
) -> None:
    with pytest.raises(RequestError) as caught:
        client.predict(files, [TEXT] * len(files), model=name, errors=errors)
    assert caught.value.number == number and "single" in caught.value.fix


def test_a_key_is_sent_and_a_wrong_one_is_explained(models: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with local_server(models, api_key="s3cret") as server:
        for given in ("wrong", ""):
            with mopefuse.Client(server.url, given) as client, pytest.raises(RequestError) as caught:
                client.predict(files[0], TEXT, model="single")
            assert caught.value.number == RequestCode.BAD_KEY
            assert str(caught.value) == ("the key is missing or wrong · api_key · fix: pass api_key, or set MOPEFUSE_API_KEY")
        assert len(server.log) == 2, "it is not tried again"
        monkeypatch.setenv("MOPEFUSE_API_KEY", "s3cret\n")
        with mopefuse.Client(server.url) as client:
            assert client.models() and client.ready()
    for odd in ("schlüssel", "a\nb"):
        with pytest.raises(RequestError, match="cannot be sent"):
            mopefuse.Client("http://127.0.0.1", odd)


def test_without_a_server_the_error_says_what_to_start(files: list[Path]) -> None:
    with mopefuse.Client("http://127.0.0.1:9", retries=0) as client:
        assert not client.ready()
        with pytest.raises(RequestError, match=r"cannot be reached: .*refused.* · http://127.0.0.1:9 · fix: start it"):
            client.predict(files[0], TEXT)
    for address in ("127.0.0.1:8000", "ftp://host", "http://", "", "http://[::1"):
        with pytest.raises(RequestError, match="is not the address of a server") as caught:
            mopefuse.Client(address)
        assert caught.value.number == RequestCode.SERVER_UNREACHABLE


def test_without_httpx_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageError, match=r'mopefuse.Client needs httpx · fix: pip install "mopefuse\[serve\]"'):
        mopefuse.Client("http://127.0.0.1:8000")


def test_a_client_imports_no_torch() -> None:
    code = "import sys, mopefuse; mopefuse.Client('http://127.0.0.1:9', retries=0).ready(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- a process


@pytest.mark.process
def test_a_client_predicts_with_mopefuse_serve(models: Path, files: list[Path]) -> None:
    command = [sys.executable, "-m", "mopefuse", "serve", "--adapters", str(models), "--port", "0", "--device", "cpu"]
    texts = [f"{TEXT} {number}" for number in range(len(files))]
    with running(command, MOPEFUSE_API_KEY="s3cret") as server:
        server.wait_until_ready()
        with mopefuse.Client(server.url, "s3cret") as client:
            assert client.ready() and "single" in [one["name"] for one in client.models()]
            for name in ("single", "mask", "number"):
                wanted = mopefuse.load(models / name, device="cpu").predict(files, texts, routing=True)
                assert_same(client.predict(files, texts, model=name, routing=True), wanted)
