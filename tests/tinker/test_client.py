"""Tinker's own client, and recipes of tinker-cookbook, against the server; skipped where these packages are missing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import build_model
from tests.helpers.tinker import Asked, asking

tinker = pytest.importorskip("tinker")
types = tinker.types
IDS = [3, 14, 15, 92, 65, 35]


@pytest.fixture(scope="module")
def client(asked: Asked) -> Iterator[Any]:
    """A client of the module's server."""
    with tinker.ServiceClient(base_url=asked.url, api_key="tml-local") as found:
        yield found


@pytest.fixture(scope="module")
def trained(client: Any) -> Any:
    """A training client that has made some steps."""
    found = client.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
    for _ in range(3):
        step(found)
    return found


def row(**inputs: Any) -> Any:
    given = {"target_tokens": IDS[1:], **(inputs or {"weights": [1.0] * 5})}
    return types.Datum(model_input=types.ModelInput.from_ints(IDS[:-1]), loss_fn_inputs=given)


def step(training: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of both calls, submitted one after the other without waiting."""
    computed = training.forward_backward([row(), row()], "cross_entropy")
    stepped = training.optim_step(types.AdamParams(learning_rate=1e-2))
    return computed.result().metrics, stepped.result().metrics


def test_training_and_sampling(client: Any, trained: Any) -> None:
    first, _ = step(trained)
    second, norm = step(trained)
    assert second["loss:sum"] < first["loss:sum"]
    assert norm["grad_norm"] > 0
    assert trained.get_info().lora_rank == 4
    tokenizer = trained.get_tokenizer()
    sampling = trained.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(IDS)
    params = types.SamplingParams(max_tokens=5, seed=2, stop=[])
    found = sampling.sample(
        prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=3
    ).result()
    one, two = found.sequences
    assert (len(one.tokens), len(one.logprobs), one.stop_reason) == (5, 5, "length")
    assert one.sequence_id != two.sequence_id
    assert [len(top) for top in one.topk_logprobs] == [3] * 5
    assert found.prompt_logprobs[0] is found.topk_prompt_logprobs[0] is None
    logprobs = trained.forward([row()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
    torch.testing.assert_close(logprobs, torch.tensor(found.prompt_logprobs[1:]), atol=1e-5, rtol=0)
    again = sampling.compute_logprobs(prompt, prompt_logprobs_last_n=2).result()
    assert again == [None] * 4 + [pytest.approx(value, abs=1e-5) for value in found.prompt_logprobs[4:]]
    assert isinstance(tokenizer.decode(one.tokens), str)


def test_policy_losses_and_a_custom_one(trained: Any) -> None:
    rows = [row(logprobs=[-1.0] * 5, advantages=[0.0, 1.0, -1.0, 0.5, 2.0])]
    found = {
        loss: trained.forward(rows, loss, config).result().metrics["loss:sum"]
        for loss, config in (
            ("importance_sampling", None),
            ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}),
            ("cispo", None),
            ("dro", {"beta": 0.1}),
        )
    }
    assert len(set(found.values())) == 4

    def custom(data: Any, logprobs: Any) -> Any:
        total = -sum((one * torch.arange(5.0)).sum() for one in logprobs)
        return total, {"custom": total.item()}

    weighted = row(weights=torch.arange(5.0))
    expected = trained.forward_backward([weighted], "cross_entropy").result().metrics["loss:sum"]
    norms = [trained.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]]
    metrics = trained.forward_backward_custom([row()], custom).result().metrics
    norms.append(trained.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"])
    assert metrics["custom"] == pytest.approx(expected, rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_checkpoints(client: Any, trained: Any, asked: Asked) -> None:
    path = trained.save_state("state", ttl_seconds=3600, user_metadata={"note": "x"}).result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert [step(resumed), step(resumed)] == [step(trained), step(trained)]
    assert resumed.get_info().lora_rank == 4
    saved = trained.save_weights_for_sampler("sampler").result().path
    prompt, greedy = types.ModelInput.from_ints(IDS), types.SamplingParams(max_tokens=4, temperature=0.0)
    answers = [
        sampling.result().sample(prompt, 1, greedy).result().sequences[0].tokens
        for sampling in (
            client.create_sampling_client(model_path=saved),
            trained.save_weights_and_get_sampling_client(),
            client.create_sampling_client(base_model="tiny"),
        )
    ]
    assert answers[0] == answers[1]
    rest = tinker.RestClient(base_url=asked.url, api_key="tml-local")
    assert rest.get_training_run_by_tinker_path(path).result().last_checkpoint.user_metadata == {"note": "x"}
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    rest.delete_checkpoint_from_tinker_path(saved).result()
    assert [one.tinker_path for one in rest.list_checkpoints(trained.model_id).result().checkpoints] == [path]
    assert rest.get_server_capabilities().result().supported_models[0].model_name == "tiny"


def test_errors_that_the_client_shows(client: Any, trained: Any) -> None:
    """What is wrong, and what to do, at once: no attempts for minutes."""
    bad = types.Datum(
        model_input=types.ModelInput.from_ints([5]), loss_fn_inputs={"target_tokens": [10**6], "weights": [1.0]}
    )
    other = client.create_lora_training_client(base_model="tiny", rank=2).result()
    for call, message in (
        (lambda: client.create_lora_training_client(base_model="other").result(), "this server has 'tiny'"),
        (lambda: other.forward_backward([bad], "cross_entropy").result(), "target_tokens has the token id 1000000"),
        (lambda: other.forward_backward([row()], "gspo").result(), "loss_fn is 'gspo'"),
        (lambda: other.optim_step(types.AdamParams()).result(), "call forward_backward before optim_step"),
        (
            lambda: client.create_sampling_client(model_path="tinker://../../x/weights/y").result(),
            "is no checkpoint of",
        ),
        (
            lambda: (
                trained.save_weights_and_get_sampling_client()
                .result()
                .sample(types.ModelInput.from_ints(IDS), 1, types.SamplingParams(max_tokens=10**6))
                .result()
            ),
            "the model has only 256 positions",
        ),
    ):
        with pytest.raises(tinker.TinkerError, match=message):
            call()
    assert step(other)  # the run goes on


@pytest.mark.slow  # 40 s
def test_recipes_of_the_cookbook(session_tokenizer: Any, tmp_path: Path) -> None:
    """examples/tinker_recipes.py: sl_loop learns, and rl_loop goes on from its state."""
    pytest.importorskip("tinker_cookbook")
    from examples import tinker_recipes

    folder = str(tmp_path / "base")
    for part in (build_model(session_tokenizer, max_position_embeddings=512), session_tokenizer):
        part.save_pretrained(folder)
    name = "Qwen/Qwen3-4B-Instruct-2507"
    with (
        pytest.MonkeyPatch.context() as patch,
        asking(folder, tmp_path / "checkpoints", name=name) as asked,
    ):
        patch.setenv("TINKER_API_KEY", "tml-local")
        tinker_recipes.main(asked.url, name, folder, str(tmp_path), sl_steps=6, rl_steps=2)
    found = [json.loads(line) for line in (tmp_path / "sl" / "metrics.jsonl").read_text().splitlines()]
    assert found[-1]["train_mean_nll"] < found[0]["train_mean_nll"]
    rounds = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [one["progress/batch"] for one in rounds] == [0, 1]
    saved = [json.loads(line) for line in (tmp_path / "rl" / "checkpoints.jsonl").read_text().splitlines()]
    assert saved[-1]["sampler_path"].endswith("/sampler_weights/final")
