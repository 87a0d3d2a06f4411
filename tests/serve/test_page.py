"""The page in headless Chromium, where there is one: it shows what the endpoint tells, on phones too."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from served import byte_tokenizer, tiny

import undertow as ut
from undertow.serve.engine import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
MODELS = {
    "carried": (None, ut.T2MLR(1, 2)),
    "looped": (ut.MiddleLoop(1, 2, 3, inject=True), ut.LRT(2)),
    "plain": (None, None),
}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=MODELS)
def url(request):
    """A server of its own for every model, in a thread; the address carries the model's name behind it."""
    import uvicorn

    from undertow.serve import api
    from undertow_cli.serve import listening

    app = api.build(tiny(*MODELS[request.param]).float(), byte_tokenizer(), Limits(), request.param)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/#{request.param}"
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page(browser, url, width, scheme):
    name = url.partition("#")[2]
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(url[:16]) else None)
    page.goto(url)
    page.fill("#prompt", "The current that runs")
    page.fill("#max_tokens", "12")
    page.click("#run")
    page.wait_for_selector("body[data-done]", timeout=60_000)
    columns = int(page.get_attribute("body", "data-done"))
    assert 21 < columns <= 33 and not said, said
    assert page.locator("#text span").count() == columns == page.locator("#columns th").count() - 1
    assert page.text_content("#text").startswith("The current that runs")
    heads = page.locator("#rows tr:not(.head) th").all_text_contents()
    assert "layer 3" in heads and ("norm" in heads) == (name != "plain")
    assert ("layer 1, pass 3" in heads) == (name == "looped") and ("layer 1: input" in heads) == (name == "carried")
    sections = page.locator("#rows .head th").all_text_contents()
    assert ("memory gate (mean)" in sections) == (name != "plain") and sections[0] == "predicted after"
    cells = page.locator("#rows tr:not(.head)").nth(0).locator("td").count()
    assert cells == columns
    page.locator("#text span").nth(5).click()
    assert page.text_content("#which") == "Token 6: u"
    for option in page.locator("#colour option").all():
        page.select_option("#colour", option.get_attribute("value"))
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth"), "the page itself scrolls sideways"
    if folder := os.environ.get("UNDERTOW_SHOTS"):
        Path(folder).mkdir(exist_ok=True)
        page.screenshot(path=f"{folder}/{name}-{width}-{scheme}.png", full_page=True)
    page.fill("#prompt", "x" * 300)
    page.click("#run")
    page.wait_for_selector("#error:not([hidden])")
    assert "at most 256 can be watched" in page.text_content("#error")
    page.close()
