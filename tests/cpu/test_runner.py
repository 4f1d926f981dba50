"""ModelRunner on a model whose logits are a hash of the prefix found in its paged cache.

The oracle computes each sequence alone from the list of its tokens, without pages, rows or batches.
"""

import numpy as np
import psutil
import pytest
import torch

from headrace.core.config import Limits
from headrace.core.errors import Unsupported
from headrace.core.messages import LogprobSpec, SamplingParams
from headrace.core.plan import Chunk, Pages, StateSpec, StepPlan
from headrace.runner.model_runner import ModelRunner
from headrace.runner.pool import KvPool, bytes_per_token, kv_dtype
from headrace.runner.sampler import Sampler
from headrace.runner.tables import RowTables
from tests.support.driver import Driver, Sequence, generate
from tests.support.prefix_model import PrefixModel, digest, prefix_logits

VOCAB = 50
PAGE = 4
ROWS = 8
LENGTH = 64
EOS = (2,)
PAGES = 128


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_runner() -> ModelRunner:
    limits = Limits(
        max_total_tokens=PAGES * PAGE,
        max_running_requests=ROWS,
        context_length=LENGTH,
        page_size=PAGE,
    )
    return ModelRunner(PrefixModel(VOCAB), limits, VOCAB, EOS, torch.float32)


def make_driver(seed: int = 0) -> tuple[ModelRunner, Driver]:
    runner = make_runner()
    return runner, Driver(runner.execute, PAGES, PAGE, seed)


def alone(sequence: Sequence, count: int) -> list[int]:
    """The next `count` tokens of a sequence, computed alone and without pages."""
    tables = RowTables(ROWS, LENGTH, PAGE, VOCAB)
    row = sequence.row
    tables.apply(StepPlan(0, [], new_rows=[sequence.new_row(0)]))
    sequence.row = row
    known = sequence.prompt + sequence.out
    tokens = list(known)
    for _ in range(count):
        logits = prefix_logits(digest(tokens), VOCAB)[None]
        position = np.array([len(tokens)])
        token = int(Sampler(tables, EOS).sample(logits, np.array([0]), position)[0][0])
        tables.tokens[0, len(tokens)] = token
        tokens.append(token)
    return tokens[len(known) :]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB, random.integers(1, 20)).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_any_chunks_in_any_batch_give_the_tokens_of_the_sequence_alone(seed):
    driver = make_driver(seed)[1]
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_p=0.7, repetition_penalty=1.3),
        SamplingParams(temperature=0.5, frequency_penalty=0.8, min_new_tokens=5),
    ]
    sequences = [
        Sequence(prompt, sampling=kinds[index % 4], seed=index)
        for index, prompt in enumerate(prompts(ROWS, seed))
    ]
    expected = [alone(sequence, 12) for sequence in sequences]
    new_rows = [sequence.new_row(row) for row, sequence in enumerate(sequences)]
    driver.execute(StepPlan(0, [], new_rows=new_rows))
    generate(driver, sequences, 12)
    assert [sequence.out[:12] for sequence in sequences] == expected


def test_the_next_plan_runs_tokens_the_host_has_not_seen():
    driver = make_driver()[1]
    sequence = Sequence([5, 6, 7, 8, 9], sampling=SamplingParams(), seed=3)
    expected = alone(sequence, 6)
    plans, new_rows = [], [sequence.new_row(0)]
    for count in (5, 1, 1, 1, 1, 1):
        chunk, pages = driver.chunk(sequence, count, samples=True)
        plans.append(StepPlan(1, [chunk], new_rows=new_rows, pages=pages))
        new_rows = []
    results = [driver.execute(plan) for plan in plans]  # none of the plans saw a result
    assert [result.chunks[0].tokens for result in results] == [[token] for token in expected]


def test_a_freed_row_and_its_pages_serve_another_sequence_in_the_same_plan():
    driver = make_driver()[1]
    driver.free = driver.free[:3]
    first, second = Sequence(list(range(3, 14))), Sequence([9, 8, 7, 6, 5, 4, 3])
    expected = alone(second, 3)
    driver.run([(first, 11)], new_rows=[first.new_row(0)])
    driver.free += first.pages
    driver.run([(second, 7)], freed_rows=[0], new_rows=[second.new_row(0)])
    driver.run([(second, 1)])
    driver.run([(second, 1)])
    assert second.out == expected


