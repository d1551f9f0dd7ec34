"""Servers on loopback that speak the protocols of Google Cloud Storage and of the Hugging Face hub, and misbehave."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_BYTES = 100_000
"""The hub keeps larger files as LFS does, with a SHA-256; smaller ones have git's checksum."""

Fault = int | Callable[[bytes], bytes] | None


class Server(http.server.ThreadingHTTPServer):
    """What both protocols need: content by path, byte ranges, a log, and faults on demand.

    Attributes:
        store: the one bucket, or the one repository `org/name`, that is there.
        objects: its content, by name.
        faults: path → what to do to its next requests, one each: a status to answer with, or a function of the body.
        cut_after: path → bytes after which the connection of each request for it is closed.
        hold: when set, a cut connection stays open, silent, until the event is set.
        ranges: whether byte ranges are obeyed.
        without_md5: objects that a bucket tells no checksum of.
        wrong_sha256: what the hub says of every LFS file.
        redirect_to: where the hub sends a request for content.
        requests: (path, Range header) of each request for content.
        authorizations: Authorization header of each request to the hub.
    """

    daemon_threads = True
    request_queue_size = 64  # the default drops some of eight connections at once, and each then waits a second

    def __init__(self, handler: type["Handler"], store: str, objects: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = store
        self.objects = dict(objects)
        self.faults: dict[str, list[Fault]] = {}
        self.cut_after: dict[str, int] = {}
        self.hold: threading.Event | None = None
        self.ranges = True
        self.without_md5: set[str] = set()
        self.wrong_sha256: str | None = None
        self.redirect_to: str | None = None
        self.requests: list[tuple[str, str | None]] = []
        self.authorizations: list[str | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no fault of the server's."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(json.dumps(content).encode(), status, headers)

    def answer_content(self, name: str, body: bytes) -> None:
        server = self.server
        headers: dict[str, str] = {}
        if self.command == "GET":
            server.requests.append((name, self.headers.get("Range")))
            fault = server.faults[name].pop(0) if server.faults.get(name) else None
            if isinstance(fault, int):
                return self.answer_json({"error": "a fault"}, fault)
            if fault:
                body = fault(body)
        status = 200
        if server.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            headers["Content-Range"] = f"bytes {match[1]}-{len(body) - 1}/{len(body)}"
            body, status = body[int(match[1]) :], 206
        if self.command == "GET" and name in server.cut_after:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: server.cut_after[name]])
            self.wfile.flush()
            if server.hold is not None:
                server.hold.wait(30)
            self.close_connection = True
            return None
        return self.answer(body, status, headers)


class BucketHandler(Handler):
    """The JSON API of Google Cloud Storage: list, describe, media; three names to a page."""

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        match = re.fullmatch(rf"/storage/v1/b/{re.escape(self.server.store)}/o(?:/([^/]+))?", url.path)
        objects = self.server.objects
        if not match:
            return self.answer_json({"error": {"code": 404}}, 404)
        if match[1] is None:
            names = sorted(name for name in objects if name.startswith(query["prefix"]))
            start = int(query.get("pageToken", 0))
            page: dict[str, Any] = {"items": [self.describe(name) for name in names[start : start + 3]]}
            if start + 3 < len(names):
                page["nextPageToken"] = str(start + 3)
            return self.answer_json(page if page["items"] else {})
        name = urllib.parse.unquote(match[1])
        if name not in objects:
            return self.answer_json({"error": {"code": 404}}, 404)
        if query.get("alt") == "media":
            assert query["generation"] == self.describe(name)["generation"]
            return self.answer_content(name, objects[name])
        return self.answer_json(self.describe(name))

    def describe(self, name: str) -> dict[str, str]:
        body = self.server.objects[name]
        md5 = hashlib.md5(body, usedforsecurity=False).digest()
        described = {"name": name, "size": str(len(body)), "generation": str(int.from_bytes(md5[:4]))}
        return (
            described if name in self.server.without_md5 else {**described, "md5Hash": base64.b64encode(md5).decode()}
        )


class HubHandler(Handler):
    """The hub's model information and content."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        store = self.server.store
        self.server.authorizations.append(self.headers.get("Authorization"))
        if re.fullmatch(rf"/api/models/{re.escape(store)}(/revision/(main|v1))?", path):
            siblings = [self.describe(name) for name in self.server.objects]
            return self.answer_json({"id": store, "sha": HUB_COMMIT, "siblings": siblings})
        name = path.removeprefix(f"/{store}/resolve/{HUB_COMMIT}/")
        if name in self.server.objects:
            if self.server.redirect_to:
                return self.answer(b"", 302, {"Location": self.server.redirect_to + self.path})
            return self.answer_content(name, self.server.objects[name])
        code = "RevisionNotFound" if "/revision/" in path else "RepoNotFound"
        return self.answer_json({"error": "not found"}, 404, {"X-Error-Code": code, "X-Error-Message": "not found"})

    def describe(self, name: str) -> dict[str, Any]:
        body = self.server.objects[name]
        git = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        file = {"rfilename": name, "size": len(body), "blobId": git}
        if len(body) <= LFS_BYTES:
            return file
        sha256 = self.server.wrong_sha256 or hashlib.sha256(body).hexdigest()
        return file | {"lfs": {"sha256": sha256, "size": len(body), "pointerSize": 130}}


@contextlib.contextmanager
def serving(handler: type[Handler], store: str, objects: Mapping[str, bytes]) -> Iterator[Server]:
    server = Server(handler, store, objects)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
