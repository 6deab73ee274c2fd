"""What a replica learns: from a request's examples to an adapter in the store, watched or in the background."""

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rayml.adaptation import AdaptationRequest, adaptation_request, inner_steps, splits
from rayml.adapter import Adapter
from rayml.algorithms.inner_loop import Params
from rayml.errors import DataError, TrainingError
from rayml.lm.encode import Encoder
from rayml.lm.peft_files import AdapterCard
from rayml.model import MetaModel, refuse_diverged
from rayml.serving.adapter_cache import AdapterCache, forget_task
from rayml.serving.engine import Engine, Observe
from rayml.serving.errors import ApiError, busy
from rayml.serving.http import as_api_error
from rayml.serving.queries import unlimited
from rayml.serving.schema import AdapterRequest
from rayml.serving.settings import Serving
from rayml.serving.store import Manifest
from rayml.serving.work import Adaptation
from rayml.tasks.episodes import relabel
from rayml.tasks.row import Row
from rayml.tasks.table import FREE_TEXT
from rayml.tasks.task import Task

log = logging.getLogger(__name__)


class Learner:
    """Learns adapters on a replica's engine. `owner` is whose they are; `adapter` an id.

    Args:
        adapter_of: makes an adapter of weights and a card.
    """

    def __init__(
        self,
        serving: Serving,
        model: MetaModel,
        engine: Engine,
        adapter_cache: AdapterCache,
        adapter_of: Callable[[Params, AdapterCard], Adapter],
        observe: Observe,
    ):
        self.serving, self.model, self.engine, self.observe = serving, model, engine, observe
        self.adapter_cache, self._adapter_of = adapter_cache, adapter_of
        self.store = adapter_cache.store
        self._learning: dict[tuple[str, str], asyncio.Task[Manifest]] = {}
        self._adaptations: dict[tuple[str, str], Adaptation] = {}
        self._background: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._unfinished = 0
        # Each holds one of the requests that Serve lets in at a time; the other half is for queries.
        self.most_unfinished = min(serving.limits.waiting_adaptations, max(1, serving.replicas.ongoing_requests // 2))

    async def learn(self, owner: str, adapter: str, request: AdapterRequest) -> tuple[Manifest, bool]:
        """Return the adapter of these examples, and whether it was learned just now: the same are never learned twice.

        Raises:
            ApiError: 422, examples that cannot be learned from; 429, too many adapters, or too many being learned.
        """
        self._take_place()
        try:
            return await self._found_or_learned(owner, adapter, request)
        finally:
            self._unfinished -= 1

    def _take_place(self) -> None:
        if self._unfinished >= self.most_unfinished:
            raise busy(f"{self._unfinished} adaptations are under way in this replica, as many as may be")
        self._unfinished += 1

    async def _found_or_learned(self, owner: str, adapter: str, request: AdapterRequest) -> tuple[Manifest, bool]:
        found = await asyncio.to_thread(self.store.find, owner, adapter)
        if found is None:
            key = owner, adapter
            new = key not in self._learning
            if new:
                self._learning[key] = asyncio.create_task(self._learn(owner, adapter, request))
                self._learning[key].add_done_callback(lambda task: forget_task(self._learning, key, task))
            found = await asyncio.shield(self._learning[key])
            if new:
                return found, True
        return await asyncio.to_thread(self._prolong, owner, found, request.ttl_seconds), False

    async def begin(self, owner: str, adapter: str, request: AdapterRequest) -> None:
        """Learn an adapter in the background. The store knows of it: whoever asks for it can have it begun again.

        Raises:
            ApiError: as `learn`.
        """
        key = owner, adapter
        if key in self._learning or key in self._background:
            return
        self._take_place()
        try:
            await asyncio.to_thread(self.prepared, request)
            await asyncio.to_thread(self.store.begin, owner, adapter, request.model_dump_json().encode())
        except BaseException:
            self._unfinished -= 1
            raise
        self._background[key] = asyncio.create_task(self._learn_unwatched(owner, adapter, request))
        self._background[key].add_done_callback(lambda task: forget_task(self._background, key, task))

    async def _learn_unwatched(self, owner: str, adapter: str, request: AdapterRequest) -> None:
        try:
            await self._found_or_learned(owner, adapter, request)
        except Exception as error:
            known = as_api_error(error)
            if known.status == 500:  # others quote the client
                log.exception("a lesson in the background failed")
            await asyncio.to_thread(self.store.begin, owner, adapter, json.dumps(known.body()).encode())
        finally:
            self._unfinished -= 1

    def progress(self, owner: str, adapter: str) -> dict[str, int] | None:
        """Return how far a lesson is; None, if this replica has no such lesson."""
        one = self._adaptations.get((owner, adapter))
        if one:
            return {"steps": one.steps, "steps_taken": one.steps_taken}
        return {} if (owner, adapter) in self._learning | self._background else None

    def _prolong(self, owner: str, manifest: Manifest, ttl_seconds: float | None) -> Manifest:
        """Let an adapter live as long as the most generous of those who asked for it said."""
        if manifest.expires_at is None:
            return manifest
        until = max(manifest.expires_at, time.time() + ttl_seconds) if ttl_seconds else None
        return self.store.renew(owner, manifest, until)

    async def _learn(self, owner: str, adapter_id: str, request: AdapterRequest) -> Manifest:
        began = time.perf_counter()
        await asyncio.to_thread(self._make_room, owner)
        prepared = await asyncio.to_thread(self.prepared, request)
        adaptation = Adaptation(prepared, inner_steps(self.model, request.steps), owner)
        self.engine.adapt(adaptation)
        self._adaptations[owner, adapter_id] = adaptation
        try:
            weights, losses = await asyncio.wrap_future(adaptation.learned)
        finally:
            del self._adaptations[owner, adapter_id]
        try:
            refuse_diverged(request.name, weights)
        except TrainingError as error:
            raise ApiError(422, str(error), "steps") from None
        adapter = self._adapter_of(weights, prepared.card)
        manifest = Manifest(
            id=adapter_id,
            name=request.name,
            created_at=time.time(),
            expires_at=time.time() + request.ttl_seconds if request.ttl_seconds else None,
            examples=len(request.examples),
            steps=adaptation.steps,
            loss_before=losses[0] if adaptation.steps else None,
            loss_after=losses[-1] if adaptation.steps else None,
            seconds=time.perf_counter() - began,
        )
        whole = await asyncio.to_thread(self._publish, owner, manifest, adapter)
        self.adapter_cache.hold(owner, adapter_id, adapter)
        self.observe("adaptations", 1)
        self.observe("adaptation_seconds", manifest.seconds)
        return whole

    def _make_room(self, owner: str) -> None:
        most = self.serving.limits.adapters_per_key
        if self.store.count(owner) >= most:
            self.store.sweep()
            if self.store.count(owner) >= most:
                raise ApiError(429, f"this key has {most} adapters, as many as it may; delete one", code="too_many")

    def prepared(self, request: AdapterRequest) -> AdaptationRequest:
        """Return what the engine learns of a request's examples.

        Raises:
            ApiError: 422, what is wrong with which of them.
        """
        is_dialogue = (request.kind or self.model.kind) == "dialogue"
        examples = [example.example(is_dialogue) for example in request.examples]
        options = tuple(dict.fromkeys(request.options or ()))
        for index, example in enumerate(examples):
            if options and example.target not in options:
                message = f"examples.{index}: {example.target[:60]!r} is none of the options"
                raise ApiError(422, message, f"examples.{index}")
        targets = {example.target for example in examples}
        labels = self.model.takes_labels and request.kind not in FREE_TEXT
        if (options or labels) and len(targets) < 2:
            raise ApiError(422, "examples: all have the same label; give examples of two or more", "examples")
        rows = [
            Row(request.name, one.input, one.target, options, f"examples.{index}", request.kind or "", one.parts)
            for index, one in enumerate(examples)
        ]
        try:
            task = self.model.task(rows, request.name)
            prepared = adaptation_request(self.model, task)
        except DataError as error:
            raise ApiError(422, f"examples: {error}", "examples") from None
        self._check_lengths(self.model.encoder.of(task.name, task.kind), task, prepared.card.labels)
        self._check_sizes(task, prepared)
        return prepared

    def _check_sizes(self, task: Task, prepared: AdaptationRequest) -> None:
        limits = self.serving.limits
        if len(task.options) > limits.options:
            raise ApiError(422, f"examples: {len(task.options)} labels; at most {limits.options}", "examples")
        tokens = len(prepared.rows) * max(len(row.tokens) for row in prepared.rows)
        if tokens > limits.whole_tokens and not splits(self.model):
            message = (
                f"examples: {tokens} tokens; {self.model.config.algorithm.name} reads them in one piece, and at most"
            )
            raise ApiError(422, f"{message} {limits.whole_tokens}", "examples")

    def _check_lengths(self, encoder: Encoder, task: Task, labels: dict[str, str]) -> None:
        shown = {option: label for label, option in labels.items()}
        for index, example in enumerate(task.examples):
            seen = relabel(example, shown.get(example.target))
            tokens = len(unlimited(encoder).row(seen, bool(task.options)).tokens)
            tokens -= encoder.soft_tokens
            if tokens > encoder.max_tokens + (not task.options):  # what ends free text is not counted
                message = f"examples.{index}: has {tokens} tokens; this model reads {encoder.max_tokens} of an example"
                raise ApiError(422, message, f"examples.{index}", "example_too_long")

    def _publish(self, owner: str, manifest: Manifest, adapter: Adapter) -> Manifest:
        with tempfile.TemporaryDirectory() as folder:
            adapter.write_to(Path(folder))
            return self.store.publish(owner, manifest, Path(folder))
