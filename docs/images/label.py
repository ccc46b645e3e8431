"""docs/images/label.png: the page of `rlhf label`. Needs the extras label and browser, Chromium and Pillow.

python docs/images/label.py
"""

import io
import shutil
import tempfile
import threading
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from rlhf_lightning.labeling.comparisons import Candidate, Comparison, Question
from rlhf_lightning.labeling.queue import Assignment, LabelQueue
from rlhf_lightning.labeling.server import LabelServer
from rlhf_lightning.labeling.store import LabelStore
from rlhf_lightning.web import address_of, bound, web_server

PROMPT = "How do I keep basil alive on a windowsill? Give me three tips."
ANSWERS = (
    "1. **Light.** Put it where it gets six hours of sun.\n2. **Water.** Water from below when the top of the soil is "
    "dry; do not let it stand in water.\n3. **Harvest.** Cut stems just above a pair of leaves, so that two new stems "
    "grow.",
    "Basil is an aromatic plant from the mint family. It needs some water and some light, and it is used in many "
    "dishes, for example:\n\n- pesto\n- salads\n- soups\n\nWater it every day.",
)


def main() -> None:
    """Serve one comparison, and take the picture."""
    first, second = (Candidate([{"role": "assistant", "content": text}]) for text in ANSWERS)
    with tempfile.TemporaryDirectory() as folder, bound("127.0.0.1", 0) as place:
        queue = LabelQueue(LabelStore(Path(folder) / "pairs.jsonl", {}), Assignment())
        queue.add([Comparison(Question([{"role": "user", "content": PROMPT}]), (first, second))])
        server = web_server(LabelServer(queue).app())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1000, "height": 510})
            page.goto(address_of(place))
            page.fill("#name", "Ann")
            page.keyboard.press("Enter")
            page.wait_for_selector(".answers")
            picture = Image.open(io.BytesIO(page.screenshot()))
            browser.close()
        server.should_exit = True
        thread.join()
    # 64 colors suffice and take a quarter of the bytes.
    picture.convert("RGB").quantize(64).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
