"""Grammars under random schedules: right tokens whatever is aborted, retracted or overlapped."""

import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from headrace.cache.pages import PagePool
from headrace.cache.radix import RadixCache
from headrace.core.config import Limits, ScheduleOptions
from headrace.core.messages import AbortRequest, GenerateRequest, SamplingParams, pack_ids
from headrace.grammar.compiler import Compiler
from headrace.grammar.engine import Broken
from headrace.grammar.gate import GrammarGate, NoGrammars, Output
from headrace.scheduler.commit import OutputRules
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.space import Space
from tests.support.grammars import (
    EOS,
    VOCAB,
    MaskedRunner,
    allowed,
    choose,
    small_vocabulary,
    text_of,
)

VOCABULARY = small_vocabulary()
GRAMMARS = [
    {},
    {"regex": "[abc]{3,9}"},
    {"regex": "a(bc|aa)*1"},
    {"json_schema": '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'},
    {"json_schema": '{"type":"array","items":{"enum":[true,null,12]},"maxItems":4}'},
    {"ebnf": 'root ::= "[" root "]" | [a-c]+'},
    {"structural_tag": '{"type":"structural_tag","format":{"type":"sequence","elements":['
     '{"type":"regex","pattern":"[abc]*-"},{"type":"json_schema","json_schema":{"const":1}}]}}'},
]  # fmt: skip
BAD = [{"regex": "("}, {"json_schema": '{"allOf":[{"const":1},{"const":2}]}'}]


@pytest.fixture(scope="module")
def compiler():
    made = Compiler(lambda: VOCABULARY, {})
    yield made
    made.close()


def make_scheduler(gate, *, pages=24, page_size=4, rows=6, **options) -> Scheduler:
    limits = Limits(
        max_total_tokens=pages * page_size,
        max_running_requests=rows,
        context_length=pages * page_size,
        page_size=page_size,
    )
    return Scheduler(
        ScheduleOptions(**{"chunked_prefill_size": 16, **options}),
        limits,
        Space(PagePool(pages, page_size), RadixCache(page_size, "lru")),
        MaskedRunner(pages, page_size, VOCAB),
        output=OutputRules(eos_token_ids=(EOS,)),
        features=(gate,),
    )


def spec(rid: str, grammar: dict, prompt=(1, 2, 3), **fields) -> GenerateRequest:
    sampling = {"max_new_tokens": 24, "seed": 5, **fields.pop("sampling", {}), **grammar}
    return GenerateRequest(
        rid=rid, ids=pack_ids(list(prompt)), sampling=SamplingParams(**sampling), **fields
    )


def expected(compiler: Compiler, request: GenerateRequest) -> list[int]:
    """The tokens of a request that is alone in the world."""
    matcher = None
    for field, text in request.sampling.grammars:
        matcher = compiler.compile(field, text).result().copy()
    tokens = np.frombuffer(request.ids, np.int32).tolist()
    out: list[int] = []
    while len(out) < request.sampling.max_new_tokens:
        prefix = np.array(tokens + out, np.int32)
        mask = matcher.mask() if matcher else None
        token = choose(prefix, request.sampling.seed, request.sample_index, mask)
        out.append(token)
        if token == EOS:
            break
        if matcher:
            matcher.accept(token)
    return out


class Client:
    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.out = defaultdict(list)
        self.finish = {}

    def pump(self) -> None:
        for message in self.scheduler.take():
            for delta in message.items:
                assert delta.rid not in self.finish, "an answer after the last answer"
                self.out[delta.rid] += delta.ids
                if delta.finish is not None:
                    self.finish[delta.rid] = delta.finish

    def step(self) -> None:
        if not self.scheduler.step():
            time.sleep(0.0005)
        self.pump()

    def run(self, seconds: float = 60.0) -> "Client":
        until = time.monotonic() + seconds
        while not self.scheduler.idle:
            assert time.monotonic() < until, "the scheduler does not come to rest"
            self.step()
        self.pump()
        return self


