"""Adapters that are being learned: a part of one loop in a turn, and every owner's in its turn."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence

from rayml.adaptation import Losses, adapt_requests
from rayml.algorithms.inner_loop import Params
from rayml.model import MetaModel
from rayml.serving.settings import Batching
from rayml.serving.work import Adaptation, settle

log = logging.getLogger(__name__)
Learned = list[tuple[Params, Losses]]


class Loop:
    """Lessons that are learned side by side."""

    def __init__(self, lessons: list[Adaptation], steps: Generator[int, None, Learned]):
        self.lessons, self.steps = lessons, steps


class Lessons:
    """What waits to be learned, and one loop under way for each owner: nobody waits for another's lessons to end."""

    def __init__(self, model: MetaModel, batching: Batching, turn_tokens: int, observe: Callable[[str, float], None]):
        self.model, self.batching, self.turn_tokens, self.observe = model, batching, turn_tokens, observe
        self.waiting: deque[Adaptation] = deque()
        self._loops: dict[str, Loop] = {}
        self._turns: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.waiting or self._loops)

    def turn(self) -> None:
        """Learn on for the owner who has waited longest: a part of an inner step."""
        owners = [*self._loops, *(one.owner for one in list(self.waiting))]
        self._turns = {owner: self._turns.get(owner, 0) for owner in owners}
        owner = min(owners, key=self._turns.__getitem__)
        self._turns[owner] = 1 + max(self._turns.values())
        if owner not in self._loops:
            self._loops[owner] = self._next_loop(owner)
        loop = self._loops[owner]
        try:
            taken = next(loop.steps)
            for one in loop.lessons:
                one.steps_taken = min(one.steps, max(0, taken))
        except StopIteration as end:
            self._end(owner, end.value)
        except Exception as error:
            log.exception("adaptation failed")
            self._end(owner, [error] * len(loop.lessons))

    def fail(self, error: Exception) -> None:
        """Give an error to all that wait."""
        for owner, loop in list(self._loops.items()):
            self._end(owner, [error] * len(loop.lessons))
        while self.waiting:
            settle(self.waiting.popleft().learned, error)

    def _end(self, owner: str, found: Sequence[tuple[Params, Losses] | Exception]) -> None:
        for one, learned in zip(self._loops.pop(owner).lessons, found, strict=True):
            settle(one.learned, learned)

    def _next_loop(self, owner: str) -> Loop:
        lessons = self._next(owner)
        requests, steps = [one.request for one in lessons], [one.steps for one in lessons]
        self.observe("adaptation_batch", len(lessons))
        return Loop(lessons, adapt_requests(self.model, requests, steps, self.turn_tokens))

    def _next(self, owner: str) -> list[Adaptation]:
        """Take an owner's first lesson, and those of anyone that fit beside it, in turn."""
        waiting = list(self.waiting)
        first = next(one for one in waiting if one.owner == owner)
        chosen = [first]
        for one in waiting:
            requests = [other.request.rows for other in (*chosen, one)]
            longest = max(len(row.tokens) for rows in requests for row in rows)
            tokens = len(requests) * max(map(len, requests)) * longest
            if one is not first and tokens <= self.turn_tokens and len(chosen) < self.batching.adaptations:
                chosen.append(one)
        for one in chosen:
            self.waiting.remove(one)
        return chosen
