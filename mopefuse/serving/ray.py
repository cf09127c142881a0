"""The server as an application of Ray Serve, for several machines: ``serve run mopefuse.serving.ray:app models=runs/first``.

It has two deployments: "http" takes requests with the application of ``mopefuse serve`` and imports no torch;
"models" predicts, see `mopefuse.serving.ray_replicas`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError, MopefuseError
from mopefuse.serving.engine.engine import EngineSettings
from mopefuse.serving.ray_settings import QUIET, RaySettings, read_settings
from mopefuse.serving.server_settings import ServerSettings

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MODELS = "models"
_MANY = 100_000  # requests at one "http" process: those that Ray would refuse are refused by the application, with its errors


def build(settings: RaySettings | None = None, **given: Any) -> Application:
    """The application, to be run with ``ray.serve.run``. MOPEFUSE_API_KEY is the key that clients have to send.

    Args:
        given: settings by name, instead of `settings`; see `mopefuse.serving.ray_settings.RaySettings`.

    Raises:
        PackageError: Ray is not installed. ConfigError: a setting is unknown or invalid.
        RequestError, CheckpointError: there is nothing to serve.
    """
    packages = ("ray", "fastapi", "fastapi_offline", "python_multipart", "prometheus_client", "httpx")
    require(*packages, extra="ray", what="mopefuse.serving.ray")
    from ray import serve

    from mopefuse.serving.ray_replicas import Replica

    settings = settings or read_settings(given, "build")
    engine, server = settings.engine(), settings.server(os.environ.get("MOPEFUSE_API_KEY", ""))
    engine.catalogue()  # raises errors here, where they are seen
    try:
        replicas: Any = serve.deployment(Replica, name=_MODELS, **settings.replica_options())
    except ValueError as error:
        what = f"Ray does not accept the settings: {error}"
        fix = "see the autoscaling_config of Ray Serve"
        raise ConfigError(ConfigCode.INVALID_SETTINGS, what, where="autoscaling", fix=fix) from None
    ingress: Any = serve.ingress(_app_creator(engine, server))
    http: Any = serve.deployment(
        ingress(),
        name="http",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=server.drain_timeout,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    bound: Application = http.bind(replicas.bind(engine.as_dict(), server.max_batch, server.max_wait_ms / 1000))
    return bound


def _app_creator(engine: EngineSettings, server: ServerSettings) -> Callable[[], Any]:
    """What creates the application in each "http" process."""

    def create() -> Any:
        from ray import serve

        from mopefuse.serving.http.app import create_app
        from mopefuse.serving.ray_replicas import RayPredictor

        handle: Any = serve.get_deployment_handle(_MODELS, serve.get_replica_context().app_name)
        predictor = RayPredictor(handle, max_batch=server.max_batch, timeout=server.timeout)
        app = create_app(engine.catalogue(), predictor, server)
        predictor.on_batch = app.state.service.metrics.count_batch
        app.state.waiting = asyncio.ensure_future(predictor.wait_until_ready())
        app.add_middleware(_WithoutRequestId)
        return app

    return create


class _WithoutRequestId:
    """ASGI middleware that leaves the header X-Request-ID to the proxy of Ray, which adds the same one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_on)


def app(args: dict[str, str]) -> Application:
    """The application for ``serve run mopefuse.serving.ray:app NAME=VALUE...``; see `build` for errors."""
    import click

    try:
        return build(read_settings(args, "serve run"))
    except MopefuseError as error:
        if click.get_current_context(silent=True) is None:  # deployed from a configuration file
            raise
        raise click.ClickException(f"[{error.code}] {error}") from None
