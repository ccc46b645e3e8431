"""`rlhf serve --engine vllm` on a CPU, asked by OpenAI's client. `make test-vllm` runs it."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.evaluation.policy import Policy
from tests.helpers.cli import mistake
from tests.helpers.models import save_small_model
from tests.helpers.vllm_serve import LIMIT

openai = pytest.importorskip("openai")
IS_MISSING = find_spec("vllm") is None
needs_vllm = pytest.mark.skipif(IS_MISSING, reason="vLLM is not installed: make test-vllm")
OPTIONS = '{"enforce_eager": true, "block_size": 32, "kv_cache_memory_bytes": 67108864, "gpu_memory_utilization": 0.05}'
TEXTS = ["Hello there", "one two", "three", "How are you today?", "four five one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), 128)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A server, which Ctrl-C ends after the tests."""
    output = folder.parent / "output.txt"
    command = [sys.executable, "-m", "rlhf_lightning", "serve", str(folder), "--name", "tiny", "--port", "0"]
    command += ["--engine", "vllm", "--slots", "2", "--max_tokens", "20", "--vllm_options", OPTIONS]
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        begun = time.monotonic()
        while not (found := re.search(r"at (http://[^ ]+/v1) ", output.read_text())):
            if process.poll() is not None or time.monotonic() - begun > LIMIT:
                raise RuntimeError(f"the server does not start: {output.read_text()[-3000:]}")
            time.sleep(0.2)
        yield found[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in output.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.vllm
@needs_vllm
def test_answers_are_those_of_the_built_in_engine(url: str, folder: Path) -> None:
    """Greedy, in float32; more requests than slots at the same time, streamed and not, with their log-probabilities."""

    async def one(asked: Any, text: str, streamed: bool) -> tuple[str, list[float]]:
        answer = await asked.chat.completions.create(
            model="tiny", messages=user(text), temperature=0, logprobs=True, stream=streamed
        )
        if not streamed:
            [choice] = answer.choices
            return str(choice.message.content), [token.logprob for token in choice.logprobs.content]
        choices = [chunk.choices[0] async for chunk in answer]
        logprobs = [token.logprob for choice in choices if choice.logprobs for token in choice.logprobs.content]
        return "".join(choice.delta.content or "" for choice in choices), logprobs

    async def all_of_them() -> list[tuple[str, list[float]]]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as asked:
            return list(await asyncio.gather(*(one(asked, text, i % 2 == 0) for i, text in enumerate(TEXTS))))

    policy = Policy(str(folder))
    episodes = policy.answer(policy.prompts([{"prompt": text} for text in TEXTS]), 20, 0, temperature=0.0)
    for (text, logprobs), episode in zip(asyncio.run(all_of_them()), episodes, strict=True):
        assert text == episode.response
        [sample] = episode.training_samples
        wanted = [value for value, kept in zip(sample.old_logprobs, sample.loss_mask, strict=True) if kept]
        assert logprobs == pytest.approx(wanted, abs=1e-4)


@pytest.mark.vllm
@needs_vllm
def test_settings_of_requests(url: str) -> None:
    """Seeds, several answers, stop texts, and what vLLM cannot report."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as asked:

        def texts(**options: Any) -> list[str]:
            answer = asked.chat.completions.create(model="tiny", messages=user("Hello"), **options)
            return [str(choice.message.content) for choice in answer.choices]

        three = texts(n=3, seed=4, top_p=0.9)
        assert len(set(three)) == 3
        assert texts(seed=4, top_p=0.9) == three[:1]
        [whole] = texts(temperature=0)
        middle = whole[len(whole) // 2]
        assert texts(temperature=0, stop=middle) == [whole.partition(middle)[0].rstrip()]
        with pytest.raises(openai.BadRequestError, match="vLLM has no log-probabilities of the full softmax"):
            texts(logprobs=True, top_p=0.9)


@pytest.mark.skipif(not IS_MISSING, reason="vLLM is installed")
def test_missing_vllm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(["serve", str(folder), "--engine", "vllm", "--port", "0"], capsys)
    assert "--engine vllm needs the package vllm; docs/engines.md says how to install it" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vllm_options", "{}"], "--vllm_options are arguments of vLLM; add --engine vllm"),
        (["--engine", "vllm", "--device", "cpu"], "vLLM chooses the device itself"),
        (["--engine", "vllm", "--vllm_options", "[1]"], "--vllm_options '[1]' must be a JSON object"),
    ],
)
def test_flags_that_do_not_fit(args: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in mistake(["serve", str(folder), "--port", "0", *args], capsys)
