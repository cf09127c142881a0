"""The page to try models, and the documentation of the HTTP interface, in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from chromium import Chromium
from client_cases import Local, local_server, save_models
from page_cases import Site, Tab
from PIL import Image
from test_shared_pair import randomised

import mopefuse
from mopefuse.report import pages
from mopefuse.serving.http.try_page import try_page

TEXT = "read the green digit\nor 'another' \"one\" & $HOME"
MODELS = ("single", "several", "number", "numbers", "mask", "pair")
KEY_FIELD = "document.querySelector('[for=key]').checkVisibility()"
NOT_OK = "Failed to load resource"  # what a browser notes of every answer that is not 200


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"), *MODELS)


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Local]:
    with local_server(models) as local:
        yield local


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that is stored sideways, with a name that a shell and HTML would misread."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    path = tmp_path / 'a "b" \'<i>;.jpg'
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def offline(models: Path, name: str, picture: Path) -> dict[str, Any]:
    return mopefuse.load(models / name, device="cpu").predict(picture, TEXT, routing=True)[0]


# -- the page as a file


def test_the_policy_of_the_page_allows_its_own_scripts_and_nothing_else() -> None:
    response = try_page()
    html = bytes(response.body).decode()
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))

    def digests(pattern: str) -> list[str]:
        sources = re.findall(pattern, html, re.DOTALL)
        return [f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" for source in sources]

    assert policy["script-src"].split() == digests("<script>(.*?)</script>") and html.count("<script") == 3
    assert policy["style-src"].split() == digests("<style>(.*?)</style>")
    assert (policy["default-src"], policy["connect-src"], policy["img-src"]) == ("'none'", "'self'", "blob: data:")
    assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert not re.findall(r"""(?:src|href)=["'](?!docs"|data:,)""", html) and "//" not in re.sub("(?m)^ *//.*| // .*", "", html)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|eval\(|Storage|cookie| on\w+=", html)


def test_the_page_has_the_colours_of_the_report() -> None:
    report = (Path(pages.__file__).parent / "templates" / "base.html").read_text(encoding="utf-8")
    mine, theirs = (re.findall(r"(--[\w-]+): (#\w+)", text) for text in (bytes(try_page().body).decode(), report))
    assert len(mine) > 20 and {pair for pair in mine if pair[0] != "--strong"} <= set(theirs)


# -- predictions


def test_the_page_shows_the_prediction_of_the_model(server: Local, models: Path, browser: Chromium, picture: Path) -> None:
    tab = Tab(browser, f"{server.url}/?model=single")
    assert tab.browser.evaluate("document.querySelector('#model').value") == "single"
    assert tab.text("#facts") == "single-label · conditional · 4 labels"
    tab.upload(picture)
    tab.wait("document.querySelector('.drop img')?.complete && document.querySelector('.drop img').naturalHeight == 50")
    tab.fill("#value-text", TEXT)
    tab.press()
    wanted = offline(models, "single", picture)
    assert tab.probabilities() == pytest.approx(wanted["probabilities"], abs=1e-5)
    assert tab.text(".answer") == wanted["label"] and tab.text(".bars tr.chosen").startswith(f"{wanted['label']} ✓")
    assert tab.text(".bars tr.chosen .number") == f"{100 * wanted['probabilities'][wanted['label']]:.1f} %"
    experts = tab.cells("#experts")
    assert [row[0] for row in experts] == [str(layer + 1) for layer in range(len(wanted["routing"]))]
    assert [[float(cell) for cell in row[1:]] for row in experts] == pytest.approx(np.array(wanted["routing"]), abs=0.006)
    most = int(np.argmax(np.mean(wanted["routing"], axis=0))) + 1
    assert f"Expert {most} has the largest mean weight" in tab.text("#result")
    assert re.fullmatch(r"single answered in \d+ ms", tab.text("#time"))
    assert browser.complaints == []
    assert {url.split(":")[0] for url in browser.requests} <= {"http", "blob"}
    assert all(url.startswith((server.url, f"blob:{server.url}")) for url in browser.requests)


def test_another_model_is_chosen_and_keeps_the_input(server: Local, models: Path, browser: Chromium, picture: Path) -> None:
    tab = Tab(browser, server.url)
    tab.upload(picture)
    tab.fill("#value-text", TEXT)
    for name in ("several", "single"):
        tab.fill("#model", name)
        assert tab.text("#result") == ""
        tab.press()
        wanted = offline(models, name, picture)
        assert tab.probabilities() == pytest.approx(wanted["probabilities"], abs=1e-5)
        assert tab.text(".answer") == (wanted["label"] if "label" in wanted else ", ".join(wanted["labels"]) or "no label")
        assert browser.evaluate("location.search") == f"?model={name}"
    assert browser.complaints == []


def test_numbers_are_shown_with_their_interval(server: Local, models: Path, browser: Chromium, picture: Path) -> None:
    tab = Tab(browser, f"{server.url}/?model=number")
    tab.upload(picture)
    tab.fill("#value-text", TEXT)
    tab.press()
    wanted = offline(models, "number", picture)
    low, middle, high = wanted["quantiles"].values()
    value, interval = tab.text(".answer").split("\n")
    assert float(value) == pytest.approx(wanted["value"], abs=1e-3)
    ends = re.fullmatch(r"between (\S+) and (\S+), quantiles 0.1 and 0.9", interval)
    assert ends is not None and [float(end) for end in ends.groups()] == pytest.approx([low, high], abs=1e-3)
    (row,) = tab.cells("table.numbers")
    assert row[0] == "price" and [float(cell) for cell in row[1:]] == pytest.approx([middle, low, middle, high], abs=1e-3)
    tab.fill("#model", "numbers")
    tab.press()
    wanted = offline(models, "numbers", picture)
    assert {name: float(cell) for name, cell in tab.cells("table.numbers")} == pytest.approx(wanted["value"], abs=1e-3)
    tab.fill("#model", "pair")
    tab.press()
    wanted = offline(models, "pair", picture)
    assert float(tab.text(".answer").split("\n")[0]) == pytest.approx(np.dot(wanted["main"], wanted["comp"]), abs=1e-4)
    assert browser.complaints == []


def test_a_mask_lies_over_the_upright_picture(server: Local, models: Path, browser: Chromium, picture: Path) -> None:
    tab = Tab(browser, f"{server.url}/?model=mask")
    tab.upload(picture)
    tab.fill("#value-text", TEXT)
    tab.press()
    mask = offline(models, "mask", picture)["mask"]
    ids, counts = np.unique(mask, return_counts=True)
    names = [("sky", "sea", "land")[number] for number in ids]
    wanted = {name: f"{100 * count / mask.size:.1f} %" for name, count in zip(names, counts, strict=True)}
    assert dict(tab.cells("table.legend")) == wanted
    assert browser.complaints == []
    pixels = """(() => { const {width, height} = document.querySelector('#overlay');
        const context = document.querySelector('#overlay').getContext('2d');
        return [width, height, [...context.getImageData(0, 0, width, height).data]]; })()"""
    tab.fill("#opacity", "0")
    width, height, below = browser.evaluate(pixels)
    assert (height, width) == mask.shape == (50, 30)
    upright = np.asarray(Image.open(picture).transpose(Image.Transpose.ROTATE_270), dtype=float)
    assert np.abs(np.reshape(below, (height, width, 4))[..., :3] - upright).mean() < 5
    tab.fill("#opacity", "100")
    above = np.reshape(browser.evaluate(pixels)[2], (height, width, 4))[..., :3]
    colours = {number: {tuple(colour) for colour in above[mask == number]} for number in ids}
    assert [len(found) for found in colours.values()] == [1] * len(ids) and len(set.union(*colours.values())) == len(ids)
    assert "predicted classes: " in browser.evaluate("document.querySelector('#overlay').ariaLabel")


def test_a_picture_can_be_dropped(server: Local, models: Path, browser: Chromium, picture: Path) -> None:
    tab = Tab(browser, f"{server.url}/?model=single")
    content = base64.b64encode(picture.read_bytes()).decode()
    browser.evaluate(f"""(() => {{
        const bytes = Uint8Array.from(atob("{content}"), one => one.charCodeAt(0)), dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], "dropped.jpg"));
        const drop = new DragEvent("drop", {{dataTransfer, bubbles: true, cancelable: true}});
        document.querySelector(".drop").dispatchEvent(drop);
        return drop.defaultPrevented;
    }})()""")
    assert "dropped.jpg" in tab.text("#curl")
    tab.fill("#value-text", TEXT)
    tab.press()
    assert tab.probabilities() == pytest.approx(offline(models, "single", picture)["probabilities"], abs=1e-5)


def test_the_command_gives_the_same_prediction(server: Local, models: Path, browser: Chromium, picture: Path) -> None:
    tab = Tab(browser, f"{server.url}/?model=single")
    tab.upload(picture)
    tab.fill("#value-text", TEXT)
    curl, url, *rest = shlex.split(browser.evaluate("document.querySelector('#curl').textContent").replace("\\\n", " "))
    assert (curl, url) == ("curl", f"{server.url}/predict")
    assert rest[::2] == ["--form-string", "-F", "--form-string"]
    fields = dict(value.split("=", 1) for value in rest[1::2])
    name = json.loads(fields.pop("image").removeprefix("@"))
    assert name == picture.name and fields == {"model": "single", "text": TEXT}
    found = httpx.post(url, data=fields, files={"image": picture.read_bytes()}).json()
    assert found["probabilities"] == pytest.approx(offline(models, "single", picture)["probabilities"], abs=1e-5)


# -- mistakes


def test_errors_are_shown_as_the_server_words_them(server: Local, browser: Chromium, picture: Path, tmp_path: Path) -> None:
    tab = Tab(browser, f"{server.url}/?model=none")
    assert "no model none is served" in tab.text("[role=alert]")
    tab.fill("#model", "single")
    assert tab.text("[role=alert]") == ""
    damaged = tmp_path / "x.png"
    damaged.write_bytes(b"<html>")
    tab.upload(damaged)
    tab.fill("#value-text", TEXT)
    tab.press()
    told = tab.text("[role=alert]")
    assert "is not a readable image (looks like HTML)" in told
    assert "where\nimage" in told and "fix\nreplace or remove the image" in told and "code\nMF-DATA-13" in told
    assert tab.text("#result") == ""
    tab.upload(picture)
    tab.fill("#value-text", "")
    tab.press()
    assert "no text" in tab.text("[role=alert]") and "MF-DATA-100" in tab.text("[role=alert]")
    assert all(NOT_OK in line for line in browser.complaints) and len(browser.complaints) == 2


def test_a_key_is_asked_for_only_where_it_is_needed(models: Path, browser: Chromium, picture: Path) -> None:
    with local_server(models, api_key="s3cret") as server:
        tab = Tab(browser, f"{server.url}/?model=several")
        assert "the key is missing or wrong" in tab.text("[role=alert]") and browser.evaluate(KEY_FIELD)
        assert browser.evaluate("document.activeElement.id") == "key"
        tab.fill("#key", "wrong")
        tab.wait("document.querySelector('[role=alert]').innerText.includes('MF-REQ-04')")
        tab.fill("#key", "s3cret")
        tab.wait("document.querySelector('#model').value == 'several'")
        assert tab.text("[role=alert]") == ""
        tab.upload(picture)
        tab.fill("#value-text", TEXT)
        tab.press()
        assert tab.probabilities() == pytest.approx(offline(models, "several", picture)["probabilities"], abs=1e-5)
        assert "$MOPEFUSE_API_KEY" in tab.text("#curl") and "s3cret" not in tab.text("main")
    tab.press()
    assert "the server cannot be reached" in tab.text("[role=alert]")


def test_a_server_without_a_key_asks_for_none(server: Local, browser: Chromium) -> None:
    tab = Tab(browser, server.url)
    assert not tab.browser.evaluate(KEY_FIELD) and "Authorization" not in tab.text("#curl")


def test_hostile_names_are_text(models: Path, browser: Chromium, picture: Path, tmp_path: Path) -> None:
    odd = "<img src=x onerror=hacked()>'\"&\u202e"
    mopefuse.save_adapter(randomised(1, num_labels=None, labels=[odd, "</script>", "__proto__"]), tmp_path / "served" / odd)
    with local_server(tmp_path / "served") as server:
        tab = Tab(browser, server.url)
        tab.upload(picture)
        tab.fill("#value-text", "<b>x</b>")
        tab.press()
        assert tab.probabilities().keys() == {odd, "</script>", "__proto__"}
        assert "<img src=x onerror=hacked()>'\"&\\u202e" in tab.text("#result")
        assert browser.evaluate("typeof window.hacked") == "undefined"
        assert browser.evaluate("document.querySelectorAll('main img').length") == 1, "the preview"
        assert browser.complaints == []


# -- how it looks, and the keyboard


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_phones_and_follows_dark_mode(
    server: Local, browser: Chromium, picture: Path, width: int, dark: bool
) -> None:
    tab = Tab(browser, f"{server.url}/?model=single", width=width, dark=dark)
    tab.upload(picture)
    tab.fill("#value-text", TEXT)
    tab.press()
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "nothing scrolls sideways"
    light = float((np.asarray(browser.picture()).mean(axis=2) > 128).mean())
    assert light < 0.3 if dark else light > 0.7


def test_every_control_has_a_name_and_the_form_works_without_a_mouse(
    server: Local, models: Path, browser: Chromium, picture: Path
) -> None:
    tab = Tab(browser, f"{server.url}/?model=single")
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    roles = {"combobox", "textbox", "button", "slider"}
    named = {node["name"]["value"] for node in nodes if node.get("role", {}).get("value") in roles}
    assert {"Model", "Text", "Predict", "Copy"} <= named and any(name.startswith("Image") for name in named)
    tab.upload(picture)
    browser.evaluate("document.querySelector('#value-text').focus()")
    browser.ask("Input.insertText", text=TEXT)
    for key in ("Tab", "Enter"):
        how = {"key": key, "code": key, "windowsVirtualKeyCode": {"Tab": 9, "Enter": 13}[key]}
        browser.ask("Input.dispatchKeyEvent", type="keyDown", text="\r" if key == "Enter" else "", **how)
        browser.ask("Input.dispatchKeyEvent", type="keyUp", **how)
    tab.wait("document.querySelector('.bars')")
    assert browser.evaluate("document.activeElement.id") == "send", "the focus stays"
    assert tab.probabilities() == pytest.approx(offline(models, "single", picture)["probabilities"], abs=1e-5)


# -- the documentation


def test_swagger_ui_sends_a_request(server: Local, browser: Chromium) -> None:
    browser.show(Site(f"{server.url}/docs"))  # type: ignore[arg-type]
    tab = Tab.__new__(Tab)
    tab.browser = browser
    tab.wait("document.querySelector('.opblock-post .opblock-summary-control')")
    browser.evaluate("document.querySelector('.opblock-post .opblock-summary-control').click()")
    tab.wait("document.querySelector('.opblock-post .execute') && document.querySelector('.opblock-post textarea')?.value")
    browser.evaluate("document.querySelector('.opblock-post .execute').click()")
    tab.wait("document.querySelector('.live-responses-table .response-col_status')")
    assert tab.text(".live-responses-table .response .response-col_status").startswith("200")
    assert '"model": "mask"' in tab.text(".live-responses-table"), "the first of the models, as the example names it"
    assert all(url.startswith((server.url, "data:")) for url in browser.requests), browser.requests
    assert browser.complaints == []
