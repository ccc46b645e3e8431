"""Every template shows each tool call once, in whichever form it is stored, and never encodes it twice.

The oracle is the rendering by transformers of the form that a template is written for."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.conversations import conversation, tool_schemas
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.data.templates import ChatTemplate
from rlhf_lightning.data.tool_calls import Written
from rlhf_lightning.environments.base import StepResult, checked_messages, checked_result
from rlhf_lightning.errors import DataError
from tests.helpers.paths import CHAT_TEMPLATES
from tests.helpers.rows import ready

TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}CALL<|im_end|>\n{% endfor %}{% if not m.tool_calls %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = '<tool_call>{"name": "{{ c.function.name }}", "arguments": ARGS}</tool_call>'
TEMPLATES = {
    "object": TURN.replace("CALL", NAMED.replace("ARGS", "{{ c.function.arguments | tojson }}")),
    "text": TURN.replace("CALL", NAMED.replace("ARGS", "{{ c.function.arguments }}")),
    "joined text": TURN.replace("CALL", "{{ c.function.name + '\n' + c.function.arguments }}"),
    "either": TURN.replace(
        "CALL",
        NAMED.replace(
            "ARGS",
            "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
            "{{ c.function.arguments | tojson }}{% endif %}",
        ),
    ),
    "whole": TURN.replace("CALL", "{{ c.function | tojson }}"),
    # Mistral refuses ids of another length, and calls without ids.
    "nine": TURN.replace(
        "CALL",
        "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids must have 9 characters') }}"
        '{% endif %}{{ c.function | tojson }}, "id": "{{ c.id }}"',
    ).replace("{{ m.content }}", "{{ m.content }}{% if m.tool_call_id is defined %}[{{ m.tool_call_id }}]{% endif %}"),
    # Kimi: only the id names the function.
    "named": TURN.replace("CALL", "{{ c.id }}{{ c.function.arguments | tojson }}"),
}
SCHEMA = {"name": "book", "description": "Book a table.", "parameters": {"type": "object", "properties": {"x": {}}}}
WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"], exclude_characters="<>"), max_size=8)
VALUES = st.recursive(
    WORDS | st.integers(-1000, 1000) | st.booleans() | st.just("\"quoted\" \\ and 'single'\n"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(WORDS.filter(str.strip), VALUES, max_size=3).map(lambda d: {"mark": "one of a kind", **d})
CALLS = st.lists(st.tuples(st.sampled_from(["book", "search_web"]), ARGUMENTS), min_size=1, max_size=2)


def canonical(calls: list[tuple[str, dict[str, Any]]], ids: bool = True) -> list[dict[str, Any]]:
    """A conversation in OpenAI's format, with arguments as objects."""
    turn = [
        {**({"id": f"call_{i}"} if ids else {}), "type": "function", "function": {"name": n, "arguments": a}}
        for i, (n, a) in enumerate(calls)
    ]
    answers = [
        {"role": "tool", **({"tool_call_id": f"call_{i}"} if ids else {}), "content": "Found."}
        for i in range(len(turn))
    ]
    asked, done = {"role": "user", "content": "Book it."}, {"role": "assistant", "content": "Done."}
    return [asked, {"role": "assistant", "content": None, "tool_calls": turn}, *answers, done]


def stored(calls: list[tuple[str, dict[str, Any]]], form: str) -> list[dict[str, Any]]:
    """The same conversation in one of the stored forms."""
    said = canonical(calls, ids=form in ("object", "text", "all text", "anthropic"))
    turn, flat = said[1], [{"name": name, "arguments": arguments} for name, arguments in calls]
    if form in ("text", "all text"):
        for call in turn["tool_calls"]:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    if form == "all text":
        turn["tool_calls"] = json.dumps(turn["tool_calls"])
    if form == "flat":
        turn["tool_calls"] = flat
    if form == "function_call":
        del turn["tool_calls"]
        turn["function_call"] = {"name": calls[0][0], "arguments": json.dumps(calls[0][1])}
        said[2:-1] = [{"role": "function", "name": calls[0][0], "content": "Found."}]
    if form == "sharegpt":
        value = json.dumps(flat[0] if len(flat) == 1 else flat)
        said[1] = {"role": "function_call", "content": value}
        said[2:-1] = [{"role": "observation", "content": "Found."} for _ in calls]
        said = [{"from": m["role"], "value": m["content"]} for m in said]
    if form == "marked":
        said[1] = {"role": "assistant", "content": json.dumps(flat), "tool_call": True}
    if form == "anthropic":
        parts = [{"type": "tool_use", "id": f"call_{i}", "name": name, "input": a} for i, (name, a) in enumerate(calls)]
        results = [
            {"type": "tool_result", "tool_use_id": f"call_{i}", "content": [{"type": "text", "text": "Found."}]}
            for i in range(len(calls))
        ]
        said[1:-1] = [{"role": "assistant", "content": parts}, {"role": "user", "content": results}]
    return said


FORMS = ("object", "text", "all text", "flat", "function_call", "sharegpt", "marked", "anthropic")


