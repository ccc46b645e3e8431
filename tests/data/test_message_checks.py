"""Rows that a template would render in another way than their author meant."""

from typing import Any

import pytest

from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.errors import ConfigError, DataError
from tests.helpers.rows import ready

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
PREFILL = {"role": "assistant", "content": "Sure,"}


def text_of(module: type, row: dict[str, Any], tokenizer: Any, **settings: Any) -> str:
    (example,) = ready(module([row], tokenizer=tokenizer, show_example=False, **settings)).prepared["train"].rows
    return str(example.show(tokenizer))


@pytest.mark.parametrize(
    ("module", "row"),
    [
        (SFTDataModule, {"prompt": RENDERED, "completion": "Hello"}),
        (PreferenceDataModule, {"prompt": RENDERED, "chosen": "Hello", "rejected": "No"}),
        (PromptDataModule, {"prompt": RENDERED}),
        (SFTDataModule, {"messages": [USER, {"role": "assistant", "content": "<|im_start|>assistant\nHello"}]}),
    ],
)
def test_text_that_was_already_rendered_is_refused_with_a_template(tokenizer: Any, module: type, row: Any) -> None:
    with pytest.raises(DataError, match=r"list\[0\]: .*already rendered.*set format: raw"):
        text_of(module, row, tokenizer)
    if "messages" not in row:
        assert RENDERED in text_of(module, row, tokenizer, format="raw").replace("⟦", "")


@pytest.mark.parametrize("text", ["Hello<|im_end|>", "Say <|im_start|>."])
def test_special_tokens_in_a_text_give_one_warning(tokenizer: Any, text: str, caplog: pytest.LogCaptureFixture) -> None:
    ready(SFTDataModule([{"messages": [USER, {**ASSISTANT, "content": text}]}] * 3, tokenizer=tokenizer))
    assert caplog.text.count("contains the special token '<|im_") == 1


def test_ordinary_messages_give_no_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    answer = {**ASSISTANT, "content": "a < b | c", "id": "x", "reasoning_content": ""}
    ready(SFTDataModule([{"messages": [{"role": "system", "content": "S"}, USER, answer]}], tokenizer=tokenizer))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_keys_and_roles_that_the_template_does_not_know_give_one_warning_each(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{"role": "critic", "content": "Hm"}, USER, {**ASSISTANT, "thought": "secret", "empty": None}]
    ready(SFTDataModule([{"messages": messages}] * 2, tokenizer=tokenizer))
    assert caplog.text.count("does not read 'thought' of messages") == 1
    assert caplog.text.count("has the role 'critic'") == 1
    assert "'empty'" not in caplog.text


@pytest.mark.parametrize(
    ("module", "row"),
    [
        (SFTDataModule, {"prompt": [USER, PREFILL], "completion": "here."}),
        (SFTDataModule, {"prompt": [USER, PREFILL], "completion": [{**ASSISTANT, "content": "here."}]}),
        (PreferenceDataModule, {"prompt": [USER, PREFILL], "chosen": "here.", "rejected": "no."}),
    ],
)
def test_prompt_with_the_beginning_of_the_answer_is_refused(tokenizer: Any, module: type, row: Any) -> None:
    with pytest.raises(DataError, match=r"would become two turns. Write the whole answer into the response"):
        text_of(module, row, tokenizer)


@pytest.mark.parametrize("key", ["type", "speaker", "author"])
def test_other_keys_for_the_role_are_not_guessed_from_the_order(tokenizer: Any, key: str) -> None:
    messages = [{key: "system", "content": "Be kind."}, {key: "human", "content": "Hi"}, {key: "ai", "content": "Yes"}]
    with pytest.raises(DataError, match=f"message 0 has '{key}' .*, but no 'role'; name that key 'role'"):
        text_of(SFTDataModule, {"messages": messages}, tokenizer)


@pytest.mark.parametrize(("user", "assistant"), [("prompter", "assistant"), ("Human ", "ai"), ("user", "assistant ")])
def test_names_of_roles_in_other_datasets(tokenizer: Any, user: str, assistant: str) -> None:
    row = {"messages": [{**USER, "role": user}, {**ASSISTANT, "role": assistant}]}
    assert text_of(SFTDataModule, row, tokenizer) == text_of(SFTDataModule, {"messages": [USER, ASSISTANT]}, tokenizer)


