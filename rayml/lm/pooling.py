"""Pool hidden states into one vector for each prompt, or for each text of a sentence encoder."""

import torch
from torch import Tensor, nn

from rayml.algorithms.prototypes import Pooling
from rayml.lm.batch import TaskBatch
from rayml.lm.sentence import Sentences


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
