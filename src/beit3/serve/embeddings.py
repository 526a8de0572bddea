"""`POST /v1/embeddings` in the shape of OpenAI's API, with images beside texts."""

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beit3.serve.refusal import Refusal
from beit3.serve.schemas import IMAGE_SCHEMA, describe_errors
from beit3.serve.service import Model, Service
from beit3.serve.uploads import Limits, check_names, read_text

FIELDS = ("input", "model", "encoding_format", "dimensions", "user")
MAX_INPUTS = 256
"""Most inputs of a request."""


@dataclass(frozen=True)
class EmbeddingRequest:
    """What to encode: (modality, value) of each input, by which model, and how to write it."""

    inputs: tuple[tuple[str, Any], ...]
    model: str
    in_base64: bool
    dimensions: int | None


def read_request(fields: Mapping[str, Any], limits: Limits) -> EmbeddingRequest:
    """Checks the fields of a request. Raises Refusal."""
    check_names(fields, FIELDS)
    if "input" not in fields:
        raise Refusal(422, "input is missing: give a text, an image or a list", field="input")
    value = fields["input"]
    listed = value if isinstance(value, list) else [value]
    if not 1 <= len(listed) <= MAX_INPUTS:
        raise Refusal(422, f"input has {len(listed)} items: give 1 to {MAX_INPUTS}", field="input")
    model = fields.get("model") or ""
    if not isinstance(model, str):
        raise Refusal(422, "model is not a name", field="model")
    encoding = fields.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise Refusal(422, "encoding_format is neither float nor base64", field="encoding_format")
    dimensions = fields.get("dimensions")
    if dimensions is not None and (isinstance(dimensions, bool) or not isinstance(dimensions, int)):
        raise Refusal(422, "dimensions is no whole number", field="dimensions")
    inputs = tuple(_read_input(value, index, limits) for index, value in enumerate(listed))
    return EmbeddingRequest(inputs, model, encoding == "base64", dimensions)


def _read_input(value: Any, index: int, limits: Limits) -> tuple[str, Any]:
    """Returns the modality and the value of an input."""
    if isinstance(value, dict):
        if set(value) != {"image"}:
            raise Refusal(
                422, f'input {index} is an object, but not {{"image": ...}}', field="input"
            )
        return "image", value["image"]
    if isinstance(value, list) or (isinstance(value, int) and not isinstance(value, bool)):
        raise Refusal(
            422,
            f"input {index} holds token ids, which are another network's: give a text",
            field="input",
        )
    text = read_text(value, "input", limits)
    if not text.strip():
        raise Refusal(422, f"input {index} is empty", field="input")
    return "text", text


async def embed(service: Service, request: EmbeddingRequest) -> dict[str, Any]:
    """Returns the answer to a request; its inputs share batches with those of others."""
    model = service.find_embedder(request.model)
    if len(request.inputs) > model.batcher.max_queue:
        raise Refusal(
            422,
            f"input has {len(request.inputs)} items, and {model.batcher.max_queue} can wait here",
            field="input",
        )
    model.batcher.check_room(len(request.inputs))
    tasks = [
        asyncio.ensure_future(service.embed(model, modality, value))
        for modality, value in request.inputs
    ]
    try:
        results = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return _format(request, model, results)


def _format(
    request: EmbeddingRequest, model: Model, results: list[tuple[Any, int]]
) -> dict[str, Any]:
    data = []
    for index, (features, _) in enumerate(results):
        if request.dimensions not in (None, len(features)):
            raise Refusal(
                422,
                f"dimensions is {request.dimensions}: {model.name} has {len(features)}",
                field="dimensions",
            )
        embedding: Any = features.tolist()
        if request.in_base64:
            embedding = base64.b64encode(features.astype("<f4").tobytes()).decode("ascii")
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    num_tokens = sum(count for _, count in results)
    return {
        "object": "list",
        "data": data,
        "model": model.name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def make_operation(limits: Limits) -> dict[str, Any]:
    """Returns the description of the endpoint for OpenAPI."""
    text = {"type": "string", "minLength": 1, "maxLength": limits.max_text}
    image = {
        "type": "object",
        "properties": {"image": IMAGE_SCHEMA},
        "required": ["image"],
        "additionalProperties": False,
    }
    many = {"type": "array", "items": {"anyOf": [text, image]}, "minItems": 1}
    schema = {
        "type": "object",
        "properties": {
            "input": {"anyOf": [text, image, many | {"maxItems": MAX_INPUTS}]},
            "model": {"type": "string", "description": "Name of the weights."},
            "encoding_format": {"type": "string", "enum": ["float", "base64"]},
            "dimensions": {"type": "integer", "description": "Only the width of the features."},
            "user": {"type": "string"},
        },
        "required": ["input"],
        "additionalProperties": False,
    }
    response = {
        "type": "object",
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"type": "object"}},
            "model": {"type": "string"},
            "usage": {"type": "object"},
        },
        "required": ["object", "data", "model", "usage"],
    }
    return {
        "summary": "Features of texts and images, as OpenAI's API returns them",
        "operationId": "embeddings",
        "tags": ["features"],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {
                "description": "One vector per input.",
                "content": {"application/json": {"schema": response}},
            }
        }
        | describe_errors(),
    }
