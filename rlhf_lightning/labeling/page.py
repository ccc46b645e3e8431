"""The pages that annotators see. Answers are shown as Markdown; tags in them stay text, and images are not loaded."""

from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

from rlhf_lightning.files import as_json, visible
from rlhf_lightning.labeling.comparisons import Candidate
from rlhf_lightning.labeling.queue import Progress, Shown
from rlhf_lightning.report.html import Html, details, el
from rlhf_lightning.types import Message

NOTE = 2000
"""Largest number of characters of a note."""
NAME = 40
"""Largest number of characters of a name."""
BUTTONS = (
    ("A", "A is better", "a"),
    ("B", "B is better", "b"),
    ("tie", "Tie", "t"),
    ("both_bad", "Both bad", "x"),
    ("skip", "Skip", "s"),
)
"""Choices with the text and the key of their button."""


def _open_link(self: RendererProtocol, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    """A link that opens in a new tab, without a referrer."""
    href = str(tokens[index].attrs.get("href", ""))
    return str(el("a", href=href, title=href, rel="noopener noreferrer", target="_blank")).removesuffix("</a>")


_MARKDOWN = MarkdownIt("js-default", {"html": False, "breaks": True}).disable("image")
_MARKDOWN.add_render_rule("link_open", _open_link)


def markdown(text: str) -> Html:
    """Markdown as HTML: tags in it become text, images become links, and only links to web and mail addresses stay.

    Args:
        text: The Markdown.
    """
    return Html(_MARKDOWN.render(visible(text.replace("\r\n", "\n"))))


def page(title: str, *content: Html | None, refresh: int | None = None) -> str:
    """A whole page.

    Args:
        title: Its title.
        *content: Its content.
        refresh: Seconds after which the browser loads it again.
    """
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        el("title", title),
        Html('<link rel="stylesheet" href="/label.css"><script src="/label.js" defer></script>'),
        Html(f'<meta http-equiv="refresh" content="{refresh}">') if refresh else None,
    ]
    return "<!doctype html>\n" + el("html", el("head", *head), el("body", el("main", *content)), lang="en")


def sign_in_page(names: Sequence[str], token: bool, problem: str | None = None) -> str:
    """The page on which an annotator gives a name.

    Args:
        names: The names to choose from; empty if any name may be given.
        token: True if a token must be given.
        problem: What was wrong with the last attempt.
    """
    if names:
        name = el("select", *(el("option", one) for one in names), name="name", id="name")
    else:
        given = {"maxlength": str(NAME), "required": "", "autofocus": "", "autocomplete": "username"}
        name = _void("input", name="name", id="name", **given)
    asked = [
        el("label", "Token", for_="token"),
        _void("input", name="token", id="token", type="password", required="", autocomplete="off"),
    ]
    form = el(
        "form",
        el("label", "Your name", for_="name"),
        name,
        *(asked if token else []),
        el("button", "Begin"),
        method="post",
        action="/sign-in",
        class_="sign-in",
    )
    lead = "You will see two answers to a prompt at a time, and choose the better one."
    return page("Compare answers", el("h1", "Compare answers"), el("p", lead), _problem(problem), form)


def comparison_page(annotator: str, csrf: str, shown: Shown, progress: Progress, problem: str | None = None) -> str:
    """The page on which an annotator compares two answers.

    Args:
        annotator: Name of the annotator.
        csrf: Token that a form must send.
        shown: The comparison.
        progress: The annotator's progress.
        problem: Why the last decision was not stored.
    """
    question = shown.comparison.question
    context = [_message(message) for message in question.messages]
    if question.tools:
        context.insert(0, details("Tools", el("pre", as_json(question.tools, indent=2))))
    answers = [
        el("section", el("h2", f"Answer {letter}"), *_answer(candidate), class_="answer", id=letter)
        for letter, candidate in zip("AB", shown.answers, strict=True)
    ]
    buttons = [
        el("button", text, " ", el("kbd", key), name="choice", value=choice, data_key=key)
        for choice, text, key in BUTTONS
    ]
    form = el(
        "form",
        _hidden("csrf", csrf),
        _hidden("comparison", shown.comparison.id),
        el("div", *buttons, _undo(progress), class_="buttons"),
        el("label", "Note ", el("kbd", "n"), for_="note"),
        el("textarea", name="note", id="note", rows="1", maxlength=str(NOTE)),
        method="post",
        action="/decide",
        class_="decide",
    )
    return page(
        "Compare answers",
        _header(annotator, csrf, progress),
        _problem(problem),
        el("section", *context, class_="prompt", tabindex="0", aria_label="Prompt"),
        el("div", *answers, class_="answers"),
        form,
    )


def waiting_page(annotator: str, csrf: str, progress: Progress, coming: bool, failed: bool) -> str:
    """The page that is shown while no comparison is ready.

    Args:
        annotator: Name of the annotator.
        csrf: Token that a form must send.
        progress: The annotator's progress.
        coming: True if more answers are being sampled.
        failed: True if sampling ended with an error.
    """
    if coming:
        text = "The next answers are being made. This page loads again by itself."
    elif failed:
        text = "Making answers has failed; the terminal in which rlhf label runs says why. Your decisions are stored."
    else:
        text = "Nothing is left for you to compare. Thank you."
    form = el("form", _hidden("csrf", csrf), _undo(progress), method="post", action="/undo", class_="waiting")
    return page(
        "Compare answers", _header(annotator, csrf, progress), el("p", text), form, refresh=2 if coming else None
    )


def problem_page(problem: str) -> str:
    """A page that says why a request was refused.

    Args:
        problem: The reason.
    """
    return page("Compare answers", _problem(problem), el("p", el("a", "Continue", href="/")))


def _header(annotator: str, csrf: str, progress: Progress) -> Html:
    leave = el(
        "form", _hidden("csrf", csrf), el("button", "Not you?"), method="post", action="/sign-out", class_="leave"
    )
    counts = el("span", f"{progress.decided} decided, {progress.remaining} ready", class_="counts")
    return el("header", el("span", annotator, class_="name"), leave, counts)


def _answer(candidate: Candidate) -> list[Html]:
    first = candidate.messages[0]
    shown = [_content(first), *(_message(message) for message in candidate.messages[1:])]
    if candidate.source.get("stop_reason") == "length":
        shown.append(el("p", "The answer was cut off at the token limit.", class_="cut"))
    return shown


def _message(message: Message) -> Html:
    return el("div", el("h3", message["role"]), _content(message), class_="message")


def _content(message: Message) -> Html:
    """Text, reasoning and tool calls of a message."""
    reasoning = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning")
    calls = message.get("tool_calls")
    return el(
        "div",
        details("Reasoning", markdown(reasoning)) if reasoning else None,
        markdown(message["content"] or ""),
        el("pre", as_json(calls, indent=2)) if calls else None,
        class_="text",
        dir="auto",
    )


def _undo(progress: Progress) -> Html:
    disabled = None if progress.decided else ""
    return el("button", "Undo ", el("kbd", "u"), formaction="/undo", data_key="u", disabled=disabled)


def _hidden(name: str, value: str) -> Html:
    return _void("input", type="hidden", name=name, value=value)


def _void(tag: str, **attributes: str) -> Html:
    """An element that has no content and no end tag."""
    return Html(str(el(tag, **attributes)).removesuffix(f"</{tag}>"))


def _problem(text: str | None) -> Html | None:
    return el("p", text, class_="problem", role="alert") if text else None
