"""A rule that labels comparisons beside people: its agreement with them, and a reward model trained on all pairs."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from rlhf_lightning import PreferenceDataModule, PreferenceModule
from rlhf_lightning.labeling.agreement import LabelReport, label_report
from rlhf_lightning.labeling.comparisons import Candidate, Comparison, Question
from rlhf_lightning.labeling.queue import Assignment, LabelQueue, Shown
from rlhf_lightning.labeling.store import Choice, LabelStore

ANSWERS = {
    "Is it raining?": ("Yes, take a coat.", "Weather is a big topic, and rain is a part of it."),
    "What is 2 + 3?": ("5", "Sums are a big topic, and this is one of them."),
    "When does the train leave?": ("Trains are a big topic, and they leave.", "At nine."),
    "Where is the key?": ("On the table.", "I do not know."),
}
PEOPLE: dict[str, list[Choice]] = {"Ann": ["A", "B", "tie", "A"], "Ben": ["B", "B", "A", "skip"]}
"""What two people pressed, in the order in which they saw the comparisons; `rlhf label` records this from its page."""


def shorter(shown: Shown) -> Choice:
    """Prefer the shorter answer."""
    a, b = (len(answer.messages[0]["content"] or "") for answer in shown.answers)
    return "tie" if a == b else "A" if a < b else "B"


def label(out: Path) -> LabelReport:
    """Label all comparisons by two people and by a rule; return the report."""
    store = LabelStore(out, {"seed": 0})
    queue = LabelQueue(store, Assignment(overlap=1.0))
    for text, answers in ANSWERS.items():
        first, second = (Candidate([{"role": "assistant", "content": answer}]) for answer in answers)
        queue.add([Comparison(Question([{"role": "user", "content": text}]), (first, second))])
    for name, choices in PEOPLE.items():
        for choice in choices:
            if (shown := queue.show(name)) is not None:
                queue.decide(name, shown.comparison.id, choice)
    while (shown := queue.show("rule")) is not None:
        queue.decide("rule", shown.comparison.id, shorter(shown))
    store.close()
    return label_report(store.comparisons, store.decisions)


def main(model: str, folder: str = "runs/examples/label") -> tuple[LabelReport, pl.Trainer]:
    """Label, report, train."""
    out = Path(folder) / "pairs.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = label(out)
    for pair in report.agreement:
        print(f"{' and '.join(pair.annotators)}: Cohen's kappa {pair.cohen_kappa}")
    module = PreferenceModule(model, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=folder)
    trainer.fit(module, PreferenceDataModule(train=str(out), batch_size=4))
    return report, trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
