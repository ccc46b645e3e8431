"""The server with Tinker's API, asked in JSON's form; `test_client.py` asks with Tinker's own client."""

import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.files import scratch_of
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.tinker import results, server, service, worker
from rlhf_lightning.tinker.checkpoints import Address
from rlhf_lightning.tinker.replies import JSONReply
from rlhf_lightning.tinker.results import Results
from rlhf_lightning.tinker.runs import SNAPSHOTS
from rlhf_lightning.tinker.service import Body
from rlhf_lightning.tinker.worker import Call
from rlhf_lightning.web import Access
from tests.helpers.tinker import Asked, Refused, asking, datum, model_input

IDS = [3, 14, 15, 92, 65, 35]
ROW = datum(IDS, weights=[0.0, 1.0, 1.0, 0.5, 1.0])
PROMPT = [3, 1, 4, 1]


@pytest.fixture
def number(request: pytest.FixtureRequest, asked: Asked) -> int:
    """The next number of a training run of the module's session."""
    numbers = request.module.__dict__.setdefault("numbers", iter(range(1000)))
    found: int = next(numbers)
    return found


@pytest.fixture
def run(asked: Asked, number: int) -> Any:
    """A training run that has made two steps."""
    found = asked.model(number)
    for _ in range(2):
        asked.train(found, [ROW])
        asked.step(found)
    yield found
    asked.done("unload_model", model_id=found)


def snapshot(asked: Asked, run: str, number: int) -> str:
    """An unnamed sampling session of a run."""
    found: str = asked.done("save_weights_for_sampler", model_id=run, sampling_session_seq_id=number)[
        "sampling_session_id"
    ]
    return found


def text(asked: Asked, **fields: Any) -> Any:
    """What a refused call of `asample` says."""
    with pytest.raises(Refused) as refused:
        asked.sample(PROMPT, base_model="tiny", **fields)
    return refused.value


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(asked: Asked, run: str) -> None:
    before = asked.train(run, [ROW, ROW])
    assert before["metrics"]["loss:sum"] == pytest.approx(
        -2
        * sum(p * w for p, w in zip(before["loss_fn_outputs"][1]["logprobs"]["data"], [0, 1, 1, 0.5, 1], strict=True)),
        rel=1e-6,
    )
    assert asked.step(run)["metrics"]["grad_norm"] > 0
    assert asked.train(run, [ROW, ROW])["metrics"]["loss:sum"] < before["metrics"]["loss:sum"]
    info = asked.post("get_info", model_id=run)
    assert (info["lora_rank"], info["model_data"]["model_name"], info["is_lora"]) == (4, "tiny", True)
    assert Path(info["model_data"]["tokenizer_id"]).is_absolute()


def test_every_loss(asked: Asked, run: str) -> None:
    """Their numbers are checked in test_losses.py; on the sampled policy, the ratio is 1."""
    logprobs = asked.train(run, [ROW])["loss_fn_outputs"][0]["logprobs"]["data"]
    row = datum(IDS, logprobs=logprobs, advantages=[0.0, 1.0, -2.0, 0.5, 1.0])
    found = {
        loss: asked.train(run, [row], loss, config=config)["metrics"]["loss:sum"]
        for loss, config in (
            ("importance_sampling", None),
            ("ppo", {"clip_low_threshold": 0.9}),
            ("cispo", {}),
            ("dro", {}),
        )
    }
    assert found["importance_sampling"] == pytest.approx(-0.5, rel=1e-5)
    assert found["ppo"] == pytest.approx(-0.5, rel=1e-5)
    weighted = -sum(p * a for p, a in zip(logprobs, [0.0, 1.0, -2.0, 0.5, 1.0], strict=True))
    assert found["cispo"] == pytest.approx(weighted, rel=1e-5)
    assert found["dro"] == pytest.approx(weighted, rel=1e-5)


def test_reference_logprobs(asked: Asked, run: str) -> None:
    """The KL to the base: log-probabilities of the base in a sampling session, and of the run in training."""
    base = asked.sample(IDS, base_model="tiny", prompt_logprobs=True, params={"max_tokens": 1})["prompt_logprobs"]
    fresh = asked.model(900)
    assert base[0] is None
    assert base[1:] == pytest.approx(asked.train(fresh, [ROW])["loss_fn_outputs"][0]["logprobs"]["data"], abs=1e-5)
    trained = asked.train(run, [ROW])["loss_fn_outputs"][0]["logprobs"]["data"]
    assert sum(trained[1:]) > sum(base[2:]) + 0.5
    asked.done("unload_model", model_id=fresh)


