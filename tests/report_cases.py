"""Helpers for tests of a run's page."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from chromium import Chromium
from test_data_pages import Page

from mopefuse.data.load import load_data
from mopefuse.report.run_data import RunFacts
from mopefuse.runs.folder import RunFolder

UNDRAWN = """[...document.querySelectorAll('[data-chart]')].filter(
    place => place.clientWidth > 0 && !(place.querySelector('svg')?.getBoundingClientRect().width > 100)
).map(place => place.dataset.chart)"""


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def facts_of(run: Path, **other: Any) -> RunFacts:
    """Build the contents of a page from predictions given by a test."""
    folder = RunFolder(run)
    config = folder.config()
    data = load_data(config.data)
    logits_SN = other.pop("logits_SN", torch.zeros(len(data.splits["test"].rows), len(data.labels)))
    facts = RunFacts("run", 2, config, folder.manifest(), folder.result(), folder.read_log(), data, "test", logits_SN, 0.5)
    return replace(facts, **other)


def keys(page: Page) -> list[str]:
    return [attributes["id"] for attributes in page.all("section") if "id" in attributes]


def settle(browser: Chromium, *, closed: bool = True) -> None:
    """Wait until charts are drawn.

    Args:
        closed: only those that are not in a closed part of the page.
    """
    every = "document.documentElement.dataset.charts === 'drawn'"
    for _ in range(300):
        if browser.evaluate(every if closed else f"{UNDRAWN}.length === 0"):
            return
        time.sleep(0.1)
    raise AssertionError(browser.evaluate(UNDRAWN))
