"""How much memory a start takes beside the model itself, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.ops import cpu

_CHILD = """
import dataclasses, json, pathlib, sys
from headrace.core.config import CacheOptions, Config, ModelOptions
from headrace.core.resolve import resolve
from headrace.core.hardware import detect
from headrace.core.model_info import read_model_info
from headrace.runner.worker import build_runner

def resident(key):
    text = pathlib.Path("/proc/self/status").read_text().split(key + ":")[1]
    return int(text.split()[0]) << 10

pathlib.Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
asked = Config(
    model=ModelOptions(model_path=sys.argv[1], load_format=sys.argv[2]),
    cache=CacheOptions(max_total_tokens=1024),
)
info = read_model_info(pathlib.Path(sys.argv[1]))
hardware = detect()
config, _ = resolve(asked, info, hardware)
_, plan = build_runner(config, info, hardware)
peak, after = resident("VmHWM") - before, resident("VmRSS") - before
print(json.dumps({"weights": plan.weights, "cache": plan.cache, "peak": peak, "after": after}))
"""


@pytest.mark.slow
@pytest.mark.skipif(cpu.LIBRARY is None, reason="without native kernels nothing is packed")
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_start_needs_one_tensor_above_the_model(tmp_path: Path, load_format: str) -> None:
    """The largest tensor is the embedding, 67 MB of 235 MB."""
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").bfloat16().tie_weights()
    model.save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path), load_format],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    sizes = json.loads(result.stdout)
    stored = sum(p.numel() * 2 for p in model.parameters())
    largest = config.vocab_size * config.hidden_size * 2
    assert stored <= sizes["weights"] <= stored * 1.01
    # Beside weights and cache: libraries that are first used now, buffers of a step.
    rest = sizes["cache"] + (60 << 20)
    assert sizes["peak"] <= sizes["weights"] + largest + rest, sizes
    assert sizes["after"] <= sizes["weights"] + rest, sizes
