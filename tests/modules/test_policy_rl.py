"""PolicyRLModule with a critic, KL control, stale and resampled rollouts: invariances, resume, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.scorers import RewardHead
from rlhf_lightning.objectives.policy import ClippedSurrogate, Reinforce, SequenceClippedSurrogate
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GAE, GlobalWhitened
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.models import build_model
from tests.helpers.modules import Options, data, few_vowels, make, policy_settings, same, weights
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer

NAMES = ["critic", "shared", "lora", "adaptive", "whitened", "centered", "refresh", "stale", "resampled"]


@pytest.mark.usefixtures("every_comparison")
@pytest.mark.parametrize("name", NAMES)
def test_interrupted_run_equals_an_uninterrupted_run_exactly(name: str, base: str, tmp_path: Path) -> None:
    def fit(folder: str, resume: Path | None = None) -> tuple[Any, Any]:
        module = make(
            "policy",
            base,
            rewards=[FunctionReward(few_vowels)],
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            **policy_settings(name),
        )
        run = trainer(
            tmp_path / folder,
            accumulate_grad_batches=2,
            max_epochs=2,
            callbacks=[ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
            enable_checkpointing=True,
        )
        run.fit(module, data("policy", 8, minibatches=2, update_epochs=2), ckpt_path=resume, weights_only=True)
        return module, run

    whole, run = fit("whole")
    assert run.global_step == 8
    for stop in (1, 4, 7):
        resumed, again = fit(f"resumed{stop}", tmp_path / "whole" / f"step={stop}.ckpt")
        assert again.global_step == run.global_step
        same(weights(whole), weights(resumed))
        if whole.kl is not None:
            assert whole.kl_controller.penalty.coefficient == resumed.kl_controller.penalty.coefficient
        assert [e.response for e in whole.last_episodes] == [e.response for e in resumed.last_episodes] or stop == 7


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_mini_batches_equal_one_large_batch(name: str, base: str, tmp_path: Path) -> None:
    results = []
    for minibatches, accumulate in ((1, 1), (4, 4)):
        torch.manual_seed(0)  # the adapters' first weights
        module = make("policy", base, dtype="float64", rewards=[FunctionReward(few_vowels)], **policy_settings(name))
        run = trainer(tmp_path, accumulate_grad_batches=accumulate, precision="64-true", max_epochs=2)
        run.fit(module, data("policy", 8, minibatches=minibatches))
        results.append(weights(module))
    same(results[0], results[1], rtol=1e-6, atol=1e-9)


class Keep(Callback):
    """Writes the final trained weights on the first rank, since the memory of a forked run is lost."""

    def on_fit_end(self, run: Any, module: Any) -> None:
        if run.is_global_zero:
            Path(run.default_root_dir).mkdir(exist_ok=True)
            torch.save(weights(module), Path(run.default_root_dir) / "weights.pt")


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one(name: str, base: str, tmp_path: Path) -> None:
    results = []
    for devices in (1, 2):
        torch.manual_seed(0)  # the adapters' first weights
        module = make("policy", base, dtype="float64", rewards=[FunctionReward(few_vowels)], **policy_settings(name))
        module.configure_model()
        strategy = "ddp_fork" if devices == 2 else "auto"
        root = tmp_path / str(devices)
        run = trainer(root, devices=devices, strategy=strategy, precision="64-true", callbacks=[Keep()])
        run.fit(module, data("policy", 7))
        results.append(torch.load(root / "weights.pt"))
    same(results[0], results[1], rtol=1e-6, atol=1e-7)


class Watch(Callback):
    """Records the logged metrics and the weights after each training batch."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.policy: list[torch.Tensor] = []
        self.critic: list[torch.Tensor] = []
        self.episodes: list[list[Any]] = []
        self.outputs: list[dict[str, float]] = []
        self.rounds: list[int] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take them."""
        self.logged.append({key: float(value) for key, value in run.logged_metrics.items()})
        self.policy.append(torch.cat([p.detach().flatten().clone() for p in module.model.parameters()]))
        if module.critic is not None:
            self.critic.append(torch.cat([p.detach().flatten().clone() for p in module.value_model.parameters()]))
        self.episodes.append(module.last_episodes)
        self.rounds.append(batch.get("round", 0))
        self.outputs.append({key: float(value) for key, value in outputs.items()})


def watched(module: Any, source: Any, root: Path, **options: Any) -> Watch:
    watch = Watch()
    trainer(root, callbacks=[watch], **options).fit(module, source)
    return watch


@pytest.mark.parametrize("name", NAMES)
def test_first_step_invariants(name: str, base: str, tmp_path: Path) -> None:
    watch = watched(make("policy", base, **policy_settings(name)), data("policy", 8), tmp_path)
    for output in watch.outputs:  # one step per round, so that every step is the first
        assert output["log_ratio_max"] <= 1e-4
        assert output["clip_fraction"] == 0
    if "train/kl" in watch.logged[0]:
        assert abs(watch.logged[0]["train/kl"]) < 1e-4


def test_critic_learns_the_return(base: str, tmp_path: Path) -> None:
    """The prompt alone decides the reward: the critic learns to explain it, and warm-up does not change the policy."""
    rewards = [FunctionReward(lambda completions, wanted: [2.0 * (value % 2) - 0.5 for value in wanted], name="parity")]
    critic = Critic(learning_rate=1e-2, warmup_rounds=16, clip=None, coefficient=1.0)
    module = make(
        "policy",
        base,
        rewards=rewards,
        critic=critic,
        advantage=GAE(),
        objective=ClippedSurrogate(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
    )
    rows = [{"prompt": f"{'odd' if i % 2 else 'even'} {i}", "wanted": i} for i in range(8)]
    source = PromptDataModule(rows, prompts_per_round=8, group_size=2, update_epochs=2, seed=1)
    watch = watched(module, source, tmp_path, max_epochs=20)
    quality = [numbers["train/explained_variance"] for numbers in watch.logged]
    assert quality[0] == pytest.approx(0.0, abs=1e-6)  # a head of zeros predicts 0
    assert quality[-1] > 0.7
    assert watch.logged[-1]["train/value_loss"] < 0.2 * watch.logged[0]["train/value_loss"]
    assert torch.equal(watch.policy[0], watch.policy[31])
    assert not torch.equal(watch.critic[0], watch.critic[31])
    assert not torch.equal(watch.policy[31], watch.policy[-1])


def test_critic_has_its_own_learning_rate(base: str) -> None:
    module = make("policy", base, critic=Critic(learning_rate=0.7), advantage=GAE())
    module.configure_model()
    groups = module.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.7]
    own = {id(p) for p in module.value_model.parameters()}
    assert {id(p) for p in groups[1]["params"]} == own
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in module.model.parameters()}


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_critic_starts_from_the_reward_model(lora: LoRA | None, base: str, tmp_path: Path) -> None:
    judge = make("preference", base, scorer=RewardHead(), lora=lora)
    trainer(tmp_path / "judge", callbacks=[ExportModel()], max_epochs=2).fit(judge, data("preference"))
    module = make("policy", base, critic=Critic(str(tmp_path / "judge" / "model")), advantage=GAE())
    module.configure_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        from rlhf_lightning.models.loading import merge

        wanted = (merge(judge.model) if lora else judge.model).base_model(input_ids=ids)[0]
        found = module.value_model.backbone(input_ids=ids)[0]
        values = module.value_model(ids, torch.tensor([[0.0, 0, 1, 1, 1]]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert values.tolist() == [[0.0] * 5]
    watch = watched(module, data("policy"), tmp_path / "rl")
    assert torch.isfinite(watch.critic[-1]).all()


def test_values_are_estimated_before_each_token(base: str) -> None:
    """Equal to a plain forward, alone, in a batch and with a shared prompt; for separate and shared backbones."""
    for critic in (Critic(), Critic(shared=True)):
        module = make("policy", base, critic=critic, advantage=GAE())
        module.configure_model()
        head = module.value_model.head
        torch.nn.init.normal_(head.weight)
        ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 3, 0], [4, 4, 2, 1, 0]])
        loss_mask = torch.tensor([[0.0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 1, 0, 1, 0]])
        values = module.critic_values(ids, loss_mask)
        backbone = module.model.base_model if critic.shared else module.value_model.backbone
        for row in range(3):
            length = int((ids[row] > 0).sum())
            states = backbone(input_ids=ids[row : row + 1, :length])[0]
            plain = torch.nn.functional.pad(head(states[0, :-1])[:, 0], (1, 5 - length))
            torch.testing.assert_close(values[row], plain * loss_mask[row], rtol=1e-4, atol=1e-5)


def test_critic_with_another_vocabulary_is_rejected(base: str, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    other = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    other.save_pretrained(tmp_path / "small")
    module = make("policy", base, critic=Critic(str(tmp_path / "small")), advantage=GAE())
    with pytest.raises(ConfigError, match="the critic has 10 embeddings"):
        module.configure_model()
    module = make("policy", base, kl=KLPenalty(reference=str(tmp_path / "small")))
    with pytest.raises(ConfigError, match="the reference has 10 embeddings"):
        module.configure_model()


def test_stale_round_is_sampled_with_the_previous_weights(base: str, tmp_path: Path) -> None:
    """Rounds 0 and 1 use the start weights, round 2 those after round 0; the trained weights are not affected."""

    def fit(folder: str, **options: Any) -> tuple[Any, Watch]:
        module = make("policy", base, optimizer=sgd(2.0), **options)
        return module, watched(module, data("policy", 12), tmp_path / folder)

    _, watch = fit("stale", max_staleness=1)
    rounds = watch.episodes
    start = make("policy", base)
    start.configure_model()
    for number in (0, 1):
        start.collector.collect([_prompt(start, e) for e in rounds[number][::2]], number, group_size=2)
        sampled = start.collector.episodes
        assert [e.training_samples[0].ids for e in sampled] == [e.training_samples[0].ids for e in rounds[number]]
    assert watch.logged[0]["train/logprob_gap"] < 1e-5
    assert watch.logged[1]["train/logprob_gap"] > 1e-3  # sampled by the start, which round 0 has moved away from
    _, plain = fit("fresh")
    # Two runs that differ after the first step: with two threads they are not bit-identical.
    torch.testing.assert_close(plain.policy[0], watch.policy[0], rtol=1e-5, atol=1e-5)
    assert (plain.policy[1] - watch.policy[1]).abs().max() > 1e-3


def _prompt(module: Any, episode: Any) -> Any:
    from rlhf_lightning.data.prompts import prompt_example

    return prompt_example(module.renderer, episode.row, episode.group)


class Toss:
    """Rewards that are equal in a group until it was sampled `good` times."""

    def __init__(self, good: int) -> None:
        self.good, self.calls, self.seen = good, {}, []

    def __call__(self, prompts: list[Any], episodes: list[Any]) -> list[float]:
        groups = sorted({episode.group for episode in episodes})
        self.seen.append(groups)
        for group in groups:
            self.calls[group] = self.calls.get(group, 0) + 1
        return [
            float(episode.sample_index) if self.calls[episode.group] > episode.group % 2 * self.good else 1.0
            for episode in episodes
        ]


@pytest.mark.parametrize(("limit", "signal", "resampled"), [(0, 0.5, None), (1, 0.5, 0.5), (3, 0.0, 1.0)])
def test_groups_with_equal_rewards_are_sampled_again(
    limit: int, signal: float, resampled: float | None, base: str, tmp_path: Path
) -> None:
    toss = Toss(2)
    module = make("policy", base, rewards=[FunctionReward(toss, name="toss")], resample_groups=limit)
    source = PromptDataModule(prompts(4), prompts_per_round=4, group_size=2)
    watch = watched(module, source, tmp_path)
    assert watch.logged[0]["train/zero_variance_groups"] == signal
    assert watch.logged[0].get("train/resampled_groups") == resampled
    assert [sorted(groups) for groups in toss.seen] == [[0, 1, 2, 3], [1, 3], [1, 3]][: 1 + min(limit, 2)]
    played = [(episode.group, episode.sample_index) for episode in watch.episodes[0]]
    assert sorted(played) == [(group, sample) for group in range(4) for sample in range(2)]


def test_moving_reference(base: str, tmp_path: Path) -> None:
    """After a refresh the policy's own weights are the reference, and the KL starts at 0 again."""
    for lora in (None, LoRA(rank=2)):
        module = make("policy", base, kl=KLPenalty(0.01, refresh_every=2), optimizer=sgd(3.0), lora=lora)
        watch = watched(module, data("policy", 24), tmp_path)
        distance = [abs(numbers["train/kl"]) for numbers in watch.logged]
        assert distance[0] < 1e-4
        assert distance[1] > 1e-3
        assert distance[2] < 1e-4
        assert distance[3] > 1e-3


