"""Writes the bitsandbytes checkpoints of this folder with transformers and bitsandbytes 0.50 on a
CPU, and beside each what bitsandbytes dequantizes: of 4 bits a matrix whose rows are whole blocks,
as its CPU kernel takes the scales of other blocks where they are not. Run by hand.

    python tests/data/quantized/make_bitsandbytes.py
"""

import shutil
import tempfile
from pathlib import Path

import bitsandbytes.functional as F
import torch
import transformers
from safetensors.torch import save_file

OUT = Path(__file__).parent
CASES = {
    "bnb-nf4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True
    },
    "bnb-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb-int8": {"load_in_8bit": True},
}  # fmt: skip


def make_base(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.6 / weight.shape[1] ** 0.5)
    model.bfloat16().save_pretrained(folder)


def make(name: str, base: Path) -> None:
    config = transformers.BitsAndBytesConfig(**CASES[name])
    model = transformers.LlamaForCausalLM.from_pretrained(
        base, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    found = {}
    for module, layer in model.named_modules():
        if module.endswith("q_proj") or (name == "bnb-int8" and module.endswith("down_proj")):
            weight = layer.weight
            if name == "bnb-int8":
                found[module] = F.int8_vectorwise_dequant(weight.data, weight.SCB).float()
            else:
                weight.quant_state.dtype = torch.float32
                found[module] = F.dequantize_4bit(weight.data, weight.quant_state)
    save_file(
        {key: value.contiguous() for key, value in found.items()}, OUT / f"{name}.safetensors"
    )
    for layer in model.modules():
        if hasattr(layer, "weight") and hasattr(layer.weight, "quant_state"):
            layer.weight.quant_state.dtype = torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        (OUT / name).mkdir(exist_ok=True)
        for kept in ("config.json", "model.safetensors"):
            shutil.copy(Path(folder) / kept, OUT / name / kept)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))
        for case in CASES:
            make(case, Path(folder))
