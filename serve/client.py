"""A small client of a rayml server. It needs only `requests`, and can be copied into another project.

client = Client("http://127.0.0.1:8000")
adapter = client.learn([("I was charged twice", "billing"), ("It crashes", "bug")], name="tickets")
client.classify(adapter.model, ["the page is blank"])[0].label
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import requests

RETRYABLE = 429, 503


class ApiError(Exception):
    """An error of the server: the HTTP status, what is wrong, the field at fault, and a code for programs."""

    def __init__(self, status: int, message: str, param: str | None, code: str | None):
        super().__init__(f"{status}: {message}")
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True)
class Adapter:
    """A task that the server has learned, or is learning. Times are seconds since 1970."""

    id: str
    model: str
    """The `model` of requests that ask it."""
    name: str
    status: str
    """`ready`, `learning` or `failed`; what follows is known once it is ready."""
    created: int | None = None
    expires_at: int | None = None
    examples: int | None = None
    steps: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Answer:
    label: str
    probabilities: dict[str, float]
    truncated: bool


class Client:
    """Args:
    url: of the server, such as `http://127.0.0.1:8000`.
    api_key: if the server asks for one.
    tries: how often a request is sent while the server is busy, or has lost a replica.
    timeout_seconds: of each try.
    """

    def __init__(self, url: str, api_key: str | None = None, tries: int = 5, timeout_seconds: float = 120):
        self.url, self.tries, self.timeout_seconds = url.rstrip("/"), tries, timeout_seconds
        self._http = requests.Session()
        if api_key:
            self._http.headers["Authorization"] = f"Bearer {api_key}"

    def learn(
        self,
        examples: Sequence[tuple[str, str]],
        name: str = "adapter",
        options: Sequence[str] | None = None,
        steps: int | None = None,
        ttl_seconds: float | None = None,
        background: bool = False,
    ) -> Adapter:
        """Learn a task from (input, target) pairs. The same pairs again give the same adapter at no cost.

        Args:
            background: ask repeatedly whether it is learned, instead of sending one long request.
        """
        body: dict[str, Any] = {"examples": [{"input": text, "target": target} for text, target in examples]}
        settings = {"name": name, "options": options and list(options), "steps": steps, "ttl_seconds": ttl_seconds}
        body |= {key: value for key, value in settings.items() if value is not None}
        body |= {"background": True} if background else {}
        adapter = self._post("/v1/adapters", body)
        while adapter["status"] == "learning":
            time.sleep(0.5)
            adapter = self._request("GET", f"/v1/adapters/{adapter['id']}").json()
        if adapter["status"] == "failed":
            raise _error(422, adapter["error"])
        return _adapter(adapter)

    def adapters(self) -> list[Adapter]:
        adapters: list[Adapter] = []
        after: str | None = ""
        while after is not None:
            page = self._request("GET", "/v1/adapters", params={"after": after}).json()
            adapters += map(_adapter, page["data"])
            after = page["last_id"]
        return adapters

    def adapter(self, name_or_id: str) -> Adapter:
        return _adapter(self._request("GET", f"/v1/adapters/{name_or_id}").json())

    def delete(self, name_or_id: str) -> None:
        self._request("DELETE", f"/v1/adapters/{name_or_id}")

    def download(self, name_or_id: str, file: str | Path) -> None:
        """Write the adapter's PEFT files as a zip."""
        Path(file).write_bytes(self._request("GET", f"/v1/adapters/{name_or_id}/download").content)

    def classify(self, model: str, inputs: Sequence[str], options: Sequence[str] | None = None) -> list[Answer]:
        """Choose a label for each input, among `options` or the adapter's own labels."""
        body: dict[str, Any] = {"model": model, "input": list(inputs)}
        if options:
            body["options"] = list(options)
        answers = self._post("/v1/classify", body)["data"]
        return [Answer(answer["label"], answer["probabilities"], answer["truncated"]) for answer in answers]

    def complete(self, model: str, prompt: str, **sampling: Any) -> str:
        """Continue a prompt. `sampling` is OpenAI's: `max_tokens`, `temperature`, `top_p`, `seed`, `stop`."""
        return self._post("/v1/completions", {"model": model, "prompt": prompt} | sampling)["choices"][0]["text"]

    def stream(self, model: str, prompt: str, **sampling: Any) -> Iterator[str]:
        """Continue a prompt; yield the text piece by piece."""
        body = {"model": model, "prompt": prompt, "stream": True} | sampling
        with self._request("POST", "/v1/completions", json=body, stream=True) as response:
            for line in response.iter_lines():
                data = line.decode().removeprefix("data: ")
                if data and data != "[DONE]":
                    yield _piece(json.loads(data))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._request("POST", path, json=body).json()

    def _request(self, method: str, path: str, **arguments: Any) -> requests.Response:
        for attempt in range(1, self.tries + 1):
            response = self._http.request(method, self.url + path, timeout=self.timeout_seconds, **arguments)
            response.encoding = "utf-8"
            if response.ok:
                return response
            if response.status_code not in RETRYABLE or attempt == self.tries:
                break
            time.sleep(float(response.headers.get("Retry-After", attempt)))
        try:
            error = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            raise ApiError(response.status_code, response.text[:200], None, None) from None
        raise _error(response.status_code, error)


def _adapter(body: dict[str, Any]) -> Adapter:
    return Adapter(**{field.name: body[field.name] for field in fields(Adapter) if field.name in body})


def _error(status: int, error: dict[str, Any]) -> ApiError:
    return ApiError(status, error["message"], error["param"], error["code"])


def _piece(event: dict[str, Any]) -> str:
    if "error" in event:
        raise _error(500, event["error"])
    return event["choices"][0]["text"] if event["choices"] else ""
