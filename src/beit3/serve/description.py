"""The description of all endpoints: as OpenAPI, and as a page that loads nothing from outside."""

import html
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from beit3.serve import embeddings, searching
from beit3.serve.schemas import ERROR_SCHEMA, describe_errors, make_operation
from beit3.serve.service import Service


def get_version() -> str:
    """Returns the version of this package, "0" where it is not installed."""
    try:
        return version("beit3")
    except PackageNotFoundError:
        return "0"


def describe_api(service: Service) -> dict[str, Any]:
    """Returns the OpenAPI document of what a service offers now."""
    limits = service.settings.limits
    paths: dict[str, Any] = {}
    for model in service.models.values():
        task = model.predictor.task
        for path in (f"/v1/{model.task_name}", model.path):
            if path in paths:
                continue
            operation = make_operation(
                model.name,
                task,
                model.inputs,
                limits,
                operation_id=path.strip("/").replace("/", "_"),
                attends=model.attends,
            )
            paths[path] = {"post": operation}
    if any(model.embeds for model in service.models.values()):
        paths["/v1/embeddings"] = {"post": embeddings.make_operation(limits)}
    if service.index is not None:
        paths["/search"] = {"post": searching.make_operation(limits)}
        paths["/images/{id}"] = {"get": _describe_picture()}
    paths["/v1/models"] = {"get": _describe_get("models", "The networks and the index.")}
    paths["/healthz"] = {"get": _describe_get("healthz", "Whether the process lives.")}
    paths["/readyz"] = {"get": _describe_get("readyz", "Whether requests should be sent here.")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "BEiT-3",
            "version": get_version(),
            "description": "Predictions, features and search. Images are sent as files or base64.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR_SCHEMA},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _describe_get(name: str, summary: str) -> dict[str, Any]:
    answer = {
        "description": summary,
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
    errors = describe_errors()
    return {
        "summary": summary,
        "operationId": name,
        "tags": ["server"],
        "responses": {"200": answer, "401": errors["401"], "503": errors["503"]},
    }


def _describe_picture() -> dict[str, Any]:
    errors = describe_errors()
    return {
        "summary": "The image of a row of the index",
        "operationId": "picture",
        "tags": ["search"],
        "parameters": [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ],
        "responses": {
            "200": {
                "description": "The image.",
                "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
            },
            "401": errors["401"],
            "404": errors["404"],
            "503": errors["503"],
        },
    }


def render_docs(document: dict[str, Any]) -> str:
    """Returns an HTML page of an OpenAPI document: every endpoint with its fields and answers."""
    sections = "\n".join(
        _render_operation(path, method, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>API of this server</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="page/style.css">
</head>
<body>
<header><h1>API of this server</h1>
<p><a href="./">Back to the page</a> · <a href="openapi.json">openapi.json</a></p></header>
<main>
{sections}
</main>
</body>
</html>
"""


def _render_operation(path: str, method: str, operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    fields = "".join(_list_fields(next(iter(content.values()))["schema"])) if content else ""
    answers = "".join(
        f"<li><code>{status}</code> {html.escape(answer['description'])}</li>"
        for status, answer in operation["responses"].items()
    )
    kinds = f"<p>Body: {html.escape(' or '.join(content))}</p>" if content else ""
    listed = f"<ul>{fields}</ul>" if fields else ""
    return (
        f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2>"
        f"<p>{html.escape(operation['summary'])}</p>{kinds}{listed}"
        f"<details><summary>Answers</summary><ul>{answers}</ul></details></section>"
    )


def _list_fields(schema: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    for name, value in schema["properties"].items():
        note = value.get("description") or value.get("type", "")
        keys = ("enum", "maxLength", "maximum")
        limits = ", ".join(f"{key}: {json.dumps(value[key])}" for key in keys if key in value)
        details = f" ({limits})" if limits else ""
        needed = "" if name in required else " (optional)"
        text = html.escape(f"{note}{details}")
        yield f"<li><code>{html.escape(name)}</code>{needed} {text}</li>"
