"""A replica of vLLM: it asks adapters by what their cards say, and leaves to the learners what vLLM cannot answer."""

import asyncio
import dataclasses
import json
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

from rayml.adapter import Adapter, chosen
from rayml.lm.catalog import resolve_model
from rayml.lm.load import context_tokens, load_shape, load_tokenizer
from rayml.lm.lora import linear_kinds
from rayml.lm.model import TaskLM
from rayml.lm.peft_files import AdapterCard, encoder_of
from rayml.lm.precision import own_device, settled_here
from rayml.lm.sampling import Sampling
from rayml.runs.folder import RunFolder
from rayml.serving.answering import Elsewhere
from rayml.serving.answers import ResponseBodies
from rayml.serving.engine import Observe
from rayml.serving.errors import ApiError
from rayml.serving.labels import choices, label_piece
from rayml.serving.queries import queries_of
from rayml.serving.schema import ChatRequest, ClassifyRequest, CompletionRequest, parse, plain
from rayml.serving.served import fits_of, servable
from rayml.serving.settings import Serving
from rayml.serving.store import AdapterStore
from rayml.serving.vllm.engine import engine_args, lora_rank, open_engine, prepare_environment
from rayml.serving.vllm.scoring import Tokens, option_log_probs
from rayml.serving.vllm.versions import Version, Versions


