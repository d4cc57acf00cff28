"""Log-probabilities of the target model itself: temperature 1, before penalties and masks."""

from __future__ import annotations

import torch

from engine.messages import TokenLogprob


def token_logprobs(logits: torch.Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability of each row's token and of the ``num_top`` most likely ones.

    Serves sampled tokens, and prompts too: there row i's token is the prompt's token i + 1.

    Args:
        logits: [R, V] float32, the model's own.
        token_ids: R tokens, one a row.
        num_top: alternatives to report; 0 for none.
    """
    logprobs = logits.log_softmax(dim=1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs.topk(num_top, dim=1)
    tops = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*entry) for entry in zip(token_ids, chosen, tops, strict=True)]
