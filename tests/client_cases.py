"""A server in this process, with the real HTTP interface and real models, and models of every task to serve."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from serving_cases import PATIENCE
from test_shared_pair import randomised

import mopefuse
from mopefuse.serving.engine.catalogue import Catalogue
from mopefuse.serving.engine.engine import Engine, EngineSettings
from mopefuse.serving.engine.request import Request
from mopefuse.serving.http.app import create_app
from mopefuse.serving.http.middleware import Record
from mopefuse.serving.server import listen
from mopefuse.serving.server_settings import ServerSettings
from mopefuse.serving.workers.batching import Served
from mopefuse.tasks.regression import Regression
from mopefuse.tasks.retrieval import Retrieval
from mopefuse.tasks.segmentation import Segmentation

MODELS: dict[str, dict[str, Any]] = {
    "single": {"labels": ["cat", "dog", "fox", "hen"], "experts": 3},
    "several": {"labels": ["red", "green", "blue"], "task": "multi-label", "experts": 2},
    "number": {"labels": ["price"], "task": Regression([20.0], [1.0], loss="quantile", quantiles=(0.1, 0.5, 0.9))},
    "numbers": {"labels": ["price", "weight"], "task": Regression([2.0, 90.0], [1.0, 0.5]), "method": "late-concat"},
    "mask": {"labels": ["sky", "sea", "land"], "task": Segmentation((32, 32))},
    "pair": {"labels": ["pair"], "task": Retrieval(8, 2)},
    "absent": {"labels": ["yes", "no"], "train": {"modality_dropout": 0.2}},
}


def save_models(folder: Path, *names: str) -> Path:
    """A folder of adapters with random weights, by the names of `MODELS`."""
    for seed, name in enumerate(names or MODELS):
        mopefuse.save_adapter(randomised(seed, **{"num_labels": None, **MODELS[name]}), folder / name)
    return folder


class Direct:
    """Computes each request by itself, in a thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def predict(self, requests: Sequence[Request]) -> list[Served]:
        answers = await asyncio.to_thread(self.engine.predict, requests)
        return [Served(answer, 0.0, len(requests)) for answer in answers]

    def is_ready(self) -> bool:
        return True

    def retry_after(self) -> int:
        return 1

    def stats(self) -> dict[str, float]:
        return {}


class Local:
    """A server.

    Attributes:
        log: the record of each request that was answered.
    """

    def __init__(self, engine: Engine, catalogue: Catalogue, **settings: Any) -> None:
        self.log: list[Record] = []
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app(catalogue, Direct(engine), ServerSettings(**settings), self.log.append)
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)

    def rows(self) -> list[int]:
        """Rows in each request for predictions that was answered."""
        return [record.rows for record in self.log if record.path == "/predict" and record.status == 200]


@contextmanager
def local_server(folder: Path, **settings: Any) -> Iterator[Local]:
    """Serve a folder of adapters.

    Args:
        settings: see `ServerSettings`.
    """
    engine = Engine(EngineSettings(adapters=str(folder), device="cpu"))
    server = Local(engine, engine.catalogue, **settings)
    try:
        yield server
    finally:
        server.close()
