"""A model's folder records how it was prompted in training; commands and the next stage prompt in the same way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.rendering_settings import RenderingSettings, load_tools
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.files import read_stage
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.export import export_model
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead, SequenceLogprob
from rlhf_lightning.pipeline.run import run_pipeline
from rlhf_lightning.rewards import FunctionReward, ModelReward
from tests.helpers.cli import mistake, rlhf_in_process
from tests.helpers.rows import chats, pairs, prompts, ready, write_rows
from tests.helpers.templates import QUIET, THINKING
from tests.helpers.training import sgd, trainer

TOOLS = [{"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}}]


def sft(start: str, root: Path, lora: LoRA | None = None, rows: Any = None, **data: Any) -> tuple[str, float]:
    """Run a stage as the command does; return its model folder, and its perplexity on its training rows."""
    torch.manual_seed(0)
    rows = rows or chats(6)
    module = SFTModule(start, lora=lora, optimizer=sgd(0.3))
    run = trainer(root, callbacks=[ExportModel()], max_epochs=2)
    run.fit(module, SFTDataModule(rows, rows, batch_size=3, show_example=False, **data))
    return str(root / "model"), float(run.callback_metrics["val/perplexity"])


def evaluated(capsys: Any, *args: str) -> tuple[float, str]:
    """The perplexity that `rlhf evaluate` reports, and its other output."""
    capsys.readouterr()
    rlhf_in_process("evaluate", *args, "--max_tokens", "2", "--temperature", "0", "--json")
    out, said = capsys.readouterr()
    return json.loads(out)["policy"]["perplexity"], said


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, target=["attention"])])
def test_evaluate_gives_the_perplexity_of_validation(lora: Any, thinker: str, tmp_path: Path, capsys: Any) -> None:
    """For the stage's folder and its export. With a flag that overrides the record, the perplexity differs."""
    file = write_rows(tmp_path / "chats.jsonl", chats(6))
    folder, wanted = sft(thinker, tmp_path / "sft", lora, file, template_kwargs=QUIET)
    found, said = evaluated(capsys, folder, file)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert f"prompting as in the training of {folder}: template_kwargs {QUIET}" in said
    export_model(folder, tmp_path / "exported")
    assert evaluated(capsys, str(tmp_path / "exported"), file)[0] == pytest.approx(wanted, rel=1e-4)
    other, said = evaluated(capsys, folder, file, "--template_kwargs", "{}")
    assert abs(other / wanted - 1) > 0.01
    assert f"template_kwargs none (trained with {QUIET})" in said.replace("{}", "none")


def test_custom_template_is_saved_with_the_model(base: str, tmp_path: Path) -> None:
    """In an adapter's folder, in the merged base of the next adapter, and in an export."""
    file = tmp_path / "own.jinja"
    file.write_text(THINKING)
    small, other = LoRA(rank=2, target=["attention"]), LoRA(rank=3, target=["mlp"])
    for start, name, lora in ((base, "one", small), (None, "two", other)):
        start = start or str(tmp_path / "one" / "model")
        template = str(file) if name == "one" else None
        module = SFTModule(start, lora=lora, chat_template=template, optimizer=sgd(0.1))
        data = SFTDataModule(chats(4), batch_size=4, show_example=False, template_kwargs=QUIET if template else None)
        trainer(tmp_path / name, callbacks=[ExportModel()]).fit(module, data)
    export_model(str(tmp_path / "two" / "model"), tmp_path / "exported")
    wanted = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for folder in (tmp_path / "one" / "model", tmp_path / "two" / "merged", tmp_path / "exported"):
        assert Policy(str(folder)).renderer.prompt_text([{"role": "user", "content": "Hi"}]) == wanted, folder


