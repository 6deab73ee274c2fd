"""The page at /docs: every route with what its body may hold, from the OpenAPI schema. It needs no script of others."""

import json
from html import escape
from typing import Any

from fastapi import Response

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;color:#222;background:#fff}
h2{font:600 16px ui-monospace,monospace;margin:2rem 0 .2rem}summary{cursor:pointer;color:#555}
pre{background:#f4f4f4;padding:.8rem;overflow:auto;font-size:13px}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}pre{background:#242424}summary{color:#aaa}}"""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def page(schema: dict[str, Any]) -> Response:
    """Return the page of an OpenAPI schema; /openapi.json has it for programs."""
    routes = [
        route(method, path, told) for path, methods in schema["paths"].items() for method, told in methods.items()
    ]
    title, about = escape(schema["info"]["title"]), escape(schema["info"].get("description", ""))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    intro = f"<h1>{title}</h1><p>{about} <a href=openapi.json>openapi.json</a></p>"
    return Response(head + intro + "".join(routes), media_type="text/html", headers=HEADERS)


def route(method: str, path: str, told: dict[str, Any]) -> str:
    text = (
        f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(told.get('description') or told.get('summary', ''))}</p>"
    )
    content = told.get("requestBody", {}).get("content", {}).get("application/json")
    if not content:
        return text
    body = escape(json.dumps(content["schema"], indent=1, ensure_ascii=False))
    return f"{text}<details><summary>body</summary><pre>{body}</pre></details>"