def objects(text: str) -> list[Any]:
    """Every JSON object in a text, including nested ones."""
    decoder, found = json.JSONDecoder(), []
    for start in (i for i, character in enumerate(text) if character == "{"):
        try:
            found.append(decoder.raw_decode(text, start)[0])
        except ValueError:
            continue
    return found


def rendered(tokenizer: Any, template: str, said: list[dict[str, Any]]) -> str:
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer).render(conversation({"messages": said}))


def learnt(tokenizer: Any, template: str, said: list[dict[str, Any]]) -> str:
    tokenizer.chat_template = template
    rows = ready(SFTDataModule([{"messages": said}], tokenizer=tokenizer)).prepared["train"].rows
    return "".join(tokenizer.decode(row.ids) for row in rows)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(calls=CALLS, form=st.sampled_from(FORMS))
def test_every_call_is_shown_once(
    session_tokenizer: Any, template: str, calls: list[tuple[str, dict[str, Any]]], form: str
) -> None:
    calls = calls[:1] if form == "function_call" else calls
    tokenizer = copy.copy(session_tokenizer)
    text = rendered(tokenizer, TEMPLATES[template], stored(calls, form))
    found = objects(text)
    for _, arguments in calls:
        assert found.count(arguments) == [a for _, a in calls].count(arguments), (text, arguments)
    if template in ("nine", "named"):
        return
    said = canonical(calls)
    if "text" in template:
        for call in said[1]["tool_calls"]:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    assert text == tokenizer.apply_chat_template(said, tokenize=False)