@given(data=st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
def test_random_schedules(compiler, data):
    gate = GrammarGate(compiler, plan_waits=data.draw(st.sampled_from([0.0, 0.01]), "wait"))
    scheduler = make_scheduler(
        gate,
        pages=data.draw(st.integers(12, 40), "pages"),
        rows=data.draw(st.integers(1, 6), "rows"),
        chunked_prefill_size=data.draw(st.sampled_from([1, 7, 512]), "chunk"),
        disable_overlap_schedule=data.draw(st.booleans(), "normal"),
        schedule_conservativeness=data.draw(st.sampled_from([0.0, 1.0]), "careful"),
    )
    requests = []
    for index in range(data.draw(st.integers(1, 8), "requests")):
        grammar = data.draw(st.sampled_from(GRAMMARS + BAD), "grammar")
        samples = data.draw(st.sampled_from([1, 1, 3]), "n")
        prompt = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=20), "prompt")
        sampling = {"seed": index, "max_new_tokens": data.draw(st.integers(0, 26), "most")}
        group = {"group": str(index)} if samples > 1 else {}
        for n in range(samples):
            rid = f"{index}.{n}"
            requests.append(spec(rid, grammar, prompt, sampling=sampling, sample_index=n, **group))
    client = Client(scheduler)
    waiting = list(requests)
    while waiting:
        scheduler.submit(waiting.pop(0))
        for _ in range(data.draw(st.integers(0, 4), "steps")):
            client.step()
        if data.draw(st.integers(0, 6), "abort") == 0:
            scheduler.submit(AbortRequest(rid=data.draw(st.sampled_from(requests), "whom").rid))
    client.run()
    scheduler.check()
    assert not gate._outputs and not gate._compiling
    assert client.finish.keys() == {request.rid for request in requests}
    for request in requests:
        reason, got = client.finish[request.rid], client.out[request.rid]
        if reason.type == "abort":
            assert reason.status in (0, 400)
            assert reason.status == 0 or dict(request.sampling.grammars) in BAD
            continue
        assert got == expected(compiler, request)


def test_a_retracted_request_goes_on_where_it_was(compiler):
    scheduler = make_scheduler(GrammarGate(compiler), pages=13, schedule_conservativeness=0.0)
    requests = [spec(f"{i}", {"regex": "[abc]{20,}"}, sampling={"seed": i}) for i in range(3)]
    for request in requests:
        scheduler.submit(request)
    client = Client(scheduler).run()
    assert scheduler.planner.retracted_total > 0
    assert all(client.out[r.rid] == expected(compiler, r) for r in requests)


@pytest.mark.parametrize("sampling", [{"ignore_eos": True}, {"min_new_tokens": 20}])
def test_the_end_of_a_grammar_ends_the_request(compiler, sampling):
    scheduler = make_scheduler(GrammarGate(compiler))
    scheduler.submit(spec("r", {"regex": "abc"}, sampling=sampling))
    client = Client(scheduler).run()
    assert client.finish["r"].type == "stop"
    assert text_of(VOCABULARY, client.out["r"]) == "abc"


def test_without_any_end_of_sequence():
    vocabulary = small_vocabulary(eos=())
    compiler = Compiler(lambda: vocabulary, {})
    scheduler = make_scheduler(GrammarGate(compiler))
    scheduler.submit(spec("r", {"regex": "a12"}))
    client = Client(scheduler).run()
    compiler.close()
    assert client.finish["r"].type == "stop"
    assert text_of(vocabulary, client.out["r"]) == "a12"


def test_bad_grammars_fail_alone(compiler):
    scheduler = make_scheduler(GrammarGate(compiler))
    scheduler.submit(spec("good", {"regex": "[abc]{3}"}))
    scheduler.submit(spec("bad", {"regex": "("}))
    scheduler.submit(spec("free", {}))
    client = Client(scheduler).run()
    assert client.finish["bad"].status == 400
    assert "regex" in client.finish["bad"].message
    assert client.finish["good"].type == "stop"
    assert client.out["free"] == expected(compiler, spec("free", {}))