def test_a_retracted_sequence_goes_on_where_it_was():
    driver = make_driver()[1]
    fields = {"presence_penalty": 0.5, "min_new_tokens": 4, "temperature": 0.9}
    sequence = Sequence([4, 4, 5], sampling=SamplingParams(**fields), seed=1)
    expected = alone(sequence, 10)
    driver.run([(sequence, 3)], new_rows=[sequence.new_row(2)])
    for _ in range(4):
        driver.run([(sequence, 1)])
    sequence.pages, sequence.computed = [], 0
    driver.run([(sequence, 8)], freed_rows=[2], new_rows=[sequence.new_row(5)])
    for _ in range(4):
        driver.run([(sequence, 1)])
    assert sequence.out == expected


def test_copied_and_shared_pages_continue_a_prompt():
    driver = make_driver()[1]
    leader = Sequence(list(range(10, 20)), sampling=SamplingParams(), seed=7)
    driver.run([(leader, 10)], new_rows=[leader.new_row(0)])
    copy = driver.free.pop()
    follower = Sequence(leader.prompt, sampling=SamplingParams(), seed=8)
    expected = alone(follower, 5)
    follower.pages, follower.computed = [*leader.pages[:2], copy], 9
    work = [(leader, 1), (follower, 1)]
    new_row = follower.new_row(1)
    shared = Pages(1, 0, list(follower.pages))
    chunks = [driver.chunk(sequence, count) for sequence, count in work]
    plan = StepPlan(
        2,
        [chunk for chunk, _ in chunks],
        new_rows=[new_row],
        pages=[shared, *[update for _, updates in chunks for update in updates]],
        copies=[(leader.pages[2], copy)],
    )
    for sequence, outcome in zip((leader, follower), driver.execute(plan).chunks, strict=True):
        sequence.out += outcome.tokens
    for _ in range(4):
        driver.run(work)
    assert follower.out == expected
    assert leader.out == alone(Sequence(leader.prompt, leader.sampling, 7), 6)


# -- drafts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_drafts_change_nothing_but_the_number_of_steps(right):
    driver = make_driver()[1]
    sampling = SamplingParams(frequency_penalty=1.0, temperature=0.8)
    sequence = Sequence([5, 6, 7], sampling=sampling, seed=4)
    expected = alone(sequence, 8)
    driver.run([(sequence, 3)], new_rows=[sequence.new_row(0)])
    wrong = [(token + 1) % VOCAB for token in expected]
    draft = tuple(expected[1 : 1 + right] + wrong[1 + right : 4])
    second = Sequence([9, 9])
    new_row = second.new_row(1)
    (chunk, pages), (other, more) = driver.chunk(sequence, 1, draft=draft), driver.chunk(second, 2)
    plan = StepPlan(2, [chunk, other], new_rows=[new_row], pages=pages + more)
    outcomes = driver.execute(plan).chunks
    assert outcomes[0].tokens == expected[1 : 2 + right]
    assert outcomes[1].tokens == alone(second, 1)
    sequence.out += outcomes[0].tokens
    sequence.computed += right
    while len(sequence.out) < 8:
        driver.run([(sequence, 1)])
    assert sequence.out == expected


# -- scores -----------------------------------------------------------------------------------


def test_prompt_scores_in_any_chunks():
    tokens = list(range(20, 33))
    wanted = LogprobSpec(start=3, top=2, ids=(8,))
    expected = []
    for position in range(3, 12):
        values = prefix_logits(digest(tokens[: position + 1]), VOCAB).log_softmax(-1)
        top = values.topk(2)
        expected.append(
            (float(values[tokens[position + 1]]), top.indices.tolist(), float(values[8]))
        )
    for cuts in ([13], [1, 5, 7], [4, 9], [3, 1, 1, 8]):
        driver = make_driver()[1]
        sequence = Sequence(tokens, logprobs=wanted)
        new_rows, scores = [sequence.new_row(0)], []
        for count in cuts:
            chunk, pages = driver.chunk(sequence, count, logprob_start=3)
            plan = StepPlan(1, [chunk], new_rows=new_rows, pages=pages)
            scores += driver.execute(plan).chunks[0].prompt_scores
            new_rows = []
        found = [(s.logprob, [token for token, _ in s.top], s.ids[0][1]) for s in scores]
        assert [top for _, top, _ in found] == [top for _, top, _ in expected]
        for one, other in zip(found, expected, strict=True):
            assert (one[0], one[2]) == pytest.approx((other[0], other[2]), abs=1e-5)


