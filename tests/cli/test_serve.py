"""`rlhf serve`, as people start it."""

import json
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from transformers import AutoModelForCausalLM

from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.generation import local_engine
from rlhf_lightning.serving import shutdown
from tests.helpers.adapters import with_trained_adapter
from tests.helpers.cli import mistake
from tests.helpers.runs import Run


def chat(url: str, key: str, **fields: Any) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], **fields}).encode()
    with urlopen(Request(f"{url}/chat/completions", body, headers), timeout=60) as reply:
        return json.load(reply)


def test_an_adapter_is_served_until_ctrl_c(
    base: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond this machine, with the key from the environment; a second server on the port is refused."""
    key = "correct-horse-battery"
    monkeypatch.setenv("RLHF_SERVE_TOKEN", key)
    adapter = str(tmp_path / "adapter")
    for part in (with_trained_adapter(AutoModelForCausalLM.from_pretrained(base)), tokenizer):
        part.save_pretrained(adapter)
    args = ["serve", adapter, "--max_tokens", "6", "--temperature", "0", "--system", "Be brief."]
    run = Run([*args, "--host", "0.0.0.0", "--port", "0"], tmp_path / "log")
    try:
        port = until(run, r"at http://[^:]+:([0-9]+)/v1")[1]
        assert f"serving {adapter} at" in run.text
        answer = chat(f"http://127.0.0.1:{port}/v1", key, model=adapter)
        policy = Policy(adapter, asked={"system": "Be brief."})
        [episode] = policy.answer(policy.prompts([{"prompt": "Hello"}]), 6, 0, temperature=0.0)
        assert answer["choices"][0]["message"]["content"] == episode.response
        assert f"--port {port}: Address already in use" in mistake([*args, "--port", port], capsys)
        run.send(signal.SIGINT)
        assert run.wait() == 0
        assert "Traceback" not in run.text
    finally:
        if run.poll() is None:
            run.end()


def until(run: Run, pattern: str) -> re.Match[str]:
    """Wait until a command has printed something."""
    end = time.monotonic() + 60
    while not (found := re.search(pattern, run.text)):
        assert run.poll() is None, run.text
        assert time.monotonic() < end, run.text
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(("presses", "code"), [(1, 0), (2, 130)])
def test_ctrl_c_does_not_wait_for_a_forward_pass(presses: int, code: int, base: str, tmp_path: Path) -> None:
    """The first Ctrl-C answers the running request, and the process ends within a limit; the second ends it at once."""

    def stick() -> None:
        shutdown.LIMIT = 0.5 if presses == 1 else 60
        local_engine.SlotBatch.step = lambda *_: time.sleep(60)  # type: ignore[assignment, method-assign]

    run = Run(["serve", base, "--port", "0"], tmp_path / "log", stick)
    try:
        url = f"http://127.0.0.1:{until(run, r'at http://[^:]+:([0-9]+)/v1')[1]}"
        with ThreadPoolExecutor() as clients:
            answer = clients.submit(lambda: chat(f"{url}/v1", "none", model=base, max_tokens=8))
            while json.load(urlopen(f"{url}/health"))["sampling"] == 0:
                time.sleep(0.01)
            run.send(signal.SIGINT)
            until(run, "shutting down: running requests have 5 s to finish")
            begun = time.monotonic()
            if presses == 2:
                run.send(signal.SIGINT)
            assert run.wait(30) == code
            assert time.monotonic() - begun < 4  # before the end of the running requests' time
            assert answer.exception() is not None
        assert "Traceback" not in run.text
    finally:
        if run.poll() is None:
            run.end()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--slots", "0"], "--slots is 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--max_waiting", "-1"], "--max_waiting is -1"),
        (["--max_length", "512", "--port", "0"], "--max_length is 512, but the model has only 256 positions"),
    ],
)
def test_mistakes(args: list[str], message: str, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in mistake(["serve", base, *args], capsys)


def test_weak_key_and_missing_package(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_SERVE_TOKEN", "short")
    assert "RLHF_SERVE_TOKEN has 5 characters; it must have at least 16" in mistake(["serve", base], capsys)
    monkeypatch.setitem(sys.modules, "rlhf_lightning.web", None)
    monkeypatch.delitem(sys.modules, "rlhf_lightning.web")
    monkeypatch.delattr("rlhf_lightning.web", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = mistake(["serve", base], capsys)
    assert "rlhf serve needs the package uvicorn; install it with pip install 'rlhf-lightning[serve]'" in found
