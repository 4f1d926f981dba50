"""What this machine can do at most, and how fast a product is: csrc/kernels/probe.cpp.

Times are the best of many short runs, so that a machine shared with other work still shows its
limit now and then.
"""

import time
from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p
from functools import partial
from typing import NamedTuple

import torch

from headrace.ops.cpu import library
from headrace.ops.cpu.attention import paged_attention, step_of
from headrace.ops.cpu.library import Operator, Step
from headrace.ops.cpu.matmul import linear_packed
from headrace.ops.cpu.packing import pack, reserve
from headrace.ops.cpu.record import Arena, Program, recording
from headrace.ops.meta import KV_DTYPES, AttentionMeta, KvCache
from headrace.ops.packed import FLOAT_FORMATS

_CHAINS = 24  # HR_PROBE_CHAINS
_ROUNDS = 2000
_READ_BYTES = 64 << 10  # per piece
_READ_TOTAL = 256 << 20  # more than any cache
_READ_AT_ONCE = 8 << 20
_COPIES_BYTES = 96 << 20  # weights that no cache holds
_COPIES = 31
_PAGE = 16
_STARTS = 1600  # times 128 instructions: some 20 us
_BURST = 4e8  # operations of one run of a large product, unless 1024 outputs are more


class _Args(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("sink", c_void_p),
        ("pieces", c_int64),
        ("bytes", c_int64),
        ("rounds", c_int64),
    )


class Product(NamedTuple):
    """One measured operator: `bytes_read` of weights or of keys and values, and `operations` (a
    product and a sum are two)."""

    seconds: float
    bytes_read: int
    operations: float


def best_seconds(work: Callable[[], object], budget: float) -> float:
    """The shortest run of `work` among as many as fit in `budget` seconds, at least three."""
    best, count, end = float("inf"), 0, time.perf_counter() + budget
    while count < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
        count += 1
    return best


def read_bandwidth(budget: float = 0.5) -> float:
    """Bytes per second from memory, all threads."""
    data = reserve(_READ_TOTAL).fill_(1)  # on huge pages, as weights are
    pieces = _READ_AT_ONCE // _READ_BYTES
    sink = torch.zeros(pieces)
    probe, place = Operator("probe_read", _Args), 0

    def work() -> None:
        nonlocal place
        args = _Args(data.data_ptr() + place, sink.data_ptr(), pieces, _READ_BYTES, 0)
        probe(args, Step())
        place = (place + _READ_AT_ONCE) % _READ_TOTAL

    return _READ_AT_ONCE / best_seconds(work, budget)


def start_rate() -> float:
    """Instructions that the slowest of the threads' cores starts per second.

    Half of what it can be where the core is shared with another hyperthread, whosever that is.
    """
    pieces = library.native().hr_threads()
    sink = torch.zeros(pieces)
    probe, args = Operator("probe_start", _Args), _Args(None, sink.data_ptr(), pieces, 0, _STARTS)
    probe(args, Step())  # may find threads asleep
    best = torch.zeros(pieces)
    for _ in range(3):  # any may be interrupted
        probe(args, Step())
        best = torch.maximum(best, sink)
    return float(best.min()) * 1e9


def peak_rates(budget: float = 0.3) -> dict[str, float]:
    """Operations (a product and a sum are two) per second, all threads, by type.

    Types without an instruction of their own at the level in use are missing.
    """
    pieces = 4 * library.native().hr_threads()
    sink = torch.zeros(max(4, pieces))
    args = _Args(None, sink.data_ptr(), pieces, 0, _ROUNDS)
    Operator("probe_width", _Args)(args, Step())
    operators = {"fp32": "fma", "bf16": "bf16", "int8": "int8", "int4": "int4"}
    widths = dict(zip(operators, sink[:4].tolist(), strict=True))
    rates: dict[str, float] = {}
    for name, kind in operators.items():
        if widths[name]:
            operator = f"probe_{kind}"
            seconds = best_seconds(partial(Operator(operator, _Args), args, Step()), budget)
            rates[name] = 2 * widths[name] * _CHAINS * _ROUNDS * pieces / seconds
    return rates


def time_linear(out_size: int, in_size: int, format: str, rows: int, budget: float) -> Product:
    """fp32 x [rows, in] times a weight that lies in memory, not in a cache.

    `format` is one of `ops.packed.FORMATS`, for int4 also "int4-32" with the inputs per scale.
    A product of many rows takes fewer outputs than asked for: the rates do not depend on them.
    """
    most = max(1024, int(_BURST / (2 * rows * in_size)) // 32 * 32)
    name, _, group = format.partition("-")
    dtype = FLOAT_FORMATS.get(name, torch.bfloat16)
    weight = torch.randn(min(out_size, most), in_size).to(dtype)
    again = partial(pack, weight, name, int(group or 0))
    first = again()
    copies = [first, *(again() for _ in range(min(_COPIES, _COPIES_BYTES // first.nbytes)))]
    x = torch.randn(rows, in_size)
    turn = 0

    def work() -> None:
        nonlocal turn
        linear_packed(x, copies[turn % len(copies)], None)
        turn += 1

    return Product(best_seconds(work, budget), first.nbytes, 2.0 * rows * weight.numel())


class Load(NamedTuple):
    """Work for attention: `rows` sequences of `context` tokens, of which the last `queries` ask."""

    rows: int
    queries: int
    context: int


def time_attention(heads: tuple[int, int, int], load: Load, format: str, budget: float) -> Product:
    """`heads`: query heads, KV heads, elements of a head. Decoded caches lie in memory.

    Replayed as a runner does, without the cost of a Python call.
    """
    count, kv_heads, dim = heads
    dtype = KV_DTYPES[format]
    pages = -(-load.context // _PAGE)
    shape = (load.rows * pages, _PAGE, kv_heads, dim)
    first = _cache(shape, dtype)
    size = sum(tensor.nbytes for tensor in first.tensors())
    copies = min(_COPIES, _COPIES_BYTES // size) if load.queries == 1 else 0
    meta = AttentionMeta(
        page_table=torch.randperm(load.rows * pages).view(load.rows, pages).int(),
        rows=torch.arange(load.rows, dtype=torch.int32),
        query_start=(torch.arange(load.rows + 1) * load.queries).int(),
        context=torch.full((load.rows,), load.context, dtype=torch.int32),
        slots=torch.zeros(load.rows * load.queries, dtype=torch.int64),
        page_size=_PAGE,
    )
    q = torch.randn(load.rows * load.queries, count, dim)
    caches = [first, *(_cache(shape, dtype) for _ in range(copies))]
    arena, programs, turn = Arena(2 * q.nbytes), list[Program](), 0
    for cache in caches:
        with recording(arena) as program:
            paged_attention(q, cache, meta, scale=dim**-0.5, window=0, soft_cap=0.0, sinks=None)
        programs.append(program)
    step = step_of(meta, len(q))

    def work() -> None:
        nonlocal turn
        programs[turn % len(programs)].replay(step)
        turn += 1

    seen = load.queries * load.context - load.queries * (load.queries - 1) // 2
    operations = 4.0 * load.rows * seen * count * dim
    return Product(best_seconds(work, budget), size, operations)


def _cache(shape: tuple[int, ...], dtype: torch.dtype) -> KvCache:
    if dtype == torch.int8:
        numbers = [torch.full(shape, 5, dtype=dtype) for _ in range(2)]
        return KvCache(*numbers, *(torch.full(shape[:3], 0.01) for _ in range(2)))
    return KvCache(*(torch.full(shape, 0.05).to(dtype) for _ in range(2)))
