"""What an evaluation has done so far, so that one that is cut off goes on where it was."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rayml.experiments.evaluate import Answered, Evaluation
from rayml.experiments.scorer import Curve
from rayml.runs.files import AnyPath

FILE = "evaluation.part.jsonl"


class Parts:
    """The parts of an evaluation in a run's folder, in order; those of another evaluation are forgotten.

    Args:
        asked: all that the results depend on.
    """

    def __init__(self, folder: AnyPath, asked: Any):
        self.path = folder / FILE
        self.asked = hashlib.sha256(repr(asked).encode()).hexdigest()
        self.episodes = 0
        """Done so far."""
        known = list(self._read()) if self.path.exists() else []
        self._waiting = iter(known)
        self._file = self.path.open("a", buffering=1) if known else None

    def _read(self) -> Iterator[Evaluation]:
        head, *lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] or [""]
        for line in lines if head == self.asked else []:
            trained, untrained, answered = json.loads(line)
            first, second = ([Curve(**curve) for curve in each] for each in (trained, untrained))
            yield Evaluation(first, second, [Answered(**one) for one in answered])

    def next(self) -> Evaluation | None:
        """Return the next part that was done before; None, if it is to be done now."""
        part = next(self._waiting, None)
        self.episodes += len(part.trained) if part else 0
        return part

    def keep(self, part: Evaluation) -> None:
        """Write down a part that was just done."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            self._file = self.path.open("a", buffering=1)
            self._file.write(self.asked + "\n")
        lists = [[asdict(one) for one in each] for each in (part.trained, part.untrained, part.answered)]
        self._file.write(json.dumps(lists, ensure_ascii=False) + "\n")
        self.episodes += len(part.trained)

    def remove(self) -> None:
        """Forget the parts: the whole is written."""
        if self._file:
            self._file.close()
        self.path.unlink(missing_ok=True)
