"""Our metrics under the names and labels of other servers, so that what is built for them works.

Dashboards, autoscalers and the endpoint picker of the Gateway API Inference Extension (its "model
server protocol" names the metrics of vLLM and SGLang) find what they look for. Values are those of
the catalog; histograms keep our buckets. Names without a value of the same meaning are left out.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from headrace.metrics.catalog import CATALOG, Metric, Sources


class Alias(NamedTuple):
    """`name` is another server's for `metric`; `labels` are added to those of its table."""

    name: str
    metric: Metric
    labels: Mapping[str, str] = {}


class Info(NamedTuple):
    """A gauge that is always 1; what it says is in its labels."""

    name: str
    help: str
    labels: Callable[[Sources], dict[str, str]]


class Table(NamedTuple):
    """The names of one server. `labels` are those that all its metrics have, besides ours."""

    labels: Mapping[str, str]
    aliases: tuple[Alias, ...]
    infos: tuple[Info, ...]


_OURS = {metric.name.removeprefix("headrace_"): metric for metric in CATALOG}

# SGLang's names are ours with another prefix.
_SGLANG = (
    "num_requests_total", "num_aborted_requests_total", "prompt_tokens_total",
    "cached_tokens_total", "generation_tokens_total", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "queue_time_seconds", "prompt_tokens_histogram",
    "generation_tokens_histogram", "num_running_reqs", "num_queue_reqs", "num_paused_reqs",
    "num_used_tokens", "kv_evictable_tokens", "max_total_num_tokens", "page_size", "num_pages",
    "context_len", "token_usage", "cache_hit_rate", "gen_throughput", "new_token_ratio",
    "num_retracted_requests_total", "evicted_tokens_total", "num_grammar_queue_reqs",
    "num_grammar_total", "grammar_compilation_time_seconds", "num_grammar_cache_hit_total",
    "num_grammar_aborted_total", "num_grammar_timeout_total",
)  # fmt: skip

# vLLM's name -> ours
_VLLM = {
    "num_requests_running": "num_running_reqs",
    "num_requests_waiting": "num_queue_reqs",
    "kv_cache_usage_perc": "token_usage",
    "num_preemptions_total": "num_retracted_requests_total",
    "prompt_tokens_total": "prompt_tokens_total",
    "generation_tokens_total": "generation_tokens_total",
    "prefix_cache_queries_total": "scheduler_prompt_tokens_total",
    "prefix_cache_hits_total": "scheduler_cached_tokens_total",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "request_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "request_queue_time_seconds": "queue_time_seconds",
    "request_prefill_time_seconds": "request_prefill_time_seconds",
    "request_decode_time_seconds": "request_decode_time_seconds",
    "request_inference_time_seconds": "request_inference_time_seconds",
    "request_prompt_tokens": "prompt_tokens_histogram",
    "request_generation_tokens": "generation_tokens_histogram",
}
_VLLM_ENDS = {
    "stop": "stopped_requests_total",
    "length": "length_requests_total",
    "abort": "num_aborted_requests_total",
}


def _pages(size: str, count: str) -> Callable[[Sources], dict[str, str]]:
    """Labels for the size and the number of pages."""

    def labels(sources: Sources) -> dict[str, str]:
        return {
            label: f"{_OURS[ours].read(sources):g}"
            for label, ours in ((size, "page_size"), (count, "num_pages"))
        }

    return labels


TABLES: dict[str, Table] = {
    "none": Table({}, (), ()),
    "sglang": Table(
        {"engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"},
        tuple(Alias(f"sglang:{name}", _OURS[name]) for name in _SGLANG),
        (
            Info(
                "sglang:cache_config_info",
                "The pages of the KV cache.",
                _pages("page_size", "num_pages"),
            ),
        ),
    ),
    "vllm": Table(
        {"engine": "0"},
        (
            *(Alias(f"vllm:{name}", _OURS[ours]) for name, ours in _VLLM.items()),
            *(
                Alias("vllm:request_success_total", _OURS[ours], {"finished_reason": reason})
                for reason, ours in _VLLM_ENDS.items()
            ),
        ),
        (
            Info(
                "vllm:cache_config_info",
                "The pages of the KV cache.",
                _pages("block_size", "num_gpu_blocks"),
            ),
        ),
    ),
}
