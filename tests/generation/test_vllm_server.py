"""`VLLMServer` with a local server that speaks vLLM's protocol; tests/generation/test_vllm_serve.py has a real one."""

import copy
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError, SyncError, UserError
from rlhf_lightning.generation import vllm_http, vllm_server
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.generation.vllm_server import ServerError, VLLMServer, VLLMServerEngine
from rlhf_lightning.models.loading import Start
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.settings import describe
from tests.helpers.cli import write_yaml
from tests.helpers.modules import same, vowels
from tests.helpers.resume import config, result
from tests.helpers.rows import prompts
from tests.helpers.runs import Run
from tests.helpers.training import sgd, trainer
from tests.helpers.vllm_server import Answer, Drop, FakeServer, train_with_server

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [40], [8, 8], [21, 22, 23]]
SEEDS = [3, 1, 4, 1, 5]
PARAMS = SamplingParams(8)
GENERATE = "/inference/v1/generate"


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "DELAYS", (0.02, 0.1))


@pytest.fixture
def serve(model: Any, tokenizer: Any) -> Iterator[Callable[..., FakeServer]]:
    """Starts servers, and stops them after the test."""
    servers: list[FakeServer] = []

    def start(**options: Any) -> FakeServer:
        servers.append(FakeServer(options.pop("model", model), tokenizer.decode, **options))
        return servers[-1]

    yield start
    for server in servers:
        if not server.dead:
            server.kill()


@pytest.fixture
def policy(model: Any) -> Any:
    """A LoRA policy whose adapter changes its outputs."""
    torch.manual_seed(3)
    adapted = Start(copy.deepcopy(model), lora=LoRA(rank=4, target=["attention", "mlp"])).load().eval()
    change(adapted)
    return adapted


@torch.no_grad()
def change(adapted: Any) -> None:
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.2)


@pytest.fixture
def connect(policy: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., VLLMServerEngine]:
    """Connects a policy to servers."""

    def build(*servers: FakeServer, model: Any = policy, **options: Any) -> VLLMServerEngine:
        options = {"folder": str(tmp_path / "weights"), "timeout": 20.0, "patience": 20.0, **options}
        return VLLMServer([server.url for server in servers], **options).build(model, tokenizer)

    return build


def check(engine: VLLMServerEngine, policy: Any, tokenizer: Any) -> None:
    """The servers sample what the policy does in this process."""
    wanted = LocalEngine(policy, tokenizer.decode).generate(PROMPTS, PARAMS, SEEDS)
    for found, one in zip(engine.generate(PROMPTS, PARAMS, SEEDS), wanted, strict=True):
        assert (found.ids, found.stop_reason) == (one.ids, one.stop_reason)
        assert found.logprobs == pytest.approx(one.logprobs, abs=1e-4)


def sync(engine: VLLMServerEngine, policy: Any, version: int = 0) -> None:
    engine.sync(PolicyWeights(policy), version)


