"""Each architecture against transformers in fp32: prefill, chunks, decode, batches."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.models import Model, model_class
from tests.support.checkpoints import CASES, make_case
from tests.support.paged import PagedRun, run_all

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Model, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = make_case(folder, request.param)
    return request.param, load(folder), oracle


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(read_model_info(folder), dtype, SoloGroup())


def random_ids(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 101, (n,), generator=generator).tolist() for n in lengths]


def expected(oracle: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([ids]), use_cache=False).logits[0].float()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    assert difference <= TOLERANCE


def test_whole_prompts(pair: tuple[str, Model, transformers.PreTrainedModel]) -> None:
    _, model, oracle = pair
    sequences = random_ids(40, 1, 23, 24, 25)
    for ours, ids in zip(run_all(model, sequences), sequences, strict=True):
        assert_close(ours, expected(oracle, ids))


def test_chunks_then_decode(pair: tuple[str, Model, transformers.PreTrainedModel]) -> None:
    """Prefill in chunks and decode rows mixed in one batch, against incremental transformers."""
    _, model, oracle = pair
    sequences = random_ids(40, 29, seed=2)
    prompts = [33, 20]
    run = PagedRun(model, sequences, prompt_lens=prompts)
    plan = [[(0, 17)], [(1, 20), (0, 15)], [(1, 1), (0, 1)]]
    plan += [[(0, 1), (1, 1)]] * 7 + [[(1, 1)]]
    ours: list[list[Tensor]] = [[], []]
    for chunks in plan:
        for (row, _), logits in zip(chunks, run.step(chunks), strict=True):
            ours[row].append(logits)
    for row, ids in enumerate(sequences):
        assert run.done[row] == len(ids)
        assert_close(torch.cat(ours[row]), incremental(oracle, ids, prompts[row]))


def incremental(oracle: transformers.PreTrainedModel, ids: list[int], prompt: int) -> Tensor:
    """transformers with its cache: the prompt at once, then token by token."""
    cache = transformers.DynamicCache()
    parts = [ids[:prompt], *([token] for token in ids[prompt:])]
    with torch.inference_mode():
        outputs = [oracle(torch.tensor([part]), past_key_values=cache).logits[0] for part in parts]
    return torch.cat(outputs).float()


def test_result_does_not_depend_on_neighbors(
    pair: tuple[str, Model, transformers.PreTrainedModel],
) -> None:
    _, model, _ = pair
    sequences = random_ids(30, 37, 5, seed=3)
    alone = [run_all(model, [ids])[0] for ids in sequences]
    for one, together in zip(alone, run_all(model, sequences, page_size=8), strict=True):
        assert_close(one, together)


def test_long_context_is_cut_into_query_blocks(tmp_path: Path) -> None:
    oracle = make_case(tmp_path, "mistral-window", max_position_embeddings=700)
    ids = random_ids(600, seed=4)[0]
    assert_close(run_all(load(tmp_path), [ids], page_size=16)[0], expected(oracle, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(tmp_path: Path, dtype: torch.dtype) -> None:
    oracle = make_case(tmp_path, "qwen3", dtype=dtype).float()
    ids = random_ids(30)[0]
    ours = run_all(load(tmp_path, dtype), [ids], dtype=dtype)[0]
    assert ours.dtype == torch.float32
    difference = (ours.log_softmax(-1) - expected(oracle, ids).log_softmax(-1)).abs().mean()
    assert difference < (0.08 if dtype == torch.bfloat16 else 0.01)


def test_windows_reach_the_cache_pools(tmp_path: Path) -> None:
    make_case(tmp_path, "qwen2-layer-types")
    specs = load(tmp_path).state_specs()
    assert [spec.window for spec in specs] == [9, 0, 9]
    assert {(spec.kind, spec.kv_heads, spec.head_dim) for spec in specs} == {("kv", 2, 16)}


def test_old_rope_fields_mean_the_same(tmp_path: Path) -> None:
    """rope_theta + rope_scaling with `type`, as before transformers 5."""
    import json

    oracle = make_case(tmp_path, "llama-linear")
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "linear", "factor": rope["factor"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = random_ids(30)[0]
    assert_close(run_all(load(tmp_path), [ids])[0], expected(oracle, ids))


def test_a_package_may_bring_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is installed beside headrace, with its entry points."""
    import json

    site, checkpoint = tmp_path / "site", tmp_path / "checkpoint"
    (site / "mill-1.0.dist-info").mkdir(parents=True)
    (site / "mill-1.0.dist-info" / "entry_points.txt").write_text(
        "[headrace.models]\nMillForCausalLM = mill:Mill\nLostForCausalLM = mill:Lost\n"
        "Qwen3ForCausalLM = mill:Mill\n"
    )
    (site / "mill.py").write_text(
        "from headrace.models.llama import Qwen3ForCausalLM\n"
        "class Mill(Qwen3ForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(site)
    assert model_class("Qwen3ForCausalLM").__module__ == "headrace.models.llama"
    with pytest.raises(LoadError, match=r"LostForCausalLM.*mill:Lost cannot be had"):
        model_class("LostForCausalLM")

    oracle = make_case(checkpoint, "qwen3")
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["MillForCausalLM"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = load(checkpoint)
    assert type(model).__name__ == "Mill"
    ids = random_ids(30)[0]
    assert_close(run_all(model, [ids])[0], expected(oracle, ids))


def test_unknown_architecture_names_close_ones() -> None:
    with pytest.raises(LoadError, match="Qwen3ForCausalLM"):
        model_class("Qwen3ForCausalML")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "sine", "unknown activation 'sine'"),
        ("intermediate_size", None, "intermediate_size"),
        ("num_key_value_heads", 3, "not a multiple"),
        ("rope_parameters", {"rope_type": "spiral"}, "unknown rope scaling 'spiral'"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8}, "low_freq_factor"),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [1]}, "short_factor"),
        ("quantization_config", {"quant_method": "quip"}, "quant_method='quip'"),
    ],
)
def test_bad_config_is_named(tmp_path: Path, field: str, value: object, message: str) -> None:
    make_case(tmp_path, "llama")
    info = read_model_info(tmp_path, {field: value})
    with pytest.raises(LoadError, match=message):
        load_model(info, torch.float32, SoloGroup())
