"""`rlhf generate`, `chat`, `export` and `init`, as used by people and by scripts."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_lightning import PreferenceDataModule, PreferenceModule, SFTDataModule, SFTModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.cli.stage import StageCLI
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.evaluation.chat import Conversation
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.files import visible
from rlhf_lightning.models import export as exporting
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead
from rlhf_lightning.pipeline.plan import read_plan
from tests.helpers.cli import mistake, rlhf_in_process
from tests.helpers.models import build_model
from tests.helpers.rows import chats, pairs, prompts, write_rows
from tests.helpers.training import sgd, trainer

# -- generate ---------------------------------------------------------------------------------------------------------


def test_generate(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "prompts.jsonl", prompts(3))
    rlhf_in_process("generate", base, file, "--json", "--max-tokens", "6", "--samples", "2")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert rows[2]["prompt"] == [{"role": "user", "content": "Count 1"}]
    assert all(row["response_tokens"] <= 6 for row in rows)

    rlhf_in_process("generate", base, "--prompt", "Count 1", "--max_tokens", "6", "--temperature", "0", "--json")
    one = json.loads(capsys.readouterr().out)
    rlhf_in_process("generate", base, "--prompt", "Count 1", "--max_tokens", "6", "--temperature", "0")
    assert capsys.readouterr().out == f"{visible(one['response'])}\n"
    rlhf_in_process(
        "generate", base, "--prompt", "Count 0", "--prompt", "Count\n1", "--max_tokens", "6", "--limit", "2"
    )
    assert "--- Count 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "either a file"),
        (["prompts.jsonl", "--prompt", "x"], "either a file"),
        (["nothing.jsonl"], "no such file"),
        (["--prompt", "x", "--max_tokens", "0"], "--max_tokens"),
        (["--prompt", "x", "--max_tokens", "5000"], "the model's context of"),
    ],
)
def test_mistakes_of_generate(args: list[str], message: str, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in mistake(["generate", base, *args], capsys)


# -- chat -------------------------------------------------------------------------------------------------------------


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_chat_continues_the_conversation(base: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    piped(monkeypatch, "Count 1\n\nCount 2\n/new\nCount 2\n/quit\nnever\n")
    rlhf_in_process("chat", base, "--max_tokens", "8", "--temperature", "0")
    answers = capsys.readouterr().out.removesuffix("\n").split("\n")
    policy = Policy(base)
    talk = Conversation(policy, None, 8, 0.0)
    wanted = [talk.reply(text, lambda piece: None) for text in ("Count 1", "Count 2")]
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    talk.begin()
    wanted.append(talk.reply("Count 2", lambda piece: None))
    assert answers == visible("\n".join(wanted)).split("\n")
    assert wanted[1] != wanted[2], "the first of them was answered with what was said before it"


def test_chat_with_two_models(
    base: str, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for seed, name in enumerate(("sft", "policy")):
        folders.append(tmp_path / "runs" / name / "model")
        build_model(tokenizer, seed).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    piped(monkeypatch, "Count 1\n")
    first, second = map(str, folders)
    rlhf_in_process("chat", first, "--and", second, "--max_tokens", "6", "--temperature", "0", "--system", "Be brief.")
    out = capsys.readouterr().out
    talks = [Conversation(Policy(name), "Be brief.", 6, 0.0) for name in (first, second)]
    texts = [talk.reply("Count 1", lambda piece: None) for talk in talks]
    assert out == visible(f"sft: {texts[0]}\npolicy: {texts[1]}\n")


def test_answer_is_shown_in_pieces(base: str) -> None:
    pieces: list[str] = []
    policy = Policy(base)
    answer = Conversation(policy, max_tokens=20, seed=3).reply("Count 1", pieces.append)
    assert "".join(pieces) == answer
    assert len(pieces) > 3


def test_conversation_that_is_too_long_is_refused_and_kept(base: str, monkeypatch: Any, capsys: Any) -> None:
    talk = Conversation(Policy(base), max_tokens=200)
    with pytest.raises(Exception, match="start a new conversation with /new"):
        talk.reply("Count " * 100, lambda piece: None)
    assert talk.messages == []
    piped(monkeypatch, "Count " * 100 + "\n")
    assert "start a new conversation with /new" in mistake(["chat", base, "--max_tokens", "200"], capsys)
    assert "--max_tokens" in mistake(["chat", base, "--max_tokens", "0"], capsys)


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> str:
    """An SFT model with LoRA on all layers, including the tied unembedding."""
    torch.manual_seed(0)
    module = SFTModule(base, lora=LoRA(rank=4, target=["all"]), optimizer=sgd(1.0))
    trainer(tmp_path / "sft", callbacks=[ExportModel()]).fit(module, SFTDataModule(chats(8), show_example=False))
    return str(tmp_path / "sft" / "model")


def logits(folder: str) -> torch.Tensor:
    with torch.no_grad():
        return Policy(folder).model(input_ids=torch.arange(10)[None]).logits


def test_export_merges_an_adapter(adapter: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    rlhf_in_process("export", adapter, str(out), "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "float32"
    assert not (out / "adapter_config.json").exists()
    assert list(out.glob("*.safetensors"))
    assert AutoTokenizer.from_pretrained(out).chat_template
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(out)(input_ids=torch.arange(10)[None]).logits
    torch.testing.assert_close(stock, logits(adapter), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(stock, logits(base), atol=1e-2)
    facts = json.loads((out / "stage.json").read_text())
    assert facts["kind"] == "sft"
    assert facts["model_hash"] == found["model_hash"]

    rlhf_in_process("export", str(out), str(tmp_path / "half"), "--dtype", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert exporting.stored_dtype(str(tmp_path / "half")) == "bfloat16"
    assert "(bfloat16)" in capsys.readouterr().out
    assert "is not empty" in mistake(["export", adapter, str(out)], capsys)
    assert "--dtype is 'int8'" in mistake(["export", adapter, str(tmp_path / "x"), "--dtype", "int8"], capsys)


@pytest.mark.parametrize("scorer", [RewardHead(), ImplicitReward(beta=0.5)], ids=["head", "implicit"])
def test_exported_reward_model_gives_the_same_scores(scorer: Any, base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = PreferenceModule(base, scorer, lora=LoRA(rank=4), optimizer=sgd(0.5))
    data = PreferenceDataModule(pairs(8), batch_size=4, show_example=False)
    trainer(tmp_path / "runs" / "rm", callbacks=[ExportModel()]).fit(module, data)
    source, out = str(tmp_path / "runs" / "rm" / "model"), tmp_path / "elsewhere" / "deep" / "out"
    out.parent.mkdir(parents=True)
    exporting.export_model(source, out)
    assert not (out / "adapter_config.json").exists()
    rows = (["Count 1", "Count 2"], ["one two", "ten"])
    found = RewardModel(str(out)).score(*rows)
    torch.testing.assert_close(found, RewardModel(source).score(*rows), atol=1e-4, rtol=1e-4)
    assert found[0] != found[1]
    if isinstance(scorer, RewardHead):
        with pytest.raises(ConfigError, match="is a reward model"):
            Policy(str(out))


def test_upload_only_with_push(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    rlhf_in_process("export", base, str(tmp_path / "a"))
    assert calls == []
    rlhf_in_process("export", base, str(tmp_path / "b"), "--push", "me/model")
    assert "https://hub/me/model" in capsys.readouterr().out
    assert calls == [
        ("me/model", {"private": True, "exist_ok": True}),
        {"folder_path": tmp_path / "b", "repo_id": "me/model"},
    ]

    def refuse(self: Any, name: str, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    message = mistake(["export", base, str(tmp_path / "c"), "--push", "me/model"], capsys)
    assert "cannot be uploaded to me/model: no network" in message
    assert "--push" in mistake(["export", base, str(tmp_path / "d"), "--public"], capsys)


# -- init -------------------------------------------------------------------------------------------------------------


def test_new_project_passes_the_data_checks(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my project"
    rlhf_in_process("init", str(folder), "--model", base)
    out = capsys.readouterr().out
    assert f"cd '{folder}'" in out
    monkeypatch.chdir(folder)
    for file, kind in (("chats", "sft"), ("pairs", "preference"), ("prompts", "prompts")):
        assert f"rlhf data check data/{file}.jsonl --kind {kind} --model {base}" in out
        rlhf_in_process("data", "check", f"data/{file}.jsonl", "--kind", kind, "--model", base)
    plan = read_plan("pipeline.yaml")
    assert plan.name == "my_project"
    assert [(stage.kind, stage.start, stage.reward) for stage in plan.stages] == [
        ("sft", None, None),
        ("preference", "sft", None),
        ("policy", "sft", "preference"),
    ]
    for stage in plan.stages:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            StageCLI(stage.kind, ["fit", "-c", f"{stage.kind}.yaml", "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["model"] == base
        for section, values in stage.settings.items():
            assert set(values) <= set(printed[section])
    assert "exists already" in mistake(["init", str(folder)], capsys)
    assert "config.json" in mistake(["init", "other", "--model", str(tmp_path)], capsys)


@pytest.mark.slow
def test_new_project_runs_unchanged(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    rlhf_in_process("init", str(folder), "--model", base)
    monkeypatch.chdir(folder)
    for stage in ("sft", "preference", "policy"):
        config = yaml.safe_load(Path(f"{stage}.yaml").read_text())
        config["trainer"] |= {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False}
        Path(f"{stage}.yaml").write_text(yaml.safe_dump(config))
    rlhf_in_process("pipeline", "pipeline.yaml")
    assert json.loads((folder / "runs/project/manifest.json").read_text())["stages"]["policy"]["status"] == "finished"
    assert (folder / "runs/project/report.html").exists()
