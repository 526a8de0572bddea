"""Malformed requests and files: each is refused with a reason, and the server lives."""

import asyncio
import base64
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image

from beit3.serve.limits import GuardSettings
from beit3.serve.refusal import Refusal
from beit3.serve.service import Settings
from beit3.serve.uploads import Limits, find_inside, name_folders, read_json
from tests.serve.client import (
    QUESTION,
    Client,
    check_refusal,
    make_png,
    make_service,
    to_base64,
)

ALLOWED = (400, 404, 405, 408, 413, 415, 422)


@pytest.fixture(scope="module")
def guarded(root, tmp_path_factory):
    """A client of a server with narrow limits and a named folder."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(make_png())
    (folder / "secret.png").write_bytes(make_png(1))
    (folder / "photos" / "link.png").symlink_to(folder / "secret.png")
    (folder / "photos" / "folder.png").mkdir()
    os.mkfifo(folder / "photos" / "pipe.png")
    limits = Limits(
        max_bytes=200_000, max_pixels=100_000, max_text=300, folders={"photos": folder / "photos"}
    )
    service = make_service(root, "vqa", "retrieval", settings=Settings(limits=limits))
    yield Client(service, GuardSettings(max_bytes=200_000))
    service.stop()


def check_alive(client: Client) -> None:
    body = {"image": to_base64(make_png()), "question": QUESTION}
    assert client.post("/v1/vqa", json=body).status_code == 200


def post_raw(body: bytes | str, content_type: str = "application/json") -> dict:
    return {"content": body, "headers": {"content-type": content_type}}


# Bodies -------------------------------------------------------------------------------------------

PNG = to_base64(make_png())
GOOD = {"image": PNG, "question": QUESTION}

BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"17",
    b"{}",
    b'{"image": }',
    b"\xff\xfe\x00",
    b'{"image": "\xff"}',
    b"[" * 50_000,
    b'{"a":' * 20_000,
    b'{"image": NaN, "question": "a"}',
    b'{"image": Infinity, "question": "a"}',
    b"1" * 5_000,
    b'{"question": ' + b"1" * 5_000 + b"}",
    json.dumps(GOOD | {"extra": 1}).encode(),
    json.dumps(GOOD | {"quest": "a"}).encode(),
    json.dumps({"image": PNG}).encode(),
    json.dumps({"question": "a"}).encode(),
    json.dumps(GOOD | {"question": ""}).encode(),
    json.dumps(GOOD | {"question": " \n"}).encode(),
    json.dumps(GOOD | {"question": "a" * 301}).encode(),
    json.dumps(GOOD | {"question": "\ud800"}).encode(),
    json.dumps(GOOD | {"question": ["a"]}).encode(),
    json.dumps(GOOD | {"question": {"a": 1}}).encode(),
    json.dumps(GOOD | {"question": True}).encode(),
    json.dumps(GOOD | {"question": 1e308}).encode(),
]
VALUES_OF_IMAGES = [
    "",
    "a",
    "====",
    "not base64 at all",
    "é",
    "\ud83d",
    PNG[:-1],
    PNG + "!",
    "data:image/png;base64,",
    "data:image/png,abc",
    "data:" + "a" * 5000,
    "data:image/png;base64" + PNG,
    "file:///etc/passwd",
    "http://127.0.0.1/a.png",
    "HTTPS://example.org/a.png",
    "ftp://example.org/a.png",
    "gopher://example.org",
    "/etc/passwd",
    "../../etc/passwd",
    to_base64(b"hello"),
    to_base64(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    to_base64(b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    None,
    True,
    0,
    3.5,
    [],
    [PNG],
    {},
    {"name": None},
    {"name": ["photos/a.png"]},
    {"name": "photos/a.png", "more": 1},
    {"url": "http://example.org/a.png"},
    {"path": "/etc/passwd"},
]
NAMES = [
    "",
    "/",
    "a",
    "photos",
    "photos/",
    "photos/..",
    "photos/../secret.png",
    "photos/./a.png",
    "photos//a.png",
    "photos/a.png/",
    "photos/a.png\0",
    "photos\\a.png",
    "photos/..\\secret.png",
    "../photos/a.png",
    "/etc/passwd",
    "photos//etc/passwd",
    "photos/link.png",
    "photos/folder.png",
    "photos/pipe.png",
    "photos/absent.png",
    "photos/%2e%2e/secret.png",
    "photos/a.png@0+10",
    "photos/a.png:stream",
    "secret.png",
    "other/a.png",
    "photos/" + "a" * 5000,
    "photos/" + "a/" * 1000 + "b",
    "photos/\ud800",
]
BODIES += [json.dumps(GOOD | {"image": value}).encode() for value in VALUES_OF_IMAGES]
BODIES += [json.dumps(GOOD | {"image": {"name": name}}).encode() for name in NAMES]


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_malformed_json_is_refused_with_a_reason(guarded, number):
    message = check_refusal(guarded.post("/v1/vqa", **post_raw(BODIES[number])), *ALLOWED)
    assert "secret" not in message and "/tmp" not in message and "root:" not in message


def test_json_of_many_small_values_is_refused_before_it_is_read():
    body = b'{"a": [' + b"[]," * 300_000 + b"[]]}"
    with pytest.raises(Refusal, match="commas and brackets"):
        read_json(body)


def test_a_good_request_passes_the_same_limits(guarded):
    check_alive(guarded)
    body = GOOD | {"image": {"name": "photos/a.png"}}
    assert guarded.post("/v1/vqa", json=body).status_code == 200


def test_a_name_outside_does_not_tell_whether_the_file_exists(guarded):
    messages = {
        check_refusal(guarded.post("/v1/vqa", json=GOOD | {"image": {"name": name}}), 404)
        for name in ("photos/../secret.png", "photos/../absent.png", "photos/link.png", "x/y")
    }
    assert len(messages) == 1


def part(name: str, data: bytes, *, file: str = "", head: str = "") -> bytes:
    file_name = f'; filename="{file}"' if file else ""
    disposition = head or f'Content-Disposition: form-data; name="{name}"{file_name}'
    return b"--b\r\n" + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"


IMAGE_PART = part("image", make_png(), file="a.png")
QUESTION_PART = part("question", b"what")
END = b"--b--\r\n"
FORM = "multipart/form-data; boundary=b"
FORMS = [
    (b"", FORM),
    (END, FORM),
    (b"garbage", FORM),
    (IMAGE_PART + QUESTION_PART, FORM),
    ((IMAGE_PART + QUESTION_PART + END)[:-40], FORM),
    (IMAGE_PART + END, FORM),
    (QUESTION_PART + END, FORM),
    (IMAGE_PART + IMAGE_PART + QUESTION_PART + END, FORM),
    (IMAGE_PART + QUESTION_PART * 100 + END, FORM),
    (IMAGE_PART + QUESTION_PART + part("", b"a") + END, FORM),
    (IMAGE_PART + QUESTION_PART + part("x", b"a") + END, FORM),
    (IMAGE_PART + part("question", b"\xff\xfe") + END, FORM),
    (IMAGE_PART + part("question", b"what", file="a.txt") + END, FORM),
    (part("image", b"../../etc/passwd") + QUESTION_PART + END, FORM),
    (part("image", b"", file="a.png") + QUESTION_PART + END, FORM),
    (part("image", b"no image", file="../../a.png") + QUESTION_PART + END, FORM),
    (part("image", b"", head="X: y") + END, FORM),
    (part("image", b"", head="X" * 100_000) + END, FORM),
    (part("image", b"", head="\r\n".join(f"X{n}: y" for n in range(1000))) + END, FORM),
    (part("image", b"", head="X: " + "y" * 100_000) + END, FORM),
    (part("image", b"", head="Content-Disposition: form-data; name=\xff") + END, FORM),
    (IMAGE_PART + QUESTION_PART + END, "multipart/form-data"),
    (IMAGE_PART + QUESTION_PART + END, "multipart/form-data; boundary="),
    (IMAGE_PART + QUESTION_PART + END, "multipart/form-data; boundary=c"),
    (IMAGE_PART + QUESTION_PART + END, "multipart/form-data; boundary=" + "b" * 5000),
    (IMAGE_PART + QUESTION_PART + END, "multipart/mixed; boundary=b"),
    (json.dumps(GOOD).encode(), "text/plain"),
    (json.dumps(GOOD).encode(), ""),
    (json.dumps(GOOD).encode(), ";;;"),
    (json.dumps(GOOD).encode(), FORM),
    (IMAGE_PART + QUESTION_PART + END, "application/json"),
    (b"image=a&question=b", "application/x-www-form-urlencoded"),
    (make_png(), "image/png"),
    (make_png(), "application/octet-stream"),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_malformed_forms_are_refused_with_a_reason(guarded, number):
    check_refusal(guarded.post("/v1/vqa", **post_raw(*FORMS[number])), *ALLOWED)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/vqa"),
        ("PUT", "/v1/vqa"),
        ("DELETE", "/v1/models"),
        ("POST", "/"),
        ("POST", "/v1/nothing"),
        ("POST", "/v1/vqa/"),
        ("POST", "/v1/vqa/vqa/vqa"),
        ("POST", "/v1/%2e%2e/vqa"),
        ("POST", "/v1/models"),
        ("GET", "/nothing"),
        ("GET", "/page/"),
        ("GET", "/page/../app.py"),
        ("GET", "/page/%00"),
        ("GET", "/.git/config"),
        ("GET", "/images/%00"),
        ("PATCH", "/healthz"),
        ("TRACE", "/"),
    ],
)
def test_wrong_paths_and_methods_are_refused_with_a_reason(guarded, method, path):
    check_refusal(guarded.request(method, path), *ALLOWED)


# Files --------------------------------------------------------------------------------------------


def make_bomb(width: int, height: int) -> bytes:
    """Returns a PNG of few bytes with many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def read_peak_memory() -> int:
    """Returns the largest resident memory of this process so far, in KiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("size", [(400, 300), (20_000, 20_000), (2**31 - 1, 1), (60_000, 60_000)])
def test_decompression_bombs_are_refused_before_they_are_decoded(guarded, size):
    check_alive(guarded)
    before = read_peak_memory()
    body = GOOD | {"image": to_base64(make_bomb(*size))}
    assert "pixels" in check_refusal(guarded.post("/v1/vqa", json=body), 413)
    assert read_peak_memory() - before < 20_000


def make_file(format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(file, format, **options)
    return file.getvalue()


def damage(data: bytes, rng: random.Random) -> bytes:
    """Returns a file with bytes changed, cut, doubled or added."""
    changed = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 2:
        start = rng.randrange(len(changed))
        changed[start:start] = changed[: rng.randrange(1, 200)]
    else:
        start = rng.randrange(min(60, len(changed)))
        changed[start : start + 4] = rng.randbytes(4)
    return bytes(changed)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_damaged_files_are_answered_or_refused_with_a_reason(guarded, format):
    rng = random.Random(format)
    data = make_file(format)
    calls = []
    for _ in range(40):
        files = {"image": ("a", damage(data, rng))}
        calls.append(("POST", "/v1/vqa", {"files": files, "data": {"question": QUESTION}}))
    refused = 0
    for response in guarded.request_many(calls):
        if response.status_code != 200:
            check_refusal(response, 413, 422)
            refused += 1
    assert 0 < refused
    check_alive(guarded)


# Random requests ----------------------------------------------------------------------------------


def test_random_json_is_never_an_error_of_the_server(guarded):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    leaves = (
        strategies.none()
        | strategies.booleans()
        | strategies.integers()
        | strategies.floats()
        | strategies.text(max_size=20)
        | strategies.sampled_from([PNG, QUESTION, "photos/a.png"])
    )
    values = strategies.recursive(
        leaves,
        lambda inner: (
            strategies.lists(inner, max_size=3)
            | strategies.dictionaries(strategies.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )
    names = ("image", "question", "text", "input", "model", "encoding_format", "dimensions", "k")
    bodies = strategies.dictionaries(strategies.sampled_from(names), values, max_size=4) | values
    paths = ("/v1/vqa", "/v1/embeddings", "/v1/retrieval", "/search", "/v1/vqa/vqa")

    @hypothesis.settings(
        max_examples=120,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(path=strategies.sampled_from(paths), body=bodies)
    def check(path, body):
        response = guarded.post(path, **post_raw(json.dumps(body)))
        if response.status_code != 200:
            check_refusal(response, *ALLOWED)

    check()
    check_alive(guarded)


@pytest.mark.filterwarnings("ignore")
def test_requests_made_from_the_schema_get_answers_that_it_describes(guarded):
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    document = guarded.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:

            @hypothesis.settings(
                max_examples=15,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                nonlocal count
                options = case.as_transport_kwargs(base_url="http://127.0.0.1")
                response = send_case(guarded, options)
                count += 1
                if response is None:
                    return
                if response.status_code != 200:
                    check_refusal(response, *ALLOWED)
                described = case.operation.definition.raw["responses"]
                assert response.status_code == 405 or str(response.status_code) in described

            try:
                check()
            except hypothesis.errors.Unsatisfiable:
                assert not operation.body, "only a request without a body has no wrong form"
    assert count >= 60
    check_alive(guarded)


def send_case(client: Client, options: dict) -> httpx.Response | None:
    """Sends a generated request; None for one that is no request of HTTP at all."""
    allowed = {"params", "json", "data", "files", "headers", "cookies", "content"}
    request_options = {name: value for name, value in options.items() if name in allowed and value}
    if isinstance(request_options.get("data"), bytes | str):
        request_options["content"] = request_options.pop("data")
    try:
        return client.request(options["method"], options["url"], **request_options)
    except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError, TypeError, ValueError):
        return None


# Size and time ------------------------------------------------------------------------------------


def call_app(client: Client, messages: list[dict], headers: list, *, delay: float = 0.0):
    """Calls the application with pieces of a body; returns status and body, or None."""

    async def run():
        pending, sent = list(messages), []

        async def receive():
            if not pending:
                await asyncio.Event().wait()
            await asyncio.sleep(delay)
            return pending.pop(0)

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/vqa",
            "raw_path": b"/v1/vqa",
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }
        await asyncio.wait_for(client.app(scope, receive, send), 20)
        return sent, len(messages) - len(pending)

    return asyncio.run(run())


def make_chunks(size: int, count: int) -> list[dict]:
    return [{"type": "http.request", "body": bytes(size), "more_body": True}] * count


JSON_HEADERS = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]


def test_a_body_without_end_is_refused_at_the_limit(guarded):
    sent, num_read = call_app(guarded, make_chunks(50_000, 100), JSON_HEADERS)
    assert sent[0]["status"] == 413 and num_read == 5
    assert (b"connection", b"close") in sent[0]["headers"]
    assert b"200000 bytes" in sent[1]["body"]


def test_a_declared_length_beyond_the_limit_is_refused_unread(guarded):
    for declared in (b"200001", b"9" * 40):
        headers = [*JSON_HEADERS, (b"content-length", declared)]
        sent, num_read = call_app(guarded, make_chunks(10, 3), headers)
        assert sent[0]["status"] == 413 and num_read == 0


def test_a_slow_sender_is_refused(root):
    service = make_service(root, "vqa")
    client = Client(service, GuardSettings(patience=0.2, min_rate=1000.0))
    sent, num_read = call_app(client, make_chunks(1, 1000), JSON_HEADERS, delay=0.05)
    assert sent[0]["status"] == 408 and num_read < 10
    sent, num_read = call_app(client, [], JSON_HEADERS)
    assert sent[0]["status"] == 408, "one that sends nothing"
    chunks = make_chunks(200, 8)
    chunks[-1] = chunks[-1] | {"more_body": False}
    sent, _ = call_app(client, chunks, JSON_HEADERS, delay=0.05)
    assert sent[0]["status"] == 400, "one that is fast enough is read to the end"
    service.stop()


def test_all_bodies_together_are_limited(root):
    service = make_service(root, "vqa")
    client = Client(service, GuardSettings(max_bytes=1000, max_buffered=1500))

    async def run():
        hold = asyncio.Event()
        statuses = []

        async def call():
            pieces = [bytes(900), b""]

            async def receive():
                if not pieces:
                    await asyncio.Event().wait()
                if len(pieces) == 1:
                    await hold.wait()
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            scope = {"type": "http", "method": "POST", "path": "/v1/vqa", "headers": JSON_HEADERS}
            scope |= {"query_string": b"", "root_path": "", "scheme": "http"}
            await client.app(scope, receive, send)

        first = asyncio.ensure_future(call())
        await asyncio.sleep(0.05)
        await call()
        hold.set()
        await first
        await call()
        return statuses

    assert asyncio.run(run()) == [503, 400, 400], "afterwards the bytes are free again"
    service.stop()


def test_a_client_that_hangs_up_is_not_computed(root):
    service = make_service(root, "vqa")
    client = Client(service)
    batcher = service.models["vqa"].batcher
    body = json.dumps(GOOD).encode()
    messages = [
        {"type": "http.request", "body": body, "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent, _ = call_app(client, messages, JSON_HEADERS)
    assert sent == [] and batcher.count == 0 and batcher.num_computed == 0
    half = [{"type": "http.request", "body": body[:9], "more_body": True}, messages[1]]
    sent, _ = call_app(client, half, JSON_HEADERS)
    assert sent == [] and "beit3_hang_ups_total 2.0" in client.get("/metrics").text
    check_alive(client)
    service.stop()


def test_nothing_is_written_and_nothing_is_fetched(root, tmp_path, monkeypatch):
    """Files of forms stay in memory, whatever their size and name."""
    import builtins
    import socket
    import tempfile

    service = make_service(root, "vqa")
    client = Client(service)
    check_alive(client)
    opened = builtins.open

    def refuse(*args, **kwargs):
        raise AssertionError("a file was made or an address was called")

    def open_for_reading(file, mode="r", *args, **kwargs):
        assert set(mode) <= set("rbt"), f"{file} was opened to write"
        return opened(file, mode, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "open", open_for_reading)
    for name in ("mkstemp", "TemporaryFile", "NamedTemporaryFile", "mkdtemp"):
        monkeypatch.setattr(tempfile, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    noise = Image.effect_noise((1500, 1500), 100).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "BMP")
    files = {"image": ("../../../tmp/evil.bmp", file.getvalue())}
    answer = client.post("/v1/vqa", files=files, data={"question": QUESTION})
    assert answer.status_code == 200, answer.text
    for url in ("http://example.org/a.png", "//example.org/a.png", "file:///etc/passwd"):
        check_refusal(client.post("/v1/vqa", json=GOOD | {"image": url}), 422)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    service.stop()


# Folders ------------------------------------------------------------------------------------------


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    (tmp_path / "inside" / "out").symlink_to(tmp_path / "b")
    (tmp_path / "inside" / "up").symlink_to(tmp_path)
    (tmp_path / "inside" / "loop").symlink_to(tmp_path / "inside" / "loop")
    (tmp_path / "inside" / "same").symlink_to(tmp_path / "inside" / "a")
    folder = tmp_path / "inside"
    assert find_inside(folder, "a") == find_inside(folder, "same") == (folder / "a").resolve()
    for name in ("out", "up/b", "loop", "../b", str(tmp_path / "b"), "absent", "a\0"):
        assert find_inside(folder, name) is None


def test_folders_are_named_as_themselves(tmp_path):
    for name in ("one/photos", "two/photos"):
        (tmp_path / name).mkdir(parents=True)
    assert name_folders([tmp_path / "one" / "photos"]) == {"photos": tmp_path / "one" / "photos"}
    with pytest.raises(ValueError, match="two directories are named photos"):
        name_folders([tmp_path / "one" / "photos", tmp_path / "two" / "photos"])
    with pytest.raises(ValueError, match="is no directory"):
        name_folders([Path(tmp_path / "absent")])


def test_base64_is_read_strictly(guarded):
    spaced = base64.encodebytes(make_png()).decode()
    body = GOOD | {"image": spaced}
    assert "base64" in check_refusal(guarded.post("/v1/vqa", json=body), 422)
