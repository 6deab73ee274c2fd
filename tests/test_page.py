"""The playground in a real browser against a real server: teach, try, list, delete; by mouse, and by keys alone."""

import json
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from serving_process import KEYS

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        not shutil.which("chromedriver"), reason="there is no browser: `apt-get install chromium chromium-driver`"
    ),
]
EXAMPLES = "charged twice => billing\nno refund => billing\napp crashes\tbug\nblank page\tbug\n"


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1400",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, server):
    browser.get_log("performance")  # forget what came before
    browser.get(server.url)
    if "key" not in (browser.execute_script("return Object.keys(sessionStorage)") or []):
        wait(browser, lambda: browser.find_element(By.ID, "key").is_displayed())
        browser.find_element(By.ID, "key").send_keys(KEYS[0], Keys.ENTER)
    wait(browser, lambda: browser.find_element(By.ID, "base").text == "tiny")
    return browser


def wait(browser, holds, seconds: float = 60):
    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(lambda _: holds())


def text(browser, name: str) -> str:
    return browser.find_element(By.ID, name).text


def fill(browser, name: str, value: str) -> None:
    field = browser.find_element(By.ID, name)
    field.clear()
    browser.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", field, value
    )


def rows(browser) -> list[str]:
    return [
        row.find_element(By.TAG_NAME, "th").text for row in browser.find_elements(By.CSS_SELECTOR, "#adapters tbody tr")
    ]


def test_a_full_round_of_teaching_trying_and_deleting(page, server):
    fill(page, "name", "desk")
    fill(page, "examples", EXAMPLES)
    assert text(page, "count") == "4 examples, 2 different answers"
    page.find_element(By.ID, "learn").click()
    wait(page, lambda: "desk learned 4 examples" in text(page, "learned"))
    known = server.client().adapters()
    assert [adapter.name for adapter in known] == ["desk"]
    loss = f"loss {known[0].loss_before:.3f} → {known[0].loss_after:.3f}"
    assert loss in text(page, "learned")
    assert rows(page) == ["desk"]
    assert text(page, "chosen") == "desk"

    fill(page, "inputs", "charged again\nit crashes")
    page.find_element(By.ID, "ask").click()
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".sides")) == 2)
    own = server.client().classify(known[0].model, ["charged again", "it crashes"])
    plain = server.client().classify("tiny", ["charged again", "it crashes"], options=["billing", "bug"])
    for side, wanted in (("adapter", own), ("base", plain)):
        shown = page.find_elements(By.CSS_SELECTOR, f".{side}")
        for element, answer in zip(shown, wanted, strict=True):
            assert element.find_element(By.CLASS_NAME, "answer").text == answer.label
            for label, probability in answer.probabilities.items():
                assert f"{label}\n{100 * probability:.1f} %" in element.text
    curl = text(page, "curl")
    assert f"curl {server.url}/v1/adapters" in curl
    assert f"curl {server.url}/v1/classify" in curl
    assert "app crashes" in curl

    page.find_element(By.CSS_SELECTOR, "[aria-label='Delete desk']").click()
    page.find_element(By.CSS_SELECTOR, "[aria-label='Keep desk']").click()
    assert rows(page) == ["desk"]
    page.find_element(By.CSS_SELECTOR, "[aria-label='Delete desk']").click()
    page.find_element(By.CSS_SELECTOR, "[aria-label='Delete desk for good']").click()
    wait(page, lambda: text(page, "status") == "desk is deleted.")
    assert rows(page) == []
    assert server.client().adapters() == []
    assert not page.find_element(By.ID, "ask").is_enabled()
    assert_nothing_from_outside(page, server)


def assert_nothing_from_outside(page, server) -> None:
    """Every request went to this server, and the browser complained of nothing but the answer that asked for a key."""
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5
    assert [url for url in urls if not url.startswith((server.url, "data:"))] == []
    said = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in said if "401" not in message] == []


