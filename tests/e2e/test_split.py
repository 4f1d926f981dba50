"""Servers whose model is split over processes: the tokens of one, and how they end."""

import json

import pytest

from headrace import Engine
from headrace.core.errors import LoadError
from headrace.core.ports import free_port
from tests.e2e.test_processes import assert_nothing_is_left
from tests.support.servers import Server, wait_for

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

PROMPTS = ["Hello, the river", "Once upon a time", "The mill", "Water flows down", "A"]
SEED = "remote_instance_weight_loader"
GREEDY = {"temperature": 0, "max_new_tokens": 20}
DRAWN = {"temperature": 0.9, "max_new_tokens": 20, "sampling_seed": 5}


def ids(results):
    return [result["output_ids"] for result in results]


def scores(results):
    return [result["meta_info"]["output_token_logprobs"] for result in results]


def ask(engine, **fields):
    found = engine.generate(PROMPTS, GREEDY, return_logprob=True, **fields)
    return found, engine.generate(PROMPTS, DRAWN)


@pytest.fixture(scope="module")
def alone():
    with Engine() as engine:
        return ask(engine)


def test_two_ranks_on_the_command_line(tmp_path, alone):
    """The same tokens; named processes; one that dies is back with its team."""
    with Server(tmp_path, "--tp-size", "2", f"--{SEED.replace('_', '-')}-start-seed") as server:
        server.wait_ready()
        assert_weights_come_from(server, alone)
        children = server.children()
        assert "headrace::rank-1" in children
        with server.post("/generate", {"text": PROMPTS, "sampling_params": GREEDY}) as response:
            assert ids(json.load(response)) == ids(alone[0])
        children["headrace::rank-1"].kill()
        with server.post("/generate", {"text": PROMPTS, "sampling_params": GREEDY}) as response:
            assert ids(json.load(response)) == ids(alone[0])
        assert "rank-1" in server.text
        children |= server.children()
        server.process.terminate()
        assert server.process.wait(60) == 0
        assert_nothing_is_left(server, children.values())


def assert_weights_come_from(server, alone):
    """Two ranks of another server take their parts from the two of this one."""
    where = {f"{SEED}_seed_instance_ip": "127.0.0.1"}
    where |= {f"{SEED}_seed_instance_service_port": server.port}
    ports = [free_port("127.0.0.1") for _ in range(2)]
    where |= {f"{SEED}_send_weights_group_ports": ",".join(map(str, ports))}
    with Engine(tp_size=2, load_format="remote_instance", **where) as taker:
        assert ids(taker.generate(PROMPTS, GREEDY)) == ids(alone[0])
    wait_for(lambda: server.text.count("weights sent") == 2)
    assert "sending weights failed" not in server.text


def test_two_machines_are_one_server(tmp_path, alone):
    """The same tokens; the second one serves health only, and ends when the first one is gone."""
    meeting = ["--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port('127.0.0.1')}"]
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    arguments = ["--tp-size", "2", *meeting, "--node-rank"]
    with (
        Server(folders[1], *arguments, "1") as second,
        Server(folders[0], *arguments, "0") as first,
    ):
        first.wait_ready()
        second.wait_ready()
        assert second.status("/v1/models") == 404
        assert "headrace::rank-1" in second.children()
        assert "headrace::rank-1" not in first.children()
        with first.post("/generate", {"text": PROMPTS, "sampling_params": GREEDY}) as response:
            assert ids(json.load(response)) == ids(alone[0])
        children = second.children()
        first.process.kill()
        assert second.process.wait(60) == 1
        assert "the machine of rank 0 does not answer any more" in second.text
        assert_nothing_is_left(second, children.values())


def test_machines_that_differ_say_so(tmp_path):
    """Both, before anything is loaded."""
    where = f"127.0.0.1:{free_port('127.0.0.1')}"
    arguments = ["--tp-size", "2", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", where]
    with Server(tmp_path, *arguments, "--quantization", "int8") as second:
        with pytest.raises(LoadError, match="rank 1 has another model, other options or another"):
            Engine(tp_size=2, nnodes=2, dist_init_addr=where)
        assert second.process.wait(60) == 1


def test_stages_give_the_bits_of_one_process(tmp_path, alone):
    """Also when a grammar masks what the last stage samples, and through another chunking.

    Each saves the weights that it holds.
    """
    with Engine(pp_size=2, chunked_prefill_size=3) as engine:
        greedy, drawn = ask(engine)
        assert scores(greedy) == scores(alone[0])
        assert ids(greedy) == ids(alone[0]) and ids(drawn) == ids(alone[1])
        schema = {**GREEDY, "json_schema": '{"enum": ["river", "mill"]}', "max_new_tokens": 30}
        assert json.loads(engine.generate("Name one:", schema)["text"]) in ("river", "mill")
        names = [f"model-rank-{rank}-part-0.safetensors" for rank in range(2)]
        assert engine.save_sharded_model(str(tmp_path)) == names
        assert all((tmp_path / name).is_file() for name in names)
        assert ids(engine.generate(PROMPTS, DRAWN)) == ids(alone[1])


def test_a_rank_that_cannot_load_says_so():
    with pytest.raises(LoadError, match="runs on one rank"):
        Engine(pp_size=2, model_impl="transformers")
