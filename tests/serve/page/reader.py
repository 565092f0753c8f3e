"""What a reader of the chat page does and sees."""

from tests.serve.page.chromium import Browser

DONE = "panes[0].turns.length && !running()"


def say(page: Browser, text: str, until: str = DONE) -> None:
    page.js("byId('message').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(f"byId('message').value === '' && {until}")


def answers(page: Browser, pane: int = 0) -> list[str]:
    return page.js(f"[...panes[{pane}].list.querySelectorAll('.answer .words')].map((node) => node.innerText)")


def questions(page: Browser, pane: int = 0) -> list[str]:
    return page.js(f"[...panes[{pane}].list.querySelectorAll('.question .words')].map((node) => node.innerText)")


def button(text: str, which: int = -1) -> str:
    return f"([...document.querySelectorAll('button')].filter((node) => node.textContent === {text!r}).at({which}))"


def facts(page: Browser) -> list[str]:
    return page.js("[...[...document.querySelectorAll('.facts')].at(-1).children].map((node) => node.textContent)")


def contents(request: dict) -> list[str]:
    return [message["content"] for message in request["messages"]]
