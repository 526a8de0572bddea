"""What stands before every request: bodies, slow senders, the token, hang-ups, security headers.

It is plain ASGI. The body is read here, entirely and within limits, so that endpoints get it in
memory; afterwards a client that hangs up cancels its request.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any

from beit3.serve.metrics import Metrics
from beit3.serve.refusal import Refusal

LOGGER = logging.getLogger("beit3.serve")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ENDPOINT = "beit3.endpoint"
"""Key of the scope under which an endpoint leaves its name for the metrics."""

PUBLIC_PATHS = re.compile(r"/|/page/[\w.-]+|/healthz|/readyz")
"""Paths that need no token: they tell nothing about the networks."""

MIN_RATE = 16_384.0
"""Bytes per second at which clients must send bodies and read answers."""

MAX_DISCARDED = 1 << 20
"""Largest body that is received and thrown away, so that a refused client keeps its connection."""

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

SECURITY_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class GuardSettings:
    """Limits of what comes in.

    Args:
        max_bytes: Of a body.
        max_buffered: Bytes of all bodies that are in memory at once.
        patience: Seconds that a body may take in any case.
        min_rate: Bytes per second that a body must have after that.
        token: What clients must send as `Authorization: Bearer`; "" = nothing.
        local_hosts_only: Whether the header Host must name this machine, so that pages from
            elsewhere cannot use the server through a name of their own.
    """

    max_bytes: int = 32 << 20
    max_buffered: int = 256 << 20
    patience: float = 10.0
    min_rate: float = MIN_RATE
    token: str = ""
    local_hosts_only: bool = False


class Guard:
    """Middleware around the whole application.

    Args:
        app: The application.
        settings: The limits.
        metrics: Where requests are counted.
        is_draining: Whether the server is about to stop: clients are told to close then.
        admit: Raises Refusal for a request that is refused whatever its body holds.
    """

    def __init__(
        self,
        app: App,
        settings: GuardSettings,
        metrics: Metrics,
        is_draining: Callable[[], bool],
        admit: Callable[[Scope], None] = lambda scope: None,
    ) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.is_draining = is_draining
        self.admit = admit
        self.num_buffered = 0
        """Bytes of bodies that are in memory."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, self.is_draining)
        size = 0
        started = time.perf_counter()
        try:
            headers = _read_headers(scope)
            self._check_host(headers)
            self._check_token(scope["path"], headers)
            try:
                self.admit(scope)
            except Refusal as refusal:
                await answer.refuse(refusal, keep=has_small_body(headers))
                return
            received = bytearray()
            async for chunk in self._read_body(headers, receive):
                size += len(chunk)
                self.num_buffered += len(chunk)
                received += chunk
            body = bytes(received)
            received.clear()
            started = time.perf_counter()
            await self._run(scope, body, receive, answer)
        except Refusal as refusal:
            await answer.refuse(refusal)
        except _HungUp:
            self.metrics.hang_ups.inc()
        except asyncio.CancelledError:
            if not self.is_draining():
                raise
            message = "the server stopped before the answer was ready"
            await answer.refuse(Refusal(503, message, retry_after=1))
        except Exception:
            LOGGER.exception("an endpoint failed")
            await answer.refuse(Refusal(500, "the server failed; its log says why"))
        finally:
            self.num_buffered -= size
            endpoint = scope.get(ENDPOINT, "other")
            self.metrics.requests.labels(endpoint, str(answer.status or "hang-up")).inc()
            self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)

    # Checks ---------------------------------------------------------------------------------------

    def _check_host(self, headers: dict[str, str]) -> None:
        if not self.settings.local_hosts_only:
            return
        host = headers.get("host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if name not in ("", "localhost", "::1") and not re.fullmatch(r"127(\.\d{1,3}){3}", name):
            raise Refusal(
                403, "this server answers this machine alone: start it with --host for others"
            )

    def _check_token(self, path: str, headers: dict[str, str]) -> None:
        token = self.settings.token
        if not token or PUBLIC_PATHS.fullmatch(path):
            return
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        is_right = compare_digest(sent.strip().encode("latin-1"), token.encode("utf-8"))
        if scheme.lower() != "bearer" or not is_right:
            raise Refusal(401, "send the token of this server: Authorization: Bearer TOKEN")

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> Any:
        """Yields the pieces of the body within the limits of size and time."""
        settings = self.settings
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > settings.max_bytes:
            raise Refusal(413, f"the body has more than {settings.max_bytes} bytes")
        started, size = time.monotonic(), 0
        is_complete = False
        while not is_complete:
            elapsed = time.monotonic() - started
            seconds = settings.patience + size / settings.min_rate - elapsed
            try:
                async with asyncio.timeout(max(seconds, 0)):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, "the body comes too slowly") from None
            if message["type"] == "http.disconnect":
                raise _HungUp
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > settings.max_bytes:
                raise Refusal(413, f"the body has more than {settings.max_bytes} bytes")
            if self.num_buffered + len(chunk) > settings.max_buffered:
                raise Refusal(503, "too many large requests at once", retry_after=1)
            is_complete = not message.get("more_body", False)
            yield chunk

    # Running --------------------------------------------------------------------------------------

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: "_Answer") -> None:
        """Runs the application, and cancels it when the client hangs up."""
        pending = [{"type": "http.request", "body": body, "more_body": False}]
        never = asyncio.Event()

        async def replay() -> Message:
            if not pending:
                await never.wait()
            return pending.pop()

        running = asyncio.ensure_future(self.app(scope, replay, answer.send))
        watching = asyncio.ensure_future(_wait_for_hang_up(receive))
        try:
            await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
            if running.done() or answer.is_complete:
                await running
            else:
                self.metrics.hang_ups.inc()
                running.cancel()
                await asyncio.wait((running,))
        finally:
            for task in (running, watching):
                task.cancel()


class _HungUp(Exception):
    """The client is gone before its request was complete."""


async def _wait_for_hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def has_small_body(headers: dict[str, str]) -> bool:
    """Returns whether a body may be received only to be thrown away."""
    declared = headers.get("content-length", "0")
    if "transfer-encoding" in headers or "expect" in headers or not declared.isdecimal():
        return False
    return int(declared[:20]) <= MAX_DISCARDED


def _read_headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


class _Answer:
    """Sends an answer with the security headers, and knows its status."""

    def __init__(self, send: Send, is_draining: Callable[[], bool]) -> None:
        self._send = send
        self._is_draining = is_draining
        self.status = 0
        self.is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            present = {name.lower() for name, _ in headers}
            for name, value in SECURITY_HEADERS.items():
                if name.encode() not in present:
                    headers.append((name.encode(), value.encode()))
            if self._is_draining():
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)

    async def refuse(self, refusal: Refusal, *, keep: bool = False) -> None:
        """Answers with an error. The rest of the body is not read: the connection is closed.

        With `keep` it stays open, and the server throws away what still comes of the body.
        """
        if self.status:
            return
        body = json.dumps(refusal.content, ensure_ascii=False).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        headers |= {name.lower(): value for name, value in refusal.headers.items()}
        if not keep:
            headers["connection"] = "close"
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})
