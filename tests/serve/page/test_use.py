"""Using it: settings, keys, screen readers, widths, colours, files; Chromium against a scripted server."""

import json
import re
import threading
from importlib.resources import files

import pytest

from easylm_like.data.conversation import Quality, Role, conversation_from_json
from tests.serve.page.chromium import Browser
from tests.serve.page.reader import DONE, answers, button, contents, questions, say
from tests.serve.page.scripted import MODELS, Scripted, finish

PAGE = (files("easylm_like.serve") / "page.html").read_text("utf-8")


def test_the_page_needs_nothing_from_outside_and_makes_no_html_of_text() -> None:
    assert re.findall(r"https?:|\burl\(|@import|[\"'(=]\s*//|XMLHttpRequest|\bsrc=", PAGE) == []
    assert re.findall(r"\bhref=\"(?!data:,\")|fetch\((?!\"v1/)", PAGE) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", PAGE) == []
    assert "default-src 'none'" in PAGE
    assert "connect-src 'self'" in PAGE


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_borders_have_contrast_enough(theme: int) -> None:
    found = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", PAGE)
    color = {name: pair[theme] for name, *pair in found}
    assert len(color) == 16
    pairs = [(text, ground) for text in ("text", "muted", "accent") for ground in ("ground", "panel", "raised")]
    pairs += [(kind, f"{kind}-ground") for kind in ("good", "bad", "warn", "accent")]
    pairs += [("text", "accent-ground"), ("on-accent", "accent"), ("warn", "raised")]
    wanted = [(*pair, 4.5) for pair in pairs]
    wanted += [("edge", ground, 3.0) for ground in ("ground", "panel", "raised")]  # of what can be written into
    for text, ground, least in wanted:
        lighter, darker = sorted((luminance(color[text]), luminance(color[ground])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= least, (text, ground)


def test_settings_are_sent_kept_and_checked(page: Browser, scripted: Scripted) -> None:
    page.press(",", control=True)
    assert page.js("document.activeElement.id") == "system"
    page.type("Be brief.")
    values = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 99, "seed": 7}
    values |= {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    for name, value in values.items():
        page.click(f"[name={name}]")
        page.type(str(value))
    page.click("#stop")
    page.type("\\nUSER:\nEND")
    page.click("#theme")
    page.js("panes[0].markers.querySelectorAll('input')[1].click()")
    page.open(scripted.address)
    page.wait("models.length")
    say(page, "Hi")
    sent = scripted.requests[0]
    assert {name: sent[name] for name in values} == values
    assert (sent["stop"], sent["marker"]) == (["\nUSER:", "END"], "bad")
    assert contents(sent) == ["Be brief.", "Hi"]
    assert page.js("document.documentElement.dataset.theme") == "light"
    page.click("#gear")
    page.js("fields.top_p.value = '1.5'")
    page.js("byId('message').focus()")
    page.type("not sent")
    page.press("Enter")
    assert page.js("document.activeElement.name") == "top_p"
    page.click("#defaults")
    page.js("byId('message').focus()")
    page.press("Enter")
    page.wait("panes[0].turns.length === 2 && !running()")
    assert set(scripted.requests[1]) == {"model", "messages", "stream", "stream_options", "marker"}
    assert len(scripted.requests) == 2


def test_the_api_key_stays_in_the_tab(page: Browser, scripted: Scripted) -> None:
    scripted.key = "s3cret"
    page.open(scripted.address)
    page.wait("document.querySelector('.trouble')?.textContent.startsWith('Wrong API key.')")
    assert page.js("document.activeElement.id") == "key"
    page.type("s3cret")
    page.press("Tab")
    page.wait("models.length")
    assert not page.js("document.querySelector('.trouble')")
    page.js("saveSettings()")
    assert "s3cret" in page.js("JSON.stringify({...sessionStorage})")
    assert "s3cret" not in page.js("JSON.stringify({...localStorage}) + document.cookie + location")
    page.open(scripted.address)
    page.wait("models.length")


def test_the_reader_who_scrolled_up_stays_there(page: Browser, scripted: Scripted) -> None:
    scripted.plan = lambda request: [*["A line that is long enough.\n\n"] * 60, go, *["And more.\n\n"] * 60, finish()]
    go = threading.Event()
    say(page, "Tell me", "panes[0].turns[0].answer.text.length > 1700")
    page.wait("isAtEnd(panes[0]) && panes[0].newest.hidden")
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=400, y=300, deltaX=0, deltaY=-500)
    page.wait("!panes[0].stuck && !panes[0].newest.hidden")
    before = page.wait("panes[0].log.scrollTop")
    go.set()
    page.wait(DONE)
    assert page.js("panes[0].log.scrollTop") == before
    page.click(button("↓ Newest", 0))
    page.wait("isAtEnd(panes[0]) && panes[0].newest.hidden")


def test_the_keyboard_is_enough(page: Browser, scripted: Scripted) -> None:
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two?")
    page.js(
        "byId('message').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert scripted.requests == []
    page.press("?")  # in the box it is a character
    page.press("Enter")
    page.wait(DONE)
    assert contents(scripted.requests[0]) == ["one\ntwo??"]
    page.js("document.activeElement.blur()")
    page.press("?")
    assert page.js("byId('help').open")
    page.press("Escape")
    assert not page.js("byId('help').open")
    page.js("document.activeElement.blur()")
    page.press("/")
    assert page.js("[document.activeElement.id, document.activeElement.value]") == ["message", ""]
    seen = []
    for _ in range(30):  # everything is reached, and shows that it is
        page.press("Tab")
        outline = (
            "getComputedStyle(n.matches('#message') ? n.parentNode : n.matches('[type=radio]') ? n.nextSibling : n)"
        )
        name = "n.id || n.tagName + (n.type === 'radio' ? n.value : n.tagName === 'BUTTON' ? n.textContent : '')"
        seen += page.js(
            f"((n) => n === document.body ? [] : [[{name}, {outline}.outlineStyle]])(document.activeElement)"
        )
    wanted = "send new split theme gear ask SELECT INPUTgood BUTTONEdit BUTTONCopy message".split()
    assert {*wanted, "BUTTONAnswer again"} <= {name for name, _ in seen}
    assert {style for _, style in seen} == {"solid"}


def test_everything_has_a_name_for_those_who_listen(page: Browser, scripted: Scripted) -> None:
    scripted.plan = lambda request: ["```\nx\n```", finish()]
    page.press("\\", control=True)
    page.press(",", control=True)
    say(page, "Hi")
    page.call("Accessibility.enable")
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = {
        "button",
        "textbox",
        "radio",
        "checkbox",
        "combobox",
        "spinbutton",
        "group",
        "region",
        "main",
        "form",
        "dialog",
    }
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    assert [role for role, name in found if role in named and not name.strip()] == []
    for wanted in (
        ("combobox", "Model B"),
        ("radio", "bad"),
        ("textbox", "Message"),
        ("spinbutton", "Temperature"),
        ("button", "Side by side"),
        ("heading", "Model A says"),
        ("form", "Settings"),
    ):
        assert wanted in found
    assert page.js("document.querySelectorAll('[role=status]').length") == 2
    identities = page.js("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize("width", [320, 760, 1600])
def test_nothing_sticks_out_at_any_width(page: Browser, scripted: Scripted, width: int) -> None:
    scripted.plan = lambda request: ["W" * 300 + "\n```\n" + "c" * 300 + "\n```", finish()]
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=640, deviceScaleFactor=1, mobile=False)
    try:
        say(page, "M" * 300)
        for step in ("1", "byId('split').click()", "byId('gear').click()"):
            page.js(step)
            whole = "document.documentElement"
            assert page.js(f"[{whole}.scrollWidth, {whole}.scrollHeight]") == [width, 640]
            rights = "[...document.querySelectorAll('header button')].map((n) => n.getBoundingClientRect().right)"
            assert max(page.js(rights)) <= width
            assert page.js("panes[0].log.scrollWidth <= panes[0].log.clientWidth")
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_dark_and_light(page: Browser) -> None:
    def ground(system: str) -> str:
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
        return page.js("getComputedStyle(document.body).backgroundColor")

    light, dark = "rgb(243, 245, 247)", "rgb(14, 17, 22)"
    assert (ground("light"), ground("dark")) == (light, dark)
    page.click("#theme")
    assert (ground("light"), ground("dark")) == (light, light)
    page.click("#theme")
    assert (ground("light"), ground("dark")) == (dark, dark)
    assert page.js("byId('theme').getAttribute('aria-label')") == "Colours: dark"


def test_a_chat_goes_into_a_file_of_conversations_and_comes_back(page: Browser, scripted: Scripted) -> None:
    scripted.plan = lambda request: ["B\ud83d", finish("length")] if request["marker"] == "bad" else ["Good.", finish()]
    page.js("fields.system.value = 'Be brief.'")
    page.press("\\", control=True)
    say(page, "One", "panes.every((pane) => pane.turns[0]?.answer.finish)")
    lines = "openPanes().map((pane) => JSON.stringify(conversationOf(pane, 'chat-1')))"
    good, bad = (conversation_from_json(json.loads(line), "here") for line in page.js(lines))
    assert (good.id, bad.id, good.group, bad.group) == ("chat-1-a", "chat-1-b", "chat-1", "chat-1")
    assert [message.role for message in good.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT]
    assert (good.messages[2].content, good.messages[2].quality, good.messages[2].weight) == ("Good.", Quality.GOOD, 1)
    assert (bad.messages[2].content, bad.messages[2].quality, bad.messages[2].weight) == ("B\ufffd", Quality.BAD, 0)
    text = "".join(line + "\n" for line in page.js(lines))
    page.js("newChat(); fields.system.value = ''")
    page.js(f"openFile(new File([{json.dumps(text)}], 'chat.jsonl'))")
    assert (questions(page, 0), answers(page, 0), answers(page, 1)) == (["One"], ["Good."], ["B\ufffd"])
    assert page.js("fields.system.value") == "Be brief."
    page.js('openFile(new File([\'{"messages": [{"role": "tool", "content": "x"}]}\'], \'other.jsonl\'))')
    assert "other.jsonl is no conversation as JSONL" in page.js("byId('notice').textContent")
    assert questions(page) == ["One"]


def test_only_models_that_can_chat_and_only_markers_that_there_are(page: Browser, scripted: Scripted) -> None:
    assert page.js("[...panes[0].select.options].map((o) => [o.value, o.disabled])") == [
        ["koala", False],
        ["vicuna", False],
        ["base", True],
    ]
    scripted.models = [MODELS[2]]
    page.open(scripted.address)
    page.wait("document.querySelector('.trouble')?.textContent.startsWith('No model here can chat')")
    scripted.models = [{"id": "<b>x</b>", "object": "model", "markers": ["good"]}]
    page.click(button("Retry"))
    page.wait("document.querySelector('.empty b')?.textContent === '<b>x</b>'")
    assert page.js("panes[0].markers.hidden")
    say(page, "Hi")
    assert "marker" not in scripted.requests[0]
