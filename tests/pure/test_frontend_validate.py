"""Every field of a request has bounds, and an error names the field and the limit."""

import math

import msgspec
import numpy as np
import pytest

from headrace.core.config import Limits
from headrace.core.errors import BadRequest, Overloaded, TooLong, Unsupported, WorkerLost
from headrace.core.messages import (
    FinishReason,
    GenerateRequest,
    LogprobSpec,
    SamplingParams,
    pack_ids,
    unpack_ids,
)
from headrace.frontend.validate import check_sampling, error_of, fit, validate

VOCAB = 100
LIMITS = Limits(max_total_tokens=256, max_running_requests=4, context_length=64, page_size=16)
SMALL_CACHE = Limits(max_total_tokens=32, max_running_requests=4, context_length=64, page_size=16)
PLAIN = SamplingParams(max_new_tokens=8)


def refusal(field, value):
    with pytest.raises(BadRequest) as caught:
        check_sampling(msgspec.structs.replace(PLAIN, **{field: value}), VOCAB)
    return caught.value


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", (0, 0.0, 1.5), (-0.1, math.nan, math.inf, 1e10)),
        ("top_p", (0.1, 1), (0.0, -1.0, 1.1, math.nan)),
        ("top_k", (-1, 1, 10**6), (0, -2)),
        ("min_p", (0.0, 1.0), (-0.1, 1.1)),
        ("frequency_penalty", (-2.0, 2.0), (-2.1, 2.1)),
        ("presence_penalty", (-2.0, 2.0), (-2.1, 2.1)),
        ("repetition_penalty", (0.01, 2.0), (0.0, -1.0, 2.1)),
        ("max_new_tokens", (None, 0, 5), (-1, 2**31)),
        ("min_new_tokens", (0, 8), (-1, 9)),
        ("stop", ((), ("a",) * 32), (("a",) * 33, ("",))),
        ("stop_regex", (("a+",), ()), (("(",), ("a",) * 33, ("a" * 257,))),
        ("stop_token_ids", ((5, 2**31 - 1),), ((-1,), (2**31,), tuple(range(257)))),
        ("logit_bias", ({0: -100.0, 99: 5}, {}), ({100: 1.0}, {-1: 1.0}, {0: math.nan})),
        ("seed", (0, -(2**63), 2**63 - 1), (2**63, -(2**63) - 1, 2**64)),
        ("stream_interval", (1, 100), (0, -1)),
    ],
)
def test_bounds_of_sampling_fields(field, good, bad):
    for value in good:
        check_sampling(msgspec.structs.replace(PLAIN, **{field: value}), VOCAB)
    for value in bad:
        assert field in refusal(field, value).message


def test_an_error_names_the_limit():
    assert refusal("top_p", 1.5).message == "top_p must be 0 to 1, not 1.5"
    assert refusal("top_k", 0).message == "top_k must be -1 (all) or at least 1, not 0"
    assert "min_new_tokens (9) is more than max_new_tokens (8)" in (
        refusal("min_new_tokens", 9).message
    )
    assert refusal("logit_bias", {100: 0.0}).message == "logit_bias must be 0 to 99, not 100"


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "hot"), ("stop", (1,)), ("ignore_eos", 3), ("logit_bias", {0: "x"})],
)
def test_what_the_scheduler_could_not_read_is_refused_here(field, value):
    assert refusal(field, value).message.startswith(f"{field}: Expected")


def request(**changes):
    return GenerateRequest(**{"rid": "r", "ids": pack_ids([1, 2, 3]), "sampling": PLAIN} | changes)


