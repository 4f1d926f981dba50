"""A server that takes its weights from another one, and saves them for the next."""

from pathlib import Path

import httpx
import pytest
import torch

from headrace import Engine
from headrace.assets import demo_model_path
from headrace.core.errors import HeadraceError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.layers.held import held_bytes
from headrace.loader import load_model
from headrace.loader.files import resolve_model_path
from tests.support.servers import Server

pytestmark = pytest.mark.timeout(120)
PROMPT, GREEDY = "Once upon a time", {"max_new_tokens": 24, "temperature": 0.0}
SEED = "remote_instance_weight_loader_seed_instance"


@pytest.mark.slow
def test_weights_come_from_a_running_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new server has config and tokenizer only; it answers as the seed does."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in demo_model_path().iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("HEADRACE_SEED_API_KEY", "key")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ("--remote-instance-weight-loader-start-seed", "--api-key", "key")
    with Server(tmp_path, *flags) as seed:
        seed.wait_ready()
        body = {"text": PROMPT, "sampling_params": GREEDY, "return_logprob": True}
        own = httpx.post(
            f"{seed.url}/generate", json=body, headers={"Authorization": "Bearer key"}, timeout=120
        ).json()
        where = {f"{SEED}_ip": "127.0.0.1", f"{SEED}_service_port": seed.port}
        with Engine(model_path=str(folder), load_format="remote_instance", **where) as engine:
            own_dtype = engine.get_server_info()["dtype"]
            found = engine.generate(PROMPT, GREEDY, return_logprob=True)
            files = engine.save_sharded_model(str(tmp_path / "saved"), max_size=1 << 20)
            assert "model-rank-0-part-1.safetensors" in files
            stored = engine.save_remote_model(f"file://{tmp_path}/store")
            assert "model-rank-0-part-0.safetensors" in stored
            with pytest.raises(HeadraceError, match="pattern must be"):
                engine.save_sharded_model(str(tmp_path / "saved"), pattern="x")
    assert found["text"] == own["text"]
    logprobs = "output_token_logprobs"
    ours, theirs = (answer["meta_info"][logprobs] for answer in (found, own))
    assert [tuple(item) for item in ours] == [tuple(item) for item in theirs]
    for path, load_format in (
        (tmp_path / "saved", "sharded_state"),
        (resolve_model_path(f"file://{tmp_path}/store"), "remote"),
    ):
        # The demo model is served in float32 where the CPU has no bfloat16 instructions.
        dtype = getattr(torch, own_dtype)
        assert held_bytes(load_model(read_model_info(path), dtype, SoloGroup(), load_format)) > 0
