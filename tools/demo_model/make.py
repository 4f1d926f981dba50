"""Makes the demo model: data, tokenizer, training, export, evaluation.

`python tools/demo_model/make.py` does all; each step leaves files in `--work` and is skipped when
they are there, so a cut run goes on where it was. One seed gives the same data and the same rows.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo_model.data import Example, held_out, training
from demo_model.data.facts import fact_count
from demo_model.evaluate import evaluate, score_table, write_card, write_report
from demo_model.export import export, llama_config
from demo_model.pack import Encoder, pack
from demo_model.team import Team
from demo_model.tokenizer import save_tokenizer, train_tokenizer
from demo_model.train import Schedule, start, train

ASSETS = Path(__file__).resolve().parents[2] / "src" / "headrace" / "assets" / "demo"
HELD_SEED, HELD_PER_KIND, TOKENIZER_SAMPLE = 1, 40, 60_000


@dataclass(frozen=True)
class Options:
    steps: int
    length: int
    seed: int
    workers: int
    compile: bool
    work: Path
    out: Path
    only: str | None


def options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 14 rows")
    parser.add_argument("--length", type=int, default=320, help="tokens per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="training processes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--only", choices=tuple(STEPS))
    return Options(**vars(parser.parse_args()))


def main() -> None:
    opts = options()
    opts.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(opts.workers)
    reserved = held_out(HELD_SEED, HELD_PER_KIND)
    for name, step in STEPS.items():
        if opts.only in (None, name):
            step(opts, reserved)


def make_tokenizer(opts: Options, reserved: list[Example]) -> None:
    if (opts.work / "tokenizer.json").exists():
        return
    items = islice(training(opts.seed, reserved), TOKENIZER_SAMPLE)
    save_tokenizer(train_tokenizer(text for item in items for text in texts_of(item)), opts.work)


def texts_of(item: Example | str) -> Iterator[str]:
    """The texts of an example as the tokenizer will meet them."""
    if isinstance(item, str):
        yield item
        return
    for message in item.messages:
        yield message["role"]
        yield message["content"] or json.dumps(message["tool_calls"][0]["function"])
    for tool in item.tools:
        yield json.dumps(tool["function"])


def make_rows(opts: Options, reserved: list[Example]) -> None:
    path = opts.work / "rows.npz"
    if path.exists():
        return
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(opts.work))
    documents = (encoder.encode(item) for item in training(opts.seed, reserved))
    pack(documents, opts.length, opts.steps * Schedule.batch_rows).save(path)


def make_model(opts: Options, reserved: list[Example]) -> None:
    schedule = Schedule(opts.steps, workers=opts.workers, compiled=opts.compile)
    train(llama_config(), opts.work / "rows.npz", schedule, opts.work / "checkpoint.safetensors")


def make_assets(opts: Options, reserved: list[Example]) -> None:
    """The files of the package; works on the checkpoint of an unfinished run, too."""
    opts.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(opts.work / name, opts.out / name)
    model, _, steps = start(llama_config(), opts.work / "checkpoint.safetensors", Team(0, 1))
    export(model, opts.out)
    print(f"exported the model after {steps} steps to {opts.out}")


def judge(opts: Options, reserved: list[Example]) -> None:
    verdicts = evaluate(opts.out, reserved)
    write_report(opts.work / "wrong.txt", verdicts)
    write_card(opts.out, verdicts, facts_of(opts))
    print(score_table(verdicts))


def facts_of(opts: Options) -> dict[str, str]:
    """What the model card says in numbers, by the names in its template."""
    model, _, steps = start(llama_config(), opts.work / "checkpoint.safetensors", Team(0, 1))
    return {
        "PARAMETERS": f"{sum(p.numel() for p in model.parameters()):,}",
        "STEPS": f"{steps:,}",
        "TOKENS": f"{steps * Schedule.batch_rows * opts.length / 1e6:.1f}",
        "FACTS": str(fact_count()),
    }


STEPS = {
    "tokenizer": make_tokenizer,
    "rows": make_rows,
    "train": make_model,
    "export": make_assets,
    "evaluate": judge,
}

if __name__ == "__main__":
    main()
