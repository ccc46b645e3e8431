"""Every program in examples/ runs and has the described effect."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from examples import (
    distill,
    engine,
    environments,
    judge,
    label_by_rule,
    large_files,
    objectives,
    openai_client,
    own_module,
    plain_loop,
    reasoning_tasks,
    reward_model,
    reward_model_elsewhere,
    rewards,
    safety_filter,
    scorer,
    sft_own_data,
    stop_on_kl,
    verifiers_environment,
)
from rlhf_lightning import PolicyRLModule, PreferenceModule, SFTModule
from rlhf_lightning.data import reasoning_gym, verifiers
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.models.scorers import LoadedModel
from rlhf_lightning.objectives.policy import importance_sampling
from rlhf_lightning.rollout.advantages import compute_token_advantages
from rlhf_lightning.types import Episode, Row, TrainingSample
from tests.helpers.judge_server import Asked, serving
from tests.helpers.models import build_model
from tests.helpers.runs import in_ranks
from tests.helpers.serving import serving as serving_model
from tests.helpers.training import trainer

ROOT = Path(__file__).parents[1]
CLASSES = (objectives.TOPR, objectives.RoundCentered, objectives.RDPO)


def test_each_example_is_tested_and_listed() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    listed = (ROOT / "examples" / "README.md").read_text()
    assert {name for name in names if f"{name}.py" not in listed} == set()
    assert names - {"tinker_recipes"} <= set(globals())  # tests/tinker/test_client.py runs it


def test_large_files(base: str, tmp_path: Path) -> None:
    trainer, data = large_files.main(base, str(tmp_path))
    assert trainer.global_step == 20
    counts: Any = data.row_counts()["train"]
    assert {name: source["drawn"] for name, source in counts["sources"].items()} == {"sums": 120, "greetings": 40}


def test_rewards(base: str, tmp_path: Path) -> None:
    trainer = rewards.main(base, str(tmp_path))
    logged = trainer.callback_metrics
    assert {"train/reward_polite", "train/reward_covers"} <= logged.keys()
    assert trainer.global_step == 2
    assert rewards.polite(["Thank you!", "No.", "No."], ["polite", "polite", "brief"]) == [1.0, 0.0, None]
    unfit: list[tuple[Row, str]] = [({}, "no 'points'"), ({"points": []}, "is empty"), ({"points": "tea"}, "be a list")]
    for row, wrong in unfit:
        with pytest.raises(DataError, match=f"^rows.jsonl:3: .*{wrong}"):
            rewards.Covers().check([Prompt([{"role": "user", "content": "Hi"}], [1], row, where="rows.jsonl:3")])


def test_an_extension_takes_few_lines() -> None:
    for extension in (rewards.polite, rewards.Covers, *CLASSES, engine.PlainEngine):
        assert len(inspect.getsource(extension).splitlines()) < 25


def test_environments(base: str, tmp_path: Path) -> None:
    game, tools = environments.main(base, str(tmp_path))
    assert len(game.last_episodes) == len(tools.last_episodes) == 8
    assert not any(episode.failed for episode in [*game.last_episodes, *tools.last_episodes])
    assert list(tools.environment({"prompt": "Hi"}).available) == ["multiply"]  # type: ignore[misc, attr-defined]
    played = environments.Guess({"secret": 7}, highest=9)
    assert "1 to 9" in played.reset()[0]["content"]
    assert played.step({"content": "I say 3"}).next_messages == [{"role": "user", "content": "Higher."}]
    last = played.step({"content": "7"})
    assert (last.reward, last.done) == (0.5, True)


@pytest.mark.skipif(
    not reasoning_gym.is_installed(), reason="the package reasoning-gym is not installed (extra reasoning-gym)"
)
def test_reasoning_gym(base: str, tmp_path: Path) -> None:
    module = reasoning_tasks.main(base, str(tmp_path))
    assert module.trainer.global_step == 1
    assert len(module.last_episodes) == 8
    assert all(episode.terms == {"ReasoningGymReward": 0.0} for episode in module.last_episodes)  # it only babbles
    assert "train/reward_ReasoningGymReward_failed" in module.trainer.callback_metrics


@pytest.mark.skipif(not verifiers.is_installed(), reason="the package verifiers is not installed (extra verifiers)")
def test_verifiers_environment(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of several turns run side by side, and their rewards are those of the taskset."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "helpers" / "verifiers_tasks"))
    module = verifiers_environment.main(base, "verifiers:guess_tasks?limit=2", str(tmp_path))
    assert len(module.last_episodes) == 4
    for episode in module.last_episodes:
        said = [one["content"] or "" for one in episode.responses if one["role"] == "assistant"]
        index = str(episode.row["verifiers"]["index"])  # type: ignore[index, call-overload]
        if episode.truncated:  # cut off unless it was the last turn
            assert len(said) == 1 or episode.reward == float(index in said[-1])
        else:
            assert episode.reward == float(index in said[-1])
            assert len(said) == 2 or episode.reward


def test_openai_client(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving_model(Policy(base)) as served:
        answers = openai_client.main(served.url, "tiny", max_tokens=6)
    policy = served.policy
    rows = policy.prompts([{"prompt": question} for question in openai_client.QUESTIONS])
    assert answers == [episode.response for episode in policy.answer(rows, 6, 0, temperature=0.0)]
    assert answers[0] in capsys.readouterr().out


def test_engine(base: str, tmp_path: Path) -> None:
    module = engine.main(base, str(tmp_path))
    assert module.trainer.global_step > 0
    assert len(module.last_episodes) == 8
    # With the policy's weights it samples the tokens of the built-in engine.
    module.model_sampler.sync(1)
    prompts, seeds = [[5, 6, 7], [5, 6, 7], [8, 9]], [1, 2, 3]
    found = module.model_sampler.generate(prompts, seeds)
    expected = LocalEngine(module.model, module.renderer.decode).generate(prompts, module.model_sampler.params, seeds)
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert [one.stop_reason for one in found] == [one.stop_reason for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_objectives(base: str, tmp_path: Path) -> None:
    policy, dpo = objectives.main(base, str(tmp_path))
    assert policy.global_step == 2
    # Before the first update policy and reference are equal: the loss is that of the lengths alone.
    chosen, rejected = dpo.datamodule.prepared["train"].rows[0].sides  # type: ignore[attr-defined]
    wanted = torch.nn.functional.softplus(torch.tensor(-0.01 * (chosen.trained - rejected.trained)))
    torch.testing.assert_close(dpo.callback_metrics["train/loss"], wanted, rtol=1e-4, atol=1e-4)
    # With ratios up to 1 and at 1, TOPR's gradient is that of importance sampling.
    old = torch.tensor([[-1.0, -2.0, -0.5]])
    advantages, loss_mask = torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    gradients = []
    for loss in (objectives.TOPR(), importance_sampling):
        new = old.clone().requires_grad_()
        loss(new, old, advantages, loss_mask).sum().backward()
        gradients.append(new.grad)
    torch.testing.assert_close(*gradients)
    # What was bad and has become unlikely is left alone; what was good is not.
    far = (old - 5).requires_grad_()
    objectives.TOPR()(far, old, advantages, loss_mask).sum().backward()
    assert far.grad is not None
    assert far.grad[0, 0] == -1
    assert 0 < far.grad[0, 1] < 0.01
    c, r, lengths = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([30.0])
    found = objectives.RDPO(alpha=0.1)(c, r, chosen_lengths=lengths, rejected_lengths=lengths - 10)
    torch.testing.assert_close(found, torch.nn.functional.softplus(torch.tensor([-1.5])))


def test_an_advantage_over_ranks(tmp_path: Path) -> None:
    """A mean over the round is that of all ranks, also of one whose episodes have all failed."""
    rewards = [[1.0, 3.0], [5.0], []]

    def run() -> None:
        torch.distributed.init_process_group("gloo")
        own = rewards[torch.distributed.get_rank()]
        samples = [[TrainingSample([1, 2], [0, 1], [0.0, -1.0])] for _ in own]
        episodes = [Episode([], {}, 0, training_samples=each, reward=r) for each, r in zip(samples, own, strict=True)]
        compute_token_advantages(episodes, objectives.RoundCentered(), None)
        assert [episode.advantage for episode in episodes] == [reward - 3.0 for reward in own]

    in_ranks(3, run, tmp_path)


def test_scorer(base: str, tmp_path: Path, tokenizer: object) -> None:
    scores = scorer.main(base, str(tmp_path / "run"))
    assert scores.shape == (2,)
    # What was saved is an ordinary causal model: its own log-probabilities after the response give the score.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_lightning.data.conversations import to_messages
    from rlhf_lightning.data.rendering import Renderer

    folder = tmp_path / "run" / "model"
    words, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    row = Renderer(words).exchange(to_messages("Is it raining?"), to_messages("Yes, take a coat.", "assistant"))
    logprobs = model(torch.tensor([row.ids])).logits[0, -1].log_softmax(-1)
    yes, no = (words(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    torch.testing.assert_close(scores[0], logprobs[yes] - logprobs[no], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="same token"):
        scorer.YesNo("Yes", "Yes").build(LoadedModel(model, words, []))


def test_sft_with_a_custom_dataset(base: str, tmp_path: Path) -> None:
    trainer = sft_own_data.main(base, str(tmp_path))
    assert trainer.global_step == 3
    assert trainer.callback_metrics["val/tokens"] > 6
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_reward_model_in_a_script_and_outside_the_package(base: str, tmp_path: Path) -> None:
    trainer, module = reward_model.main(base, str(tmp_path))
    assert trainer.callback_metrics["val/accuracy"] == 1  # four pairs, learned by heart
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1
    responses = ["Fine, thank you.", "No."]
    elsewhere = reward_model_elsewhere.score(str(tmp_path / "model"), "How are you?", responses)
    torch.testing.assert_close(elsewhere, module.score(["How are you?"] * 2, responses), rtol=1e-5, atol=1e-5)


def test_label_by_rule(base: str, tmp_path: Path) -> None:
    report, trainer = label_by_rule.main(base, str(tmp_path))
    assert set(report.annotators) == {"Ann", "Ben", "rule"}
    assert len(report.agreement) == 3
    assert report.annotators["rule"].choices["tie"] == 0
    assert report.pairs == 3 + 3 + 4
    assert trainer.global_step == 3  # 10 pairs, 4 at a time


def test_stop_on_kl(base: str, tmp_path: Path) -> None:
    trainer = stop_on_kl.main(base, str(tmp_path), limit=2.0, rate=3e-3)
    assert 1 < trainer.global_step < 20
    assert trainer.callback_metrics["train/kl"] > 2
    assert trainer.callback_metrics["train/longest_response"] <= 24


def test_custom_module(base: str, tmp_path: Path) -> None:
    trainer = own_module.main(base, str(tmp_path))
    assert trainer.global_step == 3
    assert {"reward", "policy_loss", "nll"} <= trainer.callback_metrics.keys()
    module = trainer.lightning_module
    rows = own_module.ROWS
    sampled, rewards, advantages = module.play(rows)  # type: ignore[operator]
    # What the trainer computes is what the sampler recorded: the ratio is 1 before the first update.
    logprobs = module.token_logprobs(sampled["input_ids"], sampled["loss_mask"]).logprobs  # type: ignore[operator]
    torch.testing.assert_close(logprobs * sampled["loss_mask"], sampled["old_logprobs"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(advantages, rewards - rewards.view(2, 4).mean(1).repeat_interleave(4))


def test_judge(base: str, tmp_path: Path) -> None:
    pytest.importorskip("openai")

    def answer(asked: Asked) -> str:
        words = re.findall(r"BEGIN (?:\w+ )?response \w+\n(.*?)\nEND", asked["messages"][1]["content"], re.DOTALL)
        if len(words) == 1:
            return json.dumps({"reason": "", "score": 1 + len(words[0]) % 5})
        return json.dumps({"reason": "", "better": "first" if words[0] > words[1] else "second"})

    with serving(answer) as server:
        trained = judge.main(base, server.url, "tiny", str(tmp_path))
        asked = len(server.requests)
        assert trained.global_step == 2
        assert trained.callback_metrics["train/reward_judge"] > 1
        assert trained.callback_metrics["train/reward_comparison_order_bias"] == 0
        judge.main(base, server.url, "tiny", str(tmp_path))
        assert len(server.requests) == asked > 16, "the same run again asks nothing"


def test_safety_filter(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft, policy = safety_filter.main(base, str(tmp_path))
    assert "drop rule mail_addresses: 'ann@example.org'" in capsys.readouterr().out
    data: Any = sft.datamodule  # type: ignore[attr-defined]
    assert data.row_counts()["train"]["filter"]["data.train"]["rules"] == {"mail_addresses": 1, "medical": 1}
    assert len(data.prepared["train"].rows) == 2
    assert {"train/reward_filter_filtered", "train/reward_filter_weapons"} <= policy.callback_metrics.keys()


def test_distill(base: str, tmp_path: Path, tokenizer: object) -> None:
    teacher = str(tmp_path / "teacher")
    build_model(tokenizer, seed=1).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)  # type: ignore[attr-defined]
    off_policy, on_policy = distill.main(base, teacher, str(tmp_path / "run"))
    assert (off_policy.global_step, on_policy.global_step) == (2, 2)
    assert all(run.callback_metrics["train/divergence"] > 0 for run in (off_policy, on_policy))
    assert float(on_policy.callback_metrics["train/on_policy"]) in (0.0, 0.5, 1.0)
    assert (tmp_path / "run" / "on" / "model" / "model.safetensors").exists()


def test_plain_loop_reaches_the_best_policy() -> None:
    assert 0.5 * (plain_loop.train() - plain_loop.optimum()).abs().sum() < 0.02


@pytest.mark.parametrize("make", [SFTModule, PreferenceModule, PolicyRLModule])
def test_wrong_batches_are_rejected(make: Any, base: str, tmp_path: Path) -> None:
    loader = DataLoader([{"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2)}], batch_size=None)
    with pytest.raises(
        ConfigError, match=r"needs batches that are dicts with input_ids, loss_mask.*loss_mask is missing in this"
    ):
        trainer(tmp_path).fit(make(base), loader)
    with pytest.raises(ConfigError, match="input_ids is missing in this batch, a list with no keys"):
        trainer(tmp_path).fit(make(base), DataLoader(["How are you?"], batch_size=1))


def test_row_without_lengths_ends_with_its_response(base: str, tmp_path: Path) -> None:
    module = reward_model.main(base, str(tmp_path))[1]
    batch = reward_model.Pairs(module)(reward_model.ROWS)
    told = module.predict_step(batch, 0)
    assert module.predict_step({name: batch[name] for name in ("input_ids", "loss_mask")}, 0) == told
