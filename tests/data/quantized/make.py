"""Writes the checkpoints of this folder with the tools that people use, on a CPU, and beside each
matrices as the tool itself dequantizes them. Run by hand, with the tools that tests do without:

    python tests/data/quantized/make.py gptqmodel      # GPTQModel 7.7.0
    python tests/data/quantized/make.py bitsandbytes   # bitsandbytes 0.50, transformers 5
    python tests/data/quantized/make.py llmcompressor  # llm-compressor 0.14.0.1
    python tests/data/quantized/make.py auto-round     # AutoRound 0.16.1, read back by GPTQModel
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

OUT = Path(__file__).parent
VOCAB = 101
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 256}  # fmt: skip
GPTQMODEL: dict[str, dict[str, Any]] = {
    "gptq-4-act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptq-4-v2": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "gptq-8": {"bits": 8, "group_size": 32, "sym": False},
    "gptq-3": {"bits": 3, "group_size": -1},
    "awq": {"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm"},
    "gptq-experts": {"bits": 4, "group_size": 16, "desc_act": True},
}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "bnb-nf4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True
    },
    "bnb-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb-int8": {"load_in_8bit": True},
}  # fmt: skip
LLMCOMPRESSOR: dict[str, dict[str, Any]] = {
    "llmc-w4": {"bits": 4, "strategy": "group", "group_size": 16, "actorder": "weight"},
    "llmc-w8-groups": {"bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    "llmc-w8a8": {"scheme": "W8A8"},
    "llmc-fp8-blocks": {"scheme": "FP8_BLOCK"},
    "llmc-fp8-kv": {"scheme": "FP8", "kv": True},
}
AUTO_ROUND: dict[str, dict[str, Any]] = {
    "autoround-gptq": {"format": "auto_gptq", "sym": True},
    "autoround-awq": {"format": "auto_awq", "sym": False},
}


def make_base(folder: Path, dtype: torch.dtype = torch.float16, **changes: Any) -> None:
    """A model whose attention is far from uniform, with a tokenizer, as some tools want one."""
    experts = changes.pop("experts", False)
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    kind = "Qwen3Moe" if experts else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        **SIZES | {"intermediate_size": 128} | (own if experts else {}) | changes
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.6 / weight.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="t2", pad_token="t0"
    ).save_pretrained(folder)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (128,), generator=generator).tolist() for _ in range(16)]


def keep(name: str, folder: Path, values: dict[str, torch.Tensor]) -> None:
    """What the tests read of the checkpoint in `folder`."""
    shutil.rmtree(OUT / name, ignore_errors=True)
    (OUT / name).mkdir()
    shutil.copy(folder / "model.safetensors", OUT / name)
    config = json.loads((folder / "config.json").read_text())
    meta = config["quantization_config"].get("meta")
    if meta:  # paths and times
        config["quantization_config"]["meta"] = {"quantizer": meta["quantizer"]}
    (OUT / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({key: v.contiguous() for key, v in values.items()}, OUT / f"{name}.safetensors")


def gptqmodel(folder: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    make_base(folder / "base")
    make_base(folder / "experts", experts=True)
    for name, fields in chosen(GPTQMODEL):
        awq = "quant_method" in fields
        own = {"offload_to_disk": False} | ({} if awq else {"act_group_aware": False}) | fields
        base = folder / ("experts" if name == "gptq-experts" else "base")
        model = GPTQModel.load(str(base), QuantizeConfig(**own), device="cpu")
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts()]
        model.quantize(rows, batch_size=1)
        model.save(str(folder / name))
        keep(name, folder / name, read_by_gptqmodel(folder / name, awq))


def read_by_gptqmodel(folder: Path, awq: bool) -> dict[str, torch.Tensor]:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
    # The dtype of the scales: GPTQModel would round them to bfloat16.
    loaded = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16)
    found = {}
    for name, module in loaded.model.named_modules():
        if not hasattr(module, "qweight") or name.split(".")[-1] not in ("q_proj", "down_proj"):
            continue
        if awq:
            weight = dequantize_gemm(
                module.qweight, module.qzeros, module.scales, 4, module.group_size
            )
        else:
            weight = module.dequantize_weight()
        found[name] = weight.T
    return found


def bitsandbytes(folder: Path) -> None:
    make_base(folder / "base", torch.bfloat16, intermediate_size=96, num_key_value_heads=2)
    for name, fields in chosen(BITSANDBYTES):
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder / "base",
            quantization_config=transformers.BitsAndBytesConfig(**fields),
            device_map="cpu",
            dtype=torch.bfloat16,
        )
        values = read_by_bitsandbytes(model, name == "bnb-int8")
        model.save_pretrained(folder / name)
        keep(name, folder / name, values)


def read_by_bitsandbytes(model: torch.nn.Module, int8: bool) -> dict[str, torch.Tensor]:
    """Of 4 bits a matrix whose rows are whole blocks: its CPU kernel takes the scales of other
    blocks where they are not."""
    import bitsandbytes.functional as F

    found = {}
    for name, layer in model.named_modules():
        if int8 and name.endswith(("q_proj", "down_proj")):
            found[name] = F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()
        elif name.endswith("q_proj"):
            state = layer.weight.quant_state
            state.dtype, usual = torch.float32, state.dtype
            found[name] = F.dequantize_4bit(layer.weight.data, state)
            state.dtype = usual
    return found


def llmcompressor(folder: Path) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    make_base(folder / "base")
    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * 128} for ids in texts()])
    for name, fields in chosen(LLMCOMPRESSOR):
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        oneshot(
            model=model,
            dataset=rows,
            recipe=llmcompressor_recipe(fields),
            max_seq_length=128,
            num_calibration_samples=len(rows),
            output_dir=str(folder / name),
        )
        keep(name, folder / name, read_by_compressed_tensors(folder / name))


def llmcompressor_recipe(fields: dict[str, Any]) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    usual = {"targets": "Linear", "ignore": ["lm_head"]}
    if "scheme" in fields:
        kv = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
        own = {"kv_cache_scheme": kv | {"dynamic": False}} if fields.get("kv") else {}
        return QuantizationModifier(**usual, scheme=fields["scheme"], **own)
    own = {key: value for key, value in fields.items() if key != "bits"}
    weights = {"num_bits": fields["bits"], "type": "int", **own}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return GPTQModifier(config_groups=groups, ignore=["lm_head"])


def read_by_compressed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)
    )
    state = model.state_dict()
    return {
        key.removesuffix(".weight"): state[key]
        for key in state
        if key.endswith(("q_proj.weight", "down_proj.weight"))
    }


def auto_round(folder: Path) -> None:
    from auto_round import AutoRound

    make_base(folder / "base")
    for name, fields in chosen(AUTO_ROUND):
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
        rounder = AutoRound(
            model, tokenizer, bits=4, group_size=32, sym=fields["sym"], iters=0,
            dataset=[torch.tensor([ids]) for ids in texts()], seqlen=128, nsamples=16,
            device_map="cpu",
        )  # fmt: skip
        rounder.quantize_and_save(str(folder / name), format=fields["format"])
        made = next(path.parent for path in (folder / name).rglob("config.json"))
        keep(name, made, read_by_gptqmodel(made, fields["format"] == "auto_awq"))


def chosen(cases: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Those named after the tool, or all."""
    return [(name, cases[name]) for name in sys.argv[2:] or cases]


TOOLS: dict[str, Callable[[Path], None]] = {
    "gptqmodel": gptqmodel,
    "bitsandbytes": bitsandbytes,
    "llmcompressor": llmcompressor,
    "auto-round": auto_round,
}

if __name__ == "__main__":
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        TOOLS[sys.argv[1]](Path(scratch))
