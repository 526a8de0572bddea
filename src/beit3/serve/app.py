"""The endpoints: predictions of every task, embeddings, search, images of the index, the page."""

import json
import re
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from beit3.serve import embeddings, searching
from beit3.serve.description import describe_api, get_version, render_docs
from beit3.serve.extra import import_extra
from beit3.serve.limits import ENDPOINT, Guard, GuardSettings
from beit3.serve.refusal import Refusal
from beit3.serve.service import Service
from beit3.serve.uploads import names_files, read_body, read_json

PAGE = files("beit3") / "serve" / "page"

PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
}
"""Ending of the page's files -> content type. Files of other endings are not served."""

IMAGE_CACHE = "private, max-age=3600"

Endpoint = Callable[[Any], Awaitable[Any]]


def build_app(service: Service, guard: GuardSettings | None = None) -> Any:
    """Builds the FastAPI application of a service.

    Args:
        service: The networks and the index; it may still be loading.
        guard: Limits of what comes in, and the token.

    Raises:
        ValueError: A package of the extra `serve` is missing.
    """
    fastapi = import_extra("fastapi")
    import_extra("python_multipart")
    responses = import_extra("starlette.responses")
    exceptions = import_extra("starlette.exceptions")
    app = fastapi.FastAPI(
        title="BEiT-3", version=get_version(), docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    endpoints = Endpoints(service, responses.Response)
    for path, method, endpoint in endpoints.list_routes():
        app.router.add_route(path, endpoint, methods=[method], include_in_schema=False)

    async def refuse(request: Any, error: Exception) -> Any:
        return endpoints.answer_error(error)

    # All other exceptions are faults of the server: the guard logs them and answers 500.
    for kind in (Refusal, exceptions.HTTPException):
        app.add_exception_handler(kind, refuse)
    app.openapi = lambda: describe_api(service)
    app.add_middleware(
        Guard,
        settings=guard or GuardSettings(max_bytes=service.settings.limits.max_bytes),
        metrics=service.metrics,
        is_draining=lambda: service.state == "draining",
        admit=lambda scope: admit(service, scope),
    )
    return app


class Endpoints:
    """The functions behind the paths.

    Args:
        service: The networks and the index.
        response: Class of answers, that of Starlette.
    """

    def __init__(self, service: Service, response: type) -> None:
        self.service = service
        self._response = response

    def list_routes(self) -> list[tuple[str, str, Endpoint]]:
        """Returns path, method and function of all endpoints; the first that matches is taken."""
        return [
            ("/v1/embeddings", "POST", self.embed),
            ("/v1/models", "GET", self.list_models),
            ("/v1/{task}", "POST", self.predict),
            ("/v1/{name}/{task}", "POST", self.predict),
            ("/search", "POST", self.search),
            ("/images/{id:path}", "GET", self.get_picture),
            ("/", "GET", self.get_page),
            ("/page/{name}", "GET", self.get_page),
            ("/docs", "GET", self.get_docs),
            ("/healthz", "GET", self.get_health),
            ("/readyz", "GET", self.get_readiness),
            ("/metrics", "GET", self.get_metrics),
        ]

    # Networks and index ---------------------------------------------------------------------------

    async def predict(self, request: Any) -> Any:
        """Predicts as a task."""
        task, name = request.path_params["task"], request.path_params.get("name", "")
        model = self.service.find_model(task, name)
        request.scope[ENDPOINT] = f"/v1/{model.task_name}"
        attention = read_flag(request.query_params.get("attention", ""), "attention")
        if attention and not model.attends:
            raise Refusal(422, f"{task} has no attention to show: leave it out", field="attention")
        body, content_type = await request.body(), request.headers.get("content-type", "")
        started = time.perf_counter()
        answer = await self.service.predict(
            model,
            lambda: read_body(body, content_type),
            attention=attention,
            reads_files=names_files(body, content_type, self.service.settings.limits),
        )
        seconds = round(time.perf_counter() - started, 6)
        return self._json(
            {"model": model.name, "task": model.task_name, **answer, "seconds": seconds}
        )

    async def embed(self, request: Any) -> Any:
        """Returns features of texts and images."""
        request.scope[ENDPOINT] = "/v1/embeddings"
        self.service.check_ready()
        body = await self._read_json_body(request)
        limits = self.service.settings.limits
        asked = await self.service.bodies.run(
            lambda: embeddings.read_request(read_json(body), limits)
        )
        return self._json(await embeddings.embed(self.service, asked))

    async def search(self, request: Any) -> Any:
        """Searches the index."""
        request.scope[ENDPOINT] = "/search"
        index = self.service.find_index()
        body, content_type = await request.body(), request.headers.get("content-type", "")
        limits = self.service.settings.limits
        results = await self.service.search(
            index,
            lambda: searching.read_query(read_body(body, content_type), index, limits),
            reads_files=names_files(body, content_type, limits),
        )
        return self._json({"results": [searching.format_result(result) for result in results]})

    async def get_picture(self, request: Any) -> Any:
        """Returns the image of a row of the index."""
        request.scope[ENDPOINT] = "/images"
        index, id = self.service.find_index(), request.path_params["id"]
        limits = self.service.settings.limits
        data, kind = await self.service.files.run(lambda: searching.load_picture(index, id, limits))
        return self._response(data, media_type=kind, headers={"Cache-Control": IMAGE_CACHE})

    async def list_models(self, request: Any) -> Any:
        """Lists the networks and the index."""
        request.scope[ENDPOINT] = "/v1/models"
        service = self.service
        service.check_ready()
        index = service.index
        return self._json(
            {
                "object": "list",
                "data": [model.describe() for model in service.models.values()],
                "index": index.describe() if index is not None else None,
            }
        )

    async def _read_json_body(self, request: Any) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "send application/json")
        return await request.body()

    # The server -----------------------------------------------------------------------------------

    async def get_health(self, request: Any) -> Any:
        """Says that the process lives."""
        request.scope[ENDPOINT] = "/healthz"
        return self._json({"status": "ok", "version": get_version()})

    async def get_readiness(self, request: Any) -> Any:
        """Says whether requests should be sent here."""
        request.scope[ENDPOINT] = "/readyz"
        state = self.service.state
        return self._json({"status": state}, status=200 if state == "ready" else 503)

    async def get_metrics(self, request: Any) -> Any:
        """Returns the metrics."""
        request.scope[ENDPOINT] = "/metrics"
        text, kind = self.service.metrics.render()
        return self._response(text, media_type=kind)

    async def get_page(self, request: Any) -> Any:
        """Returns a file of the page."""
        request.scope[ENDPOINT] = "/"
        name = request.path_params.get("name", "index.html")
        kind = PAGE_TYPES.get(name.rpartition(".")[2])
        path = PAGE / name
        if kind is None or not re.fullmatch(r"[\w-]+\.\w+", name) or not path.is_file():
            raise Refusal(404, "there is no such page")
        headers = {"Cache-Control": "no-cache"}
        return self._response(path.read_bytes(), media_type=kind, headers=headers)

    async def get_docs(self, request: Any) -> Any:
        """Returns the description of the endpoints as a page."""
        request.scope[ENDPOINT] = "/docs"
        return self._response(
            render_docs(describe_api(self.service)), media_type="text/html; charset=utf-8"
        )

    # Answers --------------------------------------------------------------------------------------

    def answer_error(self, error: Any) -> Any:
        """Returns the answer for a Refusal or an HTTPException."""
        if not isinstance(error, Refusal):
            refusal = Refusal(error.status_code, str(error.detail))
        elif error.is_quoted:
            message = self.service.clean(error.message)
            refusal = Refusal(error.status, message, field=error.field)
        else:
            refusal = error
        answer = self._json(refusal.content, status=refusal.status)
        answer.headers.update(refusal.headers)
        for name, value in (getattr(error, "headers", None) or {}).items():
            answer.headers[name] = value
        return answer

    def _json(self, content: Any, status: int = 200) -> Any:
        try:
            text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except ValueError as error:  # not the fault of the request
            raise RuntimeError("an answer holds a number that is not finite") from error
        return self._response(
            text.encode("utf-8", "backslashreplace"),
            status_code=status,
            media_type="application/json",
        )


def admit(service: Service, scope: Any) -> None:
    """Raises Refusal 503 before the body is read where a network has no room for one more."""
    if scope["method"] != "POST":
        return
    batcher = service.batchers_by_path.get(scope["path"])
    if batcher is not None:
        task = scope["path"].rpartition("/")[2]
        scope[ENDPOINT] = "/search" if scope["path"] == "/search" else f"/v1/{task}"
        batcher.check_room(1)


def read_flag(text: str, name: str) -> bool:
    """Returns a yes or no of a query. Raises Refusal 422 for other words."""
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("", "false", "0"):
        return False
    raise Refusal(422, f"{name} is neither true nor false", field=name)