def test_save_pretrained_writes_the_record(thinker: str, tmp_path: Path) -> None:
    """For every module and scorer; models loaded from the folder give the scores of training."""
    for name, scorer in (("head", RewardHead()), ("logprob", SequenceLogprob()), ("dpo", ImplicitReward(beta=0.5))):
        module = PreferenceModule(thinker, scorer, optimizer=sgd(0.1))
        data = PreferenceDataModule(pairs(4), batch_size=4, show_example=False, template_kwargs=QUIET)
        trainer(tmp_path / name).fit(module, data)
        folder = tmp_path / f"{name}-saved"
        module.save_pretrained(folder)
        judge = RewardModel(str(folder))
        assert judge.renderer.template_kwargs == QUIET
        texts = ["Count 1"], ["one two three"]
        torch.testing.assert_close(judge.score(*texts), module.score(*texts), rtol=1e-5, atol=1e-5)
    module = SFTModule(thinker, optimizer=sgd(0.1))
    data = SFTDataModule(chats(4), batch_size=4, show_example=False, format="raw")
    trainer(tmp_path).fit(module, data)
    module.save_pretrained(tmp_path / "sft")
    assert read_stage(tmp_path / "sft")["rendering"]["format"] == "raw"
    assert Policy(str(tmp_path / "sft")).renderer.prompt_text([{"role": "user", "content": "Hi"}]) == "Hi"


def test_record_depends_only_on_training(thinker: str, tmp_path: Path) -> None:
    """The model is scored before it has data, and evaluated with other settings after training."""
    module = PreferenceModule(thinker, SequenceLogprob(), optimizer=sgd(0.1))
    module.score(["Hi"], ["Hello."])
    said: dict[str, Any] = {"batch_size": 4, "show_example": False}
    data = PreferenceDataModule(pairs(4), **said, template_kwargs=QUIET, system="Be brief.")
    trainer(tmp_path).fit(module, data)
    trainer(tmp_path).validate(module, PreferenceDataModule(validation=pairs(4), **said), verbose=False)
    module.save_pretrained(tmp_path / "saved")
    record = read_stage(tmp_path / "saved")["rendering"]
    assert (record["template_kwargs"], record["system"]) == (QUIET, "Be brief.")


def test_next_stage_uses_the_settings_of_its_start(thinker: str, tmp_path: Path, caplog: Any) -> None:
    """SFT, DPO, and policy RL with the DPO folder as reward. Another setting is used, with a warning."""
    first, _ = sft(thinker, tmp_path / "sft", template_kwargs=QUIET, system="Be brief.")
    record = read_stage(first)["rendering"]
    assert (record["template_kwargs"], record["system"], record["format"]) == (QUIET, "Be brief.", "chat")
    module = PreferenceModule(first, ImplicitReward(), optimizer=sgd(0.1))
    data = PreferenceDataModule(pairs(4), batch_size=4, show_example=False)
    trainer(tmp_path / "dpo", callbacks=[ExportModel()]).fit(module, data)
    assert data.renderer.template_kwargs == QUIET
    second = str(tmp_path / "dpo" / "model")
    assert read_stage(second)["rendering"] == record
    assert "trained with" not in caplog.text
    policy = PolicyRLModule(first, rewards=[ModelReward(second)], sampler=Sampler(4))
    sampled = PromptDataModule(prompts(2), prompts_per_round=2, group_size=2, show_example=False, system="Be kind.")
    trainer(tmp_path / "rl").fit(policy, sampled)
    assert "data.system is 'Be kind.', but" in caplog.text
    assert "was trained with 'Be brief.'" in caplog.text
    # The reward has its own system message, so it renders the sampled conversations again.
    text = policy.tokenizer.decode(sampled.prepared["train"].rows[0].ids)
    assert "Be kind." in text
    assert text.endswith("</think>\n\n")
    (term,) = policy.reward_terms
    reward: Any = term.scorer
    assert reward.judge.renderer.system == "Be brief."
    [episode] = policy.collector.rollout(sampled.prepared["train"].rows[:1], 1, (0,))
    wanted = reward.judge.score([episode.prompt], [episode.responses], allow_blank=True).tolist()
    assert episode.reward == pytest.approx(wanted[0], abs=1e-5)
    assert not reward._renders_equally(episode)


