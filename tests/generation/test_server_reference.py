"""A vLLM server as the reference of the KL, with a stand-in; tests/generation/test_vllm_teacher.py has a real one."""

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator
from csv import DictReader
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation import server_reference, vllm_server
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.server_reference import ServerReference
from rlhf_lightning.generation.vllm_server import ServerError
from rlhf_lightning.models.distillation import Distillation
from rlhf_lightning.models.reference import Reference, load_reference
from rlhf_lightning.quickstart.model import make_tokenizer
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.cli import rlhf_in_process, stage_config, write_yaml
from tests.helpers.models import build_model
from tests.helpers.modules import few_vowels, same, weights
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer
from tests.helpers.vllm_server import Answer, Drop, FakeServer

SCORE = "/v1/completions"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 10, 11, 12, 0, 0], [5, 5, 0, 0, 0, 0], [40, 41, 42, 0, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "DELAYS", (0.02, 0.1))
    monkeypatch.setattr(server_reference, "PAUSE", 0.02)
    monkeypatch.setattr(server_reference, "PATIENCE", 10.0)


@pytest.fixture
def other(tokenizer: Any) -> Any:
    """A wider model than the policy, with a padded embedding."""
    return build_model(tokenizer, seed=1, hidden_size=48, vocab_size=len(tokenizer) + 5)


@pytest.fixture
def serve(other: Any, tokenizer: Any) -> Iterator[Callable[..., FakeServer]]:
    """Starts servers, and stops them after the test."""
    servers: list[FakeServer] = []

    def start(**options: Any) -> FakeServer:
        given = {"model": other, "decode": tokenizer.decode, "context": 256, **options}
        servers.append(FakeServer(given.pop("model"), given.pop("decode"), **given))
        return servers[-1]

    yield start
    for server in servers:
        if not server.dead:
            server.kill()


def restart(server: FakeServer, serve: Any, wait: float = 0.3, **options: Any) -> None:
    """Kill a server, and start it again after some seconds."""
    server.kill()
    threading.Timer(wait, lambda: serve(port=server.port, **options)).start()


def test_log_probabilities_are_those_of_the_local_model(serve: Any, other: Any, tokenizer: Any) -> None:
    """Each row is sent up to its last trained token; a row without one is not sent."""
    server, sent = serve(), []
    reference = ServerReference(server.url + "/", tokenizer)
    server.before = lambda path, body: sent.append(body["prompt"]) if path == SCORE else None
    found = reference.logprobs(IDS, MASK)
    wanted = Reference(other, separate=True).logprobs(IDS, MASK)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert found[MASK == 1].max() < -0.1
    assert sorted(sent) == [[5, 6, 7, 8, 9, 10], [9, 10, 11, 12], [40, 41]]
    empty = reference.logprobs(torch.tensor([[0, 0]]), torch.tensor([[0, 0]]))
    assert empty.tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="prompts at 1"):
        reference.logprobs(IDS, MASK, temperature=0.7)


def test_rows_in_flight(serve: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_reference, "IN_FLIGHT", 3)
    server = serve()
    reference = ServerReference(server.url, tokenizer)
    reference.logprobs(IDS[:1].repeat(20, 1), MASK[:1].repeat(20, 1))
    assert server.most == 3


