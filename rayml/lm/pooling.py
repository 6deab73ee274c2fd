"""Pool hidden states into one vector for each prompt, or for each text of a sentence encoder."""

from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.prototypes import Pooling
from rayml.lm.batch import TaskBatch
from rayml.lm.sentence import Sentences

SIMILARITY = 4.0
"""What the similarity of a pair counts beside a vector of length 1; chosen on pairs of three data sets."""


def pool_prompts(hidden: Tensor, batch: TaskBatch, pooling: Pooling) -> Tensor:
    """Return a vector of unit length in fp32 for each prompt, `[T, K, D]`: of its last token, or its tokens' mean.

    Args:
        hidden: the last hidden states, `[N, L, D]`.
    """
    assert batch.prompts is not None
    flat, (begin, end) = hidden.flatten(0, 1), batch.prompts.unbind(-1)
    if pooling == "last":
        return nn.functional.normalize(flat[end].float(), dim=-1)
    positions = begin.unsqueeze(-1) + torch.arange(batch.read_at.longest_prompt, device=begin.device)
    inside = positions <= end.unsqueeze(-1)
    total = (flat[positions.where(inside, begin.unsqueeze(-1))] * inside.unsqueeze(-1)).float().sum(2)
    return nn.functional.normalize(total, dim=-1)


def pool_sentences(sentences: Sentences, hidden: Tensor, seen: Tensor) -> Tensor:
    """Return a vector for each text, `[N, D]` in fp32, as sentence-transformers computes it.

    Args:
        hidden: the last hidden states, `[N, L, D]`.
        seen: where tokens are not padding, `[N, L]` bool.
    """
    states, mask = hidden.float(), seen.unsqueeze(-1).float()
    vectors = torch.cat([_pool(kind, states, mask) for kind in sentences.poolings], dim=-1)
    return nn.functional.normalize(vectors, dim=-1) if sentences.is_unit else vectors


def add_similarity(vectors: Tensor, texts: Tensor | None, is_pair: Tensor | None) -> Tensor:
    """Return unit vectors `[T, K, D]` with one more number, `[T, K, D + 1]`: how similar the two texts of a pair are.

    Whether one text answers, repeats or follows from another is in what both have in common, and hardly in the vector
    of both together. The number is SIMILARITY times the cosine of their vectors; zero for what is no pair.

    Args:
        texts: the bare encoder's vectors of the texts of the pairs, `[T, 2 K, D]`; None if there are no pairs.
        is_pair: `[T, K]` bool.
    """
    if texts is None or is_pair is None:
        return nn.functional.pad(vectors, (0, 1))
    one, other = texts.unflatten(1, (-1, 2)).unbind(2)
    similarity = SIMILARITY * nn.functional.cosine_similarity(one, other, dim=-1) * is_pair
    return torch.cat([vectors, similarity.unsqueeze(-1)], dim=-1)


def vector_width(sentences: Sentences, config: Any) -> int:
    """Return the length of a sentence encoder's vector, by its model's config."""
    return len(sentences.poolings) * config.hidden_size


def add_no_similarity(prototypes: Tensor, width: int) -> Tensor:
    """Return a sentence encoder's prototypes as wide as its states are, if they were kept before `add_similarity`."""
    return nn.functional.pad(prototypes, (0, 1)) if prototypes.shape[-1] == width else prototypes


def _pool(kind: str, states: Tensor, mask: Tensor) -> Tensor:
    """Return one pooling, `[N, D]`, of states `[N, L, D]`; the mask `[N, L, 1]` is 0 for padding."""
    count = mask.sum(1)
    match kind:
        case "cls":
            return states[:, 0]
        case "lasttoken":
            return states[torch.arange(len(states), device=states.device), count.squeeze(1).long() - 1]
        case "max":
            return states.masked_fill(mask == 0, -torch.inf).amax(1)
        case "weightedmean":
            weights = mask * torch.arange(1, states.shape[1] + 1, device=states.device).view(1, -1, 1)
            return (states * weights).sum(1) / weights.sum(1)
        case "mean_sqrt_len_tokens":
            return (states * mask).sum(1) / count.sqrt()
    return (states * mask).sum(1) / count
