"""The work of chat templates is limited, because they come with models; real templates stay far below the limits."""

import time
from typing import Any

import pytest

from rlhf_lightning.data.template_budget import STEPS
from rlhf_lightning.data.templates import ChatTemplate, _filled
from rlhf_lightning.errors import ConfigError
from tests.helpers.paths import CHAT_TEMPLATES

GROW = "{% set ns=namespace(x='aaaaaaaaaa', y=['aaaa']) %}{% for i in range(60) %}"
ENDLESS = {
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested3": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) if false %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "double": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "plus": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "times": "{{ 'a'*99999999999 }}",
    "list": "{{ ([1]*99999999)*99999 }}",
    "pow": "{{ 9**9**9 }}",
    "center": "{{ 'a'|center(99999999999) }}",
    "ljust": "{{ 'a'.ljust(99999999999) }}",
    "format": "{{ '%999999999999d'|format(1) }}",
    "percent": "{{ '%999999999999d' % 1 }}",
    "strformat": "{{ '{:>9999999999}'.format(1) }}",
    "replace": GROW + "{% set ns.x = ns.x|replace('a','aa') %}{% endfor %}",
    "replace2": GROW + "{% set ns.x = ns.x.replace('a','aa') %}{% endfor %}",
    "recursive": "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "mdouble": "{% macro f(n) %}{{ n ~ n }}{% endmacro %}" + "{% set x='aaaaaaaa' %}" + "{% set x=f(x) %}" * 40 + "",
    "join": GROW + "{% set ns.y = [ns.y|join, ns.y|join] %}{% endfor %}",
    "sort": "{% for i in range(9999) %}{{ range(99999)|list|sort|length }}{% endfor %}",
    "out": "{% for i in range(99999) %}{% for j in range(99) %}" + "x" * 2000 + "{% endfor %}{% endfor %}",
    "cycle": "{% for i in messages[0].content*99999 %}{% for j in messages[0].content*99999 %}{% endfor %}{% endfor %}",
    "slice": "{{ [1]|slice(99999999999)|list|length }}",
    "indent": "{{ messages|tojson(indent=99999999999) }}",
    "block": "{% set x %}{% for i in range(99999) %}" + "y" * 5000 + "{% endfor %}{% endset %}{{ x }}",
    "wordwrap": "{{ ('a '*9999999)|wordwrap(1)|length }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_template_that_never_ends_is_refused(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = ENDLESS[name] + "{{ messages[0].content }}"
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"the chat template .*model\.chat_template"):
        ChatTemplate(tokenizer)
    assert time.process_time() - started < 30


def test_real_templates_need_little_of_the_budget(tokenizer: Any) -> None:
    turns = [{"role": role, "content": f"Turn {i}"} for i in range(200) for role in ("user", "assistant")]
    for path in sorted(CHAT_TEMPLATES.glob("*.jinja")):
        tokenizer.chat_template = path.read_text()
        template = ChatTemplate(tokenizer)
        template.render(turns)
        spent = _filled(tokenizer.chat_template.removeprefix("\ufeff"))[1].steps
        assert 400 <= spent < STEPS / 50, path.name


def test_numbers_in_messages_are_not_widths(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% macro show(text, number) %}{{ text.split('|')[0] }} {{ text|replace('{', '(') }} {{ number }}"
        "{% endmacro %}{% for m in messages %}{{ show(m.content, m.at) }} {{ m.at * 1000 }}{% endfor %}"
    )
    said = [{"role": "user", "content": '{"id": 17000000001, "%99999999d": 1}', "at": 1700000000000}]
    assert ChatTemplate(tokenizer).render(said) == (
        '{"id": 17000000001, "%99999999d": 1} ("id": 17000000001, "%99999999d": 1} 1700000000000 1700000000000000'
    )
