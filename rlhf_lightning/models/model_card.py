"""The model card: `README.md` of a saved folder, for people and for the Hugging Face Hub."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhf_lightning.errors import cut
from rlhf_lightning.files import duration, is_file, read_object, real_path, replace_text, visible
from rlhf_lightning.gguf.folder import source_of
from rlhf_lightning.types import JSON

CARD = "README.md"
_MARK = re.compile(r"\n<!-- written by rlhf-lightning, ([0-9a-f]{16})[^\n]*-->\n\Z")
_NOTE = "<!-- written by rlhf-lightning, {}; a card that was edited is kept -->"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_SECRET = re.compile(r"token$|password|secret|api_?key|credential", re.IGNORECASE)
LONGEST = 200
"""Largest number of characters of a name or a value."""
MOST = 80
"""Largest number of listed settings; `config.yaml` has all of them."""
KINDS = {
    "sft": "supervised fine-tuning",
    "preference": "preference model",
    "policy": "reinforcement learning of a policy",
}
_TRAINER = ("precision", "max_epochs", "max_steps", "max_time", "accumulate_grad_batches", "gradient_clip_val")
_SHOWN = re.compile(r"train/(loss|nll|accuracy|margin|reward|kl|entropy|response_tokens|truncated)")
"""Metrics of the last training step that are shown if there were no held-out rows."""
_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".bz2", ".xz", ".zst")


def write_card(folder: Path, facts: Mapping[str, JSON], settings: Mapping[str, JSON] | None = None) -> None:
    """Write the model card of a folder, unless it has a card that a person has edited.

    Args:
        folder: The model folder.
        facts: Content of its `stage.json`.
        settings: Settings of the run, as in `config.yaml`.
    """
    if edited_card(folder) is None:
        replace_text(folder / CARD, card(folder, facts, settings or {}))


def edited_card(folder: Path) -> str | None:
    """The model card of a folder, if a person has written or edited it.

    Cards of this package (recognized by the hash in the last line) and peft's empty card do not count.

    Args:
        folder: The model folder.
    """
    path = folder / CARD
    if not is_file(path):
        return None
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    found = _MARK.search(text)
    if found and found[1] == _digest(text[: found.start()]):
        return None
    return None if "[More Information Needed]" in text and "library_name: peft" in text else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def card(folder: Path, facts: Mapping[str, JSON], settings: Mapping[str, JSON]) -> str:
    """The text of a model card.

    Args:
        folder: The model folder, with its config.
        facts: Content of its `stage.json`.
        settings: Settings of the run.
    """
    from huggingface_hub import ModelCard, ModelCardData

    adapter = (folder / "adapter_config.json").is_file()
    config = read_object(folder / ("adapter_config.json" if adapter else "config.json"))
    scores = "SEQ_CLS" in str(config.get("task_type")) or "Classification" in str(config.get("architectures"))
    kind = str(facts.get("kind") or "")
    named = facts.get("start") or config.get("base_model_name_or_path") or facts.get("exported_from")
    base = str(named or "")
    sources = _object(facts.get("rows"))
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=sorted(
            filter(_on_hub, {str(_object(one).get("source")).partition(":")[0] for one in sources.values()})
        )
        or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=["rlhf-lightning", *([kind] if kind in KINDS else []), *(["lora"] if adapter else [])],
    )
    what = KINDS.get(kind, "a saved model")
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_plain(_name(folder))}\n",
        f"{'A LoRA adapter' if adapter else 'A model'} from {what}, trained with rlhf-lightning"
        f"{f' {version}' if (version := _plain(_object(facts.get('versions')).get('rlhf-lightning', ''))) else ''}.\n",
        *_base(folder, base, facts),
        *_data(sources),
        *_settings(settings, facts),
        *_metrics(facts),
        "## How to load it\n",
        _loading(adapter, scores, facts),
        "## Limits\n",
        *[f"- {line}" for line in _limits(kind, facts, sources)],
    ]
    text = str(ModelCard("\n".join(parts)).content).rstrip("\n") + "\n"
    return f"{text}\n{_NOTE.format(_digest(text))}\n"


def _object(value: JSON) -> dict[str, JSON]:
    return value if isinstance(value, dict) else {}


def _name(folder: Path) -> str:
    """Name of a folder, which may still be temporary; for `RUN/STAGE/model`, the name of the stage."""
    place = real_path(folder)
    name = place.name.removeprefix(".").removesuffix(".partial")
    return place.parent.name if name == "model" else name


def _on_hub(name: str) -> bool:
    """True for a name that may be on the Hub, and that is not a file or folder on this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_FILES) and not Path(name).exists()


def _plain(value: JSON) -> str:
    """A value as text without markup: no links, tags, control characters or characters that end the cell of a table."""
    text = cut(" ".join(visible(str(value)).split()), LONGEST)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
    return _MARKUP.sub(r"\\\g<0>", text).replace("://", "&#58;//").replace("www.", "www&#46;")


