"""What a real engine wrote down decides the same without model, clock and processes."""

from headrace.engine.engine import Engine
from headrace.sim.replay import replay_file

SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


def test_a_recorded_engine(tmp_path):
    path = tmp_path / "journal"
    with Engine(record_schedule=str(path), chunked_prefill_size=32, log_level="error") as engine:
        prompts = [
            f"Question {index}: " + "what is the capital of France? " * index for index in range(6)
        ]
        each = [
            {"max_new_tokens": 12, "temperature": 0.0},
            {"max_new_tokens": 24, "temperature": 1.0, "n": 2},
            {"max_new_tokens": 24, "stop": ["e"]},
            {"max_new_tokens": 24, "json_schema": SCHEMA},
            {"max_new_tokens": 12, "stop_regex": "[aeiou]{2}"},
            {"max_new_tokens": 1},
        ]
        answers = engine.generate(prompts, each)
        assert len(answers) == 7
        engine.flush_cache()
        engine.generate("again", {"max_new_tokens": 4})
    outcome = replay_file(str(path))
    assert outcome.divergence == ""
    assert outcome.requests == 8 and outcome.plans > 20
