"""Where to go on from an answer: OpenAPI links, found from paths and the names of fields alone.

An answer with a field `id` at `/v1/things` leads to all that begins with `/v1/things/{id}`; a list of such leads to
what can be read of its first; what was put at `/v1/things/{id}` leads to what else is there, and a page to the next
one. Programs that explore an API by its document (`make fuzz`) come to records that exist in this way.
"""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints

from msgspec import Struct

from services.web.endpoints import Api, Bound, Endpoint


def links_of(bound: Bound, answer: Any, api: Api) -> dict[str, Any]:
    """By name, of an answer that is one struct."""
    source = bound.endpoint
    if isinstance(answer, tuple):
        return {}
    links: dict[str, Any] = {}
    item = _item_of(answer)
    if item is not None and source.query is not None and "starting_after" in source.query.__struct_fields__:
        links["next_page"] = {
            "operationId": source.handler.__name__,
            "description": "The next page, where `has_more` is true.",
            "parameters": {**_same(source), "starting_after": "$response.body#/next_cursor"},
        }
    for other in api.endpoints:
        target = other.endpoint
        if target is source or (item is not None and target.method != "GET"):
            continue
        parameters = _parameters(source, target, answer if item is None else item, is_list=item is not None)
        if parameters:
            links[target.handler.__name__] = {"operationId": target.handler.__name__, "parameters": parameters}
    return links


def _parameters(source: Endpoint, target: Endpoint, kind: Any, *, is_list: bool) -> dict[str, str]:
    """What `target` needs, from `source` and its answer; empty where that does not lead there."""
    path = _versioned(target.path)
    rest = path.removeprefix(source.path)
    if rest == path:
        return {}
    own, wanted = _same(source), list(target.parameters)
    if source.method == "PUT" and own and all(name in own for name in wanted):
        return own
    new = [name for name in wanted if name not in own]
    creates_or_lists = is_list or source.method == "POST"
    if creates_or_lists and len(new) == 1 and rest.startswith(f"/{{{new[0]}}}") and new[0] in _fields(kind):
        return {**own, new[0]: f"$response.body#/{'data/0/' if is_list else ''}{new[0]}"}
    return {}


def _versioned(path: str) -> str:
    """`/user/{id}`, which is there for clients of another service, as if it were one of ours."""
    noun, _, rest = path.removeprefix("/").partition("/")
    return path if noun == "v1" else f"/v1/{noun}s/{rest}"


def _same(source: Endpoint) -> dict[str, str]:
    return {name: f"$request.path.{name}" for name in source.parameters}


def _fields(kind: Any) -> tuple[str, ...]:
    return kind.__struct_fields__ if isinstance(kind, type) and issubclass(kind, Struct) else ()


def _item_of(kind: Any) -> Any:
    """What a list is a list of: `Page[Thing]`, or any struct with a list of structs as its `data`. None for others."""
    origin = get_origin(kind) or kind
    if "data" not in _fields(origin):
        return None
    arguments = get_args(kind) or get_args(get_type_hints(origin)["data"])
    return arguments[0] if len(arguments) == 1 else None
