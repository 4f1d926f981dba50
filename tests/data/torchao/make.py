"""Writes the checkpoints beside it: `python make.py`, with torchao 0.18 and transformers 5.

torchao makes every import of transformers slower, so tests read what it wrote once. `values` are
what its tensors dequantize to.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

CONFIGS = {
    "int8": Int8WeightOnlyConfig(version=2),
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig(version=2),
    "float8": Float8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}

if __name__ == "__main__":
    folder = Path(__file__).parent
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    plain = folder / "plain"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
    for name, kind in CONFIGS.items():
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=TorchAoConfig(kind), dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        values = {
            f"{module}.weight": layer.weight.dequantize().detach()
            for module, layer in model.named_modules()
            if module.endswith("_proj")
        }
        save_file(values, folder / name / "values")
    for path in plain.iterdir():
        path.unlink()
    plain.rmdir()
