"""Real chat templates render as in transformers, and the assistant's turns are trained up to their end."""

import copy
import json
import re
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.contents import ContentParts
from rlhf_lightning.data.conversations import conversation
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.templates import ChatTemplate
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.quickstart.model import make_tokenizer
from tests.helpers.models import TEXTS
from tests.helpers.paths import CHAT_TEMPLATES

NAMES = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
MARKERS = re.compile(r"<[|｜][^<>'\" ]*?[|｜]>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "é <b>"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It's < 5", "parameters": SCHEMA}}]
CALL = {"type": "function", "id": "abc123456", "function": {"name": "weather", "arguments": {"city": "Örebro"}}}
# The end of a turn with a tool call in each template, found by hand; other templates write an eos_token or nothing.
ENDS = {"gptoss": ["<|call|>", "<|return|>"], "phi3": ["<|end|>"], "phi3_5": ["<|end|>"], "glm4moe": []}
ENDS |= {name: ["<|eot_id|>"] for name in ("llama3", "llama3_1", "llama3_2")}
ENDS |= {name: ["<end_of_turn>"] for name in ("gemma", "gemma3")}
ENDS |= {"cohere": ["<|END_OF_TURN_TOKEN|>"], "deepseekv3": ["<｜end▁of▁sentence｜>"]}

_MADE: dict[str, Renderer] = {}
TEXT = st.one_of(
    st.sampled_from(["", " ", "Hi", "  Two words \n", "a\n\nb", "{{ x }} {% y %}", '<b>"it\'s" & more</b>', "é😀 ü"]),
    st.text(alphabet="ab \n.é{}<>", max_size=12),
)


def renderer_of(name: str) -> Renderer:
    """A renderer of a real template, with a tokenizer that has its special tokens."""
    if name not in _MADE:
        tokenizer = make_tokenizer(TEXTS * 5)
        tokenizer.chat_template = (CHAT_TEMPLATES / f"{name}.jinja").read_text()
        tokenizer.add_special_tokens(
            {"additional_special_tokens": sorted(set(MARKERS.findall(tokenizer.chat_template)))}
        )
        if name == "deepseekv3":
            tokenizer.eos_token = "<｜end▁of▁sentence｜>"
        _MADE[name] = Renderer(tokenizer)
    return _MADE[name]


class FixedDate(datetime):
    """A fixed clock for transformers."""

    @classmethod
    def now(cls, tz: Any = None) -> "FixedDate":
        return cls(2025, 1, 1)


@pytest.fixture(scope="module", autouse=True)
def fixed_clock() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.utils.chat_template_utils.datetime", FixedDate)
    yield
    patch.undo()


def by_transformers(tokenizer: Any, messages: Any, tools: Any = None, prompts: bool = False, **options: Any) -> Any:
    """The rendering by transformers; None if the template refuses the messages."""
    known = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    try:
        return tokenizer.apply_chat_template(
            copy.deepcopy(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompts,
            **{**known, **options},
        )
    except Exception:  # noqa: BLE001 - a template may fail by anything
        return None


@st.composite
def talks(draw: Any) -> list[dict[str, Any]]:
    """A conversation that ends with a nonempty assistant turn."""
    said = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        said += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    last = draw(TEXT.filter(lambda text: text.strip()))
    return [*said, {"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": last}]


def each_template(count: int) -> Any:
    """A number of examples for each template, the same in every run."""

    def decorate(function: Any) -> Any:
        checks = list(HealthCheck)
        fixed = settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks)(function)
        return pytest.mark.parametrize("name", NAMES)(fixed)

    return decorate


@each_template(25)
@given(said=talks(), prompts=st.booleans(), data=st.data())
def test_rendering_equals_that_of_transformers(name: str, said: list[dict[str, Any]], prompts: bool, data: Any) -> None:
    renderer = renderer_of(name)
    said = said[: data.draw(st.integers(1, len(said)))]
    tools = data.draw(st.sampled_from([None, TOOLS]))
    wanted = by_transformers(renderer.tokenizer, said, tools, prompts)
    before = copy.deepcopy(said)
    if wanted is None:
        with pytest.raises(RowError, match="rejects the conversation"):
            renderer.template.render(said, tools, prompts)
    else:
        assert renderer.template.render(said, tools, prompts) == wanted
    assert said == before


