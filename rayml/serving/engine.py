"""One model, and the thread that shares it: adapters of many tasks answer, and new ones are learned, side by side.

A turn of the thread takes one step of each kind of work that waits: a batch of queries to classify, one token of every
text in the making and a part of a new prompt, a part of an inner step of adapters being learned. Each has a budget in
tokens, so nothing waits for another's end, and adaptations get no more than their share of the time while queries wait.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rayml.lm.precision import fused_attention
from rayml.lm.queries import first_batch, log_probs
from rayml.model import MetaModel
from rayml.serving.errors import ApiError, busy
from rayml.serving.lessons import Lessons
from rayml.serving.memory import give_memory_back
from rayml.serving.settings import Batching, Limits
from rayml.serving.work import Adaptation, Waiting, Writing, settle
from rayml.serving.writer import Writer

log = logging.getLogger(__name__)
Observe = Callable[[str, float], None]
IDLE_SECONDS = 1.0
"""After which memory that nobody uses any more is given back."""
TURN_TOKENS = 256, 8192
"""What a turn reads on a CPU, and on a GPU: some tenths of a second."""


class Engine:
    """Answers queries and learns adapters on one model, from any thread.

    Args:
        model: with hooks on every linear that an adapter may change.
        observe: takes the name and the value of what is measured.
    """

    def __init__(
        self, model: MetaModel, batching: Batching, limits: Limits, observe: Observe = lambda name, value: None
    ):
        self.model, self.batching, self.limits, self.observe = model, batching, limits, observe
        self.turn_tokens = batching.turn_tokens or TURN_TOKENS[model.lm.device.type != "cpu"]
        self.writer = Writer(model.lm, batching, self.turn_tokens, observe)
        self.lessons = Lessons(model, batching, self.turn_tokens, observe)
        self._queries: deque[Waiting] = deque()
        self._pings: deque[Future[None]] = deque()
        self._owed_seconds = 0.0
        self._turn_began: float | None = None
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="rayml-engine", daemon=True)
        self._thread.start()

    def classify(self, queries: list[Waiting]) -> None:
        """Take queries in; their answers come as futures.

        Raises:
            ApiError: 429, too many wait.
        """
        self._submit(self._queries, queries, self.limits.waiting_queries, "queries")

    def write(self, writings: list[Writing]) -> None:
        """Queue texts to be written; raises as `classify` does."""
        self._submit(self.writer.waiting, writings, self.limits.waiting_queries, "texts")

    def adapt(self, adaptation: Adaptation) -> None:
        """Queue a request to adapt; raises as `classify` does."""
        self._submit(self.lessons.waiting, [adaptation], self.limits.waiting_adaptations, "adaptations")

    def ping(self) -> Future[None]:
        """Run the model on one token, ahead of all that waits."""
        answer: Future[None] = Future()
        self._submit(self._pings, [answer], None, "pings")
        return answer

    def working_seconds(self) -> float:
        """Return how long the present turn has taken; 0 between turns."""
        began = self._turn_began
        return time.monotonic() - began if began is not None else 0.0

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def cancel(self, writing: Writing) -> None:
        writing.cancelled = True

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _submit(self, waiting: deque, jobs: list[Any], most: int | None, what: str) -> None:
        with self._changed:
            if not self._thread.is_alive():
                raise ApiError(503, "this replica is going away; send the request again", code="replica_lost")
            if most is not None and len(waiting) + len(jobs) > most:
                raise busy(f"{len(waiting)} {what} wait in this replica already; at most {most} may")
            waiting.extend(jobs)
            self._changed.notify()

    def _run(self) -> None:
        while self._wait():
            self._turn_began = time.monotonic()
            try:
                self._turn()
            except Exception as error:  # no work is known to bring this about; whoever waits must not wait for ever
                log.exception("a turn failed")
                self._fail_all(error)
            self._turn_began = None

    def _wait(self) -> bool:
        """Wait until there is something to do; False: the end."""
        seconds: float | None = IDLE_SECONDS
        with self._changed:
            while self._open and not self._pings and not self._has_queries() and not self._has_adaptations():
                if not self._changed.wait(seconds):
                    give_memory_back()
                    seconds = None
            return self._open

    def _fail_all(self, error: Exception) -> None:
        waiting: list[Future] = [*self._pings, *(asked.answer for asked in self._queries)]
        for future in waiting:
            settle(future, error)
        self._pings.clear()
        self._queries.clear()
        self.writer.fail(error)
        self.lessons.fail(error)

    def _turn(self) -> None:
        if self._pings:
            self._pong([self._pings.popleft() for _ in range(len(self._pings))])
        if self._has_adaptations() and (self._owed_seconds <= 0 or not self._has_queries()):
            share = self.batching.adaptation_share
            self._owed_seconds = self._timed(self.lessons.turn) * (1 / share - 1)
        if self._has_queries():
            self._owed_seconds -= self._timed(self._answer)

    def _has_queries(self) -> bool:
        return bool(self._queries or self.writer)

    def _has_adaptations(self) -> bool:
        return bool(self.lessons)

    def _timed(self, work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def _pong(self, answers: list[Future[None]]) -> None:
        result: Exception | None = None
        try:
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.lm.device)
            with torch.no_grad():
                logits = self.model.lm.logits_at(token[0], None, token)
            if not torch.isfinite(logits).all():
                raise RuntimeError("the model's logits are not finite")
        except Exception as error:
            result = error
        for answer in answers:
            settle(answer, result)

    def _answer(self) -> None:
        """Classify between all else: a query is short, and somebody waits for it."""
        for part in self.writer.parts():
            self._classify_batch()
            part()
        self._classify_batch()

    def _classify_batch(self) -> None:
        batch = self._next_queries()
        if not batch:
            return
        found: Sequence[Tensor | Exception]
        try:
            queries = [asked.query for asked in batch]
            with fused_attention(self.model.lm.module, max(query.longest for query in queries)):
                scores = log_probs(self.model.lm, self.model.encoder.pad, queries)
            found = [of.cpu() for of in scores]
            self.observe("classify_batch", len(batch))
        except Exception as error:
            log.exception("classification failed")
            found = [error] * len(batch)
        for asked, result in zip(batch, found, strict=True):
            settle(asked.answer, result)

    def _next_queries(self) -> list[Waiting]:
        """Take queries that are answered in one way from the front, as many as one forward bears."""
        waiting = [asked.query for asked in islice(self._queries, self.batching.queries)]
        taken = [self._queries.popleft() for _ in range(first_batch(waiting, self.turn_tokens))]
        return [asked for asked in taken if not asked.answer.cancelled()]  # whoever left needs no answer
