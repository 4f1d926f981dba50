"""Logit processors: code of the operator that changes the logits of requests that name it.

    from headrace.processors import Facts, LogitProcessor

A plug-in is a class whose objects are `LogitProcessor`s. `--logit-processors NAME=module:Class`
gives it a name, or a bare NAME that an installed package declares as an entry point of the group
`headrace.logit_processors`. Clients send the name and parameters, never code. Layers of ours that
run them are `check` (the main process), `gate` (the scheduler) and `rows` (the device).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from headrace.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Facts:
    """What a processor may know of the model; without a tokenizer requests are token ids."""

    vocab_size: int
    eos_token_ids: Sequence[int]
    tokenizer: Tokenizer | None

    def ids(self, text: str) -> list[int]:
        """The token ids of a mark such as "</think>".

        Raises:
            ValueError: there is no tokenizer, or the model has no such tokens.
        """
        if self.tokenizer is None:
            raise ValueError(f"{text!r} needs a tokenizer (--skip-tokenizer-init)")
        special = self.tokenizer.special_id(text)
        found = [special] if special is not None else self.tokenizer.encode(text, False)
        if not found or max(found) >= self.vocab_size:
            raise ValueError(f"this model has no tokens for {text!r}")
        return found


class LogitProcessor(Protocol):
    """One request's processor.

    Must be a function of its arguments: no memory of earlier calls, no randomness, no clock. That
    is what makes output independent of batches, retractions and crashes.
    """

    def __init__(self, params: Mapping[str, Any], facts: Facts) -> None:
        """`params`: the request's `custom_params`. Raises ValueError, for the client, if they are
        wrong; made when a request comes, and again where it is computed."""
        ...

    def __call__(self, logits: np.ndarray, prompt: np.ndarray, output: np.ndarray) -> None:
        """Change `logits` (float32 [vocab]) of the token that follows `output`, in place.

        `prompt` and `output`: int32 token ids, not to be written. What raises fails the request.
        """
        ...
