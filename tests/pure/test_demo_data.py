"""The demo model's data: same seed, same data; nothing held out is trained on."""

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from demo_model.data import MIX, context_key, held_out, training
from demo_model.data.base import Example

RESERVED = held_out(seed=1, per_kind=5)
STREAM = list(islice(training(seed=0, reserved=RESERVED), 3000))
CHATS = [item for item in STREAM if isinstance(item, Example)]


def test_same_seed_gives_the_same_data() -> None:
    assert held_out(seed=1, per_kind=5) == RESERVED
    assert list(islice(training(seed=0, reserved=RESERVED), 300)) == STREAM[:300]
    assert list(islice(training(seed=7, reserved=RESERVED), 300)) != STREAM[:300]


def test_every_kind_is_in_both_streams() -> None:
    assert {example.kind for example in RESERVED} == set(MIX)
    assert {example.kind for example in CHATS} == set(MIX)
    assert any(isinstance(item, str) for item in STREAM)


def test_held_out_contexts_are_never_trained_on() -> None:
    trained = {context_key(example) for example in CHATS}
    assert not trained & {context_key(example) for example in RESERVED}


def test_held_out_last_questions_are_new_wordings_or_values() -> None:
    """Inside longer conversations, too, no single question of the held-out side appears."""
    asked = {m["content"] for example in CHATS for m in example.messages if m["role"] == "user"}
    single = [e for e in RESERVED if len(e.messages) == 2 and not e.tools and e.kind != "greeting"]
    shared = [e.messages[0]["content"] for e in single if e.messages[0]["content"] in asked]
    assert len(single) > 30
    assert not shared


def test_chats_are_well_formed() -> None:
    for example in CHATS:
        roles = [message["role"] for message in example.messages]
        assert roles[-1] == "assistant"
        assert "system" not in roles[1:]
        for message in example.messages:
            assert message["content"] or message["tool_calls"]