@pytest.mark.parametrize("column", ["completion", "response", "output"])
def test_answer_outside_of_the_conversation_is_refused(tokenizer: Any, column: str) -> None:
    row = {"messages": [USER, ASSISTANT, USER], column: "Bye"}
    with pytest.raises(DataError, match=f"its answer seems to be in '{column}'"):
        text_of(SFTDataModule, row, tokenizer)
    assert "Bye" not in text_of(SFTDataModule, row, tokenizer, columns={column: None})


@pytest.mark.parametrize("answer", [["one", "two", "three"], [{"content": "one"}, {"content": "two"}]])
@pytest.mark.parametrize("kind", ["sft", "pairs", "labels", "rankings"])
def test_response_of_several_texts_is_refused(tokenizer: Any, kind: str, answer: list[Any]) -> None:
    """Steps or alternatives would alternate between assistant and user."""
    rows = {
        "sft": {"completion": answer},
        "pairs": {"chosen": answer, "rejected": "no"},
        "labels": {"completion": answer, "label": 1},
        "rankings": {"responses": [answer, "no"]},
    }
    module: Any = SFTDataModule if kind == "sft" else PreferenceDataModule
    settings = {} if kind == "sft" else {"kind": kind}
    with pytest.raises(DataError, match="message 1 of a response has no role, and a response is one answer"):
        text_of(module, {"prompt": "Hi", **rows[kind]}, tokenizer, **settings)


def test_single_messages_as_text_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"list\[0\]: .*'role' \('prompter'\).*Collect the messages"):
        text_of(SFTDataModule, {"text": "Hi", "role": "prompter"}, tokenizer)


@pytest.mark.parametrize("mark", ["mask", "masked", "train_on_turn"])
def test_marks_of_unclear_meaning_are_refused(tokenizer: Any, mark: str) -> None:
    with pytest.raises(DataError, match=f"has '{mark}', which is not supported in a message; replace it with 'weight'"):
        text_of(SFTDataModule, {"messages": [USER, {**ASSISTANT, mark: 0}]}, tokenizer)


@pytest.mark.parametrize("format", ["chat", "raw"])
def test_responses_that_repeat_the_prompt_give_a_warning(
    tokenizer: Any, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    start = "\n\nHuman: Hi\n\nAssistant:"
    rows = [{"prompt": start, "chosen": f"{start} Hello", "rejected": f"{start} No"}]
    ready(PreferenceDataModule(rows, tokenizer=tokenizer, format=format))
    assert "in 1 of 1 rows the response begins with the whole text of the prompt" in caplog.text
    caplog.clear()
    rows = [{"prompt": start, "chosen": " Hello", "rejected": f"{start} No"}]
    ready(PreferenceDataModule(rows, tokenizer=tokenizer, format=format))
    assert "begins with the whole text" not in caplog.text


def test_pairs_of_dialogues_as_text_say_what_to_do(tokenizer: Any) -> None:
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}
    with pytest.raises(DataError, match=r"no 'prompt'.*as in HH-RLHF, must be split into messages"):
        text_of(PreferenceDataModule, row, tokenizer)


def test_true_and_false_as_text_are_refused_for_a_template(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"enable_thinking is the text 'False'.*write false without quotes"):
        Renderer(tokenizer, template_kwargs={"enable_thinking": "False"})


def test_scores_and_ranks_must_agree(tokenizer: Any) -> None:
    row = {"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [3, 1, 1], "ranks": [1, 2, 2]}
    assert text_of(PreferenceDataModule, row, tokenizer, kind="rankings").startswith("rank 0: ")
    with pytest.raises(DataError, match=r"'scores' \[3, 1, 1\] and 'ranks' \[1, 2, 3\] .* order the responses diff"):
        text_of(PreferenceDataModule, {**row, "ranks": [1, 2, 3]}, tokenizer, kind="rankings")
