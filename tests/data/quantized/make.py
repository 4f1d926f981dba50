"""Writes tests/data/quantized with GPTQModel 7.7.0 on a CPU: tiny checkpoints, and beside each the
matrices as GPTQModel itself dequantizes them. Run by hand; the tests read what it wrote.

    GPTQMODEL_CPU_WORKERS=2 python tests/data/quantized/make.py

Needs `pip install gptqmodel`, which tests do not.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

OUT = Path(__file__).parent
CASES = {
    "gptq-4-act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptq-4-v2": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "gptq-8": {"bits": 8, "group_size": 32, "sym": False},
    "gptq-3": {"bits": 3, "group_size": -1},
    "awq": {"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm"},
}
KEPT = ("config.json", "model.safetensors")


def make_base(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.6 / weight.shape[1] ** 0.5)
    model.half().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(101)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="t2", pad_token="t0"
    ).save_pretrained(folder)


def make(name: str, base: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 101, (128,), generator=generator).tolist() for _ in range(16)]
    fields = {"act_group_aware": False, "offload_to_disk": False, **CASES[name]}
    if "quant_method" in fields:
        del fields["act_group_aware"]
    model = GPTQModel.load(str(base), QuantizeConfig(**fields), device="cpu")
    model.quantize([{"input_ids": ids, "attention_mask": [1] * 128} for ids in rows], batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        (OUT / name).mkdir(exist_ok=True)
        for kept in KEPT:
            shutil.copy(Path(folder) / kept, OUT / name / kept)
        config = json.loads((OUT / name / "config.json").read_text())
        meta = config["quantization_config"]["meta"]
        config["quantization_config"]["meta"] = {"quantizer": meta["quantizer"]}
        (OUT / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        awq = "quant_method" in fields
        loaded = GPTQModel.load(
            folder,
            backend=BACKEND.TORCH_AWQ if awq else BACKEND.TORCH,
            device="cpu",
            dtype=torch.float16,  # of the scales; GPTQModel would round them to bfloat16
        )
        save_file(dequantized(loaded.model, awq), OUT / f"{name}.safetensors")


def dequantized(model: torch.nn.Module, awq: bool) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight") and name.split(".")[-1] in ("q_proj", "down_proj"):
            if awq:
                from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

                weight = dequantize_gemm(
                    module.qweight, module.qzeros, module.scales, 4, module.group_size
                )
            else:
                weight = module.dequantize_weight()
            found[name] = weight.T.contiguous()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))
        for case in CASES:
            make(case, Path(folder))
