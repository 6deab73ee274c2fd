"""A replica of the model. It turns requests into tokens for the engine, and the engine's results into answers."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import Any

from rayml.adaptation import adaptation_request, inner_steps
from rayml.adapter import Adapter
from rayml.algorithms.inner_loop import Params
from rayml.errors import DataError
from rayml.lm.abilities import why_unusable
from rayml.lm.chat import chat_prompt, own_template
from rayml.lm.generate import end_tokens
from rayml.lm.load import context_tokens
from rayml.lm.peft_files import AdapterCard, encoder_of
from rayml.lm.sampling import Piece, Sampling
from rayml.lm.tokens import mark_specials, tokenize
from rayml.model import load
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_cache import AdapterCache
from rayml.serving.adapter_files import PLAIN_CARD
from rayml.serving.answers import IndexedPiece
from rayml.serving.engine import Engine
from rayml.serving.errors import ApiError
from rayml.serving.learner import Learner
from rayml.serving.queries import Given, build_queries, classification, label_options, label_pieces, task_prompt
from rayml.serving.schema import AdapterRequest, ClassifyRequest, Message, as_input, turns_of
from rayml.serving.served import adapter_constraints, read_servable_run, store_root
from rayml.serving.settings import Serving
from rayml.serving.store import AdapterStore, Manifest
from rayml.serving.work import Observe, PendingAdaptation, PendingQuery, PendingText
from rayml.tasks.task import Example, Task


class Replica:
    """A model with its adapters.

    In all methods, `owner` is whose adapters the request may see; `adapter` is an adapter's id, or None for the bare
    base.
    """

    def __init__(self, serving: Serving, observe: Observe = lambda name, value: None):
        self.serving = serving
        run = RunFolder(serving.run)
        read_servable_run(run, serving.checkpoint)
        self.model = load(run, checkpoint=serving.checkpoint, every_linear=True)
        # Run the forward that finds out what the model can do now: later, only the engine's thread may run the model.
        self.model.lm.probe()
        self.context = min(context_tokens(self.model.lm.module), serving.limits.context_tokens)
        encoder = dataclasses.replace(self.model.encoder, max_tokens=self.context, soft_tokens=0)
        self.bare = self.model.adapter(None, PLAIN_CARD, encoder=encoder)
        self.store = AdapterStore(store_root(run, serving.store))
        fits = adapter_constraints(self.model.config, self.model.base, self.model.lm.module, serving.adapters)
        self.adapter_cache = AdapterCache(self.store, fits, serving.adapters.cached_bytes, self._adapter_of, observe)
        self.engine = Engine(self.model, serving.batching, serving.limits, observe)
        self.learner = Learner(serving, self.model, self.engine, self.adapter_cache, self._adapter_of, observe)
        self.ends = end_tokens(self.model.lm.module, self.model.encoder.tokenizer)
        self._warm_up()

    @cached_property
    def cannot_write(self) -> str | None:
        """Why the model cannot write texts; None if it can."""
        config = self.model.config
        return why_unusable(self.model.base, {}, config.soft_tokens, writes=True, attention=config.model.attention)

    def _warm_up(self) -> None:
        """Learn a small task, so that the first client need not wait for what is set up at first use."""
        targets = ("A", "B")
        task = Task("warm-up", tuple(Example(target.lower(), target) for target in targets), targets)
        adaptation = PendingAdaptation(adaptation_request(self.model, task), inner_steps(self.model, None))
        self.engine.adapt(adaptation)
        adaptation.learned.result()

    async def learn(self, owner: str, adapter: str, request: AdapterRequest) -> tuple[Manifest, bool]:
        """As `Learner.learn`."""
        return await self.learner.learn(owner, adapter, request)

    async def begin(self, owner: str, adapter: str, request: AdapterRequest) -> None:
        """As `Learner.begin`."""
        await self.learner.begin(owner, adapter, request)

    async def progress(self, owner: str, adapter: str) -> dict[str, int] | None:
        """As `Learner.progress`."""
        return self.learner.progress(owner, adapter)

    async def classify(self, owner: str, adapter: str | None, request: ClassifyRequest) -> dict[str, Any]:
        """Return, for every input, its label and the probability of each, by the client's own labels.

        Raises:
            ApiError: 400, an input is too long; 422, an unknown option; 429, too many requests wait.
        """
        loaded = await self._adapter(owner, adapter)
        return await self._classify(loaded, request.inputs, request.options, request.truncate)

    async def _classify(
        self, adapter: Adapter, inputs: Sequence[Given], options: Sequence[str] | None = None, truncate: bool = False
    ) -> dict[str, Any]:
        labels = label_options(adapter, options)
        most_tokens = min(self.context, self.serving.limits.whole_tokens)
        queries = await asyncio.to_thread(build_queries, adapter, inputs, list(labels.values()), most_tokens, truncate)
        waiting = [PendingQuery(query) for query, _ in queries]
        self.engine.classify(waiting)
        scores = await asyncio.gather(*(asyncio.wrap_future(query.answer) for query in waiting))
        return classification(labels, queries, scores)

    async def write(
        self, owner: str, adapter: str | None, prompts: Sequence[str | list[Message]], sampling: Sampling
    ) -> AsyncIterator[IndexedPiece]:
        """Yield (index of the prompt, next piece of its text, tokens of the prompt) until all texts have ended.

        An adapter whose task has labels answers with one of them, in one piece.

        Raises:
            ApiError: 400, a prompt is too long; 429, too many requests wait.
        """
        loaded = await self._adapter(owner, adapter)
        if loaded.labels:
            inputs = [as_input(prompt) for prompt in prompts]
            for indexed_piece in label_pieces(await self._classify(loaded, inputs), sampling):
                yield indexed_piece
            return
        pieces: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        writings = []
        for index, prompt in enumerate(prompts):

            def receive(piece: Piece | Exception, index: int = index) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended with the replica
                    loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

            tokens = await asyncio.to_thread(self._prompt_tokens, loaded, prompt, sampling, index)
            max_tokens = min(sampling.max_tokens, self.context - len(tokens))
            capped = dataclasses.replace(sampling, max_tokens=max_tokens)
            # An adapter puts a space before the target.
            drops_spaces = loaded is not self.bare
            writing = PendingText(self.model.encoder.tokenizer, tokens, loaded.weights, capped, self.ends, drops_spaces)
            writings.append(writing.send_to(receive))
        try:
            self.engine.write(writings)
            started, unfinished = set(), len(writings)
            while unfinished:
                index, piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if loaded is not self.bare and index not in started:  # an adapter puts a space before the target
                    piece.text = piece.text.lstrip()
                started |= {index} if piece.text else set()
                unfinished -= piece.finish_reason is not None
                yield index, piece, writings[index].prompt_tokens
        finally:
            for writing in writings:
                self.engine.cancel(writing)

    def _prompt_tokens(
        self, adapter: Adapter, prompt: str | list[Message], sampling: Sampling, index: int
    ) -> list[int]:
        if self.cannot_write:
            raise ApiError(400, f"{self.cannot_write}; ask /v1/classify", "model")
        field = "messages" if isinstance(prompt, list) else "prompt"
        try:
            tokens = self._encode(adapter, prompt)
        except DataError as error:
            raise ApiError(400, str(error), field) from None
        if not tokens:
            raise ApiError(400, f"prompt {index} is empty", "prompt")
        message, limit = f"prompt {index} has {len(tokens)} tokens", self.serving.limits.whole_tokens
        if len(tokens) + (1 if sampling.fits_context else sampling.max_tokens) > self.context:
            message += "" if sampling.fits_context else f" and max_tokens={sampling.max_tokens}"
            message += f"; the context holds {self.context}, answer included"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        if len(tokens) > limit and not self.engine.writer.long.reads_in_parts:
            message += f"; this model reads a prompt in one piece, of at most {limit}"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        return tokens

    def _encode(self, adapter: Adapter, prompt: str | list[Message]) -> list[int]:
        """Return the tokens of a prompt, in the adapter's template; for the base, in its chat template, or as it is."""
        tokenizer = self.model.encoder.tokenizer
        if adapter is not self.bare:
            is_dialogue = adapter.card.kind == "dialogue"
            given = turns_of(prompt) if is_dialogue and isinstance(prompt, list) else as_input(prompt)
            return task_prompt(adapter, given)
        if not isinstance(prompt, list):
            return tokenize(tokenizer, mark_specials(tokenizer, prompt))[0]
        if own_template(tokenizer):
            return chat_prompt(tokenizer, turns_of(prompt))
        raise ApiError(400, "this base has no chat template; use /v1/completions", "messages")

    async def _adapter(self, owner: str, adapter: str | None) -> Adapter:
        return await self.adapter_cache.get(owner, adapter) if adapter else self.bare

    def _adapter_of(self, weights: Params, card: AdapterCard) -> Adapter:
        """Return an adapter on the served model. One by plain PEFT reads as much as the context allows."""
        encoder = encoder_of(card, self.model.encoder.tokenizer, card.max_tokens or self.context)
        return self.model.adapter(weights, card, encoder=encoder)

    async def check(self, seconds: float) -> None:
        """Run the model on one token.

        Raises:
            Exception: what the model raises.
            TimeoutError: it did not run in time, and is not in the middle of a long step either.
        """
        try:
            await asyncio.wait_for(asyncio.wrap_future(self.engine.ping()), seconds)
        except TimeoutError:
            working = self.engine.working_seconds()
            if not self.engine.is_alive() or not 0 < working < self.serving.replicas.stuck_seconds:
                raise
