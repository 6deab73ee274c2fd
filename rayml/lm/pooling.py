"""A sentence encoder's hidden states, pooled into one vector a text as sentence-transformers does it."""

import torch
from torch import Tensor, nn

from rayml.lm.sentence import Sentences


def pool(sentences: Sentences, states: Tensor, seen: Tensor) -> Tensor:
    """Return the vectors `[N, D]` of hidden states `[N, L, D]`, in fp32, where tokens are `seen` `[N, L]`."""
    states, mask = states.float(), seen.unsqueeze(-1).float()
    vectors = torch.cat([_pooled(how, states, mask) for how in sentences.poolings], dim=-1)
    return nn.functional.normalize(vectors, dim=-1) if sentences.is_unit else vectors


def _pooled(how: str, states: Tensor, mask: Tensor) -> Tensor:
    """Return one pooling, `[N, D]`, of states `[N, L, D]` with a mask `[N, L, 1]` of zeros behind each text."""
    count = mask.sum(1)
    match how:
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