def test_request_that_is_sent_again_runs_once(asked: Asked, number: int) -> None:
    """A connection may break after the server has read the request."""
    run = asked.model(number)
    body = {"model_id": run, "seq_id": 1, "forward_backward_input": {"data": [ROW], "loss_fn": "cross_entropy"}}
    first, again = (asked.post("forward_backward", **body)["request_id"] for _ in range(2))
    assert first == again
    once = asked.done("optim_step", model_id=run, seq_id=2, adam_params={})["metrics"]["grad_norm"]
    asked.post("forward_backward", **{**body, "seq_id": 5})
    assert asked.post("forward_backward", **{**body, "seq_id": 5})["request_id"] != first
    with pytest.raises(Refused, match="seq_id 3 comes after 5"):
        asked.post("forward_backward", **{**body, "seq_id": 3})
    with pytest.raises(Refused, match="seq_id 1 was used for another request"):
        asked.post("optim_step", model_id=run, seq_id=1, adam_params={})
    other = asked.model(number + 500)
    asked.train(other, [ROW])
    assert asked.step(other)["metrics"]["grad_norm"] == pytest.approx(once, rel=1e-5)
    for one in (run, other):
        asked.done("unload_model", model_id=one)


def test_run_that_is_created_twice(asked: Asked, run: str, number: int) -> None:
    """By a request that is sent again it is the same run; another request is refused. Both calls that create runs."""
    path = asked.done("save_weights", model_id=run, path="twice")["path"]
    fields = {"session_id": asked.session, "base_model": "tiny", "model_seq_id": number + 300}
    for call, given in (("create_model", {"lora_config": {"rank": 4}}), ("load_weights", {"path": path})):
        first, again = (asked.post(call, **fields, **given) for _ in range(2))
        assert first == again
        assert asked.result(first["request_id"])["model_id"] == first["model_id"]
        with pytest.raises(Refused, match=f"the training run {first['model_id']} exists; use another model_seq_id"):
            asked.post(call, **fields, **given, user_metadata={"a": "b"})
        asked.done("unload_model", model_id=first["model_id"])


def test_forward_computes_no_gradient(asked: Asked, number: int) -> None:
    """The call of earlier clients."""
    run = asked.model(number)
    given = {"data": [ROW], "loss_fn": "cross_entropy"}
    found = asked.done("forward", model_id=run, forward_input=given)
    assert found == asked.train(run, [ROW])
    asked.step(run)
    asked.done("forward", model_id=run, forward_input=given)
    failed = asked.step(run)
    assert (failed["category"], "call forward_backward before optim_step" in failed["error"]) == ("user", True)
    asked.done("unload_model", model_id=run)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_engine(asked: Asked, folder: str, run: str) -> None:
    """Of the base, and of a run whose weights change afterwards."""
    policy = Policy(folder)
    params = SamplingParams(max_tokens=6, temperature=0.8, top_k=50, top_p=0.9)
    engine = LocalEngine(policy.model, policy.tokenizer.decode)
    expected = engine.generate([PROMPT] * 3, params, [3 + 1_000_003 * i for i in range(3)])
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "stop": []}
    found = asked.sample(PROMPT, base_model="tiny", num_samples=3, params=options)["sequences"]
    assert [one["tokens"] for one in found] == [one.ids for one in expected]
    assert found[0]["logprobs"] == pytest.approx(expected[0].logprobs, abs=1e-5)
    session = snapshot(asked, run, 1)
    before = asked.sample(PROMPT, sampling_session_id=session)
    assert before["sequences"] != asked.sample(PROMPT, base_model="tiny")["sequences"]
    asked.train(run, [ROW])
    asked.step(run, learning_rate=0.5)
    assert asked.sample(PROMPT, sampling_session_id=session) == before
    assert asked.sample(PROMPT, sampling_session_id=snapshot(asked, run, 2)) != before


