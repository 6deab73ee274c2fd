"""The adapters that are being learned. Each turn runs a part of one inner loop, and the owners take turns."""

import logging
from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple

from rayml.adaptation import Losses, adapt_requests
from rayml.algorithms.inner_loop import Params
from rayml.model import MetaModel
from rayml.serving.settings import Batching
from rayml.serving.work import Observe, PendingAdaptation, settle

log = logging.getLogger(__name__)
Learned = tuple[Params, Losses]


class Loop(NamedTuple):
    """An inner loop that learns several adapters side by side."""

    adaptations: list[PendingAdaptation]
    steps: Generator[int, None, list[Learned]]


class AdaptationQueue:
    """The adapters that wait to be learned, and one running loop for each owner: no owner waits for another's loop."""

    def __init__(self, model: MetaModel, batching: Batching, turn_tokens: int, observe: Observe):
        self.model, self.batching, self.turn_tokens, self.observe = model, batching, turn_tokens, observe
        self.waiting: deque[PendingAdaptation] = deque()
        self._loops: dict[str, Loop] = {}
        self._last_turns: dict[str, int] = {}
        """The number of each owner's last turn."""

    def __bool__(self) -> bool:
        return bool(self.waiting or self._loops)

    def turn(self) -> None:
        """Run a part of an inner step for the owner whose last turn is the longest ago."""
        owners = [*self._loops, *(adaptation.owner for adaptation in list(self.waiting))]
        self._last_turns = {owner: self._last_turns.get(owner, 0) for owner in owners}
        owner = min(owners, key=self._last_turns.__getitem__)
        self._last_turns[owner] = 1 + max(self._last_turns.values())
        if owner not in self._loops:
            self._loops[owner] = self._start_loop(owner)
        loop = self._loops[owner]
        try:
            steps_taken = next(loop.steps)
            for adaptation in loop.adaptations:
                adaptation.steps_taken = min(adaptation.steps, max(0, steps_taken))
        except StopIteration as end:
            self._end_loop(owner, end.value)
        except Exception as error:
            log.exception("adaptation failed")
            self._end_loop(owner, [error] * len(loop.adaptations))

    def fail(self, error: Exception) -> None:
        """Give an error to all that wait."""
        for owner, loop in list(self._loops.items()):
            self._end_loop(owner, [error] * len(loop.adaptations))
        while self.waiting:
            settle(self.waiting.popleft().learned, error)

    def _start_loop(self, owner: str) -> Loop:
        adaptations = self._take_next(owner)
        requests, steps = zip(*((adaptation.request, adaptation.steps) for adaptation in adaptations), strict=True)
        self.observe("adaptation_batch", len(adaptations))
        return Loop(adaptations, adapt_requests(self.model, requests, steps, self.turn_tokens))

    def _end_loop(self, owner: str, results: Sequence[Learned | Exception]) -> None:
        for adaptation, result in zip(self._loops.pop(owner).adaptations, results, strict=True):
            settle(adaptation.learned, result)

    def _take_next(self, owner: str) -> list[PendingAdaptation]:
        """Take an owner's first adaptation from the queue, and any owners' others that fit into a turn beside it."""
        waiting = list(self.waiting)
        first = next(adaptation for adaptation in waiting if adaptation.owner == owner)
        batch = [first]
        for adaptation in waiting:
            tasks = [other.request.rows for other in (*batch, adaptation)]
            longest = max(len(row.tokens) for rows in tasks for row in rows)
            tokens = len(tasks) * max(map(len, tasks)) * longest
            fits = tokens <= self.turn_tokens and len(batch) < self.batching.adaptations
            if adaptation is not first and fits:
                batch.append(adaptation)
        for adaptation in batch:
            self.waiting.remove(adaptation)
        return batch
