"""A server with canned answers for tests of the page: it follows the HTTP conventions of
`beit3.serve`, refuses where a test wants it, and keeps the requests that it got."""

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit3.data.stores.rle import encode_rle
from beit3.segmentation.records import encode_label_map
from beit3.serve.limits import SECURITY_HEADERS

PAGE = files("beit3") / "serve" / "page"
PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript",
    "css": "text/css",
    "json": "application/json",
    "png": "image/png",
}

IMAGE = {"name": "image", "kind": "image", "required": True}
QUESTION = {"name": "question", "kind": "text", "required": True}
STATEMENT = {"name": "statement", "kind": "text", "required": True}
CLASSES = ("sky", "grass", "water")
SIDE = 64
"""Width and height of the pictures that the canned answers are about."""


def describe_model(name: str, task: str, *inputs: dict, **more: Any) -> dict[str, Any]:
    """Returns an entry of GET /v1/models."""
    path = f"/v1/{name}/{task}"
    return {"id": name, "task": task, "path": path, "inputs": list(inputs), **more}


MODELS = [
    describe_model("world-vqa", "vqa", IMAGE, QUESTION, attention=True),
    describe_model("other-vqa", "vqa", IMAGE, QUESTION, attention=False),
    describe_model("world-captioning", "captioning", IMAGE, attention=True),
    describe_model("world-coco", "coco", IMAGE),
    describe_model("world-ade20k", "ade20k", IMAGE, classes=list(CLASSES)),
    describe_model("world-retrieval", "retrieval", {**IMAGE, "required": False}, embeds=True),
    describe_model("world-nlvr2", "nlvr2", IMAGE, {**IMAGE, "name": "image2"}, STATEMENT),
    describe_model("my-rating", "mine.rating", IMAGE),
]
INDEX = {
    "rows": 30,
    "columns": {"id": "string", "caption": "string", "year": "int64"},
    "model": "world-retrieval",
}


@dataclass
class Behavior:
    """What the server answers. Requests are filled in by it."""

    models: list[dict[str, Any]] = field(default_factory=lambda: list(MODELS))
    index: dict[str, Any] | None = field(default_factory=lambda: dict(INDEX))
    refusals: list[tuple[int, str, str | None]] = field(default_factory=list)
    """Status, message and field of the next answers to POST, in place of results."""
    retry_after: str = "0.1"
    loading: int = 0
    """How many requests for the models are refused, as while weights are loaded."""
    token: str = ""
    hold: threading.Event | None = None
    """Answers to POST wait for it."""
    results: list[dict[str, Any]] | None = None
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and fields of each POST."""


# Canned answers -----------------------------------------------------------------------------------


def make_picture(seed: int = 0, side: int = SIDE) -> bytes:
    """Returns a PNG with a blue disk on a background that depends on the seed."""
    y, x = np.mgrid[:side, :side] / side
    pixels = np.stack([90 + 120 * x, 120 + 90 * y, np.full_like(x, 60 + 37 * seed % 160)], -1)
    pixels[(x - 0.3) ** 2 + (y - 0.35) ** 2 < 0.04] = (40, 70, 220)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_mask(left: int, top: int, right: int, bottom: int) -> dict[str, Any]:
    """Returns the RLE of an ellipse in a box."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    width, height = right - left, bottom - top
    inside = ((2 * x - left - right) / width) ** 2 + ((2 * y - top - bottom) / height) ** 2 < 1
    return encode_rle(torch.from_numpy(inside))


def make_objects() -> list[dict[str, Any]]:
    """Returns three objects: two clear ones and a doubtful one."""
    boxes = [("circle", 0, 0.93, (7, 10, 32, 36)), ("ground", 1, 0.58, (0, 40, 64, 64))]
    boxes.append(("bird", 2, 0.12, (45, 4, 60, 16)))
    return [
        {"name": name, "label": label, "score": score, "box": list(box), "mask": make_mask(*box)}
        for name, label, score, box in boxes
    ]


def make_attention(words: list[str]) -> dict[str, Any]:
    """Returns a map of 4 x 4 patches for each word: word i looks at patch i alone."""
    maps = np.zeros((len(words), 16))
    maps[np.arange(len(words)), np.arange(len(words)) % 16] = 0.5
    return {"words": words, "maps": maps.reshape(-1, 4, 4).tolist()}