def test_adapter_of_each_round(serve: Any, connect: Any, policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Samples with the newest adapter; earlier ones are unloaded and deleted, those of an interrupted run, too."""
    servers = [serve(), serve()]
    (tmp_path / "weights" / "rlhf-policy-0-1-round-7").mkdir(parents=True)
    (tmp_path / "weights" / "mine").mkdir()
    engine = connect(*servers)
    for version in (0, 1):
        change(policy)
        sync(engine, policy, version)
        check(engine, policy, tokenizer)
        (name,) = servers[0].adapters
        assert name.endswith(f"-round-{version}")
        assert [*servers[1].adapters] == [name]
        folders = {path.name for path in (tmp_path / "weights").iterdir() if path.is_dir()}
        assert folders == {name, "mine"}
    assert min(server.requests[GENERATE] for server in servers) > 3, "both servers sample"


def test_all_weights(serve: Any, connect: Any, model: Any, policy: Any, tokenizer: Any) -> None:
    server = serve()
    engine = connect(server, lora_sync="merged")
    sync(engine, policy)
    assert not server.adapters
    check(engine, policy, tokenizer)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    engine = connect(server, model=trained)
    sync(engine, trained, 1)
    check(engine, trained, tokenizer)
    server.weights = "default"  # as after a restart
    assert sum(1 for _ in engine.generate(PROMPTS, PARAMS, SEEDS)) == len(PROMPTS)
    assert server.weights.endswith("-round-1")


def test_each_server_is_compared_with_the_trainer(serve: Any, policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A server whose base differs is noticed, although it confirms the adapter's name."""
    first, second = serve(context=256), serve(context=256)
    settings = VLLMServer([first.url, second.url], str(tmp_path / "weights"), "float32")
    sampler = Sampler(max_tokens=8, engine=settings).build(policy, Renderer(tokenizer))
    sampler.sync(0)
    with torch.no_grad():
        second.model.get_input_embeddings().weight[::3].mul_(1.2)
    with pytest.raises(SyncError, match="after the sync of version 1, trainer and engine differ by"):
        sampler.sync(1)
    second.kill()
    sampler.sync(2)


def test_stops_and_settings_reach_the_server(serve: Any, connect: Any, policy: Any, tokenizer: Any) -> None:
    engine = connect(serve(raw=True))
    sync(engine, policy)
    params = SamplingParams(20, 2, 1.0, 0.8, 9, 0.01, tuple(range(0, 300, 7)), ("e", "th"))
    engine.eos = params.stop_token_ids[0]
    wanted = LocalEngine(policy, tokenizer.decode).generate(PROMPTS, params, SEEDS)
    found = engine.generate(PROMPTS, params, SEEDS)
    assert [one.ids for one in found] == [one.ids for one in wanted]
    assert {one.stop_reason for one in found} == {"stop"}


def test_server_that_is_killed_in_mid_round(serve: Any, connect: Any, policy: Any, tokenizer: Any) -> None:
    """Its requests go to the other server; when it is back, it gets the weights before it samples."""
    first, second = serve(), serve()
    engine = connect(first, second, max_in_flight=2)
    sync(engine, policy)
    back: list[FakeServer] = []

    def crash(path: str, body: Any) -> None:
        if path == GENERATE and not first.dead:
            first.kill()
            threading.Timer(0.1, lambda: back.append(serve(port=first.port))).start()
        if first.dead:
            raise Drop

    first.before = crash
    second.before = lambda path, body: time.sleep(0.1 if path == GENERATE else 0)
    rows = PROMPTS * 6
    wanted = LocalEngine(policy, tokenizer.decode).generate(rows, PARAMS, range(30))
    assert [one.ids for one in engine.generate(rows, PARAMS, range(30))] == [one.ids for one in wanted]
    assert back[0].requests[GENERATE] > 3, "it samples again in this round"
    assert [*back[0].adapters] == [*second.adapters]


def test_only_server_is_restarted(serve: Any, connect: Any, policy: Any, tokenizer: Any) -> None:
    first = serve()
    engine = connect(first)
    sync(engine, policy)
    first.kill()
    timer = threading.Timer(0.3, lambda: serve(port=first.port))
    timer.start()
    check(engine, policy, tokenizer)
    timer.join()


def test_server_that_is_away_during_a_sync(
    serve: Any, connect: Any, policy: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = serve(), serve()
    engine = connect(first, second)
    second.kill()
    sync(engine, policy)
    assert "it gets the weights when it answers again" in caplog.text
    again = serve(port=second.port)
    check(engine, policy, tokenizer)
    for _ in range(50):
        engine.generate(PROMPTS, PARAMS, SEEDS)
        if again.requests[GENERATE] > 3:
            break
    assert [*again.adapters] == [*first.adapters]


@pytest.mark.parametrize(
    "failure",
    [Drop(), Answer(500, {"error": {"message": "CUDA error"}}), Answer(503, "busy"), Answer(200, {"model": "old"})],
    ids=["dropped connection", "500", "503", "other weights"],
)
def test_failures_that_pass(failure: Exception, serve: Any, connect: Any, policy: Any, tokenizer: Any) -> None:
    server = serve()
    engine = connect(server)
    sync(engine, policy)
    left = [2]

    def fail(path: str, body: Any) -> None:
        if path == GENERATE and body["model"] != "base" and left[0]:
            left[0] -= 1
            raise failure

    server.before = fail
    check(engine, policy, tokenizer)
    assert left == [0]


def test_failures_that_stay(serve: Any, connect: Any, policy: Any) -> None:
    server = serve()
    engine = connect(server, timeout=0.3)
    sync(engine, policy)

    def crash(path: str, body: Any) -> None:
        if path == GENERATE and body["token_ids"] == PROMPTS[1]:
            raise Answer(500, {"error": {"message": "CUDA error\n\x1b[31m"}})

    server.before = crash
    with pytest.raises(ServerError, match=r"a prompt of 5 tokens failed 4 times.*500: CUDA error"):
        engine.generate(PROMPTS, PARAMS, SEEDS)
    server.before = lambda path, body: time.sleep(2 if path == GENERATE and body["model"] != "base" else 0)
    with pytest.raises(ServerError, match=r"did not answer /inference/v1/generate within 0.3 s.*raise sampler"):
        engine.generate(PROMPTS[:1], PARAMS, SEEDS[:1])


def test_no_server_answers(serve: Any, connect: Any, policy: Any) -> None:
    server = serve()
    engine = connect(server, patience=0.3)
    sync(engine, policy)
    server.kill()
    for call in (
        lambda: engine.generate(PROMPTS, PARAMS, SEEDS),
        lambda: sync(engine, policy),
        lambda: connect(server, patience=0.1),
    ):
        started = time.monotonic()
        with pytest.raises(ServerError, match=f"no server.*{server.url} cannot be reached"):
            call()
        assert time.monotonic() - started < 5


def test_an_interruption_ends_the_requests(serve: Any, connect: Any, policy: Any, monkeypatch: Any) -> None:
    server = serve()
    engine = connect(server)
    sync(engine, policy)
    server.before = lambda path, body: time.sleep(3 if path == GENERATE else 0)

    def leave() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vllm_server, "safe_point", leave)
    started, threads = time.monotonic(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, PARAMS, SEEDS)
    assert time.monotonic() - started < 2
    assert threading.active_count() <= threads + 5, "only the server's threads are left"


def test_an_interruption_ends_the_wait_for_servers(serve: Any, connect: Any, policy: Any, monkeypatch: Any) -> None:
    server = serve()
    engine = connect(server, patience=60.0)
    server.kill()

    def leave() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vllm_server, "safe_point", leave)
    monkeypatch.setattr(vllm_server, "DELAYS", (30.0,))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sync(engine, policy)
    assert time.monotonic() - started < 5