def test_stops(asked: Asked, folder: str) -> None:
    """By default at the model's end tokens, otherwise where `stop` says."""
    tokenizer = Policy(folder).tokenizer
    options = {"temperature": 0.0, "max_tokens": 12}

    def tokens(**more: Any) -> tuple[list[int], str]:
        [found] = asked.sample(PROMPT, base_model="tiny", params={**options, **more})["sequences"]
        return found["tokens"], found["stop_reason"]

    whole, reason = tokens(stop=[])
    assert (len(whole), reason) == (12, "length")
    assert tokens(stop=[whole[4]]) == (whole[: whole.index(whole[4]) + 1], "stop")
    piece = tokenizer.decode(whole[3:4])
    found, reason = tokens(stop=piece)
    assert reason == "stop"
    assert piece in tokenizer.decode(found)
    assert found == whole[: len(found)]
    assert tokens(stop=["no such text"])[0] == whole


def test_top_logprobs_are_those_of_the_model(asked: Asked, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = asked.sample(PROMPT, base_model="tiny", topk_prompt_logprobs=3, topk_sample_logprobs=2)
    [sequence] = found["sequences"]
    rows = model(torch.tensor([PROMPT + sequence["tokens"]])).logits[0].log_softmax(-1)
    prompt, sampled = rows[: len(PROMPT) - 1].topk(3), rows[len(PROMPT) - 1 : -1].topk(2)
    assert found["topk_prompt_logprobs"][0] is None
    assert found["prompt_logprobs"][0] is None
    for place, (ids, values) in enumerate(zip(prompt.indices.tolist(), prompt.values.tolist(), strict=True), start=1):
        assert [token for token, _ in found["topk_prompt_logprobs"][place]] == ids
        assert [value for _, value in found["topk_prompt_logprobs"][place]] == pytest.approx(values, abs=1e-4)
        assert found["prompt_logprobs"][place] == pytest.approx(float(rows[place - 1, PROMPT[place]]), abs=1e-4)
    assert [[token for token, _ in one] for one in sequence["topk_logprobs"]] == sampled.indices.tolist()
    last = asked.sample(PROMPT, base_model="tiny", prompt_logprobs=True, prompt_logprobs_last_n=1)["prompt_logprobs"]
    assert last == [None, None, None, pytest.approx(found["prompt_logprobs"][3], abs=1e-5)]
    assert asked.sample([5], base_model="tiny", prompt_logprobs=True)["prompt_logprobs"] == [None]


def test_waiting_samples_are_computed_together(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are those of single requests."""
    single = [asked.sample([5 + i, 6], base_model="tiny", num_samples=2)["sequences"] for i in range(4)]
    sizes: list[int] = []
    generate = LocalEngine.generate

    def counted(self: LocalEngine, prompts: Any, *args: Any) -> Any:
        sizes.append(len(prompts))
        return generate(self, prompts, *args)

    monkeypatch.setattr(LocalEngine, "generate", counted)

    def slow() -> JSONReply:
        time.sleep(0.5)
        return JSONReply({})

    asked.service._submit(Call(slow))
    with ThreadPoolExecutor(4) as threads:
        ask = lambda i: asked.sample([5 + i, 6], base_model="tiny", num_samples=2)["sequences"]  # noqa: E731
        assert list(threads.map(ask, range(4))) == single
    assert sizes == [8]


def test_oldest_unnamed_session_is_dropped(asked: Asked, run: str) -> None:
    sessions = [snapshot(asked, run, 100 + i) for i in range(SNAPSHOTS + 1)]
    asked.sample(PROMPT, sampling_session_id=sessions[1])
    with pytest.raises(Refused, match="are no longer kept: a training run has 8 unnamed") as refused:
        asked.sample(PROMPT, sampling_session_id=sessions[0])
    assert refused.value.status == 404


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_saved_state_goes_on_bit_equal_in_another_server(asked: Asked, folder: str, run: str) -> None:
    """With the optimizer; the gradients that were not used are not saved."""
    asked.train(run, [ROW])
    path = asked.done("save_weights", model_id=run, path="step-2", user_metadata={"note": "x"}, ttl_seconds=7200)[
        "path"
    ]
    assert path == f"tinker://{run}/weights/step-2"
    asked.step(run)
    asked.done("load_weights", model_id=run, path=path, optimizer=True)
    expected = [asked.train(run, [ROW]), asked.step(run), asked.train(run, [ROW])]
    with asking(folder, asked.service._checkpoints.root) as other:
        session = other.post("create_session")["session_id"]
        fields = {"session_id": session, "model_seq_id": 0, "path": path}
        found = other.done("load_weights", **fields, optimizer=True)["model_id"]
        assert found == f"{session}:train:0"
        assert [other.train(found, [ROW]), other.step(found), other.train(found, [ROW])] == expected
        plain = other.done("load_weights", **{**fields, "model_seq_id": 1}, optimizer=False)["model_id"]
        assert other.train(plain, [ROW]) == expected[0]
        other.step(plain)
        assert other.train(plain, [ROW]) != expected[2]  # the optimizer began anew
        described = other.send(f"training_runs/{run}")
        assert (described["lora_rank"], described["last_checkpoint"]["user_metadata"]) == (4, {"note": "x"})
        assert described["last_checkpoint"]["expires_at"] > described["last_checkpoint"]["time"]
        info = other.post("weights_info", tinker_path=path)
        assert info == {
            "base_model": "tiny", "is_lora": True, "lora_rank": 4,
            "train_attn": True, "train_mlp": True, "train_unembed": True,
        }  # fmt: skip
        with pytest.raises(Refused, match="has rank 4 and the layers"):
            other.post("load_weights", model_id=other.model(2, rank=2), path=path, optimizer=False)


def test_stock_peft_opens_a_checkpoint(asked: Asked, folder: str, run: str) -> None:
    path = asked.done("save_weights_for_sampler", model_id=run, path="final")["path"]
    found = asked.service._checkpoints.root / run.replace(":", "-") / "sampler_weights" / "final"
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), found)
    logits = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    session = asked.post(
        "create_sampling_session", session_id=asked.session, sampling_session_seq_id=70, model_path=path
    )
    result = asked.sample(IDS, sampling_session_id=session["sampling_session_id"], prompt_logprobs=True)
    wanted = [float(logits[i - 1, IDS[i]]) for i in range(1, len(IDS))]
    assert result["prompt_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
    sampler = asked.send(f"samplers/{session['sampling_session_id']}")
    assert (sampler["base_model"], sampler["model_path"]) == ("tiny", path)
    with pytest.raises(Refused, match="has no optimizer state"):
        asked.post("load_weights", model_id=run, path=path, optimizer=True)


def test_names_of_checkpoints(asked: Asked, run: str) -> None:
    """A name is used once, unless it is to be overwritten; a deleted or incomplete one is not listed."""
    asked.done("save_weights", model_id=run, path="same")
    assert "save under another name" in asked.done("save_weights", model_id=run, path="same")["error"]
    assert asked.done("save_weights", model_id=run, path="same", overwrite=True)["path"].endswith("/weights/same")
    folder = asked.service._checkpoints.folder(Address(run, "weights", "same"))
    shutil.copytree(folder, scratch_of(folder))  # as while the folder is written, or after that was interrupted
    listed = asked.send(f"training_runs/{run}/checkpoints")["checkpoints"]
    assert [one["checkpoint_id"] for one in listed] == ["weights/same"]
    asked.send(f"training_runs/{run}/checkpoints/weights/same", method="DELETE")
    assert asked.send(f"training_runs/{run}/checkpoints")["checkpoints"] == []
    with pytest.raises(Refused, match="there is no checkpoint"):
        asked.post("load_weights", model_id=run, path=f"tinker://{run}/weights/same", optimizer=False)


def test_listing_while_a_checkpoint_is_replaced(asked: Asked, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder is deleted before the new one has its name; nobody sees the gap."""
    asked.done("save_weights", model_id=run, path="last")
    replace, found = os.replace, []
    with ThreadPoolExecutor() as threads:

        def replaced(source: Any, target: Any) -> None:
            if Path(target).name == "last":
                found.append(threads.submit(asked.service.list_checkpoints, run))
                found.append(threads.submit(asked.service.weights_info, Body({"tinker_path": path}, b"")))
                time.sleep(0.1)
            replace(source, target)

        path = f"tinker://{run}/weights/last"
        monkeypatch.setattr(os, "replace", replaced)
        asked.done("save_weights", model_id=run, path="last", overwrite=True)
        assert [one["tinker_path"] for one in found[0].result(10)] == [path]
        assert found[1].result(10)["lora_rank"] == 4


@pytest.mark.parametrize(
    "name", ["../../x", "..", "/etc/passwd", ".hidden", "a/b", "", "a\\..\\b", "a\n", "x" * 101, "é"]
)
def test_no_name_leaves_the_folder(asked: Asked, run: str, name: str) -> None:
    root = asked.service._checkpoints.root
    outside = sorted(root.parent.iterdir())
    for call in ("save_weights", "save_weights_for_sampler"):
        with pytest.raises(Refused, match="is no checkpoint of this server"):
            asked.post(call, model_id=run, path=name)
    for path in (f"tinker://{run}/weights/{name}", f"tinker://{name}/weights/x", name, f"tinker://{run}/{name}/x"):
        for call, field in (("load_weights", "path"), ("weights_info", "tinker_path")):
            with pytest.raises(Refused, match="is no checkpoint of this server"):
                asked.post(call, **{field: path})
        with pytest.raises(Refused, match="is no checkpoint of this server"):
            asked.post("create_sampling_session", session_id=asked.session, sampling_session_seq_id=9, model_path=path)
    assert sorted(root.parent.iterdir()) == outside


@pytest.mark.parametrize("path", ["..%2f..%2fbase", "0123456789abcdef:train:0%2f..%2f..", "weights"])
def test_no_address_of_the_web_leaves_the_folder(asked: Asked, folder: str, path: str) -> None:
    for method, more in (("GET", ""), ("GET", "/checkpoints"), ("DELETE", "/checkpoints/weights/../../../base")):
        with pytest.raises(Refused, match=r"is no checkpoint of|has no call|there is no checkpoint"):
            asked.send(f"training_runs/{path}{more}", method=method)
    assert (Path(folder) / "config.json").is_file()


def test_damaged_checkpoint(asked: Asked, run: str) -> None:
    path = asked.done("save_weights", model_id=run, path="damaged")["path"]
    found = asked.service._checkpoints.root / run.replace(":", "-") / "weights" / "damaged"
    (found / "optimizer.safetensors").write_bytes(b"nothing")
    load = {"model_id": run, "path": path}
    assert "optimizer.safetensors of" in asked.done("load_weights", **load, optimizer=True)["error"]
    asked.done("load_weights", **load, optimizer=False)
    (found / "checkpoint.json").write_text('{"base_model": "tiny", "rank": "4"}')
    with pytest.raises(Refused, match=r"checkpoint.json of tinker://.* is damaged"):
        asked.post("load_weights", **load, optimizer=False)
    (found / "checkpoint.json").unlink()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"params": {"temperature": -1}}, "sampling_params.temperature is -1"),
        ({"params": {"top_p": 0}}, "sampling_params.top_p is 0"),
        ({"params": {"max_tokens": 300}}, "prompt 0 has 4 tokens and sampling_params.max_tokens is 300"),
        ({"params": {"stop": [1, "a"]}}, "sampling_params.stop is"),
        ({"params": {"min_p": 0.1}}, "sampling_params.min_p is not supported"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 1024, "topk_sample_logprobs": 100, "params": {"max_tokens": 200}},
         "the reply could have 20684800 log-probabilities (num_samples is 1024, sampling_params.max_tokens 200"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k and target_prompt_logprobs are not supported"),
        ({"base_model": "other"}, "base_model is 'other'; this server has 'tiny'"),
        ({"sampling_session_id": "x"}, "the sampling session 'x' is unknown"),
    ],
)  # fmt: skip
def test_refused_samples(asked: Asked, fields: dict[str, Any], message: str) -> None:
    given = {"base_model": "tiny", **fields}
    with pytest.raises(Refused, match=re.escape(message)) as refused:
        asked.sample(PROMPT, **given)
    assert refused.value.status in (400, 404)


