"""Learning in a replica: from the examples of a request to an adapter in the store."""

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rayml.adaptation import AdaptationRequest, adaptation_request, can_split_support, inner_steps
from rayml.adapter import Adapter
from rayml.algorithms.inner_loop import Params
from rayml.errors import DataError, TrainingError
from rayml.lm.peft_files import AdapterCard
from rayml.model import MetaModel, check_finite
from rayml.serving.adapter_cache import AdapterCache, Key, start_task
from rayml.serving.engine import Engine
from rayml.serving.errors import ApiError, busy_error
from rayml.serving.http import as_api_error
from rayml.serving.queries import without_limit
from rayml.serving.schema import AdapterRequest
from rayml.serving.settings import Serving
from rayml.serving.store import Manifest
from rayml.serving.work import Observe, PendingAdaptation
from rayml.tasks.episodes import relabel
from rayml.tasks.row import Row
from rayml.tasks.table import FREE_TEXT
from rayml.tasks.task import Example, Task

log = logging.getLogger(__name__)


class Learner:
    """Learns adapters on a replica's engine.

    In all methods, `owner` is whose adapter it is; `adapter` is its id.

    Args:
        adapter_of: makes an adapter of its weights and its card.
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
        self._learning: dict[Key, asyncio.Task[Manifest]] = {}
        self._adaptations: dict[Key, PendingAdaptation] = {}
        self._background: dict[Key, asyncio.Task[None]] = {}
        self._unfinished = 0
        # Each holds one of the requests that Serve admits at a time; half of these are left for queries.
        self._most_unfinished = min(serving.limits.waiting_adaptations, max(1, serving.replicas.ongoing_requests // 2))

    async def learn(self, owner: str, adapter: str, request: AdapterRequest) -> tuple[Manifest, bool]:
        """Return the adapter of these examples, and whether it is new: the same examples are learned only once.

        Raises:
            ApiError: 422, examples that cannot be learned from; 429, too many adapters, or too many being learned.
        """
        self._count_unfinished()
        try:
            return await self._find_or_learn(owner, adapter, request)
        finally:
            self._unfinished -= 1

    def _count_unfinished(self) -> None:
        if self._unfinished >= self._most_unfinished:
            raise busy_error(f"{self._unfinished} adaptations are under way in this replica, the most that it takes")
        self._unfinished += 1

    async def _find_or_learn(self, owner: str, adapter: str, request: AdapterRequest) -> tuple[Manifest, bool]:
        manifest = await asyncio.to_thread(self.store.find, owner, adapter)
        if manifest is None:
            key = owner, adapter
            is_first = key not in self._learning
            if is_first:
                start_task(self._learning, key, self._learn(owner, adapter, request))
            manifest = await asyncio.shield(self._learning[key])
            if is_first:
                return manifest, True
        return await asyncio.to_thread(self._extend_life, owner, manifest, request.ttl_seconds), False

    def _extend_life(self, owner: str, manifest: Manifest, ttl_seconds: float | None) -> Manifest:
        """Let an adapter live for the longest time that any of its requests asked for."""
        if manifest.expires_at is None:
            return manifest
        expires_at = max(manifest.expires_at, time.time() + ttl_seconds) if ttl_seconds else None
        return self.store.renew(owner, manifest, expires_at)

    async def begin(self, owner: str, adapter: str, request: AdapterRequest) -> None:
        """Learn an adapter in the background. The store keeps the request, so that it can be started again if lost.

        Raises:
            ApiError: as `learn`.
        """
        key = owner, adapter
        if key in self._background:
            return
        self._count_unfinished()
        try:
            await asyncio.to_thread(self.encode_request, request)
            await asyncio.to_thread(self.store.write_request, owner, adapter, request.model_dump_json().encode())
        except BaseException:
            self._unfinished -= 1
            raise
        start_task(self._background, key, self._learn_in_background(owner, adapter, request))

    async def _learn_in_background(self, owner: str, adapter: str, request: AdapterRequest) -> None:
        try:
            await self._find_or_learn(owner, adapter, request)
            await asyncio.to_thread(self.store.delete_request, owner, adapter)
        except Exception as error:
            api_error = as_api_error(error)
            if api_error.status == 500:  # other errors are the client's, and may quote its texts
                log.exception("an adaptation in the background failed")
            await asyncio.to_thread(self.store.write_request, owner, adapter, json.dumps(api_error.body()).encode())
        finally:
            self._unfinished -= 1

    def progress(self, owner: str, adapter: str) -> dict[str, int] | None:
        """Return the progress of an adaptation; None if this replica has no such one."""
        key = owner, adapter
        if adaptation := self._adaptations.get(key):
            return {"steps": adaptation.steps, "steps_taken": adaptation.steps_taken}
        return {} if key in self._learning or key in self._background else None

    async def _learn(self, owner: str, adapter_id: str, request: AdapterRequest) -> Manifest:
        began = time.perf_counter()
        await asyncio.to_thread(self._check_adapter_count, owner)
        prepared = await asyncio.to_thread(self.encode_request, request)
        adaptation = PendingAdaptation(prepared, inner_steps(self.model, request.steps), owner)
        self.engine.adapt(adaptation)
        self._adaptations[owner, adapter_id] = adaptation
        try:
            weights, losses = await asyncio.wrap_future(adaptation.learned)
        finally:
            del self._adaptations[owner, adapter_id]
        try:
            check_finite(request.name, weights)
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
        published = await asyncio.to_thread(self._publish, owner, manifest, adapter)
        self.adapter_cache.hold(owner, adapter_id, adapter)
        self.observe("adaptations", 1)
        self.observe("adaptation_seconds", manifest.seconds)
        return published

    def _check_adapter_count(self, owner: str) -> None:
        limit = self.serving.limits.adapters_per_key
        if self.store.count(owner) >= limit:
            self.store.sweep()
            if self.store.count(owner) >= limit:
                raise ApiError(
                    429, f"this key has {limit} adapters, the most that it may have; delete one", code="too_many"
                )

    def encode_request(self, request: AdapterRequest) -> AdaptationRequest:
        """Return a request as the engine learns it.

        Raises:
            ApiError: 422, examples that cannot be learned from; it names the example at fault.
        """
        is_dialogue = (request.kind or self.model.kind) == "dialogue"
        examples = [example.example(is_dialogue) for example in request.examples]
        options = tuple(dict.fromkeys(request.options or ()))
        for index, example in enumerate(examples):
            if options and example.target not in options:
                message = f"examples.{index}: {example.target[:60]!r} is none of the options"
                raise ApiError(422, message, f"examples.{index}")
        has_labels = bool(options) or (self.model.takes_labels and request.kind not in FREE_TEXT)
        if has_labels and len({example.target for example in examples}) < 2:
            raise ApiError(422, "examples: all have the same label; give examples of two or more", "examples")
        rows = [
            Row(request.name, ex.input, ex.target, options, f"examples.{index}", request.kind or "", ex.parts)
            for index, ex in enumerate(examples)
        ]
        try:
            task = self.model.task(rows, request.name)
            prepared = adaptation_request(self.model, task)
        except DataError as error:
            raise ApiError(422, f"examples: {error}", "examples") from None
        self._check_example_lengths(task, examples, prepared.card.labels)
        self._check_size(task, prepared)
        return prepared

    def _check_example_lengths(self, task: Task, examples: Sequence[Example], labels: dict[str, str]) -> None:
        """Refuse examples that would be cut. They are the client's: the task has no duplicates."""
        encoder = self.model.encoder.for_task(task.name, task.kind)
        shown_labels = {option: label for label, option in labels.items()}
        for index, example in enumerate(examples):
            shown = relabel(example, shown_labels.get(example.target))
            tokens = len(without_limit(encoder).row(shown, bool(task.options)).tokens) - encoder.soft_tokens
            if tokens > encoder.max_tokens + (not task.options):  # the token that ends a free text does not count
                message = (
                    f"examples.{index}: has {tokens} tokens; this model reads at most {encoder.max_tokens} per example"
                )
                raise ApiError(422, message, f"examples.{index}", "example_too_long")

    def _check_size(self, task: Task, prepared: AdaptationRequest) -> None:
        limits = self.serving.limits
        if len(task.options) > limits.options:
            raise ApiError(422, f"examples: {len(task.options)} labels; at most {limits.options}", "examples")
        tokens = len(prepared.rows) * max(len(row.tokens) for row in prepared.rows)
        if tokens > limits.whole_tokens and not can_split_support(self.model):
            algorithm = self.model.config.algorithm.name
            message = f"{tokens} tokens; {algorithm} reads them in one piece, of at most {limits.whole_tokens}"
            raise ApiError(422, f"examples: {message}", "examples")

    def _publish(self, owner: str, manifest: Manifest, adapter: Adapter) -> Manifest:
        with tempfile.TemporaryDirectory() as folder:
            adapter.write_to(Path(folder))
            return self.store.publish(owner, manifest, Path(folder))
