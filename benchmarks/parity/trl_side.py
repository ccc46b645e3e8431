"""Optimizer steps of TRL: its own `Trainer.train`, recorded by a callback."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from benchmarks.parity.setup import Folders, Step, gradients, rows_of

RATE = 0.05
"""Learning rate of plain gradient descent, the default on both sides; unlike Adam it reveals a wrong scale."""


LENGTH = 8
"""Largest number of tokens of a sampled response."""


class Watch(TrainerCallback):
    """Collects, for each optimizer step, the losses and rows of its micro-batches and the gradient."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._losses: list[float] = []
        self._rows: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(Step(sum(self._losses), gradients(kwargs["model"]), sorted(self._rows)))
        self._losses, self._rows = [], []

    def around(self, trainer: Any) -> Any:
        """Record a trainer's training steps, which return the loss."""
        inner = trainer.training_step
        compute = trainer.compute_loss

        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = inner(*args, **kwargs)
            self._losses.append(float(loss))
            return loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._rows += _rows(inputs)
            return compute(model, inputs, *args, **kwargs)

        trainer.training_step, trainer.compute_loss = training_step, compute_loss
        trainer.add_callback(self)
        return trainer


def _rows(inputs: dict[str, Any]) -> list[Any]:
    if "prompt_ids" in inputs:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        loss_mask = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
        return rows_of(ids, loss_mask, attention)
    loss_mask = inputs.get("completion_mask")
    if loss_mask is None and "labels" in inputs:
        loss_mask = (inputs["labels"] != -100).long()
    attention = inputs["attention_mask"]
    return rows_of(inputs["input_ids"], torch.zeros_like(attention) if loss_mask is None else loss_mask, attention)


def arguments(root: Path, batch: int, micro: int | None = None, steps: int = 1) -> dict[str, Any]:
    """Settings of every TRL trainer; micro-batches of `micro` rows, `batch` rows per step."""
    return {
        "output_dir": str(root / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": micro or batch,
        "gradient_accumulation_steps": batch // (micro or batch),
        "max_steps": steps,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def supervised(task: str, folders: Folders, rows: Sequence[Any], root: Path, **options: Any) -> list[Step]:
    """Steps of SFT (`sft`), the reward model (`reward`), DPO (`dpo`) or KTO (`kto`).

    Args:
        options: `micro` (rows per micro-batch) and `steps`; all others are passed to TRL's config.
    """
    import trl

    rows = list(rows)
    micro, steps = options.pop("micro", None), options.pop("steps", 1)
    common = {**arguments(root, len(rows), micro, steps), "max_length": None, **options}
    folder = folders.classifier if task == "reward" else folders.policy
    tokenizer = AutoTokenizer.from_pretrained(folder)
    make: Any = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
    }[task]
    loader = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    models = [loader.from_pretrained(folder)]
    if task in ("dpo", "kto"):
        models.append(AutoModelForCausalLM.from_pretrained(folders.reference))
    if task == "sft":
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    data = Dataset.from_list(rows)
    watch = Watch()
    trainer = make[0](*models, args=make[1](**common), train_dataset=data, processing_class=tokenizer)
    watch.around(trainer).train()
    return watch.steps


class Rollouts:
    """Steps of GRPO or RLOO on one round of TRL's own samples, and the round as rows of recorded episodes.

    Only every 40th token and the stop token can be sampled, so that responses have different lengths.

    Args:
        options: `kind` (`grpo` or `rloo`), `micro` (rows per micro-batch), `steps` (passes over the round); others are
            passed to TRL's config.
    """

    def __init__(self, folders: Folders, prompts: Sequence[Any], group: int, root: Path, **options: Any) -> None:
        import trl

        kind = options.pop("kind", "grpo")
        micro, steps = options.pop("micro", None), options.pop("steps", 2)
        make: Any = (trl.RLOOTrainer, trl.RLOOConfig) if kind == "rloo" else (trl.GRPOTrainer, trl.GRPOConfig)
        size = len(prompts) * group
        settings = {
            **arguments(root, size, micro, steps),
            "num_generations": group,
            "max_completion_length": LENGTH,
            "num_iterations": steps,
            "shuffle_dataset": False,
            **options,
        }
        watch = Watch()
        tokenizer = AutoTokenizer.from_pretrained(folders.policy, padding_side="left")
        never = [token for token in range(len(tokenizer)) if token % 40 and token != tokenizer.eos_token_id]
        settings["generation_kwargs"] = {"suppress_tokens": never}
        trainer = make[0](
            folders.policy,
            self._reward,
            args=make[1](**settings),
            train_dataset=Dataset.from_list(list(prompts)),
            processing_class=tokenizer,
        )
        self.episodes: list[dict[str, Any]] = []
        self._model = AutoModelForCausalLM.from_pretrained(folders.policy)
        score = trainer._generate_and_score_completions

        def remembered(inputs: Any) -> Any:
            found = score(inputs)
            self._remember(found, group)
            return found

        trainer._generate_and_score_completions = remembered
        watch.around(trainer).train()
        self.steps = watch.steps

    def _reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.rewards = [sum(token % 5 for token in ids) / len(ids) + 0.3 * len(ids) for ids in completion_ids]
        return self.rewards

    def _remember(self, found: dict[str, Any], group: int) -> None:
        self.advantages = found["advantages"].tolist()
        for i, reward in enumerate(self.rewards):
            there, kept = found["prompt_mask"][i].bool(), found["completion_mask"][i].bool()
            prompt, response = found["prompt_ids"][i][there].tolist(), found["completion_ids"][i][kept].tolist()
            self.episodes.append(
                {
                    "prompt_tokens": prompt,
                    "response_tokens": response,
                    "logprobs": logprobs(self._model, prompt, response),
                    "reward": reward,
                    "group": str(i // group),
                }
            )


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], response: list[int]) -> list[float]:
    """Log-probability of each response token in nats, by a plain forward of transformers."""
    ids = torch.tensor([prompt + response])
    table = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return table.gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist()
