"""Tokenize text in which special tokens that a user typed stay text.

A tokenizer takes `<|im_end|>` or `[MASK]` for the special token wherever it occurs. In a template that is right. In an
input, a target or a message somebody typed it: it must not end a turn, or be the mask. So user text is marked in front
of every special token before it goes into a template, and `tokenize` spells what is marked as text. All other tokens
are what the tokenizer makes of the whole text. An added token counts as special, too, if it looks like one or occurs in
the chat template; other added tokens, such as runs of spaces or technical terms, are ordinary vocabulary.
"""

import copy
import re
from bisect import bisect_left
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any

from rayml.errors import DataError
from rayml.tasks.task import Example

MARK, BLANK = "\ufdd0", "\ufdd1"
"""MARK stands before a special token that is text, BLANK in place of a masked prompt's answer. Unicode reserves both as
noncharacters; a user's text may contain them all the same, and is then escaped."""
ESCAPED = {MARK: MARK + "\ufdd2", BLANK: MARK + "\ufdd3"}
UNESCAPED = {escaped: character for character, escaped in ESCAPED.items()}
MARKED = re.compile(f"{MARK}[\ufdd2\ufdd3]?")
EMBEDDINGS = "rayml_embeddings"
LOOKS_SPECIAL = re.compile(r"^<\|.+\|>$|^</?(think|tool_call|tool_response)>$")
"""Added tokens that count as special wherever they occur."""
PUNCTUATION = re.compile(r"[^\w\s]")
"""Tells an added token in a chat template from an ordinary word there."""

Offsets = list[tuple[int, int]]


def mark_specials(tokenizer: Any, text: str) -> str:
    """Return a user's text with marks in front of special tokens."""
    special = specials_of(tokenizer)
    pieces = [text[first:end] for first, end in pairwise([0, *special.normalized_starts(text), len(text)])]
    escape = partial(special.pattern.sub, lambda match: ESCAPED.get(match[0], MARK + match[0]))
    return MARK.join(map(escape, pieces))


def marked_example(tokenizer: Any, example: Example) -> Example:
    """Return an example with all its texts marked."""
    target, answers = mark_specials(tokenizer, example.target), example.answers
    parts = tuple((name, mark_specials(tokenizer, text)) for name, text in example.parts)
    return replace(example, input=mark_specials(tokenizer, example.input), target=target, parts=parts, answers=answers)


def remove_marks(text: str) -> str:
    """Return a text without its marks."""
    return MARKED.sub(lambda match: UNESCAPED.get(match[0], ""), text)


def tokenize(tokenizer: Any, text: str, add_special_tokens: bool = True) -> tuple[list[int], Offsets]:
    """Return a marked text's tokens, and the span of characters in the plain text that each stands for.

    Args:
        add_special_tokens: add those that the tokenizer begins and ends a text with.

    Raises:
        DataError: the tokenizer has no token for a word, or one that the model has no embedding for.
    """
    plain_text = remove_marks(text)
    try:
        encoding = tokenizer(plain_text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    except Exception as error:  # `tokenizers` raises plain exceptions
        raise DataError(
            f"the model's tokenizer cannot write {plain_text[:60]!r}: {error}; it knows neither a word of it nor an "
            "unknown token"
        ) from None
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    refuse_unembedded(tokenizer, tokens)
    typed = marked_places(text)
    if not typed:
        return tokens, offsets
    spelled_tokens: list[int] = []
    spelled_offsets: Offsets = []
    special = specials_of(tokenizer)
    special_ids = special.ids
    for token, (first, end) in zip(tokens, offsets, strict=True):
        is_typed = token in special_ids and bisect_left(typed, first) < bisect_left(typed, end)
        spelled = special.spell(plain_text[first:end]) if is_typed else [token]
        spelled_tokens += spelled
        spelled_offsets += [(first, end)] * len(spelled)
    return spelled_tokens, spelled_offsets


def marked_places(text: str) -> list[int]:
    """Return the characters of the plain text that have a mark in front of them in a marked text."""
    places, end, plain_end = [], 0, 0
    for match in MARKED.finditer(text):
        plain_end += match.start() - end
        end = match.end()
        if match[0] == MARK:
            places.append(plain_end)
        else:  # it is escaped, and stands for one character
            plain_end += 1
    return places


def mark_embeddings(tokenizer: Any, embeddings: int) -> None:
    """Record with a tokenizer how many embeddings the model has, if the tokenizer has more tokens."""
    if max([len(tokenizer) - 1, *tokenizer.added_tokens_decoder]) >= embeddings:
        setattr(tokenizer, EMBEDDINGS, embeddings)


def refuse_unembedded(tokenizer: Any, tokens: list[int]) -> None:
    """Raise DataError if the model has no embedding for one of these tokens."""
    embeddings = getattr(tokenizer, EMBEDDINGS, None)
    if embeddings and max(tokens, default=0) >= embeddings:
        token = tokenizer.convert_ids_to_tokens(max(tokens))
        raise DataError(
            f"the model has no embedding for the token {token!r} (it has {embeddings}); resize the embeddings"
        )


class SpecialTokens:
    """What counts as a special token for a tokenizer with its present chat template."""

    def __init__(self, tokenizer: Any, template: str):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.added = {number: token for number, token in added if self._is_special(token, template)}
        self.is_normalized = any(token.normalized for token in self.added.values())
        """The tokenizer looks for some of them in normalized text."""

    @staticmethod
    def _is_special(token: Any, template: str) -> bool:
        in_template = PUNCTUATION.search(token.content) and token.content in template
        return bool(token.special or LOOKS_SPECIAL.search(token.content) or in_template)

    @property
    def ids(self) -> frozenset[int]:
        return frozenset([*self.added, *self.tokenizer.all_special_ids])

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches special tokens, and our marks."""
        contents = {*(token.content for token in self.added.values()), *self.tokenizer.all_special_tokens, *ESCAPED}
        return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))

    @cached_property
    def speller(self) -> Any:
        """A copy of the tokenizer that knows no special tokens; other threads may be using the original."""
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.add_special_tokens([token.content for token in self.added.values()])
        backend.encode_special_tokens = True
        return backend

    def normalized_starts(self, text: str) -> list[int]:
        """Return where a text becomes a special token only after normalization, as full-width letters may."""
        if not self.is_normalized or self.tokenizer.backend_tokenizer.normalizer is None:
            return []
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        special = self.ids - {self.tokenizer.unk_token_id}
        spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        return [first for token, (first, end) in spans if token in special and not self.pattern.search(text[first:end])]

    def spell(self, text: str) -> list[int]:
        """Return ordinary tokens that spell a text.

        Some vocabularies have a special token's text as a word, too; it is then spelled in two pieces.
        """
        tokens = self.speller.encode(text, add_special_tokens=False).ids
        if len(text) > 1 and (self.ids - {self.tokenizer.unk_token_id}) & set(tokens):
            return [*self.spell(text[:1]), *self.spell(text[1:])]
        return tokens


def specials_of(tokenizer: Any) -> SpecialTokens:
    return _specials(tokenizer, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=16)
def _specials(tokenizer: Any, template: str) -> SpecialTokens:
    return SpecialTokens(tokenizer, template)
