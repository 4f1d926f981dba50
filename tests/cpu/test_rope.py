"""Rotary frequencies against transformers, on the configurations of real models."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headrace.layers.batch import ForwardBatch
from headrace.layers.rope import Rope, prefix_scope
from headrace.layers.rope_scaling import attention_factor, inverse_frequencies, read_rope
from headrace.ops.meta import AttentionMeta

#: name -> (head_dim, config.json fields)
REAL: dict[str, tuple[int, dict[str, Any]]] = {
    "llama-3.1": (
        128,
        {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen2.5-yarn": (
        128,
        {
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
    ),
    "yarn-factor-given": (
        64,
        {
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "attention_factor": 1.25,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "phi3-longrope": (
        96,
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0 + i / 50 for i in range(48)],
                "long_factor": [1.0 + i for i in range(48)],
            },
        },
    ),
    "vicuna-16k": (
        128,
        {
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
    ),
    "dynamic": (
        128,
        {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "gemma4-proportional": (
        256,
        {
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "proportional",
                "rope_theta": 1000000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "partial-linear": (
        80,
        {
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
    ),
}


def oracle(head_dim: int, hf: dict[str, Any], length: int | None) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(num_attention_heads=4, hidden_size=4 * head_dim, **hf)
    kind = config.rope_parameters["rope_type"]
    given = None if length is None else torch.tensor(length)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=given)
    return frequencies, factor


@pytest.mark.parametrize("length", [None, 1, 4096, 4097, 100_000])
@pytest.mark.parametrize("name", REAL)
def test_frequencies_are_those_of_transformers(name: str, length: int | None) -> None:
    head_dim, hf = REAL[name]
    spec = read_rope(hf, head_dim)
    theirs, factor = oracle(head_dim, hf, length)
    ours = inverse_frequencies(spec, torch.tensor([length or 1]))
    torch.testing.assert_close(ours.view(-1), theirs.view(-1), rtol=1e-6, atol=0)
    assert attention_factor(spec) == pytest.approx(factor, rel=1e-12)
    assert spec.dim == 2 * len(theirs.view(-1))


def test_every_scaling_of_transformers_is_known() -> None:
    for kind in ROPE_INIT_FUNCTIONS:
        known = any(read_rope(hf, dim).kind == kind for dim, hf in REAL.values())
        assert known, kind


def batch(positions: list[int], prompt_lens: list[int] | None = None) -> ForwardBatch:
    """One chunk of consecutive positions per call, or several of one token each."""
    chunks = [positions] if prompt_lens is None else [[position] for position in positions]
    counts = torch.tensor([len(chunk) for chunk in chunks])
    meta = AttentionMeta(
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        rows=torch.zeros(len(chunks), dtype=torch.int32),
        query_start=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
        context=torch.tensor([chunk[-1] + 1 for chunk in chunks], dtype=torch.int32),
        slots=torch.zeros(len(positions), dtype=torch.int64),
        page_size=1,
    )
    return ForwardBatch(
        ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        meta=meta,
        caches=[],
        prompt_lens=prompt_lens and torch.tensor(prompt_lens, dtype=torch.int32),
    )


def test_table_rows_never_change_as_the_table_grows() -> None:
    head_dim, hf = REAL["llama-3.1"]
    grown, at_once = Rope(read_rope(hf, head_dim)), Rope(read_rope(hf, head_dim))
    positions = [0, 5, 2047, 2048, 4500, 9000]
    first = [grown.prepare(batch([position])) for position in positions]
    assert torch.equal(torch.cat(first), at_once.prepare(batch(positions)))
    assert torch.equal(grown.prepare(batch(positions)), torch.cat(first))
    assert 9000 < len(grown.table) < 20_000


def test_length_counts_for_prompt_tokens_and_position_after_it() -> None:
    head_dim, hf = REAL["phi3-longrope"]
    spec = read_rope(hf, head_dim)
    rope = Rope(spec)
    mixed = batch([10, 10, 4095, 4096], [11, 5000, 11, 11])
    assert mixed.lengths().tolist() == [11, 5000, 4096, 4097]
    short, long = inverse_frequencies(spec, torch.tensor([4096, 4097]))
    expected = zip((10, 10, 4095, 4096), (short, long, short, long), strict=True)
    for row, (position, frequencies) in zip(rope.prepare(mixed), expected, strict=True):
        angle = (position * frequencies).double()
        exact = torch.cat((angle.cos(), angle.sin())) * rope.scale
        torch.testing.assert_close(row.double(), exact, atol=1e-6, rtol=0)


def test_chunks_of_a_prompt_turn_like_the_whole_prompt() -> None:
    """With the prompt's length known, chunking changes nothing, to the last bit."""
    head_dim, hf = REAL["phi3-longrope"]
    rope = Rope(read_rope(hf, head_dim))
    positions = [0, 7, 4000, 4999]
    whole = rope.prepare(batch(positions, [5000] * 4))
    for index, position in enumerate(positions):
        assert torch.equal(rope.prepare(batch([position], [5000]))[0], whole[index])


@pytest.mark.parametrize(
    ("name", "boundary"), [("llama-3.1", None), ("phi3-longrope", 4096), ("dynamic", 2048)]
)
def test_prompts_with_other_frequencies_share_no_prefixes(name: str, boundary: int | None) -> None:
    head_dim, hf = REAL[name]
    spec = read_rope(hf, head_dim)
    assert prefix_scope(spec, boundary or 100_000) == ""
    if boundary is not None:
        beyond, further = prefix_scope(spec, boundary + 1), prefix_scope(spec, boundary + 2)
        assert beyond and (beyond == further) == (spec.kind == "longrope")