def test_the_keyboard_alone_will_do(page, server):
    page.execute_script("document.activeElement.blur()")
    order = []
    for _ in range(9):
        page.switch_to.active_element.send_keys(Keys.TAB)
        focused = page.switch_to.active_element
        order.append(focused.get_attribute("id") or focused.get_attribute("href"))
        if focused.get_attribute("id") == "learn":
            break
    assert order[-6:] == [f"{server.url}/docs", "name", "sample", "examples", "written", "learn"]
    page.find_element(By.ID, "sample").send_keys("客", Keys.ENTER)
    Select(page.find_element(By.ID, "sample")).select_by_visible_text("客服意图")
    page.find_element(By.ID, "learn").send_keys(Keys.ENTER)
    wait(page, lambda: "kefu learned 6 examples" in text(page, "learned"))
    page.find_element(By.ID, "ask").send_keys(Keys.ENTER)
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".sides")) == 2)
    assert "物流" in page.find_element(By.CSS_SELECTOR, ".adapter").text
    page.find_element(By.CSS_SELECTOR, "[aria-label='Delete kefu']").send_keys(Keys.ENTER)
    assert page.switch_to.active_element.text == "Keep"  # the harmless one has the focus
    page.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    page.find_element(By.CSS_SELECTOR, "[aria-label='Delete kefu for good']").send_keys(Keys.ENTER)
    wait(page, lambda: text(page, "status") == "kefu is deleted.")


def test_answers_may_be_written_instead_of_chosen(page, server):
    Select(page.find_element(By.ID, "sample")).select_by_visible_text("Replies in a style")
    assert page.find_element(By.ID, "written").is_selected()
    page.find_element(By.ID, "learn").click()
    wait(page, lambda: "replies learned 4 examples" in text(page, "learned"))
    page.find_element(By.ID, "ask").click()
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".sides")) == 1)
    assert not page.find_elements(By.CSS_SELECTOR, ".adapter .bar")
    assert "/v1/completions" in text(page, "curl")
    server.client().delete("replies")


def test_mistakes_are_said_where_they_are(page):
    fill(page, "examples", "fine => label\nno answer here\n")
    assert "line 2 has no answer" in text(page, "count")
    page.find_element(By.ID, "learn").click()
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#learned .error"))
    assert text(page, "learned") == 'Line 2: expected "text => answer".'
    fill(page, "examples", "one => same\ntwo => same\n")
    page.find_element(By.ID, "learn").click()
    wait(page, lambda: "same label" in text(page, "learned"))


CONTRAST = """
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const found = getComputedStyle(at).backgroundColor;
    if (!found.endsWith(", 0)")) return found;
  }
  return "rgb(255, 255, 255)";
};
return [...document.querySelectorAll("h1, h2, p, label, button, code, th, td, a, input, textarea, select, pre")]
  .filter((node) => node.offsetParent && node.matches(":not(:disabled)") && node.className !== "skip")
  .map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    return [node.tagName + "#" + node.id + "." + node.className, (a + 0.05) / (b + 0.05)];
  });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_everything_can_be_read_and_named(scheme, width, page, server):
    server.client().learn([("no refund", "billing"), ("it hangs", "bug")], "customer-service-desk")
    page.refresh()
    wait(page, lambda: "customer-service-desk" in text(page, "adapters"))
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    fill(page, "examples", EXAMPLES)
    assert page.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert [found for found in page.execute_script(CONTRAST) if found[1] < 4.5] == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    parts = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if not n.get("ignored")]
    controls = [part for part in parts if part[0] in ("textbox", "button", "combobox", "link")]
    assert [role for role, name in controls if not name] == []
    assert {"Examples, one a line", "Inputs, one a line", "Learn", "Ask both", "Name"} <= {name for _, name in controls}
    assert [name for role, name in parts if role == "heading"][:3] == ["rayml", "1. Teach", "2. Try"]
    assert {"main", "region"} <= {role for role, _ in parts}
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    server.client().delete("customer-service-desk")