def predict(task: str) -> dict[str, Any]:
    """Returns the answer of a task but for model and time."""
    if task == "vqa":
        scores = {"blue": 0.81, "red": 0.12, "green": 0.034}
        candidates = [{"answer": answer, "score": score} for answer, score in scores.items()]
        tokens = ["<s>", "▁what", "▁col", "or", "▁is", "▁it", "</s>"]
        return {"predictions": candidates, "attention": make_attention(tokens)}
    if task == "captioning":
        caption = {"id": "0", "caption": "a blue circle", "score": -1.5}
        tokens = ["<s>", "▁a", "▁blue", "▁circle", "</s>"]
        return {"predictions": [caption], "attention": make_attention(tokens)}
    if task == "coco":
        return {"predictions": [{"height": SIDE, "width": SIDE, "objects": make_objects()}]}
    if task == "ade20k":
        labels = torch.zeros(SIDE, SIDE, dtype=torch.long)
        labels[40:] = 1
        labels[50:, 32:] = 2
        label_map = encode_label_map(labels)
        return {"predictions": [{"height": SIDE, "width": SIDE, "map": label_map}]}
    if task == "nlvr2":
        return {"predictions": [{"answer": True, "score": 0.7}, {"answer": False, "score": 0.3}]}
    return {"predictions": [{"id": "0", "rating": 4.5}]}


def search(query: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows from `offset`, of `INDEX["rows"]` in all."""
    start = query.get("offset", 0)
    rows = range(start, min(start + query["k"], INDEX["rows"]))
    return [
        {
            "rank": row + 1,
            "id": f"row{row}",
            "score": 0.9 - 0.01 * row,
            "metadata": {"id": f"row{row}", "caption": f"picture number {row}", "year": 2000 + row},
            "image_url": f"/images/row{row}",
        }
        for row in rows
    ]


# Server -------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    behavior: Behavior

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/" or re.fullmatch(r"/page/[\w.-]+", path):
            self.send_page(path.removeprefix("/page/") if path != "/" else "index.html")
        elif not self.check_token():
            return
        elif path == "/docs":
            self.send(200, PAGE_TYPES["html"], b"<title>API</title><h1>All endpoints</h1>")
        elif path == "/v1/models" and self.behavior.loading:
            self.behavior.loading -= 1
            self.send_error_json(503, "the server is loading its weights")
        elif path == "/v1/models":
            self.send_json(200, {"data": self.behavior.models, "index": self.behavior.index})
        elif match := re.fullmatch(r"/images/row(\d+)", path):
            self.send(200, "image/png", make_picture(int(match[1])))
        else:
            self.send_error_json(404, "there is nothing here")

    def do_POST(self) -> None:
        behavior = self.behavior
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.check_token():
            return
        behavior.requests.append((self.path, self.read_fields(body)))
        if behavior.hold is not None:
            behavior.hold.wait(10)
        if behavior.refusals:
            self.send_error_json(*behavior.refusals.pop(0))
            return
        self.send_json(200, self.answer(behavior.requests[-1][1]))

    def answer(self, fields: dict[str, Any]) -> dict[str, Any]:
        path = self.path.partition("?")[0]
        if path == "/search":
            results = self.behavior.results
            return {"results": search(fields) if results is None else results}
        if path == "/v1/embeddings":
            vectors = [[1.0, 0.0], [0.6, 0.8], [1.0, 0.1]][: len(fields["input"])]
            data = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
            return {"data": data, "model": fields["model"]}
        _, _, name, task = path.split("/")
        answer = {"model": name, "task": task, "seconds": 0.0123, **predict(task)}
        if "attention=true" not in self.path:
            answer.pop("attention", None)
        return answer

    def read_fields(self, body: bytes) -> dict[str, Any]:
        """Returns the fields of a JSON object, or of a form: files as bytes, others as text."""
        kind = self.headers["Content-Type"]
        if kind == "application/json":
            return json.loads(body)
        form = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
        fields: dict[str, Any] = {}
        for part in form.get_payload():
            content = part.get_payload(decode=True)
            is_file = part.get_filename() is not None
            name = part.get_param("name", header="content-disposition")
            fields[name] = content if is_file else content.decode()
        return fields

    def check_token(self) -> bool:
        token = self.behavior.token
        if not token or self.headers["Authorization"] == f"Bearer {token}":
            return True
        self.send_error_json(401, "the token is missing or wrong")
        return False

    def send_page(self, name: str) -> None:
        content = (PAGE / name).read_bytes()
        self.send(200, PAGE_TYPES[name.rpartition(".")[2]], content)

    def send_error_json(self, status: int, message: str, field: str | None = None) -> None:
        self.send_json(status, {"error": {"message": message, "field": field}})

    def send_json(self, status: int, value: Any) -> None:
        self.send(status, "application/json", json.dumps(value).encode())

    def send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in SECURITY_HEADERS.items():
            self.send_header(name, value)
        if status == 503:
            self.send_header("Retry-After", self.behavior.retry_after)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        with suppress(ConnectionError):  # a test has closed its page
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keeps the output of tests clean."""


@contextmanager
def serve_page() -> Iterator[tuple[str, Behavior]]:
    """Yields the address of a running server, and its behavior, which a test may change."""
    behavior = Behavior()
    handler = type("BoundHandler", (Handler,), {"behavior": behavior})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", behavior
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def decode_data_uri(uri: str) -> bytes:
    """Returns the content of a data URI in base64."""
    return base64.b64decode(uri.partition("base64,")[2])