def test_requests_in_flight(serve: Any, connect: Any, policy: Any) -> None:
    server = serve()
    engine = connect(server, max_in_flight=3)
    sync(engine, policy)
    engine.generate(PROMPTS * 5, PARAMS, range(25))
    assert server.most == 3


def test_key(
    serve: Any, connect: Any, policy: Any, tokenizer: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(key="sesame-7")
    for key, message in (
        (None, "but it is empty"),
        ("wrong-8", "but the key in it is refused"),
        ("a\nb", "characters"),
    ):
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        if key:
            monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(ConfigError, match=f"VLLM_API_KEY.*{message}") as caught:
            connect(server)
        assert not key or key not in str(caught.value)
    monkeypatch.setenv("MY_KEY", "sesame-7")
    engine = connect(server, key_variable="MY_KEY")
    sync(engine, policy)
    check(engine, policy, tokenizer)
    assert "sesame" not in f"{caplog.text}{describe(engine.settings)}{vars(engine)}"
    with pytest.raises(ConfigError, match="has a user name or password") as caught:
        VLLMServer("http://me:sesame-7@host:8000", "/tmp/weights")
    assert "sesame" not in str(caught.value)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "other server": ({"version": None}, "training needs `vllm serve`"),
    "older release": ({"version": "0.11.2"}, r"vLLM 0\.11\.2 serves http.*, but at least 0\.32 is needed"),
    "raw logits": ({"probed": (3.0, 2.0)}, "reports logits in place of log-probabilities"),
    "processed logits": ({"probed": (-3.0, -9999.0)}, "reports logits in place of log-probabilities"),
    "room": ({"context": 8}, "sampler.max_tokens is 8, but the servers have room for 8 tokens"),
}


