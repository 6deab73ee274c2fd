"""A small client of a rayml server. It needs `requests` alone, and can be copied into another project.

client = Client("http://127.0.0.1:8000")
adapter = client.learn([("I was charged twice", "billing"), ("It crashes", "bug")], name="tickets")
client.classify(adapter.model, ["the page is blank"])[0].label
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

RETRYABLE = 429, 503


class ApiError(Exception):
    """The server's refusal: HTTP's `status`, what is wrong, the field, and a code for programs."""

    def __init__(self, status: int, message: str, param: str | None, code: str | None):
        super().__init__(f"{status}: {message}")
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True)
class Adapter:
    """A task that the server has learned. Times are seconds since 1970."""

    id: str
    model: str
    """What to ask it by."""
    name: str
    created: int
    expires_at: int | None
    examples: int
    steps: int
    loss_before: float | None
    loss_after: float | None
    seconds: float
    status: str = "ready"


@dataclass(frozen=True)
class Answer:
    label: str
    probabilities: dict[str, float]
    truncated: bool


class Client:
    """Args:
    url: of the server, such as `http://127.0.0.1:8000`.
    api_key: where the server asks for one.
    tries: times that a request is sent while the server says that it is busy, or has lost a replica.
    timeout_seconds: for each try.
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
        """Learn a task from (input, target) pairs. The same again gives the same adapter, and costs nothing.

        Args:
            background: ask now and then whether it is learned, in place of one long request.
        """
        pairs = [{"input": text, "target": target} for text, target in examples]
        body: dict[str, Any] = {"examples": pairs, "name": name}
        more = {"options": options and list(options), "steps": steps, "ttl_seconds": ttl_seconds}
        body |= {k: v for k, v in more.items() if v is not None} | ({"background": True} if background else {})
        found = self._post("/v1/adapters", body)
        while found["status"] == "learning":
            time.sleep(0.5)
            found = self._request("GET", f"/v1/adapters/{found['id']}").json()
        if found["status"] == "failed":
            error = found["error"]
            raise ApiError(422, error["message"], error["param"], error["code"])
        return _adapter(found)

    def adapters(self) -> list[Adapter]:
        found: list[Adapter] = []
        after: str | None = ""
        while after is not None:
            page = self._request("GET", "/v1/adapters", params={"after": after}).json()
            found += [_adapter(one) for one in page["data"]]
            after = page["last_id"]
        return found

    def adapter(self, name_or_id: str) -> Adapter:
        return _adapter(self._request("GET", f"/v1/adapters/{name_or_id}").json())

    def delete(self, name_or_id: str) -> None:
        self._request("DELETE", f"/v1/adapters/{name_or_id}")

    def download(self, name_or_id: str, file: str | Path) -> None:
        """Write the adapter's PEFT files as a zip."""
        Path(file).write_bytes(self._request("GET", f"/v1/adapters/{name_or_id}/download").content)

    def classify(self, model: str, inputs: Sequence[str], options: Sequence[str] | None = None) -> list[Answer]:
        """Choose a label for each input, among `options`, or the adapter's own labels."""
        body: dict[str, Any] = {"model": model, "input": list(inputs)}
        if options:
            body["options"] = list(options)
        found = self._post("/v1/classify", body)["data"]
        return [Answer(one["label"], one["probabilities"], one["truncated"]) for one in found]

    def complete(self, model: str, prompt: str, **sampling: Any) -> str:
        """Write on; `max_tokens`, `temperature`, `top_p`, `seed`, `stop` as OpenAI has them."""
        return self._post("/v1/completions", {"model": model, "prompt": prompt} | sampling)["choices"][0]["text"]

    def stream(self, model: str, prompt: str, **sampling: Any) -> Iterator[str]:
        """Yield the text as it comes."""
        body = {"model": model, "prompt": prompt, "stream": True} | sampling
        with self._request("POST", "/v1/completions", json=body, stream=True) as response:
            for line in response.iter_lines():
                data = line.decode().removeprefix("data: ")
                if data and data != "[DONE]":
                    yield _event(json.loads(data))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._request("POST", path, json=body).json()

    def _request(self, method: str, path: str, **more: Any) -> requests.Response:
        for attempt in range(1, self.tries + 1):
            response = self._http.request(method, self.url + path, timeout=self.timeout_seconds, **more)
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
        raise ApiError(response.status_code, error["message"], error["param"], error["code"])


def _adapter(body: dict[str, Any]) -> Adapter:
    return Adapter(**{key: value for key, value in body.items() if key != "object"})


def _event(body: dict[str, Any]) -> str:
    if "error" in body:
        error = body["error"]
        raise ApiError(500, error["message"], error["param"], error["code"])
    return body["choices"][0]["text"] if body["choices"] else ""