class Base:
    """Stands for a base that lies in vLLM's processes: options are asked for behind one prompt."""

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

        self._params, self._input, self._lora = SamplingParams, tokens_input, LoRARequest
        self.serving = serving
        run = RunFolder(serving.run)
        config, _ = servable(run, serving.checkpoint)
        base = resolve_model(config.model.name)
        shape = load_shape(base)
        device = own_device(config)
        on_gpu = device.type == "cuda"
        dtype = settled_here(config, base, device, run.made_in())[0].model.dtype
        self.context = min(context_tokens(shape), serving.limits.context_tokens)
        self.most_rank = lora_rank(config, serving.answerers)
        prepare_environment(max(1, int(serving.answerers.cpus or 1)), on_gpu)
        self.engine = open_engine(engine_args(serving, config, base, linear_kinds(shape), dtype, self.context, on_gpu))
        from rayml.serving.vllm.protocol import Protocol

        self.protocol = Protocol(self.engine, serving, name, base)
        self.tokenizer = load_tokenizer(base)
        self.base = base
        own = dataclasses.replace(config.encoder(self.tokenizer), max_tokens=self.context)
        self.bare = Adapter(cast(TaskLM, Base()), own, None, AdapterCard("", "", "", "{input}", 0), base)
        self._warm = False
        self._folder = tempfile.TemporaryDirectory(prefix="rayml-adapters-")
        self.versions = Versions(
            AdapterStore(serving.store or str(run.path / "adapters")),
            fits_of(config, base, shape, serving.adapters),
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

    async def _known(self, version: Version) -> Any:
        """Return vLLM's request for a version; what cannot be loaded is refused here, where it ends no engine."""
        known = self.protocol.models.lora_requests
        if version.name not in known:
            lora = self._lora(version.name, version.number, str(version.folder))
            try:
                await self.engine.add_lora(lora)
            except Exception as error:
                await self.engine.check_health()  # raises where it is not the adapter's fault
                raise ApiError(422, f"vLLM refused the adapter: {error}", "model", "adapter_refused") from error
            known[version.name] = lora
        return known[version.name]

    async def classify(self, owner: str, adapter: str | None, request: ClassifyRequest) -> Any:
        """Return what `Replica.classify` does; or Elsewhere."""
        if adapter is None:
            return await self._classify(self.bare, None, request)
        async with self.versions.use(owner, adapter) as version:
            if reason := version.unanswered(self.most_rank):
                return Elsewhere(reason)
            return await self._classify(version.adapter, await self._known(version), request)

    async def _classify(self, adapter: Adapter, lora: Any, request: ClassifyRequest) -> dict[str, Any]:
        labels = choices(adapter, request.options)
        seen = list(labels.values())
        cut = await asyncio.to_thread(queries_of, adapter, request.inputs, seen, self.context, request.truncate)

        async def ask(prompt: Tokens, tokens: list[int]) -> dict[int, float]:
            return await self._log_probs(prompt, tokens, lora)

        scores = await asyncio.gather(*(option_log_probs(ask, query.prompts) for query, _ in cut))
        answers = []
        for (_, is_cut), of in zip(cut, scores, strict=True):
            best = chosen(labels, of)
            answers.append({"label": best.text, "probabilities": best.probabilities, "truncated": is_cut})
        return {
            "answers": answers,
            "tokens": sum(len(one.rows[0].tokens) for query, _ in cut for one in query.option_queries),
        }

    async def _log_probs(self, prompt: Tokens, tokens: list[int], lora: Any) -> dict[int, float]:
        params = self._params(max_tokens=1, temperature=0.0, logprob_token_ids=tokens, detokenize=False)
        async for output in self.engine.generate(
            self._input(list(prompt)), params, uuid.uuid4().hex, lora_request=lora
        ):
            (found,) = output.outputs[0].logprobs
        return {token: found[token].logprob for token in tokens}

    async def respond(self, owner: str, adapter: str | None, kind: str, body: bytes) -> AsyncIterator[Any]:
        """Yield Elsewhere; or the answer as one JSON text; or None, and then its events.

        Args:
            kind: "completions" or "chat".
            body: of the request, as it came.

        Raises:
            ApiError: what is wrong with it.
        """
        if adapter is None:
            async for told in self._respond(kind, body, None):
                yield told
            return
        async with self.versions.use(owner, adapter) as version:
            if reason := version.unanswered(self.most_rank):
                yield Elsewhere(reason)
                return
            await self._known(version)
            async for told in self._respond(kind, body, version):
                yield told

    async def _respond(self, kind: str, body: bytes, version: Version | None) -> AsyncIterator[Any]:
        from rayml.serving.vllm.protocol import is_tokens

        values = json.loads(body)
        if version and version.adapter.labels and not is_tokens(values.get("prompt")):
            async for told in self._write_labels(kind, body, version):
                yield told
            return
        answer = await self.protocol.respond(kind, values, version)
        if isinstance(answer, str):
            yield answer
            return
        yield None
        async for event in answer:
            yield event

    async def _write_labels(self, kind: str, body: bytes, version: Version) -> AsyncIterator[Any]:
        """Yield one of the labels for every prompt, as `Replica.write` does."""
        chat = kind == "chat"
        asked = parse(ChatRequest if chat else CompletionRequest, body)
        inputs = [plain(prompt) for prompt in ([asked.messages] if chat else asked.prompts)]
        logprobs = (asked.top_logprobs if asked.logprobs else None) if chat else asked.logprobs
        seed = self.serving.seed if asked.seed is None else asked.seed
        sampling = Sampling(1, asked.temperature, asked.top_p, seed, asked.stops, logprobs)
        request = ClassifyRequest(model=asked.model, input=inputs)
        found = await self._classify(version.adapter, await self._known(version), request)
        pieces = [label_piece(answer["probabilities"], sampling) for answer in found["answers"]]
        written = [(index, piece, 0 if index else found["tokens"]) for index, piece in enumerate(pieces)]
        shape = ResponseBodies(asked.model, chat, logprobs is not None)
        if not asked.stream:
            yield json.dumps(shape.whole(written), ensure_ascii=False)
            return
        yield None
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        async for event in shape.events(each(written), usage):
            yield event

    async def check(self, seconds: float) -> None:
        """Run the base on one token.

        Raises:
            Exception: the engine is gone.
            TimeoutError: it did not answer.
        """
        await asyncio.wait_for(self._log_probs((0,), [0], None), seconds)

    async def check_engine(self) -> None:
        """Raise where the engine is gone. The first time it reads a token, so that no client waits for what is set up
        then."""
        await self.engine.check_health()
        if not self._warm:
            await self._log_probs((0,), [0], None)
            self._warm = True

    def close(self) -> None:
        self.engine.shutdown()
        self._folder.cleanup()


async def each(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item
