"""Rules on texts: what each finds, what it must not find, and what follows if it cannot be applied."""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.filtering import Classifier, FilterRules, FilterText, JudgeRule, Pattern, Rule, Terms, read_rules
from rlhf_lightning.rewards import Judge
from rlhf_lightning.text_search.normalization import Normalizer
from rlhf_lightning.text_search.terms import TermIndex
from tests.helpers.docs import ROOT, blocks
from tests.helpers.judge_server import Asked, Refusal, serving
from tests.helpers.models import build_model

BOMB = ["bomb"]


def matched(rule: Rule, text: str) -> list[str]:
    [found] = rule.build()([FilterText(text)])
    return [one.text for one in found]


@pytest.mark.parametrize(
    ("term", "text", "found"),
    [
        ("ass", "a classic assessment", []),
        ("ass", "You ASS.", ["ASS"]),
        ("ass", "ass_hat, _ass_ and ass2", ["ass", "ass"]),
        ("credit card", "my credit\n  Card!", ["credit\n  Card"]),
        ("credit card", "credit cards", []),
        ("straße", "STRASSE", ["STRASSE"]),
        ("café", "cafe\u0301", ["cafe\u0301"]),
        ("cafe", "café", []),
        ("bomb", "ｂｏｍｂ 𝐛𝐨𝐦𝐛", ["ｂｏｍｂ", "𝐛𝐨𝐦𝐛"]),
        ("bomb", "bo\u200bmb b\u00adomb bom\u2060b", ["bo\u200bmb", "b\u00adomb", "bom\u2060b"]),
        ("bomb", "b\x08omb \U000e0062bomb", ["b\x08omb", "bomb"]),
        ("炸弹", "他有炸弹吗", ["炸弹"]),
        ("bomb", "他有bomb吗", ["bomb"]),
        ("हिन्द", "हिन्दी", []),
        ("c++", "use c++11", ["c++"]),
        ("@home", "me@home", ["@home"]),
        # Not found, as docs/safety-filter.md says: other alphabets, digits for letters, letters apart, other forms.
        ("bomb", "b\u043emb b0mb b-o-m-b b o m b bombs", []),
        ("폭탄", "폭탄을", []),
    ],
)
def test_terms_match_whole_words_in_any_spelling_of_unicode(term: str, text: str, found: list[str]) -> None:
    assert matched(Terms(name="t", terms=[term]), text) == found


def test_terms_with_case_and_within_words() -> None:
    assert matched(Terms(name="t", terms=["US"], ignore_case=False), "tell us, US") == ["US"]
    assert matched(Terms(name="t", terms=["폭탄"], whole_words=False), "폭탄을") == ["폭탄"]
    assert matched(Terms(name="t", terms=["new", "new york", "york city"]), "new york city") == ["new york"]


def test_index_finds_what_a_search_for_each_term_finds() -> None:
    generator = torch.Generator().manual_seed(0)

    def word(longest: int) -> str:
        size = int(torch.randint(1, longest, (1,), generator=generator))
        return "".join("ab "[i] for i in torch.randint(0, 3, (size,), generator=generator).tolist()).strip() or "a"

    for _ in range(200):
        terms, text = {word(6) for _ in range(6)}, word(40)
        starts = [i for i in range(len(text)) if any(text.startswith(term, i) for term in terms)]
        wanted, end = [], 0
        for start in starts:
            if start >= end:
                end = start + max(len(term) for term in terms if text.startswith(term, start))
                wanted.append((start, end))
        assert TermIndex(terms, whole_words=False).find(text) == wanted, (terms, text)


def test_whole_words_are_those_of_lookarounds() -> None:
    generator = torch.Generator().manual_seed(1)
    letter = "[ab0]"  # 的 is a letter of a script without spaces, so that it limits words

    def word(longest: int) -> str:
        size = int(torch.randint(1, longest, (1,), generator=generator))
        return "".join("ab0 .的"[i] for i in torch.randint(0, 6, (size,), generator=generator).tolist()).strip() or "a"

    found = 0
    for _ in range(300):
        term, text = word(4), word(30)
        before = f"(?<!{letter})" if re.match(letter, term) else ""
        after = f"(?!{letter})" if re.match(letter, term[-1]) else ""
        wanted = [match.span() for match in re.finditer(before + re.escape(term) + after, text)]
        assert TermIndex([term]).find(text) == wanted, (term, text)
        found += len(wanted)
    assert found > 100


def test_ascii_has_the_form_of_its_pieces() -> None:
    text = "A b\t\n C\x0b\x1cd\r\n e  "
    for fold_case in (True, False):
        for join_space in (True, False):
            normalizer = Normalizer(fold_case, join_space)
            whole = normalizer.normalized(text)
            assert whole == normalizer.normalized(text + "\u00e9")[:-1]
            begin, end = normalizer.span(text, 0, len(whole))
            assert (begin, end) == (0, len(text))


