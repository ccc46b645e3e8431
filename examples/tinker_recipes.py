"""Runs two recipes of tinker-cookbook against `rlhf tinker`: supervised fine-tuning (sl_loop), then RL (rl_loop).

Needs the packages tinker and tinker-cookbook[math-rl], and TINKER_API_KEY, on your own machine for example tml-local.
Arguments: the server's URL, for example http://127.0.0.1:8001; the model's name there, which must be one that the
cookbook knows; the folder of its tokenizer; and a folder for the recipes' logs. The recipes are those of
`tinker_cookbook.recipes`, unchanged. Two of their inputs come from the Hub, so this script replaces them. With access
to the Hub, leave both lines out:

- the tokenizer, by the cookbook's own `register_tokenizer`
- the data, by `load_dataset` of each recipe: sums, which a small model learns in a few steps

RL goes on from the state that supervised fine-tuning saved: rl_loop resumes from the last state in its log folder.
"""

import json
import random
import sys
from pathlib import Path

from datasets import Dataset, DatasetDict
from tinker_cookbook.recipes import rl_loop, sl_loop
from tinker_cookbook.tokenizer_utils import register_tokenizer
from transformers import AutoTokenizer

SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
"""What rl_loop adds to each question."""


def sums(rows: int, seed: int) -> list[tuple[str, int]]:
    """Questions, with their answers."""
    numbers = random.Random(seed)
    pairs = [(numbers.randint(1, 9), numbers.randint(1, 9)) for _ in range(rows)]
    return [(f"What is {a} + {b}?", a + b) for a, b in pairs]


def conversations(rows: int) -> DatasetDict:
    """Rows as sl_loop reads them."""
    turns = [(question + SUFFIX, f"\\boxed{{{answer}}}") for question, answer in sums(rows, seed=0)]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    return DatasetDict(train=Dataset.from_list([{"messages": one} for one in messages]))


def problems(rows: int) -> DatasetDict:
    """Rows as rl_loop reads them: those of GSM8K."""
    return DatasetDict(
        train=Dataset.from_list([{"question": q, "answer": f"#### {answer}"} for q, answer in sums(rows, seed=1)])
    )


def main(url: str, model: str, tokenizer: str, logs: str, sl_steps: int = 12, rl_steps: int = 4) -> None:
    """Run both recipes."""
    register_tokenizer(model, lambda: AutoTokenizer.from_pretrained(tokenizer))
    sl, rl = Path(logs) / "sl", Path(logs) / "rl"
    sl_loop.datasets.load_dataset = lambda *names: conversations(8 * sl_steps)
    config = sl_loop.Config(
        base_url=url, model_name=model, log_path=str(sl), lora_rank=8, batch_size=8, learning_rate=1e-3, max_length=256
    )
    sl_loop.main(config)
    last = json.loads((sl / "checkpoints.jsonl").read_text().splitlines()[-1])
    rl.mkdir(parents=True, exist_ok=True)
    (rl / "checkpoints.jsonl").write_text(json.dumps({**last, "batch": 0}) + "\n")
    rl_loop.datasets.load_dataset = lambda *names: problems(8 * rl_steps)
    rl_loop.main(
        rl_loop.Config(
            base_url=url,
            model_name=model,
            log_path=str(rl),
            batch_size=8,
            group_size=8,
            max_tokens=16,
            loss_fn="importance_sampling",  # the default, stable_reinforce, is not one of this server's losses
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4])
