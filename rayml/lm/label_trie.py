"""What a label competes with, token by token.

A label is written token by token, and at each one competes with the labels that begin as it does: its probability is
the product of these choices (as in GENRE's constrained decoding, De Cao et al. 2021, arXiv 2010.00904), and those of
all labels sum to 1. So nothing is spent on learning that a label comes at all, and a label's length does not decide.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

IGNORE = -100

Label = Sequence[int]
"""Its tokens."""


def can_tell_apart(labels: Sequence[Label]) -> bool:
    """Return whether labels can be told apart token by token: none is the beginning of another."""
    return label_trie(labels).tells_apart


def label_trie(labels: Sequence[Label]) -> "LabelTrie":
    """Return the trie of labels, built once: all queries of a task, and both sides of an episode, have it."""
    return _label_trie(tuple(map(tuple, labels)))


class LabelTrie:
    """A trie of labels: for every prefix, the tokens that some of them go on with."""

    def __init__(self, labels: Sequence[Label]):
        self.following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for label in map(tuple, labels):
            for position, token in enumerate(label):
                self.following[label[:position]].add(token)
        ordered = sorted(map(tuple, labels))  # a beginning stands right before what begins so
        self.tells_apart = all(b[: len(a)] != a for a, b in pairwise(ordered))
        self._allowed: dict[tuple[int, ...], list[list[int]]] = {}

    def allowed(self, label: Label) -> list[list[int]]:
        """Return for each token of a label what it is chosen among, up to the last that has a rival.

        What follows that is certain, and need not be run. There is always a first.
        """
        label = tuple(label)
        if label not in self._allowed:
            self._allowed[label] = self._among(label)
        return self._allowed[label]

    def _among(self, label: tuple[int, ...]) -> list[list[int]]:
        found = [sorted(self.following.get(label[:position], set()) | {token}) for position, token in enumerate(label)]
        last = max((position for position, among in enumerate(found) if len(among) > 1), default=0)
        return found[: last + 1]


@lru_cache(maxsize=1024)
def _label_trie(labels: tuple[tuple[int, ...], ...]) -> LabelTrie:
    return LabelTrie(labels)
