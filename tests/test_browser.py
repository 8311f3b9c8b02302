"""The built book in a real headless Chromium (`make test-browser`): quiet, local, light, usable."""

import functools
import http.server
import threading
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PAGES = ["book/intro", "book/notation", "chapters/01_fgsm", "chapters/02_pgd", "chapters/03_minimax",
         "chapters/04_landscape", "chapters/05_capacity", "chapters/06_tradeoff", "chapters/07_robust_features"]
PAGE_LIMIT = 1_500_000  # bytes, everything that the page loads, fonts included
SECONDS = 2.0  # from an empty cache, on loopback


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site():
    """Address of the built book on loopback."""
    if not (HTML / "index.html").is_file():
        pytest.fail("no book in _build/html: run `make book` first")
    handler = functools.partial(Quiet, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser(chromium):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


class Visit:
    """A page in a fresh, empty-cached context, with a record of what it said and asked for."""

    def __init__(self, browser, site, name, width=1280, scheme="light"):
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.faults, self.bytes = [], 0
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url}"))
        self.page.on("request", lambda request: self._local(request.url, site))
        self.page.on("requestfinished", self._count)
        self.page.goto(f"{site}/{name}.html", wait_until="networkidle")

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type}: {message.text}")

    def _local(self, url, site):
        if not url.startswith((site, "data:", "blob:")):
            self.faults.append(f"leaves the machine: {url}")

    def _count(self, request):
        sizes = request.sizes()
        self.bytes += sizes["responseBodySize"]
        if request.response().status >= 400:
            self.faults.append(f"{request.response().status}: {request.url}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_quiet_local_and_light(browser, site, name):
    with Visit(browser, site, name) as visit:
        assert visit.faults == []
        assert 10_000 < visit.bytes <= PAGE_LIMIT
        assert visit.page.title()


@pytest.mark.parametrize("name", PAGES)
def test_math_is_drawn(browser, site, name):
    with Visit(browser, site, name) as visit:
        formulas = visit.page.locator("span.math, div.math > .tex")
        assert formulas.count() >= 5
        assert formulas.count() == visit.page.locator(".math .katex-html").count()
        assert visit.page.locator(".katex-error").count() == 0
        fonts = (
            "[...document.fonts].filter(f => f.family.startsWith('KaTeX') && f.status == 'loaded')"
        )
        assert visit.page.evaluate(f"{fonts}.length") > 0


@pytest.mark.parametrize("name", PAGES)
def test_page_is_there_soon(browser, site, name):
    times = []
    for _ in range(3):
        with Visit(browser, site, name) as visit:
            entry = "performance.getEntriesByType('navigation')[0].loadEventEnd"
            times.append(visit.page.evaluate(entry) / 1000)
    assert min(times) <= SECONDS, times


def test_search_finds_a_word(browser, site):
    with Visit(browser, site, "book/intro") as visit:
        page = visit.page
        page.keyboard.press("Control+k")
        field = page.locator("input[name=q]:visible").first
        field.fill("perturbation")
        field.press("Enter")
        page.wait_for_url("**/search.html?q=perturbation*")
        # Sphinx lists what it finds one by one.
        page.locator("#search-results li a").get_by_text("Glossary", exact=True).first.wait_for()
        assert visit.faults == []


def test_search_without_a_hit_says_so(browser, site):
    with Visit(browser, site, "search") as visit:
        page = visit.page
        page.goto(f"{site}/search.html?q=xylophone", wait_until="networkidle")
        assert "did not match" in page.locator("#search-results").inner_text()


def brightness(page, selector="body"):
    color = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")
    numbers = color[color.index("(") + 1 : -1].replace(",", " ").split()[:3]
    return sum(map(float, numbers)) / 3


def test_dark_mode_switch(browser, site):
    with Visit(browser, site, "chapters/01_fgsm") as visit:
        page = visit.page
        assert brightness(page) > 200
        for _ in range(3):  # the switch goes round: auto, light, dark
            if page.evaluate("document.documentElement.dataset.mode") == "dark":
                break
            page.locator(".theme-switch-button:visible").first.click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert brightness(page) < 60
        if page.locator(".cell_output img:visible").count():
            assert brightness(page, ".cell_output img") > 200, "figures lie on a light card"
        page.reload(wait_until="networkidle")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark", "is remembered"


def test_no_page_scrolls_sideways_on_a_phone(browser, site):
    names = [p.relative_to(HTML).with_suffix("").as_posix()
             for folder in ("book", "chapters") for p in sorted((HTML / folder).rglob("*.html"))]  # fmt: skip
    wide = {}
    for name in [*names, "search"]:
        with Visit(browser, site, name, width=390, scheme="dark") as visit:
            width = visit.page.evaluate("document.documentElement.scrollWidth")
            if width > 390 or visit.faults:
                wide[name] = (width, visit.faults)
    assert len(names) > 7 and wide == {}


def test_contents_open_on_a_phone(browser, site):
    with Visit(browser, site, "book/intro", width=390) as visit:
        link = visit.page.locator(".bd-sidebar-primary a", has_text="Glossary").first
        visit.page.locator(".primary-toggle:visible").first.click()
        link.wait_for(state="visible")
        link.click()
        visit.page.wait_for_url("**/book/glossary.html")


def test_icons_are_drawn(browser, site):
    with Visit(browser, site, "chapters/01_fgsm") as visit:
        assert visit.page.locator("i[class*='fa-']").count() == 0, "icons missing from the script"
        assert visit.page.locator(".theme-switch-button svg:visible").count() == 1


def test_slider_works_without_a_kernel(browser, site):
    with Visit(browser, site, "chapters/01_fgsm") as visit:
        sliders = visit.page.locator(".advlearn-slider")
        assert sliders.count() > 0
        slider = sliders.first
        before = slider.locator("img:visible").get_attribute("src")
        slider.locator("input[type=range]").press("ArrowRight")
        after = slider.locator("img:visible")
        assert after.count() == 1 and after.get_attribute("src") != before
        assert after.get_attribute("alt")
