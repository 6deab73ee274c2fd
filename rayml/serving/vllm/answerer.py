"""A replica of vLLM. It prompts adapters as their cards say, and leaves to the learners what vLLM cannot answer."""

import asyncio
import dataclasses
import json
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from rayml.adapter import Adapter
from rayml.lm.catalog import resolve_model
from rayml.lm.load import context_tokens, load_shape, load_tokenizer
from rayml.lm.lora import linear_kinds
from rayml.lm.model import TaskLM
from rayml.lm.peft_files import AdapterCard, encoder_of
from rayml.lm.precision import own_device, resolve_precision_here
from rayml.lm.sampling import Sampling
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_files import PLAIN_CARD
from rayml.serving.answering import LearnerAnswers
from rayml.serving.answers import IndexedPiece, ResponseBodies
from rayml.serving.errors import ApiError
from rayml.serving.http import check_count
from rayml.serving.queries import Given, build_queries, classification, label_options, label_pieces
from rayml.serving.schema import COMPLETION_TOKENS, ChatRequest, ClassifyRequest, CompletionRequest, as_input, parse
from rayml.serving.served import adapter_constraints, read_servable_run, store_root
from rayml.serving.settings import Serving
from rayml.serving.store import AdapterStore
from rayml.serving.vllm.engine import engine_args, lora_rank, open_engine, prepare_environment
from rayml.serving.vllm.scoring import Tokens, option_log_probs
from rayml.serving.vllm.versions import Version, Versions
from rayml.serving.work import Observe


class Base:
    """Stands in for a `TaskLM`, since the model is in vLLM's processes. One prompt may have several options."""

    forks = True


