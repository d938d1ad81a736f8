"""The web page that the server brings, in headless Chromium: load it, attach a long text, ask, watch the answer come.

Skipped where Chromium, chromedriver or the page is missing; under SWAA_REQUIRE_BROWSER that is a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.test_serve import Question
from tests.support.serving import Running, serving
from tests.support.tiny import FULL, PREFILL, ScheduleKeys

pytestmark = pytest.mark.usefixtures("engine")

# what the page shows, and how long it is, at each change
_WATCH = """
window.lengths = [];
new MutationObserver(() => window.lengths.push(document.body.innerText.length))
    .observe(document.body, {subtree: true, childList: true, characterData: true});
"""


def missing(what: str) -> None:
    if os.environ.get("SWAA_REQUIRE_BROWSER"):
        pytest.fail(f"SWAA_REQUIRE_BROWSER is set, and yet: {what}", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing("Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(argument)
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(driver)))
    window.set_page_load_timeout(60)
    try:
        yield window
    finally:
        window.quit()


def load(browser: WebDriver, server: Running) -> None:
    if "no web page in this build" in server.log:
        missing("the engine was built without npm, and so without the page")
    browser.get(server.url + "/")
    WebDriverWait(browser, 30).until(lambda window: window.find_elements(By.TAG_NAME, "textarea"))


def ask(browser: WebDriver, question: str, file: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(file))
    WebDriverWait(browser, 10).until(lambda _: file.name in text_of(browser))
    browser.execute_script(_WATCH)
    field = browser.find_element(By.TAG_NAME, "textarea")
    field.send_keys(question)
    field.send_keys(Keys.ENTER)


def text_of(browser: WebDriver) -> str:
    return browser.find_element(By.TAG_NAME, "body").text


def test_it_answers_about_an_attached_text(browser: WebDriver, tmp_path: Path) -> None:
    question = Question(5, 10_000)
    (tmp_path / "report.txt").write_text(question.text)
    with serving(None, "-c", "8192", "-np", "1") as server:
        load(browser, server)
        ask(browser, question.question, tmp_path / "report.txt")
        WebDriverWait(browser, 60).until(lambda _: question.answer in text_of(browser))
        assert "Reasoning" in text_of(browser)
        # whatever it loads comes from this server
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert loaded
        assert all(address.startswith((server.url, "data:", "blob:")) for address in loaded), loaded


def test_the_answer_streams(browser: WebDriver, tmp_path: Path, tiny_model_factory: Callable[..., Path]) -> None:
    """A random model talks until it is stopped: the page grows step by step."""
    schedule = ScheduleKeys(64, 4, (PREFILL, FULL, PREFILL, PREFILL))
    (tmp_path / "notes.txt").write_text("Nothing new. " * 100)
    with serving(tiny_model_factory(schedule=schedule, n_ctx_train=100_000), "-np", "1") as server:
        load(browser, server)
        ask(browser, "What is new?", tmp_path / "notes.txt")

        def steps(_: WebDriver) -> bool:
            lengths = browser.execute_script("return window.lengths")
            return sum(after > before for before, after in pairwise(lengths)) >= 10

        WebDriverWait(browser, 60).until(steps)
        assert server.get("/slots")[1][0]["is_processing"]
        # nor does a page that still listens keep the server from ending
        assert server.stop() == 0
