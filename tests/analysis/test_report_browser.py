"""The pages in a headless Chromium: no errors, no network, no sideways scrolling, and what can be touched works."""

import shutil

import pytest
import yaml

from undertow_cli import main

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
PAIR = {
    "name": "pair",
    "seeds": [0, 1],
    "backbone": {"family": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                 "num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True},
    "training": {"batch_size": 2, "learning_rate": 3e-3, "log_every": 1, "precision": "float32", "tensorboard": False},
    "evaluation": {"points": 3, "rows": 2, "new_tokens": 4},
    "budget": {"steps": 12, "match": "steps"},
    "models": [{"name": "plain"}, {"name": "a <b>& carried one", "time": {"method": "T2MLR", "start": 0, "end": 1},
                                   "schedule": {"kind": "Cyclic", "G": 4, "n": 1}}],
}  # fmt: skip
TEXT = "The memory of a token is what it leaves behind. <script>alert(1)</script> It is read by the next one.\n"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A comparison of two models and two seeds, and the report of a run of it."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "corpus").mkdir()
    for n in range(6):
        (folder / "corpus" / f"{n}.txt").write_text(TEXT * 20 + f"{n}\n")
    data = {"source": str(folder / "corpus"), "vocab_size": 300, "seq_len": 32, "validation_rows": 4,
            "cache_dir": str(folder / "cache")}  # fmt: skip
    (folder / "pair.yaml").write_text(yaml.safe_dump(PAIR | {"data": data}))
    with pytest.raises(SystemExit) as end:
        main(["compare", str(folder / "pair.yaml"), "--out", str(folder / "out"), "--device", "cpu"])
    assert not end.value.code
    return {
        "comparison": folder / "out" / "report.html",
        "run": folder / "out" / "a <b>& carried one-seed0" / "report.html",
    }


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """`open_page(path, width, scheme)`: a page without a network; afterwards it must not have complained."""
    said, asked, contexts = [], [], []

    def opened(path, width=1200, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("h1")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked) and len(asked) >= len(contexts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_it_is_drawn(open_page, pages, name, width, scheme):
    page = open_page(pages[name], width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
    red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (red > 200) == (scheme == "light")
    drawn = "[...document.querySelectorAll('.chart')].map(figure => figure.querySelector('circle, polyline') !== null)"
    assert all(page.evaluate(drawn)) and page.locator(".chart").count() >= (8 if name == "run" else 3)
    outside = """[...document.querySelectorAll('.chart svg text')].filter(t => {
        const b = t.getBoundingClientRect(), f = t.closest('svg').getBoundingClientRect();
        return b.left < f.left - 1 || b.right > f.right + 1 || b.bottom > f.bottom + 1; }).map(t => t.textContent)"""
    assert page.evaluate(outside) == []
    paper = "getComputedStyle(document.querySelector('.undertow-plan .paper')).fill.match(/\\d+/g).map(Number)[0]"
    assert (page.evaluate(paper) > 200) == (scheme == "light")
    assert len(page.screenshot(full_page=True)) > 30_000


def test_curves_answer_to_the_pointer(open_page, pages):
    page = open_page(pages["run"])
    figure = page.locator('[data-chart="loss"]')
    figure.scroll_into_view_if_needed()
    line, tip, reset = figure.locator("polyline"), figure.locator(".tip"), figure.locator(".reset")
    box, before = figure.locator("svg").bounding_box(), line.get_attribute("points")
    middle = box["y"] + box["height"] / 2
    assert tip.is_hidden() and reset.is_hidden()
    page.mouse.move(box["x"] + box["width"] * 0.5, middle)
    assert tip.is_visible() and tip.inner_text().startswith("step ") and "loss: " in tip.inner_text()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=4)
    page.mouse.up()
    assert line.get_attribute("points") != before and reset.is_visible()
    reset.click()
    assert line.get_attribute("points") == before and reset.is_hidden()
    gates = page.locator('[data-chart="gates"]')
    assert gates.locator("polyline").count() == 2
    gates.locator(".keys button").first.click()
    assert gates.locator("polyline").count() == 1


def test_the_text_shows_what_is_chosen(open_page, pages):
    page = open_page(pages["run"], 390)
    tokens = page.locator("#heat span")
    assert "<script" in page.locator("#heat").inner_text() and tokens.count() > 10

    def colours():
        return page.evaluate("[...document.querySelectorAll('#heat span')].map(s => s.style.background)")

    before = colours()
    assert len(set(before)) > 3
    page.locator("#maps").select_option(label="loss on this token")
    assert colours() != before and "nats" in page.locator("#scale").inner_text()
    tokens.nth(3).click()
    assert page.locator("#token").inner_text().startswith("Token 3, ")


def test_a_comparison_leads_to_its_runs(open_page, pages):
    page = open_page(pages["comparison"])
    assert page.locator("h2").all_inner_texts()[:3] == ["Results", "Paired differences", "Quality and cost"]
    page.get_by_role("link", name="a <b>& carried one").click()
    page.wait_for_selector("#heat span")
    assert page.locator("h1").inner_text() == "a <b>& carried one-seed0"
