"""The table of metrics: name, type, help, and where the value comes from.

/metrics and the documentation are made from it, so that they cannot disagree. Names are SGLang's
with `headrace_` in place of `sglang:`. Knows no sockets and no exposition format.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from headrace.core.config import Limits
from headrace.core.messages import SchedulerStats
from headrace.metrics.record import MASK_SECONDS, SECONDS, Histogram, RequestMetrics

# Every name begins with it.
PREFIX = "headrace_"


class Sources(NamedTuple):
    """Everything metrics are read from, at one moment."""

    scheduler: SchedulerStats
    requests: RequestMetrics
    # Not known before the model is loaded.
    limits: Limits | None = None


class Metric(NamedTuple):
    """`read` gives a Histogram for kind "histogram", else a number."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    read: Callable[[Sources], float | Histogram]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


CATALOG: tuple[Metric, ...] = (
    # requests, seen from the frontend
    Metric(
        "headrace_num_requests_total",
        "counter",
        "Requests sent to the scheduler.",
        lambda s: s.requests.requests,
    ),
    Metric(
        "headrace_num_aborted_requests_total",
        "counter",
        "Requests that ended without their answer.",
        lambda s: s.requests.aborted,
    ),
    Metric(
        "headrace_num_refused_requests_total",
        "counter",
        "Requests with a grammar that cannot be enforced, refused before they were sent.",
        lambda s: s.requests.refused,
    ),
    Metric(
        "headrace_stopped_requests_total",
        "counter",
        "Requests that ended with a stop token or string.",
        lambda s: s.requests.stopped,
    ),
    Metric(
        "headrace_length_requests_total",
        "counter",
        "Requests that ended because they were as long as they may be.",
        lambda s: s.requests.cut_short,
    ),
    Metric(
        "headrace_prompt_tokens_total",
        "counter",
        "Prompt tokens of ended requests.",
        lambda s: s.requests.prompt_tokens,
    ),
    Metric(
        "headrace_cached_tokens_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
        lambda s: s.requests.cached_tokens,
    ),
    Metric(
        "headrace_generation_tokens_total",
        "counter",
        "Generated tokens of ended requests.",
        lambda s: s.requests.generation_tokens,
    ),
    Metric(
        "headrace_time_to_first_token_seconds",
        "histogram",
        "From sending a request to its first token.",
        lambda s: s.requests.time_to_first_token,
    ),
    Metric(
        "headrace_inter_token_latency_seconds",
        "histogram",
        "Between the tokens of a request.",
        lambda s: s.requests.inter_token_latency,
    ),
    Metric(
        "headrace_request_time_per_output_token_seconds",
        "histogram",
        "Mean time per token after the first, by request.",
        lambda s: s.requests.time_per_output_token,
    ),
    Metric(
        "headrace_e2e_request_latency_seconds",
        "histogram",
        "From sending a request to its end.",
        lambda s: s.requests.e2e_latency,
    ),
    Metric(
        "headrace_queue_time_seconds",
        "histogram",
        "From arrival at the scheduler to admission.",
        lambda s: s.requests.queue_time,
    ),
    Metric(
        "headrace_request_prefill_time_seconds",
        "histogram",
        "From admission to the first token.",
        lambda s: s.requests.prefill_time,
    ),
    Metric(
        "headrace_request_decode_time_seconds",
        "histogram",
        "From the first token to the end of a request.",
        lambda s: s.requests.decode_time,
    ),
    Metric(
        "headrace_request_inference_time_seconds",
        "histogram",
        "From admission to the end of a request.",
        lambda s: s.requests.inference_time,
    ),
    Metric(
        "headrace_prompt_tokens_histogram",
        "histogram",
        "Prompt length in tokens.",
        lambda s: s.requests.prompt_length,
    ),
    Metric(
        "headrace_generation_tokens_histogram",
        "histogram",
        "Output length in tokens.",
        lambda s: s.requests.generation_length,
    ),
    # lost processes
    Metric(
        "headrace_process_crashes_total",
        "counter",
        "Processes that were lost while they served; each was started again.",
        lambda s: s.requests.crashes,
    ),
    Metric(
        "headrace_recovery_time_seconds",
        "histogram",
        "From the loss of a process until requests go on.",
        lambda s: s.requests.recovery,
    ),
    Metric(
        "headrace_num_resumed_requests_total",
        "counter",
        "Times that a request went on after a process was lost.",
        lambda s: s.requests.resumed,
    ),
    Metric(
        "headrace_num_poisonous_requests_total",
        "counter",
        "Requests that were failed since they ended their process twice.",
        lambda s: s.requests.poisonous,
    ),
    # the scheduler
    Metric(
        "headrace_num_running_reqs",
        "gauge",
        "Requests that are being computed.",
        lambda s: s.scheduler.running,
    ),
    Metric(
        "headrace_num_queue_reqs", "gauge", "Requests that wait.", lambda s: s.scheduler.waiting
    ),
    Metric(
        "headrace_max_running_requests",
        "gauge",
        "Most requests in a step.",
        lambda s: s.scheduler.max_running_requests,
    ),
    Metric(
        "headrace_num_used_tokens",
        "gauge",
        "KV cache tokens in use by requests.",
        lambda s: s.scheduler.used_tokens,
    ),
    Metric(
        "headrace_kv_evictable_tokens",
        "gauge",
        "KV cache tokens of prefixes that nobody uses.",
        lambda s: s.scheduler.evictable_tokens,
    ),
    Metric(
        "headrace_max_total_num_tokens",
        "gauge",
        "Size of the KV cache in tokens.",
        lambda s: s.scheduler.max_total_tokens,
    ),
    Metric(
        "headrace_page_size",
        "gauge",
        "Tokens in a page of the KV cache.",
        lambda s: s.limits.page_size if s.limits else 0,
    ),
    Metric(
        "headrace_num_pages",
        "gauge",
        "Pages of the KV cache.",
        lambda s: s.limits.max_total_tokens // s.limits.page_size if s.limits else 0,
    ),
    Metric(
        "headrace_context_len",
        "gauge",
        "Longest sequence in tokens.",
        lambda s: s.limits.context_length if s.limits else 0,
    ),
    Metric(
        "headrace_num_paused_reqs",
        "gauge",
        "Running requests that a pause holds up.",
        lambda s: s.scheduler.paused,
    ),
    Metric(
        "headrace_token_usage",
        "gauge",
        "Share of the KV cache in use by requests.",
        lambda s: _share(s.scheduler.used_tokens, s.scheduler.max_total_tokens),
    ),
    Metric(
        "headrace_cache_hit_rate",
        "gauge",
        "Share of all prompt tokens found in the prefix cache.",
        lambda s: _share(s.scheduler.cached_tokens_total, s.scheduler.prompt_tokens_total),
    ),
    Metric(
        "headrace_gen_throughput",
        "gauge",
        "Generated tokens per second of late.",
        lambda s: s.scheduler.gen_throughput,
    ),
    Metric(
        "headrace_new_token_ratio",
        "gauge",
        "Share of their remaining output that running requests reserve.",
        lambda s: s.scheduler.new_token_ratio,
    ),
    Metric(
        "headrace_scheduler_requests_total",
        "counter",
        "Requests that reached the scheduler.",
        lambda s: s.scheduler.requests_total,
    ),
    Metric(
        "headrace_scheduler_aborted_requests_total",
        "counter",
        "Requests that the scheduler aborted.",
        lambda s: s.scheduler.aborted_total,
    ),
    Metric(
        "headrace_scheduler_prompt_tokens_total",
        "counter",
        "Prompt tokens of admitted requests.",
        lambda s: s.scheduler.prompt_tokens_total,
    ),
    Metric(
        "headrace_scheduler_cached_tokens_total",
        "counter",
        "Prompt tokens of admitted requests that were found in the prefix cache.",
        lambda s: s.scheduler.cached_tokens_total,
    ),
    Metric(
        "headrace_scheduler_generated_tokens_total",
        "counter",
        "Tokens generated, also by running requests.",
        lambda s: s.scheduler.generated_tokens_total,
    ),
    Metric(
        "headrace_num_retracted_requests_total",
        "counter",
        "Times that a request gave way and waits again.",
        lambda s: s.scheduler.retracted_total,
    ),
    Metric(
        "headrace_num_failed_steps_total",
        "counter",
        "Steps of the model that failed; their requests were computed again.",
        lambda s: s.scheduler.failed_steps_total,
    ),
    Metric(
        "headrace_evicted_tokens_total",
        "counter",
        "KV cache tokens of evicted prefixes.",
        lambda s: s.scheduler.evicted_tokens_total,
    ),
    Metric(
        "headrace_scheduler_steps_total",
        "counter",
        "Steps of the model.",
        lambda s: s.scheduler.steps_total,
    ),
    # structured output
    Metric(
        "headrace_num_grammar_queue_reqs",
        "gauge",
        "Requests that wait until their grammar is compiled.",
        lambda s: s.scheduler.grammar_waiting,
    ),
    Metric(
        "headrace_num_grammar_total",
        "counter",
        "Requests with a grammar that reached the scheduler.",
        lambda s: s.scheduler.grammar_requests_total,
    ),
    Metric(
        "headrace_grammar_compilation_time_seconds",
        "histogram",
        "To compile a grammar, also one that was refused then.",
        lambda s: Histogram.of(
            SECONDS, s.scheduler.grammar_compile_counts, s.scheduler.grammar_compile_seconds_total
        ),
    ),
    Metric(
        "headrace_num_grammar_cache_hit_total",
        "counter",
        "Grammars found among the compiled ones.",
        lambda s: s.scheduler.grammar_cache_hits_total,
    ),
    Metric(
        "headrace_num_grammar_cache_miss_total",
        "counter",
        "Grammars that had to be compiled.",
        lambda s: s.scheduler.grammar_cache_misses_total,
    ),
    Metric(
        "headrace_num_grammar_cache_evicted_total",
        "counter",
        "Compiled grammars that were dropped for newer ones.",
        lambda s: s.scheduler.grammar_cache_evictions_total,
    ),
    Metric(
        "headrace_num_grammar_aborted_total",
        "counter",
        "Requests that ended because of their grammar.",
        lambda s: s.scheduler.grammar_aborted_total,
    ),
    Metric(
        "headrace_num_grammar_timeout_total",
        "counter",
        "Requests that ended since compiling their grammar took too long.",
        lambda s: s.scheduler.grammar_timeouts_total,
    ),
    Metric(
        "headrace_grammar_mask_time_seconds",
        "histogram",
        "To compute the mask of one token.",
        lambda s: Histogram.of(
            MASK_SECONDS, s.scheduler.grammar_mask_counts, s.scheduler.grammar_mask_seconds_total
        ),
    ),
    Metric(
        "headrace_num_grammar_late_mask_total",
        "counter",
        "Times that a request missed a step because its mask was not ready.",
        lambda s: s.scheduler.grammar_late_masks_total,
    ),
    Metric(
        "headrace_uptime_seconds", "gauge", "Age of the scheduler.", lambda s: s.scheduler.uptime
    ),
)
