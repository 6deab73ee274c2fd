"""The gateway: HTTP to the replicas of the model. It knows keys, limits and adapters' names, and needs no model."""

import asyncio
import io
import json
import logging
import threading
import time
import zipfile
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from rayml.lm.sampling import Sampling
from rayml.serving import docs, playground
from rayml.serving.answering import Answering
from rayml.serving.answers import ResponseBodies
from rayml.serving.errors import ApiError
from rayml.serving.http import (
    as_api_error,
    chained,
    model_of,
    owner_of_request,
    read_body,
    refusal,
    session,
    takes,
    translated,
    until_error,
)
from rayml.serving.metrics import Metrics
from rayml.serving.names import Names
from rayml.serving.schema import (
    AdapterRequest,
    Body,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Sampled,
    parse,
)
from rayml.serving.settings import Serving, describe, learning
from rayml.serving.store import AdapterStore, DamagedError, Manifest, adapter_id, damaged

log = logging.getLogger("ray.serve")
ABOUT = "Learn a task from a few examples, and ask it by name."
app = FastAPI(title="rayml", description=ABOUT, docs_url=None, redoc_url=None)
Work = Callable[[str], Awaitable[Response]]
COMPLETION_TOKENS = 64
"""Of a completion, where nobody says how many."""


@app.exception_handler(HTTPException)
async def _no_such_route(_request: Request, error: HTTPException) -> Response:
    return refusal(ApiError(error.status_code, str(error.detail)), retry_after=1)


