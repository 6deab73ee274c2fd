"""Generate texts: choose tokens, and turn them into text piece by piece."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.errors import RunError
from rayml.lm.decode import Decoder
from rayml.lm.load import context_tokens
from rayml.lm.model import TaskLM
from rayml.lm.sampling import Piece, Sampling, TokenScore


class Generation:
    """A row of the decoder (`rayml.lm.decode.DecodingRow`) that knows when its text ends.

    Args:
        tokenizer: of the model.
        prompt: tokens.
        adapter: the task's weights; None for the bare base.
        sampling: with a `max_tokens` of at least 1.
        ends: tokens that end the text; by default the tokenizer's end-of-sequence token.
        drops_spaces: as `TextStream`'s.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        adapter: Params | None,
        sampling: Sampling,
        ends: Collection[int] | None = None,
        drops_spaces: bool = False,
    ):
        self.tokenizer, self.adapter, self.sampling = tokenizer, adapter, sampling
        self.ends = ends or {tokenizer.eos_token_id}
        self.tokens, self.prompt_tokens = list(prompt), len(prompt)
        self.most_tokens = len(prompt) + sampling.max_tokens
        self.finish_reason: str | None = None
        self._generator = new_generator(sampling.seed)
        self._text = TextStream(tokenizer, sampling.stop, drops_spaces)
        self._unsent = Piece("")

    def take(self, logits: Tensor) -> None:
        """Append a token, or end the text.

        Raises:
            RunError: the logits are not finite.
        """
        if logits.isnan().any():
            raise RunError("the model's logits are not finite")
        token = choose(logits, self.sampling, self._generator)
        if token in self.ends:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            self._unsent.text += self._text.add(token)
            if self.sampling.logprobs is not None:
                self._unsent.scores.append(self._score(token, logits))
            if self._text.stopped:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.most_tokens:
                self.finish_reason = "length"
        if self.finish_reason and not self._text.stopped:
            self._unsent.text += self._text.rest()

    def piece(self) -> Piece:
        """Return the text since the last call."""
        piece, self._unsent = self._unsent, Piece("")
        piece.tokens, piece.finish_reason = len(self.tokens) - self.prompt_tokens, self.finish_reason
        return piece

    def _score(self, token: int, logits: Tensor) -> TokenScore:
        log_probs = logits.log_softmax(-1)
        best = log_probs.topk(min(self.sampling.logprobs or 0, len(log_probs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = [(decode(self.tokenizer, [other]), log_prob) for other, log_prob in pairs]
        return TokenScore(decode(self.tokenizer, [token]), float(log_probs[token]), top)


def prepare_generations(
    lm: TaskLM, tokenizer: Any, prompts: Sequence[Sequence[int]], adapter: Params | None, most_tokens: int
) -> list[Generation]:
    """Return texts to be generated greedily after prompts: up to `most_tokens` each, or the end of the context."""
    context, ends = context_tokens(lm.module), end_tokens(lm.module, tokenizer)
    samplings = [Sampling(max(1, min(most_tokens, context - len(prompt)))) for prompt in prompts]
    pairs = zip(prompts, samplings, strict=True)
    return [Generation(tokenizer, prompt, adapter, sampling, ends) for prompt, sampling in pairs]


def write(lm: TaskLM, texts: Sequence[Generation]) -> None:
    """Generate texts side by side, until all have ended."""
    decoder = Decoder(lm, most_rows=len(texts), cache_tokens=0)
    decoder.join(texts)
    while True:
        for text in texts:
            if text.finish_reason and text in decoder.active:
                decoder.leave(text)
        if not decoder.active:
            return
        decoder.step()


def end_tokens(module: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's generation config."""
    eos = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    tokens = tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])
    return frozenset(token for token in tokens if token is not None)


def new_generator(seed: int | None) -> torch.Generator:
    """Return a generator on the CPU; without a seed, one that nobody can repeat."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token by its logits `[V]`. Draws are made on the CPU, so that a seed means the same everywhere."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)  # does not overflow at any temperature
    if sampling.top_p == 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    ordered, tokens = probabilities.sort(descending=True)
    more_probable = ordered.cumsum(-1) - ordered
    nucleus = ordered.masked_fill(more_probable >= sampling.top_p, 0)
    return int(tokens[torch.multinomial(nucleus, 1, generator=generator)])


def decode(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
    """Return the text of tokens as it is: some tokenizers would leave out its spaces before `.` and `'s`."""
    return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


class TextStream:
    """Turns tokens into text as soon as it is certain.

    Characters with bytes still to come are held back, and so is what may be the beginning of a stop text.

    Args:
        drops_spaces: leave out the spaces that the text begins with: they are no stop texts, either.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), drops_spaces: bool = False):
        self.tokenizer, self.stop, self.drops_spaces = tokenizer, stop, drops_spaces
        self.stopped = False
        self._tokens: list[int] = []
        self._decoded, self._sent = 0, 0  # counts of tokens in `_text`, and of characters of it that were returned
        self._text = ""

    def add(self, token: int) -> str:
        """Return the text that has become certain by this token."""
        self._tokens.append(token)
        # A few earlier tokens are decoded, too: a tokenizer may drop the space in front of a text's first word.
        first = max(0, self._decoded - 4)
        before = decode(self.tokenizer, self._tokens[first : self._decoded], skip_special_tokens=True)
        after = decode(self.tokenizer, self._tokens[first:], skip_special_tokens=True)
        if after.endswith("\ufffd"):
            return ""
        self._text += after[len(before) :]
        self._decoded = len(self._tokens)
        if self.drops_spaces and not self._sent:
            self._text = self._text.lstrip(" ")
        stops = [index for index in (self._text.find(stop) for stop in self.stop) if index >= 0]
        if stops:
            self.stopped = True
            return self._send(min(stops))
        return self._send(len(self._text) - max(map(self._partial_stop, self.stop), default=0))

    def rest(self) -> str:
        """Return what was held back, at the end of the text."""
        return self._send(len(self._text))

    def _send(self, end: int) -> str:
        sent, self._sent = self._text[self._sent : end], max(self._sent, end)
        return sent

    def _partial_stop(self, stop: str) -> int:
        """Return how many of the last characters may be the beginning of `stop`."""
        lengths = range(min(len(stop) - 1, len(self._text)), 0, -1)
        return next((n for n in lengths if self._text.endswith(stop[:n])), 0)
