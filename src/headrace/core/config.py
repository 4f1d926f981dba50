"""Every server option, declared once; `core.resolve` turns what was asked into what will run.

One frozen dataclass per component; a component takes its part, never the whole. The command line,
docs/options.md and /server_info are generated from these fields. Flags are the field names in
kebab-case, with SGLang's spelling. Knows nothing of torch, models or machines.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from headrace.core.errors import BadRequest
from headrace.core.option import check_value, kept, option
from headrace.core.secret import Secret
from headrace.core.serve_options import ObserveOptions, RecoverOptions, ServeOptions
from headrace.core.weight_options import LOAD_FORMATS, LoadOptions, ParallelOptions

STORED_QUANTIZATIONS = (
    *("fbgemm_fp8", "compressed-tensors", "w8a8_int8", "w8a8_fp8", "modelopt", "modelopt_fp8"),
    *("torchao", "awq", "awq_marlin", "gptq", "gptq_marlin", "bitsandbytes", "mxfp4", "gguf"),
)
"""What a checkpoint may be quantized with, by the names that --quantization has for it."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which checkpoint, and how to read it."""

    model_path: str = option(
        "", "Model folder, GGUF file or hub id; empty: the demo model.", aliases=("--model",)
    )
    tokenizer_path: str = option("", "Tokenizer folder or hub id; empty takes the model's.")
    served_model_name: str = option("", "Name shown to clients; empty takes the model path.")
    load_format: str = option(
        "auto", "How weights are read; see docs/loading.md.", choices=LOAD_FORMATS
    )
    quantization: str = option(
        "none",
        "Quantize the weights while they are loaded, or say how the checkpoint is quantized.",
        choices=("none", "int8", "int4", "fp8", *STORED_QUANTIZATIONS),
    )
    model_impl: str = option(
        "auto",
        "Whose implementation of the model runs; auto takes transformers' if there is no other.",
        choices=("auto", "headrace", "transformers"),
    )
    weight_cache: str = option(
        "", "Folder for packed weights: a second start maps them. Empty keeps none."
    )
    dtype: str = option(
        "auto",
        "Type of weights and activations; auto takes the checkpoint's.",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    is_embedding: bool = option(False, "Make embeddings, not text; see docs/embeddings.md.")
    context_length: int | None = option(
        None, "Longest sequence in tokens; empty takes the model's.", minimum=1
    )
    revision: str = option("", "Branch, tag or commit of a hub id.")
    download_dir: str = option("", "Where hub downloads are kept; empty takes the hub's cache.")
    json_model_override_args: str = option("{}", "JSON object laid over config.json.")
    skip_tokenizer_init: bool = option(
        False, "Tokens in, tokens out: load no tokenizer and serve input_ids only."
    )
    chat_template: str = option("", "A .jinja file or a built-in template name.")
    random_seed: int | None = option(
        None, "Seed for requests that bring none; empty draws one per request."
    )


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How much KV cache, and how prefixes are kept."""

    mem_fraction_static: float | None = option(
        None,
        "Share of memory for weights and KV cache together; empty computes it.",
        minimum=0.01,
        maximum=1.0,
    )
    max_total_tokens: int | None = option(
        None, "KV cache size in tokens; empty computes it from free memory.", minimum=1
    )
    page_size: int = option(16, "Tokens per KV page.", minimum=1, maximum=1024)
    kv_cache_dtype: str = option(
        "auto",
        "How keys and values are stored; auto takes the model's dtype.",
        choices=("auto", "bf16", "fp8_e4m3", "int8"),
    )
    quantization_param_path: str = option(
        "", "JSON file with the scales of an fp8_e4m3 cache; see docs/quantization.md."
    )
    disable_radix_cache: bool = option(False, "Keep no prefixes between requests.")
    radix_eviction_policy: str = option(
        "lru",
        "Which unused prefixes go first.",
        choices=("lru", "lfu", "fifo", "mru", "filo", "slru", "priority"),
    )


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """Who runs when."""

    max_running_requests: int | None = option(
        None, "Most requests in a step; empty computes it.", minimum=1
    )
    max_queued_requests: int | None = option(
        None,
        "Most waiting requests; more are answered 503. Empty: 2048 in a server, no limit in an "
        "Engine.",
        minimum=1,
    )
    max_queued_tokens: int | None = option(
        None, "Most prompt tokens of waiting requests; beyond that 503. Empty: no limit.", minimum=1
    )
    req_waiting_timeout: float = option(
        0.0, "Seconds after which a request that has not started gets 503; 0: none.", minimum=0.0
    )
    req_running_timeout: float = option(
        0.0, "Seconds after which a started request is ended with 503; 0: none.", minimum=0.0
    )
    chunked_prefill_size: int = option(
        0, "Most prompt tokens in a step; 0 chooses, -1 means max-prefill-tokens.", minimum=-1
    )
    max_prefill_tokens: int = option(
        16384, "Most prompt tokens in a step when chunking is off.", minimum=1
    )
    schedule_policy: str = option(
        "fcfs",
        "Order of waiting requests.",
        choices=(
            "fcfs",
            "lpm",
            "dfs-weight",
            "lof",
            "random",
            "shortest-prefill-first",
            "hrrn",
            "priority",
        ),
    )
    schedule_conservativeness: float = option(
        1.0, "Larger reserves more room for the output of running requests.", minimum=0.0
    )
    enable_priority_scheduling: bool = option(False, "Honor the priority of requests.")
    schedule_low_priority_values_first: bool = option(
        False, "Small priority numbers are the urgent ones."
    )
    priority_scheduling_preemption_threshold: int = option(
        10, "A request this much more urgent preempts a running one.", minimum=0
    )
    disable_priority_preemption: bool = option(False, "Priority orders the queue only.")
    default_priority_value: int | None = option(
        None, "Priority of requests that bring none; empty means the least urgent."
    )
    abort_on_priority_when_disabled: bool = option(
        False, "Answer 503 when a request has a priority and priorities are off."
    )
    retraction_policy: str = option(
        "length", "Who gives way when pages run out.", choices=("length", "priority")
    )
    max_sessions: int = option(1000, "Most sessions that are open at once.", minimum=0)
    session_timeout: int = option(
        3600, "Seconds after which a session that nobody uses is closed.", minimum=1
    )
    disable_overlap_schedule: bool = option(
        False, "Plan a step only when the previous one is done (depth 1 instead of 2)."
    )


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how the model runs."""

    device: str = option("auto", "Device of the model.", choices=("auto", "cpu"))
    numa_node: int | None = option(
        None,
        "Run the model on the cores and with the memory of this NUMA node; empty takes all.",
        minimum=0,
        maximum=63,
    )
    threads: int = option(0, "Compute threads; 0 takes the usable cores.", minimum=0)
    runner: str = option(
        "model",
        "fake answers with made-up tokens at once, to measure everything else.",
        choices=("model", "fake"),
    )
    grammar_backend: str = option(
        "auto",
        "What enforces JSON schemas, regular expressions and grammars; none refuses them.",
        choices=("auto", "llguidance", "xgrammar", "none"),
    )
    logit_processors: str = option(
        "", "Plug-ins that requests may name: NAME=module:Class with commas; docs/processors.md."
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All options; frozen after `resolve`."""

    model: ModelOptions = ModelOptions()
    load: LoadOptions = LoadOptions()
    cache: CacheOptions = CacheOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    run: RunOptions = RunOptions()
    parallel: ParallelOptions = ParallelOptions()
    serve: ServeOptions = ServeOptions()
    observe: ObserveOptions = ObserveOptions()
    recover: RecoverOptions = RecoverOptions()

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "Config":
        """Build from {option name: value}; unknown names and bad values are errors.

        Raises:
            BadRequest: names the option and what it may be.
        """
        rest = dict(values)
        parts: dict[str, Any] = {}
        for part in dataclasses.fields(cls):
            section: Any = part.default
            names = {field.name: field for field in dataclasses.fields(section)}
            chosen = {
                name: kept(names[name], rest.pop(name)) for name in list(rest) if name in names
            }
            parts[part.name] = dataclasses.replace(section, **chosen)
        if rest:
            raise BadRequest(f"unknown option {sorted(rest)[0]!r}", field=sorted(rest)[0])
        config = cls(**parts)
        for field, value in config.items():
            check_value(field, value)
        return config

    def items(self) -> Iterator[tuple["dataclasses.Field[Any]", Any]]:
        """(field, value) of every option, in the order they are declared."""
        for part in dataclasses.fields(self):
            section = getattr(self, part.name)
            for field in dataclasses.fields(section):
                yield field, getattr(section, field.name)

    def flat(self) -> dict[str, Any]:
        """{option name: value}; secrets stay `Secret`s."""
        return {field.name: value for field, value in self.items()}

    def revealed(self) -> dict[str, Any]:
        """{option name: value} with the texts of secrets, for a process of the same server."""
        return {
            field.name: value.reveal() if isinstance(value, Secret) else value
            for field, value in self.items()
        }

    def public(self) -> dict[str, Any]:
        """{option name: value} without secrets, for /server_info and logs."""
        return {field.name: value for field, value in self.items() if not isinstance(value, Secret)}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes that a running scheduler obeys; known once weights and memory are.

    `stages`: how many plans the runner works on at once; each then has other requests.
    """

    max_total_tokens: int
    max_running_requests: int
    context_length: int
    page_size: int
    stages: int = 1

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt plus output that can ever be served."""
        return min(self.context_length, self.max_total_tokens)