@pytest.mark.parametrize("prompt", [[], [-1], [10**6], [2**70], [True], [1.5], ["a"]])
def test_refused_prompts(asked: Asked, prompt: list[int]) -> None:
    with pytest.raises(Refused, match=r"prompt 0 has|it must be a list of token ids"):
        asked.sample(prompt, base_model="tiny")


@pytest.mark.parametrize(
    ("row", "loss", "message"),
    [
        (datum(IDS), "cross_entropy", "data[0].loss_fn_inputs lacks 'weights', which cross_entropy needs"),
        (datum(IDS, weights=[1.0] * 4), "cross_entropy", "weights has 4 values, but model_input has 5 tokens"),
        (datum(IDS, weights=[1.0] * 5, mask=[1.0] * 5), "cross_entropy", "has 'mask', which cross_entropy does"),
        (datum([5, 500], weights=[1.0]), "cross_entropy", "target_tokens has the token id 500"),
        (datum([500, 5], weights=[1.0]), "cross_entropy", "model_input has the token id 500"),
        (datum([5], weights=[]), "cross_entropy", "model_input has 0 tokens; the model takes from 1 to 256"),
        (datum(IDS, weights=[1.0] * 5), "ppo", "lacks 'advantages', 'logprobs'"),
        (datum(IDS, weights=[1.0] * 5), "custom", "loss_fn is 'custom'"),
        ({**ROW, "model_input": {"chunks": [{"type": "image", "data": ""}]}}, "dro", "a chunk other than text"),
    ],
)  # fmt: skip
def test_refused_training_data(asked: Asked, run: str, row: Any, loss: str, message: str) -> None:
    with pytest.raises(Refused, match=re.escape(message)) as refused:
        asked.train(run, [row], loss)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("data", "shape", "message"),
    [
        ([1, 2], [1, 2], "target_tokens has the shape [1, 2]; this server takes one value per token"),
        ([1, 2], [3], "target_tokens has 2 values, but the shape [3]"),
        ([1, 2], [-1, -2], "target_tokens has the shape [-1, -2]"),
        ([], [0, 2**70], "target_tokens has the shape [0, 1180591620717411303424]"),
        ([1, 2], [2.0], "target_tokens.shape must be a list of whole numbers"),
        ([1, 2.5], None, "target_tokens.data must be a list of numbers, and of whole ones for the dtype int64"),
        ([1, 2**70], None, "target_tokens.data: Overflow"),
    ],
)
def test_refused_tensors(asked: Asked, run: str, data: list[float], shape: Any, message: str) -> None:
    targets = {"data": data, "dtype": "int64", "shape": shape}
    row = {"model_input": model_input([5, 6]), "loss_fn_inputs": {"target_tokens": targets}}
    with pytest.raises(Refused, match=re.escape(message)) as refused:
        asked.train(run, [row])
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("create_model", {"lora_config": {"rank": 0}}, "lora_config.rank is 0"),
        ("create_model", {"lora_config": {"rank": 33}}, "lora_config.rank is 33; it must be"),
        ("create_model", {"lora_config": None}, "this server trains LoRA adapters only"),
        ("create_model", {"lora_config": {"rank": 2, "train_mlp": False, "train_attn": False, "train_unembed": False}},
         "lora_config trains nothing"),
        ("create_model", {"optimizer_config": {"type": "dimuon"}}, "this server has only adamw"),
        ("create_model", {"base_model": "other"}, "this server has 'tiny'"),
        ("create_model", {"session_id": "x"}, "the session 'x' has ended"),
        ("create_model", {"loft_config": {}}, "loft_config is not supported by this server"),
        ("optim_step", {"adam_params": {"beta1": 1.0}}, "adam_params.beta1 is 1.0"),
        ("optim_step", {"optimizer_params": {"type": "dimuon"}}, "this server has only AdamW"),
        ("get_info", {"model_id": "nobody"}, "the training run 'nobody' is unknown"),
        ("unload_model", {"model_id": "nobody"}, "the training run 'nobody' is unknown"),
        ("retrieve_future", {"request_id": "x"}, "the request 'x' is unknown"),
        ("session_heartbeat", {"session_id": "x"}, "the session 'x' has ended"),
        ("create_custom_loss", {}, "this server has no call POST /api/v1/create_custom_loss"),
    ],
)  # fmt: skip
def test_refused_calls(asked: Asked, run: str, path: str, fields: dict[str, Any], message: str) -> None:
    known: dict[str, Any] = {"model_id": run} if path == "optim_step" else {}
    if path == "create_model":
        known = {"session_id": asked.session, "model_seq_id": 800, "base_model": "tiny", "lora_config": {"rank": 2}}
    with pytest.raises(Refused, match=re.escape(message)) as refused:
        asked.post(path, **{**known, **fields})
    assert refused.value.status in (400, 404)


