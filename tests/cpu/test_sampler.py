"""The sampler against transformers' logits processors, plain numpy, and itself in other batches."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headrace import ops
from headrace.core.messages import LogprobSpec, SamplingParams, pack_ids
from headrace.core.noise import uniform
from headrace.core.plan import NewRow, StepPlan
from headrace.ops.ref_sampling import Filters, draw_any, draw_filtered, largest, survivors
from headrace.runner.logits import score_prompt, score_samples, slices
from headrace.runner.sampler import Sampler
from headrace.runner.tables import RowTables
from tests.support.native import native_level, native_levels, operators

EOS = (2, 9)


@pytest.fixture(autouse=True)
def fixed_torch():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=["ref", *native_levels()])
def served_by(request, monkeypatch):
    """Who serves the operators: the definition, or the native library at one level."""
    serve_with(monkeypatch, request.param)
    with native_level(request.param):
        yield request.param


def serve_with(monkeypatch, implementation: str) -> None:
    served = operators("ref" if implementation == "ref" else "cpu")
    monkeypatch.setattr(ops, "_sample", served.sample)
    monkeypatch.setattr(ops, "_log_probs", served.log_probs)


def spec(row: int, sampling: SamplingParams, tokens=(1, 2, 3), prompt_len=3, **fields) -> NewRow:
    given = {"seed": row, **fields}
    return NewRow(
        row=row, tokens=pack_ids(list(tokens)), prompt_len=prompt_len, sampling=sampling, **given
    )


def tables_of(specs: list[NewRow], vocab: int) -> RowTables:
    tables = RowTables(rows=len(specs), max_len=512, page_size=16, vocab_size=vocab)
    tables.apply(StepPlan(1, [], new_rows=specs))
    return tables


def columns(count: int, top_k: int, top_p: float, min_p: float) -> Filters:
    return Filters(
        np.full(count, top_k), np.full(count, top_p), np.full(count, min_p, dtype=np.float32)
    )


# -- filters ----------------------------------------------------------------------------------


FILTERS = [
    (vocab, spread, top_k, top_p, min_p)
    for vocab in (7, 50, 1000, 5003)
    for spread in (0.3, 3.0, 9.0)
    for top_k, top_p, min_p in [
        (1, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.999, 0.0),
        (0, 0.01, 0.0),
        (0, 1.0, 0.1),
        (40, 0.9, 0.0),
        (40, 0.9, 0.05),
        (3000, 0.5, 0.0),
    ]
]


@pytest.mark.parametrize(("vocab", "spread", "top_k", "top_p", "min_p"), FILTERS)
def test_filters_keep_what_transformers_keeps(vocab, spread, top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, vocab, generator=generator) * spread
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(min(top_k, vocab))(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    filters = columns(4, min(top_k, vocab) or vocab, top_p, min_p)
    ids, weights = survivors(logits.softmax(-1).numpy(), filters)
    for row in range(4):
        kept = {int(i): float(w) for i, w in zip(ids[row], weights[row], strict=True) if w > 0}
        assert set(kept) == set(np.flatnonzero(torch.isfinite(expected[row])).tolist())
        probs = expected[row].softmax(-1)
        total = sum(kept.values())
        assert all(abs(w / total - float(probs[i])) < 1e-5 for i, w in kept.items())


def test_ties_with_the_last_kept_token_are_kept():
    probs = np.array([[0.3, 0.1, 0.3, 0.1, 0.1, 0.1]], dtype=np.float32)
    ids, weights = survivors(probs, columns(1, 3, 1.0, 0.0))
    assert ids[0][weights[0] > 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_masked_tokens_never_survive():
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [3, 200]] = torch.tensor([1.0, 2.0])
    probs = logits.softmax(-1).numpy()
    for filters in (columns(1, 100, 1.0, 0.0), columns(1, 300, 0.999999, 0.0)):
        ids, weights = survivors(probs, filters)
        assert ids[0][weights[0] > 0].tolist() == [3, 200]


# -- edits ------------------------------------------------------------------------------------


def edited(logits: torch.Tensor, tokens, prompt_len: int, **fields) -> np.ndarray:
    """What sampling leaves of the logits."""
    params = SamplingParams(temperature=0.0, **fields)
    tables = tables_of([spec(0, params, tokens, prompt_len)], len(logits))
    values = logits.clone()[None]
    Sampler(tables, EOS).sample(values, np.array([0]), np.array([len(tokens)]))
    return values[0].numpy()


def test_repetition_penalty_is_that_of_transformers(served_by):
    logits = torch.randn(60) * 4
    tokens = [3, 5, 5, 8, 21, 8]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits[None].clone())
    found = edited(logits, tokens, 3, repetition_penalty=1.3)
    assert np.array_equal(found, expected[0].numpy())


def test_logit_bias_is_that_of_transformers(served_by):
    logits = torch.randn(60) * 4
    bias = {7: 2.5, 11: -100.0}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = processor(torch.tensor([[1, 2]]), logits[None].clone())
    assert np.array_equal(edited(logits, [1, 2], 2, logit_bias=bias), expected[0].numpy())


def test_min_new_tokens_is_that_of_transformers(served_by):
    logits = torch.randn(60)
    processor = MinNewTokensLengthLogitsProcessor(3, 4, [*EOS, 30], device="cpu")
    for output in range(7):
        tokens = [4] * (3 + output)
        expected = processor(torch.tensor([tokens]), logits[None].clone())[0]
        found = edited(logits, tokens, 3, min_new_tokens=4, stop_token_ids=(30, 999))
        assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.1), (-0.5, 2.0)])
def test_frequency_and_presence_count_the_output_only(served_by, frequency, presence):
    logits = torch.randn(60)
    tokens = [5, 5, 6, 7, 7, 7, 8, 5]
    expected = logits.double().numpy()
    for token, count in Counter(tokens[3:]).items():
        expected[token] -= frequency * count + presence
    found = edited(logits, tokens, 3, frequency_penalty=frequency, presence_penalty=presence)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_edits_come_in_order(served_by):
    logits = torch.zeros(60)
    found = edited(
        logits, [5, 6, 6], 1, presence_penalty=1.0, repetition_penalty=2.0, logit_bias={6: 0.5}
    )
    assert found[6] == -1.0 * 2.0 + 0.5  # penalties, then repetition, then bias


# -- whole rows -------------------------------------------------------------------------------


def random_sampling(random: np.random.Generator) -> SamplingParams:
    pick = random.choice
    return SamplingParams(
        temperature=float(pick([0.0, 0.3, 1.0, 1.7])),
        top_k=int(pick([-1, 1, 5, 500])),
        top_p=float(pick([1.0, 0.9, 0.3])),
        min_p=float(pick([0.0, 0.0, 0.2])),
        frequency_penalty=float(pick([0.0, 0.5])),
        presence_penalty=float(pick([0.0, 0.5])),
        repetition_penalty=float(pick([1.0, 1.2])),
        min_new_tokens=int(pick([0, 100])),
        logit_bias={4: 1.5} if pick([True, False]) else {},
    )


@pytest.mark.parametrize("vocab", [300, 4001])
def test_a_row_does_not_see_its_batch(served_by, vocab):
    random = np.random.default_rng(vocab)
    count = 40
    specs = [
        spec(
            row,
            random_sampling(random),
            tokens=random.integers(0, vocab, 30).tolist(),
            prompt_len=10,
            logprobs=LogprobSpec(top=3, ids=(1, 5)),
        )
        for row in range(count)
    ]
    tables = tables_of(specs, vocab)
    sampler = Sampler(tables, EOS)
    rows, positions = np.arange(count), random.integers(11, 30, count)
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(1)) * 4
    logits[7] = torch.nan

    def run(chosen: np.ndarray):
        values = logits[torch.from_numpy(chosen)].clone()
        tokens, valid = sampler.sample(values, rows[chosen], positions[chosen])
        scores = score_samples(values, tokens, rows[chosen], tables)
        outcomes = zip(tokens.tolist(), valid.tolist(), scores, strict=True)
        return dict(zip(chosen.tolist(), outcomes, strict=True))

    together = run(rows)
    assert [row for row, (_, valid, _) in together.items() if not valid] == [7]
    del together[7]
    for row in together:
        assert run(np.array([row]))[row] == together[row]
    shuffled = random.permutation(rows)
    for part in (shuffled[:13], shuffled[13:]):
        for row, outcome in run(part).items():
            assert row == 7 or outcome == together[row]


def test_the_draw_ignores_the_number_of_threads(served_by):
    logits = torch.randn(6, 50001) * 3
    specs = [spec(row, SamplingParams(top_p=1.0 - 0.1 * (row % 2))) for row in range(6)]
    tables = tables_of(specs, 50001)
    rows, positions = np.arange(6), np.full(6, 20)
    found = []
    for threads in (1, 2):
        ops.set_threads(threads)
        found.append(Sampler(tables, EOS).sample(logits.clone(), rows, positions)[0].tolist())
    assert found[0] == found[1]


def test_greedy_takes_the_lowest_of_equal_ids(served_by):
    tables = tables_of(
        [spec(0, SamplingParams(temperature=0.0)), spec(1, SamplingParams(top_k=1))], 9
    )
    logits = torch.tensor([0.0, 1, 5, 5, 2, 5, 0, 0, 0]).repeat(2, 1)
    tokens, valid = Sampler(tables, EOS).sample(logits, np.arange(2), np.array([3, 3]))
    assert tokens.tolist() == [2, 2]
    assert valid.all()


def test_only_the_bad_row_fails(served_by):
    cases = [{}, {"temperature": 0.0}, {"logit_bias": dict.fromkeys(range(8), -np.inf)}, {}, {}]
    specs = [spec(row, SamplingParams(**fields)) for row, fields in enumerate(cases)]
    logits = torch.zeros(5, 8)
    logits[0, 3] = torch.nan
    logits[1, 7] = torch.nan
    logits[3, 2] = torch.inf
    tokens, valid = Sampler(tables_of(specs, 8), EOS).sample(logits, np.arange(5), np.full(5, 4))
    assert valid.tolist() == [False, False, False, False, True]
    assert 0 <= tokens[4] < 8


def test_sample_index_and_position_change_the_draw(served_by):
    specs = [spec(row, SamplingParams(), seed=5, sample_index=row) for row in range(2)]
    sampler = Sampler(tables_of(specs, 1000), EOS)
    logits = torch.zeros(1, 1000)
    draws = {
        (row, position): int(sampler.sample(logits, np.array([row]), np.array([position]))[0][0])
        for row in range(2)
        for position in range(20)
    }
    assert len(set(draws.values())) > 35


# -- distribution -----------------------------------------------------------------------------


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """Standard score of the chi-square statistic (Wilson-Hilferty)."""
    expected = probs * counts.sum()
    big = expected >= 5
    counts = np.append(counts[big], counts[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("vocab", [40, 700])
def test_draws_follow_the_distribution(served_by, vocab, fields):
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    tables = tables_of([spec(0, SamplingParams(**fields), seed=11)], vocab)
    sampler = Sampler(tables, EOS)
    draws = 10000
    block = 500
    found = np.zeros(vocab)
    for first in range(0, draws, block):
        positions = np.arange(first, first + block)
        batch = logits.expand(block, -1).contiguous()
        tokens, _ = sampler.sample(batch, np.zeros(block, int), positions)
        found += np.bincount(tokens, minlength=vocab)
    expected = TemperatureLogitsWarper(fields.get("temperature", 1.0))(None, logits)
    if "top_k" in fields:
        expected = TopKLogitsWarper(fields["top_k"])(None, expected)
    if "top_p" in fields:
        expected = TopPLogitsWarper(fields["top_p"])(None, expected)
    if "min_p" in fields:
        expected = MinPLogitsWarper(fields["min_p"])(None, expected)
    probs = expected.softmax(-1)[0].double().numpy()
    assert found[probs == 0].sum() == 0
    assert abs(chi_square(found, probs)) < 3.5


ASKED = [
    {},
    {"top_k": 1, "temperature": 1e-5},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    {"top_k": 900},
    {"top_k": 3000, "top_p": 0.8, "min_p": 1e-4},
    {"top_p": 0.5},
    {"temperature": 2.0, "top_p": 0.999},
    {"top_p": 0.99999, "min_p": 0.001},
    {"min_p": 0.1},
    {"temperature": 0.05, "min_p": 1e-30},
]


def kept_of(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Float64 probabilities [vocab] after transformers' filters."""
    values = logits.double()[None] / params.temperature
    if 0 < params.top_k < len(logits):
        values = TopKLogitsWarper(params.top_k)(None, values)
    if params.top_p < 1:
        values = TopPLogitsWarper(params.top_p)(None, values)
    if params.min_p:
        values = MinPLogitsWarper(params.min_p)(None, values)
    return values[0].softmax(-1)


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("vocab", [50, 4096, 50001])
def test_a_draw_is_where_the_noise_falls_among_the_tokens_kept(served_by, vocab, spread):
    params = [SamplingParams(**fields) for fields in ASKED]
    specs = [spec(row, sampling, seed=100 + row) for row, sampling in enumerate(params)]
    count = len(specs)
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    rows, positions = np.arange(count), np.full(count, 9)
    tokens, valid = Sampler(tables_of(specs, vocab), EOS).sample(logits.clone(), rows, positions)
    assert valid.all()
    noise = uniform(np.arange(100, 100 + count, dtype=np.uint64), np.zeros(count, int), positions)
    for row, token in enumerate(tokens.tolist()):
        if params[row].greedy:
            assert token == int(logits[row].argmax())
            continue
        probs = kept_of(logits[row], params[row])
        assert probs[token] > 0
        end = float(probs[: token + 1].sum())
        assert end - float(probs[token]) - 1e-5 <= noise[row] <= end + 1e-5


