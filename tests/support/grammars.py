"""Small vocabularies for grammars, and a runner that obeys masks."""

import numpy as np

from headrace.core.plan import ChunkResult, StepPlan, StepResult, TokenMasks
from headrace.grammar.vocabulary import Vocabulary, build_vocabulary
from tests.support.oracle_runner import OracleRunner, next_token

EOS = 7
TEXTS = [*'abc{}":', "", *"[],-0123456789 \n", '{"', '":', "aa", "bc", "12", "tru", "e", "null"]
VOCAB = len(TEXTS) + 3  # the last ones have no text


def small_vocabulary(eos: tuple[int, ...] = (EOS,)) -> Vocabulary:
    """Token 7 ends, 6 and the last three never match."""
    texts = [text.encode() for text in TEXTS]
    texts = [*texts[:EOS], b"", *texts[EOS:]]
    texts += [b""] * (VOCAB - len(texts))
    return build_vocabulary(texts, {EOS: b"<eos>"}, eos)


def text_of(vocabulary: Vocabulary, tokens: list[int]) -> str:
    return b"".join(vocabulary.tokens[token] for token in tokens).decode()


def allowed(mask: bytes, size: int) -> np.ndarray:
    """Ids of the tokens that a mask allows."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return np.flatnonzero(bits[:size])


def choose(prefix: np.ndarray, seed: int, sample_index: int, mask: bytes | None) -> int:
    """The oracle's token among the allowed ones."""
    if mask is None:
        return next_token(prefix, seed, sample_index, VOCAB)
    ids = allowed(mask, VOCAB)
    assert len(ids), "a mask forbids everything"
    return int(ids[next_token(prefix, seed, sample_index, 1 << 20) % len(ids)])


class MaskedRunner(OracleRunner):
    """An oracle whose choice follows the masks of the plan."""

    def execute(self, plan: StepPlan) -> StepResult:
        self.masks: dict[tuple[int, int], bytes] = {}
        for extra in plan.extras:
            assert isinstance(extra, TokenMasks)
            width = len(extra.words) // len(extra.rows)
            places = zip(extra.rows, extra.positions, strict=True)
            for index, place in enumerate(places):
                self.masks[place] = extra.words[index * width : (index + 1) * width]
        return super().execute(plan)

    def _sample(self, chunk) -> ChunkResult:
        result = super()._sample(chunk)
        if not result.tokens:
            return result
        row, end = self.rows[chunk.row], chunk.start + chunk.count
        new = row["spec"]
        prefix = np.asarray(row["tokens"][:end], np.int32)
        mask = self.masks.get((chunk.row, end))
        token = choose(prefix, new.seed, new.sample_index, mask)
        row["tokens"][-1] = token
        return ChunkResult(tokens=[token])
