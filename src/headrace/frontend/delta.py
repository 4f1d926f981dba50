"""Two deltas of one request as one. Pure."""

from headrace.core.messages import Delta, TokenLogprobs


def merge(first: Delta, second: Delta) -> Delta:
    """The news of both: text, ids and logprobs joined, counters of the second."""
    return Delta(
        rid=second.rid,
        ids=first.ids + second.ids,
        text=first.text + second.text,
        finish=second.finish,
        prompt_tokens=second.prompt_tokens,
        completion_tokens=second.completion_tokens,
        cached_tokens=second.cached_tokens,
        retractions=second.retractions,
        logprobs=_merge_logprobs(first.logprobs, second.logprobs),
        input_logprobs=first.input_logprobs or second.input_logprobs,
        start=first.start or second.start,
        queue_time=second.queue_time,
        first_token_time=second.first_token_time,
        pooled=first.pooled or second.pooled,
        timeline=second.timeline,
    )


def _merge_logprobs(
    first: TokenLogprobs | None, second: TokenLogprobs | None
) -> TokenLogprobs | None:
    if first is None or second is None:
        return first or second
    return TokenLogprobs(
        tokens=first.tokens + second.tokens,
        values=first.values + second.values,
        top=first.top + second.top,
        ids=first.ids + second.ids,
    )
