"""The same steps with TRL: whole `Trainer.train` runs, timed alike, with the fastest settings that compute the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from benchmarks.steps.clock import now
from benchmarks.steps.ours import generation_prompts, synchronize
from benchmarks.steps.workload import Workload, count_vowels


class StepTimes(TrainerCallback):
    """Records the seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks = [now()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.marks.append(now())

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def runner(task: str, folder: Path, work: Workload, micro: int | None = None) -> Callable[[int], list[float]]:
    """A function that runs a number of steps in micro-batches of `micro` rows, and returns the seconds of each."""
    if task == "generate":
        return _generation(folder, work)

    made: dict[int, tuple[Any, StepTimes]] = {}

    def run(steps: int) -> list[float]:
        if steps not in made:
            times = StepTimes()
            made[steps] = _trainer(task, str(folder), work, steps, micro or work.batch, times), times
        trainer, times = made[steps]
        trainer.train()
        return times.seconds

    return run


def _trainer(task: str, folder: str, work: Workload, steps: int, micro: int, times: StepTimes) -> Any:
    import trl
    from datasets import Dataset

    common: dict[str, Any] = {
        "output_dir": str(Path(folder).parent / "trl"),
        "use_cpu": work.device == "cpu",
        "bf16": work.bf16,
        "torch_compile": work.compile,
        "gradient_checkpointing": False,  # TRL's default, slower
        "num_train_epochs": steps,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": work.batch // micro,
    }
    tokenizer = work.load_tokenizer()
    loading = {"model_init_kwargs": {"dtype": work.dtype}}
    if task == "sft":
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in work.conversations()]
        arguments = trl.SFTConfig(max_length=None, **common, **loading)
        return trl.SFTTrainer(folder, arguments, train_dataset=Dataset.from_list(rows), callbacks=[times])
    if task == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=work.dtype)
        arguments = trl.RewardConfig(max_length=None, **common)
        return trl.RewardTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(work.pairs()),
            processing_class=tokenizer,
            callbacks=[times],
        )
    if task == "dpo":
        arguments = trl.DPOConfig(max_length=None, beta=0.1, **common, **loading)
        rows = Dataset.from_list(work.pairs())
        return trl.DPOTrainer(folder, None, arguments, train_dataset=rows, callbacks=[times])
    size = work.groups * work.group_size
    rl = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 1,
        "num_generations": work.group_size,
        "max_completion_length": work.new_tokens,
        "beta": 0.04,
        "scale_rewards": "none",
        "shuffle_dataset": False,
    }
    rows = Dataset.from_list(work.prompts())
    arguments = trl.GRPOConfig(**{**common, **rl, **loading})
    return trl.GRPOTrainer(folder, _reward, arguments, train_dataset=rows, callbacks=[times])


def _reward(completions: list[Any], **_: Any) -> list[float]:
    return count_vowels([completion[0]["content"] for completion in completions])


def _generation(folder: Path, work: Workload) -> Callable[[int], list[float]]:
    """Sampling with `generate` of transformers, which TRL uses."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=work.dtype).eval().to(work.device)
    model.generation_config.eos_token_id = None
    prompts = generation_prompts(work, work.load_tokenizer())
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=work.device)
    loss_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=work.device)
    options = {"max_new_tokens": work.new_tokens, "do_sample": True, "top_k": 0, "pad_token_id": 0}

    def run(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            start = now()
            with torch.no_grad(), torch.autocast(work.device, dtype=torch.bfloat16, enabled=work.autocast):
                out = model.generate(ids, attention_mask=loss_mask, **options)
            synchronize()
            seconds.append(now() - start)
            assert out.shape[1] == width + work.new_tokens
        return seconds

    return run
