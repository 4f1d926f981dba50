"""Logit processors: what each built-in does, who may be named, and that rows stay alone."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.core.errors import BadRequest, LoadError
from headrace.core.messages import GenerateRequest, SamplingParams, pack_ids
from headrace.core.plan import NewRow, ProcessedRows
from headrace.frontend.native import parse_generate
from headrace.frontend.validate import check_sampling
from headrace.processors import Facts
from headrace.processors.check import ProcessorCheck
from headrace.processors.registry import Registry
from headrace.processors.rows import ProcessedLogits
from headrace.text.tokenizer import Tokenizer
from tests.support.tokenizers import byte_level_bpe

TOKENIZER = Tokenizer(byte_level_bpe())
VOCAB = 400
FACTS = Facts(VOCAB, (7, 8), TOKENIZER)
MARKS = {"begin": "<a>", "end": "</a>"}


def registry(plugins=""):
    return Registry(plugins, lambda: FACTS)


def sampling(name, **params):
    return SamplingParams(custom_logit_processor=name, custom_params=params)


def allowed(name, prompt, output, **params):
    """The tokens that a processor leaves possible."""
    logits = np.zeros(VOCAB, dtype=np.float32)
    ids = [np.array(part, dtype=np.int32) for part in (prompt, output)]
    registry().make(sampling(name, **params))(logits, *ids)
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def test_disallowed_tokens():
    left = allowed("disallowed_tokens", [1], [2], token_ids=[3, 399])
    assert left == set(range(VOCAB)) - {3, 399}


def test_no_repeat_ngram():
    everything = set(range(VOCAB))
    prompt, output = [1, 2, 3, 1], [2, 4, 1, 2]
    assert allowed("no_repeat_ngram", prompt, output, ngram_size=3) == everything - {3, 4}
    kept = allowed("no_repeat_ngram", prompt, output, ngram_size=3, whitelist_token_ids=[4])
    assert kept == everything - {3}
    near = allowed("no_repeat_ngram", prompt, output, ngram_size=3, window_size=6)
    assert near == everything - {4}
    assert allowed("no_repeat_ngram", [1, 2], [], ngram_size=1) == everything - {1, 2}
    assert allowed("no_repeat_ngram", [1], [], ngram_size=3) == everything


def test_thinking_budget():
    """Marks of several tokens, opened by the prompt or by the output."""
    begin, end, everything = FACTS.ids("<a>"), FACTS.ids("</a>"), set(range(VOCAB))
    assert len(begin) > 1 < len(end)

    def after(prompt, output, most=4, least=2):
        limits = {"thinking_budget": most, "min_thinking": least, **MARKS}
        return allowed("thinking_budget", prompt, output, **limits)

    for before, lead in (([1, *begin], []), ([1], begin)):
        assert after(before, lead) == everything - {end[0], 7, 8}
        assert after(before, [*lead, 5, 5]) == everything
        for place, token in enumerate(end):
            assert after(before, [*lead, 5, 5, 5, 5, *end[:place]]) == {token}
        assert after(before, [*lead, 5, 5, 5, 5, *end]) == everything
        assert after(before, [*lead, 5, 5, *end, 5, 5, 5]) == everything
    assert after([1, *begin, 5, *end], [5] * 9) == everything
    assert after([1], [5] * 9) == everything


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("gASVCgAAAA==", {}, "code from requests is never run"),
        ("disallowed_tokens", {}, "missing required field `token_ids`"),
        ("disallowed_tokens", {"token_ids": [VOCAB]}, "0 to 399"),
        ("disallowed_tokens", {"token_ids": ["x"]}, "token_ids"),
        ("thinking_budget", {"thinking_budget": 1, "min_thinking": 2}, "min_thinking"),
        ("thinking_budget", {"thinking_budget": 1, "color": 2}, "color"),
        ("no_repeat_ngram", {"ngram_size": 0}, "ngram_size"),
        ("", {"token_ids": [1]}, "missing"),
    ],
)
def test_wrong_ones_are_refused_before_they_are_sent(name, params, words):
    check = ProcessorCheck(registry())
    with pytest.raises(BadRequest, match=words) as caught:
        check(GenerateRequest(rid="r", ids=pack_ids([1]), sampling=sampling(name, **params)))
    assert caught.value.field in ("custom_logit_processor", "custom_params")


def test_bodies_name_them_as_in_sglang():
    params = {"custom_params": {"token_ids": [1]}}
    body = {"text": "a", "sampling_params": params, "custom_logit_processor": "disallowed_tokens"}
    (request,) = parse_generate(body, SamplingParams()).requests
    assert request.sampling.custom_logit_processor == "disallowed_tokens"
    assert request.sampling.custom_params == {"token_ids": [1]}
    check_sampling(request.sampling, VOCAB)
    deep: list = []
    for _ in range(900):
        deep = [deep]
    for wrong in ({"a": deep}, {"a": [0] * 10_000}, {"a": 2**70}):
        with pytest.raises(BadRequest) as caught:
            check_sampling(SamplingParams(custom_params=wrong), VOCAB)
        assert caught.value.field == "custom_params"


class Tables:
    """Rows of a runner."""

    def __init__(self, rows):
        self.tokens = np.zeros((len(rows), 16), dtype=np.int32)
        self._specs = []
        for row, (prompt, output, chosen) in enumerate(rows):
            tokens = prompt + output
            self.tokens[row, : len(tokens)] = tokens
            self._specs.append(NewRow(row, pack_ids(tokens), len(prompt), chosen, seed=0))

    def spec(self, row):
        return self._specs[row]


def test_a_row_is_edited_as_if_it_were_alone():
    ngram = sampling("no_repeat_ngram", ngram_size=1)
    tables = Tables([([1, 2], [3], ngram), ([4], [5], SamplingParams()), ([6], [], ngram)])
    half, extra = ProcessedLogits(registry()), ProcessedRows([0, 2])
    rows, positions = np.array([2, 1, 0]), np.array([1, 2, 3])
    together = torch.zeros(3, VOCAB)
    half.edit(together, rows, positions, extra, tables)
    alone = torch.zeros(3, VOCAB)
    for i in range(3):
        half.edit(alone[i : i + 1], rows[i : i + 1], positions[i : i + 1], extra, tables)
    assert torch.equal(together, alone)
    forbidden = [torch.isinf(row).nonzero().flatten().tolist() for row in together]
    assert forbidden == [[6], [], [1, 2, 3]]


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "processors.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "polite.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = registry("polite=polite:Polite")
    logits = np.zeros(VOCAB, dtype=np.float32)
    own.make(sampling("polite", words=["the"]))(logits, np.array([1]), np.array([2]))
    assert np.flatnonzero(np.isinf(logits)).tolist() == FACTS.ids(" the")[:1]
    with pytest.raises(BadRequest, match="words must be a list"):
        own.make(sampling("polite", words="the"))
    sys.modules.pop("polite")


def test_plugins_of_the_operator(tmp_path, monkeypatch):
    """By place, or by the entry point of an installed package."""
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, params, facts): ...\n")
    package = tmp_path / "mine-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[headrace.logit_processors]\nnice = mine:Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = registry("own=mine:Mine, nice")
    assert type(found.make(sampling("own"))).__name__ == "Mine"
    assert type(found.make(sampling("nice"))).__name__ == "Mine"
    for wrong in ("x=nowhere:Class", "x=mine:Other", "other"):
        with pytest.raises(LoadError, match="--logit-processors"):
            registry(wrong)
    sys.modules.pop("mine")
