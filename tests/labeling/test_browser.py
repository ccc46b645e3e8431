"""The page of `rlhf label` in Chromium, driven by Playwright: `make test-browser`."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.web import Access
from tests.helpers.labels import comparison, new_queue, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra: browser)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on the path", allow_module_level=True)
pytestmark = pytest.mark.browser

ATTACK = """<script>document.title = "owned"</script><img src=x onerror="document.title = 'owned'">
[link](javascript:document.title='owned') **bold**"""
LONG = "\n\n".join(f"Paragraph {number} of a long answer. " + "word " * 60 for number in range(12))
TABLE = "|" + "a wide column |" * 12 + "\n|" + "-|" * 12 + "\n|" + "x |" * 12 + f"\n\n`{'unbroken' * 40}`"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


class Annotator:
    """A browser window of its own. Anything that the page loads from elsewhere, or any error in it, fails the test."""

    def __init__(self, browser: Any, address: str, name: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        own = address.partition("#")[0]
        self.page.on("request", lambda request: request.url.startswith(own) or self.problems.append(request.url))
        self.page.goto(address)
        if name:
            self.page.wait_for_selector("input:focus")  # the browser focuses it after it has loaded the page
            self.keys(*name)
            self.press("Enter", until=".answers, .waiting")

    def keys(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def press(self, key: str, until: str = ".counts") -> None:
        """Press a key that loads the next page."""
        with self.page.expect_navigation():
            self.page.keyboard.press(key)
        self.page.wait_for_selector(until)

    @property
    def prompt(self) -> str:
        return str(self.page.inner_text(".prompt .text"))

    @property
    def counts(self) -> str:
        return str(self.page.inner_text(".counts"))


def test_two_annotators_at_once_by_keyboard_with_undo_and_reload(browser: Any, tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 6, overlap=0.0)
    with serving(queue) as address:
        ann, ben = (Annotator(browser, address, name) for name in ("Ann", "Ben"))
        assert ann.prompt != ben.prompt
        first = ann.prompt
        ann.press("a")
        ben.press("b")
        assert ann.counts == "1 decided, 4 ready"  # of six, one is decided and Ben saw one
        second = ann.prompt
        # A reload decides nothing, and shows the same comparison in the same order.
        answers = ann.page.inner_text(".answers")
        ann.page.reload()
        assert (ann.prompt, ann.page.inner_text(".answers"), ann.counts) == (
            second,
            answers,
            "1 decided, 3 ready",
        )  # Ben went on
        # A note is typed: letters in it are no choices.
        ann.keys("n", *"bad", " ", *"tax")
        assert ann.page.input_value("#note") == "bad tax"
        ann.keys("Escape")
        ann.press("t")
        ann.press("u")
        assert ann.prompt == second
        ann.press("u")
        assert ann.prompt == first
        ann.press("x")
        # With the tab key alone: to the button "Skip", past the link, the prompt and four buttons.
        while ann.page.evaluate("document.activeElement.value") != "skip":
            ann.keys("Tab")
        ann.press("Enter")
        # A key that is held down repeats, and decides once.
        before = ben.counts
        with ben.page.expect_navigation():
            ben.page.keyboard.down("a")
            for _ in range(5):
                ben.page.keyboard.down("a")  # without `up` between, these are repeats
        ben.page.wait_for_selector(".counts")
        ben.page.keyboard.up("a")
        assert (before[:1], ben.counts[:1]) == ("1", "2")
        assert (ann.problems, ben.problems) == ([], [])
    made = {name: [(one.choice, one.note) for one in by.values()] for name, by in queue.store.decisions.items()}
    assert made == {"Ann": [("both_bad", ""), ("skip", "")], "Ben": [("B", ""), ("A", "")]}
    journal = [json.loads(line) for line in (tmp_path / "pairs.labeling" / "decisions.jsonl").read_text().splitlines()]
    assert [row.get("note") for row in journal if row.get("choice") == "tie"] == ["bad tax"]
    assert sum("undo" in row for row in journal) == 2


def test_script_in_an_answer_stays_text(browser: Any, tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 0, overlap=1.0)
    queue.add([comparison(0, (ATTACK, f"A second try: {ATTACK}"))])
    with serving(queue) as address:
        ann = Annotator(browser, address, "Ann")
        ann.page.wait_for_timeout(300)
        assert ann.page.title() == "Compare answers"
        assert '<script>document.title = "owned"</script>' in ann.page.inner_text("#A")
        assert ann.page.locator(".answers :is(script, img, a)").count() == 0
        assert ann.page.locator(".answers strong").count() == 2
        # Even if markup got through, the policy would not run it.
        ann.page.evaluate("""document.querySelector("#A").innerHTML = `<img src=x onerror="document.title='owned'">`""")
        ann.page.wait_for_timeout(300)
        assert ann.page.title() == "Compare answers"
        assert any("Content Security Policy" in problem for problem in ann.problems)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(scheme: str, browser: Any, tmp_path: Path) -> None:
    """Nothing is wider than the screen, the buttons stay in sight, and a tap decides."""
    queue = new_queue(tmp_path, 0, overlap=1.0)
    queue.add([comparison(0, (LONG, TABLE))])
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "color_scheme": scheme}
    with serving(queue) as address:
        ann = Annotator(browser, address, "Ann", **phone)
        assert ann.page.evaluate("document.documentElement.scrollWidth") <= 360
        boxes = [button.bounding_box() for button in ann.page.locator(".buttons button").all()]
        assert len(boxes) == 6
        for box in boxes:
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            assert box["y"] + box["height"] <= 640
            assert box["height"] >= 40
        tops = [ann.page.locator(f"#{letter}").bounding_box()["y"] for letter in "AB"]
        assert tops[1] > tops[0] + 100  # one below the other
        ann.page.tap("button[value=B]")
        ann.page.wait_for_selector(".waiting")
        assert ann.problems == []
    assert [one.choice for one in queue.store.decisions["Ann"].values()] == ["B"]


def test_token_comes_from_the_address_and_leaves_it(browser: Any, tmp_path: Path) -> None:
    with serving(new_queue(tmp_path), Access("a token of 21 letters")) as address:
        ann = Annotator(browser, f"{address}#a%20token%20of%2021%20letters", "Ann")
        assert ann.page.url == address
        assert ann.problems == []


def test_waiting_page_loads_again_when_answers_come(browser: Any, tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 0)
    with serving(queue, coming=lambda: True) as address:
        ann = Annotator(browser, address, "Ann")
        assert "The next answers are being made" in ann.page.inner_text("main")
        queue.add([comparison()])
        ann.page.wait_for_selector(".answers", timeout=10_000)