def _table(head: tuple[str, ...], rows: Sequence[tuple[JSON, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *[tuple(_plain(cell) for cell in row) for row in rows]]
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"]


def _base(folder: Path, base: str, facts: Mapping[str, JSON]) -> Iterator[str]:
    if not base:
        return
    file = source_of(base)
    yield "## Base\n"
    if file is None:
        yield f"It starts from {_plain(base)}.\n"
        return
    record = read_object(Path(base) / "gguf.json")
    was = f"{record.get('quantization')} weights, which were read as {record.get('dtype')}"
    yield f"It starts from the GGUF file {_plain(Path(file).name)}: {_plain(was)}.\n"


def _data(sources: Mapping[str, JSON]) -> Iterator[str]:
    if sources:
        yield "## Data\n"
        each = {name: _object(one) for name, one in sources.items()}
        mixtures = {name: _object(one.get("sources")) for name, one in each.items()}
        rows = [
            (name, one.get("source") or ", ".join(mixtures[name]), one.get("rows"), one.get("examples"))
            for name, one in each.items()
        ]
        yield from _table(("use", "source", "rows", "examples"), rows)
        mixed = [(name, _object(one)) for mixture in mixtures.values() for name, one in mixture.items()]
        if mixed:
            yield "Sources of the training rows, and how often each was used (drawn):\n"
            named = ("source", "weight", "rows", "examples", "drawn")
            columns = [name for name in named if any(name in one for _, one in mixed)]
            yield from _table(
                ("name", *columns), [(name, *(one.get(column) for column in columns)) for name, one in mixed]
            )
        for source, counts in _object(_object(sources.get("train")).get("filter")).items():
            found = _object(counts)
            rules = ", ".join(f"{rule} in {count}" for rule, count in _object(found.get("rules")).items())
            yield (
                f"A filter dropped {_plain(found.get('dropped'))} of {_plain(found.get('rows'))} rows of "
                f"{_plain(source)} and marked {_plain(found.get('marked'))}; its rules matched: "
                f"{_plain(rules or 'none')}.\n"
            )


def _settings(settings: Mapping[str, JSON], facts: Mapping[str, JSON]) -> Iterator[str]:
    rows: list[tuple[str, JSON]] = [("steps", facts["steps"])] if "steps" in facts else []
    rows += [("seed", facts["seed"])] if facts.get("seed") is not None else []
    rows += [("training time", duration(facts["seconds"]))] if "seconds" in facts else []
    rows += list(_flat(settings))
    if rows:
        yield "## Settings\n"
        yield from _table(("setting", "value"), rows[:MOST])
        if len(rows) > MOST:
            yield f"{len(rows) - MOST} more settings are not shown.\n"


def _flat(value: JSON | Mapping[str, JSON], name: str = "") -> Iterator[tuple[str, JSON]]:
    """Settings with their dotted names, without those that are off or unset, and without secrets."""
    last = name.rpartition(".")[2]
    if _SECRET.search(last) or value in (None, False, 0, {}, [], ""):
        return
    if name.startswith("trainer.") and name.split(".")[1] not in _TRAINER:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif last == "class_path":
        yield name.removesuffix(".class_path"), str(value).rpartition(".")[2]
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{number}")
    else:
        yield name.replace(".init_args.", "."), value


def _metrics(facts: Mapping[str, JSON]) -> Iterator[str]:
    found = _object(facts.get("metrics"))
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}
    held_out = {name: value for name, value in numbers.items() if name.startswith(("val/", "test/"))}
    shown = held_out or {name: value for name, value in numbers.items() if _SHOWN.match(name)}
    if shown:
        yield "## Metrics\n"
        yield "On held-out rows:\n" if held_out else "In the last training step; there were no held-out rows:\n"
        yield from _table(("metric", "value"), [(name, f"{value:.4g}") for name, value in sorted(shown.items())])


def _loading(adapter: bool, scores: bool, facts: Mapping[str, JSON]) -> str:
    auto = "SequenceClassification" if scores else "CausalLM"
    library, name = ("peft", f"AutoPeftModelFor{auto}") if adapter else ("transformers", f"AutoModelFor{auto}")
    more = ", num_labels=1" if adapter and scores else ""
    command = "rlhf score FOLDER pairs.jsonl" if scores or facts.get("kind") == "preference" else "rlhf chat FOLDER"
    imports = f"from {library} import {name}"
    imports += "\nfrom transformers import AutoTokenizer" if adapter else ", AutoTokenizer"
    return (
        f'```python\n{imports}\n\nmodel = {name}.from_pretrained("FOLDER"{more})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
        f"or with rlhf-lightning, which prompts it as in its training (`stage.json`):\n\n```bash\n{command}\n```\n"
    )


def _limits(kind: str, facts: Mapping[str, JSON], sources: Mapping[str, JSON]) -> Iterator[str]:
    yield "It may have all weaknesses of its base model; see the card of the base model."
    train = _object(sources.get("train"))
    if train.get("examples") is not None:
        yield f"It was trained on {_plain(train['examples'])} examples, and may not generalize beyond them."
    if kind == "preference":
        yield "Its scores rank responses to the same prompt; do not compare scores of different prompts or models."
    if kind == "policy":
        yield "RL optimizes its rewards, which may not measure the intended quality; read its answers."
    if not any(name.startswith(("val/", "test/")) for name in _object(facts.get("metrics"))):
        yield "It was not evaluated on held-out rows."
    for key, said in (
        ("skipped_steps", "steps were skipped because a loss or gradient was not finite"),
        ("empty_steps", "steps had no token to train on"),
        ("inexact_resumes", "resumes were not bit-exact"),
    ):
        if facts.get(key):
            yield f"{_plain(facts[key])} {said}."
    if facts.get("stopped"):
        yield f"Training was stopped: {_plain(facts['stopped'])}"
    if train.get("filter"):
        yield "A filter finds what its rules describe, and may have left other unsafe text in the training data."
    yield "It was not checked for safety, bias, or private information in its training data."
