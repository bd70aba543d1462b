"""The built pages in Chromium as readers meet them: wide, on a phone, dark, by keyboard."""

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from helpers.pages import HTML, PAGES, missing
from playwright.sync_api import Page, expect, sync_playwright

SCRIPT = Path(__file__).with_name("browser.js").read_text()
BROWSERS = "chromium", "chromium-browser", "google-chrome"
# The first for containers, where Chromium must run as root; the others keep it from calling home.
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDE, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}
expect.set_options(timeout=30_000)  # other tests run at the same time


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *about) -> None:
        pass


@pytest.fixture(scope="module")
def site():
    """The address of a server that hands out the built pages."""
    if not (HTML / PAGES[0]).is_file():
        missing("the pages are not built: run `make book` first")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        missing("Chromium is not installed: `apt-get install chromium`")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=SWITCHES)


def open_page(browser, address: str, home: str) -> tuple[Page, list[str]]:
    """Open a page; return it and the list to which everything unwanted is added."""
    context = browser.new_context(viewport=WIDE, reduced_motion="reduce", color_scheme="light")
    context.add_init_script(SCRIPT)
    page, unwanted = context.new_page(), []
    page.on("console", lambda line: line.type in ("error", "warning")
            and unwanted.append(f"{line.type}: {line.text}"))
    page.on("pageerror", lambda error: unwanted.append(f"error: {error.message}"))
    page.on("request", lambda request: not request.url.startswith((home, "data:", "blob:"))
            and unwanted.append(f"asks for {request.url}"))
    page.on("requestfailed", lambda request: unwanted.append(f"did not get {request.url}"))
    page.goto(address)
    page.evaluate("bookTest.ready()")
    return page, unwanted


@pytest.fixture(scope="module")
def opened(request, browser, site):
    page, unwanted = open_page(browser, site + request.param, site)
    yield page, unwanted
    page.context.close()


@pytest.fixture
def page(opened):
    """The page, wide and light."""
    opened[0].set_viewport_size(WIDE)
    opened[0].emulate_media(color_scheme="light")
    return opened[0]


def one(name: str):
    return pytest.mark.parametrize("opened", [name], indirect=True, scope="module")


every_page = pytest.mark.parametrize("opened", PAGES, indirect=True, scope="module")


def broken_math(page) -> list[str]:
    """Return formulas that MathJax could not read, and those that it did not see."""
    return page.locator("mjx-merror, span.math:not(:has(mjx-container)), "
                        "div.math:not(:has(mjx-container))").all_inner_texts()


def too_wide(page) -> bool:
    page.set_viewport_size(PHONE)
    page.evaluate("bookTest.openAll()")
    wide, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return not wide <= screen == PHONE["width"]


def serious_faults(page, colors_only: bool = False) -> list[str]:
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    page.evaluate("bookTest.openAll()")
    found = page.evaluate("only => bookTest.faults(only)", colors_only)
    return [fault["text"] for fault in found if fault["impact"] in ("serious", "critical")]


@every_page
def test_opens_without_errors_and_asks_no_other_host(opened):
    page, unwanted = opened
    assert unwanted == []
    expect(page.locator("main h1 >> visible=true")).to_have_count(1)
    assert broken_math(page) == []
    assert page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth)"
                         ".map(i => i.src)") == []


@every_page
def test_sliders_and_folded_parts_move_by_keyboard(page):
    for slider in page.locator(".bd-slider").all():
        shown, value = slider.locator("img:visible"), slider.locator("output")
        before = shown.get_attribute("alt"), value.inner_text()
        handle = slider.get_by_role("slider")
        at_end = handle.evaluate("input => input.value === input.max")
        handle.press("ArrowLeft" if at_end else "ArrowRight")
        expect(shown).to_have_count(1)
        assert value.inner_text() != before[1]
        assert shown.get_attribute("alt") != before[0]
        expect(handle).to_have_attribute("aria-valuetext", value.inner_text())
    for solution in page.locator(".admonition.dropdown").all():
        button = solution.locator("> .admonition-title > .toggle-button")
        inside = solution.locator("> :not(.admonition-title) >> visible=true")
        expect(inside).to_have_count(0)
        button.press("Enter")
        expect(inside).not_to_have_count(0)
        expect(button).to_have_attribute("aria-expanded", "true")
    for summary in page.locator("article summary:visible").all():
        folded = summary.evaluate("x => !x.parentElement.open")
        summary.press("Enter")
        assert summary.evaluate("x => x.parentElement.open") == folded


