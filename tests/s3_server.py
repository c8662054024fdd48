"""An S3 server in this process, for the tests: moto's, with a bucket; and a proxy to it that fails now and then."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from raycontrolnet.storage.uri import open_uri

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "an-id-of-the-tests", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests"}


class S3Server:
    """The server; `endpoint` is its address, `client` boto3's client of it."""

    def __init__(self, endpoint: str):
        import boto3

        self.endpoint = endpoint
        self.environment = {**KEYS, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint}
        names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        keys = {name: self.environment[variable] for name, variable in names.items()}
        self.client: Any = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)

    def names(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects whose keys begin with `prefix`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [each["Key"] for page in pages for each in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Serve S3 with the bucket `BUCKET`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    found = S3Server(f"http://127.0.0.1:{port}")
    # moto keeps its buckets for the whole process: those of an earlier server, too.
    urlopen(Request(f"{found.endpoint}/moto-api/reset", method="POST")).close()
    open_uri.cache_clear()  # those of another address
    found.client.create_bucket(Bucket=BUCKET)
    try:
        yield found
    finally:
        server.stop()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """Serve S3 for a module of tests; import this fixture, and `use_s3` to let a test and its processes find it."""
    with s3_server() as server:
        yield server


@pytest.fixture
def use_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Set the environment's variables by which S3 is found."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    open_uri.cache_clear()  # those of a test's proxy
    return s3


class _FlakyProxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    endpoint, every = "", 1
    counted = itertools.count(1)
    away = threading.Event()
    """Every connection is cut while it is set."""
    silent = threading.Event()
    """No answer comes to its end while it is set: it trickles, which no time limit of pyarrow's ends."""
    asked: ClassVar[list[str]] = []
    """Methods and paths of the requests that were not answered."""

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        if self.away.is_set():
            self._cut()
            return
        if self.silent.is_set():
            self._never_answer()
            return
        number, body = next(self.counted), self._body()
        if self.every and number % self.every == 0:
            if number % (2 * self.every) == 0:
                self._cut()
            else:
                self._send(503, {}, b"")
            return
        left = ("connection", "transfer-encoding", "content-length", "expect")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left}
        request = Request(self.endpoint + self.path, data=body or None, headers=headers, method=self.command)
        try:
            with urlopen(request) as answer:
                self._send(answer.status, dict(answer.headers), answer.read())
        except HTTPError as error:
            self._send(error.code, dict(error.headers), error.read())

    def _never_answer(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.command != "HEAD":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: 1000000\r\n\r\n")
        with suppress(OSError):  # nobody waits any more
            while self.silent.is_set():
                if self.command != "HEAD":
                    self.wfile.write(b" ")
                time.sleep(0.3)
            self._cut()

    def _cut(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that lets what comes see no folder of what was: another machine."""

    def move() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("machine")))

    move()
    return move


@contextmanager
def flaky_proxy(endpoint: str, every: int) -> Iterator[str]:
    """Serve a proxy to `endpoint` that fails one request in `every`: by a 503, or by a connection that is cut."""
    handler = type("FlakyProxy", (_FlakyProxy,), {"endpoint": endpoint, "every": every, "counted": itertools.count(1)})
    with serving(handler) as address:
        yield address


class _ReadingProxy(_FlakyProxy):
    every = 0

    def _deny(self) -> None:
        self._body()
        self._send(403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

    do_PUT = do_POST = do_DELETE = _deny  # noqa: N815


@contextmanager
def proxy_that_is_read_alone(endpoint: str) -> Iterator[str]:
    """Serve a proxy to `endpoint` for keys that may read there, and not write."""
    with serving(type("ReadingProxy", (_ReadingProxy,), {"endpoint": endpoint})) as address:
        yield address


@contextmanager
def proxy_that_goes_away(endpoint: str) -> Iterator[tuple[str, threading.Event]]:
    """Serve a proxy to `endpoint` that answers nothing while the event is set."""
    away = threading.Event()
    handler = type("ProxyThatGoesAway", (_FlakyProxy,), {"endpoint": endpoint, "every": 0, "away": away})
    with serving(handler) as address:
        yield address, away


@contextmanager
def proxy_that_falls_silent(endpoint: str) -> Iterator[tuple[str, threading.Event, list[str]]]:
    """Serve a proxy to `endpoint` that takes requests and ends no answer while the event is set; it lists those."""
    silent, asked = threading.Event(), list[str]()
    handler = {"endpoint": endpoint, "every": 0, "silent": silent, "asked": asked}
    with serving(type("ProxyThatFallsSilent", (_FlakyProxy,), handler)) as address:
        try:
            yield address, silent, asked
        finally:
            silent.clear()


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP by `handler`, at the address that is given."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