def test_separate_reference(base: str, tokenizer: Any, tmp_path: Path) -> None:
    other = build_model(tokenizer, seed=5)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    module = make("policy", base, kl=KLPenalty(0.1, reference=str(tmp_path / "other")))
    watch = watched(module, data("policy", 4), tmp_path)
    assert abs(watch.logged[0]["train/kl"]) > 0.1
    ids, loss_mask = torch.tensor([[3, 4, 5]]), torch.tensor([[0.0, 1.0, 1.0]])
    plain = other(input_ids=ids).logits.log_softmax(-1)[0, [0, 1], [4, 5]]
    torch.testing.assert_close(module.reference.logprobs(ids, loss_mask)[0, 1:], plain, rtol=1e-4, atol=1e-4)


def test_adaptive_coefficient_follows_the_kl(base: str, tmp_path: Path) -> None:
    module = make("policy", base, kl=KLPenalty(0.1, target=1e-4, horizon=8), optimizer=sgd(2.0))
    logged = watched(module, data("policy", 12), tmp_path).logged
    used = [numbers["train/kl_coefficient"] for numbers in logged]
    # 8 responses a round and a horizon of 8: the first round's KL of 0 lowers it by a fifth, the next raise it.
    assert used[0] == pytest.approx(0.1)
    assert used[1] == pytest.approx(0.08, rel=1e-3)
    assert used[2] == pytest.approx(used[1] * (1.2 if logged[1]["train/kl"] > 1.2e-4 else 0.8), rel=1e-3)


