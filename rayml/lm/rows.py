"""Turn a prompt and its target into a row of tokens, for a causal or a masked language model.

Both are tokenised together, since tokenising them separately can give other tokens where they meet.

A masked model predicts a label word at the mask of a cloze prompt (PET, Schick and Schütze 2021, arXiv 2001.07676). Its
rows put the mask last before the target, which it predicts, so that rows, losses, scores and adapters work as for
causal models. There are three differences: text may follow the mask, padding must not be seen, and a target has one
token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayml.errors import DataError
from rayml.lm.tokens import remove_marks, tokenize

MASKS_KEY = "rayml_predicts_masks"
SOFT = 1 << 40
"""The first soft token, beyond any vocabulary."""


def soft_tokens(count: int) -> list[int]:
    """Return the tokens that stand for `count` learned embeddings in a row."""
    return list(range(SOFT, SOFT + count))


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One tokenised example: `tokens[start:]` is the target."""

    tokens: list[int]
    start: int
    loss_masked: tuple[int, ...] = ()
    """Positions after `start` that are not predicted: what others say between the assistant's turns."""
    suffix: tuple[int, ...] = ()
    """What a masked model reads after the mask, which is the last token before `start`."""
    is_name: bool = False
    """Whether it shows a label's own text, in place of an example; it has no target."""
    pair: tuple[tuple[int, ...], ...] = ()
    """The tokens of each of two texts that a sentence encoder compares (`rayml.lm.pooling.add_similarity`)."""

    def without_target(self) -> "TokenRow":
        return replace(self, tokens=self.tokens[: self.start], loss_masked=())


def encode(
    tokenizer, prompt: str, target: str, end: bool, max_tokens: int, keep: Callable[[int], bool] | None = None
) -> TokenRow:
    """Tokenise `prompt + target`, and cut the *prompt* from the left to fit `max_tokens`.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        prompt: with special tokens that users typed marked, as is `target` (`rayml.lm.tokens`).
        end: add the end-of-sequence token to the target, as free text needs it so that generation learns to stop.
        keep: tells whether to keep the token that begins at a character of the prompt; None keeps all.

    Raises:
        DataError: the target has no token, or leaves no room for the prompt.
    """
    tokens, offsets = tokenize(tokenizer, prompt + target)
    prompt, target = remove_marks(prompt), remove_marks(target)
    start = next((i for i, (_, stop) in enumerate(offsets) if stop > len(prompt)), len(tokens))
    if not target.strip() or start == len(tokens):
        raise DataError(f"target {target!r} has no token (input: {prompt[:60]!r})")
    if keep is not None:
        # Tokens of no width, such as the beginning-of-sequence token, are not part of the text, and stay.
        indices = [i for i, (a, b) in enumerate(offsets) if i >= start or a == b or keep(a)]
        tokens, start = [tokens[i] for i in indices], start - (len(tokens) - len(indices))
    if end:
        tokens = [*tokens, tokenizer.eos_token_id]
    if start == 0:  # something must predict the first token: a text begins as it does where another one has ended
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        tokens, start = [begin, *tokens], 1
    cut = max(0, len(tokens) - max_tokens)
    if start - cut < 1:
        raise DataError(
            f"target {target[:60]!r} has {len(tokens) - start} tokens, which leaves no room for its input within "
            f"data.max_tokens={max_tokens}; raise it or shorten the target"
        )
    return TokenRow(cut_left(tokenizer, tokens, max_tokens), start - cut)


def encode_sequence(tokenizer: Any, text: str, targets: Sequence[tuple[int, int]], max_tokens: int) -> TokenRow:
    """Tokenise a text that holds several targets, and cut it from the left to fit `max_tokens`.

    Args:
        targets: the span of characters of each target in the plain text, without marks.

    Raises:
        DataError: a target has no token, or none is left.
    """
    tokens, offsets = tokenize(tokenizer, text)
    cut = max(0, len(tokens) - max_tokens)
    predicted = [
        [i - cut for i, (a, b) in enumerate(offsets) if b > begin and a < end and i > cut] for begin, end in targets
    ]
    if not predicted[-1]:
        raise DataError(f"a target has no token within data.max_tokens={max_tokens} ({remove_marks(text)[-60:]!r})")
    learned = {i for indices in predicted for i in indices}
    start = min(learned)
    return TokenRow(tokens[cut:], start, tuple(i for i in range(start, len(tokens) - cut) if i not in learned))


