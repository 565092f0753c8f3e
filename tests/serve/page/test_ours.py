"""The chat page against our own server and a real model, whose answers are those of transformers."""

import time

import pytest

from easylm_like.serve.api import Service
from easylm_like.serve.engine import Engine
from tests.serve.conftest import Reference, Start
from tests.serve.page.chromium import Browser
from tests.serve.page.reader import answers, facts, say


@pytest.fixture
def page(chromium: Browser, start: Start, engine: Engine) -> Browser:
    url = start(Service(engines={"koala": engine}, keys=("sk-test",)))
    chromium.new_page()
    chromium.open(f"{url}/")
    chromium.wait("document.activeElement === byId('key') && document.querySelector('.trouble') !== null")
    chromium.type("sk-test")
    chromium.press("Tab")
    chromium.wait("models.length")
    return chromium


def test_good_against_bad_side_by_side(page: Browser, reference: Reference) -> None:
    page.js("Object.assign(fields.temperature, {value: 0}); Object.assign(fields.max_tokens, {value: 24})")
    page.press("\\", control=True)
    talk = []
    for turn, question in enumerate(("Tell me a story about a cat.", "And a dog?")):
        say(page, question, f"panes.every((pane) => pane.turns[{turn}]?.answer.finish)")
        talk.append({"role": "user", "content": question})
        if turn == 0:
            for pane, quality in enumerate(("good", "bad")):
                wanted = reference.text(reference.chat(talk, quality=quality), 24).split("USER:")[0].removeprefix(" ")
                assert page.js(f"panes[{pane}].turns[0].answer.text") == wanted
    assert page.js("panes.map((pane) => pane.turns[1].answer.error)") == ["", ""]
    assert len(answers(page, 0)) == len(answers(page, 1)) == 2
    shown = " ".join(facts(page))
    assert shown.startswith("bad koala")
    assert " tokens/s first after " in shown
    assert "cached) " in shown  # the first turn is in the cache
    assert " of 256 used cut off: no more tokens" in shown


def test_a_stopped_answer_leaves_its_slot_and_an_error_is_in_our_words(page: Browser, engine: Engine) -> None:
    page.js("fields.temperature.value = 1; fields.seed.value = 3")
    say(page, "Tell me a story.", "panes[0].turns[0]?.answer?.text")
    page.press("Escape")
    page.wait("!running()")
    end = time.monotonic() + 10
    while engine.snapshot().running and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.snapshot().running == 0
    page.js("fields.system.value = 'Be brief.'")
    say(page, "Hi", "panes[0].turns[1]?.answer.error")
    assert page.js("document.querySelector('.trouble span').textContent").startswith("the koala template takes user")
    page.js("fields.system.value = ''")
    say(page, "word " * 300, "panes[0].turns[2]?.answer.error")
    last = "[...document.querySelectorAll('.trouble span')].at(-1).textContent"
    assert "but this model's context holds 256 for prompt and answer together" in page.js(last)