@each_template(15)
@given(texts=st.lists(TEXT, min_size=1, max_size=3), role=st.sampled_from(["system", "user", "assistant"]))
def test_contents_in_parts_render_as_in_transformers(name: str, texts: list[str], role: str) -> None:
    """As parts if transformers renders the parts; as text if the template prints the list, fails, or drops a part."""
    renderer = renderer_of(name)
    parts = [{"type": "text", "text": text} for text in texts]
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    said = [{"role": "system", "content": "Be kind."}, *said] if role == "system" else said
    place = [message["role"] for message in said].index(role)

    def having(content: Any) -> list[dict[str, Any]]:
        return [{**m, "content": content} if i == place else m for i, m in enumerate(said)]

    wanted = by_transformers(renderer.tokenizer, having(parts))
    pair = by_transformers(renderer.tokenizer, having([{"type": "text", "text": text} for text in ("Qa", "Zb")]))
    if pair is None or "'text'" in pair or '"text"' in pair or not re.search(r"Qa\s*Zb", pair):
        wanted = by_transformers(renderer.tokenizer, having("".join(texts)))
    read = conversation({"messages": having(parts)})
    assert read[place]["content"] == "".join(texts), "everything but the template reads the text"
    for given_ in (having(parts), read):
        if wanted is None:
            with pytest.raises(RowError):
                renderer.template.render(given_)
        else:
            assert renderer.template.render(given_) == wanted


def test_copies_and_pickles_keep_content_parts() -> None:
    import pickle

    content = ContentParts([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}])
    for twin in (copy.deepcopy(content), pickle.loads(pickle.dumps(content))):
        assert (twin, twin.parts) == ("a b", content.parts)
    assert json.dumps({"content": content}) == '{"content": "a b"}'
    # gemma3 trims each part, so the same text in other parts renders differently.
    render = renderer_of("gemma3").template.render
    assert "\nab<end" in render([{"role": "user", "content": content}])
    assert "\na b<end" in render([{"role": "user", "content": "a b"}])


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("name", NAMES)
def test_tool_turns_render_as_in_transformers(name: str, tools: Any) -> None:
    """Arguments as an object, or as JSON text if the template fails on an object."""
    renderer = renderer_of(name)
    function = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"], ensure_ascii=False)}

    def talk(call: Any, end: int) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abc123456", "name": "weather", "content": "Rain <b>"},
            {"role": "assistant", "content": "It rains."},
        ][:end]

    fails = by_transformers(renderer.tokenizer, talk(CALL, 2), tools) is None
    call = {**CALL, "function": function} if fails else CALL
    for end in range(1, 5):
        for prompts in (False, True):
            wanted = by_transformers(renderer.tokenizer, talk(call, end), tools, prompts)
            read, text = conversation({"messages": talk(CALL, end)}), None
            with suppress(RowError):
                text = renderer.template.render(read, tools, prompts)
            assert text == wanted or (text is None and "tool_calls" not in renderer.tokenizer.chat_template)


def test_null_keys_of_content_parts_are_dropped() -> None:
    part = {"type": "text", "text": "a", "image_url": None}
    [message] = conversation({"messages": [{"role": "user", "content": [part]}]})
    assert message["content"].parts == [{"type": "text", "text": "a"}]


