"""Print the server's OpenAPI document, made from the signature of Predictor.predict.

It has the form that `cog build` gives it. The server checks inputs against it, and serves it as
/openapi.json.
"""

import inspect
import json
from types import NoneType
from typing import Any, get_args, get_type_hints

import cog

from predict import Predictor

KINDS = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    cog.Path: {"type": "string", "format": "uri"},
}
JSON = "application/json"


def ref(name: str) -> dict[str, str]:
    """Refer to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def titled(name: str, **schema: Any) -> dict[str, Any]:
    """Build a schema with the title that Cog gives a field of that name."""
    return {"title": name.replace("_", " ").title(), **schema}


def string(name: str, **schema: Any) -> dict[str, Any]:
    """Build the schema of a text field."""
    return titled(name, type="string", **schema)


def object_schema(title: str, **schema: Any) -> dict[str, Any]:
    """Build the schema of an object."""
    return {"title": title, "type": "object", **schema}


def fields() -> dict[str, Any]:
    """Return the `Input` of every parameter of `predict`, by name."""
    parameters = list(inspect.signature(Predictor.predict).parameters.values())[1:]  # not self
    return {parameter.name: parameter.default for parameter in parameters}


def choices() -> dict[str, Any]:
    """Build the schema of every input with a list of choices, by name."""
    return {
        name: {
            "title": name,
            "description": "An enumeration.",
            "enum": field.choices,
            "type": KINDS[type(field.choices[0])]["type"],
        }
        for name, field in fields().items()
        if field.choices
    }


def input_schema() -> dict[str, Any]:
    """Build the schema of the inputs of a prediction."""
    hints = get_type_hints(Predictor.predict)
    properties = {}
    for order, (name, field) in enumerate(fields().items()):
        types = get_args(hints[name]) or (hints[name],)
        kind = next(KINDS[t] for t in types if t is not NoneType)
        optional = NoneType in types
        form = {"allOf": [ref(name)]} if field.choices else titled(name, **kind)
        schema = {**form, "description": field.description}
        if optional or field.default is not None:
            schema["default"] = field.default
        if optional:
            schema["nullable"] = True
        bounds = {"minimum": field.ge, "maximum": field.le}
        schema |= {key: bound for key, bound in bounds.items() if bound is not None}
        properties[name] = {**schema, "x-order": order}
    required = [name for name, schema in properties.items() if "default" not in schema]
    return object_schema("Input", properties=properties, required=required)


def schemas() -> dict[str, Any]:
    """Build every schema of the document, by name."""
    times = ("created_at", "started_at", "completed_at")
    response = {
        "input": ref("Input"),
        "output": ref("Output"),
        **{name: string(name) for name in ("id", "version", "status", "error", "logs")},
        **{name: string(name, format="date-time") for name in times},
        "metrics": titled("metrics", type="object"),
    }
    place = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    problem = {
        "loc": {"title": "Location", "type": "array", "items": place},
        "msg": string("message"),
        "type": string("error_type"),
    }
    problems = titled("detail", type="array", items=ref("ValidationError"))
    return {
        "Input": input_schema(),
        "Output": string("output", format="uri"),
        **choices(),
        "PredictionRequest": object_schema(
            "PredictionRequest", properties={"id": string("id"), "input": ref("Input")}
        ),
        "PredictionResponse": object_schema("PredictionResponse", properties=response),
        "Status": string(
            "status", enum=["starting", "processing", "succeeded", "canceled", "failed"]
        ),
        "HTTPValidationError": object_schema(
            "HTTPValidationError", properties={"detail": problems}
        ),
        "ValidationError": object_schema(
            "ValidationError", properties=problem, required=list(problem)
        ),
    }


def operation(summary: str, operation_id: str, answer: Any, **more: Any) -> dict[str, Any]:
    """Build an operation that answers with the schema `answer`."""
    ok = {"description": "Successful Response", "content": {JSON: {"schema": answer}}}
    return {"summary": summary, "operationId": operation_id, "responses": {"200": ok}, **more}


def paths() -> dict[str, Any]:
    """Build every operation, by path and method."""
    predict = operation(
        "Predict",
        "predict_predictions_post",
        ref("PredictionResponse"),
        description="Run a single prediction on the model",
        requestBody={"content": {JSON: {"schema": ref("PredictionRequest")}}},
    )
    predict["responses"]["422"] = {
        "description": "Validation Error",
        "content": {JSON: {"schema": ref("HTTPValidationError")}},
    }
    which = {
        "name": "prediction_id",
        "in": "path",
        "required": True,
        "schema": string("prediction_id"),
    }
    cancel = operation(
        "Cancel", "cancel_predictions__prediction_id__cancel_post", {}, parameters=[which]
    )
    return {
        "/": {"get": operation("Root", "root__get", {})},
        "/health-check": {"get": operation("Healthcheck", "healthcheck_health_check_get", {})},
        "/predictions": {"post": predict},
        "/predictions/{prediction_id}/cancel": {"post": cancel},
    }


def document() -> dict[str, Any]:
    """Build the whole document."""
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": cog.__version__},
        "paths": paths(),
        "components": {"schemas": schemas()},
    }


if __name__ == "__main__":
    print(json.dumps(document(), indent=2))
