"""`rlhf tinker`, as people start it."""

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.adapters import with_trained_adapter
from tests.helpers.cli import mistake
from tests.helpers.runs import Run


def test_a_model_is_served_until_ctrl_c(base: str, tmp_path: Path) -> None:
    """Beyond this machine, with a key that Tinker's client accepts."""
    run = Run(["tinker", base, "--name", "tiny", "--host", "0.0.0.0", "--port", "0"], tmp_path / "log")
    try:
        until = time.monotonic() + 60
        pattern = r"TINKER_BASE_URL=http://[^:]+:(\d+) TINKER_API_KEY=(tml-\S{16,})\n"
        while not (found := re.search(pattern, run.text)):
            assert run.poll() is None, run.text
            assert time.monotonic() < until, run.text
            time.sleep(0.02)
        url = f"http://127.0.0.1:{found[1]}/api/v1/get_server_capabilities"
        with urlopen(Request(url, headers={"X-API-Key": found[2]}), timeout=60) as reply:
            assert json.load(reply)["supported_models"][0]["model_name"] == "tiny"
        with pytest.raises(HTTPError, match="401"):
            urlopen(Request(url), timeout=60)
        run.send(signal.SIGINT)
        assert run.wait() == 0
        assert "Traceback" not in run.text
    finally:
        if run.poll() is None:
            run.end()


def test_mistakes(base: str, tokenizer: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    adapter = str(tmp_path / "adapter")
    for part in (with_trained_adapter(AutoModelForCausalLM.from_pretrained(base)), tokenizer):
        part.save_pretrained(adapter)
    file = tmp_path / "file"
    file.write_text("")
    for args, message in (
        ([adapter, "--port", "0"], "merge it first (rlhf export)"),
        ([base, "--max_runs", "0"], "--max_runs is 0"),
        ([base, "--folder", str(file)], f"--folder {file} is not a folder"),
    ):
        assert message in mistake(["tinker", *args], capsys)
    monkeypatch.setenv("RLHF_TINKER_TOKEN", "correct-horse-battery")
    assert "RLHF_TINKER_TOKEN must begin with tml-" in mistake(["tinker", base], capsys)
    monkeypatch.setitem(sys.modules, "rlhf_lightning.web", None)
    monkeypatch.delenv("RLHF_TINKER_TOKEN")
    monkeypatch.delitem(sys.modules, "rlhf_lightning.web")
    monkeypatch.delattr("rlhf_lightning.web", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = mistake(["tinker", base], capsys)
    assert "rlhf tinker needs the package uvicorn; install it with pip install 'rlhf-lightning[serve]'" in found