@pytest.mark.parametrize("failure", [Drop(), Answer(503, {"error": "starting"}), Answer(404, {"error": "no model"})])
def test_failures_that_pass(
    failure: Exception, serve: Any, other: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The server is killed and started again; or answers with an error for a while."""
    server, calls = serve(), []
    reference = ServerReference(server.url, tokenizer)

    def fail(path: str, body: Any) -> None:
        if path == SCORE:
            calls.append(path)
            if len(calls) == 2 and isinstance(failure, Drop):
                restart(server, serve)
            if 2 <= len(calls) < 4:
                raise failure

    server.before = fail
    found = reference.logprobs(IDS, MASK)
    torch.testing.assert_close(found, Reference(other, separate=True).logprobs(IDS, MASK), rtol=0, atol=1e-4)
    if isinstance(failure, Drop):
        assert "waiting up to 10 s for the server" in caplog.text
        assert caplog.text.count("answers again") == 1


def test_failures_that_stay(serve: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    reference = ServerReference(server.url, tokenizer)

    def crash(path: str, body: Any) -> None:
        if path == SCORE:
            raise Answer(500, {"error": {"message": "CUDA error"}})

    server.before = crash
    with pytest.raises(ServerError, match=r"kl.reference: a request failed 4 times.*500: CUDA error"):
        reference.logprobs(IDS, MASK)
    server.kill()
    monkeypatch.setattr(server_reference, "PATIENCE", 0.3)
    for call in (lambda: reference.logprobs(IDS, MASK), lambda: ServerReference(server.url, tokenizer)):
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"kl.reference: no answer for 0.3 s: .* cannot be reached"):
            call()
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("state", ["computing", "away"])
def test_an_interruption_ends_the_wait(state: str, serve: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    reference = ServerReference(server.url, tokenizer)
    if state == "away":
        server.kill()
    server.before = lambda path, body: time.sleep(3 if path == SCORE else 0)

    def leave() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server_reference, "safe_point", leave)
    monkeypatch.setattr(vllm_server, "DELAYS", (30.0,))
    monkeypatch.setattr(server_reference, "PATIENCE", 60.0)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        reference.logprobs(IDS, MASK)
    assert time.monotonic() - started < 2.5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_servers_that_do_not_fit(serve: Any, other: Any, tokenizer: Any) -> None:
    logits = serve()
    logits.logits = True
    smaller = copy.deepcopy(other)
    smaller.resize_token_embeddings(len(tokenizer) - 3)
    for server, message in (
        (serve(version=None), "kl.reference: .*training needs `vllm serve`"),
        (serve(version="0.11.2"), r"kl.reference: vLLM 0\.11\.2 serves http.*, but at least 0\.32 is needed"),
        (logits, "kl.reference: .* reports a log-probability of .*it reports logits"),
        (serve(model=smaller), "the vocabulary of base at .* is smaller than the policy's, which has ids up to"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServerReference(server.url, tokenizer)
    reference = ServerReference(serve(context=5).url, tokenizer)
    with pytest.raises(ConfigError, match=r"may have 6 tokens, but .* has room for 4"):
        reference.logprobs(IDS, MASK)


def test_a_server_must_keep_its_weights(serve: Any, tokenizer: Any) -> None:
    """Those of the server that the policy samples from change every round, if they are merged."""
    server = serve()
    reference = ServerReference(server.url, tokenizer)
    server.weights = "rlhf-policy-1"
    with pytest.raises(ConfigError, match=r"were changed from version default to rlhf-policy-1.*apart from the policy"):
        reference.logprobs(IDS, MASK)


def test_ids_that_mean_something_else(serve: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Every id is compared. A difference is refused, and a token that the server lacks is reported."""
    merges = make_tokenizer(["entirely different words", "für alle Fälle", "наша речь"] * 5)
    with pytest.raises(ConfigError, match=r"has another vocabulary than the policy: the token ids \[\d+\] are"):
        ServerReference(serve(decode=merges.decode).url, tokenizer)

    def swapped(ids: list[int]) -> str:
        """With the bytes of two letters exchanged, which are replacement characters when decoded alone."""
        pair = tokenizer("é", add_special_tokens=False)["input_ids"]
        assert len(pair) == 2
        return str(tokenizer.decode([pair[1 - pair.index(one)] if one in pair else one for one in ids]))

    with pytest.raises(ConfigError, match="has another vocabulary than the policy"):
        ServerReference(serve(decode=swapped).url, tokenizer)
    last = len(tokenizer) - 1
    with caplog.at_level(logging.WARNING):
        ServerReference(
            serve(decode=lambda ids: tokenizer.decode([one for one in ids if one < last - 1])).url, tokenizer
        )
    assert f"2 tokens of the policy (for example the id {last - 1}) are not in the vocabulary of base" in caplog.text


def test_key(serve: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(key="sesame-7")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"kl.reference: .*VLLM_API_KEY.*but it is empty"):
        ServerReference(server.url, tokenizer)
    monkeypatch.setenv("VLLM_API_KEY", "sesame-7")
    reference = ServerReference(server.url, tokenizer)
    reference.logprobs(IDS, MASK)
    assert "sesame" not in f"{caplog.text}{vars(reference)}"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KLPenalty(reference="http://me:sesame@a:1"), r"kl.reference: the address of a:1 has a user name or"),
        (lambda: KLPenalty(reference="http://a:x"), r"kl.reference: the address is 'http://a:x'; it must be http://"),
        (lambda: KLPenalty(reference="http://a:1", offload=True), "kl.offload place a reference on this machine"),
        (lambda: KLPenalty(reference="http://a:1", refresh_every=2), "kl.refresh_every would replace it"),
        (lambda: Distillation("http://a:1"), "Set model.recipe: distill_pg with this address as model.kl.reference"),
        (lambda: load_reference("https://a:1", None, "float32"), "weights must be on this machine"),  # type: ignore[arg-type]
        (
            lambda: PolicyRLModule.distill_pg("x", "http://a:1", sampler=Sampler(temperature=0.7)),
            "sampler.temperature is 0.7, but with a server as kl.reference",
        ),
    ],
)
def test_settings_that_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build()
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("place", ["distill_pg", "loss"])
def test_training_equals_that_with_the_local_model(
    place: str, serve: Any, other: Any, tokenizer: Any, base: str, tmp_path: Path
) -> None:
    """Two rounds and a validation; the server is restarted while the first round is sampled."""
    folder = tmp_path / "teacher"
    other.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    server = serve()
    trained = []
    for reference in (str(folder), server.url):
        if place == "loss":
            kl = KLPenalty(0.5, place="loss", reference=reference)
            module = PolicyRLModule.grpo(base, [FunctionReward(few_vowels)], kl=kl, **OPTIONS)
        else:
            module = PolicyRLModule.distill_pg(base, reference, **OPTIONS)
        module.configure_model()
        before = weights(module)
        data = PromptDataModule(prompts(4), prompts(2), prompts_per_round=2, group_size=2, seed=1, show_example=False)
        run = trainer(tmp_path, max_epochs=1)
        if reference == server.url:
            module.on_train_start = lambda: restart(server, serve)
        run.fit(module, data)
        trained.append((weights(module), run.callback_metrics["val/kl"]))
        assert any(not torch.equal(before[name], value) for name, value in weights(module).items())
    same(trained[0][0], trained[1][0], rtol=1e-3, atol=1e-5)
    assert float(trained[0][1]) == pytest.approx(float(trained[1][1]), rel=1e-3)


