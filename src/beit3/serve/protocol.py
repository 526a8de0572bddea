"""uvicorn's protocol with limits of time for headers and for readers, and of connections."""

import asyncio
import json
from typing import Any

from beit3.serve.extra import import_extra
from beit3.serve.limits import MIN_RATE
from beit3.serve.refusal import Refusal

HEADER_SECONDS = 10.0
"""How long the headers of a request may take."""

LINGER_SECONDS = 1.0
"""How long a refused connection stays half open, so that its client can read why."""


def make_protocol(max_connections: int, patience: float) -> type:
    """Returns uvicorn's protocol with limits that it does not have.

    It is that of h11, which limits the size of headers; that of httptools does not.

    Args:
        max_connections: Connections beyond this number are answered with 503 and closed.
        patience: Seconds that a client may take to read an answer in any case; after that it must
            read `MIN_RATE` bytes a second.
    """
    base: Any = import_extra("uvicorn.protocols.http.h11_impl").H11Protocol

    class Protocol(base):  # type: ignore[misc, valid-type]
        """Closes connections whose client neither sends nor reads in time."""

        _header_timer: asyncio.TimerHandle | None = None
        _read_timer: asyncio.TimerHandle | None = None
        _is_refused = False

        def connection_made(self, transport: Any) -> None:
            # What the socket does not take at once starts the reader's timer.
            transport.set_write_buffer_limits(high=0)
            if len(self.connections) >= max_connections:
                self._refuse(transport)
                return
            super().connection_made(JoinedWrites(transport, self.loop))
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            if self._is_refused:
                return
            super().data_received(data)
            if self.has_answered:
                self._start_timer()
            else:
                self._stop_timer()

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_timer()
            if self._read_timer is not None:
                self._read_timer.cancel()
            if not self._is_refused:
                super().connection_lost(error)

        def on_response_complete(self) -> None:
            self.transport.flush()
            super().on_response_complete()

        @property
        def has_answered(self) -> bool:
            """Whether no request is being computed."""
            return self.cycle is None or self.cycle.response_complete

        # Too many connections ---------------------------------------------------------------------

        def _refuse(self, transport: Any) -> None:
            self._is_refused = True
            message = f"the server has {max_connections} connections: try again later"
            refusal = Refusal(503, message, retry_after=1)
            body = json.dumps(refusal.content).encode()
            headers = {
                **refusal.headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n".encode() + body)
            if transport.can_write_eof():
                transport.write_eof()
            self._read_timer = self.loop.call_later(LINGER_SECONDS, transport.abort)

        # Slow readers -----------------------------------------------------------------------------

        def pause_writing(self) -> None:
            if self._is_refused:
                return
            super().pause_writing()
            if self._read_timer is None:
                size = self.transport.get_write_buffer_size()
                seconds = patience + size / MIN_RATE
                self._read_timer = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            if self._is_refused:
                return
            super().resume_writing()
            if self._read_timer is not None:
                self._read_timer.cancel()
                self._read_timer = None

        # Slow headers -----------------------------------------------------------------------------

        def _start_timer(self) -> None:
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close_slow)

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _close_slow(self) -> None:
            self._header_timer = None
            if self.has_answered:
                self.transport.close()

    return Protocol


class JoinedWrites:
    """A transport that sends what is written in one turn of the event loop at once.

    uvicorn writes the headers and the body of an answer apart. Each write is a call of the system
    that hands the interpreter to another thread, and may wait long to get it back. A complete
    answer is sent by `flush`, without waiting for those of other requests in the turn.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces:
            self._transport.write(b"".join(pieces))
