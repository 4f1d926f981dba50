"""The worker of one rank: loads the model, plans memory, runs plans on a thread of its own.

The scheduler hands over plans and goes on; one thread runs them strictly in order. A plan that
fails becomes a result with an error, and the next one runs; in a team it is an exception, as ranks
no longer agree on what they exchange. Knows nothing of requests.
"""

import logging
import secrets
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, cast

import msgspec
import torch

from headrace import ops
from headrace.core.blame import exhausted
from headrace.core.config import Config, Limits
from headrace.core.hardware import Hardware
from headrace.core.model_info import ModelInfo
from headrace.core.plan import StepPlan, StepResult
from headrace.core.team import Loaded
from headrace.dist.topology import Shard
from headrace.layers.held import held_bytes
from headrace.loader import build_of, load_built
from headrace.loader.kv_scales import prepare_kv_scales
from headrace.runner.memory import GIB, MemoryPlan, StepCost, plan_memory, step_cost
from headrace.runner.model_runner import DeviceHalf, ModelRunner
from headrace.runner.pool import bytes_per_token, kv_dtype
from headrace.runner.pooler import PooledModel, Pooler
from headrace.runner.seat import ALONE, Seat, grid_of
from headrace.runner.weights import WeightService

logger = logging.getLogger(__name__)

Learned = Sequence[tuple[int, int, int]]
"""(row, position, token)"""


class TpModelWorker:
    """Builds a `ModelRunner` and launches plans on it.

    `limits` is what the scheduler obeys; `memory` is for /server_info, in GiB and tokens.

    Raises:
        LoadError: the checkpoint cannot be loaded, or does not fit into memory.
    """

    def __init__(
        self,
        config: Config,
        info: ModelInfo,
        hardware: Hardware,
        halves: Sequence[DeviceHalf] = (),
        seat: Seat = ALONE,
    ) -> None:
        # torch's thread count and inference mode belong to a thread, so all of torch runs on one.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._alone = seat.grid.size == 1
        try:
            build = self._thread.submit(_start, config, info, hardware, halves, seat)
            self.runner, plan, part = build.result()
        except BaseException:
            self.close()
            raise
        self.limits = plan.limits
        self.prefix_scope = self.runner.model.prefix_scope
        self.weights = part.weights.do
        self.memory = {
            "weight": round(plan.weights / GIB, 3),
            "kvcache": round(plan.cache / GIB, 3),
            "token_capacity": plan.total_tokens,
        }

    def launch(self, plan: StepPlan, learned: Learned = ()) -> "Future[StepResult]":
        """Queue a plan behind those launched before; returns at once."""
        return self._thread.submit(self._execute, plan, learned)

    def close(self) -> None:
        """Wait for the plan that runs, drop those that wait, end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _execute(self, plan: StepPlan, learned: Learned) -> StepResult:
        # Fails this step, not the server. Clients are told an id, not what is in the log.
        try:
            self.runner.learn(learned)
            return self.runner.execute(plan)
        except Exception as error:
            incident = secrets.token_hex(4)
            logger.exception("step %d failed, incident %s", plan.step, incident)
            if not self._alone or exhausted(error):
                raise
            return StepResult(chunks=[], error=f"Computing it failed; incident {incident}.")


def build_runner(
    config: Config,
    info: ModelInfo,
    hardware: Hardware,
    halves: Sequence[DeviceHalf] = (),
    seat: Seat = ALONE,
) -> tuple[ModelRunner, MemoryPlan]:
    """Load the model and divide what memory is left; `config` is resolved.

    Runs on the thread that will run the model.
    """
    runner, plan, _ = _start(config, info, hardware, halves, seat)
    return runner, plan


class Part(NamedTuple):
    """A rank's loaded model, the dtype of its cache, what it needs, what its weights can do."""

    model: Any
    kv_dtype: torch.dtype
    needs: Loaded
    seat: Seat
    weights: WeightService


def _start(
    config: Config, info: ModelInfo, hardware: Hardware, halves: Sequence[DeviceHalf], seat: Seat
) -> tuple[ModelRunner, MemoryPlan, Part]:
    part = load_part(config, info, hardware, seat)
    plan = memory_plan(config, info, hardware, seat.meet(part.needs))
    for line in plan.lines():
        logger.info(line)
    seat.begin(plan.limits)
    return make_runner(config, info, part, plan.limits, halves), plan, part


def load_part(config: Config, info: ModelInfo, hardware: Hardware, seat: Seat) -> Part:
    """This rank's weights."""
    seat.take_cores()
    ops.set_threads(config.run.threads or hardware.cores)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    asked = config.model
    build = build_of(info, dtype, seat.group, asked.quantization, seat.split, asked.load_format)
    model = load_built(
        info,
        build,
        asked.load_format,
        weight_cache=asked.weight_cache,
        model_impl=asked.model_impl,
        options=config.load,
    )
    stored = kv_dtype(config.cache.kv_cache_dtype, dtype)
    if stored == torch.float8_e4m3fn:
        shard = Shard(seat.group.rank, seat.group.size)
        prepare_kv_scales(model, info, config.cache.quantization_param_path, shard)
    per_token = bytes_per_token(model.state_specs(), stored)
    needs = Loaded(seat.place.rank, held_bytes(model), per_token, hardware.memory_available)
    return Part(model, stored, needs, seat, WeightService(model, info, build, config.load))


def memory_plan(
    config: Config, info: ModelInfo, hardware: Hardware, needs: Sequence[Loaded]
) -> MemoryPlan:
    """How all ranks of a machine together divide its memory, as it was before they loaded.

    Of several machines the one with the least room decides.
    """
    grid, machines = grid_of(config.parallel), defaultdict(list)
    for need in needs:
        machines[grid.place(need.rank).node if grid.nodes > 1 else 0].append(need)
    plans = [_machine_plan(config, info, hardware, here) for here in machines.values()]
    return min(plans, key=lambda plan: plan.total_tokens)


def _machine_plan(
    config: Config, info: ModelInfo, hardware: Hardware, needs: Sequence[Loaded]
) -> MemoryPlan:
    free = max(need.available for need in needs)
    step = step_cost(info, config, getattr(torch, config.model.dtype).itemsize)
    plan = plan_memory(
        msgspec.structs.replace(hardware, memory_available=free),
        sum(need.weights for need in needs),
        sum(need.per_token for need in needs),
        config,
        config.model.context_length or info.context_length,
        StepCost(step.per_token * len(needs), step.logits * len(needs)),
    )
    return replace(plan, stages=config.parallel.pp_size)


def make_runner(
    config: Config, info: ModelInfo, part: Part, limits: Limits, halves: Sequence[DeviceHalf]
) -> ModelRunner:
    """The runner of a loaded model, recorded if it can be."""
    model, eos = part.model, info.eos_token_ids
    runner = ModelRunner(
        model,
        limits,
        info.vocab_size,
        eos,
        getattr(torch, config.model.dtype),
        part.kv_dtype,
        halves,
        Pooler(info.pooling, cast(PooledModel, model)) if info.pooling else None,
    )
    runner.samples = part.seat.split.stage.last
    if info.pooling and info.pooling.encoder:
        return runner  # adds tensors outside of operators, which no recording sees
    if getattr(model, "recordable", True) and part.seat.group.recordable:
        runner.record(config.schedule.chunked_prefill_size + limits.max_running_requests)
    return runner
