"""The model page in headless Chromium, at two widths, in light and dark.

Set PETRA_ZOO_SCREENSHOTS=DIR to keep the screenshots and look at them.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from petra_zoo.hub.catalog import Reference
from petra_zoo.hub.page import render_page
from tests.hub.test_page import an_entry

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the extra `test`)")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (make browser)"),
]

WIDE, NARROW = (1280, 900), (390, 844)
SIZES = {"petra_tiny": 0.2, "petra_small": 11.7, "petra_middle": 25.6, "petra_large": 44.5}
ACCURACY = {"petra_small": 70.5, "petra_large": 81.25}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The page behind HTTP, and the paths that were asked for."""
    folder = tmp_path_factory.mktemp("site")
    entries = [
        an_entry(
            name,
            {"a1": Reference("imagenet-1k", ACCURACY[name], "published by X", False)} if name in ACCURACY else None,
            parameters=int(millions * 1e6),
            input_size=(3, 32, 32) if name == "petra_tiny" else (3, 224, 224),
            memory=(3 * millions, 1.5 * millions, 1.2 * millions),
        )
        for name, millions in SIZES.items()
    ]
    (folder / "index.html").write_text(render_page(entries), encoding="utf-8")
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, url: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(url)


def names(browser: Any) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('tbody tr:not([hidden])')].map((r) => r.id)")


def type_into(browser: Any, selector: str, text: str) -> None:
    browser.find_element("css selector", selector).send_keys(text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_fits_the_width_and_follows_the_colour_scheme(
    browser: Any, site: tuple[str, list[str]], size: tuple[int, int], scheme: str, tmp_path: Path
) -> None:
    show(browser, site[0], size, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    overflowing = browser.execute_script(
        "return [...document.querySelectorAll('main *, header *')].filter((e) => !e.closest('.scroll')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert overflowing == []
    folder = Path(os.environ.get("PETRA_ZOO_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"page-{scheme}-{size[0]}.png"
    assert browser.save_screenshot(str(file))
    picture = Image.open(file).convert("L")
    assert picture.size == size
    ground = picture.getpixel((2, size[1] // 2))
    assert ground < 60 if scheme == "dark" else ground > 200
    assert len(picture.getcolors()) > 20  # something is drawn on it


def test_nothing_but_the_page_is_asked_for_and_no_script_fails(browser: Any, site: tuple[str, list[str]]) -> None:
    url, asked = site
    asked.clear()
    show(browser, url)
    type_into(browser, "#search", "small")
    entries = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert entries == []
    assert asked == ["/"]
    assert browser.get_log("browser") == []


def test_headings_sort_both_ways_and_what_is_unknown_comes_last(browser: Any, site: tuple[str, list[str]]) -> None:
    show(browser, site[0])
    by_size = ["petra_tiny", "petra_small", "petra_middle", "petra_large"]
    for column, ascending in (("M parameters", by_size), ("network", sorted(by_size))):
        button = browser.find_element("xpath", f"//thead//button[text()='{column}']")
        button.click()
        assert names(browser) == ascending
        assert button.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
        button.click()
        assert names(browser) == ascending[::-1]
    browser.find_element("xpath", "//thead//button[text()='top-1 %']").click()
    assert names(browser)[:2] == ["petra_small", "petra_large"]
    browser.find_element("xpath", "//thead//button[text()='top-1 %']").click()
    assert names(browser)[:2] == ["petra_large", "petra_small"]


def test_search_narrows_table_and_plot(browser: Any, site: tuple[str, list[str]]) -> None:
    show(browser, site[0])
    assert browser.find_element("id", "count").text == "4 of 4"
    type_into(browser, "#search", "224 LARGE")
    assert names(browser) == ["petra_large"]
    assert browser.find_element("id", "count").text == "1 of 4"
    bright = "return [...document.querySelectorAll('#plot .point:not(.dim)')].map((p) => p.dataset.name)"
    assert browser.execute_script(bright) == ["petra_large.a1"]
    type_into(browser, "#search", "x")
    assert names(browser) == []
    assert browser.find_element("id", "none").is_displayed()


def test_the_plot_has_the_networks_with_a_figure_or_all_by_parameters(
    browser: Any, site: tuple[str, list[str]]
) -> None:
    show(browser, site[0])
    places = """return Object.fromEntries([...document.querySelectorAll('#plot .point')].map((p) => {
        const [stored, reversible] = p.querySelectorAll('circle');
        return [p.dataset.name, [stored, reversible].map((c) => c.cx.baseVal.value).concat(stored.cy.baseVal.value)];
    }))"""
    choices = [option.text for option in browser.find_elements("css selector", "#axis option")]
    assert choices == ["top-1 on imagenet-1k", "parameters"]
    shown = browser.execute_script(places)
    assert shown.keys() == {"petra_small.a1", "petra_large.a1"}
    assert shown["petra_large.a1"][2] < shown["petra_small.a1"][2]  # higher up
    browser.find_element("css selector", "#axis option[value='1']").click()
    shown = browser.execute_script(places)
    assert shown.keys() == SIZES.keys()
    heights = [shown[name][2] for name in SIZES]
    assert heights == sorted(heights, reverse=True)
    assert all(reversible < stored for stored, reversible, _ in shown.values())


def test_the_keyboard_reaches_everything(browser: Any, site: tuple[str, list[str]]) -> None:
    show(browser, site[0], NARROW)
    seen = []
    for _ in range(30):
        browser.switch_to.active_element.send_keys("\ue004")  # Tab
        seen.append(
            browser.execute_script(
                "const e = document.activeElement; return e.dataset.name ?? (e.id || e.textContent.trim().slice(0, 20))"
            )
        )
        if seen[-1] == "petra_large.a1":
            assert "81.25 % on imagenet-1k (published by X)" in browser.find_element("id", "detail").text
        if seen[-1] == "M parameters":
            browser.switch_to.active_element.send_keys("\ue007")  # Enter
            assert names(browser) == list(SIZES)
            break
    assert {"axis", "petra_large.a1", "petra_small.a1", "search", "network", "M parameters"} <= set(seen)
