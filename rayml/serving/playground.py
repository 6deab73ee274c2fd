"""The page at `/`: one document, put together here from three files, that asks for nothing but the API beside it."""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from fastapi import Response

PARTS = {"/*STYLE*/": "style.css", "/*SCRIPT*/": "app.js"}


@cache
def page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers: nothing runs in it, and nothing is asked for, but what stands in these files."""
    folder = files("rayml.serving") / "page"
    text = (folder / "index.html").read_text(encoding="utf-8")
    sums = []
    for index, name in PARTS.items():
        part = (folder / name).read_text(encoding="utf-8")
        text = text.replace(index, part)
        sums.append(base64.b64encode(hashlib.sha256(part.encode()).digest()).decode())
    policy = (
        f"default-src 'none'; style-src 'sha256-{sums[0]}'; script-src 'sha256-{sums[1]}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def answer() -> Response:
    text, headers = page()
    return Response(text, media_type="text/html", headers=headers)
