"""The web page in a real browser: a chat is streamed, tools are answered, the dashboard draws.

With HEADRACE_UI_IMAGES=DIR the pictures of docs/ui.md are taken on the way.
"""

import json
import os
import re
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest

from headrace.core.messages import Delta, FinishReason
from headrace.core.pooling import Pooling
from headrace.server.speech import Speech
from headrace.server.ui import MAX_WATCHERS
from headrace.text.parsers.events import Arguments, Content, Reasoning, ToolCall
from tests.e2e.conftest import API_KEY
from tests.support.api_server import LinesParser, Model, serve
from tests.support.browser import MAY_SKIP, browser
from tests.support.servers import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MAY_SKIP, reason="no Chromium is installed"),
]

DESKTOP = {"width": 1180, "height": 760}
PHONE = {"width": 390, "height": 780}
SHARED = "You are a miller. Answer every question about wheels and water in one sentence. " * 4
QUESTIONS = [
    "What is a headrace?",
    "What is a tailrace?",
    "What is a sluice?",
    "Who grinds the corn?",
    "Who grinds the wheat?",
    "Where does the water go?",
]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile"), viewport=DESKTOP) as found:
        found.set_default_timeout(20_000)
        yield found


@pytest.fixture
def page(context):
    """A page that must not fail, nor ask anybody else for anything."""
    page = context.new_page()
    errors, urls = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: line.type == "error" and errors.append(line.text))
    page.on("request", lambda request: urls.append(request.url))
    yield page
    page.close()
    assert not [error for error in errors if not re.search(r"status of (400|401) ", error)]
    assert len({url.split("/")[2] for url in urls}) == 1


def picture(page, name, whole=False):
    if folder := os.environ.get("HEADRACE_UI_IMAGES"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=whole)


def enter(page, url):
    """Open the page and give it the API key it asks for."""
    page.goto(url + "/ui")
    page.fill("#key", API_KEY)
    page.click("text=Use it")
    page.wait_for_selector("#model:not(:empty)")


def post(url, path, body):
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    urllib.request.urlopen(request, timeout=120).close()


def say(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".message.assistant:last-child:not(.waiting)")


