"""How memory is divided before the KV cache is allocated: a pure function of what is known.

    limit ─ in use by others ─ weights ─ one step's activations and logits ─ reserve ─ KV cache

The caller says what the machine has (the cgroup limit, `core.hardware`) and what the model needs.
Knows no torch; allocates nothing. Invariant: what the plan adds up to fits what was available.
"""

import math
from dataclasses import dataclass

from headrace.core.config import Config, Limits
from headrace.core.errors import LoadError
from headrace.core.hardware import Hardware
from headrace.core.model_info import ModelInfo

GIB = 1 << 30
# Logits are computed in slices of this size, their copies while sampling included.
LOGITS_BYTES = 256 << 20
LOGITS_COPIES = 4

_DEFAULT_ROWS = 256
# Tokens a cache gets unless asked for more: enough for batches, not all memory for a tiny model.
_DEFAULT_TOKENS = 1 << 18
# A server that cannot hold this much is of no use.
_LEAST_TOKENS = 1024
_LEAST_CHUNK = 64
# For the other processes, the allocator and the system.
_RESERVE_BYTES = 512 << 20
_RESERVE_SHARE = 0.05
# Share of the remaining memory that the cache takes unasked.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class StepCost:
    """Bytes that one step needs beside weights and cache: per token of the step, and for logits."""

    per_token: int = 0
    logits: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in bytes unless named otherwise; `in_use` is what was taken before loading."""

    limit: int
    in_use: int
    weights: int
    step: int
    reserve: int
    bytes_per_token: int
    total_tokens: int
    max_running_requests: int
    page_size: int
    context_length: int
    stages: int = 1

    @property
    def cache(self) -> int:
        return self.total_tokens * self.bytes_per_token

    @property
    def pages(self) -> int:
        return self.total_tokens // self.page_size

    @property
    def limits(self) -> Limits:
        return Limits(
            max_total_tokens=self.total_tokens,
            max_running_requests=self.max_running_requests,
            context_length=self.context_length,
            page_size=self.page_size,
            stages=self.stages,
        )

    def lines(self) -> list[str]:
        """The plan as a table for people."""
        free = self.limit - self.in_use - self.weights - self.step - self.reserve - self.cache
        sizes = {
            "memory limit": self.limit,
            "in use": self.in_use,
            "weights": self.weights,
            "activations, logits": self.step,
            "reserve": self.reserve,
            "KV cache": self.cache,
            "left free": free,
        }
        return [
            *(f"{name:<20}{size / GIB:9.2f} GiB" for name, size in sizes.items()),
            f"{self.total_tokens} tokens in {self.pages} pages of {self.page_size}, "
            f"{self.bytes_per_token} bytes each; up to {self.max_running_requests} requests of "
            f"{min(self.context_length, self.total_tokens)} tokens",
        ]


def step_cost(info: ModelInfo, config: Config, element_size: int) -> StepCost:
    """What a decoder layer keeps per token, counted generously, and the logits of sampled rows."""
    hf = info.hf.get("text_config") or info.hf
    intermediate = int(hf.get("intermediate_size") or 4 * info.hidden_size)
    attention = (info.num_heads + 2 * info.num_kv_heads) * info.head_dim
    if hf.get("kv_lora_rank"):  # queries and mixed values of all heads are in the latent space
        attention = info.num_heads * (int(hf["kv_lora_rank"]) + int(hf["qk_rope_head_dim"]))
    values = 6 * info.hidden_size + 2 * attention + 3 * intermediate
    rows = config.schedule.max_running_requests or _DEFAULT_ROWS
    logits = min(LOGITS_BYTES, rows * info.vocab_size * 4 * LOGITS_COPIES)
    # Norms and attention scores are kept in float32 beside the activations.
    return StepCost(per_token=values * (element_size + 4), logits=logits)


def plan_memory(
    hardware: Hardware,
    weight_bytes: int,
    bytes_per_token: int,
    config: Config,
    context_length: int,
    step: StepCost = StepCost(),
) -> MemoryPlan:
    """Divide the memory of `hardware`, as it was before the weights were loaded.

    `bytes_per_token` is what the KV cache keeps of a token in all layers. A resolved `config` is
    expected (`chunked_prefill_size` > 0).

    Raises:
        LoadError: it does not fit; says what is missing and which number to change.
    """
    page = config.cache.page_size
    rows = config.schedule.max_running_requests or _DEFAULT_ROWS
    chunk = config.schedule.chunked_prefill_size
    step_bytes = step.per_token * (chunk + rows) + step.logits
    reserve = max(_RESERVE_BYTES, int(hardware.memory_limit * _RESERVE_SHARE))
    room = hardware.memory_available - weight_bytes - step_bytes - reserve
    least = min(context_length, _LEAST_TOKENS) * bytes_per_token
    if room < least:
        raise LoadError(_does_not_fit(least - room, chunk, step.per_token))
    share = int(room * _CACHE_SHARE)
    if config.cache.mem_fraction_static is not None:
        room = share = _static_room(hardware, weight_bytes, least, room, config)
    tokens = _cache_tokens(room, share, bytes_per_token, config, rows, context_length)
    return MemoryPlan(
        limit=hardware.memory_limit,
        in_use=hardware.memory_limit - hardware.memory_available,
        weights=weight_bytes,
        step=step_bytes,
        reserve=reserve,
        bytes_per_token=bytes_per_token,
        total_tokens=tokens,
        max_running_requests=config.schedule.max_running_requests or min(rows, tokens // page),
        page_size=page,
        context_length=context_length,
    )


def _does_not_fit(missing: int, chunk: int, per_token: int) -> str:
    """The message when not even a small cache fits."""
    text = f"the model needs {missing / GIB:.2f} GiB more memory than is available"
    smaller = chunk - -(-missing // per_token) if per_token else 0
    if smaller >= _LEAST_CHUNK:
        return f"{text}; lower --chunked-prefill-size from {chunk} to {smaller}"
    return f"{text}; free memory, or take a smaller model or a narrower --dtype"


def _static_room(
    hardware: Hardware, weight_bytes: int, least: int, room: int, config: Config
) -> int:
    """Bytes for the cache when weights and cache together take --mem-fraction-static."""
    fraction = config.cache.mem_fraction_static
    assert fraction is not None
    static = int(hardware.memory_limit * fraction) - weight_bytes
    low = (weight_bytes + least) / hardware.memory_limit
    high = (weight_bytes + room) / hardware.memory_limit
    if not least <= static <= room:
        # Rounded inward, so that the advice itself is accepted.
        bounds = f"{math.ceil(low * 1000) / 1000:.3f} to {math.floor(high * 1000) / 1000:.3f}"
        raise LoadError(
            f"--mem-fraction-static {fraction} leaves {static / GIB:.2f} GiB for the KV cache, of "
            f"{room / GIB:.2f} GiB that are free; set it from {bounds}"
        )
    return static


def _cache_tokens(
    room: int, share: int, bytes_per_token: int, config: Config, rows: int, context_length: int
) -> int:
    """Tokens of the cache, a multiple of the page size; `room` and `share` are bytes."""
    page, wanted = config.cache.page_size, config.cache.max_total_tokens
    most = room // max(1, bytes_per_token) // page * page
    if wanted is None:
        full = -(-context_length // page) * page
        useful = min(rows * full, max(_DEFAULT_TOKENS // page * page, full))
        # Half of what is free will do, but one request of full length should fit if it can.
        unasked = max(share // max(1, bytes_per_token) // page * page, min(most, full))
        return min(useful, unasked)
    if wanted < page:
        raise LoadError(f"--max-total-tokens {wanted} is less than --page-size {page}")
    if wanted > most:
        missing = wanted * bytes_per_token - room
        raise LoadError(
            f"a KV cache of {wanted} tokens needs {missing / GIB:.2f} GiB more memory than is "
            f"available; set --max-total-tokens {most} or less"
        )
    return wanted // page * page
