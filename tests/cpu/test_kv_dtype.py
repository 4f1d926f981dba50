"""What a narrow KV cache costs in accuracy, on the demo model, and which names it has."""

import pytest
import torch
from torch import Tensor

from headrace.assets import demo_model_path
from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.runner.pool import kv_dtype
from tests.support.paged import run_all

# Mean KL divergence of next-token distributions from those with fp32 keys and values, in nats. A
# stored number is off by at most 2^-9 (bf16), 2^-4 (fp8 e4m3) of itself, or 1/254 of the largest of
# its head (int8); KL grows with the square of that, so each limit is about the square of its error.
LIMITS = {"bf16": 2e-5, "fp8_e4m3": 1e-2, "int8": 2e-4}


def scores(kv: str) -> Tensor:
    """fp32 log-probabilities [tokens, vocab] after every token of two texts."""
    torch.set_num_threads(1)
    info = read_model_info(demo_model_path())
    model = load_model(info, torch.float32, SoloGroup(), "auto")
    made = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, info.vocab_size, (n,), generator=made).tolist() for n in (150, 70)]
    logits = run_all(model, texts, dtype=kv_dtype(kv, torch.float32))
    return torch.log_softmax(torch.cat(logits), dim=-1)


def test_next_tokens_stay_close_to_those_of_fp32() -> None:
    exact = scores("auto")
    found = {}
    for kv in LIMITS:
        other = scores(kv)
        found[kv] = float((exact.exp() * (exact - other)).sum(-1).mean())
    assert all(0 < found[kv] < limit for kv, limit in LIMITS.items()), found


@pytest.mark.parametrize("name", ["fp8_e5m2", "int4", ""])
def test_unknown_types_are_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequest, match=r"kv.cache.dtype.*fp8_e4m3.*int8"):
        Config.from_flat({"model_path": "x", "kv_cache_dtype": name})