def fits(page):
    """Nothing sticks out to the right."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_chat_is_streamed_with_its_tokens(page, demo_server):
    page.emulate_media(color_scheme="light")
    enter(page, demo_server.url)
    page.evaluate(
        """() => {
          window.lengths = new Set();
          const note = () => window.lengths.add(document.querySelectorAll(".token").length);
          const watched = { childList: true, subtree: true };
          new MutationObserver(note).observe(document.getElementById("messages"), watched);
        }"""
    )
    page.fill("[name=temperature]", "0.7")
    page.fill("[name=seed]", "4")
    say(page, "Tell me a story about a fox.")
    tokens = page.locator(".token")
    assert tokens.count() > 5
    assert page.evaluate("window.lengths.size") > 3
    note = page.inner_text(".message.assistant .note")
    assert re.search(r"\d+ tokens in.* out · first token .* tokens/s", note)
    page.locator(".message.assistant .text").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert page.locator(".alternatives li").count() in (5, 6)
    assert page.locator(".alternatives .chosen").count() == 1
    picture(page, "chat-light")
    page.keyboard.press("Escape")
    assert page.locator(".alternatives").count() == 0
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    tokens.nth(5).click()
    assert page.locator(".alternatives").is_visible() and fits(page)
    picture(page, "chat-phone-dark")
    page.set_viewport_size(DESKTOP)


def test_a_wrong_key_can_be_corrected(page, demo_server):
    page.goto(demo_server.url + "/ui")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-problem:not(:empty)")
    page.keyboard.press("Escape")
    page.click("#unlock")
    page.fill("#key", API_KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#model:not(:empty)")
    assert page.locator("#locked").is_hidden()


def test_an_answer_is_stopped_with_a_key(page, demo_server):
    enter(page, demo_server.url)
    post(demo_server.url, "/slow_down", {"forward_sleep_time": 0.05})
    try:
        page.fill("#prompt", "Tell me a story about a fox.")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".token >> nth=3")
        page.keyboard.press("Escape")
        page.wait_for_selector("text=stopped")
        assert page.locator("#send").is_visible() and page.locator(".token").count() < 60
    finally:
        post(demo_server.url, "/slow_down", {"forward_sleep_time": 0})
    page.click("#fresh")
    assert page.locator(".message").count() == 0 and page.locator("#welcome").is_visible()


def test_a_schema_and_wrong_settings(page, demo_server):
    enter(page, demo_server.url)
    page.click("[data-starter=schema]")
    page.wait_for_selector(".message.assistant:not(.waiting)")
    tokens = page.locator(".token:not(.special)").all_inner_texts()
    assert json.loads("".join(tokens)).keys() == {"name", "age"}
    page.fill("[name=schema]", "{")
    page.click("#again")
    assert "schema" in page.inner_text("#settings-error")
    assert page.get_attribute("[name=schema]", "aria-invalid") == "true"
    page.select_option("[name=format]", "")
    page.fill("[name=max_tokens]", "5000")
    page.click("#again")
    page.wait_for_selector(".message .problem:not(:empty)")
    assert re.search("(?s)400.*limit is 1024", page.inner_text(".message .problem"))
    assert page.get_attribute("[name=max_tokens]", "aria-invalid") == "true"
    page.click("#settings-reset")
    assert page.input_value("[name=max_tokens]") == "256"


def test_tools_are_answered_by_hand(page, monkeypatch):
    monkeypatch.setattr(Speech, "parser", lambda _: LinesParser())
    model = Model()
    with serve(model, tool_call_parser="hermes") as url:
        model.turns = [
            [
                Reasoning("I must look."),
                ToolCall(0, "get_weather"),
                Arguments(0, '{"city":"Oslo"}'),
            ],
            [Content("It rains "), Content("in Oslo.")],
        ]
        page.goto(url + "/ui")
        page.uncheck("[name=tokens]")
        page.click("summary:has-text('Tools')")
        page.click("[data-example=tools]")
        say(page, "Weather in Oslo?")
        assert page.inner_text(".call strong") == "get_weather"
        assert not page.locator(".reasoning div").is_visible()
        page.click(".reasoning summary")
        assert page.inner_text(".reasoning div") == "I must look."
        page.fill(".call textarea", "rain, 7 degrees")
        page.click("text=Send results")
        page.wait_for_selector("text=It rains in Oslo.")
        page.click("#settings-reset")
    assert "get_weather" in model.prompts[0]
    assert "<tool>rain, 7 degrees" in model.prompts[1]


def test_what_a_model_writes_is_never_html(page):
    model = Model()
    evil = "<img src=x onerror=window.hit=1><script>window.hit=1</script>"
    with serve(model, api_key=API_KEY) as url:
        model.turns = [[Content(evil)]]
        enter(page, url)
        page.uncheck("[name=tokens]")
        say(page, evil)
        assert evil in page.inner_text(".message.assistant .text")
        page.click("#settings-reset")
    assert page.locator(".message img, .message script").count() == 0
    assert page.evaluate("window.hit") is None


class Embedder(Model):
    """Answers with vectors at right angles in turn."""

    def script(self, request):
        self.requests.append(request)
        vector = np.eye(3, dtype="<f4")[len(self.requests) % 3].tobytes()
        return [Delta(request.rid, finish=FinishReason("length"), prompt_tokens=4, pooled=vector)]


def test_a_model_of_vectors_says_so_and_compares(page):
    with serve(Embedder(), pooling=Pooling(how="last")) as url:
        page.goto(url + "/ui")
        page.wait_for_selector("text=This model makes vectors")
        assert page.locator("#composer").is_hidden()
        page.fill("#texts", "water\nstone")
        page.click("#vectors-form button")
        page.wait_for_selector("td.heat")
        assert page.locator("td.heat").all_inner_texts() == ["1.000", "0.000", "0.000", "1.000"]
        assert "2 vectors of 3 numbers" in page.inner_text("#vectors-note")


@contextmanager
def load(server):
    """Requests of many lengths with a prefix in common, until the block ends."""
    post(server.url, "/slow_down", {"forward_sleep_time": 0.02})
    ended = threading.Event()

    def work(number):
        sampling = {"max_new_tokens": 10 + 9 * number, "ignore_eos": True, "temperature": 0.7}
        prompt = SHARED + QUESTIONS[number % len(QUESTIONS)]
        while not ended.is_set():
            server.generate(prompt, sampling)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(9)]
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        ended.set()
        post(server.url, "/slow_down", {"forward_sleep_time": 0})
        for thread in threads:
            thread.join()


def test_the_dashboard_draws_what_happens(page, demo_server):
    enter(page, demo_server.url)
    page.emulate_media(color_scheme="dark")
    page.click("nav >> text=Dashboard")
    with load(demo_server):
        page.wait_for_selector("#tree .shared", state="attached")
        page.wait_for_timeout(4000)
        page.locator("#tree .shared").first.click()
        note = page.inner_text("#tree-note")
        assert re.search(r"miller.* …: .*locked by \d+ requests", note)
        page.evaluate("scrollTo(0, 0)")
        picture(page, "dashboard-dark", whole=True)
        page.set_viewport_size(PHONE)
        page.emulate_media(color_scheme="light")
        page.wait_for_timeout(1200)
        assert fits(page)
        picture(page, "dashboard-phone-light")
        page.set_viewport_size(DESKTOP)
    page.wait_for_timeout(1500)
    assert page.locator("#tree .node").count() > len(QUESTIONS)
    assert page.locator("#tree-rows tr").count() == page.locator("#tree .node").count()
    found = re.match(r"(\d+) steps", page.get_attribute("#timeline", "aria-label"))
    assert found and int(found[1]) > 50
    colors = """canvas => new Set(new Uint32Array(
      canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
    assert page.locator("#timeline").evaluate(colors) > 4
    page.click("#hold")
    page.locator("#timeline").focus()
    page.keyboard.press("ArrowLeft")
    assert re.match(r"Step [\d,]+, .*decoding", page.inner_text("#timeline-note"))
    assert page.locator("#ttft rect").count() > 0 and page.locator("#itl rect").count() > 0
    assert "Half within" in page.inner_text("#itl-note")
    assert page.locator("#pages-legend dd").count() == 5


def test_a_view_that_is_left_stops_listening(page, demo_server):
    """Each is one of MAX_WATCHERS: we take what is left, and see when a place is given back."""
    enter(page, demo_server.url)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    request = urllib.request.Request(demo_server.url + "/ui/events", headers=headers)
    taken = []

    def taken_one_more():
        try:
            taken.append(urllib.request.urlopen(request, timeout=120))
        except urllib.error.HTTPError as error:
            assert error.code == 503
            return False
        return bool(taken[-1].readline())

    try:
        page.click("nav >> text=Dashboard")
        page.wait_for_selector("#live-about:has-text('request')")
        while taken_one_more():
            pass
        assert len(taken) == MAX_WATCHERS - 1
        page.click("nav >> text=Playground")
        wait_for(taken_one_more)
        taken.pop().close()
        page.click("nav >> text=Dashboard")
        wait_for(lambda: not taken_one_more())
        page.close()
        wait_for(taken_one_more)
    finally:
        for response in taken:
            response.close()