@each_template(10)
@given(said=talks())
def test_trained_text_is_the_assistant_turns_with_their_ends(name: str, said: list[dict[str, Any]]) -> None:
    renderer = renderer_of(name)
    tokenizer = renderer.tokenizer
    if by_transformers(tokenizer, said) is None:
        return
    rows = renderer.conversation(said)
    texts = []
    for row in rows:
        run: list[int] = []
        for token, trained in [*zip(row.ids, row.loss_mask, strict=True), (0, 0)]:
            if trained:
                run.append(token)
            elif run:
                texts.append(tokenizer.decode(run))
                assert run[-1] in renderer.stop_token_ids
                run = []
    turns = [i for i, message in enumerate(said) if message["role"] == "assistant"]
    assert len(texts) == len(turns)
    for i, text in zip(turns, texts, strict=True):
        full = by_transformers(tokenizer, said[: i + 1])
        prompt = by_transformers(tokenizer, said[:i], prompts=True)
        end = next((end for end in renderer.template.end_markers if text.endswith(end)), tokenizer.eos_token)
        # The text that a model has to write: everything after the prompt, up to the end of the turn.
        wanted = full[len(prompt) :] if full.startswith(prompt) else full[full.rindex(said[i]["content"].strip()) :]
        wanted = wanted.rstrip().removesuffix("<|im_end|>" if name.startswith("phi") else "").rstrip()
        wanted = wanted if wanted.endswith(end) else wanted + end
        assert text == wanted if full.startswith(prompt) else text.endswith(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_turn_ends_with_a_stop_token(name: str) -> None:
    renderer = renderer_of(name)
    tokenizer = renderer.tokenizer
    assert renderer.template.end_markers == ENDS.get(name, ["<|im_end|>"])
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    asked = {"role": "user", "content": "Hi"}
    for turn in ({"role": "assistant", "content": "Hello"}, called, {**called, "tool_calls": [CALL, CALL]}):
        try:
            rows = renderer.conversation([asked, turn])
        except RowError:  # it shows no calls, or one at a time
            assert turn is not called or "tool_calls" not in tokenizer.chat_template
            continue
        for row in rows:
            ends = [
                token in renderer.stop_token_ids
                for token, trained in zip(row.ids, row.loss_mask, strict=True)
                if trained
            ]
            assert ends == [False] * (len(ends) - 1) + [True], "at its end, and nowhere before"


def test_different_ends_of_turns(tokenizer: Any) -> None:
    tokens = ["<|done|>", "<|call_end|>", "<|section|>", "<|eom|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    body = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}CALL{% endfor %}{% if m.tool_calls %}TOOLS{% else %}PLAIN{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}END{% endif %}"
    )

    def ends(**texts: str) -> tuple[list[str], Renderer]:
        source = body
        for key in ("CALL", "TOOLS", "PLAIN", "END"):
            source = source.replace(key, texts.get(key, ""))
        tokenizer.chat_template = source
        renderer = Renderer(tokenizer)
        return sorted(tokenizer.convert_ids_to_tokens(renderer.turn_end_ids)), renderer

    eos = tokenizer.eos_token
    # The last token of a turn is its end, not the sections before it, and not the token that ends the text.
    found, _ = ends(PLAIN="<|section|><|done|>\n", TOOLS="<|section|><|eom|>", CALL="<|call_end|>", END=eos)
    assert found == sorted([eos, "<|done|>", "<|eom|>"])
    # The end of one of several calls does not end the turn; the eos_token ends turns without another end.
    found, renderer = ends(PLAIN="<|done|>", CALL="<|call_end|>")
    assert found == sorted([eos, "<|done|>"])
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    (row,) = renderer.conversation(said)
    assert tokenizer.decode(row.ids).endswith(f"<|call_end|>{eos}")
    # A template that always adds the generation prompt.
    found, _ = ends(PLAIN="<|done|>", END="<|section|>assistant")
    assert found == sorted([eos, "<|done|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|section|>{{ m.role }}\n{{ m.content }}<|done|>{% endfor %}<|section|>assistant\n"
    )
    assert Renderer(tokenizer).template.end_markers == ["<|done|>"]


# -- features of templates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('" + codes + "') }}"
        for codes in ("%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A %j %U %%d", "%H:%M:%S %p %y %a %x", "100%")
    ]
    + [
        "{% set d = strftime_now('%d %B %Y') %}  {{ d }}\n",
        "  {% if strftime_now is defined %}\n{{ strftime_now('%F') }}{% endif %}\n\n",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% continue %}x{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endfor %}",
        "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ dict(a=1) }}{{ messages[0].pop('role') }}",
        "{{ messages[0].__class__ }}{{ cycler.__init__.__globals__ }}",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(undefined_name) }}{{ bos_token }}{{ eos_token }}",
    ],
)
def test_features_used_by_templates(tokenizer: Any, source: str) -> None:
    said = [{"role": "user", "content": "é <b>"}, {"role": "assistant", "content": "Hi"}]
    tokenizer.chat_template = source + "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}\n"
    wanted = by_transformers(tokenizer, said)
    if wanted is None:
        with pytest.raises(RowError, match="rejects the conversation"):
            ChatTemplate(tokenizer).render(said)
    else:
        assert ChatTemplate(tokenizer).render(said) == wanted


