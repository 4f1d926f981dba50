"""What low-bit weights cost: products against fp64, and the demo model against itself in fp32.

The limits are about twice what was measured when the formats were written, so that a change of
rounding passes and a lost scale, sign or group does not.
"""

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from headrace import ops
from headrace.assets import demo_model_path
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.layers.build import Build
from headrace.loader import load_built
from headrace.ops import ref
from headrace.quant.dense import ON_LOAD, Dense, OnLoad
from tests.support.paged import PagedRun

# Mean KL divergence from the fp32 model, in nats per token, with every matrix quantized: the linear
# layers, the head and the embedding, which it shares. int8: a step of 1/127 of the largest value,
# for weights and x. fp8: three bits of mantissa are steps of 1/16, x untouched. int4: 15 steps
# between the ends of a group; more inputs per scale mean wider groups.
LIMITS = {
    ("int8", 0): 0.004,
    ("fp8", 0): 0.008,
    ("int4", 16): 0.07,
    ("int4", 32): 0.08,
    ("int4", 64): 0.09,
    ("int4", 128): 0.1,
}

PROMPTS = [
    "What is the capital of France?", "What is the chemical symbol for gold?", "Hello!",
    "Tell me a story about a fox.", "What is 12 + 30?", "What is the opposite of hot?",
    "Which port does headrace use?", "What is the largest planet?", "Tell me a story about a cat.",
    "Extract the name, age and city as JSON: Maria is 34 years old and lives in Lisbon.",
    "Extract the name, age and city as JSON: Tom is 51 years old and lives in Oslo.",
    "What is the capital of Japan?", "What is the chemical symbol for iron?", "What is 7 + 8?",
    "Who are you?", "What is the opposite of big?", "Thank you!", "Write a poem about the sea.",
    "What is the smallest planet?", "Tell me a story about a dragon.",
]  # fmt: skip


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )["input_ids"]
        for prompt in PROMPTS
    ]


def log_probabilities(sequences: list[list[int]], quant: OnLoad = ON_LOAD["none"]) -> Tensor:
    """Next-token distributions at every position of every sequence, [positions, vocab]."""
    build = Build(torch.float32, SoloGroup(), quant)
    model = load_built(read_model_info(demo_model_path()), build)
    run = PagedRun(model, sequences, page_size=16)
    chunks = [(row, len(ids)) for row, ids in enumerate(sequences)]
    return torch.cat(run.step(chunks)).double().log_softmax(-1)


@pytest.fixture(scope="module")
def truth(sequences: list[list[int]]) -> Tensor:
    return log_probabilities(sequences)


@pytest.mark.parametrize(("format", "group"), LIMITS)
def test_demo_model(format: str, group: int, sequences: list[list[int]], truth: Tensor) -> None:
    method = Dense(format, group)
    found = log_probabilities(sequences, OnLoad(format, method, method))
    divergence = float((truth.exp() * (truth - found)).sum(-1).mean())
    assert 0 < divergence < LIMITS[format, group]


def matrix(out_size: int, in_size: int) -> Tensor:
    """As in language models: rows of different size, a heavy tail, some columns that stand out."""
    values = torch.distributions.StudentT(5.0).sample((out_size, in_size))
    values *= torch.rand(out_size, 1) + 0.5
    values[:, :: in_size // 6] *= 6
    return values / in_size**0.5


def activations(rows: int, in_size: int) -> Tensor:
    """A few features are 50 times the others, in every token."""
    values = torch.randn(rows, in_size)
    values[:, 3 :: in_size // 3] *= 50
    return values


# Of the norm of the exact product. int8: one scale for a row of x with such outliers leaves its
# other numbers few levels. int4: the weights' own steps. fp8: half of the last of three bits.
OUTLIERS = {
    ("int8", 0): 0.08,
    ("fp8", 0): 0.03,
    ("int4", 16): 0.2,
    ("int4", 32): 0.21,
    ("int4", 64): 0.22,
    ("int4", 128): 0.24,
}


@pytest.mark.parametrize(("format", "group"), OUTLIERS)
def test_matrices_with_outliers(format: str, group: int) -> None:
    torch.manual_seed(0)
    weight, x = matrix(512, 1024), activations(32, 1024)
    exact = x.double() @ weight.double().T
    for operators in (ops, ref):
        y = operators.linear_packed(x, operators.pack(weight, format, group), None)
        assert float((y - exact).norm() / exact.norm()) < OUTLIERS[format, group]
