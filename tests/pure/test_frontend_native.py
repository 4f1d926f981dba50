"""The native protocol: bodies become requests, deltas become results, in SGLang's shapes."""

import pytest

from headrace.core.errors import BadRequest, Unsupported
from headrace.core.messages import (
    Delta,
    FinishReason,
    GenerateRequest,
    LogprobSpec,
    SamplingParams,
    TokenLogprobs,
    pack_ids,
    unpack_ids,
)
from headrace.frontend.native import NativeResult, parse_generate
from headrace.frontend.sampling import native_defaults, openai_defaults, read_sampling
from headrace.frontend.validate import check_sampling
from tests.support.fake_scheduler import config, model_info

DEFAULTS = SamplingParams()


def parse(**body):
    return parse_generate(body, DEFAULTS)


def refusal(kind=BadRequest, **body):
    with pytest.raises(kind) as caught:
        parse(**body)
    return caught.value


def test_one_text():
    call = parse(text="hi", sampling_params={"temperature": 0, "stop": "x", "sampling_seed": 4})
    (request,) = call.requests
    assert not call.as_list and not call.stream
    assert request.text == "hi" and request.ids == b"" and len(request.rid) == 32
    assert request.sampling == SamplingParams(temperature=0.0, stop=("x",), seed=4)
    assert request.logprobs is None and request.namespace == "" and request.priority is None


def test_one_list_of_ids():
    call = parse(input_ids=[1, 2, 3], rid="me", stream=True, priority=2, cache_salt="s")
    (request,) = call.requests
    assert not call.as_list and call.stream and request.stream
    assert unpack_ids(request.ids).tolist() == [1, 2, 3]
    assert (request.rid, request.priority, request.namespace) == ("me", 2, "s\0")


def test_a_batch_takes_one_value_or_one_for_each():
    call = parse(
        input_ids=[[1], [2, 3]],
        rid="me",
        sampling_params=[{"top_k": 1}, {"top_k": 2}],
        return_logprob=[False, True],
        logprob_start_len=0,
        top_logprobs_num=[0, 2],
        token_ids_logprob=[5, 6],
        extra_key=["a", None],
        cache_salt="s",
    )
    one, two = call.requests
    assert call.as_list
    assert (one.rid, two.rid) == ("me_0", "me_1")
    assert (one.sampling.top_k, two.sampling.top_k) == (1, 2)
    assert one.logprobs is None
    assert two.logprobs == LogprobSpec(0, 2, (5, 6))
    assert (one.namespace, two.namespace) == ("s\0a", "s\0")


def test_a_list_of_one_is_still_a_list():
    call = parse(text=["a"])
    assert call.as_list and [request.text for request in call.requests] == ["a"]


def test_samples_follow_their_prompt():
    call = parse(text=["a", "b"], rid=["x", "y"], sampling_params={"n": 2})
    assert call.as_list
    assert [(r.rid, r.group, r.sample_index, r.text, r.sampling.n) for r in call.requests] == [
        ("x_0", "x_0", 0, "a", 1),
        ("x_1", "x_0", 1, "a", 1),
        ("y_0", "y_0", 0, "b", 1),
        ("y_1", "y_0", 1, "b", 1),
    ]
    assert parse(text="a", sampling_params={"n": 2}).as_list


def test_token_ids_may_differ_by_prompt():
    call = parse(text=["a", "b"], return_logprob=True, token_ids_logprob=[[1], [2, 3]])
    assert [request.logprobs.ids for request in call.requests] == [(1,), (2, 3)]


def test_both_spellings_of_top_logprobs():
    for name in ("top_logprobs_num", "top_logprobs"):
        (request,) = parse(text="a", return_logprob=True, **{name: 3}).requests
        assert request.logprobs == LogprobSpec(-1, 3)