def test_prompt_scores_end_with_the_prompt_after_a_retraction():
    driver = make_driver()[1]
    sequence = Sequence([5, 6, 7], logprobs=LogprobSpec(start=0), out=[8, 9])
    new_row = sequence.new_row(0)
    chunk, pages = driver.chunk(sequence, 5, logprob_start=0)
    plan = StepPlan(1, [chunk], new_rows=[new_row], pages=pages)
    outcome = driver.execute(plan).chunks[0]
    assert len(outcome.prompt_scores) == 2
    assert len(outcome.scores) == len(outcome.tokens) == 1


def test_output_scores_only_for_rows_that_ask():
    driver = make_driver()[1]
    asking = Sequence([5, 6], logprobs=LogprobSpec(top=1))
    silent = Sequence([5, 6])
    new_rows = [asking.new_row(0), silent.new_row(1)]
    result = driver.run([(asking, 2), (silent, 2)], new_rows=new_rows)
    token = asking.out[0]
    value = float(prefix_logits(digest([5, 6]), VOCAB).log_softmax(-1)[token])
    (score,) = result.chunks[0].scores
    assert score.logprob == pytest.approx(value, abs=1e-5)
    assert score.top == [(token, score.logprob)]
    assert result.chunks[1].scores == []


# -- isolation --------------------------------------------------------------------------------


def test_a_row_with_bad_logits_fails_alone():
    runner, driver = make_driver()
    runner.model.broken = {digest([5, 6, 7])}
    bad, good = Sequence([5, 6, 7]), Sequence([5, 6, 8])
    expected = alone(good, 2)
    new_rows = [bad.new_row(0), good.new_row(1)]
    (first, pages), (second, more) = driver.chunk(bad, 3), driver.chunk(good, 3)
    plan = StepPlan(1, [first, second], new_rows=new_rows, pages=pages + more)
    outcomes = driver.execute(plan).chunks
    assert "not finite" in outcomes[0].error
    assert outcomes[0].tokens == []
    assert outcomes[1].tokens == expected[:1]
    # A plan that was launched before the error was known must still run.
    plan = StepPlan(2, [Chunk(0, 3, 1), Chunk(1, 3, 1)])
    assert driver.execute(plan).chunks[1].tokens == expected[1:]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompt": [5, VOCAB]}, "input_ids"),
        ({"prompt": [5, -1]}, "input_ids"),
        ({"sampling": SamplingParams(logit_bias={VOCAB + 3: 1.0})}, "logit_bias"),
        ({"logprobs": LogprobSpec(ids=(VOCAB,))}, "token_ids_logprob"),
    ],
)
def test_a_row_with_bad_ids_fails_alone(fields, name):
    driver = make_driver()[1]
    bad, good = Sequence(**{"prompt": [5, 6], **fields}), Sequence([7, 8])
    expected = alone(good, 1)
    pages = [Pages(0, 0, [driver.free.pop()]), Pages(1, 0, [driver.free.pop()])]
    plan = StepPlan(
        1,
        [Chunk(0, 0, 2, logprob_start=0), Chunk(1, 0, 2)],
        new_rows=[bad.new_row(0), good.new_row(1)],
        pages=pages,
    )
    outcomes = driver.execute(plan).chunks
    assert name in outcomes[0].error
    assert str(VOCAB - 1) in outcomes[0].error
    assert outcomes[1].tokens == expected
    healthy = Sequence([5, 6])
    expected = alone(healthy, 1)
    driver.run([(healthy, 2)], freed_rows=[0], new_rows=[healthy.new_row(0)])
    assert healthy.out == expected