def test_entropy_bonus_keeps_the_policy_random(base: str, tmp_path: Path) -> None:
    final = []
    for coefficient in (0.0, 5.0):
        module = make("policy", base, entropy_coefficient=coefficient, optimizer=sgd(0.5))
        final.append(watched(module, data("policy", 24), tmp_path).logged)
    assert final[1][-1]["train/entropy"] > final[0][-1]["train/entropy"] + 0.05
    assert final[1][-1]["train/entropy"] > final[1][0]["train/entropy"]


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ({"critic": Critic()}, {}, "does not use values. Set model.advantage to GAE"),
        ({"advantage": GAE()}, {}, "needs the values of a critic"),
        ({"critic": Critic(shared=True, warmup_rounds=1), "advantage": GAE()}, {}, "changes the policy"),
        ({"max_staleness": -1}, {}, "it must be at least 0"),
        ({"resample_groups": -1}, {}, "at least 0"),
        ({"objective": Reinforce()}, {"update_epochs": 2}, "neither a clip nor an importance ratio"),
        ({"objective": Reinforce()}, {"minibatches": 2}, "2 optimizer steps"),
        ({"objective": SequenceClippedSurrogate(normalized=False), "kl": KLPenalty(0.1)}, {}, "Set kl.place to reward"),
        ({"objective": SequenceClippedSurrogate(), "critic": Critic(), "advantage": GAE()}, {}, "one action"),
        ({}, {"minibatches": 9}, "but a round has only 8 episodes"),
        ({"advantage": GlobalWhitened(), "resample_groups": 1}, {"group_size": 1}, "cannot have different rewards"),
        ({"advantage": GlobalWhitened("group")}, {"group_size": 1}, "every advantage would be 0"),
        ({}, {"group_size": 1}, "every advantage would be 0"),
    ],
)
def test_incompatible_settings_are_rejected(
    module: Options, source: Options, message: str, base: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path).fit(make("policy", base, **module), data("policy", 4, **source))