def test_bodies(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large, compressed, or no JSON."""
    for data, headers, message in (
        (b"{", {}, "the request is not valid JSON"),
        (b"[1]", {}, "the request must be a JSON object"),
        (b'{"base_model": "\\ud800"}', {}, "the request is not valid JSON"),
        (b"{}", {"Content_Type": "text/plain"}, "must be sent as application/json"),
        (b'{"x": "' + b"x" * server.BODY + b'"}', {}, "the request has more than 4194304 bytes"),
    ):
        with pytest.raises(Refused, match=message):
            asked.send("asample", data, **headers)
    protobuf = {"Content_Type": server.PROTOBUF}
    with pytest.raises(Refused, match="the request is compressed"):
        asked.send("forward_backward", b"x", **protobuf, Content_Encoding="zstd")
    with pytest.raises(Refused, match="the protobuf message is malformed"):
        asked.send("forward_backward", b"\x80", **protobuf)
    monkeypatch.setattr(server, "TRAINING_BODY", 3)
    with pytest.raises(Refused, match="the request has more than 3 bytes"):
        asked.send("forward_backward", b"xxxx", **protobuf)


def test_runs_are_limited(folder: str, tmp_path: Path) -> None:
    with asking(folder, tmp_path, most_runs=1) as asked:
        first = asked.model(0)
        with pytest.raises(Refused, match="this server has 1 training runs already"):
            asked.model(1)
        asked.done("unload_model", model_id=first)
        assert asked.model(1) != first
        with pytest.raises(Refused, match="is unknown, or was unloaded"):
            asked.train(first, [ROW])
        capabilities = asked.send("get_server_capabilities")["supported_models"]
        assert capabilities == [
            {"model_name": "tiny", "max_context_length": 256, "trainable": True, "sampleable": True}
        ]


def test_runs_end_with_their_session(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the client closes it, or, if there is no room for others, when the client is gone."""
    with asking(folder, tmp_path, most_runs=1) as asked:
        first = asked.model(0)
        sampler = snapshot(asked, first, 1)
        asked.send(f"sessions/{asked.session}/finish", b'{"reason": {"type": "success"}}')
        with pytest.raises(Refused, match=f"the sampling session '{sampler}' is unknown"):
            asked.sample(PROMPT, sampling_session_id=sampler)
        assert not asked.service._samplers
        for call in (lambda: asked.model(1), lambda: asked.post("session_heartbeat", session_id=asked.session)):
            with pytest.raises(Refused, match="has ended, or the server was started again"):
                call()
        asked.session = ""
        second = asked.model(0)
        assert second != first
        monkeypatch.setattr(service, "SILENT", 0.0)
        asked.session = ""
        assert asked.model(0) != second
        with pytest.raises(Refused, match="is unknown, or was unloaded"):
            asked.train(second, [ROW])


def test_sessions_end_when_their_clients_are_gone(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they have training runs; with their sampling sessions."""
    with asking(folder, tmp_path) as asked:
        run = asked.model(0)
        busy, idle = asked.session, asked.post("create_session")["session_id"]
        for session in (busy, idle):
            fields = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
            asked.post("create_sampling_session", **fields)
        kept = asked.post("create_session")["session_id"]
        assert set(asked.service._sessions) == {busy, idle, kept}
        monkeypatch.setattr(service, "GONE", 0.0)
        new = asked.post("create_session")["session_id"]
        assert set(asked.service._sessions) == {busy, new}
        assert set(asked.service._samplers) == {f"{busy}:sample:0"}
        assert asked.train(run, [ROW])


def test_key_and_host(folder: str, tmp_path: Path) -> None:
    key = "tml-correct-horse"
    with asking(folder, tmp_path, Access(key), key) as asked:
        assert asked.post("create_session")["session_id"]
        assert asked.send("healthz", X_API_Key="") == {"status": "ok"}
        for path, data in (("create_session", b"{}"), ("get_server_capabilities", None), ("forward_backward", b"")):
            headers = {"Content_Type": server.PROTOBUF if path == "forward_backward" else "application/json"}
            for wrong in ("", "tml-wrong-horse!!"):
                with pytest.raises(Refused, match="set TINKER_API_KEY") as refused:
                    asked.send(path, data, X_API_Key=wrong, **headers)
                assert refused.value.status == 401
        for headers, status in (({"Host": "evil.example"}, 421), ({"Origin": "http://evil.example"}, 403)):
            with pytest.raises(Refused) as refused:
                asked.send("create_session", b"{}", **headers)
            assert refused.value.status == status


def test_error_of_the_server(asked: Asked, run: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The client hears whose fault it is; the reason is in the log; the server goes on."""

    def broken(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("inside")

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "generate", broken)
        failed = asked.sample(PROMPT, base_model="tiny")
    assert failed == {"error": "the server failed; its log has the reason", "category": "server"}
    assert "inside" in caplog.text
    assert asked.sample(PROMPT, base_model="tiny")["sequences"]


@pytest.mark.parametrize("limit", ["MOST_WAITING", "MOST_BYTES"])
def test_requests_beyond_the_queue_are_refused(
    asked: Asked, number: int, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a status after which the client tries again; a refused request changes nothing."""
    run, other, free = asked.model(number), asked.model(number + 600), Event()

    def wait() -> JSONReply:
        free.wait(20)
        return JSONReply({})

    given = {"model_id": run, "seq_id": 1, "forward_backward_input": {"data": [ROW], "loss_fn": "cross_entropy"}}
    new = {"session_id": asked.session, "base_model": "tiny", "model_seq_id": number + 700, "lora_config": {"rank": 4}}
    sampled = {"base_model": "tiny", "prompt": model_input(PROMPT), "sampling_params": {"max_tokens": 1}}
    with monkeypatch.context() as patch:
        patch.setattr(worker, limit, 1)
        try:
            for _ in range(2):  # one that is computed, and one that waits
                asked.service._submit_anyway(Call(wait, size=1))
            asked.post("asample", **sampled)  # requests of another kind do not count
            for call, fields in (("forward_backward", given), ("create_model", new), ("asample", sampled)):
                with pytest.raises(Refused, match="are waiting already; try again later") as refused:
                    asked.post(call, **fields)
                assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
            asked.post("unload_model", model_id=other)
        finally:
            free.set()
    assert "loss:sum" in asked.done("forward_backward", **given)["metrics"]
    for one in (run, asked.done("create_model", **new)["model_id"]):
        asked.done("unload_model", model_id=one)


def test_result_that_is_not_there_yet(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL", 0.05)

    def slow() -> JSONReply:
        time.sleep(0.4)
        return JSONReply({"done": True})

    request_id = asked.service._submit(Call(slow))
    with pytest.raises(Refused) as refused:
        asked.result(request_id)
    assert refused.value.status == 408
    monkeypatch.setattr(server, "POLL", 20.0)
    assert asked.result(request_id) == {"done": True} == asked.result(request_id)


@pytest.mark.parametrize("in_time", [True, False])
def test_waiting_requests_get_an_answer_at_a_shutdown(
    folder: str, tmp_path: Path, in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their results if the server computes them in time, otherwise an error; further requests are refused."""
    monkeypatch.setattr(server, "POLL", 0.1)
    free = Event()

    def wait() -> JSONReply:
        free.wait(20)
        return JSONReply({"done": True})

    grace = 20 if in_time else 0.6
    with asking(folder, tmp_path, grace=grace) as asked, ThreadPoolExecutor() as clients:
        names = [asked.service._submit(Call(wait)) for _ in range(2)]
        asked.http.ending.begun.set()
        train = {"model_id": "x", "forward_backward_input": {"data": [ROW], "loss_fn": "cross_entropy"}}
        for call, fields in (("create_session", {}), ("forward_backward", train)):
            with pytest.raises(Refused, match="the server is shutting down") as refused:
                asked.post(call, **fields)
            assert refused.value.status == 503
        found = [clients.submit(asked.result, name) for name in names]
        while len(asked.http.server_state.tasks) < 2:
            time.sleep(0.01)
        asked.http.should_exit = True
        try:
            if in_time:
                time.sleep(0.3)  # longer than a poll
                free.set()
            wanted = {"done": True} if in_time else server.ENDED.json()
            assert [one.result(10) for one in found] == [wanted] * 2
        finally:
            free.set()


def test_results_are_dropped() -> None:
    """Those that were retrieved after minutes, others after an hour, those that are computed never."""
    now = [0.0]
    kept = Results(lambda: now[0])
    calls = [Call(lambda: JSONReply({})) for _ in range(3)]
    names = [kept.add(call.future) for call in calls]
    for call in calls[:2]:
        call.future.set_result(JSONReply({}))
    kept.get(names[0])

    def present() -> list[bool]:
        kept.add(Call(lambda: JSONReply({})).future)
        return [name in kept._results for name in names]

    now[0] = results.RETRIEVED + 1
    assert present() == [False, True, True]
    now[0] = results.ABANDONED + 1
    assert present() == [False, False, True]
    assert json.dumps(JSONReply({"a": 1}).json()) == '{"a": 1}'