def test_extras_that_nobody_handles_are_an_error():
    with pytest.raises(Unsupported, match="LogprobSpec"):
        make_runner().execute(StepPlan(1, [], extras=(LogprobSpec(),)))


# -- pool -------------------------------------------------------------------------------------


def test_pool_shapes_follow_the_layers():
    specs = [StateSpec(kv_heads=2, head_dim=8), StateSpec(kv_heads=1, head_dim=3, window=5)]
    pool = KvPool(specs, pages=5, page_size=PAGE, dtype=torch.bfloat16)
    assert [cache.keys.shape for cache in pool.caches] == [(5, PAGE, 2, 8), (5, PAGE, 1, 3)]
    for cache in pool.caches:
        keys, values = cache.tensors()
        assert keys.dtype == values.dtype == torch.bfloat16
        assert keys.is_contiguous()
        assert keys.data_ptr() % 64 == values.data_ptr() % 64 == 0
        assert not keys.any()
        keys += 1
        assert not values.any()


LATENT = StateSpec(kind="latent", kv_heads=1, head_dim=5, value_dim=3)


def test_each_layer_has_the_pool_that_it_declares():
    """Hybrids: a list of specs, one for each layer, of any kinds."""
    specs = [StateSpec(kv_heads=2, head_dim=8), LATENT, StateSpec(kv_heads=1, head_dim=4)]
    pool = KvPool(specs, pages=3, page_size=PAGE, dtype=torch.int8)
    shapes = [cache.values.shape[2:] for cache in pool.caches]
    assert shapes == [(2, 8), (1, 3), (1, 4)]
    assert [cache.latent for cache in pool.caches] == [False, True, False]
    keys, scale = pool.caches[1].tensors()
    keys[2, 1, 0] = torch.arange(5)
    assert pool.caches[1].values[2, 1, 0].tolist() == [0, 1, 2]
    assert scale is pool.caches[1].key_scale is pool.caches[1].value_scale
    assert StateSpec(kind="recurrent", kv_heads=1, head_dim=4).bytes_per_token(4) == 0


@pytest.mark.parametrize("spec", [StateSpec(kv_heads=1, head_dim=2), LATENT], ids=str)
@pytest.mark.parametrize("name", ["auto", "fp8_e4m3", "int8"])
def test_pool_copies_pages_in_order(name, spec):
    """Scales, too, are copied, and counted."""
    specs, dtype = [spec] * 2, kv_dtype(name, torch.float32)
    pool = KvPool(specs, 6, PAGE, dtype)
    held = sum(tensor.nbytes for cache in pool.caches for tensor in cache.tensors())
    assert held == 6 * PAGE * bytes_per_token(specs, dtype)
    for cache in pool.caches:
        stored = 1 if spec.kind == "latent" else 2
        assert len(cache.tensors()) == (2 * stored if name == "int8" else stored)
        for tensor in cache.tensors():
            for page in range(6):
                tensor[page].fill_(page)
    pool.copy([(0, 4), (1, 5)])
    pool.copy([(4, 1), (1, 2)])
    for cache in pool.caches:
        for tensor in cache.tensors():
            assert tensor.float().view(6, -1)[:, 0].tolist() == [0, 0, 0, 3, 0, 1]


def test_pool_memory_is_not_touched_before_use():
    process = psutil.Process()
    before = process.memory_info().rss
    pool = KvPool([StateSpec(kv_heads=8, head_dim=128)] * 8, 1000, 16, torch.float32)
    keys, values = pool.caches[7].tensors()
    values[999] = 1.0
    assert float(values[999].sum()) == 16 * 8 * 128
    assert float(keys[999].sum()) == 0
    assert sum(tensor.nbytes for cache in pool.caches for tensor in cache.tensors()) > 900 << 20
    assert process.memory_info().rss - before < 64 << 20


def test_pool_refuses_state_it_cannot_keep():
    with pytest.raises(Unsupported, match="recurrent"):
        KvPool([StateSpec(kind="recurrent", kv_heads=1, head_dim=4)], 2, PAGE, torch.float32)
