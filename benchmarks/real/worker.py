"""One run in its own process, so that its peak of memory is its own.

    python -m benchmarks.real.worker '{"do": "train", "cell": {…}, "folder": "…"}'

Prints a line of JSON. `train` trains a cell and saves the model; `trial` finds the fastest
settings; `measure` measures a model folder on the held-out rows of a cell.
"""

import json
import logging
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any


def train(command: dict[str, Any]) -> Any:
    """Train a cell."""
    from benchmarks.real.plan import Cell
    from benchmarks.real.rows import rows_of

    cell = Cell.of(command["cell"])
    side = __import__(f"benchmarks.real.{'ours' if cell.side == 'ours' else 'trl_side'}", fromlist=["train"])
    rows = rows_of(cell.settings, cell.data, cell.seed)
    return side.train(cell, rows, Path(command["folder"]))


def trial(command: dict[str, Any]) -> Any:
    """Try settings by two steps each: both precisions, and for TRL the whole batch in the faster one.

    Returns:
        The settings with `seconds`, the processor time of the second step; fastest first.
    """
    from benchmarks.real.plan import Cell, precisions

    cell, folder = Cell.of(command["cell"]).tried(2), Path(command["folder"])

    def tried(settings: Any) -> dict[str, Any]:
        answer = train({"cell": replace(cell, **settings).to_json(), "folder": str(folder)})
        return {**settings, "seconds": round(answer["processor_seconds"][-1], 2)}

    found = sorted((tried(settings) for settings in precisions(cell)), key=lambda one: one["seconds"])
    if found[0]["micro"]:
        found.append(tried({"precision": found[0]["precision"], "micro": None}))
    return sorted(found, key=lambda one: one["seconds"])


def measure(command: dict[str, Any]) -> Any:
    """Quality of a language model on the held-out rows of a cell: greedy answers, in float32 for both sides."""
    from benchmarks.real.plan import Cell
    from benchmarks.real.rows import rows_of
    from benchmarks.real.scoring import scores
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.evaluation.text_metrics import nearness, perplexity, references_of

    cell = Cell.of(command["cell"])
    part, rows = cell.settings, rows_of(cell.settings, cell.data, cell.seed)
    policy = Policy(command["folder"])
    prompts = policy.prompts(rows.held_out)
    episodes = policy.answer(prompts, max_tokens=part.max_tokens, seed=0, temperature=0.0)
    answers = [episode.response for episode in episodes]
    found = {"tokens": sum(episode.response_tokens for episode in episodes) / len(episodes)}
    chats = policy.prompts(rows.held_out if part.kind == "sft" else rows.chats) if part.task != "arithmetic" else []
    if chats:
        found["perplexity"] = perplexity(policy, chats, references_of(chats))
    if part.kind == "sft":
        found["rougeL"] = nearness(answers, references_of(prompts))["rougeL"]
    else:
        right = scores(part.task, answers, rows.held_out)
        found["score"] = sum(right) / len(right)
    return {"numbers": found, "answers": answers[:6]}


DO = {"train": train, "trial": trial, "measure": measure}


def main() -> None:
    """Run a command."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answer
    command = json.loads(sys.argv[1])
    if command["cell"]["side"] == "ours":
        from rlhf_lightning.cli.main import prepare_environment

        prepare_environment()  # as the `rlhf` command does before it imports torch
    import torch
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(command["cell"]["threads"])
    print(json.dumps(DO[command["do"]](command)), file=answers, flush=True)


if __name__ == "__main__":
    main()
