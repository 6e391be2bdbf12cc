"""A plain page that lists the API from its OpenAPI description, with no script and nothing from elsewhere."""

import json

from common.templates import templates_beside

SHOWN = ("Answer", "Track", "Status", "Problem")
"""The schemas of answers that are listed; those of what is asked stand with their operation."""

Rows = list[tuple[str, str, str]]
"""Name, kind and meaning of each entry of a table."""

_TEMPLATES = templates_beside(__file__)


def api_listing(description: dict) -> str:
    """The HTML page for an OpenAPI description (the dict that FastAPI's `openapi()` returns)."""
    schemas = description.get("components", {}).get("schemas", {})
    operations = [
        {"method": method, "path": path, "summary": operation.get("summary", ""), "inputs": _inputs(operation, schemas)}
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    shown = [
        {"name": name, "description": schema.get("description", ""), "properties": _properties(schema)}
        for name, schema in schemas.items()
        if name in SHOWN
    ]
    return _TEMPLATES.get_template("api_listing.html").render(
        title=description["info"]["title"], openapi=description["openapi"], operations=operations, schemas=shown
    )


def _inputs(operation: dict, schemas: dict) -> Rows:
    """What an operation takes, in the path, the query or a JSON body."""
    rows = [
        (entry["name"], _kind(entry["schema"]), entry.get("description") or entry["schema"].get("description", ""))
        for entry in operation.get("parameters", [])
    ]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        rows += _properties(schemas[content["schema"]["$ref"].rsplit("/", 1)[1]])
    return rows


def _properties(schema: dict) -> Rows:
    return [(name, _kind(entry), entry.get("description", "")) for name, entry in schema["properties"].items()]


def _kind(schema: dict) -> str:
    """A type in words, with its bounds."""
    if "anyOf" in schema:
        return " or ".join(_kind(choice) for choice in schema["anyOf"])
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[1]
    if "const" in schema:
        return f'"{schema["const"]}"'
    kind = f"list of {_kind(schema['items'])}" if schema.get("type") == "array" else str(schema.get("type", "any"))
    said = {"minimum": "from {}", "maximum": "to {}", "maxLength": "at most {} characters", "default": "default {}"}
    bounds = [words.format(json.dumps(schema[key])) for key, words in said.items() if schema.get(key) is not None]
    return ", ".join([kind, *bounds])
