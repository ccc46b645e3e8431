"""Tokens and masks: exactly the text that the model has to write is trained, for any template and tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.conversations import conversation, tool_schemas
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError
from tests.helpers.paths import CHAT_TEMPLATES, SHARED
from tests.helpers.templates import TEMPLATES, trained

CONVERSATIONS = {
    "single": [("user", "Hi <there"), ("assistant", "<thanks> Hello é😀")],
    "system": [("system", "Be nice."), ("user", "Hi"), ("assistant", "Hello")],
    "multi": [("user", "a b"), ("assistant", "First answer."), ("user", "c d"), ("assistant", "Second one")],
}


def messages(name: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in CONVERSATIONS[name]]


def check_masks(tokenizer: Any, name: str) -> None:
    """Check that every assistant turn is trained once with its stop token, and no other text."""
    renderer = Renderer(tokenizer)
    wanted = [content for role, content in CONVERSATIONS[name] if role == "assistant"]
    rows = renderer.conversation(messages(name))
    texts = [text for row in rows for text in trained(tokenizer, row)]
    assert len(texts) == len(wanted)
    for text, content in zip(texts, wanted, strict=True):
        stops = [*tokenizer.convert_ids_to_tokens(renderer.stop_token_ids), *renderer.stop_strings]
        assert content in text
        assert any(text.endswith(stop) for stop in stops), text
        assert not any(other in text for _, other in CONVERSATIONS[name] if other != content and len(other) > 3)
    for row in rows:
        assert len(row.ids) == len(row.loss_mask)
        assert row.loss_mask[-1] == 1, "what follows the last trained token is not computed"


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_masks_of_different_templates(tokenizer: Any, template: str, name: str) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    check_masks(tokenizer, name)


def shared_cases() -> list[tuple[str, str]]:
    tokenizers = sorted(path.name for path in (SHARED / "tokenizers").glob("*")) or ["none"]
    templates = ["own", *sorted(path.name for path in CHAT_TEMPLATES.glob("*.jinja"))]
    return [(tokenizer, template) for tokenizer in tokenizers for template in templates]


_LOADED: dict[str, Any] = {}


@pytest.mark.parametrize(("name", "template"), shared_cases())
def test_masks_of_real_templates_and_tokenizers(shared: Path, name: str, template: str) -> None:
    from transformers import AutoTokenizer

    if name not in _LOADED:
        tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
        _LOADED[name] = (tokenizer, tokenizer.chat_template)
    tokenizer, own = _LOADED[name]
    tokenizer.chat_template = own if template == "own" else (CHAT_TEMPLATES / template).read_text()
    for case in CONVERSATIONS:
        if case == "system" and template == "gemma.jinja":
            with pytest.raises(RowError, match="System role not supported"):
                Renderer(tokenizer).conversation(messages(case))
        else:
            check_masks(tokenizer, case)


def test_masks_of_tool_turns(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen3")
    renderer = Renderer(tokenizer)
    lines = (shared / "data" / "toolcall_en_300.jsonl").read_text().splitlines()[:20]
    for line in lines:
        data = json.loads(line)
        said = conversation(data)
        rows = renderer.conversation(said, tool_schemas(data))
        texts = [text for row in rows for text in trained(tokenizer, row)]
        for text, message in zip(texts, [m for m in said if m["role"] == "assistant"], strict=True):
            assert message["content"].strip() in text
            assert "<tool_response>" not in text
        assert (
            "search_recipes" not in lines[0] or '"search_recipes"' in tokenizer.decode(rows[0].ids) or line != lines[0]
        )


def test_prompt_has_the_ids_of_inference(tokenizer: Any) -> None:
    for template in TEMPLATES.values():
        tokenizer.chat_template = template
        renderer = Renderer(tokenizer)
        said = messages("single")
        row = renderer.exchange(said[:1], said[1:])
        if template != TEMPLATES["thinking"]:  # there the generation prompt is more than what the turn shares with it
            assert row.ids[: row.loss_mask.index(1)] == renderer.prompt(said[:1])


@pytest.mark.parametrize(
    ("train_on", "texts"),
    [
        ("last_assistant", ["Second one<|im_end|>"]),
        ("all_assistant", ["First answer.<|im_end|>", "Second one<|im_end|>"]),
        ("all_messages", ["a b<|im_end|>", "First answer.<|im_end|>", "c d<|im_end|>", "Second one<|im_end|>"]),
        ("trainable", ["c d<|im_end|>"]),
    ],
)
def test_train_on_selects_the_trained_text(tokenizer: Any, train_on: str, texts: list[str]) -> None:
    said = messages("multi")
    said[2]["trainable"] = True
    (row,) = Renderer(tokenizer).conversation(said, train_on=train_on)
    assert trained(tokenizer, row) == texts


def test_train_on_everything_masks_only_the_first_token(tokenizer: Any) -> None:
    (row,) = Renderer(tokenizer).conversation(messages("multi"), train_on="everything")
    assert row.loss_mask == [0] + [1] * (len(row.ids) - 1)
    assert tokenizer.decode(row.ids) == Renderer(tokenizer).template.render(messages("multi"))


def test_date_in_a_template_is_fixed(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}|" + TEMPLATES["chatml"]
    assert Renderer(tokenizer).prompt_text(messages("single")[:1]).startswith("01 Jan 2025|")


def test_text_bytes_exclude_special_tokens(tokenizer: Any) -> None:
    (row,) = Renderer(tokenizer).conversation(messages("single"))
    assert row.text_bytes == len(CONVERSATIONS["single"][1][1].encode())


def test_decode_ends_at_the_stop_token(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    assert renderer.decode(tokenizer("Hello there<|im_end|>")["input_ids"]) == "Hello there"
    tokenizer.chat_template = TEMPLATES["text end"]
    renderer = Renderer(tokenizer)
    assert renderer.stop_strings == ["[end]"]
    assert renderer.decode(tokenizer("Hello there[end] more")["input_ids"]) == "Hello there"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([("user", "Hi")], "no assistant turn"),
        ([("user", "Hi"), ("assistant", "  ")], "all turns to train on are empty"),
        ([("user", "Hi"), ("assistant", "")], "all turns to train on are empty"),
    ],
)
def test_conversations_without_trained_tokens_are_refused(
    tokenizer: Any, said: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(RowError, match=message):
        Renderer(tokenizer).conversation([{"role": role, "content": content} for role, content in said])


def test_unsuitable_tokenizers_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, format="raw").stop_token_ids == [tokenizer.eos_token_id]
    tokenizer.chat_template = TEMPLATES["text end"]
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no eos_token"):
        Renderer(tokenizer)


def test_raw_format(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, format="raw")
    row = renderer.exchange([{"role": "user", "content": "one two"}], [{"role": "assistant", "content": " three"}])
    assert trained(tokenizer, row) == [" three<|im_end|>"]
    assert row.ids[: row.loss_mask.index(1)] == renderer.prompt([{"role": "user", "content": "one two"}])


def shown(tokenizer: Any, said: list[tuple[str, str]]) -> list[str]:
    rows = Renderer(tokenizer).conversation([{"role": role, "content": content} for role, content in said])
    return [row.show(tokenizer).replace(tokenizer.eos_token, "EOS") for row in rows]


def test_system_message_that_moves_after_the_answer_is_rendered_per_turn(tokenizer: Any) -> None:
    # Mistral 7B v0.3 renders the system message in the last message, if that is the user's.
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
        "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
        "{% if loop.last and s is defined %}[I] {{ s }}|{{ m.content }}[/I]{% else %}[I] {{ m.content }}[/I]{% endif %}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", "And"), ("assistant", "No")]
    assert shown(tokenizer, turns) == ["[I] Hi[/I]⟦ YesEOS⟧[I] And[/I]⟦ NoEOS⟧"]
    wanted = ["[I] Be|Hi[/I]⟦ YesEOS⟧", "[I] Hi[/I] YesEOS[I] Be|And[/I]⟦ NoEOS⟧"]
    assert shown(tokenizer, [("system", "Be"), *turns]) == wanted


def test_opening_of_a_turn_is_not_trained_despite_different_line_breaks(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    said = [("user", "Hi"), ("assistant", "a"), ("assistant", "b")]
    assert shown(tokenizer, said) == ["<user>Hi\n<assistant>⟦aEOS⟧\n<assistant>⟦bEOS⟧"]


@pytest.mark.parametrize("after", ["", "\n\n"])
def test_white_space_before_an_appended_end_token_is_trained(tokenizer: Any, after: str) -> None:
    tokenizer.chat_template = (
        f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content + {after!r} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert shown(tokenizer, [("user", "Hi"), ("assistant", "a\n")]) == [f"<user>Hi{after}<assistant>⟦a\n{after}EOS⟧"]


def test_template_that_strips_trained_text_gives_a_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    body = "{% for m in messages %}<{{ m.role }}>{{ CONTENT }}<|im_end|>{% endfor %}<assistant>"
    said = [("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nYes.  No.")]
    for content, told in (("m.content | trim", 0), ("m.content.split('</think>')[-1]", 1)):
        tokenizer.chat_template = body.replace("CONTENT", content)
        caplog.clear()
        shown(tokenizer, said * 2)
        assert caplog.text.count("leaves out a part of the assistant's message, for example 'hm'") == told