class Answerer:
    """vLLM with the adapters of a store. `owner` and `adapter` as in `Replica`.

    Args:
        name: what clients call the base.
    """

    def __init__(self, serving: Serving, name: str, observe: Observe = lambda name, value: None):
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.lora.request import LoRARequest

        self._sampling_params, self._tokens_input, self._lora_request = SamplingParams, tokens_input, LoRARequest
        self.serving = serving
        run = RunFolder(serving.run)
        config, _ = read_servable_run(run, serving.checkpoint)
        base = resolve_model(config.model.name)
        shape = load_shape(base)
        device = own_device(config)
        on_gpu = device.type == "cuda"
        dtype = resolve_precision_here(config, base, device, run.trained_dtype())[0].model.dtype
        self.context = min(context_tokens(shape), serving.limits.context_tokens)
        self.most_rank = lora_rank(config, serving.answerers)
        prepare_environment(max(1, int(serving.answerers.cpus or 1)), on_gpu)
        self.engine = open_engine(engine_args(serving, config, base, linear_kinds(shape), dtype, self.context, on_gpu))
        from rayml.serving.vllm.protocol import Protocol

        self.protocol = Protocol(self.engine, serving, name, base)
        self.tokenizer = load_tokenizer(base)
        self.base = base
        encoder = dataclasses.replace(config.encoder(self.tokenizer), max_tokens=self.context)
        self.bare = Adapter(cast(TaskLM, Base()), encoder, None, PLAIN_CARD, base)
        self._is_warm = False
        self._folder = tempfile.TemporaryDirectory(prefix="rayml-adapters-")
        self.versions = Versions(
            AdapterStore(store_root(run, serving.store)),
            adapter_constraints(config, base, shape, serving.adapters),
            self._adapter_of,
            Path(self._folder.name),
            serving.adapters.cached_bytes,
            self._drop,
            observe,
        )

    def _adapter_of(self, card: AdapterCard) -> Adapter:
        encoder = encoder_of(card, self.tokenizer, card.max_tokens or self.context)
        return Adapter(cast(TaskLM, Base()), encoder, None, card, self.base)

    async def _drop(self, version: Version) -> None:
        self.protocol.models.lora_requests.pop(version.name, None)
        await self.engine.remove_lora(version.number)

    async def _load(self, version: Version) -> Any:
        """Return vLLM's `LoRARequest` of a version. An adapter that vLLM cannot load is refused before it is asked:
        in a request it would end the engine."""
        loaded = self.protocol.models.lora_requests
        if version.name not in loaded:
            lora_request = self._lora_request(version.name, version.number, str(version.folder))
            try:
                await self.engine.add_lora(lora_request)
            except Exception as error:
                await self.engine.check_health()  # raises if it is not the adapter's fault
                raise ApiError(422, f"vLLM refused the adapter: {error}", "model", "adapter_refused") from error
            loaded[version.name] = lora_request
        return loaded[version.name]

    async def classify(self, owner: str, adapter: str | None, request: ClassifyRequest) -> Any:
        """Return what `Replica.classify` does, or LearnerAnswers."""
        if adapter is None:
            return await self._classify(self.bare, None, request.inputs, request.options, request.truncate)
        async with self.versions.use(owner, adapter) as version:
            if reason := version.unanswered(self.most_rank):
                return LearnerAnswers(reason)
            lora_request = await self._load(version)
            return await self._classify(
                version.adapter, lora_request, request.inputs, request.options, request.truncate
            )

    async def _classify(
        self,
        adapter: Adapter,
        lora_request: Any,
        inputs: Sequence[Given],
        options: Sequence[str] | None = None,
        truncate: bool = False,
    ) -> dict[str, Any]:
        labels = label_options(adapter, options)
        queries = await asyncio.to_thread(build_queries, adapter, inputs, list(labels.values()), self.context, truncate)

        async def log_probs(prompt: Tokens, tokens: list[int]) -> dict[int, float]:
            return await self._log_probs(prompt, tokens, lora_request)

        scores = await asyncio.gather(*(option_log_probs(log_probs, query.prompts) for query, _ in queries))
        return classification(labels, queries, scores)

    async def _log_probs(self, prompt: Tokens, tokens: list[int], lora_request: Any) -> dict[int, float]:
        """Return the log-probabilities of some tokens after a prompt."""
        params = self._sampling_params(max_tokens=1, temperature=0.0, logprob_token_ids=tokens, detokenize=False)
        async for output in self.engine.generate(
            self._tokens_input(list(prompt)), params, uuid.uuid4().hex, lora_request=lora_request
        ):
            (logprobs,) = output.outputs[0].logprobs
        return {token: logprobs[token].logprob for token in tokens}

    async def respond(self, owner: str, adapter: str | None, kind: str, body: bytes) -> AsyncIterator[Any]:
        """Yield LearnerAnswers; or the response as one JSON text; or None, and then the events of a stream.

        Args:
            kind: "completions" or "chat".
            body: of the request, as it came.

        Raises:
            ApiError: what is wrong with the request.
        """
        if adapter is None:
            async for item in self._respond(kind, body, None):
                yield item
            return
        async with self.versions.use(owner, adapter) as version:
            if reason := version.unanswered(self.most_rank):
                yield LearnerAnswers(reason)
                return
            await self._load(version)
            async for item in self._respond(kind, body, version):
                yield item

    async def _respond(self, kind: str, body: bytes, version: Version | None) -> AsyncIterator[Any]:
        from rayml.serving.vllm.protocol import is_tokens

        fields = json.loads(body)
        if version and version.adapter.labels and not is_tokens(fields.get("prompt")):
            async for item in self._write_labels(kind, body, version):
                yield item
            return
        if kind == "completions" and fields.get("max_tokens") is None:
            fields["max_tokens"] = min(COMPLETION_TOKENS, self.serving.limits.max_tokens)  # vLLM's default is another
        response = await self.protocol.respond(kind, fields, version)
        if isinstance(response, str):
            yield response
            return
        yield None
        async for event in response:
            yield event

    async def _write_labels(self, kind: str, body: bytes, version: Version) -> AsyncIterator[Any]:
        """Yield a response with one of the labels for every prompt, as `Replica.write` does."""
        request: CompletionRequest | ChatRequest = parse(ChatRequest if kind == "chat" else CompletionRequest, body)
        check_count("prompt", request.prompts, self.serving.limits.inputs)
        inputs = [as_input(prompt) for prompt in request.prompts]
        seed = self.serving.seed if request.seed is None else request.seed
        sampling = Sampling(1, request.temperature, request.top_p, seed, request.stops, request.top_count)
        result = await self._classify(version.adapter, await self._load(version), inputs)
        pieces, bodies = label_pieces(result, sampling), ResponseBodies(request)
        if not request.stream:
            yield json.dumps(bodies.whole(pieces), ensure_ascii=False)
            return
        yield None
        async for event in bodies.events(as_stream(pieces), request.includes_usage):
            yield event

    async def check(self, seconds: float) -> None:
        """Run the base on one token.

        Raises:
            Exception: the engine is gone.
            TimeoutError: it did not answer.
        """
        await asyncio.wait_for(self._log_probs((0,), [0], None), seconds)

    async def check_engine(self) -> None:
        """Raise if the engine is gone. The first call also reads a token, so that no client waits for the set-up."""
        await self.engine.check_health()
        if not self._is_warm:
            await self._log_probs((0,), [0], None)
            self._is_warm = True

    def close(self) -> None:
        self.engine.shutdown()
        self._folder.cleanup()


async def as_stream(pieces: Iterable[IndexedPiece]) -> AsyncIterator[IndexedPiece]:
    for piece in pieces:
        yield piece
