"""What OpenAI's answers have in common: usage, finish reasons, and deltas added up per choice.

Choice number = prompt number * n + sample number. The prompt of n samples is counted once.
Knows nothing of JSON shapes beyond `usage`.
"""

from typing import Any

from headrace.core.messages import Delta, TokenLogprobs


class Choices:
    """The latest counters of every choice of one answer."""

    def __init__(self, count: int, n: int, report_cached: bool) -> None:
        self._n = n
        self._report_cached = report_cached
        self._last: list[Delta | None] = [None] * count

    def see(self, index: int, delta: Delta) -> bool:
        """Note a delta; true if it is the first of its choice."""
        first = self._last[index] is None
        self._last[index] = delta
        return first

    def usage(self, only: int | None = None) -> dict[str, Any]:
        """The `usage` object: of all choices, or so far of the choice `only`."""
        if only is None:
            seen, heads = self._last, self._last[:: self._n]
        else:
            seen = heads = self._last[only : only + 1]
        prompt = sum([delta.prompt_tokens for delta in heads if delta])
        output = sum([delta.completion_tokens for delta in seen if delta])
        cached = sum([delta.cached_tokens for delta in heads if delta])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached} if self._report_cached else None,
        }


class Gathered:
    """All deltas of one choice, joined."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.ids: list[int] = []
        self.logprobs = TokenLogprobs([], [], [], [])
        self.input_logprobs: TokenLogprobs | None = None
        self.finish: dict[str, Any] = {"finish_reason": None, "matched_stop": None}

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self.ids += delta.ids
        if delta.logprobs is not None:
            for whole, part in zip(_lists(self.logprobs), _lists(delta.logprobs), strict=True):
                whole += part
        if delta.input_logprobs is not None:
            self.input_logprobs = delta.input_logprobs
        self.finish = finish_fields(delta)

    @property
    def text(self) -> str:
        return "".join(self._texts)


def finish_fields(delta: Delta) -> dict[str, Any]:
    """`finish_reason` and `matched_stop` of a choice, both null while it runs; `timings` at its end
    if they were asked for."""
    finish = delta.finish
    fields: dict[str, Any] = {
        "finish_reason": finish.type if finish else None,
        "matched_stop": finish.matched if finish else None,
    }
    if delta.timeline is not None:
        fields["timings"] = delta.timeline.to_wire()
    return fields


def _lists(found: TokenLogprobs) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    return found.tokens, found.values, found.top, found.ids
