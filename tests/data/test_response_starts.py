"""If trained answers do not begin where the generation prompt ends, a warning shows both texts."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.response_starts import ResponseStarts
from tests.helpers.cli import rlhf_in_process
from tests.helpers.rows import chats, pairs, write_rows
from tests.helpers.templates import QUIET, THINKING

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
OPENED = THINKING.replace("<think>\n\n</think>\n\n{% endif %}{{ message", "{% endif %}{{ message").replace(
    "<think>\n\n</think>\n\n", "<think>\n"
)
"""Opens a thinking block if thinking is off; no row has one."""
ANSWER = {"role": "assistant", "content": "Fine."}
THOUGHT = {**ANSWER, "reasoning_content": "Hm."}


def said_of(data: Any, tokenizer: Any, caplog: Any) -> str:
    data.tokenizer = tokenizer
    caplog.clear()
    data.setup("fit")
    lines = [r.getMessage() for r in caplog.records if "do not begin where" in r.getMessage()]
    assert len(lines) < 2, "it is said once"
    return lines[0] if lines else ""


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_prompt_and_row_are_shown_where_they_differ(kind: str, tokenizer: Any, caplog: Any) -> None:
    def said(template: str, options: Any) -> str:
        module: Any = SFTDataModule if kind == "sft" else PreferenceDataModule
        rows = chats(3) if kind == "sft" else pairs(3)
        tokenizer.chat_template = template
        return said_of(module(rows, show_example=False, template_kwargs=options), tokenizer, caplog)

    assert said(THINKING, QUIET) == ""
    lacking = said(THINKING, None)  # the rows have an empty thought, the prompt has none
    assert f"{3 if kind == 'sft' else 6} of {3 if kind == 'sft' else 6} trained answers" in lacking
    prompt, row = (line.split("  ")[2] for line in lacking.splitlines()[1:3])
    assert prompt.endswith(r"assistant\n'")
    assert r"assistant\n<think>\n\n</think>\n\n" in row
    opened = said(OPENED, QUIET)
    prompt, row = (line.split("  ")[2] for line in opened.splitlines()[1:3])
    assert prompt.endswith(r"assistant\n<think>\n'")
    assert "<think>" not in row
    assert r"assistant\none" in row or r"assistant\n" in row
    assert said(OPENED, None) == ""


def test_prompts_are_not_compared(tokenizer: Any, caplog: Any) -> None:
    tokenizer.chat_template = OPENED
    data = PromptDataModule([{"prompt": "Hi"}], show_example=False, template_kwargs=QUIET)
    data.tokenizer = tokenizer
    data.text_key = None
    data._prepare("train", required=True)
    assert "do not begin where" not in caplog.text


@pytest.mark.parametrize("template", [f.stem for f in sorted(TEMPLATES.glob("*.jinja"))])
def test_real_templates_with_thinking_give_a_warning(template: str, tokenizer: Any) -> None:
    """The oracle is transformers: the text before the answer equals the prompt, apart from white space."""
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    asked = [{"role": "user", "content": "Hi"}]
    thinks = "reasoning_content" in tokenizer.chat_template
    for options in ({}, QUIET, {"enable_thinking": True}):
        for answer in (ANSWER, THOUGHT) if thinks else (ANSWER,):
            renderer = Renderer(tokenizer, template_kwargs=options)
            renderer.openings = ResponseStarts()
            renderer.conversation([*asked, answer])
            assert renderer.openings.turns == 1
            prompt = renderer.template.render(asked, None, add_generation_prompt=True)
            row = renderer.template.render([*asked, answer])
            before = row[: row.index("Fine.")]
            if answer is THOUGHT:
                assert bool(renderer.openings.differing) == (not row.startswith(prompt.rstrip()))
            else:
                assert bool(renderer.openings.differing) == (before.strip() != prompt.strip())


def test_data_check_reports_response_starts(base: str, tmp_path: Path, capsys: Any) -> None:
    file, template = write_rows(tmp_path / "chats.jsonl", chats(3)), tmp_path / "own.jinja"
    template.write_text(THINKING)
    args = ["data", "check", file, "--kind", "sft", "--model", base, "--chat_template", str(template)]
    rlhf_in_process(*args)
    assert "3 of 3 trained answers do not begin where" in capsys.readouterr().out
    rlhf_in_process(*args, "--json")
    assert json.loads(capsys.readouterr().out)["openings"]["differing"] == 3
    rlhf_in_process(*args, "--template_kwargs", json.dumps(QUIET))
    assert "do not begin where" not in capsys.readouterr().out
