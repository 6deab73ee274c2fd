"""The two HTML pages: the playground at `/`, and the API's documentation at `/docs`. Neither loads anything from
elsewhere."""

import base64
import hashlib
import json
import re
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from fastapi import Response

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;color:#222;background:#fff}
h2{font:600 16px ui-monospace,monospace;margin:2rem 0 .2rem}summary{cursor:pointer;color:#555}
pre{background:#f4f4f4;padding:.8rem;overflow:auto;font-size:13px}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}pre{background:#242424}summary{color:#aaa}}"""


def docs(schema: dict[str, Any]) -> Response:
    """Return the documentation of an OpenAPI schema: every route, with the schema of its body."""
    routes = [
        _route(method, path, operation)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    title, description = escape(schema["info"]["title"]), escape(schema["info"].get("description", ""))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    intro = f"<h1>{title}</h1><p>{description} <a href=openapi.json>openapi.json</a></p>"
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return Response(head + intro + "".join(routes), media_type="text/html", headers=headers)


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    description = escape(operation.get("description") or operation.get("summary", ""))
    description = re.sub(r"`([^`]+)`", r"<code>\1</code>", description)
    html = f"<h2>{method.upper()} {escape(path)}</h2><p>{description}</p>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if not content:
        return html
    body = escape(json.dumps(content["schema"], indent=1, ensure_ascii=False))
    return f"{html}<details><summary>body</summary><pre>{body}</pre></details>"


def playground() -> Response:
    html, headers = _playground()
    return Response(html, media_type="text/html", headers=headers)


@cache
def _playground() -> tuple[str, dict[str, str]]:
    """Return the page of three files as one, and headers that let nothing else be run or loaded, by their hashes."""
    folder = files("rayml.serving") / "page"
    html = (folder / "index.html").read_text(encoding="utf-8")
    hashes = []
    for placeholder, name in (("/*STYLE*/", "style.css"), ("/*SCRIPT*/", "app.js")):
        content = (folder / name).read_text(encoding="utf-8")
        html = html.replace(placeholder, content)
        hashes.append(base64.b64encode(hashlib.sha256(content.encode()).digest()).decode())
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
