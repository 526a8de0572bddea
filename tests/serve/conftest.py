"""The server's packages, without which these tests are skipped, and a service for many tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "httpx"):
    pytest.importorskip(package, reason="pip install 'beit3[serve]' httpx")


@pytest.fixture(scope="session")
def served(root: Path) -> Iterator["Client"]:  # noqa: F821
    """A client of a service with several networks; tests change nothing of it."""
    from tests.serve.client import Client, make_service

    service = make_service(root, "vqa", "captioning", "retrieval", "coco", "nlvr2")
    yield Client(service)
    service.stop()
