"""Tiny random checkpoints of models that are pooled, made by transformers, and how to ask them.

`CASES` are the configurations on which vectors are compared with transformers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from headrace.core.config import Config
from headrace.core.hardware import Hardware
from headrace.core.messages import GenerateRequest, PoolSpec, SamplingParams, pack_ids
from headrace.core.model_info import ModelInfo, read_model_info
from headrace.core.resolve import resolve
from headrace.engine.build import build_scheduler
from headrace.scheduler.scheduler import Scheduler

HARDWARE = Hardware(cores=1, memory_limit=4 << 30, memory_available=4 << 30)
_TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
}
_DECODER = {"num_key_value_heads": 2, "head_dim": 16}
#: name -> (transformers class, changes to the tiny configuration)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "bert-classes": ("BertForSequenceClassification", {"num_labels": 3}),
    "bert-cross": ("BertForSequenceClassification", {"num_labels": 1, "hidden_act": "gelu_new"}),
    "xlm-roberta": ("XLMRobertaModel", {"type_vocab_size": 1}),
    "xlm-roberta-cross": (
        "XLMRobertaForSequenceClassification",
        {"num_labels": 1, "type_vocab_size": 1},
    ),
    "qwen3": ("Qwen3Model", _DECODER),
    "qwen3-causal": ("Qwen3ForCausalLM", _DECODER),
    "llama": ("LlamaModel", _DECODER),
    "mistral-window": ("MistralModel", {**_DECODER, "sliding_window": 11}),
    "qwen3-reward": ("Qwen3ForSequenceClassification", {**_DECODER, "num_labels": 1}),
    "qwen2-classes": ("Qwen2ForSequenceClassification", {**_DECODER, "num_labels": 4}),
    "llama-classes": ("LlamaForSequenceClassification", {**_DECODER, "num_labels": 2}),
}


def make_model(folder: Path, case: str, **changes: Any) -> transformers.PreTrainedModel:
    """Save a random checkpoint in `folder`; returns the transformers model, the oracle."""
    name, own = CASES[case]
    kind = getattr(transformers, name)
    config = kind.config_class(**{**_TINY, **own, **changes})
    config._attn_implementation = "eager"
    model = kind(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in path.lower() and path.endswith("weight"):
                weight.copy_(1 + 0.2 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * (1.6 / weight.shape[1] ** 0.5))
    model = model.eval()
    model.save_pretrained(folder)
    return model


def write_modules(folder: Path, mode: str, *, normalize: bool = True) -> None:
    """The files in which sentence-transformers keeps how a model is pooled."""
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for module in modules:
        (folder / str(module["path"])).mkdir(exist_ok=True)
    config = {"word_embedding_dimension": 32, f"pooling_mode_{mode}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def build(folder: Path, **options: Any) -> tuple[Scheduler, ModelInfo]:
    """The scheduler and the model of a folder."""
    info = read_model_info(folder, is_embedding=True)
    asked = {
        "model_path": str(folder),
        "is_embedding": True,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_running_requests": 6,
        "max_total_tokens": 2048,
        **options,
    }
    config, _ = resolve(Config.from_flat(asked), info, HARDWARE)
    return build_scheduler(config, info, lambda what: None).scheduler, info


def pool(
    scheduler: Scheduler,
    info: ModelInfo,
    prompts: Sequence[Sequence[int]],
    seconds: Sequence[int] = (),
) -> list[np.ndarray]:
    """The vector of each prompt, all asked at once."""
    assert info.pooling is not None
    for index, prompt in enumerate(prompts):
        spec = PoolSpec(
            second=seconds[index] if seconds else 0,
            reuse=info.pooling.reuse,
            pieces=not info.pooling.encoder,
        )
        scheduler.submit(
            GenerateRequest(
                rid=str(index),
                ids=pack_ids(list(prompt)),
                sampling=SamplingParams(max_new_tokens=0, seed=0),
                pool=spec,
            )
        )
    found: dict[str, np.ndarray] = {}
    while not scheduler.idle:
        scheduler.step()
        for message in scheduler.take():
            for delta in message.items:
                assert delta.finish is not None and delta.finish.type == "length", delta.finish
                assert delta.prompt_tokens == len(prompts[int(delta.rid)])
                found[delta.rid] = np.frombuffer(delta.pooled, "<f4")
    scheduler.check()
    return [found[str(index)] for index in range(len(prompts))]
