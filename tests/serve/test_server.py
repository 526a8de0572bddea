"""A real server process: loading, signals, slow and endless senders, the command line."""

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from beit3.predict import load
from beit3.serve.server import Loader, format_address, is_loopback, open_socket, read_token
from beit3.serve.service import Service
from beit3.weights.store import save_weights
from tests.predict.networks import assert_same, make_task
from tests.serve.client import make_png, to_base64

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(scope="module")
def weights(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "captions"
    save_weights(make_task("captioning", root), folder)
    return folder


class Process:
    """A running `beit3 serve`."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, "-m", "beit3", "serve", *map(str, words), "--port", "0"]
        environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def wait_for(self, pattern: str) -> re.Match[str]:
        for _ in range(600):
            for line in self.lines:
                if match := re.search(pattern, line):
                    return match
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in {self.lines}")

    @property
    def port(self) -> int:
        return int(self.wait_for(r"listening at http://127\.0\.0\.1:(\d+)")[1])

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(30)
        self._reader.join(5)
        return status


@contextmanager
def run_server(*words: object) -> Iterator[Process]:
    server = Process(*words)
    try:
        server.wait_for("ready at")
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def send_raw(port: int, data: bytes, *, limit: float = 20.0) -> bytes:
    """Sends bytes and returns all that comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=limit) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_a_server_answers_and_ends_without_losing_a_request(weights, tmp_path):
    body = {"image": to_base64(make_png())}
    expected = load(weights)(make_png())
    with run_server(weights, f"other={weights}", "--folder", tmp_path) as server:
        base = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=base) as client:
            assert client.get("/readyz").json() == {"status": "ready"}
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [
                "captions",
                "other",
            ]
            for path in ("/v1/captioning", "/v1/captions/captioning", "/v1/other/captioning"):
                assert_same(client.post(path, json=body).json()["predictions"], expected)

        answers: list[int] = []
        lost: list[str] = []

        def call() -> None:
            with httpx.Client(base_url=base, timeout=20) as client:
                for _ in range(1000):
                    try:
                        response = client.post("/v1/captioning", json=body)
                    except httpx.ConnectError:
                        return  # nobody listens any more
                    except httpx.HTTPError as error:
                        lost.append(repr(error))
                        return
                    assert response.status_code == 200
                    answers.append(response.status_code)

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        before = len(answers)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        draining = httpx.get(f"{base}/readyz")
        assert draining.status_code == 503 and draining.json() == {"status": "draining"}
        for thread in threads:
            thread.join(30)
        assert server.stop() == 0
        assert not lost and len(answers) > before > 0
        assert any("all accepted requests were answered" in line for line in server.lines)
        assert not any("Traceback" in line for line in server.lines)


def test_what_is_loaded_is_left_out_of_collections(weights):
    service, lines = Service(), []
    loader = Loader(service, None, lines.append, "address")
    count = gc.get_freeze_count()
    try:
        loader.run({"captions": str(weights)}, "")
        assert loader.error is None and "ready at address" in lines[-1]
        assert gc.get_freeze_count() > count + 1000
    finally:
        gc.unfreeze()
        service.stop()


def test_slow_and_endless_senders_are_refused_and_others_served(weights):
    with run_server(weights, "--max-bytes", "100000") as server:
        port = server.port
        head = b"POST /v1/captioning HTTP/1.1\r\nHost: localhost\r\n"
        head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"
        answer = b""
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            try:
                connection.sendall(head)
                for _ in range(1000):
                    connection.sendall(chunk)
            except OSError:
                pass  # the server has closed the connection
            try:
                while data := connection.recv(65536):
                    answer += data
            except OSError:
                pass
        assert not answer or b" 413 " in answer.splitlines()[0]

        results = {}
        slow_head = (
            b"POST /v1/captioning HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
        )
        requests = {"no headers": b"", "half a header": b"GET / HT", "half a body": slow_head}

        def call(name: str) -> None:
            started = time.monotonic()
            results[name] = (send_raw(port, requests[name], limit=25), time.monotonic() - started)

        threads = [threading.Thread(target=call, args=(name,)) for name in requests]
        for thread in threads:
            thread.start()
        body = {"image": to_base64(make_png())}
        base = f"http://127.0.0.1:{port}"
        assert httpx.post(f"{base}/v1/captioning", json=body).status_code == 200
        for thread in threads:
            thread.join(30)
        assert results["no headers"][0] == results["half a header"][0] == b""
        assert b" 408 " in results["half a body"][0].splitlines()[0]
        assert all(seconds < 15 for _, seconds in results.values())

        assert b" 400 " in send_raw(port, b"nonsense\r\n\r\n").splitlines()[0]
        huge = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000
        try:
            assert b" 400 " in send_raw(port, huge).splitlines()[0]
        except OSError:
            pass  # closed before all was sent
        assert httpx.get(f"{base}/healthz").status_code == 200
        assert server.stop(signal.SIGINT) == 0


def test_weights_that_cannot_be_loaded_end_the_server_with_one_line(tmp_path, root):
    save_weights(make_task("captioning", root), tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"damaged")
    server = Process(tmp_path / "a")
    assert server.process.wait(60) == 2
    server.stop()
    assert server.lines[-1].startswith("beit3: ") and not any("Trace" in x for x in server.lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no weights at nowhere"),
        (["{weights}", "{weights}"], "two weights are named captions"),
        (["models={weights}"], "can be no name"),
        (["{weights}", "--folder", "nowhere"], "is no directory"),
        (["{weights}", "--token-file", "nowhere"], "cannot read the token file nowhere"),
        (["{weights}", "--max-batch", "0"], "at least 1"),
        (["{weights}", "--port", "99999"], "cannot listen"),
        (["{weights}", "--host", "300.1.1.1"], "cannot listen"),
    ],
)
def test_wrong_options_are_one_line(run_failing_cli, weights, words, message):
    line = run_failing_cli("serve", *(word.format(weights=weights) for word in words))
    assert message in line


def test_a_taken_port_is_one_line(run_failing_cli, weights):
    with open_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert format_address(listener) == f"http://127.0.0.1:{port}"
        assert f"127.0.0.1:{port}" in run_failing_cli("serve", weights, "--port", port)


def test_a_missing_package_is_one_line(run_failing_cli, weights, monkeypatch):
    for package in ("uvicorn", "fastapi", "prometheus_client", "python_multipart"):
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] == package]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, package, None)
            line = run_failing_cli("serve", weights, "--port", "0")
            assert "pip install 'beit3[serve]'" in line and package.replace("_", "-") in line


def test_tokens_are_read_strictly(tmp_path):
    file = tmp_path / "token"
    file.write_text("  a-long-token\n")
    assert read_token(file) == "a-long-token"
    for text in ("", "short", "two words here", "ungewöhnlich"):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no token"):
            read_token(file)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not UTF-8"):
        read_token(file)


def test_loopback_addresses_are_known():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


def test_the_verb_is_documented():
    from beit3.cli.app import read_command

    verb, arguments = read_command(["serve", "a=b", "c", "--folder", "x", "y", "--port", "1"])
    assert verb.__name__ == "serve" and arguments["weights"] == ("a=b", "c")
    assert json.loads(json.dumps(arguments["folder"])) == ["x", "y"]