def test_invalid_critic_settings_are_rejected() -> None:
    with pytest.raises(ConfigError, match="leave out critic"):
        Critic("somewhere", shared=True)
    with pytest.raises(ConfigError, match="must be above 0"):
        Critic(clip=0.0)


def test_critic_and_whitened_advantages_need_no_groups(base: str, tmp_path: Path) -> None:
    for options in ({"critic": Critic(), "advantage": GAE()}, {"advantage": GlobalWhitened()}):
        watch = watched(make("policy", base, **options), data("policy", 4, group_size=1), tmp_path)
        assert "train/zero_variance_groups" not in watch.logged[0]
        assert torch.isfinite(watch.policy[-1]).all()


def recorded(advantage: float | None = None) -> PromptDataModule:
    row = {"prompt_tokens": [5, 6], "response_tokens": [7, 8, 9], "logprobs": [-1.0] * 3}
    rows = [{**row, "reward": float(i % 2), "group": i // 2, "advantage": advantage} for i in range(8)]
    return PromptDataModule(episodes=rows, prompts_per_round=4, seed=1)


def test_critic_learns_from_recorded_episodes(base: str, tmp_path: Path) -> None:
    module = make(
        "policy", base, rewards=[], critic=Critic(learning_rate=0.1), advantage=GAE(), objective=ClippedSurrogate()
    )
    watch = watched(module, recorded(), tmp_path, max_epochs=2)
    assert watch.logged[-1]["train/value_loss"] > 0
    assert not torch.equal(watch.critic[0], watch.critic[-1])


@pytest.mark.parametrize(
    ("options", "advantage", "message"),
    [
        ({"resample_groups": 1}, None, "are already sampled"),
        ({"max_staleness": 1}, None, "are already sampled"),
        ({"objective": Reinforce()}, None, "cannot correct for"),
        ({"critic": Critic(), "advantage": GAE()}, 1.0, "a critic would learn nothing"),
        ({"advantage": GlobalWhitened()}, 1.0, "whitening would change"),
        ({"kl": KLPenalty(0.1, "reward")}, None, "of another policy"),
    ],
)
def test_settings_that_do_not_fit_recorded_episodes_are_rejected(
    options: Options, advantage: float | None, message: str, base: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path).fit(make("policy", base, rewards=[], **options), recorded(advantage))


def test_recorded_episodes_without_shared_groups_are_rejected(base: str, tmp_path: Path) -> None:
    row = {"prompt_tokens": [5, 6], "response_tokens": [7, 8, 9], "logprobs": [-1.0] * 3}
    rows = [{**row, "reward": float(i), "group": i} for i in range(4)]
    with pytest.raises(ConfigError, match="no two rows of"):
        trainer(tmp_path).fit(make("policy", base, rewards=[]), PromptDataModule(episodes=rows))


@pytest.mark.parametrize("refresh", [None, 1])
def test_reference_has_no_dropout(refresh: int | None, base: str, tmp_path: Path) -> None:
    """peft creates a second adapter with its config's dropout, which would add noise to the KL."""
    kl = KLPenalty(0.1, refresh_every=refresh)
    module = make("policy", base, kl=kl, lora=LoRA(rank=2, dropout=0.5), optimizer=sgd(0.0))
    watch = watched(module, data("policy", 12), tmp_path)
    assert all(abs(numbers["train/kl"]) < 1e-4 for numbers in watch.logged)


def test_validation_samples_with_the_newest_weights(base: str, tmp_path: Path) -> None:
    module = make("policy", base)
    module.configure_model()
    called: list[str] = []
    sampler = module.model_sampler
    sync, generate = sampler.sync, sampler.engine.generate
    sampler.sync = lambda version: (called.append("sync"), sync(version))[1]
    sampler.engine.generate = lambda *a, **k: (called.append("generate"), generate(*a, **k))[1]
    run = trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(module, data("policy", 4))
    assert called == ["sync", "generate", "sync", "generate", "generate"]
    run.validate(module, data("policy", 4))
    assert called[5:] == ["sync", "generate", "generate"]


@pytest.mark.parametrize(("size", "batches"), [(None, [12, 5]), (3, [3, 3, 3, 3, 3, 2])])
def test_held_out_prompts_are_answered_many_at_a_time(
    size: int | None, batches: list[int], base: str, tmp_path: Path
) -> None:
    """As many as a round has responses, unless set; Lightning's check before training answers only a few."""
    module = make("policy", base)
    source = PromptDataModule(prompts(3), prompts(17), prompts_per_round=3, group_size=4, eval_batch_size=size)
    assert source.eval_batch_size == batches[0]
    counts: list[int] = []
    module.configure_model()
    generate = module.model_sampler.engine.generate
    module.model_sampler.engine.generate = lambda rows, *a, **k: (counts.append(len(rows)), generate(rows, *a, **k))[1]
    trainer(tmp_path).validate(module, source)
    assert counts == [count for count in batches for _ in ("greedy", "sampled")]
    counts.clear()
    trainer(tmp_path, num_sanity_val_steps=1, limit_train_batches=0).fit(module, source)
    assert counts == [min(8, batches[0])] * 2


def test_rounds_are_counted_if_epochs_are_cut_short(base: str, tmp_path: Path) -> None:
    """Round numbers, which seeds depend on, may have gaps; a reference still moves every second round."""
    module = make("policy", base, kl=KLPenalty(0.01, refresh_every=2), optimizer=sgd(3.0))
    watch = watched(module, data("policy", 40), tmp_path, limit_train_batches=2, max_epochs=3)
    distance = [abs(numbers["train/kl"]) for numbers in watch.logged]
    assert [value < 1e-4 for value in distance] == [True, False] * 3


def test_batch_of_a_custom_dataloader(base: str, tmp_path: Path) -> None:
    """The keys that the objective needs are enough, without our loader or rounds."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "loss_mask": torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
        "old_logprobs": torch.tensor([[0.0, 0.0, -6.0, -6.0]]),
        "advantages": torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
    }
    module = make("policy", base, objective=ClippedSurrogate())
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, torch.utils.data.DataLoader([batch] * 2, batch_size=None))
    assert run.global_step == 2


def test_epoch_that_is_cut_short_is_not_continued(base: str, tmp_path: Path) -> None:
    watch = watched(make("policy", base), data("policy", 12), tmp_path, limit_train_batches=2, max_epochs=2)
    assert watch.rounds == [0, 1, 3, 4]


def test_validation_kl_is_logged(base: str, tmp_path: Path) -> None:
    module = make("policy", base, kl=KLPenalty(0.0), optimizer=sgd(2.0))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, data("policy", 8))
    assert float(run.callback_metrics["val/kl"]) != 0
    assert "val/kl" not in trainer(tmp_path).validate(make("policy", base), data("policy", 4))[0]


def test_incompatible_settings_are_rejected_before_loading() -> None:
    with pytest.raises(ConfigError, match="needs the values of a critic"):
        PolicyRLModule("nowhere", advantage=GAE(), sampler=Sampler(max_tokens=2))