def encode_rows(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Return rows as columns of plain lists, which Ray Data carries; `decode_rows` reads them back."""
    return {
        "tokens": [row.tokens for row in rows],
        "starts": [row.start for row in rows],
        "loss_masked": [list(row.loss_masked) for row in rows],
        "suffixes": [list(row.suffix) for row in rows],
        "is_name": [row.is_name for row in rows],
        "pairs": [[list(tokens) for tokens in row.pair] for row in rows],
    }


def decode_rows(side: Mapping[str, Any]) -> list[TokenRow]:
    """Return the rows that `encode_rows` wrote."""
    columns = side["tokens"], side["starts"], side["loss_masked"], side["suffixes"], side["is_name"], side["pairs"]
    return [
        TokenRow(list(tokens), start, tuple(loss_masked), tuple(suffix), bool(is_name), tuple(map(tuple, pair)))
        for tokens, start, loss_masked, suffix, is_name, pair in zip(*columns, strict=True)
    ]


def cut_left(tokenizer: Any, tokens: list[int], most: int) -> list[int]:
    """Return the last `most` tokens of a text; the token that texts begin with stays, since models rely on it."""
    cut = max(0, len(tokens) - most)
    bos = tokens[:1] if cut and tokens[0] == tokenizer.bos_token_id else []
    return bos + tokens[cut + len(bos) :]


def mark_masked(tokenizer: Any) -> None:
    """Mark the tokenizer of a masked model, since tokenizers of causal models may have a mask token, too."""
    tokenizer.init_kwargs[MASKS_KEY] = True


def predicts_masks(tokenizer: Any) -> bool:
    """Return whether a tokenizer is that of a masked model."""
    return bool(getattr(tokenizer, "init_kwargs", {}).get(MASKS_KEY))


def masked_row(
    tokenizer: Any, prompt: str, target: str, is_label: bool, max_tokens: int, keep: Callable[[int], bool] | None = None
) -> TokenRow:
    """Return the row of a prompt with a mask, whose last mask predicts the target; a long prompt loses its beginning.

    Args:
        prompt: with special tokens that users typed marked, as is `target` (`rayml.lm.tokens`).
        keep: tells whether to keep the token that begins at a character of the prompt; None keeps all.

    Raises:
        DataError: the target is no label, or has more or fewer than one token; or there is no room for the input.
    """
    if not is_label:
        raise DataError(
            f"a masked model chooses among labels and writes no text (target: {target[:40]!r}); give several examples "
            "of each label, or `options` in the rows"
        )
    word, _ = tokenize(tokenizer, f" {target.strip()}", add_special_tokens=False)
    if len(word) != 1:
        raise DataError(
            f"label {remove_marks(target)!r} has {len(word)} tokens, and a mask predicts one; rename it, or use "
            "data.labels=letters"
        )
    tokens, offsets = tokenize(tokenizer, prompt)
    if keep is not None:
        spans = zip(tokens, offsets, strict=True)
        tokens = [token for token, (a, b) in spans if a == b or token == tokenizer.mask_token_id or keep(a)]
    mask = len(tokens) - 1 - tokens[::-1].index(tokenizer.mask_token_id)
    cls = int(tokens[0] == tokenizer.cls_token_id)
    cut = max(0, len(tokens) - max_tokens)
    if cls + cut >= mask:
        raise DataError(f"the text after the mask leaves no room for the input within data.max_tokens={max_tokens}")
    read = [*tokens[:cls], *tokens[cls + cut : mask + 1]]
    return TokenRow([*read, *word], len(read), suffix=tuple(tokens[mask + 1 :]))
