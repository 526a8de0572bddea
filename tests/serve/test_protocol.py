"""Connections: clients that do not read, too many of them, requests that are cut off at the end."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from beit3.serve import protocol
from beit3.serve.app import build_app
from beit3.serve.protocol import JoinedWrites
from beit3.serve.server import ServerSettings, describe_end, make_server, open_socket
from beit3.serve.service import Service, Settings
from tests.serve.client import QUESTION, make_png, make_service, to_base64

SIZE = 16 << 20


@contextmanager
def run_server(app, running: Service, /, **options) -> Iterator[tuple]:
    """Runs an application in a thread; yields the server, its port and its thread."""
    listener = open_socket("127.0.0.1", 0)
    server = make_server(app, running, ServerSettings(drain=0, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    port = listener.getsockname()[1]
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server, port, thread
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


async def send_much(scope, receive, send) -> None:
    """An application with a large answer."""
    headers = [(b"content-length", str(SIZE).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(SIZE)})


def test_a_client_that_does_not_read_is_left(monkeypatch):
    monkeypatch.setattr(protocol, "MIN_RATE", 1e8)
    service = Service()
    with run_server(send_much, service, patience=2.0) as (server, port, _):
        connections = server.server_state.connections
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: connections)
            wait_until(lambda: not connections)
        assert len(httpx.get(f"http://127.0.0.1:{port}").content) == SIZE, "one that reads"
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            wait_until(lambda: connections)
            wait_until(lambda: not connections)
    service.stop()


def test_connections_are_limited(root):
    service = make_service(root, "vqa")
    with run_server(build_app(service), service, max_connections=2) as (server, port, _):
        address = ("127.0.0.1", port)
        idle = [socket.create_connection(address) for _ in range(2)]
        wait_until(lambda: len(server.server_state.connections) == 2)
        with socket.create_connection(address, timeout=5) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while data := client.recv(65536):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in head
        assert "2 connections" in json.loads(body)["error"]["message"]
        idle[0].close()
        wait_until(lambda: len(server.server_state.connections) == 1)
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        idle[1].close()
    service.stop()


def test_requests_that_are_cut_off_are_counted_and_told(root, monkeypatch):
    service = make_service(root, "vqa", settings=Settings(timeout=0.2))
    called = threading.Event()

    async def hang(*arguments, **options):
        called.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(service, "predict", hang)
    body = {"image": to_base64(make_png()), "question": QUESTION}
    settings = {"grace": 0.3, "service": service.settings}
    with run_server(build_app(service), service, **settings) as (server, port, thread):
        answers = []
        url = f"http://127.0.0.1:{port}/v1/vqa"
        client = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json=body, timeout=20))
        )
        client.start()
        assert called.wait(10)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        client.join(20)
    assert server.num_cut == 1
    assert "1 requests were cut off" in describe_end(server)
    assert answers[0].status_code == 503 and "stopped" in answers[0].text
    service.stop()


def test_a_quiet_end_is_told_as_one(root):
    service = make_service(root, "vqa")
    with run_server(build_app(service), service) as (server, port, _):
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    assert server.num_cut == 0
    assert describe_end(server) == "stopped; all accepted requests were answered"
    service.stop()


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.sent.append(data)

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int) -> None:
        pass


def test_an_answer_is_sent_at_once():
    async def main():
        transport = Transport()
        joined = JoinedWrites(transport, asyncio.get_running_loop())
        joined.write(b"head")
        joined.write(b"body")
        await asyncio.sleep(0)
        joined.write(b"last")
        joined.close()
        return transport.sent

    assert asyncio.run(main()) == [b"headbody", b"last"]


def test_an_answer_does_not_wait_for_others_of_its_turn():
    sent_before = []

    async def main():
        connections = []

        async def answer(scope, receive, send) -> None:
            sent_before.append([len(transport.sent) for _, transport in connections])
            headers = [(b"content-length", b"2")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"ok"})

        service = Service()
        server = make_server(answer, service, ServerSettings())
        server.config.load()
        for _ in range(3):
            connection = server.config.http_protocol_class(server.config, server.server_state, {})
            connections.append((connection, Transport()))
            connection.connection_made(connections[-1][1])
        for connection, _ in connections:
            connection.data_received(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0)
        for connection, _ in connections:
            connection.connection_lost(None)
        service.stop()

    asyncio.run(main())
    assert sent_before == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
