"""Random trees of session requests against a plain model of what a session is."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.core.messages import AbortRequest, Control, GenerateRequest, SessionParams
from tests.pure.test_scheduler import spec
from tests.pure.test_scheduler_properties import Client, expected, make_scheduler

CAPACITY = 40


class Model:
    """{rid: (rid it went on from, prompt, output)} and what a request must see."""

    def __init__(self) -> None:
        self.nodes: dict[str, tuple[str, list[int], list[int]]] = {}

    def whole(self, asked: SessionParams, prompt: list[int]) -> list[int] | None:
        """The prompt with what comes before it; None if the request is to be refused."""
        if asked.rid and asked.rid not in self.nodes:
            return None
        _, before, output = self.nodes[asked.rid] if asked.rid else ("", [], [])
        before = before if asked.drop_previous_output else before + output
        if abs(asked.offset) > len(before) and asked.rid:
            return None
        before = before[: asked.offset] if asked.offset else before
        return None if len(before) + len(prompt) > CAPACITY else before + prompt

    def drop_below(self, rid: str) -> None:
        for child in [name for name, node in self.nodes.items() if node[0] == rid]:
            self.drop_below(child)
            del self.nodes[child]


def draw_request(data, rid: str, known: list[str]) -> GenerateRequest:
    after = data.draw(st.sampled_from(["", *known, "never"]), "after")
    params = SessionParams(
        "s",
        after,
        data.draw(st.sampled_from([0, 0, 0, 1, 3, -1, -2, 9]), "offset") if after else 0,
        data.draw(st.integers(0, 3), "replace") == 0,
        data.draw(st.booleans(), "drop"),
    )
    prompt = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8), "prompt")
    return spec(rid, prompt, data.draw(st.integers(1, 6), "most"), session=params)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_session_is_a_tree(data):
    scheduler = make_scheduler(pages=300, page_size=data.draw(st.sampled_from([1, 4])))
    scheduler.submit(Control(1, "open_session", {"session_id": "s", "capacity": CAPACITY}))
    model, client = Model(), Client(scheduler)
    for number in range(data.draw(st.integers(1, 10), "requests")):
        rid = f"r{number}"
        asked = draw_request(data, rid, list(model.nodes))
        prompt = [*memoryview(asked.ids).cast("i")]
        whole = model.whole(asked.session, prompt)
        scheduler.submit(asked)
        if data.draw(st.integers(0, 3), "abort") == 0:
            for _ in range(data.draw(st.integers(0, 4), "steps")):
                scheduler.step()
            scheduler.submit(AbortRequest(rid))
        client.run()
        scheduler.check()
        if whole is None:
            assert client.finish[rid].status == 400
        else:
            full = expected(spec(rid, whole, asked.sampling.max_new_tokens))
            got = client.out[rid]
            assert got == (full[: len(got)] if client.finish[rid].type == "abort" else full)
            assert client.last[rid].prompt_tokens == len(whole)
            if asked.session.replace:
                model.drop_below(asked.session.rid)
            model.nodes[rid] = (asked.session.rid, whole, got)
        nodes = scheduler.sessions._sessions["s"].nodes
        assert {name: node.tokens.tolist() for name, node in nodes.items()} == {
            name: prompt + output for name, (_, prompt, output) in model.nodes.items()
        }
        assert scheduler.sessions._tokens == sum(len(node.tokens) for node in nodes.values())
