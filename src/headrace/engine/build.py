"""The composition root of a scheduler process: one frozen configuration in, one scheduler out.

The only file that names features. The runner is the real worker or the fake one; torch is imported
for the real one only.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from headrace.cache.pages import PagePool
from headrace.cache.prefix import ChunkCache, PrefixCache
from headrace.cache.radix import RadixCache
from headrace.core.config import Config, Limits
from headrace.core.hardware import detect
from headrace.core.messages import GenerateRequest, unpack_ids
from headrace.core.model_info import ModelInfo
from headrace.engine.parts import grammar_backend, load_tokenizer_of, processors
from headrace.grammar.gate import GrammarGate, NoGrammars
from headrace.processors.gate import ProcessorGate
from headrace.runner.fake import FakeWorker
from headrace.scheduler.commit import OutputRules
from headrace.scheduler.feature import Feature, Runner
from headrace.scheduler.journal import Header, JournalFile, RecordedScheduler, Recorder
from headrace.scheduler.request import StopMatcher
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.space import Space
from headrace.text import stop
from headrace.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.runner.model_runner import DeviceHalf
    from headrace.runner.team import Follower, Team
    from headrace.runner.worker import TpModelWorker

# Prompt tokens that decide how the first new token is written.
_TAIL = 8


class Built(NamedTuple):
    """A scheduler with its runner; `memory` in GiB and tokens, for people."""

    scheduler: Scheduler | RecordedScheduler
    limits: Limits
    memory: dict[str, float]


def build_scheduler(
    config: Config, info: ModelInfo, progress: Callable[[str], None], folder: str = ""
) -> Built:
    """Load the model and put a scheduler on top of it. `config` is resolved.

    `folder`: where the sockets of follower ranks are, if there are any.

    Raises:
        LoadError: the checkpoint cannot be loaded, or does not fit into memory.
    """
    progress("weights and KV cache")
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(load_tokenizer_of, config)
        worker = _worker(config, info, folder)
        tokenizer = reading.result()
    progress("scheduler")
    parts = Parts(
        runner=worker,
        scope=worker.prefix_scope,
        stops=stop_factory(tokenizer),
        features=[ProcessorGate(), build_grammar(config, info, tokenizer)],
    )
    compose = _recorded if config.observe.record_schedule else _scheduler
    return Built(compose(config, info, worker.limits, parts), worker.limits, dict(worker.memory))


class Parts(NamedTuple):
    """What stands around a scheduler."""

    runner: Runner
    scope: Callable[[int], str]
    stops: Callable[[GenerateRequest], StopMatcher | None]
    features: list[Feature]
    clock: Callable[[], float] = time.monotonic


def _scheduler(config: Config, info: ModelInfo, limits: Limits, parts: Parts) -> Scheduler:
    return Scheduler(
        config.schedule,
        limits,
        _space(config, limits, parts.scope),
        parts.runner,
        output=OutputRules(
            eos_token_ids=info.eos_token_ids,
            stops=parts.stops,
            stream_interval=config.serve.stream_interval,
            decode_log_interval=config.observe.decode_log_interval,
            log_cache_divergence=config.observe.log_cache_divergence,
        ),
        features=parts.features,
        clock=parts.clock,
    )


def _recorded(config: Config, info: ModelInfo, limits: Limits, parts: Parts) -> RecordedScheduler:
    """A scheduler that writes down what it hears and decides, for `headrace replay`."""
    observe = config.observe
    recorder = Recorder(JournalFile(observe.record_schedule, observe.record_limit_mb << 20))
    recorder.begin(
        Header(
            schedule=dataclasses.asdict(config.schedule),
            cache=dataclasses.asdict(config.cache),
            limits=limits,
            eos_token_ids=list(info.eos_token_ids),
            stream_interval=config.serve.stream_interval,
            features=len(parts.features),
        )
    )
    heard = Parts(
        runner=recorder.runner(parts.runner),
        scope=recorder.scope(parts.scope),
        stops=recorder.stops(parts.stops),
        features=[recorder.feature(feature) for feature in parts.features],
        clock=recorder.clock,
    )
    return RecordedScheduler(_scheduler(config, info, limits, heard), recorder, parts.clock)


def build_grammar(config: Config, info: ModelInfo, tokenizer: Tokenizer | None) -> Feature:
    """Structured output; nothing large is read or imported before the first grammar comes."""
    backend = grammar_backend(config)
    if tokenizer is None or backend is None:
        return NoGrammars("this server enforces no grammars")
    from headrace.grammar.compiler import Compiler
    from headrace.grammar.source import special_tokens
    from headrace.grammar.vocabulary import read_vocabulary

    compiler = Compiler(
        lambda: read_vocabulary(tokenizer, info.vocab_size, info.eos_token_ids),
        special_tokens(tokenizer),
        backend,
    )
    return GrammarGate(compiler)


def stop_factory(tokenizer: Tokenizer | None) -> Callable[[GenerateRequest], StopMatcher | None]:
    """What makes the matcher of a request's stop strings; None for requests without any."""

    def stops(spec: GenerateRequest) -> StopMatcher | None:
        sampling = spec.sampling
        if tokenizer is None or not (sampling.stop or sampling.stop_regex):
            return None
        return stop.StopMatcher(
            tokenizer,
            unpack_ids(spec.ids)[-_TAIL:].tolist(),
            sampling.stop,
            sampling.stop_regex,
            skip_special_tokens=sampling.skip_special_tokens,
        )

    return stops


def build_follower(config: Config, info: ModelInfo, folder: str, rank: int) -> "Follower":
    """What another rank than 0 runs.

    Raises:
        LoadError: it cannot load its part of the model.
    """
    from headrace.runner.team import Follower

    return Follower(config, info, detect(), folder, rank, halves=_halves(config, info))


def _halves(config: Config, info: ModelInfo) -> "Sequence[DeviceHalf]":
    """What features do on the device."""
    from headrace.grammar.masks import MaskedLogits
    from headrace.processors.rows import ProcessedLogits

    registry = processors(config, info, lambda: load_tokenizer_of(config))
    return ProcessedLogits(registry), MaskedLogits()


def _worker(config: Config, info: ModelInfo, folder: str) -> "FakeWorker | TpModelWorker | Team":
    hardware = detect()
    if config.run.runner == "fake":
        return FakeWorker(config, info, hardware)
    from headrace.runner.seat import seat_alone
    from headrace.runner.worker import TpModelWorker

    if config.parallel.ranks > 1:
        from headrace.runner.team import Team

        return Team(config, info, hardware, folder, _halves(config, info))
    return TpModelWorker(config, info, hardware, _halves(config, info), seat_alone(config))


def _space(config: Config, limits: Limits, scope: Callable[[int], str]) -> Space:
    pool = PagePool(limits.max_total_tokens // limits.page_size, limits.page_size)
    cache: PrefixCache
    if config.cache.disable_radix_cache:
        cache = ChunkCache()
    else:
        cache = RadixCache(limits.page_size, config.cache.radix_eviction_policy)
    return Space(pool, cache, scope)
