"""A hub on this machine: the part of the HTTP interface that `huggingface_hub` needs to create, fill and read a repository.

It classifies every file as small ("regular"), so that each is sent inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

OWNER, READER = "owner", "reader"  # tokens: one may write, the other may only read

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = {
    "info": f"GET /api/models/{_REPO}",
    "create": "POST /api/repos/create",
    "validate": "POST /api/validate-yaml",
    "preupload": f"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)",
    "commit": f"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)",
    "resolve": f"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
}


class Response(NamedTuple):
    """The response to a request."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


def _json(value: Any) -> Response:
    return Response(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _error(status: int, code: str = "", message: str = "") -> Response:
    return Response(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})


@dataclass
class Repo:
    """A repository: its commits in order, each with all its files, and the names of some commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.commits[self.refs["main"]] if self.commits else {}


class FakeHub:
    """A context manager; `url` is its address, `repos` its content, `asked` the requests that it received."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.fails: dict[str, int] = {}  # HTTP status to return, by the end of the path
        self.pause = 0.0  # seconds before every response
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop serving: nothing responds at `url` from now on."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str = OWNER, *, offline: bool = False) -> dict[str, str]:
        """Environment of a process that knows only this hub, on a machine with its own home folder."""
        names = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": str(int(offline)), "HF_TOKEN": token, "NO_PROXY": "127.0.0.1"}
        return {**names, "HF_HOME": str(home / "hf"), "MOPEFUSE_CACHE": str(home / "mopefuse")}

    def known_here(self, patch: pytest.MonkeyPatch, home: Path, token: str = OWNER, *, offline: bool = False) -> None:
        """Do the same for this process, replacing what huggingface_hub read from the environment when it was imported."""
        for name, value in self.environment(home, token, offline=offline).items():
            patch.setenv(name, value)
        places = {"HF_HUB_CACHE": "hub", "HF_TOKEN_PATH": "token"}
        if hasattr(constants, "AGENT_HARNESSES_PATH"):  # older versions keep no such file
            places["AGENT_HARNESSES_PATH"] = "agents"
        made = {name: str(home / "hf" / place) for name, place in places.items()}
        made |= {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}"}
        for name, value in made.items():
            patch.setattr(constants, name, value)
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        close_session()

    def commit(self, repo: str, files: Mapping[str, bytes], *, tag: str | None = None) -> str:
        """Add a commit with exactly these files and return its name."""
        held = self.repos.setdefault(repo, Repo(private=False))
        commit = hashlib.sha1(f"{repo} {len(held.commits)}".encode()).hexdigest()
        held.commits[commit] = dict(files)
        held.refs |= {"main": commit, **({tag: commit} if tag else {})}
        return commit

    def sent(self) -> list[str]:
        """The requests that change something."""
        return [request for request in self.requests if not request.startswith(("GET", "HEAD"))]

    def respond(self, request: str, body: bytes, token: str | None) -> Response:
        """Return the response to a request."""
        time.sleep(self.pause)
        if "/api/agent-harnesses" in request:  # identifies the client, which does not matter here
            return _json({})
        self.requests.append(request)
        for end, status in self.fails.items():
            if request.endswith(end):
                return _error(status)
        for name, route in _ROUTES.items():
            if match := re.fullmatch(route, request):
                named = {key: unquote(value) for key, value in match.groupdict().items()}
                return self._refused(name, named.get("repo"), token) or getattr(self, f"_{name}")(body, **named)
        return _error(404)

    def _refused(self, route: str, repo: str | None, token: str | None) -> Response | None:
        if token is not None and token not in (OWNER, READER):
            return _error(401, message="Invalid credentials in Authorization header")
        if route == "validate":
            return None
        if route in ("create", "preupload", "commit") and token != OWNER:
            return _error(401 if token is None else 403, message="no permission to write")
        if repo is not None and (repo not in self.repos or (self.repos[repo].private and token is None)):
            return _error(401 if token is None else 404, "RepoNotFound")  # anonymous clients must not learn what exists
        return None

    def _info(self, body: bytes, repo: str) -> Response:
        held = self.repos[repo]
        return _json({"id": repo, "private": held.private, "sha": held.refs.get("main"), "siblings": [], "tags": []})

    def _create(self, body: bytes) -> Response:
        content = json.loads(body)
        repo = f"{content['organization']}/{content['name']}"
        if repo in self.repos:
            return _error(409)
        self.repos[repo] = Repo(private=content.get("visibility") == "private" or content.get("private") is True)
        return _json({"url": f"{self.url}/{repo}"})

    def _validate(self, body: bytes) -> Response:
        return _json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> Response:
        names = [file["path"] for file in json.loads(body)["files"]]
        return _json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})

    def _commit(self, body: bytes, repo: str, revision: str) -> Response:
        files = dict(self.repos[repo].files)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                assert line["key"] == "header", f"unexpected key {line['key']}"
        commit = self.commit(repo, files)
        return _json({"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit})

    def _resolve(self, body: bytes, repo: str, revision: str, file: str) -> Response:
        held = self.repos[repo]
        commit = held.refs.get(revision, revision)
        if commit not in held.commits:
            return _error(404, "RevisionNotFound")
        content = held.commits[commit].get(file)
        if content is None:
            return _error(404, "EntryNotFound")
        digest = hashlib.sha256 if file.endswith(".safetensors") else hashlib.sha1  # as for large and for small files
        return Response(200, content, {"ETag": f'"{digest(content).hexdigest()}"', "X-Repo-Commit": commit})


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            response = hub.respond(f"{self.command} {urlsplit(self.path).path}", body, token if scheme == "Bearer" else None)
            try:
                self.send_response(response.status)
                for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else response.body)
            except ConnectionError:  # the client no longer waits for the response
                self.close_connection = True

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
