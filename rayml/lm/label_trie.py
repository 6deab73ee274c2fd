"""Which tokens a label competes with, token by token.

At each of its tokens, a label competes with the labels that have the same tokens up to there. Its probability is the
product of these choices (as in GENRE's constrained decoding, De Cao et al. 2021, arXiv 2010.00904), and the
probabilities of all labels sum to 1. So no learning goes into the fact that a label comes at all, and a label's length
does not decide.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

IGNORE = -100

Label = Sequence[int]
"""The tokens of a label."""


def is_prefix_free(labels: Sequence[Label]) -> bool:
    """Return whether labels can be told apart token by token: none is the prefix of another."""
    return label_trie(labels).is_prefix_free


def label_trie(labels: Sequence[Label]) -> "LabelTrie":
    """Return the trie of labels, built once for all queries of a task, and both sides of an episode."""
    return _label_trie(tuple(map(tuple, labels)))


class LabelTrie:
    """A trie of labels: for every prefix, the tokens that follow it in some label."""

    def __init__(self, labels: Sequence[Label]):
        self.following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for label in map(tuple, labels):
            for position, token in enumerate(label):
                self.following[label[:position]].add(token)
        ordered = sorted(map(tuple, labels))  # a prefix sorts right before what it begins
        self.is_prefix_free = all(b[: len(a)] != a for a, b in pairwise(ordered))
        self._allowed: dict[tuple[int, ...], list[list[int]]] = {}

    def allowed(self, label: Label) -> list[list[int]]:
        """Return the choices for each token of a label, up to the last token that has competitors.

        The tokens after that are certain, and need not be run. There is always at least one.
        """
        label = tuple(label)
        if label not in self._allowed:
            choices = [sorted(self.following.get(label[:i], set()) | {token}) for i, token in enumerate(label)]
            last = max((i for i, tokens in enumerate(choices) if len(tokens) > 1), default=0)
            self._allowed[label] = choices[: last + 1]
        return self._allowed[label]


@lru_cache(maxsize=1024)
def _label_trie(labels: tuple[tuple[int, ...], ...]) -> LabelTrie:
    return LabelTrie(labels)
