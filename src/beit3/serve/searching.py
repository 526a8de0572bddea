"""`POST /search`: the index by text, image or a row, and `GET /images/<id>`."""

import io
from collections.abc import Hashable, Mapping
from typing import Any
from urllib.parse import quote

from PIL import Image

from beit3.images import open_image, open_with_pillow
from beit3.search.query import Query, Result, check_column, read_filter
from beit3.serve.refusal import Refusal, refuse_value_errors
from beit3.serve.schemas import IMAGE_SCHEMA, describe_errors
from beit3.serve.service import Index, check_text_length
from beit3.serve.uploads import Limits, check_header, check_names, read_image, read_text

FIELDS = ("text", "image", "id", "k", "offset", "where", "group_by", "modality")
MAX_RESULTS = 1_000
"""Largest k."""
MAX_OFFSET = 100_000

SHOWN_FORMATS = frozenset({"JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"})
"""Formats that browsers show. Images of others are sent as PNG."""


def read_query(fields: Mapping[str, Any], index: Index, limits: Limits) -> tuple[Hashable, Query]:
    """Returns the batch key and the query of a request. Raises Refusal."""
    check_names(fields, FIELDS)
    texts = {
        name: read_text(fields[name], name, limits) if fields.get(name) is not None else ""
        for name in ("text", "id", "where", "group_by", "modality")
    }
    k = _read_number(fields, "k", 10, 1, MAX_RESULTS)
    offset = _read_number(fields, "offset", 0, 0, MAX_OFFSET)
    modality = texts["modality"] or "image"
    image = None
    if fields.get("image") is not None and fields["image"] != "":
        # It is decoded with its batch: a queue of decoded images would fill the memory.
        image = read_image(fields["image"], "image", limits)
    if not texts["text"].strip() and image is None and not texts["id"]:
        raise Refusal(422, "there is nothing to search for: give text, image or id")
    searcher = index.searcher
    with refuse_value_errors("modality"):
        searcher.check_request(k, offset, "", modality)
    if texts["group_by"]:
        with refuse_value_errors("group_by"):
            check_column(index.store, texts["group_by"])
    with refuse_value_errors("where"):
        condition = read_filter(texts["where"])
        if condition is not None:
            condition.check(index.store.columns)
    query = Query(text=texts["text"].strip(), image=image, id=texts["id"])
    if not index.model and (query.text or image is not None):
        raise Refusal(422, "the weights of the index are not there: search by id alone")
    for name, value in (("text", query.text), ("image", image)):
        if value:
            with refuse_value_errors(name):
                searcher.check_space(name, modality)
    if query.text:
        check_text_length(searcher.predictor, query.text, "text")
    key = ("search", k, offset, texts["where"], texts["group_by"], modality)
    return key, query


def _read_number(
    fields: Mapping[str, Any], name: str, default: int, lowest: int, highest: int
) -> int:
    value = fields.get(name)
    if value is None or value == "":
        return default
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        value = int(value)  # of a form
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise Refusal(422, f"{name} is no whole number of {lowest} to {highest}", field=name)
    return value


def format_result(result: Result) -> dict[str, Any]:
    """Returns a result as it is served."""
    has_image = bool(result.metadata.get("image_path"))
    return {
        "rank": result.rank,
        "id": result.id,
        "score": result.score,
        "metadata": {name: make_json(value) for name, value in result.metadata.items()},
        "image_url": f"/images/{quote(result.id, safe='')}" if has_image else None,
    }


def make_json(value: Any) -> Any:
    """Returns a value of the metadata as JSON has it; NaN becomes null."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def load_picture(index: Index, id: str, limits: Limits) -> tuple[bytes, str]:
    """Returns the image of a row and its content type. Raises Refusal 404 where there is none."""
    data = index.read_picture(id, limits.max_bytes)
    if data is None:
        raise Refusal(404, "there is no such image in the index")
    try:
        check_header(data, "image", limits)
        with open_with_pillow(data, "image") as header:
            kind = header.format or ""
        if kind in SHOWN_FORMATS:
            return data, Image.MIME[kind]
        file = io.BytesIO()
        Image.fromarray(open_image(data).permute(1, 2, 0).numpy()).save(file, "PNG")
        return file.getvalue(), "image/png"
    except (Refusal, ValueError):
        raise Refusal(404, "the image of this row cannot be shown") from None


def make_operation(limits: Limits) -> dict[str, Any]:
    """Returns the description of the endpoint for OpenAPI."""
    text = {"type": "string", "maxLength": limits.max_text}
    schema = {
        "type": "object",
        "properties": {
            "text": text,
            "image": IMAGE_SCHEMA,
            "id": text | {"description": "A row, whose neighbors are looked for."},
            "k": {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS, "default": 10},
            "offset": {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET, "default": 0},
            "where": text | {"description": "Condition on the metadata, as year >= 2019."},
            "group_by": text | {"description": "Column of which each value is shown once."},
            "modality": {"type": "string", "enum": ["image", "text"], "default": "image"},
        },
        "additionalProperties": False,
    }
    result = {
        "type": "object",
        "properties": {
            "rank": {"type": "integer"},
            "id": {"type": "string"},
            "score": {"type": "number"},
            "metadata": {"type": "object"},
            "image_url": {"type": ["string", "null"]},
        },
        "required": ["rank", "id", "score", "metadata", "image_url"],
    }
    response = {
        "type": "object",
        "properties": {"results": {"type": "array", "items": result}},
        "required": ["results"],
    }
    return {
        "summary": "The rows of the index that are nearest to a text, an image or a row",
        "operationId": "search",
        "tags": ["search"],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {
                "description": "The rows, best first.",
                "content": {"application/json": {"schema": response}},
            }
        }
        | describe_errors(),
    }
