"""A plain page that lists the API from its OpenAPI description, with no script and nothing from elsewhere."""

import json
from html import escape

STYLE = """
:root{color-scheme:light dark}body{margin:0 auto;max-width:800px;padding:16px;font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem}h2{font-size:1.05rem;margin:2rem 0 0}code{font-size:.95em;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}td{vertical-align:top;padding:4px 12px 4px 0;
border-bottom:1px solid #8884}td:first-child{white-space:nowrap}b{display:inline-block;min-width:3.5em}p{margin:4px 0}
"""


def api_listing(description: dict) -> str:
    """The HTML page for an OpenAPI description (the dict that FastAPI's `openapi()` returns)."""
    schemas = description.get("components", {}).get("schemas", {})
    parts = [
        f"<h1>{escape(description['info']['title'])}: the API</h1>",
        '<p>The same for programs: <a href="/openapi.json">/openapi.json</a> (OpenAPI '
        f'{escape(description["openapi"])}). The page: <a href="/">/</a></p>',
        "<p>What cannot be answered comes back as 4xx, 500 or 503 with one line: "
        "<code>{&quot;error&quot;: ...}</code>. 503 has a Retry-After header.</p>",
    ]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><b>{escape(method.upper())}</b> <code>{escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('summary', ''))}</p>{_inputs(operation, schemas)}")
    parts.append("<h1>What comes back</h1>")
    for name, schema in schemas.items():
        if name in ("Answer", "Track", "Status", "Problem"):
            parts.append(f"<h2><code>{escape(name)}</code></h2><p>{escape(schema.get('description', ''))}</p>")
            parts.append(_table(_properties(schema)))
    viewport = '<meta name="viewport" content="width=device-width,initial-scale=1">'
    head = f"{viewport}<title>The API</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{head}<body>{"".join(parts)}</body></html>'


def _inputs(operation: dict, schemas: dict) -> str:
    """A table of what an operation takes, in the path, the query or a JSON body."""
    rows = [
        (entry["name"], _kind(entry["schema"]), entry.get("description") or entry["schema"].get("description", ""))
        for entry in operation.get("parameters", [])
    ]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        rows += _properties(schemas[content["schema"]["$ref"].rsplit("/", 1)[1]])
    return _table(rows) if rows else ""


def _properties(schema: dict) -> list[tuple[str, str, str]]:
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


def _table(rows: list[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(text)}</td></tr>"
        for name, kind, text in rows
    )
    return f"<table>{cells}</table>"