def test_a_good_request_keeps_what_it_has():
    given = request(stream=True, priority=3, namespace="x", logprobs=LogprobSpec(0, 5, (7,)))
    assert validate(given, VOCAB, LIMITS, truncate=False) == given


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rid": ""}, "rid must have 1 to 256"),
        ({"rid": "r" * 257}, "rid must have 1 to 256"),
        ({"namespace": "n" * 1025}, "cache_salt"),
        ({"priority": 2**31}, "priority must be"),
        ({"ids": b""}, "the prompt is empty"),
        ({"ids": pack_ids([1, 100])}, "input_ids holds 100; token ids of this model are 0 to 99"),
        ({"ids": pack_ids([-1])}, "input_ids holds -1"),
        ({"logprobs": LogprobSpec(3)}, "logprob_start_len must be -1 to 2"),
        ({"logprobs": LogprobSpec(-2)}, "logprob_start_len must be -1 to 2"),
        ({"logprobs": LogprobSpec(-1, 21)}, "top_logprobs_num must be 0 to 20"),
        ({"logprobs": LogprobSpec(-1, -1)}, "top_logprobs_num must be 0 to 20"),
        ({"logprobs": LogprobSpec(-1, 0, (100,))}, "token_ids_logprob must be 0 to 99"),
        ({"logprobs": LogprobSpec("x")}, "start: Expected `int`"),
    ],
)
def test_bounds_of_requests(changes, message):
    with pytest.raises(BadRequest) as caught:
        validate(request(**changes), VOCAB, LIMITS, truncate=False)
    assert message in caught.value.message


def sizes(count, wanted, limits=LIMITS, truncate=False):
    ids, most = fit(np.arange(count, dtype=np.int32), wanted, limits, truncate)
    assert ids.tolist() == list(range(len(ids)))
    return len(ids), most


def test_output_may_fill_the_context():
    assert sizes(10, None) == (10, 54)
    assert sizes(10, 54) == (10, 54)
    assert sizes(64, 0) == (64, 0)
    assert sizes(10, None, SMALL_CACHE) == (10, 22)


@pytest.mark.parametrize(
    ("count", "wanted", "limits", "message"),
    [
        (
            65,
            1,
            LIMITS,
            "The input (65 tokens) is longer than the model's context length (64 tokens).",
        ),
        (64, None, LIMITS, "add up to 65; the limit is 64 tokens, the model's context length."),
        (60, 5, LIMITS, "The input (60 tokens) and max_new_tokens (5) add up to 65; the limit"),
        (30, 5, SMALL_CACHE, "add up to 35; the limit is 32 tokens, the KV cache."),
    ],
)
def test_what_does_not_fit_is_told(count, wanted, limits, message):
    with pytest.raises(TooLong) as caught:
        sizes(count, wanted, limits)
    assert message in caught.value.message
    assert caught.value.code == "context_length_exceeded" and caught.value.status == 400


def test_cutting_must_be_asked_for():
    assert sizes(70, 5, truncate=True) == (63, 1)
    assert sizes(70, None, truncate=True) == (63, 1)
    assert sizes(70, 0, truncate=True) == (64, 0)
    assert sizes(60, 5, truncate=True) == (60, 4)
    assert sizes(10, 5, truncate=True) == (10, 5)
    cut = validate(request(ids=pack_ids(list(range(70)))), VOCAB, LIMITS, truncate=True)
    assert unpack_ids(cut.ids).tolist() == list(range(63))
    assert cut.sampling.max_new_tokens == 1


@pytest.mark.parametrize(
    ("finish", "kind"),
    [
        (FinishReason("stop", matched=3), None),
        (FinishReason("length", length=3), None),
        (FinishReason("abort", message="m"), None),
        (FinishReason("abort", message="m", status=499), None),
        (FinishReason("abort", message="m", status=400), BadRequest),
        (FinishReason("abort", message="m", status=503), Overloaded),
        (FinishReason("abort", message="m", status=501), Unsupported),
        (FinishReason("abort", message="m", status=500), WorkerLost),
    ],
)
def test_errors_of_ends(finish, kind):
    error = error_of(finish)
    assert (None if error is None else type(error)) is kind
    assert error is None or error.message == "m"
