"""The Engine with its real processes: shapes, streams, aborts, threads, loops, the end."""

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from headrace import Engine
from headrace.core.errors import BadRequest, HeadraceError, TooLong, Unsupported

pytestmark = pytest.mark.timeout(120)
SHORT = {"max_new_tokens": 8, "temperature": 0.0, "seed": 1}
LONG = {"max_new_tokens": 900, "temperature": 0.0, "seed": 1}


@pytest.fixture(scope="module")
def engine():
    with Engine(runner="fake", stream_interval=1) as made:
        yield made


def wait_idle(engine):
    """The scheduler has let go of every request."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        (state,) = engine.get_server_info()["internal_states"]
        if state["running"] == state["waiting"] == 0:
            return state
        time.sleep(0.02)
    raise AssertionError(f"requests are left: {state}")


def test_one_prompt(engine):
    result = engine.generate("Hello", SHORT)
    assert set(result) == {"text", "output_ids", "meta_info"}
    assert result["text"] == engine.detokenize(result["output_ids"])
    meta = result["meta_info"]
    assert meta["completion_tokens"] == len(result["output_ids"]) == 8
    assert meta["prompt_tokens"] == len(engine.tokenize("Hello"))
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert meta["e2e_latency"] >= meta["first_token_latency"] >= meta["queue_time"] >= 0


def test_ids_and_text_are_the_same_prompt(engine):
    ids = engine.tokenize("Hello there")
    assert (
        engine.generate("Hello there", SHORT)["output_ids"]
        == engine.generate(input_ids=ids, sampling_params=SHORT)["output_ids"]
    )


def test_lists_in_lists_out(engine):
    alone = [engine.generate(prompt, SHORT)["output_ids"] for prompt in ("a", "b", "c")]
    batch = engine.generate(["a", "b", "c"], SHORT)
    assert [result["output_ids"] for result in batch] == alone
    samples = engine.generate("a", {**SHORT, "n": 3})
    assert len({tuple(result["output_ids"]) for result in samples}) == 3
    assert samples[0]["output_ids"] == alone[0]


def test_a_stream_grows_to_the_answer(engine):
    whole = engine.generate("Hello", LONG)
    seen = list(engine.generate("Hello", LONG, stream=True))
    assert len(seen) > 10
    for before, after in itertools.pairwise(seen):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
    assert seen[-1]["text"] == whole["text"]
    assert seen[-1]["meta_info"]["finish_reason"]["type"] == "length"


def test_a_batch_streams_with_indices(engine):
    last = {}
    for chunk in engine.generate(["a", "b"], SHORT, stream=True):
        last[chunk["index"]] = chunk
    for index, prompt in enumerate(["a", "b"]):
        assert last[index]["output_ids"] == engine.generate(prompt, SHORT)["output_ids"]


def test_text_ends_before_a_stop_string(engine):
    whole = engine.generate("Hello", LONG)["text"]
    stop = whole[200:206]
    at = whole.index(stop)
    result = engine.generate("Hello", {**LONG, "stop": [stop, "never to be seen"]})
    assert result["text"] == whole[:at]
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    chunks = [c["text"] for c in engine.generate("Hello", {**LONG, "stop": stop}, stream=True)]
    assert chunks[-1] == whole[:at]
    assert all(whole[:at].startswith(chunk) for chunk in chunks)


def test_logprobs(engine):
    result = engine.generate(
        "Hello there",
        SHORT,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        token_ids_logprob=[5],
        return_text_in_logprobs=True,
    )
    meta = result["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == result["output_ids"]
    assert [token for _, token, _ in meta["input_token_logprobs"]] == engine.tokenize("Hello there")
    assert meta["input_token_logprobs"][0][0] is None
    assert all(len(top) == 2 for top in meta["output_top_logprobs"])
    assert [[t for _, t, _ in at] for at in meta["output_token_ids_logprobs"]] == [[5]] * 8


def test_a_stream_that_is_dropped_ends_in_the_scheduler(engine):
    before = wait_idle(engine)
    for _ in range(3):
        stream = engine.generate("Hello", {**LONG, "stream_interval": 1}, stream=True)
        next(stream)
        stream.close()
    after = wait_idle(engine)
    done = after["generated_tokens_total"] - before["generated_tokens_total"]
    assert done < 3 * 900


def test_abort_gives_what_there_is(engine):
    seen = []

    def run():
        seen.extend(engine.generate("Hello", LONG, stream=True, rid="stop-me"))

    thread = threading.Thread(target=run)
    thread.start()
    while not seen and thread.is_alive():
        time.sleep(0.001)
        engine.abort_request("stop-")
    thread.join()
    assert seen[-1]["meta_info"]["finish_reason"]["type"] in ("abort", "length")
    wait_idle(engine)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (BadRequest, {"sampling_params": {"top_p": 2}}, "top_p must be 0 to 1, not 2"),
        (BadRequest, {"sampling_params": {"nope": 2}}, "no field 'nope'"),
        (TooLong, {"sampling_params": {"max_new_tokens": 5000}}, "max_new_tokens (5000)"),
        (Unsupported, {"lora_path": "x"}, "lora_path"),
        (BadRequest, {"token_ids_logprob": [10**6], "return_logprob": True}, "token_ids_logprob"),
    ],
)
def test_wrong_requests_are_errors(engine, kind, call, message):
    with pytest.raises(kind) as caught:
        engine.generate("Hello", **call)
    assert message in caught.value.message


async def test_inside_a_running_loop(engine):
    expected = engine.generate("Hello", SHORT)["output_ids"]
    results = await asyncio.gather(*(engine.async_generate("Hello", SHORT) for _ in range(8)))
    assert [result["output_ids"] for result in results] == [expected] * 8
    stream = await engine.async_generate("Hello", SHORT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[-1]["output_ids"] == expected


async def test_cancellation_reaches_the_scheduler(engine):
    before = wait_idle(engine)
    tasks = [asyncio.create_task(engine.async_generate("Hello", LONG)) for _ in range(20)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    after = wait_idle(engine)
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < 20 * 900


async def test_many_streams_that_are_left_at_random(engine):
    """64 at a time: who stays gets everything, who leaves is forgotten, nothing is lost."""
    dice = random.Random(5)
    expected = (await engine.async_generate("Hello", {**SHORT, "max_new_tokens": 200}))[
        "output_ids"
    ]

    async def client(leave_after):
        sampling = {**SHORT, "max_new_tokens": 200, "stream_interval": 1}
        chunks = await engine.async_generate("Hello", sampling, stream=True)
        async with aclosing(chunks):
            async for chunk in chunks:
                ids = chunk["output_ids"]
                assert ids == expected[: len(ids)]
                if len(ids) >= leave_after:
                    break
        return len(ids)

    leaving = [dice.choice((1, 20, 100, 1000)) for _ in range(128)]
    for start in (0, 64):
        seen = await asyncio.gather(*map(client, leaving[start : start + 64]))
        for count, leave_after in zip(seen, leaving[start : start + 64], strict=True):
            assert count == 200 if leave_after == 1000 else count >= leave_after
    state = await asyncio.to_thread(wait_idle, engine)
    assert state["used_tokens"] == 0
    assert not engine._manager._flights


def test_from_many_threads(engine):
    results = {}

    def run(number):
        results[number] = engine.generate(f"thread {number}", SHORT)["output_ids"]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, ids in results.items():
        assert ids == engine.generate(f"thread {number}", SHORT)["output_ids"]
    assert len(results) == 8


def test_information(engine):
    info = engine.get_server_info()
    assert info["runner"] == "fake" and info["max_total_num_tokens"] > 0
    assert "api_key" not in info
    assert engine.get_model_info()["architectures"] == ["LlamaForCausalLM"]
    wait_idle(engine)
    assert engine.flush_cache() is True


def test_no_signal_handler_is_installed():
    """Handlers belong to the program that uses the Engine."""
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in watched]
    with Engine(runner="fake", skip_tokenizer_init=True):
        assert [signal.getsignal(number) for number in watched] == before


def test_the_end_leaves_nothing():
    engine = Engine(runner="fake", skip_tokenizer_init=True)
    pids = engine.get_all_child_pids()
    folder = Path(engine._launched.manager._addresses.folder)
    assert all(psutil.pid_exists(pid) for pid in pids) and folder.is_dir()
    result = engine.generate(input_ids=[1, 2, 3], sampling_params=SHORT)
    assert result["text"] == "" and len(result["output_ids"]) == 8
    with pytest.raises(BadRequest, match="skip-tokenizer-init"):
        engine.generate("text", SHORT)
    stream = engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 900}, stream=True)
    next(stream)
    engine.shutdown()
    engine.shutdown()
    assert not any(psutil.pid_exists(pid) for pid in pids) and not folder.exists()
    with pytest.raises(HeadraceError, match="shut"):
        engine.generate(input_ids=[1])


def run_script(text, **options):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSTARTUP"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        **options,
    )


def test_a_script_needs_no_main_guard_and_no_shutdown():
    done = run_script(
        """
        from headrace import Engine
        engine = Engine(runner="fake")
        print(len(engine.generate("Hello", {"max_new_tokens": 5})["output_ids"]))
        print(*engine.get_all_child_pids())
        """
    )
    assert done.returncode == 0, done.stderr
    count, pids = done.stdout.splitlines()
    assert count == "5" and done.stderr == ""
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.split())


@pytest.mark.slow
def test_the_demo_model_says_what_transformers_says():
    import torch
    from transformers import AutoModelForCausalLM

    from headrace.assets import demo_model_path

    prompts = ["Hello", "What is the capital of France?", "Tell me a story about a fox."]
    sampling = {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    with Engine(dtype="float32") as engine:
        ids = [engine.tokenize(prompt) for prompt in prompts]
        ours = engine.generate(input_ids=ids, sampling_params=sampling, return_logprob=True)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    for prompt, result in zip(ids, ours, strict=True):
        out = result["output_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + out])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, dim=-1)
        assert logprobs.argmax(dim=-1).tolist() == out
        expected = logprobs.max(dim=-1).values
        found = torch.tensor(
            [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
        )
        assert torch.allclose(found, expected, atol=1e-4)