def test_a_slow_compilation_times_out():
    """It keeps its thread, and nobody else waits for it."""
    go = threading.Event()
    compiler = Compiler(lambda: go.wait(60) and VOCABULARY, {})
    scheduler = make_scheduler(GrammarGate(compiler, compile_seconds=0.05))
    scheduler.submit(spec("slow", {"regex": "abc"}))
    scheduler.submit(spec("free", {}))
    client = Client(scheduler).run()
    assert client.finish["slow"].status == 400
    assert "longer than" in client.finish["slow"].message
    stats = scheduler.reporter.stats()
    assert (stats.grammar_timeouts_total, stats.grammar_aborted_total) == (1, 1)
    assert client.finish["free"].type in ("stop", "length")
    go.set()
    compiler.close()


def test_a_late_mask_holds_its_own_row_only(compiler):
    gate = GrammarGate(compiler, plan_waits=0.0)
    scheduler = make_scheduler(gate)
    gate._threads = HeldThreads()
    scheduler.submit(spec("masked", {"regex": "[abc]{4}"}))
    scheduler.submit(spec("free", {}, sampling={"ignore_eos": True}))
    client = Client(scheduler)
    until = time.monotonic() + 30
    while "free" not in client.finish and time.monotonic() < until:
        client.step()
    assert client.finish["free"].type == "length"
    assert "masked" not in client.finish
    gate._threads.go.set()
    client.run()
    assert client.out["masked"] == expected(compiler, spec("masked", {"regex": "[abc]{4}"}))
    assert scheduler.reporter.stats().grammar_late_masks_total > 0


class HeldThreads(ThreadPoolExecutor):
    """No task begins before `go`."""

    def __init__(self) -> None:
        super().__init__(2)
        self.go = threading.Event()

    def submit(self, work):
        return super().submit(lambda: (self.go.wait(60), work())[1])


def test_reasoning_is_free_and_the_grammar_follows(compiler):
    scheduler = make_scheduler(GrammarGate(compiler), pages=64)
    request = spec("r", {"regex": "[abc]{5}"}, reasoning_end='":', sampling={"max_new_tokens": 200})
    scheduler.submit(request)
    client = Client(scheduler).run()
    _, found, answer = text_of(VOCABULARY, client.out["r"]).partition('":')
    assert found and client.finish["r"].type == "stop"
    assert EOS not in client.out["r"][:-1], "the reasoning must not end the answer"
    assert len(answer) == 5 and set(answer) <= set("abc")


def test_no_backend_refuses():
    scheduler = make_scheduler(NoGrammars("there are no grammars here"))
    scheduler.submit(spec("r", {"ebnf": "root ::= [a]"}))
    client = Client(scheduler).run()
    assert client.finish["r"].status == 400
    assert client.finish["r"].message == "ebnf: there are no grammars here"


def test_masks_of_drafts_and_rollback(compiler):
    """Each drafted token has the mask it would have had, and the matcher stays where it was."""
    gate = GrammarGate(compiler)
    scheduler = make_scheduler(gate)
    scheduler.submit(spec("r", {"regex": "abcabc"}))
    while not gate._outputs:
        client_step(scheduler)
    output = next(iter(gate._outputs.values()))
    output.mask.result()
    a, b, c = (VOCABULARY.tokens.index(x) for x in (b"a", b"b", b"c"))
    before = output.matcher.mask()
    masks = output.masks([a, b, a, c])
    assert len(masks) == 5 and masks[0] == before == output.matcher.mask()
    matcher = compiler.compile("regex", "abcabc").result().copy()
    for token, mask in zip([a, b], masks[1:3], strict=True):
        matcher.accept(token)
        assert matcher.mask() == mask
    with pytest.raises(Broken):
        matcher.accept(a)