def test_system_and_tools_shared_by_all_rows_are_recorded(thinker: str, tmp_path: Path, capsys: Any) -> None:
    def rows(*systems: str | None) -> list[Any]:
        made = chats(len(systems))
        for row, system in zip(made, systems, strict=True):
            row["tools"] = TOOLS
            row["messages"] = [*([{"role": "system", "content": system}] if system else []), *row["messages"]]
        return made

    folder, wanted = sft(thinker, tmp_path / "same", rows=rows(*["Be brief."] * 4))
    policy = Policy(folder)
    assert (policy.renderer.system, policy.renderer.tools) == ("Be brief.", TOOLS)
    # Rows without system message and tools are prompted like the training rows.
    file = write_rows(tmp_path / "plain.jsonl", chats(4))
    assert evaluated(capsys, folder, file)[0] == pytest.approx(wanted, rel=1e-4)
    for system in ("Be brief.", None):
        mixed, _ = sft(thinker, tmp_path / f"mixed{system}", rows=rows("Be kind.", system, system))
        assert read_stage(mixed)["rendering"]["system"] is None
        assert read_stage(mixed)["rendering"]["tools"] == TOOLS


def test_row_overrides_flag_and_flag_overrides_record(thinker: str, tmp_path: Path) -> None:
    folder, _ = sft(thinker, tmp_path / "sft", system="Record.", tools=TOOLS)
    asked = [{"role": "user", "content": "Hi"}]
    own = [{"role": "system", "content": "Row."}, *asked]
    for flags, wanted in (({}, "Record."), ({"system": "Flag."}, "Flag."), ({"system": "", "tools": "[]"}, "")):
        renderer = Policy(folder, asked=flags).renderer
        text = renderer.prompt_text(asked)
        assert text.count("system\n") == bool(wanted)
        assert wanted in text
        assert ("clock" in text) == ("tools" not in flags)
        assert "Row." in renderer.prompt_text(own)
        assert renderer.prompt_text(own).count("system\n") == 1