OPTIONS: dict[str, Any] = {"sampler": Sampler(max_tokens=6), "optimizer": sgd(0.1)}


def test_a_prompt_that_the_server_has_no_room_for(serve: Any, base: str, tmp_path: Path) -> None:
    module = PolicyRLModule.distill_pg(base, serve(context=12).url, **OPTIONS)
    with pytest.raises(ConfigError, match=r"a prompt with its response may have \d+ tokens, but .* has room for 11"):
        trainer(tmp_path).fit(module, PromptDataModule(prompts(2), prompts_per_round=2, group_size=1))


def test_command(serve: Any, base: str, tmp_path: Path) -> None:
    """The URL is no path, and a run may be resumed with another one."""
    server = serve()
    settings = stage_config("policy", base, tmp_path)
    settings["model"] = {"model": base, "recipe": "distill_pg", "sampler": {"max_tokens": 4}}
    settings["model"]["kl"] = {"reference": server.url}
    config = write_yaml(tmp_path / "config.yaml", settings)
    root = ["--trainer.default_root_dir", str(tmp_path / "run")]
    rlhf_in_process("policy", "fit", "-c", config, *root, "--trainer.max_epochs", "1")
    server.kill()
    moved = ["--model.kl.reference", serve().url]
    rlhf_in_process("policy", "fit", "-c", config, *root, "--trainer.max_epochs", "2", *moved)
    rows = list(DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert rows[-1]["epoch"] == "1"
    assert all(float(row["train/kl"]) > 0 for row in rows if row["train/kl"])