def test_parts_of_a_normalized_text_lead_back_to_the_original() -> None:
    text = "\u200bＡb\u200b  ﬁne Stra\u00dfe e\u0301\u0327x ｶﾞ\u00ad."
    normalizer = Normalizer(fold_case=True, join_space=True)
    form = normalizer.normalized(text)
    assert form == "ab fine strasse \u0229\u0301x ガ."
    for word in ("ab", "fine", "strasse", "ガ"):
        start = form.index(word)
        begin, end = normalizer.span(text, start, start + len(word))
        assert normalizer.normalized(text[begin:end]) == word
    assert normalizer.span(text, 0, len(form)) == (1, len(text))


def test_patterns() -> None:
    mail = Pattern(name="mail", pattern=r"[\w.+-]+@[\w-]+\.\w+")
    assert matched(mail, "a@b.org, c\u200b@ｄ.org") == ["a@b.org", "c\u200b@ｄ.org"]
    assert matched(Pattern(name="p", pattern="bad"), "Bad bad") == ["bad"]
    assert matched(Pattern(name="p", pattern="bad", ignore_case=True), "Bad") == ["Bad"]
    hidden = r"[\U000e0000-\U000e007f]+"
    assert matched(Pattern(name="p", pattern=hidden, normalize=False), "Hi\U000e0041\U000e0042") == [
        "\U000e0041\U000e0042"
    ]
    assert matched(Pattern(name="p", pattern=hidden), "Hi\U000e0041") == []
    assert len(matched(Pattern(name="p", pattern="a"), "a" * 1000)) == 20


@pytest.mark.parametrize("policy", ["fail", "skip", "match"])
def test_a_pattern_that_backtracks_forever_cannot_hang_a_run(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    rule = Pattern(name="slow", pattern="(a|aa)+$", timeout=0.05, on_failure=policy)
    started = time.process_time()
    find = rule.build()
    if policy == "fail":
        with pytest.raises(UserError, match=r"the rule slow cannot be applied to rows.jsonl:3 .* takes longer than"):
            find([FilterText("a" * 60 + "b", label="rows.jsonl:3 prompt")])
    else:
        with caplog.at_level(logging.WARNING):
            [found] = find([FilterText("a" * 60 + "b")])
        assert [bool(one.failure) for one in found] == ([True] if policy == "match" else [])
        assert ("takes longer" in caplog.text) == (policy == "skip")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Terms(name="t"), "has no terms"),
        (lambda: Terms(name="t", terms=["\u200b"]), "is empty"),
        (lambda: Terms(name="a b", terms=["x"]), "name of a rule"),
        (lambda: Terms(name="t", terms=["x"], action="delete"), "must be mark, drop or block"),
        (lambda: Terms(name="t", terms=["x"], roles=["human"]), "the roles are system, user"),
        (lambda: Pattern(name="t", pattern="a*"), "matches the empty text"),
        (lambda: Pattern(name="t", pattern="(a"), "not a valid regular expression"),
        (lambda: Pattern(name="t", pattern="a", timeout=0), "timeout"),
        (lambda: Classifier(name="t", classifier="x", label="y", threshold=0.0), "above 0 and at most 1"),
        (lambda: FilterRules([]), "has no rules"),
        (lambda: FilterRules([Terms(name="t", terms=["x"])] * 2), "two rules of a filter have the name"),
    ],
)
def test_rules_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("rules: {}", r"rules.yaml:1: there are no rules, so everything would pass"),
        ("rules:\n  a:\n    terms: [x]\n    actoin: mark", r"rules.yaml:4: the rule a has the key 'actoin'"),
        ("rules:\n  a:\n    terms: [no]", r"rules.yaml:2: the rule a: key .terms.*must be quoted"),
        ("rules:\n  a: {terms: [x]}\n  a: {terms: [y]}", r"rules.yaml:3: the key a appears twice, first in line 2"),
        ("rules:\n  a: {terms: [x], pattern: y}", r"rules.yaml:2: the rule a must have one of terms"),
        ("rules:\n  a: {classifier: x}", r"rules.yaml:2: the rule a: .*required: label"),
        ("rules:\n  a: {file: nowhere.txt}", r"rules.yaml:2: the rule a: the file of terms nowhere.txt cannot be read"),
        ("rules:\n  a: {terms: [x]}\nrefuse: no", r"rules.yaml:3: refuse is unknown"),
    ],
)
def test_errors_in_the_file_of_rules_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rules(path)


def test_rules_of_the_page_are_read(tmp_path: Path) -> None:
    [text] = [b.text for b in blocks(ROOT / "docs" / "safety-filter.md") if "classifier: " in b.text]
    (tmp_path / "rules.yaml").write_text(text)
    assert [type(rule) for rule in read_rules(tmp_path / "rules.yaml").rules] == [Classifier, JudgeRule]