def test_stop_texts_of_training_are_recorded(base: str, tmp_path: Path, capsys: Any) -> None:
    """A stop text of the sampler is used by stock `generate`, by the commands and by the next stage."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reward = FunctionReward(lambda completions, **_: [float(len(text)) for text in completions])
    module = PolicyRLModule(base, rewards=[reward], sampler=Sampler(6, stop=["e"]), optimizer=sgd(0.01))
    data = PromptDataModule(prompts(2), prompts_per_round=2, group_size=2, show_example=False)
    trainer(tmp_path / "rl", callbacks=[ExportModel()]).fit(module, data)
    folder = str(tmp_path / "rl" / "model")
    policy = Policy(folder)
    made = policy.prompts([{"prompt": f"Count {i}"} for i in range(12)])
    stopped = [e for e in policy.answer(made, 40, 0) if e.stop_reason == "stop"]
    assert stopped
    assert all("e" not in e.response for e in stopped)
    rlhf_in_process("generate", folder, "--prompt", "Hi", "--stop", "", "--max_tokens", "2")
    assert "stop none (trained with ['e'])" in capsys.readouterr().err
    # Stock `generate` stops there, too, but needs the tokenizer.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.stop_strings == ["e"]
    ids = torch.tensor([made[0].ids])
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        model.generate(ids, max_new_tokens=4)
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, max_new_tokens=200, tokenizer=tokenizer)[0, ids.shape[1] :]
    text = tokenizer.decode(sampled)
    assert "e" not in text[:-2] or len(sampled) < 3
    again = PolicyRLModule(folder, rewards=[reward], sampler=Sampler(4))
    trainer(tmp_path / "next").fit(again, PromptDataModule(prompts(2), prompts_per_round=2, show_example=False))
    assert again.model_sampler.stop == ("e",)
    assert again.rendering()["stop"] == ["e"]
    export_model(folder, tmp_path / "exported")
    assert Policy(str(tmp_path / "exported")).renderer.stop == ("e",)


@pytest.mark.parametrize(
    ("said", "lora"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, None),
        # Like many published configs, which transformers refuses to save after a change.
        ({"temperature": 0.6, "top_p": 0.9}, LoRA(rank=2, target=["attention"])),
        ({"temperature": 0.6, "top_p": 0.9}, None),
        ({"do_sample": False}, None),
        ({}, None),
    ],
)
def test_generation_config_of_the_base_is_kept(
    said: dict[str, Any], lora: Any, base: str, tmp_path: Path, capsys: Any
) -> None:
    (Path(base) / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_h": None, **said}))
    folder, _ = sft(base, tmp_path / "sft", lora)
    for place in (Path(folder), tmp_path / "exported"):
        if not place.exists():
            export_model(folder, place)
        kept = json.loads((place / "generation_config.json").read_text())
        names = ("do_sample", "temperature", "top_p", "top_k")
        assert {key: kept[key] for key in names if kept.get(key) is not None} == said
        assert 2 in kept["eos_token_id"]
        capsys.readouterr()
        rlhf_in_process("generate", str(place), "--prompt", "Hi", "--max_tokens", "2")
        line = capsys.readouterr().err
        sampled = {} if not said else {"temperature": 0} if said.get("do_sample") is False else said
        for key in ("temperature", "top_p", "top_k"):
            assert (f"{key} {sampled[key]:g}" in line) if key in sampled else key not in line
        rlhf_in_process("generate", str(place), "--prompt", "Hi", "--max_tokens", "2", "--temperature", "0")
        assert "draws as" not in capsys.readouterr().err


def test_folders_without_a_record_use_the_defaults(base: str, tmp_path: Path, capsys: Any) -> None:
    rlhf_in_process("generate", base, "--prompt", "Hi", "--max_tokens", "2")
    assert "asks" not in capsys.readouterr().err
    assert RenderingSettings.of(base).describe() == ""
    rlhf_in_process("generate", base, "--prompt", "Hi", "--max_tokens", "2", "--system", "Be kind.")
    assert f"prompts {base} with system 'Be kind.'" in capsys.readouterr().err
    (Path(base) / "stage.json").write_text(json.dumps({"kind": "sft"}))
    assert "does not record how the model was prompted in training" in RenderingSettings.of(base).describe()
    # Records of earlier preference stages had two keys.
    (Path(base) / "stage.json").write_text(json.dumps({"rendering": {"format": "raw", "template_kwargs": {}}}))
    assert Policy(base).renderer.format == "raw"


def test_data_check_renders_with_the_record(thinker: str, tmp_path: Path, capsys: Any) -> None:
    folder, _ = sft(thinker, tmp_path / "sft", template_kwargs=QUIET, system="Be brief.")
    file = write_rows(tmp_path / "prompts.jsonl", prompts(2))
    capsys.readouterr()
    rlhf_in_process("data", "check", file, "--kind", "prompts", "--model", folder)
    out, said = capsys.readouterr()
    assert f"prompting as in the training of {folder}: template_kwargs {QUIET}, system 'Be brief.'" in said
    assert "Be brief." in out
    rlhf_in_process("data", "check", file, "--kind", "prompts", "--model", folder, "--system", "")
    assert "Be brief." not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--template_kwargs", "{"], "is not valid JSON"),
        (["--template_kwargs", "[1]"], "must be a JSON object"),
        (["--tools", "missing.json"], "neither a file nor"),
        (["--tools", "[1]"], "tools"),
        (["--format", "raw", "--tools", json.dumps(TOOLS)], "tools need a chat template"),
    ],
)
def test_mistakes_in_flags(flags: list[str], message: str, base: str, capsys: Any) -> None:
    assert message in mistake(["generate", base, "--prompt", "Hi", *flags], capsys)
    assert message in mistake(["evaluate", base, base, *flags], capsys)


def test_template_kwargs_without_a_template_are_refused(tokenizer: Any) -> None:
    kwargs = {"enable_thinking": False}
    with pytest.raises(ConfigError, match=r"have no effect, because format is raw \(as set\)"):
        ready(SFTDataModule([{"text": "a"}], tokenizer=tokenizer, format="raw", template_kwargs=kwargs))
    asking = RenderingSettings("m", {"format": "raw"}, {"template_kwargs": kwargs})
    with pytest.raises(ConfigError, match=r"format is raw .as m was trained"):
        asking.renderer(tokenizer)
    assert (
        RenderingSettings("m", {"template_kwargs": kwargs}, {"format": "raw"}).renderer(tokenizer).template_kwargs == {}
    )


def test_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    for kind in ("qwen2", "llama"):  # one of which transformers makes an empty tokenizer, and one of none
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ConfigError, match=f"from {folder}: files are missing"):
            load_tokenizer(folder)


def test_empty_raw_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RowError, match="the prompt is empty"):
        Renderer(tokenizer, format="raw").prompt([{"role": "user", "content": ""}])


@pytest.mark.parametrize(
    "rendering", [[1], {"tools": "tools.json"}, {"system": 1}, {"stop": "e"}, {"stop_token_ids": ["a"]}]
)
def test_invalid_record_is_refused(rendering: Any, base: str) -> None:
    (Path(base) / "stage.json").write_text(json.dumps({"rendering": rendering}))
    with pytest.raises(ConfigError, match=r"rendering.* is .*[Rr]estore the file"):
        Policy(base)


def test_tools_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    for given in (TOOLS, json.dumps(TOOLS), str(tmp_path / "tools.json"), [TOOLS[0]["function"]]):
        assert load_tools(given) == TOOLS


def test_record_of_a_hub_repository(tmp_path: Path, monkeypatch: Any) -> None:
    """Uploads of `rlhf export --push` have the record. One repository is in the cache, another one is not."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    snapshot = tmp_path / "models--someone--quiet" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "stage.json").write_text(json.dumps({"rendering": {"template_kwargs": QUIET}}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    assert RenderingSettings.of("someone/quiet").record == {"template_kwargs": QUIET}
    assert RenderingSettings.of("someone/else").record == {}
    assert RenderingSettings.of("odd/..").record == {}


