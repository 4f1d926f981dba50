"""`resolve`: from the options that were asked for to those that will run.

One pure function of options, model and machine; it says why it chose what it chose.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.core.hardware import Hardware
from headrace.core.model_info import ModelInfo
from headrace.core.serve_options import ServeOptions
from headrace.core.weight_options import ParallelOptions, host_and_port


def resolve(config: Config, info: ModelInfo, hardware: Hardware) -> tuple[Config, list[str]]:
    """Fill in every option that says "choose for me"; returns the result and the reasons."""
    notes: list[str] = []

    def choose(part: str, name: str, value: Any, reason: str) -> None:
        nonlocal config
        section = dataclasses.replace(getattr(config, part), **{name: value})
        config = dataclasses.replace(config, **{part: section})
        notes.append(f"set {name}={value} because {reason}")

    for choice in _precision(config, info, hardware):
        choose(*choice)
    if config.model.context_length is None:
        choose("model", "context_length", info.context_length, "the checkpoint says so")
    elif config.model.context_length > info.context_length:
        raise BadRequest(
            f"--context-length {config.model.context_length} is more than the model's "
            f"{info.context_length}",
            field="context_length",
        )
    check_workers(config.serve)
    _check_scales(config)
    check_ranks(config.parallel, info.num_layers)
    check_machines(config.parallel)
    if not config.model.served_model_name:
        choose("model", "served_model_name", config.model.model_path, "no other name was given")
    if config.run.device == "auto":
        choose("run", "device", "cpu", "no other device is supported yet")
    if config.run.threads == 0 and _parameters(info) < _SMALL_MODEL:
        choose("run", "threads", 1, "the model is too small to gain from more")
    elif config.run.threads == 0 and len(config.parallel.ranks_here) > 1:
        ranks = len(config.parallel.ranks_here)
        share = max(1, hardware.cores // ranks)
        choose("run", "threads", share, f"{ranks} ranks share {hardware.cores} cores")
    elif config.run.threads == 0:
        choose("run", "threads", hardware.cores, "that many cores are usable")
    if config.parallel.cpu_offload_gb:
        notes.append("cpu_offload_gb moves nothing: on this device all weights are in host memory")
    chunk, reason = info.chunk_size(
        config.schedule.chunked_prefill_size, config.model.context_length
    )
    if chunk == -1:
        chunk, reason = config.schedule.max_prefill_tokens, "chunking is off"
    if chunk != config.schedule.chunked_prefill_size:
        choose("schedule", "chunked_prefill_size", chunk, reason)
    if config.schedule.schedule_policy == "priority":
        choose("schedule", "enable_priority_scheduling", True, "the policy is priority")
    return config, notes


def check_ranks(parallel: ParallelOptions, layers: int) -> None:
    """Raise BadRequest for ranks that cannot be."""
    if parallel.pp_size > layers:
        raise BadRequest(
            f"--pp-size {parallel.pp_size} is more than the model's {layers} layers",
            field="pp_size",
        )
    tp, ep, units = parallel.tp_size, parallel.ep_size, parallel.deterministic_tp
    if tp % ep:
        raise BadRequest(f"--ep-size {ep} does not divide --tp-size {tp}", field="ep_size")
    if units & (units - 1):
        raise BadRequest(
            f"--deterministic-tp must be a power of two, not {units}", field="deterministic_tp"
        )
    if units % tp:
        raise BadRequest(
            f"--tp-size {tp} does not divide --deterministic-tp {units}", field="deterministic_tp"
        )


def check_machines(parallel: ParallelOptions) -> None:
    """Raise BadRequest for ranks that cannot be laid on the machines."""
    if parallel.node_rank >= parallel.nnodes:
        raise BadRequest(
            f"--node-rank must be 0 to {parallel.nnodes - 1}, not {parallel.node_rank}",
            field="node_rank",
        )
    if parallel.nnodes == 1:
        return
    host_and_port(parallel.dist_init_addr)
    nodes, pp, tp = parallel.nnodes, parallel.pp_size, parallel.tp_size
    if (pp % nodes and nodes % pp) or tp % max(1, nodes // pp):
        raise BadRequest(
            f"--nnodes {nodes}: a machine has whole stages, or a stage whole machines; {pp} stages "
            f"of {tp} ranks cannot be laid so",
            field="nnodes",
        )


def check_workers(serve: ServeOptions) -> None:
    """Raise BadRequest for what one process keeps and several would not share."""
    for name in ("enable_response_store", "batch_store"):
        if getattr(serve, name) and serve.tokenizer_worker_num > 1:
            flag = "--" + name.replace("_", "-")
            raise BadRequest(f"{flag} needs --tokenizer-worker-num 1", field=name)


def _precision(
    config: Config, info: ModelInfo, hardware: Hardware
) -> Iterator[tuple[str, str, str, str]]:
    """Choices of what the model computes in and keeps."""
    asked = config.model.dtype
    if asked == "auto" and info.dtype != "float32" and not hardware.bf16:
        yield "model", "dtype", "float32", "this CPU computes in it; packed weights stay bfloat16"
        if config.cache.kv_cache_dtype == "auto" and info.dtype == "bfloat16":
            yield "cache", "kv_cache_dtype", "bf16", "the checkpoint is no more precise"
    elif asked == "auto":
        yield "model", "dtype", info.dtype, "the checkpoint says so"
    elif asked in _DTYPE_NAMES:
        yield "model", "dtype", _DTYPE_NAMES[asked], "that is its full name"


# Below this many parameters a step is shorter than the coordination of threads.
_SMALL_MODEL = 32_000_000


def _parameters(info: ModelInfo) -> int:
    """About how many parameters a decoder of these sizes has."""
    return info.hidden_size * (info.vocab_size + 12 * info.num_layers * info.hidden_size)


_DTYPE_NAMES = {"half": "float16", "float": "float32"}


def _check_scales(config: Config) -> None:
    if config.cache.quantization_param_path and config.cache.kv_cache_dtype != "fp8_e4m3":
        raise BadRequest(
            "--quantization-param-path needs --kv-cache-dtype fp8_e4m3",
            field="quantization_param_path",
        )
