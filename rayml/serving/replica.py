"""What a replica of the model does with requests: from text to the engine's rows, and from its numbers to answers."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import Any

from rayml.adaptation import adaptation_request, inner_steps
from rayml.adapter import Adapter, chosen
from rayml.algorithms.inner_loop import Params
from rayml.errors import DataError
from rayml.lm.abilities import unable
from rayml.lm.chat import chat_prompt, own_template
from rayml.lm.generate import end_tokens
from rayml.lm.load import context_tokens
from rayml.lm.peft_files import AdapterCard, encoder_of
from rayml.lm.sampling import Piece, Sampling
from rayml.lm.tokens import marked, tokenize
from rayml.model import load
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_cache import AdapterCache
from rayml.serving.engine import Engine, Observe
from rayml.serving.errors import ApiError
from rayml.serving.labels import choices, label_piece
from rayml.serving.learner import Learner
from rayml.serving.queries import Given, queries_of, unlimited
from rayml.serving.schema import AdapterRequest, ClassifyRequest, Message, is_blank, plain, turns_of
from rayml.serving.served import fits_of, servable
from rayml.serving.settings import Serving
from rayml.serving.store import AdapterStore, Manifest
from rayml.serving.work import Adaptation, Waiting, Writing
from rayml.tasks.row import unanswered
from rayml.tasks.task import Example, Task


class Replica:
    """A model with its adapters. `owner` is whose adapters a request sees; `adapter` an id, None for the bare base."""

    def __init__(self, serving: Serving, observe: Observe = lambda name, value: None):
        self.serving, self.observe = serving, observe
        run = RunFolder(serving.run)
        servable(run, serving.checkpoint)
        self.model = load(run, checkpoint=serving.checkpoint, every_linear=True)
        # What is tried by a forward is tried now: from here on the engine's thread alone may run the model.
        self.model.lm.try_out()
        self.context = min(context_tokens(self.model.lm.module), serving.limits.context_tokens)
        base = dataclasses.replace(self.model.encoder, max_tokens=self.context, soft_tokens=0)
        self.bare = self.model.adapter(None, AdapterCard("", "", "", "{input}", 0), encoder=base)
        self.store = AdapterStore(serving.store or str(run.outputs / "adapters"))
        fits = fits_of(self.model.config, self.model.base, self.model.lm.module, serving.adapters)
        self.adapter_cache = AdapterCache(self.store, fits, serving.adapters.cached_bytes, self._adapter_of, observe)
        self.engine = Engine(self.model, serving.batching, serving.limits, observe)
        self.learner = Learner(serving, self.model, self.engine, self.adapter_cache, self._adapter_of, observe)
        self.ends = end_tokens(self.model.lm.module, self.model.encoder.tokenizer)
        self._warm_up()

    @cached_property
    def mute(self) -> str | None:
        """Why the model cannot write texts; None where it can."""
        config = self.model.config
        return unable(self.model.base, {}, config.soft_tokens, writes=True, attention=config.model.attention)

    def _warm_up(self) -> None:
        """Let the first client not wait for what is set up at first use."""
        targets = ("A", "B")
        task = Task("warm-up", tuple(Example(target.lower(), target) for target in targets), targets)
        adaptation = Adaptation(adaptation_request(self.model, task), inner_steps(self.model, None))
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
        """Return, for every input, its label and the probability of each, in the client's own words.

        Raises:
            ApiError: 400, an input is too long; 422, options that there are not; 429, too much waits.
        """
        loaded = await self._adapter(owner, adapter)
        labels = choices(loaded, request.options)
        answers, tokens = await self._choose(loaded, request.inputs, labels, request.truncate)
        return {"answers": answers, "tokens": tokens}

    async def _choose(
        self, adapter: Adapter, inputs: Sequence[Given], labels: dict[str, str], truncate: bool
    ) -> tuple[list[dict[str, Any]], int]:
        """Score `labels`, each with what the model sees of it, for every input."""
        seen = list(labels.values())
        most = min(self.context, self.serving.limits.whole_tokens)
        cut = await asyncio.to_thread(queries_of, adapter, inputs, seen, most, truncate)
        asked = [Waiting(query) for query, _ in cut]
        self.engine.classify(asked)
        found = await asyncio.gather(*(asyncio.wrap_future(one.answer) for one in asked))
        answers = []
        for (_, is_cut), scores in zip(cut, found, strict=True):
            best = chosen(labels, scores)
            answers.append({"label": best.text, "probabilities": best.probabilities, "truncated": is_cut})
        return answers, sum(
            len(option_query.rows[0].tokens) for query, _ in cut for option_query in query.option_queries
        )

    async def write(
        self, owner: str, adapter: str | None, prompts: Sequence[Given | list[Message]], sampling: Sampling
    ) -> AsyncIterator[tuple[int, Piece, int]]:
        """Yield (which prompt, what its text grew by, tokens of the prompt) until all have ended.

        An adapter whose task has labels answers with one of them, in one piece.

        Raises:
            ApiError: 400, a prompt is too long; 429, too much waits.
        """
        loaded = await self._adapter(owner, adapter)
        if loaded.labels:
            inputs = [plain(prompt) for prompt in prompts]
            if any(isinstance(given, str) and is_blank(given) for given in inputs):
                field = "messages" if isinstance(prompts[0], list) else "prompt"
                raise ApiError(400, f"{field}: is empty", field)
            for written in await self._write_labels(loaded, inputs, sampling):
                yield written
            return
        arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        strip = loaded is not self.bare
        writings = []
        for index, prompt in enumerate(prompts):

            def receive(piece: Piece | Exception, index: int = index) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is gone with the replica
                    loop.call_soon_threadsafe(arrived.put_nowait, (index, piece))

            tokens = await asyncio.to_thread(self._prompt_tokens, loaded, prompt, sampling, index)
            most = min(sampling.max_tokens, self.context - len(tokens))
            own = dataclasses.replace(sampling, max_tokens=most)
            writing = Writing(self.model.encoder.tokenizer, tokens, loaded.weights, own, self.ends)
            writings.append(writing.send_to(receive))
        try:
            self.engine.write(writings)
            begun, waiting = set(), len(writings)
            while waiting:
                index, piece = await arrived.get()
                if isinstance(piece, Exception):
                    raise piece
                if strip and index not in begun:  # a target stands behind one space
                    piece.text = piece.text.lstrip()
                begun |= {index} if piece.text else set()
                waiting -= piece.finish_reason is not None
                yield index, piece, writings[index].prompt_tokens
        finally:
            for writing in writings:
                self.engine.cancel(writing)

    async def _write_labels(
        self, adapter: Adapter, inputs: Sequence[Given], sampling: Sampling
    ) -> list[tuple[int, Piece, int]]:
        answers, tokens = await self._choose(adapter, inputs, choices(adapter, None), truncate=False)
        pieces = [label_piece(answer["probabilities"], sampling) for answer in answers]
        # The tokens of all texts stand with the first: they are summed in the end.
        return [(index, piece, 0 if index else tokens) for index, piece in enumerate(pieces)]

    def _prompt_tokens(
        self, adapter: Adapter, prompt: Given | list[Message], sampling: Sampling, index: int
    ) -> list[int]:
        if self.mute:
            raise ApiError(400, f"{self.mute}; ask /v1/classify", "model")
        field = "messages" if isinstance(prompt, list) else "prompt"
        try:
            tokens = self._shown(adapter, prompt, field)
        except DataError as error:
            raise ApiError(400, str(error), field) from None
        if not tokens:
            raise ApiError(400, f"prompt {index} is empty", "prompt")
        if len(tokens) + (1 if sampling.shrinks else sampling.max_tokens) > self.context:
            room = "" if sampling.shrinks else f" and max_tokens={sampling.max_tokens}"
            message = f"prompt {index} has {len(tokens)} tokens{room}; together at most {self.context}, the context"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        whole = self.serving.limits.whole_tokens
        if len(tokens) > whole and not self.engine.writer.long.reads_in_parts:
            message = (
                f"prompt {index} has {len(tokens)} tokens; this model reads a prompt in one piece, and at most {whole}"
            )
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        return tokens

    def _shown(self, adapter: Adapter, prompt: Given | list[Message], field: str) -> list[int]:
        """Return a prompt's tokens, as an adapter shows it, or the base's chat template; a text as it is."""
        tokenizer = self.model.encoder.tokenizer
        if adapter is not self.bare:
            is_dialogue = adapter.card.kind == "dialogue"
            given = turns_of(prompt) if is_dialogue and isinstance(prompt, list) else plain(prompt)
            if isinstance(given, str) and is_blank(given):
                raise ApiError(400, f"{field}: is empty", field)
            return unlimited(adapter.encoder).asked(unanswered(given), adapter.shown)
        if not isinstance(prompt, list):
            return tokenize(tokenizer, marked(tokenizer, str(prompt)))[0]
        if own_template(tokenizer):
            return chat_prompt(tokenizer, turns_of(prompt))
        raise ApiError(400, "this base has no chat template; use /v1/completions", "messages")

    async def _adapter(self, owner: str, adapter: str | None) -> Adapter:
        return await self.adapter_cache.get(owner, adapter) if adapter else self.bare

    def _adapter_of(self, weights: Params, card: AdapterCard) -> Adapter:
        """Return an adapter on the model that is served; plain PEFT's read up to the context."""
        encoder = encoder_of(card, self.model.encoder.tokenizer, card.max_tokens or self.context)
        return self.model.adapter(weights, card, encoder=encoder)

    async def check(self, seconds: float) -> None:
        """Run the model on one token.

        Raises:
            Exception: what the model raises.
            TimeoutError: it did not run, and it is not at a long step either.
        """
        try:
            await asyncio.wait_for(asyncio.wrap_future(self.engine.ping()), seconds)
        except TimeoutError:
            working = self.engine.working_seconds()
            if not self.engine.is_alive() or not 0 < working < self.serving.replicas.stuck_seconds:
                raise
