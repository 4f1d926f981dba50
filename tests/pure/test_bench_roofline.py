"""Arithmetic, table and picture of `bench roofline`; the tokenizer of `bench write-model`."""

import argparse
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from headrace.assets import demo_model_path
from headrace.bench import plot, roofline, write_model
from headrace.bench.roofline import Cost, Run, Timed, Work
from headrace.bench.shapes import SHAPES, write_config
from headrace.core.errors import BadRequest, HeadraceError
from headrace.core.model_info import read_model_info

COST = Cost(linear=1000, head=100, kv_bytes=8, heads_dim=4, weight_bytes=2200)


def limits(read: float, fp32: float, **more: float) -> dict:
    return {"read_bytes_per_s": read, "operations_per_s": {"fp32": fp32, **more}}


def timed(work: Work, *seconds: float, shared: tuple[float, ...] = ()) -> Timed:
    runs = [Run(each, 10.0) for each in seconds] + [Run(each, 5.5) for each in shared]
    return Timed(work, runs, {"linear": (2, sum(seconds + shared))})


@pytest.fixture
def result() -> dict:
    items = [timed(Work(f"prefill {n}", 1, n, n), 4.0, 2.0, 3.0) for n in (16, 64)]
    items += [timed(Work(f"decode batch {n}", n, 1, 16), 2.0, 1.0, 1.5) for n in (1, 4, 32)]
    return {
        "model": "m",
        "level": "avx512",
        "threads": 2,
        **limits(1000.0, 9e4),
        "limits_after": limits(1100.0, 8e4),
        "load_average": 0.5,
        "steps": [roofline.fraction(item, COST, (1100.0, 9e4), 10.0) for item in items],
    }


def test_median_counts_and_best_stands_beside_it() -> None:
    item = timed(Work("decode batch 2", 2, 1, 10), 4.0, 8.0, 5.0)
    step = roofline.fraction(item, COST, (1180.0, 1e9), 10.0)
    # 1100 weights of 2 bytes and 2 rows x 10 tokens x 8 bytes: 2 s to read
    assert (step["bound"], step["limit_tokens_per_s"]) == ("read", 1.0)
    assert (step["milliseconds"], step["best_milliseconds"]) == (5000.0, 4000.0)
    assert (step["fraction_of_limit"], step["best_fraction_of_limit"]) == (0.4, 0.5)


def test_runs_on_shared_cores_count_only_where_there_are_no_others() -> None:
    work = Work("decode batch 2", 2, 1, 10)
    many = timed(work, 4.0, 8.0, 5.0, shared=(9.0, 9.5))
    few = timed(work, 4.0, 8.0, shared=(9.0, 9.5))
    steps = [roofline.fraction(item, COST, (1180.0, 1e9), 10.0) for item in (many, few)]
    assert [(step["runs"], step["runs_alone"]) for step in steps] == [(5, 3), (4, 2)]
    assert [step["milliseconds"] for step in steps] == [5000.0, 8500.0]
    assert steps[0]["operators"] == {"linear": {"calls": 2, "milliseconds": 7100.0}}


def test_limits_are_the_higher_ones_of_the_type() -> None:
    before, after = limits(10.0, 5.0, bf16=9.0), limits(12.0, 4.0, bf16=8.0)
    assert roofline.highest(before, after, "bf16") == (12.0, 9.0)
    assert roofline.highest(before, after, "") == (12.0, 5.0)


def test_table_shows_the_noise(result: dict) -> None:
    lines = roofline.table(result).splitlines()
    assert lines[1].startswith("before: read 0.0 GB/s") and lines[2].startswith("after: ")
    assert lines[5].split()[:4] == ["prefill", "16", "3000.00", "2000.00"]
    assert lines[5].split()[-1] == "3/3"
    assert lines[-1].split() == ["decode", "batch", "32", "linear", "2", "1500.00"]


def test_either_a_model_or_a_shape() -> None:
    parser = argparse.ArgumentParser()
    roofline.add_arguments(parser)
    for words in ([], ["some/folder", "--shape", "qwen3-0.6b"]):
        with pytest.raises(BadRequest, match="either a model's folder or --shape"):
            roofline.run(parser.parse_args(words))


def test_picture(result: dict, tmp_path: Path) -> None:
    path = tmp_path / "roofline.png"
    plot.draw(result, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    with pytest.raises(HeadraceError, match="cannot write"):
        plot.draw(result, tmp_path / "missing" / "x.png")


def test_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HeadraceError, match=r"pip install 'headrace\[bench\]'"):
        plot.require()


@pytest.mark.parametrize(("shape", "millions"), [("qwen3-0.6b", 596), ("llama-3.2-1b", 1236)])
def test_shapes_have_the_known_sizes(shape: str, millions: int, tmp_path: Path) -> None:
    write_config(shape, tmp_path)
    info = read_model_info(tmp_path)
    wide = info.num_heads * info.head_dim, info.num_kv_heads * info.head_dim
    mlp = 3 * info.hidden_size * SHAPES[shape]["intermediate_size"]
    layer = info.hidden_size * (2 * wide[0] + 2 * wide[1]) + mlp
    total = info.num_layers * layer + info.vocab_size * info.hidden_size  # tied head
    assert round(total / 1e6) == millions
    assert info.dtype == "bfloat16"


def test_every_id_of_the_written_tokenizer_has_text(tmp_path: Path) -> None:
    write_model.write_tokenizer(tmp_path, SHAPES["qwen3-0.6b"] | {"vocab_size": 5000})
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    demo = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    assert written.get_vocab_size() == 5000
    added = [written.decode([number]) for number in range(demo.get_vocab_size(), 5000)]
    assert all(text.strip().isascii() and text.strip() for text in added)
    assert len(set(added)) == len(added)
    text = "Once upon a time, there were 12 foxes. aaaa aaab"
    assert written.encode(text).ids == demo.encode(text).ids


def test_write_model_leaves_what_is_there_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    parser = argparse.ArgumentParser()
    write_model.add_arguments(parser)
    with pytest.raises(BadRequest, match="not an empty folder"):
        write_model.run(parser.parse_args(["--shape", "qwen3-0.6b", "--out", str(tmp_path)]))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