@pytest.mark.parametrize(("options", "message"), UNFIT.values(), ids=UNFIT)
def test_servers_that_do_not_fit(
    options: dict[str, Any], message: str, serve: Any, policy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    settings = VLLMServer(serve(**options).url, str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        Sampler(max_tokens=8, engine=settings).build(policy, Renderer(tokenizer))


@pytest.mark.parametrize(("rows", "size"), [(-8, "smaller"), (8, "larger")])
def test_other_vocabularies(rows: int, size: str, serve: Any, connect: Any, model: Any) -> None:
    other = copy.deepcopy(model)
    other.resize_token_embeddings(other.config.vocab_size + rows)
    with pytest.raises(ConfigError, match=f"the vocabulary of base at .* is {size} than the policy's"):
        connect(serve(model=other))


def test_logprobs_modes(serve: Any, connect: Any, policy: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="the servers differ in --logprobs-mode"):
        connect(serve(raw=True), serve())
    first = serve()
    engine = connect(first)
    for params, message in (
        (SamplingParams(4, top_k=3), "sampler.top_k.*set --logprobs-mode raw_logprobs"),
        (SamplingParams(4, min_tokens=2), "sampler.min_tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.check(params)
    with pytest.raises(ConfigError, match=r"sampler.temperature is 0.7.*set --logprobs-mode processed_logprobs"):
        connect(serve(raw=True)).check(SamplingParams(4, temperature=0.7))
    sync(engine, policy)
    first.kill()
    serve(port=first.port, raw=True)
    with pytest.raises(ConfigError, match="was restarted with another --logprobs-mode"):
        engine.generate(PROMPTS, PARAMS, SEEDS)


def test_adapters_that_cannot_be_loaded(serve: Any, connect: Any, policy: Any, model: Any) -> None:
    server = serve()
    engine = connect(server)

    def refuse(path: str, body: Any) -> None:
        if path == "/v1/load_lora_adapter":
            raise Answer(500, {"error": {"message": "LoRA rank 4 is greater than max_lora_rank 2"}})

    server.before = refuse
    with pytest.raises(ConfigError, match=r"adapter cannot be loaded.*rank 4 is greater than max_lora_rank 2"):
        sync(engine, policy)

    def missing(path: str, body: Any) -> None:
        if path == "/v1/load_lora_adapter":
            raise Answer(404, {"detail": "Not Found"})

    server.before = missing
    with pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"):
        sync(engine, policy)

    def unknown(path: str, body: Any) -> None:
        if path == "/collective_rpc":
            raise Answer(500, {"error": {"message": "AttributeError: no method load_policy"}})

    server.before = unknown
    with pytest.raises(ConfigError, match=r"weights cannot be loaded: .*no method load_policy.*--worker-extension-cls"):
        sync(connect(server, lora_sync="merged"), policy)
    start = Start(copy.deepcopy(model), lora=LoRA(rank=4)).load()
    start.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"set sampler.engine.lora_sync: merged"):
        connect(server, model=start)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (["model.norm.weight"], SyncError, "1 of its weights are not those in the folder, for example model.norm"),
        (None, ConfigError, "does not say whether it holds the weights"),
    ],
    ids=["other weights", "another version"],
)
def test_servers_confirm_all_weights(
    serve: Callable[..., FakeServer],
    connect: Callable[..., Any],
    policy: Any,
    answer: list[str] | None,
    error: type[UserError],
    message: str,
) -> None:
    """A server that holds other weights never gets their name."""
    server = serve()
    engine = connect(server, lora_sync="merged")
    server.differing = answer
    with pytest.raises(error, match=message):
        sync(engine, policy)
    assert server.weights == "default"


def test_several_processes_do_not_sample_ahead(
    serve: Callable[..., FakeServer], connect: Callable[..., Any], policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of one rank would replace the weights with which the other still samples."""
    engine = connect(serve())
    monkeypatch.setattr(vllm_server, "rank_count", lambda: 2)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match=r"set model.max_staleness: 0"):
        pool.submit(sync, engine, policy).result()


def test_weights_that_cannot_be_written(tmp_path: Path) -> None:
    """All tensors are taken first, because other ranks gather them together with this one."""
    (tmp_path / "file").touch()
    writer = vllm_server.Writer(tmp_path / "file" / "name")
    writer.add("weight", torch.zeros(2))
    with pytest.raises(ConfigError, match=r"sampler.engine.folder: .* cannot be written to"):
        writer.finish()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": []}, "at least one server"),
        ({"url": ["http://a:1", "http://a:1/"]}, "none twice"),
        ({"url": "a:8000"}, "must be http://HOST:PORT"),
        ({"max_in_flight": 0}, "sampler.engine.max_in_flight is 0"),
        ({"timeout": 0}, "sampler.engine.timeout is 0"),
        ({"dtype": "int8"}, "sampler.engine.dtype is 'int8'"),
        ({"lora_sync": "both"}, "sampler.engine.lora_sync is 'both'"),
    ],
)
def test_invalid_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VLLMServer(**{"url": "http://a:1", "folder": "/x", **options})


def test_messages_of_the_server() -> None:
    for text, wanted in (
        (b'{"error": {"message": "a\\nb"}}', "a b"),
        (b'{"error": "c"}', "c"),
        (b'{"detail": [1]}', "[1]"),
        (b"\xff", "�"),
        (b"", "no message"),
    ):
        assert vllm_http._reason(text) == wanted


def test_policy_rl_with_a_server_that_is_killed(
    serve: Any, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three rounds; in the second the only server is killed, and started again without the adapter."""
    from transformers import AutoModelForCausalLM

    served = AutoModelForCausalLM.from_pretrained(base).eval()
    server = serve(model=served, context=256)
    restarted: list[FakeServer] = []

    def crash(path: str, body: Any) -> None:
        if path == GENERATE and body["model"].endswith("-round-1"):
            server.kill()
            restarted.append(serve(model=served, context=256, port=server.port))
            server.before = lambda path, body: None
            raise Drop

    server.before = crash
    gaps = train_with_server(base, server.url, tmp_path)
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert restarted[0].requests[GENERATE] > 6
    assert [name.rpartition("-")[2] for name in restarted[0].adapters] == ["2"]
    assert "has loaded the weights" in caplog.text


def test_sampling_while_training_with_a_server(serve: Any, base: str, tmp_path: Path) -> None:
    """As with the built-in engine; a validation in between syncs the server with newer weights."""
    server = serve()
    trained = []
    for engine in (None, VLLMServer(server.url, str(tmp_path / "weights"), "float32")):
        torch.manual_seed(0)
        module = PolicyRLModule(
            base,
            lora=LoRA(rank=4),
            rewards=[FunctionReward(vowels)],
            sampler=Sampler(max_tokens=6, engine=engine),
            optimizer=sgd(1.0),
            max_staleness=1,
        )
        data = PromptDataModule(prompts(8), prompts(2), prompts_per_round=2, group_size=3, seed=1)
        trainer(tmp_path, val_check_interval=2).fit(module, data)
        trained.append({name: value.clone() for name, value in module.state_dict().items() if "lora_" in name})
    assert max(float(value.abs().max()) for name, value in trained[0].items() if "lora_B" in name) > 0.01
    same(*trained, rtol=1e-3, atol=1e-5)
    # Four rounds of 2 × 3 responses; 2 prompts, each twice, in Lightning's check and two validations; the canary.
    assert server.requests[GENERATE] >= 4 * 6 + 3 * 4


class Runs:
    """Runs of the command with a server that is started after each fork, because a forked process has no threads."""

    def __init__(self, serve: Any, base: str, folder: Path, devices: int = 1) -> None:
        from transformers import AutoModelForCausalLM

        self.serve, self.folder = serve, folder
        self.served = AutoModelForCausalLM.from_pretrained(base).eval()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        engine = {
            "class_path": "rlhf_lightning.generation.vllm_server.VLLMServer",
            "init_args": {"url": f"http://127.0.0.1:{self.port}", "folder": str(folder / "weights")},
        }
        over = write_yaml(folder / "engine.yaml", {"model": {"lora": {"rank": 4}, "sampler": {"engine": engine}}})
        self.command = [*config("policy", base, folder, devices), "-c", over, "--trainer.max_epochs", "1"]

    def run(self, name: str, kill: str | None = None) -> tuple[int, FakeServer]:
        """Run in a folder; the trainer gets kill -9 at the first request for the weights named `kill`."""
        root = ["--trainer.default_root_dir", str(self.folder / name)]
        process = Run([*self.command, *root], self.folder / f"{name}.txt")
        server = self.serve(model=self.served, port=self.port, context=256)

        def end(path: str, body: Any) -> None:
            if path == GENERATE and kill and body["model"].endswith(kill):
                process.send(signal.SIGKILL)

        server.before = end
        code = process.wait()
        server.kill()
        return code, server


@pytest.mark.slow  # three runs, half a minute
def test_trainer_that_is_killed_in_mid_round(serve: Any, base: str, tmp_path: Path) -> None:
    """Resumed, it ends like an uninterrupted run, and removes what the killed one has left."""
    runs = Runs(serve, base, tmp_path)
    assert runs.run("whole")[0] == 0
    assert runs.run("resumed", kill="-round-2")[0] == -signal.SIGKILL
    assert runs.run("resumed")[0] == 0
    assert result(tmp_path / "resumed") == result(tmp_path / "whole")
    assert len([path for path in (tmp_path / "weights").iterdir() if path.is_dir()]) == 1


@pytest.mark.slow  # ten seconds
def test_two_ranks_share_the_servers(serve: Any, base: str, tmp_path: Path) -> None:
    """The first rank passes the weights, both sample."""
    runs = Runs(serve, base, tmp_path, devices=2)
    code, server = runs.run("run")
    assert code == 0
    assert len(server.adapters) == 1
    assert server.requests["/version"] == 2
    loads = server.requests["/v1/load_lora_adapter"]
    assert loads - server.requests["/v1/unload_lora_adapter"] == 1
    assert loads >= 4
