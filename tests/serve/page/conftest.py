"""Chromium, and the chat page of a scripted server in it; skipped where there is no Chromium."""

import threading
from collections.abc import Iterator

import pytest

from tests.serve.page.chromium import Browser, running_chromium
from tests.serve.page.scripted import Scripted


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with running_chromium() as browser:
        if browser is None:
            pytest.skip("no chromium here: the page was not opened in a browser")
        yield browser


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def page(chromium: Browser, scripted: Scripted) -> Iterator[Browser]:
    """The page of the scripted server in a new tab; whatever its console complains about fails the test."""
    chromium.new_page()
    chromium.open(scripted.address)
    chromium.wait("models.length")
    yield chromium
    chromium.js("1")
    expected = "Failed to load resource"  # the browser's own line about an answer that is an error
    assert [error for error in chromium.errors if not error.startswith(expected)] == []
