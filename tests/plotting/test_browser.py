"""The page of the demonstration in a real browser; its screenshot is kept in build/screenshots."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pyquiet
from pyquiet.cli import main
from pyquiet.evaluation import TokenGains
from pyquiet.plotting import Section, View, as_svg, film_view, infilling_view, thoughts_view, write_page

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
WebDriverException = pytest.importorskip("selenium.common").WebDriverException
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HINT = "return getComputedStyle(arguments[0], '::after').content"
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for switch in (
        "headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking",
        "disable-component-update", "disable-sync", "no-first-run", "window-size=1200,1600",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{switch}")
    try:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"{BROWSER} does not start here: {error.msg}")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, gains: TokenGains, tokenizer: Any) -> Path:
    """Every kind of view there is."""
    from matplotlib.figure import Figure

    model, words = pyquiet.load("tiny-any-subset")
    ids = words("Once upon a time there was a little girl who lived in a wood.", return_tensors="pt").input_ids
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 4:14] = True
    filled = pyquiet.infill(model, ids, mask=mask, method="assd", k=4, seed=2)
    denoiser, other = pyquiet.load("tiny-denoiser")
    written = pyquiet.diffuse(
        pyquiet.MaskedDenoiser(denoiser, other.mask_token_id), lambda x, *_: torch.zeros(x.shape[:2]), length=24,
        steps=6, candidates=4, seed=1,
    )  # fmt: skip
    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    views = {
        "Thoughts": thoughts_view(gains, tokenizer),
        "Order of infilling": infilling_view(filled, words),
        "Film": film_view(written, other),
        "Curve": View(as_svg(figure, "a <curve>"), words="It rises."),
    }
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, "Views", [Section(title, ("Some words.",), (view,)) for title, view in views.items()])
    return path


def test_it_opens_from_disk_and_a_hover_shows_the_thought(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    assert browser.title == "Views"
    assert browser.get_log("browser") == []
    token = browser.find_element("id", "t3")
    assert browser.execute_script(HINT, token) == "none"
    webdriver.ActionChains(browser).move_to_element(token).perform()
    shown = browser.execute_script(HINT, token)
    assert token.get_attribute("data-hint").splitlines()[0] in shown
    assert "thought, weight " in shown
    assert browser.save_screenshot(str(SCREENSHOTS / "views.png"))


def test_the_keyboard_reaches_what_a_hover_does(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    webdriver.ActionChains(browser).send_keys(webdriver.Keys.TAB).perform()
    token = browser.switch_to.active_element
    assert token.get_attribute("data-hint").startswith("probability ")
    assert "probability " in browser.execute_script(HINT, token)


def test_figures_have_their_words(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    figure = browser.find_element("css selector", "figure:has(> svg)")
    assert figure.find_element("tag name", "figcaption").text == "It rises."
    assert figure.find_element("tag name", "svg").get_attribute("aria-label") == "a <curve>"


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_window_and_all_views_are_seen(browser: Any, page: Path, width: int) -> None:
    size = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    browser.get(page.as_uri())
    for token in browser.find_elements("css selector", "[data-hint]"):
        browser.execute_script("arguments[0].focus()", token)
        assert browser.execute_script(HINT, token) != "none"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for section in browser.find_elements("tag name", "section"):
        seen = [x for x in section.find_elements("css selector", "span, svg") if x.size["height"] > 0]
        assert seen, section.text
    frames = browser.find_elements("class name", "frame")
    assert len({frame.location["y"] for frame in frames}) == 1  # a strip, side by side
    assert len({frame.location["x"] for frame in frames}) == len(frames) > 1
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_of_the_demonstration(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "demo.html"
    assert main(["demo", "--only", "thoughts", "infilling", "--quiet", "--html", str(path)]) == 0
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    titles = [title.text for title in browser.find_elements("tag name", "h2")]
    assert titles == ["A thought before every token (Quiet-STaR)", "Gaps filled in parallel, exactly (ASSD)"]
    assert browser.find_elements("css selector", "span.g4[data-hint]")  # a token that thoughts won more than a nat at
    assert browser.save_screenshot(str(SCREENSHOTS / "demo.png"))
