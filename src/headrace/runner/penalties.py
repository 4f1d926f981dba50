"""Edits of one row's logits before sampling: penalties, logit bias, min_new_tokens.

Everything is computed from the tokens so far, with no state between steps, so that a row gives the
same values after a retraction or in another batch. Knows nothing of batches.
"""

from collections.abc import Sequence

import numpy as np

from headrace.core.messages import SamplingParams


def edit_logits(
    logits: np.ndarray,
    tokens: np.ndarray,
    prompt_len: int,
    sampling: SamplingParams,
    eos_token_ids: Sequence[int],
) -> None:
    """Change `logits` (float32 [vocab]) in place.

    `tokens` (int32 [length]) is the prompt and the output so far. With c the number of times a
    token is in the output:

        l = l - frequency_penalty * c - presence_penalty * [c > 0]
        l = l / repetition_penalty if l > 0 else l * repetition_penalty,  tokens of prompt + output
        l = l + logit_bias
        l = -inf for end-of-sequence and stop ids while the output is shorter than min_new_tokens
    """
    output = tokens[prompt_len:]
    if (sampling.frequency_penalty or sampling.presence_penalty) and len(output):
        ids, counts = np.unique(output, return_counts=True)
        logits[ids] -= sampling.frequency_penalty * counts.astype(np.float32)
        logits[ids] -= sampling.presence_penalty
    if sampling.repetition_penalty != 1.0:
        values, factor = logits[tokens], np.float32(sampling.repetition_penalty)
        logits[tokens] = np.where(values > 0, values / factor, values * factor)
    if sampling.logit_bias:
        logits[list(sampling.logit_bias)] += np.array(list(sampling.logit_bias.values()), "f4")
    if len(output) < sampling.min_new_tokens:
        stops = {*eos_token_ids, *sampling.stop_token_ids}
        logits[[token for token in stops if 0 <= token < len(logits)]] = -np.inf
