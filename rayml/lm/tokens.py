"""From text to tokens, where a special token that a user wrote is text.

A tokenizer takes `<|im_end|>` or `[MASK]` for the special token wherever it stands. In a template it is meant so. In an
input, a target or a message it is what somebody typed: it must not end a turn, or be the mask. So user text is marked
where it holds one before it comes into a template, and `tokenize` writes what is marked as text. All other tokens are
the tokenizer's own, of the whole text at once. An added token acts as a special one, too, where it looks like one or
stands in the chat template; others, such as runs of spaces or a trade's words, are vocabulary.
"""

import copy
import re
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

from rayml.errors import DataError
from rayml.tasks.task import Example

MARK, BLANK = "\ufdd0", "\ufdd1"
"""Before a special token that is text; and where a masked prompt's answer stands. Unicode has no such characters, but a
text may."""
ESCAPED = {MARK: MARK + "\ufdd2", BLANK: MARK + "\ufdd3"}
OWN = {escaped: character for character, escaped in ESCAPED.items()}
MARKED = re.compile(f"{MARK}[\ufdd2\ufdd3]?")
EMBEDDINGS = "rayml_embeddings"
LIKE = re.compile(r"^<\|.+\|>$|^</?(think|tool_call|tool_response)>$")
SIGN = re.compile(r"[^\w\s]")
"""What added tokens look like that act; and what those have that stand in a chat template, whose words have none."""

Offsets = list[tuple[int, int]]


def marked(tokenizer: Any, text: str) -> str:
    """Return a user's text, marked where it holds a special token."""
    places = folded(tokenizer, text)
    pieces = [text[first:end] for first, end in pairwise([0, *places, len(text)])]
    escape = partial(special_tokens(tokenizer).sub, lambda found: ESCAPED.get(found[0], MARK + found[0]))
    return MARK.join(map(escape, pieces))


def marked_example(tokenizer: Any, example: Example) -> Example:
    """Return an example with all its texts marked."""
    target, answers = marked(tokenizer, example.target), example.answers
    parts = tuple((name, marked(tokenizer, text)) for name, text in example.parts)
    return replace(example, input=marked(tokenizer, example.input), target=target, parts=parts, answers=answers)


def plain(text: str) -> str:
    """Return a text without its marks."""
    return MARKED.sub(lambda found: OWN.get(found[0], ""), text)


def tokenize(tokenizer: Any, text: str, add_special_tokens: bool = True) -> tuple[list[int], Offsets]:
    """Return a marked text's tokens, and the characters of the plain text that each stands for.

    Args:
        add_special_tokens: those that the tokenizer begins and ends a text with.

    Raises:
        DataError: it has none for a word, or one that the model does not know.
    """
    whole = plain(text)
    try:
        encoding = tokenizer(whole, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    except Exception as error:  # a bare one is all that `tokenizers` raises
        raise DataError(
            f"the model's tokenizer cannot write {whole[:60]!r}: {error}; it knows neither a word of it nor an unknown "
            "token"
        ) from None
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    refuse_unembedded(tokenizer, tokens)
    typed = {len(plain(text[: found.start()])) for found in MARKED.finditer(text) if found[0] == MARK}
    if not typed:
        return tokens, offsets
    found: list[tuple[int, tuple[int, int]]] = []
    special = special_ids(tokenizer)
    for token, (first, end) in zip(tokens, offsets, strict=True):
        is_typed = token in special and any(first <= index < end for index in typed)
        spelled = as_text(tokenizer, whole[first:end]) if is_typed else [token]
        found += [(one, (first, end)) for one in spelled]
    return [token for token, _ in found], [index for _, index in found]


def mark_embeddings(tokenizer: Any, embeddings: int) -> None:
    """Note how many tokens a model has embeddings for, where its tokenizer has more."""
    if max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder) >= embeddings:
        setattr(tokenizer, EMBEDDINGS, embeddings)


def refuse_unembedded(tokenizer: Any, tokens: list[int]) -> None:
    """Raise DataError if a model has no embedding for one of the tokens that its tokenizer gives."""
    embeddings = getattr(tokenizer, EMBEDDINGS, None)
    if embeddings and max(tokens, default=0) >= embeddings:
        token = tokenizer.convert_ids_to_tokens(max(tokens))
        raise DataError(f"the model has no embedding for the token {token!r} ({embeddings} there are); resize them")


def folded(tokenizer: Any, text: str) -> list[int]:
    """Return where a text holds what becomes a special token by the normalizer alone, as wide letters may."""
    acting = special_tokens(tokenizer)
    normalizer = tokenizer.backend_tokenizer.normalizer
    if not normalizes(tokenizer, template_of(tokenizer)) or normalizer is None:
        return []
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    found = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    return [first for token, (first, end) in found if token in special and not acting.search(text[first:end])]


def template_of(tokenizer: Any) -> str:
    return str(tokenizer.chat_template or "")


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of a tokenizer's special tokens, and of our marks."""
    return _pattern(tokenizer, template_of(tokenizer))


def special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset([*added_specials(tokenizer, template_of(tokenizer)), *tokenizer.all_special_ids])


@lru_cache(maxsize=16)
def added_specials(tokenizer: Any, template: str) -> dict[int, Any]:
    """Return the added tokens that act, in a template or by themselves."""
    added = tokenizer.added_tokens_decoder
    return {
        number: token
        for number, token in added.items()
        if token.special or LIKE.search(token.content) or (SIGN.search(token.content) and token.content in template)
    }


@lru_cache(maxsize=16)
def _pattern(tokenizer: Any, template: str) -> re.Pattern[str]:
    added = [token.content for token in added_specials(tokenizer, template).values()]
    names = sorted({*added, *tokenizer.all_special_tokens, *ESCAPED}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)))


@lru_cache(maxsize=16)
def normalizes(tokenizer: Any, template: str) -> bool:
    """Return whether a special token is looked for in normalized text."""
    return any(token.normalized for token in added_specials(tokenizer, template).values())


@lru_cache(maxsize=16)
def splitting(tokenizer: Any, template: str) -> Any:
    """Return a tokenizer's own copy that knows no special tokens: others use the first at the same time."""
    found = copy.deepcopy(tokenizer.backend_tokenizer)
    found.add_special_tokens([token.content for token in added_specials(tokenizer, template).values()])
    found.encode_special_tokens = True
    return found


def as_text(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens that spell a text.

    Some vocabularies have a special token's text as a word of theirs, too: then it is spelled in two pieces.
    """
    tokens = splitting(tokenizer, template_of(tokenizer)).encode(text, add_special_tokens=False).ids
    if len(text) > 1 and (special_ids(tokenizer) - {tokenizer.unk_token_id}) & set(tokens):
        return [*as_text(tokenizer, text[:1]), *as_text(tokenizer, text[1:])]
    return tokens
