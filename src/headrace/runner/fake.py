"""A worker without a model: it answers every plan at once with made-up tokens.

For measuring everything but the forward pass. Same interface as `TpModelWorker`, no torch. The
token at a position depends on the row's seed, its sample index and the position alone, and never
ends a sequence.
"""

from concurrent.futures import Future
from typing import Any

from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.core.hardware import Hardware
from headrace.core.model_info import ModelInfo
from headrace.core.plan import Chunk, ChunkResult, NewRow, ScoredToken, StepPlan, StepResult
from headrace.runner.memory import plan_memory

_MASK = (1 << 64) - 1
# What a token of a small model costs, so that a fake server gets the limits of a real one.
_BYTES_PER_TOKEN = 1024
_LOGPROB = -1.0


class FakeWorker:
    """Executes plans by making tokens up."""

    def __init__(self, config: Config, info: ModelInfo, hardware: Hardware) -> None:
        context_length = config.model.context_length or info.context_length
        plan = plan_memory(hardware, 0, _BYTES_PER_TOKEN, config, context_length)
        self.limits = plan.limits
        self.memory: dict[str, float] = {"token_capacity": plan.total_tokens}
        self._vocab_size = info.vocab_size
        self._eos = frozenset(info.eos_token_ids)
        self._rows: dict[int, NewRow] = {}
        labels = info.pooling.labels if info.pooling else ()
        self._pooled = bytes(4 * (len(labels) or info.embedding_size))

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """A future that is already done."""
        for row in plan.freed_rows:
            self._rows.pop(row, None)
        for spec in plan.new_rows:
            self._rows[spec.row] = spec
        future: Future[StepResult] = Future()
        future.set_result(StepResult(chunks=[self._answer(chunk) for chunk in plan.chunks]))
        return future

    def weights(self, action: str, details: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """There are none."""
        raise BadRequest("--runner fake has no weights")

    def prefix_scope(self, prompt_len: int) -> str:
        """All prompts may share prefixes."""
        return ""

    def close(self) -> None:
        """Nothing to end."""

    def token(self, spec: NewRow, position: int) -> int:
        """The made-up token of a sequence at a position (SplitMix64 of Steele et al., 2014)."""
        value = spec.seed + spec.sample_index * 0xD1B54A32D192ED03 + position * 0x9E3779B97F4A7C15
        value = (value & _MASK ^ (value & _MASK) >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
        token = (value ^ value >> 31) % self._vocab_size
        forbidden = self._eos.union(spec.sampling.stop_token_ids)
        while token in forbidden and len(forbidden) < self._vocab_size:
            token = (token + 1) % self._vocab_size
        return token

    def _answer(self, chunk: Chunk) -> ChunkResult:
        spec = self._rows[chunk.row]
        if spec.pool is not None:
            ended = chunk.start + chunk.count == spec.prompt_len
            return ChunkResult(pooled=self._pooled if ended else b"")
        tokens = self._accept(chunk, spec) if chunk.samples else []
        if spec.logprobs is None:
            return ChunkResult(tokens)
        return ChunkResult(
            tokens=tokens,
            scores=[self._score(spec, token) for token in tokens],
            prompt_scores=self._prompt_scores(chunk, spec),
        )

    def _accept(self, chunk: Chunk, spec: NewRow) -> list[int]:
        """The next token, and one more for every draft that guessed right."""
        position = chunk.start + chunk.count
        tokens = [self.token(spec, position)]
        for draft in chunk.draft:
            if draft != tokens[-1]:
                break
            position += 1
            tokens.append(self.token(spec, position))
        return tokens

    def _prompt_scores(self, chunk: Chunk, spec: NewRow) -> list[ScoredToken]:
        if chunk.logprob_start < 0:
            return []
        first = max(chunk.start, chunk.logprob_start)
        stop = min(chunk.start + chunk.count, spec.prompt_len - 1)
        known = memoryview(spec.tokens).cast("i")
        return [self._score(spec, known[position + 1]) for position in range(first, stop)]

    def _score(self, spec: NewRow, token: int) -> ScoredToken:
        assert spec.logprobs is not None
        top = [(token + offset) % self._vocab_size for offset in range(spec.logprobs.top)]
        return ScoredToken(
            logprob=_LOGPROB,
            top=[(other, _LOGPROB - rank) for rank, other in enumerate(top)],
            ids=[(other, _LOGPROB) for other in spec.logprobs.ids],
        )
