"""Answers that are sampled in the background, and the disagreement of an ensemble about them."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import PreferenceModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.labeling.ensemble import Ensemble
from rlhf_lightning.labeling.queue import Assignment, LabelQueue
from rlhf_lightning.labeling.sampling import AnsweringModel, AnswerSampler
from rlhf_lightning.labeling.store import LabelStore
from rlhf_lightning.models.reward_model import RewardModel
from tests.helpers.labels import comparison
from tests.helpers.models import build_model
from tests.helpers.rows import prompts


def model(name: str, count: int = 6) -> AnsweringModel:
    policy = Policy(name)
    return AnsweringModel(name, policy, policy.prompts(prompts(count)), {"temperature": 1.0, "top_k": 40})


def new_queue(folder: Path) -> LabelQueue:
    return LabelQueue(LabelStore(folder / "pairs.jsonl", {}), Assignment())


def wait(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_answers_are_those_of_the_model_and_carry_their_settings(base: str, tmp_path: Path) -> None:
    own, queue = model(base), new_queue(tmp_path)
    sampler = AnswerSampler(queue, [own], max_tokens=6, seed=3, chunk=4)
    sampler.run()
    wanted = own.policy.answer(own.prompts, 6, 3, 2, temperature=1.0, top_k=40)
    found = list(queue.store.comparisons.values())
    assert len(found) == 6
    for index, one in enumerate(found):
        assert one.question.messages == own.prompts[index].messages
        for sample, candidate in enumerate(one.candidates):
            episode = wanted[2 * index + sample]
            assert candidate.messages == episode.responses
            assert candidate.source == {
                "model": base,
                "sampling": {
                    "max_tokens": 6,
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "top_k": 40,
                    "min_p": 0.0,
                    "seed": 3,
                },
                "prompt": index,
                "sample": sample,
                "stop_reason": episode.stop_reason,
                "response_tokens": episode.response_tokens,
            }
    # Nothing is sampled twice.
    before = [*queue.store.comparisons]
    AnswerSampler(queue, [own], max_tokens=6, seed=3).run()
    assert [*queue.store.comparisons] == before


def test_pairs_of_several_models_take_turns(base: str, tokenizer: Any, tmp_path: Path) -> None:
    names = [base]
    for seed in (1, 2):
        folder = str(tmp_path / f"model{seed}")
        build_model(tokenizer, seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        names.append(folder)
    queue = new_queue(tmp_path)
    AnswerSampler(queue, [model(name) for name in names], max_tokens=6, seed=0).run()
    pairs = [[one.source["model"] for one in found.candidates] for found in queue.store.comparisons.values()]
    assert pairs == [[names[0], names[1]], [names[0], names[2]], [names[1], names[2]]] * 2


def test_answers_are_made_ahead_in_the_background(base: str, tmp_path: Path) -> None:
    queue = new_queue(tmp_path)
    sampler = AnswerSampler(queue, [model(base, 12)], max_tokens=4, seed=0, chunk=1, ahead=3)
    sampler.start()
    wait(lambda: queue.progress("Ann").remaining == 3)
    time.sleep(0.3)
    assert len(queue.store.comparisons) == 3
    assert sampler.is_running
    shown = queue.show("Ann")
    assert shown is not None
    queue.decide("Ann", shown.comparison.id, "A")
    wait(lambda: len(queue.store.comparisons) == 4)
    sampler.stop()
    assert not sampler.is_running
    assert not sampler.failed
    assert len(queue.store.comparisons) == 4


def test_failure_is_reported(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    sampler = AnswerSampler(new_queue(tmp_path), [model(base)], max_tokens=4, seed=0)
    monkeypatch.setattr(Policy, "answer", fail)
    sampler.start()
    wait(lambda: not sampler.is_running)
    assert sampler.failed
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.stop()


def test_prompts_without_room_are_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exceed the model's context of 256 tokens"):
        AnswerSampler(new_queue(tmp_path), [model(base)], max_tokens=250, seed=0)


def test_disagreement_is_the_variance_of_the_probabilities(base: str, tmp_path: Path) -> None:
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        module = PreferenceModule(base)
        module.configure_model()
        module.save_pretrained(tmp_path / str(seed))
        models.append(RewardModel(str(tmp_path / str(seed))))
    given = [comparison(index, ("one two three", "five")) for index in range(40)]
    found = Ensemble(models).scored(given)
    texts = [["one two three", "five"][index] for index in range(2)]
    for one in (found[0], found[-1]):
        question = one.question.messages
        scores = [reward.score([question] * 2, texts).tolist() for reward in models]
        chances = torch.tensor([1 / (1 + torch.tensor(b - a).exp()) for a, b in scores], dtype=torch.float64)
        assert one.disagreement == pytest.approx(((chances - chances.mean()) ** 2).mean().item(), rel=1e-3)
    assert [one.id for one in found] == [one.id for one in given]
    with pytest.raises(ConfigError, match="at least two preference models, but there are 1"):
        Ensemble(models[:1])
