"""A service of small networks, and a client that calls it in the process."""

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from beit3.serve.app import build_app
from beit3.serve.limits import GuardSettings
from beit3.serve.service import Service, Settings
from tests.predict.networks import make_pixels, make_predictor

QUESTION = "what color is the circle"


def make_png(seed: int = 0, height: int = 20, width: int = 30) -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_pixels(seed, height, width)).save(file, "PNG")
    return file.getvalue()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def make_service(root: Path, *names: str, settings: Settings | None = None) -> Service:
    """Returns a ready service of networks with initial weights, named as their tasks."""
    service = Service(settings)
    for name in names:
        service.add(name, make_predictor(name, root))
    service.start()
    return service


class Client:
    """Calls an application without a network between."""

    def __init__(self, service: Service, guard: GuardSettings | None = None) -> None:
        self.service = service
        self.app = build_app(service, guard)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        (response,) = self.request_many([(method, path, options)])
        return response

    def request_many(self, calls: list[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
        """Sends requests at once, and returns their answers in order."""

        async def run() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as client:
                sent = [client.request(method, path, **options) for method, path, options in calls]
                return await asyncio.gather(*sent)

        return asyncio.run(run())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


def check_refusal(response: httpx.Response, *statuses: int) -> str:
    """Checks that an answer is an error in words, and returns the words."""
    assert response.status_code in statuses, (response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "field"}
    message = error["message"]
    assert message and "\n" not in message and "Traceback" not in message and len(message) < 500
    return message


def read_pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
