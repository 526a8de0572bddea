"""Runs the application with uvicorn: loads in the background, and loses no request at the end."""

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from beit3.serve.app import build_app
from beit3.serve.extra import import_extra
from beit3.serve.limits import GuardSettings
from beit3.serve.service import Service, Settings

HEADER_SECONDS = 10.0
"""How long the headers of a request may take."""

KEEP_ALIVE_SECONDS = 30


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens, and how it ends.

    Args:
        host: Address to listen at.
        port: Port; 0 takes a free one.
        token: What clients must send; "" = nothing.
        drain: Seconds that requests are still taken after SIGTERM, while load balancers learn of
            it and connections are closed after their next answer.
        patience: Seconds that a body may take in any case.
        service: How to batch, and what to refuse.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    drain: float = 1.0
    patience: float = 10.0
    service: Settings = field(default_factory=Settings)


def serve(
    weights: Mapping[str, str],
    index: str = "",
    settings: ServerSettings | None = None,
    *,
    image_root: str = "",
    load_options: Mapping[str, Any] | None = None,
    show: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Serves weights until SIGTERM or SIGINT.

    The port is open at once; `/readyz` says when the weights are loaded.

    Args:
        weights: Name -> path, or name of weights that ship.
        index: Folder or URI of the index, "" without one.
        settings: See `ServerSettings`.
        image_root: Directory of the index's images, by default the one that it names.
        load_options: Arguments of `beit3.predict.load`.
        show: Receives lines about what happens.

    Raises:
        ValueError: The weights or the index cannot be loaded, the port is taken, or a package of
            the extra `serve` is missing.
    """
    settings = settings or ServerSettings()
    import_extra("uvicorn")
    service = Service(settings.service)
    listener = open_socket(settings.host, settings.port)
    address = format_address(listener)
    app = build_app(service, make_guard_settings(settings))
    server = make_server(app, service, settings)
    if not is_loopback(settings.host) and not settings.token:
        show(f"{settings.host} is open to others, and there is no --token-file: anyone may use it")
    show(f"listening at {address}, loading {', '.join(weights) or 'the index'} ...")
    loader = Loader(service, server, show, address)
    thread = threading.Thread(
        target=loader.run,
        args=(weights, index),
        kwargs={"image_root": image_root, "load_options": load_options},
        name="beit3-load",
        daemon=True,
    )
    thread.start()
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        if not thread.is_alive():
            service.stop()
    if loader.error is not None:
        raise loader.error
    was_forced = server.force_exit
    show("stopped at once" if was_forced else "stopped; all accepted requests were answered")


class Loader:
    """Loads the weights in a thread of its own, and ends the server where that fails."""

    def __init__(
        self, service: Service, server: Any, show: Callable[[str], None], address: str
    ) -> None:
        self.service = service
        self.server = server
        self.show = show
        self.address = address
        self.error: BaseException | None = None

    def run(self, weights: Mapping[str, str], index: str, **options: Any) -> None:
        started = time.monotonic()
        try:
            self.service.load(weights, index, **options)
        except BaseException as error:
            self.error = error
            self.server.should_exit = True
            return
        seconds = time.monotonic() - started
        self.show(f"ready at {self.address} after {seconds:.1f} s")


def make_guard_settings(settings: ServerSettings) -> GuardSettings:
    """Returns the limits of what comes in."""
    max_bytes = settings.service.limits.max_bytes
    return GuardSettings(
        max_bytes=max_bytes,
        max_buffered=8 * max_bytes,
        patience=settings.patience,
        token=settings.token,
        local_hosts_only=is_loopback(settings.host) and not settings.token,
    )


def open_socket(host: str, port: int) -> socket.socket:
    """Listens at an address. Raises ValueError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot listen at {host}:{port}: {reason}; give another --port or --host"
        ) from None


def format_address(listener: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Returns whether an address is of this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: str | Path) -> str:
    """Returns the token that a file holds. Raises ValueError for a missing or unfit one."""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"cannot read the token file {path}: {reason}") from None
    if len(token) < 8 or not token.isascii() or any(char.isspace() for char in token):
        raise ValueError(
            f"{path} holds no token: write one line of 8 or more ASCII characters without spaces"
        )
    return token


# uvicorn ------------------------------------------------------------------------------------------


def make_server(app: Any, service: Service, settings: ServerSettings) -> Any:
    """Returns a uvicorn server that drains before it stops."""
    uvicorn: Any = import_extra("uvicorn")

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        """Ends with status 0 after a signal; once ready, it takes requests for a while after it."""

        should_exit: bool

        def handle_exit(self, number: int, frame: Any) -> None:
            if service.state != "ready" or settings.drain <= 0:
                service.drain()
                self.force_exit = self.should_exit and number == signal.SIGINT
                self.should_exit = True
                return
            service.drain()
            timer = threading.Timer(settings.drain, self._stop)
            timer.daemon = True
            timer.start()

        def _stop(self) -> None:
            self.should_exit = True

    config = uvicorn.Config(
        app,
        http=make_protocol(),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.service.timeout) + 5,
    )
    return Server(config)


def make_protocol() -> type:
    """Returns uvicorn's protocol with a time limit for the headers of a request.

    It is that of h11, which limits the size of headers; that of httptools does not.
    """
    base: Any = import_extra("uvicorn.protocols.http.h11_impl").H11Protocol

    class Protocol(base):  # type: ignore[misc, valid-type]
        """Closes a connection whose next request does not come in time."""

        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._start_timer()
            else:
                self._stop_timer()

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(error)

        def _start_timer(self) -> None:
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close_slow)

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _close_slow(self) -> None:
            self._header_timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Protocol
