"""Makes the files in this folder: tiny models as llama.cpp's converter and quantizer write them.

    LLAMA_CPP=.../llama.cpp ORACLE=.../oracle python -m tests.data.gguf.make [NAME ...]

LLAMA_CPP is a source tree with convert_hf_to_gguf.py, ORACLE oracle.cpp built against it:

    g++ -O1 -I include -I ggml/include oracle.cpp -o oracle -lllama -lggml -lggml-cpu -lggml-base

The files were made with the llama.cpp in the sdist of llama-cpp-python 0.3.36, transformers 5.23.0,
tokenizers 0.23.3 and sentencepiece 0.2.3. The converter tells how a tokenizer cuts words by a hash
of published ones, which says nothing of one made here: that one answer is given to it.

For each model: NAME.gguf, and in logits.npz for the same ids what llama.cpp computes with the
file's numbers as fp32 (`NAME`); where types are what is tested, also with its own kernels for them,
which round activations to 8 bits (`NAME/kernels`).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from headrace.loader.gguf_words import WORDS
from tests.cpu import test_models_layouts as layouts
from tests.data.gguf.cases import HERE, IDS, MODELS, ROWS, GgufCase
from tests.data.gguf.texts import FRAMED, LINES, TEXTS
from tests.data.gguf.vocabularies import write_bpe, write_pieces
from tests.support.checkpoints import make_case

FTYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
          "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32,
          "MXFP4": 38}  # fmt: skip
"""llama_ftype, of k-quants the mixed ones."""


def oracle(*args: object) -> None:
    subprocess.run([os.environ["ORACLE"], *map(str, args)], check=True)


def convert(folder: Path, out: Path, case: GgufCase, *more: str) -> None:
    """With llama.cpp's converter. Fields of `case.config` that transformers drops come back."""
    sys.path.insert(0, os.environ["LLAMA_CPP"])
    import convert_hf_to_gguf
    from conversion import ModelBase, TextModel

    read = ModelBase.load_hparams
    TextModel.get_vocab_base_pre = lambda self, tokenizer: case.pre  # type: ignore[method-assign]
    ModelBase.load_hparams = staticmethod(
        lambda *args, **named: {**read(*args, **named), **case.config}
    )
    _mend_baichuan()
    sys.argv = ["convert", str(folder), "--outfile", str(out), "--outtype", "f32", *more]
    convert_hf_to_gguf.main()
    ModelBase.load_hparams = staticmethod(read)


def _mend_baichuan() -> None:
    """The converter of that version calls itself forever for all tensors but one."""
    from conversion import TextModel
    from conversion.baichuan import BaichuanModel

    if BaichuanModel.modify_tensors.__name__ == "mended":
        return
    packed = BaichuanModel.modify_tensors

    def mended(self, tensor, name, bid):  # type: ignore[no-untyped-def]
        some = packed if "W_pack" in name else TextModel.modify_tensors
        return some(self, tensor, name, bid)

    BaichuanModel.modify_tensors = mended


def logits(file: Path, ids: list[int], work: Path) -> np.ndarray:
    """fp32 [ids, vocabulary], by llama.cpp."""
    (work / "ids").write_bytes(np.array(ids, np.int32).tobytes())
    oracle(file, "logits", work / "ids", work / "logits")
    return np.fromfile(work / "logits", np.float32).reshape(len(ids), -1)


def checkpoint(case: GgufCase, folder: Path) -> transformers.PreTrainedModel:
    if case.source in layouts.CASES:
        architecture, made, rename, config = layouts.CASES[case.source]
        layouts.CASES[case.source] = (
            architecture,
            {**made, **case.changes},
            rename,
            {**config, **_without_dtype(case.changes), **case.config},
        )
        oracle = layouts.write(folder, case.source)
        layouts.CASES[case.source] = (architecture, made, rename, config)
        return oracle
    return make_case(folder, case.source, **case.changes)


def _without_dtype(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key != "dtype"}


def make(name: str, case: GgufCase, found: dict[str, np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as path:
        work = Path(path)
        model = checkpoint(case, work / "hf")
        (write_pieces if case.pieces else write_bpe)(work / "hf")
        if case.config:
            path_of = work / "hf/config.json"
            path_of.write_text(json.dumps({**json.loads(path_of.read_text()), **case.config}))
        convert(work / "hf", work / "f32.gguf", case)
        plain = logits(work / "f32.gguf", IDS, work)
        with torch.inference_mode():
            theirs = model.float()(torch.tensor([IDS]), use_cache=False).logits[0].float().numpy()
        print(f"{name}: llama.cpp and transformers differ by {np.abs(plain - theirs).max():.2e}")
        for kind, label in zip(case.kinds, case.files(name), strict=True):
            oracle(work / "f32.gguf", "quantize", HERE / f"{label}.gguf", FTYPES[kind])
            oracle(HERE / f"{label}.gguf", "quantize", work / "wide.gguf", FTYPES["F32"])
            wide = theirs if case.theirs else logits(work / "wide.gguf", IDS, work)
            found[label], found[f"{label}/top"] = wide[ROWS], wide.argmax(-1).astype(np.int16)
            if len(case.kinds) > 1:
                found[f"{label}/kernels"] = logits(HERE / f"{label}.gguf", IDS, work)[ROWS]


def tokens(file: Path, work: Path) -> list[list[int]]:
    """Of each text alone, then of some as the model wants them framed, by llama.cpp."""
    every = ["0" + text for text in TEXTS] + ["1" + text for text in TEXTS[:FRAMED]]
    (work / "texts").write_bytes(b"".join(text.encode() + b"\0" for text in every))
    oracle(file, "tokens", work / "texts", work / "ids")
    ids = np.fromfile(work / "ids", np.int32).tolist()
    found = []
    while ids:
        found.append(ids[1 : 1 + ids[0]])
        ids = ids[1 + ids[0] :]
    return found


def make_tokens() -> None:
    """bpe.gguf and pieces.gguf, vocabularies alone, and in tokens.json what llama.cpp makes of
    texts: for each way to cut words (or which other one says the same), and with and without a
    space before a text."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as path:
        work = Path(path)
        make_case(work / "hf", "llama", vocab_size=700)
        write_bpe(work / "hf", 700, LINES)
        for pre in WORDS:
            convert(work / "hf", work / "some.gguf", GgufCase("llama", pre=pre), "--vocab-only")
            made = tokens(work / "some.gguf", work)
            found[pre] = next((other for other in found if found[other] == made), made)
        (HERE / "bpe.gguf").write_bytes((work / "some.gguf").read_bytes())
        for name in ("gemma", "llama"):  # the first takes no space before a text
            make_case(work / name, name, vocab_size=700)
            write_pieces(work / name, 700, LINES)
            convert(work / name, work / "some.gguf", GgufCase(name), "--vocab-only")
            found[name] = tokens(work / "some.gguf", work)
        named = GgufCase("llama"), "--vocab-only", "--model-name", "Phi-3-mini"
        convert(work / "llama", work / "named.gguf", *named)
        found["phi-3"] = tokens(work / "named.gguf", work)
        (HERE / "pieces.gguf").write_bytes((work / "some.gguf").read_bytes())
    (HERE / "tokens.json").write_text(json.dumps(found, separators=(",", ":")))


def main(names: list[str]) -> None:
    path = HERE / "logits.npz"
    found: dict[str, Any] = dict(np.load(path)) if names and path.exists() else {}
    for name in names or MODELS:
        make(name, MODELS[name], found)
    np.savez_compressed(path, **found)
    if not names:
        make_tokens()


if __name__ == "__main__":
    main(sys.argv[1:])