@serve.ingress(app)
class Gateway:
    """One gateway.

    Args:
        model: the replicas.
        base: what clients call the bare model.
        fingerprint: of the run; a part of every adapter's id.
        store: where adapters are kept.
        keys: the owner of each API key, by the key's SHA-256; none, and none is asked for.
        answerers: the replicas of vLLM; None, where those of the model answer.
    """

    def __init__(
        self,
        model: DeploymentHandle,
        serving: Serving,
        base: str,
        fingerprint: str,
        store: str,
        keys: Mapping[str, str],
        answerers: DeploymentHandle | None = None,
    ):
        again_seconds = serving.answerers.again_seconds
        self.answering = Answering(answerers, again_seconds) if answerers else None
        self.model, self.serving, self.limits = model, serving, serving.limits
        self.base, self.fingerprint, self.keys = base, fingerprint, keys
        self.store = AdapterStore(store)
        self.names = Names(base, self.store, serving.adapters.known_seconds)
        self.metrics = Metrics()
        self._ready: tuple[float, asyncio.Future[str | None]] | None = None
        threading.Thread(target=self._sweep, daemon=True).start()

    def _sweep(self) -> None:
        while True:
            time.sleep(self.serving.adapters.sweep_seconds)
            try:
                self.store.sweep()
            except OSError:
                log.exception("expired adapters were not swept")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(self) -> Response:
        """The playground."""
        return playground.answer()

    @app.get("/docs", include_in_schema=False)
    async def docs(self) -> Response:
        """The API, for people."""
        return docs.page(app.openapi())

    @app.get("/healthz")
    async def healthz(self) -> Response:
        """Whether the gateway answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz(self) -> Response:
        """Whether a replica runs the model."""
        if self._ready is None or time.monotonic() > self._ready[0] + 1:  # it asks for no key: one check serves all
            self._ready = time.monotonic(), asyncio.ensure_future(self._check())
        problem = await asyncio.shield(self._ready[1])
        if problem:
            return refusal(ApiError(503, f"no replica is ready: {problem}"), retry_after=2)
        return JSONResponse({"status": "ready"})

    async def _check(self) -> str | None:
        try:
            await asyncio.wait_for(self.model.check.remote(10.0), 15)
            if self.answering:
                await asyncio.wait_for(self.answering.check(10.0), 15)
        except Exception as error:
            return type(error).__name__
        return None

    @app.get("/v1/models")
    async def models(self, request: Request, after: str = "") -> Response:
        """The base, and the adapters of this key, a thousand at a time as `/v1/adapters` has them."""

        async def work(owner: str) -> Response:
            found, last = await asyncio.to_thread(self.store.page, owner, after)
            entries = [
                *([] if after else [self.names.entry(None)]),
                *(self.names.entry(manifest) for manifest in found),
            ]
            return JSONResponse({"object": "list", "data": entries, "has_more": bool(last), "last_id": last})

        return await self._answer(request, "models", work)

    @app.get("/v1/models/{model}")
    async def one_model(self, request: Request, model: str) -> Response:
        """The base, or an adapter."""

        async def work(owner: str) -> Response:
            adapter = await self.names.adapter(owner, model)
            return JSONResponse(self.names.entry(await self.names.find(owner, adapter) if adapter else None))

        return await self._answer(request, "models", work)

    @app.delete("/v1/models/{model}")
    async def delete_model(self, request: Request, model: str) -> Response:
        """Forget an adapter, as OpenAI's clients delete a model that they tuned."""

        async def work(owner: str) -> Response:
            adapter = await self.names.adapter(owner, model)
            if adapter is None:
                raise ApiError(403, "the base is served for all, and cannot be deleted; adapters can", "model")
            await self.names.forget(owner, await self.names.find(owner, adapter))
            return JSONResponse({"id": model, "object": "model", "deleted": True})

        return await self._answer(request, "models", work)

    @app.post("/v1/embeddings", include_in_schema=False)
    @app.post("/v1/responses", include_in_schema=False)
    async def not_here(self, request: Request) -> Response:
        """Say what there is in the place of what other servers have."""

        async def work(owner: str) -> Response:
            there = "/v1/chat/completions, /v1/completions, /v1/classify and /v1/adapters"
            raise ApiError(404, f"this server has no {request.url.path}; it has {there}", code="no_such_route")

        return await self._answer(request, "none", work)

    @app.post("/v1/adapters", status_code=201, openapi_extra=takes(AdapterRequest))
    async def create(self, request: Request) -> Response:
        """Learn an adapter from a few examples. 201; 200, if the same was learned before; 202, in the background."""

        async def work(owner: str) -> Response:
            asked: AdapterRequest = await self._body(request, AdapterRequest)
            count = len(asked.examples)
            if not 2 <= count <= self.limits.examples:
                raise ApiError(422, f"examples: {count} given; 2 to {self.limits.examples} are taken", "examples")
            if asked.steps is not None and asked.steps > self.limits.steps:
                raise ApiError(422, f"steps: at most {self.limits.steps}", "steps")
            self._check_count("options", len(asked.options or [""]), self.limits.options)
            content = [self.fingerprint, asked.name, asked.pairs, asked.options, asked.steps]
            content += [asked.kind] if asked.kind else []
            adapter = adapter_id(asked.name, content)
            if asked.background or "respond-async" in request.headers.get("prefer", ""):
                return await self._begin(owner, adapter, asked)
            manifest, new = await self._ask("learn", owner, adapter, asked)
            self.names.renewed(owner, asked.name)
            return JSONResponse(describe(manifest, self.base), 201 if new else 200)

        return await self._answer(request, "adapters", work)

    @app.get("/v1/adapters")
    async def adapters(self, request: Request, after: str = "") -> Response:
        """The adapters of this key in the order of their ids, a thousand at a time: `after` is `last_id`."""

        async def work(owner: str) -> Response:
            found, last = await asyncio.to_thread(self.store.page, owner, after)
            listed = [describe(manifest, self.base) for manifest in found]
            return JSONResponse({"object": "list", "data": listed, "has_more": bool(last), "last_id": last})

        return await self._answer(request, "adapters", work)

    @app.get("/v1/adapters/{adapter}")
    async def adapter(self, request: Request, adapter: str) -> Response:
        """One adapter, by its id or its name; of one that is being learned, how far it is."""

        async def work(owner: str) -> Response:
            manifest = await asyncio.to_thread(self.store.find, owner, adapter)
            if manifest is None and (lesson := await self._lesson(owner, adapter)):
                return JSONResponse(lesson)
            return JSONResponse(describe(manifest or await self.names.find(owner, adapter), self.base))

        return await self._answer(request, "adapters", work)

    async def _begin(self, owner: str, adapter: str, asked: AdapterRequest) -> Response:
        """Let an adapter be learned while nobody waits for it."""
        manifest = await asyncio.to_thread(self.store.find, owner, adapter)
        if manifest:
            return JSONResponse(describe(manifest, self.base))
        await self._ask("begin", owner, adapter, asked)
        headers = {"Location": f"/v1/adapters/{adapter}", "Preference-Applied": "respond-async"}
        return JSONResponse(learning(adapter, self.base), 202, headers | {"Retry-After": "1"})

    async def _lesson(self, owner: str, adapter: str) -> dict[str, Any] | None:
        """Return how far a lesson in the background is. One whose replica was lost is begun again."""
        noted = await asyncio.to_thread(self.store.begun, owner, adapter)
        if noted is None:
            return None
        if (failed := json.loads(noted)).get("error"):
            return learning(adapter, self.base) | {"status": "failed"} | failed
        progress = await self._ask("progress", owner, adapter)
        if progress is None:
            await self._ask("begin", owner, adapter, parse(AdapterRequest, noted))
        return learning(adapter, self.base) | (progress or {})

    @app.delete("/v1/adapters/{adapter}")
    async def delete(self, request: Request, adapter: str) -> Response:
        """Forget an adapter."""

        async def work(owner: str) -> Response:
            manifest = await self.names.find(owner, adapter)
            await self.names.forget(owner, manifest)
            return JSONResponse({"id": manifest.id, "object": "adapter", "deleted": True})

        return await self._answer(request, "adapters", work)

    @app.get("/v1/adapters/{adapter}/download")
    async def download(self, request: Request, adapter: str) -> Response:
        """The adapter's PEFT files, as a zip."""

        async def work(owner: str) -> Response:
            manifest = await self.names.find(owner, adapter)
            packed = await asyncio.to_thread(self._packed, owner, manifest)
            headers = {"Content-Disposition": f'attachment; filename="{manifest.id}.zip"'}
            return Response(packed, media_type="application/zip", headers=headers)

        return await self._answer(request, "download", work)

    def _packed(self, owner: str, manifest: Manifest) -> bytes:
        """Return an adapter's files in a zip, each as it was published."""
        packed = io.BytesIO()
        try:
            with zipfile.ZipFile(packed, "w") as file:
                for name in manifest.files:
                    file.writestr(name, self.store.verified(owner, manifest, name))
        except DamagedError as error:
            raise damaged(owner, manifest.id, error) from None
        return packed.getvalue()

    @app.post("/v1/classify", openapi_extra=takes(ClassifyRequest))
    async def classify(self, request: Request) -> Response:
        """The label of each input, with probabilities."""

        async def work(owner: str) -> Response:
            asked: ClassifyRequest = await self._body(request, ClassifyRequest)
            self._check_count("input", len(asked.inputs), self.limits.inputs)
            self._check_count("options", len(asked.options or [""]), self.limits.options)
            adapter = await self.names.adapter(owner, asked.model)
            found = await self.answering.classify(owner, adapter, asked) if self.answering else None
            found = found or await self._ask("classify", owner, adapter, asked)
            answers = [{"index": index} | answer for index, answer in enumerate(found["answers"])]
            usage = {"prompt_tokens": found["tokens"], "total_tokens": found["tokens"]}
            return JSONResponse({"object": "list", "model": asked.model, "data": answers, "usage": usage})

        return await self._answer(request, "classify", work)

    @app.post("/v1/completions", openapi_extra=takes(CompletionRequest))
    async def complete(self, request: Request) -> Response:
        """Write on. An adapter takes the prompt for an input of its task."""

        async def work(owner: str) -> Response:
            body = await read_body(request, self.limits)
            if forwarded := await self._forward(owner, body, "completions"):
                return forwarded
            asked: CompletionRequest = parse(CompletionRequest, body)
            self._check_count("prompt", len(asked.prompts), self.limits.inputs)
            sampling = self._sampling(asked, asked.max_tokens, asked.logprobs)
            shape = ResponseBodies(asked.model, chat=False, logprobs=asked.logprobs is not None)
            return await self._write(owner, asked, list(asked.prompts), sampling, shape)

        return await self._answer(request, "completions", work)

    @app.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat(self, request: Request) -> Response:
        """Answer a conversation. An adapter takes it for an input of its task."""

        async def work(owner: str) -> Response:
            body = await read_body(request, self.limits)
            if forwarded := await self._forward(owner, body, "chat"):
                return forwarded
            asked: ChatRequest = parse(ChatRequest, body)
            most = asked.max_completion_tokens or asked.max_tokens
            sampling = self._sampling(asked, most, asked.top_logprobs if asked.logprobs else None)
            shape = ResponseBodies(asked.model, chat=True, logprobs=asked.logprobs)
            return await self._write(owner, asked, [asked.messages], sampling, shape)

        return await self._answer(request, "chat", work)

    async def _forward(self, owner: str, body: bytes, kind: str) -> Response | None:
        """Return what vLLM answers, which reads the body by itself; None, where the replicas of the model have to."""
        if not self.answering:
            return None
        adapter = await self.names.adapter(owner, model_of(body))
        return await self.answering.respond(owner, adapter, kind, body)

    async def _write(
        self, owner: str, asked: Sampled, prompts: list[Any], sampling: Sampling, shape: ResponseBodies
    ) -> Response:
        adapter = await self.names.adapter(owner, asked.model)
        handle = self.model.options(stream=True, session_id=session(owner, adapter))
        written = translated(handle.write.remote(owner, adapter, prompts, sampling))
        # The first piece is waited for, so that what is wrong with the request still has a status of its own.
        first = await anext(written)
        if not asked.stream:
            return JSONResponse(shape.whole([first, *[piece async for piece in written]]))
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = until_error(shape.events(chained(first, written), usage))
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _sampling(self, asked: Sampled, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Return how to sample: a text as long as OpenAI's where nobody says, a chat's answer as long as may be."""
        most = self.limits.max_tokens
        if max_tokens is not None and max_tokens > most:
            raise ApiError(422, f"max_tokens: at most {most}", "max_tokens")
        if len(asked.stops) > 4:
            raise ApiError(422, "stop: at most 4", "stop")
        seed = self.serving.seed if asked.seed is None else asked.seed
        unasked = most if isinstance(asked, ChatRequest) else min(COMPLETION_TOKENS, most)
        shrinks = max_tokens is None
        return Sampling(max_tokens or unasked, asked.temperature, asked.top_p, seed, asked.stops, logprobs, shrinks)

    def _check_count(self, field: str, count: int, most: int) -> None:
        if not 1 <= count <= most:
            raise ApiError(422, f"{field}: {count} given; 1 to {most} are taken", field)

    async def _body(self, request: Request, kind: type[Body]) -> Any:
        return parse(kind, await read_body(request, self.limits))

    async def _ask(self, method: str, owner: str, adapter: str | None, *arguments: Any) -> Any:
        handle = self.model.options(session_id=session(owner, adapter))
        try:
            answer = await getattr(handle, method).remote(owner, adapter, *arguments)
        except Exception as error:
            raise as_api_error(error) from error
        if isinstance(answer, ApiError):
            raise answer
        return answer

    async def _answer(self, request: Request, route: str, work: Work) -> Response:
        """Do the work of a request for whoever's key it carries; count it, and write one line without anyone's text."""
        began = time.perf_counter()
        try:
            response = await work(owner_of_request(request, self.keys))
        except Exception as error:
            known = as_api_error(error)
            if known.status == 500:
                log.exception("request failed")
            response = refusal(known, self.limits.retry_after_seconds)
        seconds = time.perf_counter() - began
        self.metrics.request(route, request.method, response.status_code, seconds)
        line = {"event": "request", "route": route, "method": request.method, "status": response.status_code}
        log.info(json.dumps(line | {"seconds": round(seconds, 4)}))
        return response
