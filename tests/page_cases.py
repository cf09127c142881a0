"""A page of a server in headless Chromium, filled in as a person does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from chromium import Chromium


class Site:
    """The address of a page, in place of a file."""

    def __init__(self, url: str) -> None:
        self.url = url

    def absolute(self) -> Site:
        return self

    def as_uri(self) -> str:
        return self.url


class Tab:
    """The page in a browser."""

    def __init__(self, browser: Chromium, url: str, **how: Any) -> None:
        self.browser = browser
        browser.show(Site(url), **how)  # type: ignore[arg-type]
        self.wait("document.querySelector('#model').options[0].text != 'loading …'")

    def wait(self, condition: str) -> None:
        for _ in range(300):
            if self.browser.evaluate(f"Boolean({condition})"):
                return
            time.sleep(0.05)
        raise AssertionError(f"{condition}\n{self.text('main')}\n{self.browser.complaints}")

    def text(self, selector: str) -> str:
        return str(self.browser.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def fill(self, selector: str, value: str) -> None:
        """Enter a text, or choose an option, as a person does."""
        events = "for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind, {bubbles: true}))"
        find = f"const one = document.querySelector({json.dumps(selector)})"
        self.browser.evaluate(f"{{ {find}; one.value = {json.dumps(value)}; {events} }}")

    def upload(self, path: Path, selector: str = "#value-image") -> None:
        root = self.browser.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.browser.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.browser.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self) -> None:
        """Press the button, and wait for the answer or the error."""
        self.browser.evaluate("document.querySelector('#send').click()")
        self.wait("!document.querySelector('#send').hasAttribute('aria-disabled')")

    def probabilities(self) -> dict[str, float]:
        rows = "[...document.querySelectorAll('.bars tr[data-label]')]"
        found = f"Object.fromEntries({rows}.map(row => [row.dataset.label, Number(row.cells[2].dataset.value)]))"
        return dict(self.browser.evaluate(found))

    def cells(self, selector: str) -> list[list[str]]:
        rows = f"[...document.querySelectorAll('{selector} tbody tr')]"
        return list(self.browser.evaluate(f"{rows}.map(row => [...row.cells].map(cell => cell.innerText.trim()))"))
