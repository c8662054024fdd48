"""A stand-in for the Hub: the calls that pushes and downloads make, over real HTTP on 127.0.0.1, and what it received.

    with HubStandIn(token="hf_right") as hub:
        take_for_hub(hub.url, monkeypatch)
        push_to_hub(..., token="hf_right")
        hub.files["someone/model"]["README.md"]

Clients need HF_HUB_DISABLE_XET=1 (or `huggingface_hub.constants.HF_HUB_DISABLE_XET`): it speaks git-LFS, not Xet.
`hub.failures["/commit/"] = 403` makes every request whose path holds the text fail so; "cut" cuts the connection after
it, "half" in the middle of it, and "stop" ends the server there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import huggingface_hub.constants
import pytest

ERROR_CODES = {
    "Repository not found": "RepoNotFound",
    "Revision not found": "RevisionNotFound",
    "Entry not found": "EntryNotFound",
}
"""Error -> the header by which client libraries know it."""

COMMIT = "2" * 40
"""Commit of the models to download."""


@dataclass
class Request:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)


class HubStandIn:
    """The server. Files of 5 MB and more, and those called *.safetensors, go by LFS, as on the Hub."""

    def __init__(self, token: str, user: str = "someone"):
        self.token, self.user = token, user
        self.files: dict[str, dict[str, bytes]] = {}
        """repository -> path -> content"""
        self.cards: dict[str, dict[str, Any]] = {}
        """repository -> head of its model card, of models to read"""
        self.models: dict[str, dict[str, bytes]] = {}
        """repository -> path -> content, of models to download; they have the revision main alone"""
        self.commits: list[str] = []
        """Their messages."""
        self.requests: list[Request] = []
        self.failures: dict[str, int | Literal["cut", "half", "stop"]] = {}
        self.large: dict[str, bytes] = {}
        """sha256 -> content, of LFS uploads"""
        self.stopped = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def calls(self) -> list[Request]:
        """Requests but for one that the client library makes once a day for itself, without a token."""
        return [request for request in self.requests if request.path != "/api/agent-harnesses"]

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Stop listening."""
        self.stopped = True
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: Request) -> tuple[int, Any]:
        """Return status and JSON, or a file's content, for a request."""
        path = request.path.partition("?")[0]
        if path.startswith("/storage/"):  # the place that LFS names needs no token, and must not be shown it
            return self._store(path.removeprefix("/storage/"), request.body)
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, {"name": self.user, "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(request.body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._lfs_batch(json.loads(request.body))
        if "/resolve/" in path:
            repository, _, file = path[1:].partition("/resolve/")
            content = self.models.get(repository, {}).get(file.partition("/")[2])
            return (404, {"error": "Entry not found"}) if content is None else (200, content)
        if path.startswith("/api/models/"):
            return self._model(path.removeprefix("/api/models/").split("/"), request)
        return 404, {"error": "Not Found"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        repository = f"{asked.get('organization') or self.user}/{asked['name']}"
        answer = {"url": f"{self.url}/{repository}", "name": repository}
        if repository in self.files:
            return 409, answer | {"error": "You already created this model repo"}
        self.files[repository] = {}
        return 200, answer

    def _model(self, parts: list[str], request: Request) -> tuple[int, Any]:
        repository, call = "/".join(parts[:2]), parts[2:3]
        if repository in self.cards:
            return 200, {"id": repository, "modelId": repository, "cardData": self.cards[repository]}
        if repository in self.models:
            if parts[2:3] == ["revision"] and parts[3:] != ["main"]:
                return 404, {"error": "Revision not found"}
            if call == ["tree"]:
                files = self.models[repository].items()
                return 200, [
                    {"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in files
                ]
            siblings = [{"rfilename": path} for path in self.models[repository]]
            return 200, {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        if repository not in self.files:
            return 404, {"error": "Repository not found"}
        if call == ["preupload"]:
            asked = json.loads(request.body)["files"]
            return 200, {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _is_large(file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in asked
                ]
            }
        if call == ["commit"]:
            return self._commit(repository, [json.loads(line) for line in request.body.splitlines()])
        return 200, {"id": repository, "modelId": repository, "sha": "0" * 40, "private": False, "tags": []}

    def _lfs_batch(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/storage/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, content: bytes) -> tuple[int, None]:
        if hashlib.sha256(content).hexdigest() != oid:
            return 400, None
        self.large[oid] = content
        return 200, None

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        received = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                received[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.large:
                received[value["path"]] = self.large[value["oid"]]
            else:
                return 400, {"error": f"cannot commit {line['key']}"}
        self.files[repository] |= received
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{repository}/commit/{'1' * 40}"}


def take_for_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process take the server at `url` for the Hub."""
    files = url + "/{repo_id}/resolve/{revision}/{filename}"
    own = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in own.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


def _is_large(path: str, size: int) -> bool:
    return size >= 5_000_000 or path.endswith(".safetensors")


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            failure = next((failure for text, failure in hub.failures.items() if text in self.path), None)
            body = self.rfile.read(self._length() // 2) if failure in ("half", "stop") else self._read()
            request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            hub.requests.append(request)
            if failure == "stop":
                hub.stop()
            if hub.stopped or failure in ("cut", "half"):
                self.close_connection = True
                return
            assert failure is None or isinstance(failure, int)
            status, answer = hub.answer(request) if failure is None else (failure, {"error": "as asked"})
            content = b"" if answer is None else answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if isinstance(answer, bytes):
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(answer).hexdigest()}"')
            elif isinstance(answer, dict) and answer.get("error") in ERROR_CODES:
                self.send_header("X-Error-Code", ERROR_CODES[answer["error"]])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _any  # noqa: N815 (names that http.server calls)

        def _length(self) -> int:
            return int(self.headers.get("Content-Length") or 0)

        def _read(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(self._length())
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
            """Say nothing."""

    return Handler