@every_page
@pytest.mark.parametrize(("scheme", "viewport"),
                         [("light", WIDE), ("light", PHONE), ("dark", WIDE)],
                         ids=["wide", "phone", "dark"])
def test_axe_finds_no_serious_fault(page, scheme, viewport):
    page.set_viewport_size(viewport)
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("html")).to_have_attribute("data-theme", scheme)
    faults = serious_faults(page, colors_only=scheme == "dark")
    assert not faults, "\n".join(faults)


@every_page
def test_a_phone_needs_no_sideways_scroll(page):
    assert not too_wide(page)


@one("chapters/index.html")
def test_tabs_move_by_keyboard(page):
    tabs, panels = page.locator(".sd-tab-set > input"), page.locator(".sd-tab-content")
    expect(panels.nth(0)).to_be_visible()
    tabs.nth(0).press("ArrowRight")
    expect(panels.nth(1)).to_be_visible()
    expect(panels.nth(0)).not_to_be_visible()


@one("chapters/13_comparison.html")
def test_a_table_is_filtered_and_sorted_by_keyboard(page):
    table = page.locator(".datatable-wrapper").last
    lines = table.locator("tbody tr")
    before = lines.count()
    table.locator("input[type=search]").press_sequentially("image blended")
    expect(lines).not_to_have_count(before)
    assert all("blended" in text.lower() for text in lines.all_inner_texts())
    words = lines.count()
    table.get_by_label("Holds").select_option("weights")
    expect(lines).not_to_have_count(words)
    assert all("weights" in text and "Blended" in text for text in lines.all_inner_texts())
    header = table.locator("th", has=page.locator("button")).last
    header.locator("button").press("Enter")
    expect(header).to_have_attribute("aria-sort", "ascending")


@one("chapters/glossary.html")
def test_focus_follows_the_page(page):
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to main content")).to_be_focused()
    page.evaluate("window.last = document.activeElement")
    for _ in range(60):
        page.keyboard.press("Tab")
        assert page.evaluate("""() => {
            const [before, now] = [window.last, document.activeElement];
            window.last = now;
            return before.compareDocumentPosition(now) === Node.DOCUMENT_POSITION_FOLLOWING
                && now.checkVisibility({visibilityProperty: true});
        }"""), page.evaluate("document.activeElement.outerHTML")


@one("chapters/glossary.html")
def test_the_color_scheme_is_chosen_by_keyboard(page):
    seen = []
    for _ in range(3):
        page.get_by_role("button", name="Color mode").press("Enter")
        seen.append(page.locator("html").get_attribute("data-mode"))
    assert sorted(seen) == ["auto", "dark", "light"] and seen[-1] == "auto"


@pytest.mark.parametrize(("words", "where"), [
    ("wilson interval", "02_measuring"), ("mahalanobis", "07_anomalies"),
    ("strip", "12_input_filters")])
def test_search_finds(browser, site, words, where):
    page, unwanted = open_page(browser, site + "chapters/index.html", site)
    page.wait_for_load_state("networkidle")  # else leaving the page would end a request
    page.keyboard.press("Control+k")
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    expect(page.locator(f"ul.search a[href*='{where}.html']").first).to_be_visible()
    page.wait_for_load_state("networkidle")
    assert unwanted == []
    page.context.close()


@pytest.mark.parametrize("name", ["chapters/index", "chapters/02_measuring"])
def test_pages_work_from_a_folder(browser, site, name):
    page, unwanted = open_page(browser, (HTML / f"{name}.html").as_uri(), HTML.as_uri())
    assert unwanted == [] and broken_math(page) == []
    page.context.close()


def test_faults_are_noticed(browser, site):
    page, unwanted = open_page(browser, site + "chapters/sweeps.html", site)
    assert not unwanted and not broken_math(page) and not too_wide(page)
    assert serious_faults(page) == []
    page.evaluate("""() => document.querySelector("article").insertAdjacentHTML("beforeend", `
        <p style="color: #bbb; background: #fff">pale</p>
        <img src="none.png"><img src="http://localhost:9/x.png" alt="x">
        <span class="math">$x^</span><p style="width: 900px">wide</p>`)""")
    page.wait_for_load_state("networkidle")
    assert broken_math(page) == ["$x^"] and too_wide(page)
    assert [x.split(":")[0] for x in serious_faults(page)] == [
        "color-contrast", "image-alt"]
    assert any("404" in line for line in unwanted)
    assert "asks for http://localhost:9/x.png" in unwanted
    page.context.close()