def test_unknown_fields_of_the_body_are_ignored_but_not_those_of_sampling():
    assert len(parse(text="a", log_metrics=True, nothing="known").requests) == 1
    error = refusal(text="a", sampling_params={"temprature": 1})
    assert error.message == "sampling_params has no field 'temprature'"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "exactly one of text and input_ids"),
        ({"text": "a", "input_ids": [1]}, "exactly one of text and input_ids"),
        ({"text": []}, "a batch has 1 to 4096 prompts, not 0"),
        ({"text": ["a"] * 4097}, "a batch has 1 to 4096 prompts, not 4097"),
        ({"text": 5}, "text: Expected"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [[1], []]}, "input_ids is empty"),
        ({"input_ids": [1, [2]]}, "input_ids mixes"),
        ({"input_ids": [[1], 2]}, "input_ids mixes"),
        ({"input_ids": [1.5]}, "input_ids[0]: Expected"),
        ({"input_ids": [True]}, "input_ids[0]: Expected"),
        ({"input_ids": [2**40]}, "no token id"),
        ({"text": "a", "rid": ["x"]}, "rid is a list, but there is one prompt"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid has 1 items for 2 prompts"),
        ({"text": ["a"], "sampling_params": [{}, {}]}, "sampling_params has 2 items for 1"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params is a list"),
        ({"text": "a", "priority": "high"}, "priority: Expected"),
        ({"text": "a", "sampling_params": {"n": 0}}, "n must be 1 to 128, not 0"),
        ({"text": "a", "sampling_params": {"n": 10**9}}, "n must be 1 to 128"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "temperature: Expected"),
        ({"text": ["a"], "token_ids_logprob": [1, [2]]}, "token_ids_logprob mixes"),
    ],
)
def test_wrong_bodies(body, message):
    assert message in refusal(**body).message


@pytest.mark.parametrize(
    "body",
    [
        {"lora_path": "x"},
        {"image_data": ["x"]},
        {"input_embeds": [[0.1]]},
        {"return_hidden_states": True},
        {"sampling_params": {"beam_width": 4}},
    ],
)
def test_what_cannot_be_honored_is_refused(body):
    assert refusal(Unsupported, text="a", **body).status == 501


def test_empty_values_of_refused_fields_are_harmless():
    parse(text="a", lora_path=None, image_data=[], sampling_params={"regex": None, "ebnf": ""})


def test_defaults_lie_under_the_request():
    serve = config(preferred_sampling_params='{"temperature": 0.3, "top_k": 7}').serve
    defaults = native_defaults(serve)
    found = read_sampling({"top_k": 9, "max_new_tokens": None, "top_p": None}, defaults)
    assert (found.temperature, found.top_k, found.top_p) == (0.3, 9, 1.0)
    assert found.max_new_tokens is None
    with pytest.raises(BadRequest, match="preferred-sampling-params must be a JSON object"):
        native_defaults(config(preferred_sampling_params="[1]").serve)


def test_the_checkpoint_has_defaults_for_the_other_protocols():
    info = model_info()
    info.generation.update(temperature=0.6, top_k=0, top_p=0.9, do_sample=True)
    found = openai_defaults(config(preferred_sampling_params='{"top_p": 0.5}').serve, info)
    assert (found.temperature, found.top_k, found.top_p) == (0.6, -1, 0.5)
    plain = openai_defaults(config(sampling_defaults="openai").serve, info)
    assert plain == SamplingParams()


def request(**changes):
    return GenerateRequest(**{"rid": "r", "ids": pack_ids([1, 2])} | changes)


