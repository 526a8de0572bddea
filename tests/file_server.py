"""A server of one file that behaves as a test wants: breaks off, lies, changes the file."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behavior:
    """How the server answers. Counters and requests are filled in by it."""

    content: bytes = b""
    etag: str = '"1"'
    last_modified: str = ""
    ranges: bool = True
    """Whether it honors `Range`."""
    checks_if_range: bool = True
    """Whether it honors `If-Range`; else it sends a part of whatever the file is now."""
    stop_after: list[int] = field(default_factory=list)
    """Bytes of its first, second, ... answer after which the connection ends."""
    statuses: list[int] = field(default_factory=list)
    """Status of the first, second, ... answer, in place of the file."""
    retry_after: str = ""
    """`Retry-After` of such an answer."""
    announced: int = -1
    """Content-Length, where it is a lie."""
    redirect: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None
    """Waits for it in the middle of the body, after `hold_after` bytes."""
    hold_after: int = 1
    requests: list[dict[str, str]] = field(default_factory=list)
    """Headers of the requests so far, and `path`."""


class Handler(BaseHTTPRequestHandler):
    behavior: Behavior

    def do_GET(self) -> None:
        behavior = self.behavior
        behavior.requests.append({**self.headers, "path": self.path})
        if behavior.redirect and "moved" not in self.path:
            self.send_response(302)
            self.send_header("Location", behavior.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if behavior.statuses and (status := behavior.statuses.pop(0)) != 200:
            self.send_response(status)
            if behavior.retry_after:
                self.send_header("Retry-After", behavior.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = self.find_start()
        if start is not None and start >= len(behavior.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(behavior.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = behavior.content[start or 0 :]
        self.send_response(200 if start is None else 206)
        size = len(body) if behavior.announced < 0 else behavior.announced
        self.send_header("Content-Length", str(size))
        if start is not None:
            last = len(behavior.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{last + 1}")
        if behavior.etag:
            self.send_header("ETag", behavior.etag)
        if behavior.last_modified:
            self.send_header("Last-Modified", behavior.last_modified)
        for name, value in behavior.headers.items():
            self.send_header(name, value)
        self.end_headers()
        count = behavior.stop_after.pop(0) if behavior.stop_after else len(body)
        self.close_connection = True
        with suppress(ConnectionError):  # the client was killed
            if behavior.hold is not None:
                self.wfile.write(body[: behavior.hold_after])
                self.wfile.flush()
                behavior.hold.wait(20)
                body, count = body[behavior.hold_after :], count - behavior.hold_after
            self.wfile.write(body[:count])

    def find_start(self) -> int | None:
        """Returns the first byte that is asked for, or None for the whole file."""
        behavior, text = self.behavior, self.headers.get("Range", "")
        if not text or not behavior.ranges:
            return None
        version = self.headers.get("If-Range", "")
        if behavior.checks_if_range and version not in (behavior.etag, behavior.last_modified):
            return None
        return int(text.removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *arguments: object) -> None:
        """Keeps the output of tests quiet."""


@contextmanager
def serve(behavior: Behavior) -> Iterator[str]:
    """Runs a server in a thread and gives its address."""
    handler = type("BoundHandler", (Handler,), {"behavior": behavior})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