def test_masks_leave_allowed_tokens_only(served_by):
    vocab, count = 1001, 24
    generator = np.random.default_rng(5)
    allowed = generator.random((count, vocab)) < 0.02
    allowed[:, 700] |= ~allowed.any(axis=1)
    allowed[1], allowed[2] = True, False
    packed = np.packbits(np.pad(allowed, ((0, 0), (0, 23))), axis=-1, bitorder="little")
    masks = torch.from_numpy(packed.view(np.int32).copy())
    fields = [{}, {"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 50, "logit_bias": {3: 100.0}}]
    specs = [spec(row, SamplingParams(**fields[row % 4])) for row in range(count)]
    sampler = Sampler(tables_of(specs, vocab), EOS)
    logits = torch.randn(count, vocab)
    edited = logits.clone()
    ops.mask_logits(edited, torch.arange(count), masks)
    tokens, valid = sampler.sample(edited, np.arange(count), np.full(count, 3))
    assert np.array_equal(np.isfinite(edited.numpy()), allowed)
    assert np.flatnonzero(~valid).tolist() == [2]
    assert all(allowed[row, tokens[row]] for row in range(count) if row != 2)
    plain, _ = sampler.sample(logits[1:2], np.array([1]), np.array([3]))
    assert plain[0] == tokens[1]


def test_draws_at_the_ends_of_the_unit_interval_have_weight():
    random = np.random.default_rng(2)
    for vocab in (3, 256, 257, 1000):
        logits = torch.randn(1, vocab) * 3
        logits[0, torch.from_numpy(random.random(vocab) < 0.4)] = -torch.inf
        logits[0, vocab // 2] = 1.0
        probs = logits.softmax(-1).numpy()
        alive = np.flatnonzero(probs[0])
        for noise, expected in ((0.0, alive[0]), (1 - 2.0**-52, alive[-1])):
            assert draw_any(probs, np.array([noise])) == expected
            loose = columns(1, vocab, 1.0, 1e-30)
            assert draw_filtered(probs, loose, np.array([noise])) == expected


def test_both_ways_to_draw_agree():
    logits = torch.randn(50, 5000) * 2
    probs, noise = logits.softmax(-1).numpy(), np.random.default_rng(0).random(50)
    loose = columns(50, 5000, 1.0, 1e-30)
    assert np.array_equal(draw_any(probs, noise), draw_filtered(probs, loose, noise))


# -- scores -----------------------------------------------------------------------------------


def test_scores_are_scaled_and_edited_but_not_filtered(served_by):
    fields = {"temperature": 0.5, "top_k": 2, "logit_bias": {3: 1.0}}
    tables = tables_of(
        [spec(0, SamplingParams(**fields), logprobs=LogprobSpec(top=4, ids=(7,)))], 20
    )
    raw = torch.randn(1, 20)
    logits = raw.clone()
    tokens, _ = Sampler(tables, EOS).sample(logits, np.array([0]), np.array([3]))
    (score,) = score_samples(logits, tokens, np.array([0]), tables)
    raw[0, 3] += 1.0
    expected = (raw[0] / 0.5).log_softmax(-1)
    assert score.logprob == pytest.approx(float(expected[tokens[0]]), abs=1e-6)
    order = expected.topk(4)
    assert [token for token, _ in score.top] == order.indices.tolist()
    assert [value for _, value in score.top] == pytest.approx(order.values.tolist(), abs=1e-6)
    assert score.ids == [(7, pytest.approx(float(expected[7]), abs=1e-6))]


def test_scores_of_greedy_rows_are_not_scaled(served_by):
    sampling = SamplingParams(temperature=0.0)
    tables = tables_of([spec(0, sampling, logprobs=LogprobSpec())], 20)
    logits = torch.randn(1, 20)
    (score,) = score_samples(
        logits, logits[0].argmax(-1, keepdim=True).numpy(), np.array([0]), tables
    )
    assert score.logprob == pytest.approx(float(logits[0].log_softmax(-1).max()), abs=1e-6)
    assert score.top == score.ids == []


@pytest.mark.parametrize("vocab", [30, 4096, 50001])
def test_prompt_scores_are_the_log_softmax_of_torch(served_by, vocab):
    logits = torch.randn(5, vocab) * 4
    logits[2, 4] = logits[2, 9] = 50.0
    following = np.array([0, 3, 9, vocab - 1, 17], dtype=np.int32)
    expected = logits.double().log_softmax(-1)
    scores = score_prompt(logits, following, LogprobSpec(top=20, ids=(4, 11)))
    for score, row, token in zip(scores, expected, following, strict=True):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert score.ids == [
            (other, pytest.approx(float(row[other]), abs=1e-5)) for other in (4, 11)
        ]
        best = row.topk(20)
        assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert {token for token, _ in score.top} == set(best.indices.tolist())
        assert all(
            dict(score.top)[token] == value
            for token, value in score.ids
            if token in dict(score.top)
        )
    assert [token for token, _ in scores[2].top[:2]] == [4, 9]
    assert score_prompt(logits, following, None)[0].logprob == scores[0].logprob


def test_scores_of_a_row_without_a_distribution_are_not_a_number(served_by):
    logits = torch.zeros(3, 300)
    logits[0, 7], logits[1, 8] = torch.nan, torch.inf
    scores = score_prompt(logits, np.array([1, 1, 1]), LogprobSpec(top=2))
    assert [bool(np.isnan(score.logprob)) for score in scores] == [True, True, False]


def test_rows_that_do_not_ask_get_no_scores(served_by):
    tables = tables_of([spec(0, SamplingParams())], 20)
    assert score_samples(torch.randn(1, 20), np.array([3]), np.array([0]), tables) == [None]


def test_largest_prefers_low_ids():
    values = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0], dtype=np.float32)
    assert largest(values, 3).tolist() == [1, 3, 2]
    assert largest(values, 0).tolist() == []


def test_slices_bound_the_logits():
    parts = list(slices(1000, 150_000))
    assert parts[0].start == 0
    assert parts[-1].stop == 1000
    assert all(left.stop == right.start for left, right in pairwise(parts))
    assert max(part.stop - part.start for part in parts) * 150_000 * 4 * 4 <= 256 << 20
