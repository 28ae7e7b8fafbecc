"""The description of the REST interface: OpenAPI 3.1, from the answers and a table of operations. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from virtgrid.host.web.model import (
    Host,
    Jobs,
    Migration,
    Migrations,
    Problem,
    Reservations,
    Steer,
    Steered,
)

PREFIX: Final = "/api/v1"
#: A reference: an id, or a domain's name, which means its newest migration.
_REFERENCE: Final = {
    "name": "reference",
    "in": "path",
    "required": True,
    "description": "A migration's id, or a domain's name: its newest migration.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 250},
}
LIMIT_MAX: Final = 500
_LIMIT: Final = {
    "name": "limit",
    "in": "query",
    "description": "At most so many, the newest.",
    "schema": {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": 50},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One thing that can be asked. problems: statuses besides 200; body: what is sent."""

    name: str
    method: str
    path: str
    text: str
    answer: type[BaseModel]
    parameters: tuple[dict[str, Any], ...] = ()
    body: type[BaseModel] | None = None
    problems: tuple[int, ...] = field(default=())


def _steering(verb: str, text: str) -> Operation:
    return Operation(
        name=f"{verb}Migration",
        method="post",
        path=f"/migrations/{{reference}}/{verb}",
        text=text,
        answer=Steered,
        parameters=(_REFERENCE,),
        body=Steer,
        problems=(400, 403, 404, 409, 413, 415, 503),
    )


OPERATIONS: Final = (
    Operation(name="host", method="get", path="/host", text="Whom one asks, and as whom.", answer=Host),
    Operation(
        name="listMigrations",
        method="get",
        path="/migrations",
        text="Migrations of this host, newest first.",
        answer=Migrations,
        parameters=(_LIMIT,),
        problems=(400,),
    ),
    Operation(
        name="showMigration",
        method="get",
        path="/migrations/{reference}",
        text="One migration as it stands.",
        answer=Migration,
        parameters=(_REFERENCE,),
        problems=(404, 409),
    ),
    _steering("release", "Let go of a held switchover now, whatever its connections do."),
    _steering("abort", "End a running migration; the domain stays where it is."),
    Operation(name="listJobs", method="get", path="/jobs", text="Jobs of the coordinator.", answer=Jobs),
    Operation(
        name="listReservations",
        method="get",
        path="/reservations",
        text="Reservations of the coordinator.",
        answer=Reservations,
    ),
)


@cache
def document(version: str) -> dict[str, Any]:
    """The whole description."""
    models = {one.answer for one in OPERATIONS} | {one.body for one in OPERATIONS if one.body} | {Problem}
    named = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema(
        [(model, "validation" if model is Steer else "serialization") for model in named],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(PREFIX + one.path, {})[one.method] = _described(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "virtgrid",
            "version": version,
            "summary": "Gated migrations of a host, and the jobs of its grid.",
        },
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _described(one: Operation) -> dict[str, Any]:
    out: dict[str, Any] = {
        "operationId": one.name,
        "summary": one.text,
        "responses": {
            "200": {"description": "As asked.", "content": _json(one.answer)},
            **{str(status): _problem() for status in one.problems},
            "default": _problem(),
        },
    }
    if one.parameters:
        out["parameters"] = list(one.parameters)
    if one.body is not None:
        out["requestBody"] = {"required": True, "content": _json(one.body)}
    return out


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _problem() -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": "What went wrong.", "content": {"application/problem+json": {"schema": schema}}}