def test_fixed_date_does_not_affect_transformers(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = "{{ strftime_now('%B %-d, %Y') }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", datetime)
    said = [{"role": "user", "content": "Hi"}]
    for _ in range(2):
        assert ChatTemplate(tokenizer).render(said) == "January 1, 2025|Hi"
        assert by_transformers(tokenizer, said) == f"{datetime.now():%B %-d, %Y}|Hi"


def test_exception_of_a_template_is_reported(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('Only two turns') }}"
    with pytest.raises(RowError, match="Only two turns"):
        Renderer(tokenizer).prompt([{"role": "user", "content": "Hi"}])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content / 0 }}{% endfor %}"
    with pytest.raises(RowError, match="rejects the conversation"):
        Renderer(tokenizer).prompt([{"role": "user", "content": "Hi"}])


def test_byte_order_mark_of_a_template_is_ignored(base: str, tokenizer: Any, tmp_path: Path) -> None:
    source, mark = tokenizer.chat_template, "\ufeff"
    said = [{"role": "user", "content": "Hi"}]
    wanted = Renderer(tokenizer).prompt_text(said)
    (tmp_path / "own.jinja").write_text(mark + source, encoding="utf-8")
    assert load_tokenizer(base, chat_template=str(tmp_path / "own.jinja")).chat_template == source
    (Path(base) / "chat_template.jinja").write_text(mark + source, encoding="utf-8")
    loaded = load_tokenizer(base)
    assert loaded.chat_template == source, "what is saved has none either"
    tokenizer.chat_template = mark + source
    for each in (loaded, tokenizer):
        assert Renderer(each).prompt_text(said) == wanted
    (tmp_path / "wide.jinja").write_text(source, encoding="utf-16")
    (tmp_path / "none.jinja").write_text(mark, encoding="utf-8")
    for name, said_ in (("wide", "not UTF-8"), ("none", "is empty")):
        with pytest.raises(ConfigError, match=said_):
            load_tokenizer(base, chat_template=str(tmp_path / f"{name}.jinja"))


def test_unused_template_kwargs_give_a_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    said = [{"role": "user", "content": "Hi"}]
    tokenizer.chat_template = tokenizer.chat_template + "{% if calm is defined and calm %}CALM{% endif %}"
    assert Renderer(tokenizer, template_kwargs={"calm": True}).prompt_text(said).endswith("CALM")
    assert not caplog.text
    Renderer(tokenizer, template_kwargs={"claim": True})
    assert "does not read claim; it reads calm" in caplog.text
    for name in ("tools", "add_generation_prompt", "continue_final_message"):
        with pytest.raises(ConfigError, match=f"template_kwargs has '{name}'"):
            Renderer(tokenizer, template_kwargs={name: True})


@pytest.mark.slow
def test_rendering_is_as_fast_as_that_of_transformers() -> None:
    """CPU seconds for a file of rows, the minimum of five; rows with spans need several renderings each."""
    renderer = renderer_of("qwen3")
    rows = [[{"role": "user", "content": f"Count {i}"}, {"role": "assistant", "content": "one"}] for i in range(300)]

    def seconds(function: Any) -> float:
        times = []
        for _ in range(5):
            begin = time.process_time()
            for row in rows:
                function(row)
            times.append(time.process_time() - begin)
        return min(times)

    assert seconds(renderer.template.render) < 1.5 * seconds(lambda row: by_transformers(renderer.tokenizer, row))
