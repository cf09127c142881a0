"""The settings of a deployment on Ray Serve, as ``serve run`` passes them: ``models=runs/first replicas=2``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from mopefuse.config.messages import invalid_settings_error
from mopefuse.config.section import Section
from mopefuse.modalities.image import MAX_PIXELS
from mopefuse.serving.engine.engine import EngineSettings
from mopefuse.serving.server_settings import ServerSettings

_STEP = 2  # batches that may wait at one replica: the one that is computed, and the next

QUIET = {"enable_access_log": False}
"""The logging_config of both deployments: the application logs its requests itself."""


def _split(value: Any) -> Any:
    """The parts of a text such as ``runs/a,runs/b``; other values as they are."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        raise ValueError('an object of JSON, such as {"min_replicas": 1, "max_replicas": 4}') from None


Texts = Annotated[tuple[str, ...], BeforeValidator(_split)]


class RaySettings(Section):
    """How models are served by Ray Serve. Those that ``mopefuse serve`` has too mean the same."""

    models: Texts = Field((), description="runs, adapters or bundles, NAME=PATH to name them; separated by commas")
    adapters: str | None = Field(None, description="folder whose subfolders are more models")
    replicas: PositiveInt = Field(1, description="processes that predict; without effect if autoscaling is set")
    autoscaling: Annotated[dict[str, Any] | None, BeforeValidator(_from_json)] = Field(
        None, description='the autoscaling_config of Ray Serve, such as {"min_replicas": 1, "max_replicas": 4}'
    )
    num_cpus: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for a replica, and its threads")
    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for a replica; it sees no others")
    ingress_replicas: PositiveInt = Field(1, description="processes that take HTTP requests")
    max_ongoing_requests: PositiveInt | None = Field(
        None, description="calls, of up to max_batch rows, that one replica holds; by default 2 x max_batch"
    )
    max_queued_requests: int = Field(1024, ge=-1, description="calls that wait for a replica; -1 for no limit")
    device: str = Field("auto", description='"auto", "cpu", "cuda" or "mps"; a GPU needs num_gpus')
    threads: PositiveInt | None = Field(None, description="CPU threads of a replica; by default num_cpus")
    resident: PositiveInt = Field(256, description="models whose weights each replica keeps in memory")
    cache_mb: NonNegativeInt = Field(256, description="cache of encoder features of each replica, in MB")
    max_pixels: PositiveInt = Field(MAX_PIXELS, description="pixels of an image, at most")
    max_batch: PositiveInt = Field(32, description="rows predicted together, at most")
    max_wait_ms: NonNegativeFloat = Field(5.0, description="milliseconds that a row waits for others to join it")
    queue_mb: PositiveFloat = Field(512.0, description="MB that waiting requests may hold")
    timeout: PositiveFloat = Field(30.0, description="seconds until a request is given up")
    max_body_mb: PositiveFloat = Field(20.0, description="largest body of a request, in MB")
    max_rows: PositiveInt = Field(64, description="rows in one request, at most")
    read_timeout: PositiveFloat = Field(10.0, description="seconds between pieces of a body")
    drain_timeout: NonNegativeFloat = Field(30.0, description="seconds to answer accepted requests before a replica ends")
    cors: Texts = Field((), description="websites that may send requests from browsers, separated by commas")
    allow_urls: Texts = Field((), description="hosts from which images are read by URL, separated by commas")
    log_format: Literal["text", "json"] = Field("text", description="form of the log")

    def engine(self) -> EngineSettings:
        """The settings of each replica, with absolute paths, since replicas run in other folders."""
        adapters = None if self.adapters is None else str(Path(self.adapters).resolve())
        rest = self.model_dump(include={"device", "threads", "resident", "cache_mb", "max_pixels"})
        return EngineSettings(tuple(map(_absolute, self.models)), adapters, **rest)

    def server(self, api_key: str) -> ServerSettings:
        """The settings of the HTTP interface."""
        names = {"max_batch", "max_wait_ms", "queue_mb", "timeout", "max_body_mb", "max_rows", "read_timeout"}
        rest = self.model_dump(include=names | {"cors", "allow_urls", "drain_timeout", "log_format"})
        return ServerSettings(**rest, api_key=api_key)

    def replica_options(self) -> dict[str, Any]:
        """The options of the deployment that predicts; see ``ray.serve.deployment``."""
        scale = ("autoscaling_config", self.autoscaling) if self.autoscaling else ("num_replicas", self.replicas)
        return {
            scale[0]: scale[1],
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "max_ongoing_requests": self.max_ongoing_requests or _STEP * self.max_batch,
            "max_queued_requests": self.max_queued_requests,
            "graceful_shutdown_timeout_s": self.drain_timeout,
            "logging_config": QUIET,
        }


def read_settings(given: Mapping[str, Any], source: str) -> RaySettings:
    """Settings from texts or values.

    Args:
        source: what passes them, for errors.

    Raises:
        ConfigError: a name is unknown or a value invalid.
    """
    try:
        return RaySettings.model_validate(dict(given))
    except ValidationError as error:
        raise invalid_settings_error(error, RaySettings, dict(given), source, {}) from None


def _absolute(model: str) -> str:
    """``PATH`` or ``NAME=PATH`` with the whole path, if it exists here."""
    if Path(model).exists():
        return str(Path(model).resolve())
    name, separator, path = model.partition("=")
    return f"{name}={Path(path).resolve()}" if separator and Path(path).exists() else model