def test_results_are_cumulative():
    result = NativeResult(request())
    result.add(Delta("r", [5], "a", prompt_tokens=2, completion_tokens=1, cached_tokens=1))
    first = result.to_dict()
    result.add(
        Delta(
            "r",
            [6, 7],
            "bc",
            FinishReason("stop", matched=7),
            prompt_tokens=2,
            completion_tokens=3,
            cached_tokens=1,
            retractions=1,
            queue_time=0.25,
            first_token_time=0.5,
        )
    )
    last = result.to_dict()
    assert (first["text"], first["output_ids"]) == ("a", [5])
    assert first["meta_info"] == {
        "id": "r",
        "finish_reason": None,
        "prompt_tokens": 2,
        "completion_tokens": 1,
        "cached_tokens": 1,
        "reasoning_tokens": 0,
        "weight_version": "default",
        "num_retractions": 0,
    }
    assert (last["text"], last["output_ids"]) == ("abc", [5, 6, 7])
    meta = last["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": 7}
    assert (meta["completion_tokens"], meta["num_retractions"]) == (3, 1)
    assert (meta["queue_time"], meta["first_token_latency"]) == (0.25, 0.5)
    assert meta["e2e_latency"] > 0


def test_incremental_results_have_only_what_is_new():
    result = NativeResult(request(logprobs=LogprobSpec()), incremental=True)
    result.add(Delta("r", [5], "a", logprobs=TokenLogprobs([5], [-0.5])))
    result.to_dict()
    result.add(Delta("r", [6], "b", completion_tokens=2, logprobs=TokenLogprobs([6], [-0.25])))
    last = result.to_dict()
    assert (last["text"], last["output_ids"]) == ("b", [6])
    assert last["meta_info"]["output_token_logprobs"] == [(-0.25, 6, None)]
    assert last["meta_info"]["completion_tokens"] == 2


def test_logprobs_of_all_kinds():
    spec = LogprobSpec(0, 2, (3,))
    result = NativeResult(request(logprobs=spec), token_text=lambda token: f"<{token}>")
    result.add(
        Delta(
            "r",
            [8],
            "x",
            logprobs=TokenLogprobs([8], [-0.5], [[(8, -0.5), (9, -1.0)]], [[(3, -4.0)]]),
            input_logprobs=TokenLogprobs(
                [1, 2], [None, -1.5], [None, [(2, -1.5), (4, -2.0)]], [None, [(3, -3.0)]]
            ),
        )
    )
    meta = result.to_dict()["meta_info"]
    assert meta["input_token_logprobs"] == [(None, 1, "<1>"), (-1.5, 2, "<2>")]
    assert meta["output_token_logprobs"] == [(-0.5, 8, "<8>")]
    assert meta["output_token_logprobs_length"] == 1
    assert meta["input_top_logprobs"] == [None, [(-1.5, 2, "<2>"), (-2.0, 4, "<4>")]]
    assert meta["output_top_logprobs"] == [[(-0.5, 8, "<8>"), (-1.0, 9, "<9>")]]
    assert meta["input_token_ids_logprobs"] == [None, [(-3.0, 3, "<3>")]]
    assert meta["output_token_ids_logprobs"] == [[(-4.0, 3, "<3>")]]


def test_prompt_ids_on_request():
    assert NativeResult(request(), prompt_token_ids=True).to_dict()["prompt_token_ids"] == [1, 2]


def test_results_do_not_share_lists():
    result = NativeResult(request())
    result.add(Delta("r", [5], "a"))
    first = result.to_dict()
    result.add(Delta("r", [6], "b"))
    assert first["output_ids"] == [5]


@pytest.mark.parametrize(
    ("given", "grammars"),
    [
        ({"regex": "a+"}, [("regex", "a+")]),
        ({"json_schema": '{"type": "null"}'}, [("json_schema", '{"type": "null"}')]),
        ({"json_schema": {"type": "null"}}, [("json_schema", '{"type":"null"}')]),
        ({"json_schema": {}}, [("json_schema", "{}")]),
        ({"ebnf": "", "regex": None}, []),
    ],
)
def test_grammars(given, grammars):
    assert read_sampling(given, SamplingParams()).grammars == grammars


def test_one_grammar_at_most():
    sampling = read_sampling({"regex": "a", "json_schema": "{}"}, SamplingParams())
    with pytest.raises(BadRequest, match="at most one"):
        check_sampling(sampling, 100)
