"""The page at /, in a real browser in front of a real server with keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from evospec.server.tenants import hash_key
from tests.running_browser import BINARY, running_browser
from tests.running_server import AT_ONCE, SMALL, RunningServer

pytestmark = pytest.mark.skipif(
    BINARY is None and "CI" not in os.environ, reason="chromium is not installed (Debian package chromium)"
)

KEYS = {"acme": "secret-a", "beta": "secret-b", "prometheus": "secret-p"}
ADMIN = "secret-o"
QUESTION = "Write a Python function that returns the n-th Fibonacci number."
SOURCES = ("target", "draft", "session", "copied", "prediction")
MOST_TOKENS = 96
TIMEOUT = 60_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    pairs = ",".join(f"{tenant}={hash_key(key)}" for tenant, key in KEYS.items())
    options = ["--auth.keys", pairs, "--auth.admin_key", hash_key(ADMIN)]
    server = RunningServer(tmp_path_factory.mktemp("page") / "log", [*SMALL, *AT_ONCE, *options])
    server.wait_until_healthy()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


def opened(browser: Browser, server: RunningServer, key: str, width: int = 1000, scheme: str = "light") -> Page:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(server.base_url)
    page.fill("#key", key)
    page.press("#key", "Enter")
    return page


def ask(page: Page, question: str) -> str:
    """Ask, wait for the answer, and return the line of figures below it."""
    expect(page.locator("#about")).not_to_be_empty(timeout=TIMEOUT)
    page.fill("#max-tokens", str(MOST_TOKENS))
    page.fill("#prompt", question)
    page.press("#prompt", "Enter")
    expect(page.locator("#send")).to_have_text("Send", timeout=TIMEOUT)
    return page.locator(".assistant .figures").last.inner_text()


def counted(figures: str) -> dict[str, int]:
    return {source: int(re.search(rf"{source} (\d+)", figures)[1]) for source in SOURCES}  # type: ignore[index]


def metric(server: RunningServer, name: str, tenant: str) -> int:
    headers = {"Authorization": f"Bearer {KEYS['prometheus']}"}
    text = httpx.get(f"{server.base_url}/metrics", headers=headers, trust_env=False).raise_for_status().text
    values = re.findall(rf'^evospec:{name}_total{{.*tenant="{tenant}".*}} (\S+)$', text, re.MULTILINE)
    return int(sum(map(float, values)))


def test_an_answer_is_coloured_by_where_its_tokens_came_from(browser: Browser, server: RunningServer) -> None:
    page = opened(browser, server, KEYS["acme"])
    page.check("#compare")
    figures = ask(page, QUESTION)
    total, by_source = int(figures.split()[0]), counted(figures)
    assert sum(by_source.values()) == total
    assert by_source["draft"] > 0
    assert by_source["target"] > 0
    assert "the same answer" in figures
    answer = page.locator(".assistant .text")
    for source in SOURCES:
        shown = answer.locator(f".{source}").count()
        assert by_source[source] - 1 <= shown <= by_source[source]  # the last token ends the answer and is no text
    asked = {"model": "smollm2-135m", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    response = httpx.post(
        f"{server.base_url}/v1/chat/completions",
        json=asked | {"max_tokens": MOST_TOKENS},
        headers={"Authorization": f"Bearer {KEYS['acme']}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.inner_text() == response.json()["choices"][0]["message"]["content"]


def test_a_prediction_goes_with_one_question(browser: Browser, server: RunningServer) -> None:
    page = opened(browser, server, KEYS["acme"])
    page.click("summary")
    page.fill("#prediction", "Hello there.")
    for expected in ({"type": "content", "content": "Hello there."}, None):
        with page.expect_request("**/v1/chat/completions") as request:
            figures = ask(page, "Say hello.")
        assert json.loads(request.value.post_data or "").get("prediction") == expected
        assert sum(counted(figures).values()) == int(figures.split()[0])


def begin_long_answer(page: Page) -> None:
    """Ask for an answer of many tokens, and wait for the first of them."""
    expect(page.locator("#about")).not_to_be_empty(timeout=TIMEOUT)
    page.fill("#max-tokens", "1500")
    page.fill("#prompt", "Write a very long story.")
    page.press("#prompt", "Enter")
    expect(page.locator(".assistant .token").nth(5)).to_be_attached(timeout=TIMEOUT)


def asked_messages(page: Page, question: str) -> list[dict[str, str]]:
    """Ask, wait for the answer, and return the messages of the request."""
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, question)
    messages: list[dict[str, str]] = json.loads(request.value.post_data or "")["messages"]
    return messages


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(browser: Browser, server: RunningServer) -> None:
    page = opened(browser, server, KEYS["acme"])
    begin_long_answer(page)
    page.press("#prompt", "Enter")  # sends nothing and stops nothing
    expect(page.locator("#send")).to_have_text("Stop")
    page.click("#send")
    expect(page.locator("#send")).to_have_text("Send")
    part = page.locator(".assistant .text").inner_text()
    figures = page.locator(".assistant .figures").inner_text()
    assert 5 < int(figures.split()[0]) == sum(counted(figures).values()) < 1500
    expect(page.locator("#problem")).to_be_hidden()
    _, answered, _ = asked_messages(page, "Say hello.")
    assert answered["role"] == "assistant"
    assert answered["content"].strip() == part.strip()


def test_a_new_chat_ends_the_answer_that_is_coming(browser: Browser, server: RunningServer) -> None:
    page = opened(browser, server, KEYS["acme"])
    with page.expect_event("requestfailed", timeout=TIMEOUT) as ended:
        begin_long_answer(page)
        page.click("#clear")
    assert ended.value.url.endswith("/v1/chat/completions")
    expect(page.locator("#messages li")).to_have_count(0)
    expect(page.locator("#problem")).to_be_hidden()
    assert [message["content"] for message in asked_messages(page, "Say hello.")] == ["Say hello."]
    assert len(asked_messages(page, "Say goodbye.")) == 3


def test_an_answer_stays_where_the_one_without_drafts_fails(browser: Browser, server: RunningServer) -> None:
    page = opened(browser, server, KEYS["acme"])

    def refuse_without_drafts(route: Route) -> None:
        if "num_speculative_tokens" in (route.request.post_data or ""):
            route.fulfill(status=503, json={"error": {"message": "Too much at once."}})
        else:
            route.continue_()

    page.route("**/v1/chat/completions", refuse_without_drafts)
    page.check("#compare")
    assert sum(counted(ask(page, "Say hello.")).values()) > 0
    expect(page.locator("#problem")).to_have_text("Too much at once.")
    assert page.input_value("#prompt") == ""
    page.uncheck("#compare")
    assert [message["role"] for message in asked_messages(page, "Again.")] == ["user", "assistant", "user"]


def test_acceptance_shown_is_that_of_the_metrics_and_each_tenant_sees_its_own(
    browser: Browser, server: RunningServer
) -> None:
    for tenant in ("acme", "beta"):
        ask(opened(browser, server, KEYS[tenant]), QUESTION)
    page = opened(browser, server, KEYS["beta"])
    page.click("#tab-live")
    rows = page.locator("#tenants tbody tr")
    expect(rows).to_have_count(1, timeout=TIMEOUT)
    cells = rows.first.locator("td").all_inner_texts()
    accepted, drafted = (
        metric(server, f"spec_decode_num_{name}", "beta") for name in ("accepted_tokens", "draft_tokens")
    )
    assert cells[0] == "beta"
    assert cells[3] == f"{accepted} of {drafted}"
    expect(page.locator("#engine tr")).to_have_count(0)
    page.fill("#key", ADMIN)
    page.press("#key", "Enter")
    expect(rows).to_have_count(2, timeout=TIMEOUT)
    expect(page.locator("#engine tbody tr")).to_have_count(1)


def test_a_wrong_key_and_a_refused_question_are_told(browser: Browser, server: RunningServer) -> None:
    page = opened(browser, server, "wrong")
    expect(page.locator("#problem")).to_contain_text("API key", timeout=TIMEOUT)
    page = opened(browser, server, KEYS["acme"])
    expect(page.locator("#about")).not_to_be_empty(timeout=TIMEOUT)
    page.fill("#max-tokens", "0")
    page.evaluate("document.getElementById('ask').noValidate = true")
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    expect(page.locator("#problem")).to_contain_text("max_tokens", timeout=TIMEOUT)
    assert page.input_value("#prompt") == QUESTION
    expect(page.locator("#messages li")).to_have_count(0)


def not_there_yet(route: Route) -> None:
    route.fulfill(status=503, json={"error": {"message": "The engine is starting."}})


def test_a_page_opened_while_the_engine_starts_learns_the_model_later(browser: Browser, server: RunningServer) -> None:
    page = browser.new_context().new_page()
    page.route("**/v1/overview", not_there_yet)
    page.goto(server.base_url)
    page.fill("#key", KEYS["acme"])
    page.press("#key", "Enter")
    expect(page.locator("#problem")).to_have_text("The engine is starting.")
    page.unroute("**/v1/overview")
    expect(page.locator("#about")).to_contain_text("smollm2-135m", timeout=TIMEOUT)
    expect(page.locator("#problem")).to_be_hidden()
    assert sum(counted(ask(page, "Say hello.")).values()) > 0


def test_live_tells_a_problem_only_as_long_as_it_lasts(browser: Browser, server: RunningServer) -> None:
    page = opened(browser, server, KEYS["acme"])
    expect(page.locator("#about")).not_to_be_empty(timeout=TIMEOUT)
    page.click("#tab-live")
    page.route("**/v1/overview", not_there_yet)
    expect(page.locator("#problem")).to_have_text("The engine is starting.", timeout=TIMEOUT)
    page.unroute("**/v1/overview")
    expect(page.locator("#problem")).to_be_hidden(timeout=TIMEOUT)


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1400, "light")])
def test_it_fits_narrow_and_wide_windows(
    browser: Browser, server: RunningServer, width: int, scheme: str, tmp_path: Path
) -> None:
    page = opened(browser, server, KEYS["acme"], width, scheme)
    ask(page, "Say hello in three languages.")
    for tab in ("chat", "live"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_the_page_runs_nothing_from_elsewhere(server: RunningServer) -> None:
    response = httpx.get(server.base_url, trust_env=False)
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "http" not in re.sub(r"http-equiv|https?://www\.w3\.org", "", response.text)
    assert httpx.get(f"{server.base_url}/page/../app.py", trust_env=False).status_code == 404
    assert httpx.get(f"{server.base_url}/page/%2e%2e%2fapp.py", trust_env=False).status_code == 404


def test_docs_ask_for_a_key_and_show_every_route(browser: Browser, server: RunningServer) -> None:
    page = browser.new_context().new_page()
    problems: list[str] = []
    page.on("dialog", lambda dialog: dialog.accept(KEYS["acme"]))
    page.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    page.goto(f"{server.base_url}/docs")
    expect(page.locator("[data-path='/v1/chat/completions']")).to_be_visible(timeout=TIMEOUT)
    expect(page.locator("[data-path='/version']")).to_be_visible()
    page.locator("[data-path='/version']").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("200", timeout=TIMEOUT)
    assert problems == []
