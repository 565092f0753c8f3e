"""Chatting: streams, cut events, hostile text, other answers, two panes, errors; Chromium against a scripted server."""

import json
import re
import threading
from collections.abc import Iterator

from tests.serve.page.chromium import Browser
from tests.serve.page.reader import DONE, answers, button, contents, facts, questions, say
from tests.serve.page.scripted import Scripted, finish

HOSTILE = (
    "<img src=x onerror=\"document.title='HACKED'\"></script><script>document.title='HACKED'</script> &amp; "
    "`<b>code</b>` **<i>bold</i>** \u202e\x1b[31m\x00 javascript:alert(1) \U0001f999"
)


def test_a_chat_streams_and_says_what_it_took(page: Browser, scripted: Scripted) -> None:
    go = threading.Event()
    scripted.plan = lambda request: ["Hel", go, "lo", " you.", 0.05, " Bye.", finish("length", 1234)]
    say(page, "Hi", "running() && panes[0].turns[0].answer.text")
    page.wait("document.querySelector('.answer .words').innerText === 'Hel'")  # before the rest is said
    assert page.js("byId('send').textContent") == "Stop"
    go.set()
    page.wait(DONE)
    assert (questions(page), answers(page)) == (["Hi"], ["Hello you. Bye."])
    shown = facts(page)
    assert shown[:3] == ["good", "koala", "1,234 tokens"]
    assert re.fullmatch(r"[\d,.]+ tokens/s", shown[3])
    assert re.fullmatch(r"first after \d\.\d\d s", shown[4])
    assert shown[5:] == ["prompt 35 (20 cached)", "1,269 of 2,048 used", "cut off: no more tokens"]
    assert page.js("byId('live').textContent") == "The model: Hello you. Bye."
    say(page, "More?", "panes[0].turns.length === 2 && !running()")
    assert scripted.requests[1] == {
        "model": "koala",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello you. Bye.", "quality": "good"},
            {"role": "user", "content": "More?"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "marker": "good",
    }
    page.open(scripted.address)  # a reload keeps the chat
    page.wait("models.length")
    assert questions(page) == ["Hi", "More?"]


def test_events_may_be_cut_anywhere(page: Browser, scripted: Scripted) -> None:
    words = ["Grüße, ", "你好", " \U0001f999\r\n", "x"]
    stream = ": a comment\r\n\r\n"
    for number, word in enumerate(words):
        event = json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}, ensure_ascii=False)
        end = ("\n", "\r\n", "\r")[number % 3]
        lines = event.replace("{", f"{{{end}data:", 1)  # JSON may go on in another line, and so may an event
        stream += f"event: message{end}data:{' ' * (number % 2)}{lines}{end}{end}"
    data = stream.encode()
    scripted.plan = lambda request: [
        *(step for n in range(len(data)) for step in (data[n : n + 1], 0.02 if data[n] in b"\r\xf0" else 0.0005)),
        finish(),
    ]
    say(page, "Hi")
    assert page.js("panes[0].turns[0].answer.text") == "".join(words)
    assert page.js("panes[0].turns[0].answer.finish") == "stop"


def test_answers_are_text_and_the_formatting_is_nodes(page: Browser, scripted: Scripted) -> None:
    scripted.plan = lambda request: [HOSTILE, finish()]
    say(page, HOSTILE.replace("\x00", ""))
    shown = HOSTILE.replace("`", "").replace("**", "")
    shown = shown.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b").replace("\x00", "\\x00")
    assert answers(page) == [shown]
    assert page.js(
        "[...document.querySelectorAll('.answer .words code, .words strong')].map((n) => n.textContent)"
    ) == [
        "<b>code</b>",
        "<i>bold</i>",
    ]
    assert page.js("document.querySelectorAll('.turn img, .turn script, .turn b, .turn i').length") == 0
    markdown = (
        "A **b\nc** d\n\n3. one\n   - in `x`\n   - two\n4. three\n\n```py\na < b\n\n**no**\n```\n# Head\nend ``` **"
    )
    scripted.plan = lambda request: [*markdown, finish()]
    say(page, "Again", "panes[0].turns.length === 2 && !running()")
    tree = "(function tree(n) { return n.nodeType === 3 ? n.data : [n.tagName, ...[...n.childNodes].map(tree)] })"
    blocks = page.js(f"[...[...document.querySelectorAll('.answer .words')].at(-1).children].map({tree})")
    inner = ["UL", ["LI", "in ", ["CODE", "x"], ""], ["LI", "two"]]
    assert blocks == [
        ["P", "A ", ["STRONG", "b\nc"], " d"],
        ["OL", ["LI", "one", inner], ["LI", "three"]],
        ["DIV", ["DIV", ["SPAN", "py"], ["BUTTON", "Copy"]], ["PRE", ["CODE", "a < b\n\n**no**"]]],
        ["H4", "Head"],
        ["P", "end ``` **"],
    ]
    assert page.js("[...document.querySelectorAll('.answer ol')].at(-1).start") == 3
    page.js("fields.plain.click()")
    assert answers(page)[-1] == markdown
    assert "HACKED" not in page.js("document.title")