def test_the_strictest_action_decides_and_rules_have_their_order(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("\ufeffcredit card\n\niban\n")
    path = tmp_path / "rules.yaml"
    path.write_text(
        f"""refusal: Not this.
rules:
  answers: {{terms: [bomb], action: block, roles: [assistant]}}
  words: {{file: {tmp_path}/terms.txt, action: mark}}
  digits: {{pattern: '\\d{{4}}'}}
"""
    )
    filter = read_rules(path).build()
    decision = filter.check("IBAN 1234 and 5678, credit card, bomb", role="user")
    assert (decision.action, decision.rules, filter.refusal) == ("drop", ["words", "digits"], "Not this.")
    assert [match.text for match in decision.matches] == ["IBAN", "credit card", "1234", "5678"]
    assert filter.check("a bomb", role="assistant").action == "block"
    assert filter.check("a bomb").action == "block", "without a role, every rule applies"
    assert filter.check("a bomb", role="user").action == "pass"


# -- classifiers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tokenizer: Any, tmp_path: Path) -> tuple[str, Any]:
    """A random classifier with two labels, and its model."""
    model = build_model(tokenizer, task="SEQ_CLS", max_position_embeddings=24)
    config = model.config
    config.num_labels, config.id2label, config.label2id = 2, {0: "fine", 1: "toxic"}, {"fine": 0, "toxic": 1}
    torch.manual_seed(3)
    model = type(model)(config).eval()
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier"), model


def test_classifier_gives_the_probability_of_the_pipeline(classifier: tuple[str, Any], tokenizer: Any) -> None:
    folder, model = classifier
    texts = ["one two", "Hello there, how are you?", ""]
    rule = Classifier(name="toxic", classifier=folder, label="toxic", threshold=1e-9)
    found = rule.build()([FilterText(text) for text in texts])
    assert found[2] == [], "a text without tokens is not classified"
    for text, [one] in zip(texts[:2], found[:2], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            wanted = model(input_ids=ids).logits.softmax(-1)[0, 1].item()
        assert one.score == pytest.approx(wanted, abs=1e-5)
    strict = Classifier(name="toxic", classifier=folder, label="toxic", threshold=found[0][0].score + 1e-6)
    assert strict.build()([FilterText(texts[0])]) == [[]]


def test_classifier_sees_all_of_a_long_text(classifier: tuple[str, Any], tokenizer: Any) -> None:
    folder, model = classifier
    rule = Classifier(name="toxic", classifier=folder, label="toxic", threshold=1e-9, batch_size=2)
    text = "one two three four five " * 12
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + 24] for start in range(0, len(ids) - 6, 18)]
    assert len(ids) > 48
    assert {token for window in windows for token in window} == set(ids)
    with torch.no_grad():
        wanted = max(model(input_ids=torch.tensor([w])).logits.softmax(-1)[0, 1].item() for w in windows)
    [[one]] = rule.build()([FilterText(text)])
    assert one.score == pytest.approx(wanted, abs=1e-5)


def test_classifiers_that_cannot_decide_are_refused(classifier: tuple[str, Any], base: str, tmp_path: Path) -> None:
    folder, _ = classifier

    def refused(source: str, label: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Classifier(name="t", classifier=source, label=label).build()

    refused(folder, "Toxic", r"has no label 'Toxic'; its labels are 'fine', 'toxic'")
    refused(base, "LABEL_1", "lacks weights of a classifier")
    refused(str(tmp_path / "nowhere"), "toxic", "no such folder")
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    refused(folder, "toxic", "predicts a number")


# -- judges -----------------------------------------------------------------------------------------------------------


def judge_rule(url: str, **options: Any) -> JudgeRule:
    judge = Judge(url, "tiny", key_variable="", retries=0, **options.pop("judge", {}))
    return JudgeRule(name="advice", judge=judge, rubric="The text gives medical advice.", **options)


def test_judge_decides_by_its_votes() -> None:
    pytest.importorskip("openai")
    said = iter([True, True, False, False])

    def answer(asked: Asked) -> str:
        assert "The text gives medical advice." in asked["messages"][0]["content"]
        return json.dumps(
            {"reason": "", "breaks_rule": next(said) if "pills" in asked["messages"][1]["content"] else False}
        )

    with serving(answer) as server:
        rule = judge_rule(server.url, judge={"votes": 4, "temperature": 1.0, "concurrency": 1}, threshold=0.5)
        found = rule.build()([FilterText("Take two pills."), FilterText("Hello."), FilterText("  ")])
        assert found[0][0].score == 0.5
        assert found[1:] == [[], []]
        assert len(server.requests) == 8, "a blank text is not judged"


@pytest.mark.parametrize("policy", ["fail", "skip", "match"])
def test_a_judge_that_fails(policy: str) -> None:
    pytest.importorskip("openai")
    with serving(lambda asked: Refusal(500)) as server:
        find = judge_rule(server.url, on_failure=policy).build()
        if policy == "fail":
            with pytest.raises(UserError, match="the rule advice cannot be applied to the text: the request failed"):
                find([FilterText("Hello")])
        else:
            [found] = find([FilterText("Hello")])
            assert ["the request failed" in one.failure for one in found] == ([True] if policy == "match" else [])