def test_masks_of_drafts_that_end_the_reasoning(compiler):
    """What follows the marker has the grammar's mask, and nothing moves."""
    token = {text: VOCABULARY.tokens.index(text) for text in (b'":', b"a", b"b", b"1")}
    output = Output(compiler.compile("regex", "ab1").result().copy(), VOCABULARY, '":')
    output.mask.set_result(output.next_mask())
    marker, a, b, one = (token[text] for text in (b'":', b"a", b"b", b"1"))
    masks = output.masks([one, marker, a, b])
    assert masks[:2] == [VOCABULARY.no_end()] * 2 and output.reasoning
    assert [allowed(mask, VOCAB).tolist() for mask in masks[2:]] == [[a], [b], [one]]
    assert output.masks([EOS, a])[1:] == [VOCABULARY.no_end()] * 2
    for drafted in (one, marker, a):
        output.accept(drafted)
    assert output.next_mask() == masks[3]


def client_step(scheduler: Scheduler) -> None:
    scheduler.step()
    time.sleep(0.001)


def test_compiled_grammars_are_kept_and_bounded():
    compiler = Compiler(lambda: VOCABULARY, {}, kept=2)
    first = compiler.compile("regex", "a")
    assert compiler.compile("regex", "a") is first
    compiler.compile("regex", "b")
    compiler.compile("regex", "c")
    assert compiler.compile("regex", "a") is not first
    assert (compiler.hits, compiler.misses, compiler.evictions) == (1, 4, 2)
    compiler.close()


def test_the_vocabulary_is_read_for_the_first_grammar():
    """In a thread, once; who asks for no grammar never causes it, nor waits for it."""
    read: list[str] = []
    go = threading.Event()

    def slowly():
        read.append(threading.current_thread().name)
        assert go.wait(60)
        return VOCABULARY

    compiler = Compiler(slowly, {})
    scheduler = make_scheduler(GrammarGate(compiler))
    scheduler.submit(spec("free", {}))
    Client(scheduler).run()
    assert read == []
    for number in range(3):
        scheduler.submit(spec(f"g{number}", {"regex": "a" * (number + 1)}))
    scheduler.submit(spec("free", {}))
    client = Client(scheduler)
    until = time.monotonic() + 30
    while "free" not in client.finish and time.monotonic() < until:
        client.step()
    assert set(client.finish) == {"free"}
    go.set()
    client.run()
    compiler.close()
    assert len(read) == 1 and read[0].startswith("grammar")
    assert [text_of(VOCABULARY, client.out[f"g{n}"]) for n in range(3)] == ["a", "aa", "aaa"]


def test_what_the_metrics_tell():
    compiler = Compiler(lambda: VOCABULARY, {}, kept=1)
    scheduler = make_scheduler(GrammarGate(compiler))
    compiler.compile("regex", "[ab]{3}").result()
    for rid, pattern in (("a", "[ab]{3}"), ("b", "("), ("c", "[ab]{3}")):
        scheduler.submit(spec(rid, {"regex": pattern}))
    scheduler.submit(spec("free", {}))
    waiting = scheduler.reporter.stats().grammar_waiting
    client = Client(scheduler).run()
    compiler.close()
    stats = scheduler.reporter.stats()
    assert (waiting, stats.grammar_waiting) == (3, 0)
    assert stats.grammar_requests_total == 3
    assert (stats.grammar_cache_hits_total, stats.grammar_cache_misses_total) == (1, 3)
    assert stats.grammar_cache_evictions_total == 2
    assert (stats.grammar_aborted_total, stats.grammar_timeouts_total) == (1, 0)
    # One was compiled before the gate listened.
    assert sum(stats.grammar_compile_counts) >= 2
    assert sum(stats.grammar_mask_counts) >= len(client.out["a"]) + len(client.out["c"])
    assert stats.grammar_mask_seconds_total > 0
