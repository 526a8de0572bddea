"""What each task takes and returns over HTTP, from the signature of its `record`.

No endpoint is written by hand for a task: its inputs are the parameters of `record`, and their
kinds follow from the declared fields of records.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beit3.data.stores.record_fields import FILE, FieldKind
from beit3.serve.refusal import Refusal, refuse_value_errors
from beit3.serve.uploads import Limits, check_names, read_image, read_text
from beit3.task import Record, Task, task_name


@dataclass(frozen=True)
class InputField:
    """One raw input of a task.

    Args:
        name: Its name in requests, a parameter of `record`.
        kind: "image", "text" or "value".
        required: Whether `record` has no default for it.
        accepts: Kind of a value.
        record_field: The field of records that it becomes.
    """

    name: str
    kind: str
    required: bool
    accepts: FieldKind | None = None
    record_field: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "required": self.required}


def list_inputs(task: Task) -> tuple[InputField, ...]:
    """Returns the raw inputs of a task in the order of `record`."""
    if not task.input_names:
        return ()
    parameters = inspect.signature(task.record).parameters
    # The record of placeholders tells which of its fields each input becomes.
    placeholders = {name: object() for name in parameters}
    record = task.record(**placeholders)
    record_fields: dict[str, Any] = {}
    for source in task.sources:
        record_fields |= task.get_record_fields(source)
    fields = []
    for name, parameter in parameters.items():
        field_name = next(
            (key for key, value in record.items() if value is placeholders[name]), name
        )
        declared = record_fields.get(field_name)
        if (declared is not None and declared.kind is FILE) or field_name.startswith("image"):
            kind = "image"
        elif declared is None or "text" in declared.kind.name:
            kind = "text"
        else:
            kind = "value"
        required = parameter.default is inspect.Parameter.empty
        accepts = declared.kind if declared is not None and kind == "value" else None
        fields.append(InputField(name, kind, required, accepts, field_name))
    return tuple(fields)


def read_record(
    task: Task, inputs: tuple[InputField, ...], fields: Mapping[str, Any], limits: Limits
) -> Record:
    """Makes the record of a request. Raises Refusal for fields that are wrong or missing."""
    check_names(fields, [field.name for field in inputs])
    values: dict[str, Any] = {}
    for field in inputs:
        value = fields.get(field.name)
        if value is None:
            if field.required:
                raise Refusal(422, f"{field.name} is missing", field=field.name)
            continue
        if field.kind == "image":
            values[field.name] = read_image(value, field.name, limits)
        elif field.kind == "text":
            text = read_text(value, field.name, limits)
            if field.required and not text.strip():
                raise Refusal(422, f"{field.name} is empty", field=field.name)
            values[field.name] = text
        else:
            values[field.name] = read_value(value, field)
    with refuse_value_errors():
        record = task.record(**values)
    if not record.keys() - {"id"}:
        names = " or ".join(field.name for field in inputs)
        raise Refusal(422, f"all inputs are empty: give {names}")
    return record


def read_value(value: Any, field: InputField) -> Any:
    """Returns a value that is neither image nor text. Raises Refusal for one of another kind."""
    if field.accepts is not None and not field.accepts.accepts(value):
        raise Refusal(422, f"{field.name} is not {field.accepts.name}", field=field.name)
    return value


# OpenAPI ------------------------------------------------------------------------------------------

IMAGE_SCHEMA: dict[str, Any] = {
    "description": "An image: base64 or a data URI, or the name of a file in a folder that the "
    "server was given. URLs are not fetched.",
    "anyOf": [
        {"type": "string", "contentEncoding": "base64"},
        {
            "type": "object",
            "properties": {"name": {"type": "string", "examples": ["photos/a.jpg"]}},
            "required": ["name"],
            "additionalProperties": False,
        },
    ],
}
FILE_SCHEMA = {"type": "string", "format": "binary", "description": "The file of an image."}

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "One line."},
                "field": {"type": ["string", "null"], "description": "The field to blame."},
            },
            "required": ["message", "field"],
        }
    },
    "required": ["error"],
}

STATUSES = {
    400: "The body or a parameter cannot be read.",
    401: "The token is missing or wrong.",
    403: "The header Host names another machine than this one.",
    404: "There is nothing of that name.",
    408: "The body came too slowly.",
    413: "The body, an image or a text is too large.",
    415: "The body is of another type.",
    422: "A field is missing or wrong.",
    503: "The queue is full, or the server is loading or shutting down: see Retry-After.",
    504: "The answer was not ready in time.",
}
"""Status of HTTP -> when it is answered."""


def make_request_schema(inputs: tuple[InputField, ...], limits: Limits, *, form: bool) -> Any:
    """Returns the JSON schema of a request: of a JSON object, or of a form."""
    properties: dict[str, Any] = {}
    for field in inputs:
        if field.kind == "image":
            properties[field.name] = FILE_SCHEMA if form else IMAGE_SCHEMA
        elif field.kind == "text":
            minimum = 1 if field.required else 0
            properties[field.name] = {
                "type": "string",
                "minLength": minimum,
                "maxLength": limits.max_text,
            }
        else:
            properties[field.name] = {"description": getattr(field.accepts, "name", "a value")}
    required = [field.name for field in inputs if field.required]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    return schema | ({"required": required} if required else {})


def make_operation(
    name: str,
    task: Task,
    inputs: tuple[InputField, ...],
    limits: Limits,
    *,
    operation_id: str,
    attends: bool,
) -> dict[str, Any]:
    """Returns the description of a task's endpoint for OpenAPI."""
    kind = task_name(type(task))
    operation: dict[str, Any] = {
        "summary": f"Predict as the task {kind} of {name}",
        "operationId": operation_id,
        "tags": ["predictions"],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": make_request_schema(inputs, limits, form=False)},
                "multipart/form-data": {"schema": make_request_schema(inputs, limits, form=True)},
            },
        },
        "responses": {
            "200": {
                "description": "The predictions, best first.",
                "content": {"application/json": {"schema": make_response_schema(kind, attends)}},
            }
        }
        | describe_errors(),
    }
    if attends:
        operation["parameters"] = [
            {
                "name": "attention",
                "in": "query",
                "required": False,
                "schema": {"type": "boolean", "default": False},
                "description": "Whether to return how much each word attends to each patch.",
            }
        ]
    return operation


def make_response_schema(kind: str, attends: bool) -> dict[str, Any]:
    """Returns the JSON schema of an answer."""
    properties: dict[str, Any] = {
        "model": {"type": "string"},
        "task": {"type": "string", "const": kind},
        "predictions": {"type": "array", "items": {"type": "object"}},
        "seconds": {"type": "number"},
    }
    if attends:
        properties["attention"] = {
            "type": "object",
            "properties": {
                "words": {"type": "array", "items": {"type": "string"}},
                "maps": {
                    "type": "array",
                    "description": "For each word a map of patches, rows of numbers.",
                    "items": {
                        "type": "array",
                        "items": {"type": "array", "items": {"type": "number"}},
                    },
                },
            },
        }
    required = ["model", "task", "predictions", "seconds"]
    return {"type": "object", "properties": properties, "required": required}


def describe_errors() -> dict[str, Any]:
    """Returns the answers of OpenAPI for requests that are refused."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        str(status): {"description": text, "content": content} for status, text in STATUSES.items()
    }
