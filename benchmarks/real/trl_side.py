"""The same training with TRL: whole `Trainer.train` runs, with the fastest settings that compute the same."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback, set_seed

from benchmarks.real.ours import Clock, Trained, peak_gib
from benchmarks.real.plan import ALPHA, RANK, Cell
from benchmarks.real.rows import Rows
from benchmarks.real.scoring import columns, scores

PAD = "<|endoftext|>"
"""Another padding token than the stop token, if the tokenizer has it, so that TRL reads a reward where it should."""
NAMES = {
    "loss": "loss",
    "reward": "reward",
    "kl": "kl",
    "completions/mean_length": "response_tokens",
}
"""Names of curves, by those of TRL."""
HELD_OUT = {
    "reward": {"eval_accuracy": "accuracy", "eval_margin": "margin"},
    "dpo": {"eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"},
}


class Watch(TrainerCallback):
    """Times the steps."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark()


def arguments(cell: Cell, folder: Path) -> dict[str, Any]:
    """Settings of every trainer."""
    micro = cell.micro or cell.total
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": cell.precision == "bf16-mixed",
        "gradient_checkpointing": False,  # TRL's default, slower
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": cell.total // micro,
        "max_steps": cell.settings.steps,
        "learning_rate": cell.settings.rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": cell.seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def trainer_of(cell: Cell, rows: Rows, folder: Path, watch: Watch) -> Any:
    """The trainer of a cell."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    part, common = cell.settings, arguments(cell, folder)
    tokenizer = AutoTokenizer.from_pretrained(cell.model)
    if PAD in tokenizer.get_vocab():
        tokenizer.pad_token = PAD
    classifies = part.kind == "reward"
    adapters = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
        modules_to_save=["score"] if classifies else None,
    )
    more: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows.train),
        "processing_class": tokenizer,
        "peft_config": adapters,
        "callbacks": [watch],
    }
    loading = {"model_init_kwargs": {"dtype": "float32"}}
    if part.kind == "grpo":
        names = columns(part.task)

        def reward(completions: list[Any], **given: Any) -> list[float]:
            asked = [dict(zip(names, values, strict=True)) for values in zip(*(given[n] for n in names), strict=True)]
            return scores(part.task, [completion[0]["content"] for completion in completions], asked)

        config = trl.GRPOConfig(
            num_generations=part.group,
            max_completion_length=part.max_tokens,
            beta=part.beta,
            loss_type="grpo",
            shuffle_dataset=False,
            **common,
            **loading,
        )
        return trl.GRPOTrainer(cell.model, reward, args=config, **more)
    if part.kind == "sft":
        return trl.SFTTrainer(cell.model, trl.SFTConfig(max_length=None, **common, **loading), **more)
    more["eval_dataset"] = Dataset.from_list(rows.held_out) if rows.held_out else None
    if classifies:
        model = AutoModelForSequenceClassification.from_pretrained(cell.model, num_labels=1, dtype="float32")
        return trl.RewardTrainer(model, trl.RewardConfig(max_length=None, **common), **more)
    config = trl.DPOConfig(max_length=None, beta=part.beta, **common, **loading)
    return trl.DPOTrainer(cell.model, args=config, **more)


def train(cell: Cell, rows: Rows, folder: Path) -> Trained:
    """Train, and save the model in a folder."""
    set_seed(cell.seed)
    watch = Watch()
    trainer = trainer_of(cell, rows, folder, watch)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    found: Trained = {
        "seconds": watch.clock.of(0),
        "processor_seconds": watch.clock.of(1),
        "peak_gib": peak_gib(),
        "curves": {ours: [entry[name] for entry in steps] for name, ours in NAMES.items() if name in steps[0]},
    }
    if rows.held_out and cell.settings.kind in HELD_OUT:
        numbers = trainer.evaluate()
        found["held_out"] = {ours: numbers[name] for name, ours in HELD_OUT[cell.settings.kind].items()}
    trainer.save_model(str(folder))
    return found