def real_templates() -> list[str]:
    return [path.stem for path in sorted(CHAT_TEMPLATES.glob("*.jinja"))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("template", real_templates())
def test_real_templates_show_the_object_once_or_give_a_warning(tokenizer: Any, template: str, form: str) -> None:
    calls = [("book", {"city": "Lyon d'Or", "guests": 2, "plan": {"a": ["é", True]}})]
    source = (CHAT_TEMPLATES / f"{template}.jinja").read_text()
    silent = ("tool_calls" not in source) and form not in ("sharegpt", "marked")
    if silent or "must alternate" in source or "phi3" in template:
        lost = r"does not render tool calls|must alternate|leaves out a message of role 'tool'"
        with pytest.raises(DataError, match=lost):
            learnt(tokenizer, source, stored(calls, form))
        return
    text = rendered(tokenizer, source, stored(calls, form))
    if "<arg_key>" in source or "<parameter=" in source:
        assert text.count("Lyon d'Or") == text.count("guests") == 1
        assert objects(text.replace("<arg_value>", " ")) == [calls[0][1]["plan"]]
    else:
        assert objects(text).count(calls[0][1]) == 1
    assert '\\"' not in text


def test_call_ids_fit_the_template(tokenizer: Any) -> None:
    calls = [("book", {"a": 1}), ("book", {"a": 2})]
    texts = {form: rendered(tokenizer, TEMPLATES["nine"], stored(calls, form)) for form in ("object", "flat")}
    for text in texts.values():
        first, second = (part.split('"')[0] for part in text.split('"id": "')[1:])
        assert first != second
        assert all(len(one) == 9 and one.isalnum() for one in (first, second))
        assert text.index(f"[{first}]") < text.index(f"[{second}]"), "results answer their calls, in order"
    own = stored(calls, "object")
    own[1]["tool_calls"][0]["id"] = own[2]["tool_call_id"] = "abcDEF123"
    assert rendered(tokenizer, TEMPLATES["nine"], own).count("abcDEF123") == 2, "an id that fits is left"
    text = rendered(tokenizer, TEMPLATES["named"], stored(calls, "flat"))
    assert 'functions.book:0{"a": 1}' in text
    assert 'functions.book:1{"a": 2}' in text


def test_results_that_are_objects(tokenizer: Any) -> None:
    said = canonical([("book", {})])
    quoting = TEMPLATES["object"].replace("{{ m.content }}", "{{ m.content | tojson }}")
    for value in ({"ok": True}, [1, 2], [{"a": "b"}]):
        said[2]["content"] = value
        for template in (TEMPLATES["object"], quoting):
            assert f"<|im_start|>tool\n{json.dumps(value)}<|im_end|>" in rendered(tokenizer, template, said)
    said[2]["content"] = 7
    assert "<|im_start|>tool\n7<|im_end|>" in rendered(tokenizer, TEMPLATES["object"], said)


def test_content_that_a_template_leaves_out_is_reported(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    said = canonical([("book", {"a": 1}), ("book", {"a": 2})])
    with pytest.raises(DataError, match="does not render tool calls"):
        ready(SFTDataModule([{"messages": said}], tokenizer=tokenizer))
    first = TEMPLATES["object"].replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(DataError, match="only the first tool call of a message, but this message has 2"):
        learnt(tokenizer, first, said)
    with pytest.raises(DataError, match="does not render 'thinking' of a message"):
        learnt(tokenizer, TEMPLATES["object"], [said[0], {"role": "assistant", "content": "a", "thinking": "b"}])
    only = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="leaves out a message of role 'system' at the beginning"):
        learnt(tokenizer, only, [{"role": "system", "content": "a"}, said[0], said[-1]])
    with pytest.raises(DataError, match="the row has tools, but the chat template does not render tools"):
        ready(PromptDataModule([{"prompt": "Hi", "tools": [SCHEMA]}], tokenizer=tokenizer))
    with pytest.raises(DataError, match="format raw cannot render tool calls"):
        Renderer(tokenizer, "raw").conversation(said)
    said[1]["content"] = "Let me see."
    beside = TEMPLATES["object"].replace("{% if m.content %}", "{% if m.content and not m.tool_calls %}")
    assert "Let me see." not in learnt(tokenizer, beside, said)
    assert "leaves out the text of messages that have tool calls" in caplog.text


def test_developer_message_becomes_a_system_message(tokenizer: Any) -> None:
    knows = "{% for m in messages %}{% if m.role != 'developer' %}{{ m.role }}: {{ m.content }}<|im_end|>{% endif %}"
    said = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = rendered(tokenizer, knows + "{% endfor %}", said)
    assert text == "system: Be kind.<|im_end|>user: Hi<|im_end|>"
    assert rendered(tokenizer, TEMPLATES["object"], said).startswith("<|im_start|>developer")


@pytest.mark.parametrize(("given", "wanted"), [("thinking", "thinking"), ("reasoning", "reasoning_content")])
def test_reasoning_is_passed_under_the_key_of_the_template(tokenizer: Any, given: str, wanted: str) -> None:
    template = TEMPLATES["object"].replace("{% if m.content %}", f"{{{{ m.{wanted} }}}}{{% if m.content %}}")
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", given: "Polite now."}]
    assert "Polite now.Hello" in rendered(tokenizer, template, said)


@pytest.mark.parametrize(
    "tools",
    [
        [SCHEMA],
        SCHEMA,
        json.dumps([SCHEMA]),
        [json.dumps(SCHEMA)],
        [{"type": "function", "function": SCHEMA}],
        [{"type": "function", **SCHEMA}],
        [{"name": "book", "description": "Book a table.", "input_schema": SCHEMA["parameters"]}],
        [{"function_declarations": [SCHEMA]}],
    ],
)
def test_tools_in_every_form(tools: Any) -> None:
    assert tool_schemas({"tools": tools}) == [{"type": "function", "function": SCHEMA}]
    assert tool_schemas({"functions": tools}) == [{"type": "function", "function": SCHEMA}]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}, "call of 'f' are text that is not a JSON object"),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}, "NaN is not JSON"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, r"are list \[1\]; they must be a JSON object"),
        ({"tool_calls": [{"arguments": {}}]}, "must be an object with 'name' and 'arguments'"),
        ({"tool_calls": "["}, "the tool call is text that is not JSON"),
        (
            {"tool_calls": [{"name": "f"}], "function_call": {"name": "g"}},
            "tool calls in two places, one of them 'function_call'",
        ),
        ({"tool_call": True, "content": "I call f"}, "the tool call is text that is not JSON"),
        ({"role": "user", "tool_calls": [{"name": "f"}]}, "only the assistant can call tools"),
    ],
)
def test_malformed_calls(tokenizer: Any, turn: dict[str, Any], message: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", **turn}]}]
    with pytest.raises(DataError, match=rf"list\[0\]: message 1 \((user|assistant)\).*{message}"):
        ready(SFTDataModule(rows, tokenizer=tokenizer))


def test_written_is_a_str() -> None:
    one = Written('{"a": 1}', {"a": 1})
    assert (copy.deepcopy(one), json.dumps(one)) == ('{"a": 1}', '"{\\"a\\": 1}"')
    assert copy.deepcopy(one).value == {"a": 1}


def test_environment_messages_are_read_like_rows() -> None:
    said = canonical([("book", {"a": 1})])[:3]
    assert checked_messages(stored([("book", {"a": 1})], "text")[:3]) == said
    result = checked_result(StepResult(next_messages=[{"role": "tool", "content": {"a": 1}}]))
    assert result.next_messages == [{"role": "tool", "content": '{"a": 1}'}]
    with pytest.raises(TypeError, match=r"step\(\) returned next_messages: message 0 \(user\): content is int 1"):
        checked_result(StepResult(next_messages=[{"role": "user", "content": 1}]))


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1e39, 10**400])
def test_environment_rewards_beyond_float32(reward: float) -> None:
    with pytest.raises(ValueError, match=r"step\(\) returned reward .*; it must be a finite number"):
        checked_result(StepResult(reward=reward))


def test_prompts_of_rl_with_calls(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["object"]
    said = stored([("book", {"a": 1})], "text")[:-1]
    row = ready(PromptDataModule([{"prompt": said}], tokenizer=tokenizer)).prepared["train"].rows[0]
    assert '"arguments": {"a": 1}' in tokenizer.decode(row.ids)
