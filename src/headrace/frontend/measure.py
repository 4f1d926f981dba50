"""Which numbers the news of a step adds to the metrics. Pure bookkeeping, once for every token."""

from headrace.core.messages import Delta
from headrace.frontend.flight import Flight
from headrace.metrics.record import RequestMetrics


class StepMeasure:
    """Measures the deltas of one message, which all came at `now` (monotonic seconds).

    Requests that run side by side have their tokens at the same times, so equal gaps are
    counted first and entered into the histogram together.
    """

    def __init__(self, metrics: RequestMetrics, now: float) -> None:
        self._metrics = metrics
        self._now = now
        # (time of the tokens before, number of tokens) -> number of requests
        self._gaps: dict[tuple[float, int], int] = {}

    def add(self, flight: Flight, delta: Delta) -> None:
        """Account news of a request."""
        count = len(delta.ids)
        if count and flight.stream:
            if flight.last_at:
                gap = (flight.last_at, count)
                self._gaps[gap] = self._gaps.get(gap, 0) + 1
            else:
                self._metrics.time_to_first_token.observe(self._now - flight.sent_at)
            flight.last_at = self._now
        if delta.finish is not None:
            self._end(flight, delta)

    def close(self) -> None:
        """All deltas of the message have been added."""
        for (before, count), requests in self._gaps.items():
            gap = (self._now - before) / count
            self._metrics.inter_token_latency.observe(gap, count * requests)

    def _end(self, flight: Flight, delta: Delta) -> None:
        metrics = self._metrics
        metrics.prompt_tokens += delta.prompt_tokens
        metrics.cached_tokens += delta.cached_tokens
        metrics.generation_tokens += delta.completion_tokens
        if delta.finish is None or delta.finish.type == "abort":
            metrics.aborted += 1
            return
        if delta.finish.type == "stop":
            metrics.stopped += 1
        else:
            metrics.cut_short += 1
        elapsed, decoded = self._now - flight.sent_at, delta.completion_tokens - 1
        per_token = max(0.0, elapsed - delta.first_token_time) / decoded if decoded > 0 else 0.0
        if not flight.stream:
            metrics.time_to_first_token.observe(delta.first_token_time)
        if decoded > 0:
            metrics.time_per_output_token.observe(per_token)
            if not flight.stream:
                metrics.inter_token_latency.observe(per_token, decoded)
        metrics.e2e_latency.observe(elapsed)
        metrics.queue_time.observe(delta.queue_time)
        computing = max(0.0, elapsed - delta.queue_time)
        decoding = max(0.0, elapsed - delta.first_token_time) if delta.first_token_time else 0.0
        metrics.inference_time.observe(computing)
        metrics.prefill_time.observe(computing - min(decoding, computing))
        metrics.decode_time.observe(decoding)
        metrics.prompt_length.observe(delta.prompt_tokens)
        metrics.generation_length.observe(delta.completion_tokens)