def test_another_template_than_in_training_gives_a_warning(thinker: str, tmp_path: Path, caplog: Any) -> None:
    folder, _ = sft(thinker, tmp_path / "sft")
    file = tmp_path / "own.jinja"
    for template in (THINKING, THINKING.replace("thinking", "thought")):
        file.write_text(template)
        caplog.clear()
        assert SFTModule(folder, chat_template=str(file)).tokenizer.chat_template == template
        assert ("differs from the template that" in caplog.text) == (template != THINKING)


@pytest.mark.usefixtures("forked_stages")
def test_pipeline_passes_the_record_on(thinker: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", chats(4))
    trained = {"trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False}}
    told = {"data": {"train": file, "template_kwargs": QUIET, "batch_size": 4}, "model": {"model": thinker}}
    stages = [
        {"name": "one", "kind": "sft", "overrides": {**trained, **told}},
        {"name": "two", "kind": "sft", "start": "one", "overrides": {**trained, "data": {"train": file}}},
    ]
    run_pipeline({"name": "p", "root": str(tmp_path / "run"), "stages": stages})
    for name in ("one", "two"):
        assert read_stage(tmp_path / "run" / name / "model")["rendering"]["template_kwargs"] == QUIET


def test_perplexity_equals_that_of_transformers(thinker: str, tmp_path: Path) -> None:
    """`RenderingSettings` renders like transformers with the settings of the record."""
    folder, _ = sft(thinker, tmp_path / "sft", template_kwargs=QUIET, system="Be brief.", tools=TOOLS)
    policy = Policy(folder)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wanted = policy.tokenizer.apply_chat_template(
        said, tools=TOOLS, add_generation_prompt=True, tokenize=False, **QUIET
    )
    assert policy.renderer.prompt_text(said[1:]) == wanted


def test_base_model_in_a_run_folder_has_no_record(thinker: str, tmp_path: Path) -> None:
    """If a run is in the folder of its base model, the stage.json belongs only to `model`."""
    sft(thinker, tmp_path, template_kwargs=QUIET)
    assert RenderingSettings.of(str(tmp_path / "model")).record["template_kwargs"] == QUIET
    assert RenderingSettings.of(thinker).record == {}
    (tmp_path / "model" / "stage.json").unlink()
    assert RenderingSettings.of(str(tmp_path / "model")).record["template_kwargs"] == QUIET
