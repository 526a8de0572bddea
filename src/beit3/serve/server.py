"""Runs the application with uvicorn: loads in the background, and loses no request at the end."""

import gc
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
from beit3.serve.protocol import make_protocol
from beit3.serve.service import Service, Settings

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
        patience: Seconds that a body and an answer may take in any case.
        max_connections: Largest number of open connections.
        grace: Seconds beyond the time limit of requests that answers may take at the end.
        service: How to batch, and what to refuse.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    drain: float = 1.0
    patience: float = 10.0
    max_connections: int = 512
    grace: float = 5.0
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
            service.stop(wait=not server.num_cut)
    if loader.error is not None:
        raise loader.error
    show(describe_end(server))


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
        freeze_objects()
        for line in self.service.describe():
            self.show(line)
        seconds = time.monotonic() - started
        self.show(f"ready at {self.address} after {seconds:.1f} s")


def freeze_objects() -> None:
    """Leaves the objects that are there now out of all collections of garbage.

    They are 390,000, most of them torch's. A full collection of them stops all threads for 0.2 s,
    and it comes when many objects are made, as by a flood of connections.
    """
    gc.collect()
    gc.freeze()


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
        num_cut = 0
        """Requests that had no complete answer when the time for the end was over."""

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

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            unread = [
                connection
                for connection in self.server_state.connections
                if connection.transport.get_write_buffer_size() and connection.has_answered
            ]
            self.num_cut = len(self.server_state.tasks) + len(unread)

    config = uvicorn.Config(
        app,
        http=make_protocol(settings.max_connections, settings.patience),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.service.timeout + settings.grace,
    )
    return Server(config)


def describe_end(server: Any) -> str:
    """Returns the last line of a server: whether all accepted requests were answered."""
    if server.num_cut:
        how = "at once" if server.force_exit else "after the time limit"
        return f"stopped {how}; {server.num_cut} requests were cut off without an answer"
    return (
        "stopped at once" if server.force_exit else "stopped; all accepted requests were answered"
    )
