"""One model, and the thread that runs it: tasks' adapters answer requests, and new ones are learned, side by side.

In a turn the thread takes one step of each kind of work that waits: it classifies a batch of queries, adds a token to
every text and reads a part of a new prompt, and runs a part of an inner step of the adapters being learned. Each step
has a budget in tokens, so that nothing waits for a long job to end. While queries wait, adaptations get no more than
their share of the time.
"""

import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rayml.lm.batch import collate
from rayml.lm.precision import fused_attention
from rayml.lm.queries import answer_queries, first_batch_size
from rayml.lm.rows import TokenRow
from rayml.model import MetaModel
from rayml.serving.adaptation_queue import AdaptationQueue
from rayml.serving.errors import ApiError, busy_error
from rayml.serving.settings import Batching, Limits
from rayml.serving.work import Observe, PendingAdaptation, PendingQuery, PendingText, settle
from rayml.serving.writer import Writer

log = logging.getLogger(__name__)
IDLE_SECONDS = 1.0
"""An engine that is idle for this long returns freed memory to the system."""
TURN_TOKENS = 256, 8192
"""The default budget of a step on a CPU, and on a GPU: some tenths of a second."""


class Engine:
    """Answers queries, writes texts and learns adapters on one model. Its methods may be called from any thread.

    Args:
        model: with hooks on every linear layer that an adapter may change.
        observe: takes the name and the value of a metric.
    """

    def __init__(
        self, model: MetaModel, batching: Batching, limits: Limits, observe: Observe = lambda name, value: None
    ):
        self.model, self.batching, self.limits, self.observe = model, batching, limits, observe
        self.turn_tokens = batching.turn_tokens or TURN_TOKENS[model.lm.device.type != "cpu"]
        self.writer = Writer(model.lm, batching, self.turn_tokens, observe)
        self.adaptations = AdaptationQueue(model, batching, self.turn_tokens, observe)
        self._queries: deque[PendingQuery] = deque()
        self._pings: deque[Future[None]] = deque()
        self._owed_seconds = 0.0
        """The time that queries have to get before adaptations may go on."""
        self._turn_began: float | None = None
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="rayml-engine", daemon=True)
        self._thread.start()

    def classify(self, queries: list[PendingQuery]) -> None:
        """Queue queries to be classified.

        Raises:
            ApiError: 429, too many wait.
        """
        self._submit(self._queries, queries, self.limits.waiting_queries, "queries")

    def write(self, writings: list[PendingText]) -> None:
        """Queue texts to be written; raises as `classify` does."""
        self._submit(self.writer.waiting, writings, self.limits.waiting_queries, "texts")

    def adapt(self, adaptation: PendingAdaptation) -> None:
        """Queue an adapter to be learned; raises as `classify` does."""
        self._submit(self.adaptations.waiting, [adaptation], self.limits.waiting_adaptations, "adaptations")

    def ping(self) -> Future[None]:
        """Run the model on one token, ahead of all other work."""
        answer: Future[None] = Future()
        self._submit(self._pings, [answer], None, "pings")
        return answer

    def working_seconds(self) -> float:
        """Return how long the present turn has taken; 0 between turns."""
        began = self._turn_began
        return time.monotonic() - began if began is not None else 0.0

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def cancel(self, writing: PendingText) -> None:
        writing.cancelled = True

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _submit(self, queue: deque, jobs: list[Any], limit: int | None, plural: str) -> None:
        with self._changed:
            if not self._thread.is_alive():
                raise ApiError(503, "this replica is going away; send the request again", code="replica_lost")
            if limit is not None and len(queue) + len(jobs) > limit:
                raise busy_error(f"{len(queue)} {plural} wait in this replica already; at most {limit} may")
            queue.extend(jobs)
            self._changed.notify()

    def _run(self) -> None:
        while self._wait():
            self._turn_began = time.monotonic()
            try:
                self._turn()
            except Exception as error:  # not expected; but those who wait must not wait for ever
                log.exception("a turn failed")
                self._fail_all(error)
            self._turn_began = None

    def _wait(self) -> bool:
        """Wait until there is work; return False when the engine is closed."""
        timeout: float | None = IDLE_SECONDS
        with self._changed:
            while self._open and not self._pings and not self._has_queries() and not self.adaptations:
                if not self._changed.wait(timeout):
                    trim_memory()
                    timeout = None
            return self._open

    def _fail_all(self, error: Exception) -> None:
        # One by one: others may submit more meanwhile, who must not be forgotten.
        while self._pings:
            settle(self._pings.popleft(), error)
        while self._queries:
            settle(self._queries.popleft().answer, error)
        self.writer.fail(error)
        self.adaptations.fail(error)

    def _turn(self) -> None:
        if self._pings:
            self._answer_pings([self._pings.popleft() for _ in range(len(self._pings))])
        if self.adaptations and (self._owed_seconds <= 0 or not self._has_queries()):
            share = self.batching.adaptation_share
            self._owed_seconds = seconds_of(self.adaptations.turn) * (1 / share - 1)
        if self._has_queries():
            self._owed_seconds -= seconds_of(self._answer)

    def _has_queries(self) -> bool:
        return bool(self._queries or self.writer)

    def _answer_pings(self, answers: list[Future[None]]) -> None:
        result: Exception | None = None
        try:
            if not self._read_token().isfinite().all():
                raise RuntimeError("the model's output is not finite")
        except Exception as error:
            result = error
        for answer in answers:
            settle(answer, result)

    @torch.no_grad()
    def _read_token(self) -> Tensor:
        """Return what the bare base makes of one token: its logits, or a sentence encoder's vector."""
        lm = self.model.lm
        if lm.sentences:
            return lm.vectors(None, collate([[TokenRow([0], 1)]], self.model.encoder.pad).to(lm.device))
        token = torch.zeros(1, 1, dtype=torch.int64, device=lm.device)
        return lm.logits_at(token[0], None, token)

    def _answer(self) -> None:
        """Go on with the texts, and classify before and after each part: a query is short, and has a client waiting."""
        for part in self.writer.parts():
            self._classify_batch()
            part()
        self._classify_batch()

    def _classify_batch(self) -> None:
        batch = self._next_queries()
        if not batch:
            return
        results: Sequence[Tensor | Exception]
        try:
            queries = [waiting.query for waiting in batch]
            with fused_attention(self.model.lm.module, max(query.longest for query in queries)):
                scores = answer_queries(self.model.lm, self.model.encoder.pad, queries)
            results = [query_scores.cpu() for query_scores in scores]
            self.observe("classify_batch", len(batch))
        except Exception as error:
            log.exception("classification failed")
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            settle(waiting.answer, result)

    def _next_queries(self) -> list[PendingQuery]:
        """Take the first queries that one forward can answer together."""
        with self._changed:  # a deque to which another thread adds cannot be iterated over
            first = list(islice(self._queries, self.batching.queries))
        queries = [waiting.query for waiting in first]
        batch = [self._queries.popleft() for _ in range(first_batch_size(queries, self.turn_tokens))]
        return [waiting for waiting in batch if not waiting.answer.cancelled()]


def seconds_of(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_memory() -> None:
    """Return freed memory to the system. glibc would keep what a long prompt took (`WORKER_ENV` says why)."""
    if malloc_trim := _malloc_trim():
        malloc_trim(0)