def test_answer_again_edit_new_chat_and_undo(page: Browser, scripted: Scripted) -> None:
    scripted.plan = lambda request: [f"answer {len(scripted.requests)}", finish()]
    for number, question in enumerate(("one", "two", "three"), start=1):
        say(page, question, f"panes[0].turns.length === {number} && !running()")
    page.click(button("Answer again"))
    page.wait("panes[0].turns[2].answer.text === 'answer 4' && !running()")
    assert contents(scripted.requests[3]) == contents(scripted.requests[2])
    page.click("#undo")
    assert answers(page) == ["answer 1", "answer 2", "answer 3"]
    page.click("#message")
    page.press("Enter", control=True)  # answer again, by the keyboard
    page.wait("panes[0].turns[2].answer.text === 'answer 5' && !running()")
    page.click(button("Edit", 1))
    assert page.js("document.activeElement.value") == "two"
    page.type(" and a half")
    page.press("Enter")
    page.wait("panes[0].turns.length === 2 && !running()")
    assert contents(scripted.requests[5]) == ["one", "answer 1", "two and a half"]
    assert answers(page) == ["answer 1", "answer 6"]
    page.click("#undo")
    assert questions(page) == ["one", "two", "three"]
    page.press("ArrowUp")  # edit the last one
    page.wait("document.activeElement.value === 'three'")
    page.press("Escape")
    assert questions(page) == ["one", "two", "three"]
    page.press("k", control=True)
    assert (questions(page), page.js("document.activeElement.id")) == ([], "message")
    page.click("#undo")
    assert answers(page) == ["answer 1", "answer 2", "answer 5"]


def test_escape_stops_keeps_what_came_and_lets_the_server_know(page: Browser, scripted: Scripted) -> None:
    scripted.plan = lambda request: ["Some words", *[0.02, " and more"] * 500, finish()]
    say(page, "Hi", "panes[0].turns[0].answer.text.length > 20")
    page.press("Escape")
    page.wait(DONE)
    assert scripted.gone.wait(10)
    assert answers(page)[0].startswith("Some words and more")
    assert facts(page)[-1] == "stopped by you"
    scripted.plan = lambda request: [threading.Event(), finish()]
    say(page, "And now?", "running()")
    page.click("#send")  # it says Stop now; nothing has come, so the turn does not go into the next prompt
    page.wait("!running()")
    scripted.plan = lambda request: ["Yes.", finish()]
    say(page, "Still there?", "panes[0].turns.length === 3 && !running()")
    assert [text[:10] for text in contents(scripted.requests[2])] == ["Hi", "Some words", "Still ther"]
    assert "no answer: left out" in page.js("document.querySelectorAll('.facts')[1].textContent")


def test_two_panes_answer_the_same_message_at_the_same_time(page: Browser, scripted: Scripted) -> None:
    say(page, "Before")
    both = threading.Barrier(2, timeout=20)

    def plan(request: dict) -> Iterator[str | dict]:
        both.wait()  # neither is answered before both have asked
        yield f"{request['model']} {request.get('marker')} {len(request['messages'])}"
        yield finish()

    scripted.plan = plan
    page.press("\\", control=True)
    say(page, "One", "panes.every((pane) => pane.turns[1]?.answer.finish)")
    assert answers(page, 0) == ["Hello there.", "koala good 3"]
    assert answers(page, 1) == ["Hello there.", "koala bad 3"]
    page.js("panes[1].select.value = 'vicuna'; panes[1].select.dispatchEvent(new Event('change'))")
    assert page.js("panes[1].markers.hidden")
    say(page, "Two", "panes.every((pane) => pane.turns[2]?.answer.finish)")
    by_model = {request["model"]: request for request in scripted.requests[-2:]}
    assert contents(by_model["koala"])[3] == "koala good 3"
    assert contents(by_model["vicuna"])[3] == "koala bad 3"
    assert not any("quality" in message for message in by_model["vicuna"]["messages"])
    assert "marker" not in by_model["vicuna"]
    page.click(button("Edit", 1))
    page.type("!")
    page.press("Enter")
    page.wait("panes.every((pane) => pane.turns.length === 2 && pane.turns[1].answer.finish)")
    assert questions(page, 0) == questions(page, 1) == ["Before", "One!"]
    scripted.plan = lambda request: ["once more", finish()]
    page.click("(panes[1].list.querySelector('.turn:last-child .answer .doings button:last-child'))")
    page.wait("panes[1].turns[1].answer.text === 'once more' && !running()")
    assert answers(page, 0)[1] == "koala good 3"  # the other pane's is its own
    page.click("#split")
    say(page, "Alone", "panes[0].turns.length === 3 && !running()")
    page.click("#split")
    assert answers(page, 1) == answers(page, 0)  # it had missed a turn


def test_errors_are_told_in_the_servers_words(page: Browser, scripted: Scripted) -> None:
    error = {"error": {"message": "The queue is full: <64>.", "type": "rate_limit_error", "param": None, "code": "x"}}
    trouble = "document.querySelector('.turn:last-child .trouble span')?.textContent"
    scripted.plan = lambda request: (429, error)
    say(page, "Hi")
    assert page.js(trouble) == "The queue is full: <64>. (The server asks to wait 7 s.)"
    assert page.js("document.querySelector('.trouble').getAttribute('role')") == "alert"
    scripted.plan = lambda request: ["Some ", f"data: {json.dumps(error)}\n\n".encode()]
    page.click(button("Retry"))
    page.wait(f"{trouble} === 'The queue is full: <64>.' && !running()")
    assert answers(page) == ["Some "]
    scripted.plan = lambda request: ["Half an"]  # and the connection ends
    page.click(button("Retry"))
    page.wait(f"{trouble}?.startsWith('The connection was lost. What came is kept.') && !running()")
    assert answers(page) == ["Half an"]
    scripted.plan = lambda request: (500, {"unexpected": 1})
    page.click(button("Retry"))
    page.wait(f"{trouble} === 'HTTP 500 Internal Server Error (The server asks to wait 7 s.)'")
    scripted.plan = lambda request: ["Whole.", finish()]
    page.click(button("Retry"))
    page.wait(f"!({trouble}) && !running()")
    assert answers(page) == ["Whole."]
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    say(page, "Hi?", f"{trouble}?.startsWith('The server does not answer') && !running()")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
