"""The worker of one rank: loads the model, plans memory, runs plans on a thread of its own.

The scheduler hands over plans and goes on; one thread runs them strictly in order. A plan that
fails becomes a result with an error, and the next one runs. Knows nothing of requests.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import torch

from headrace import ops
from headrace.core.config import Config
from headrace.core.hardware import Hardware
from headrace.core.model_info import ModelInfo
from headrace.core.plan import StepPlan, StepResult
from headrace.dist.comm import SoloGroup
from headrace.layers.held import held_bytes
from headrace.loader import build_of, load_model
from headrace.runner.memory import GIB, MemoryPlan, plan_memory, step_cost
from headrace.runner.model_runner import DeviceHalf, ModelRunner
from headrace.runner.pool import bytes_per_token, kv_dtype
from headrace.runner.pooler import PooledModel, Pooler
from headrace.runner.weights import WeightService

logger = logging.getLogger(__name__)


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
    ) -> None:
        # torch's thread count and inference mode belong to a thread, so all of torch runs on one.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        try:
            build = self._thread.submit(build_runner, config, info, hardware, halves)
            self.runner, plan = build.result()
        except BaseException:
            self.close()
            raise
        self.limits = plan.limits
        self.prefix_scope = self.runner.model.prefix_scope
        built = build_of(
            info, getattr(torch, config.model.dtype), SoloGroup(), config.model.quantization
        )
        self.weights = WeightService(self.runner.model, info, built, config.load).do
        self.memory = {
            "weight": round(plan.weights / GIB, 3),
            "kvcache": round(plan.cache / GIB, 3),
            "token_capacity": plan.total_tokens,
        }

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """Queue a plan behind those launched before; returns at once."""
        return self._thread.submit(self._execute, plan)

    def close(self) -> None:
        """Wait for the plan that runs, drop those that wait, end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _execute(self, plan: StepPlan) -> StepResult:
        # Fails the requests of this step, not the server.
        try:
            return self.runner.execute(plan)
        except Exception as error:
            logger.exception("step %d failed", plan.step)
            return StepResult(chunks=[], error=f"{type(error).__name__}: {error}")


def build_runner(
    config: Config, info: ModelInfo, hardware: Hardware, halves: Sequence[DeviceHalf] = ()
) -> tuple[ModelRunner, MemoryPlan]:
    """Load the model and divide what memory is left; `config` is resolved.

    Runs on the thread that will run the model.
    """
    ops.set_threads(config.run.threads or hardware.cores)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    asked = config.model
    model = load_model(
        info,
        dtype,
        SoloGroup(),
        asked.load_format,
        quantization=asked.quantization,
        weight_cache=asked.weight_cache,
        model_impl=asked.model_impl,
        options=config.load,
    )
    stored = kv_dtype(config.cache.kv_cache_dtype, dtype)
    plan = plan_memory(
        hardware,
        held_bytes(model),
        bytes_per_token(model.state_specs(), stored),
        config,
        config.model.context_length or info.context_length,
        step_cost(info, config, dtype.itemsize),
    )
    for line in plan.lines():
        logger.info(line)
    eos = info.eos_token_ids
    pooler = Pooler(info.pooling, cast(PooledModel, model)) if info.pooling else None
    runner = ModelRunner(model, plan.limits, info.vocab_size, eos, dtype, stored, halves, pooler)
    if info.pooling and info.pooling.encoder:
        return runner, plan  # adds tensors outside of operators, which no recording sees
    if not getattr(model, "recordable", True):
        return runner, plan
    runner.record(config.schedule.chunked_prefill_size + plan.limits.max_running_requests)
    return runner, plan
