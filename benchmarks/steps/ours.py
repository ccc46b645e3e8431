"""Steps of this project in whole `Trainer.fit` runs, each timed from the end of the previous step to its own end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.steps.clock import now
from benchmarks.steps.workload import MAX_LENGTH, Workload, count_vowels
from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.kl import KLPenalty


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepTimes(pl.Callback):
    """Records the seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.marks.append(now())

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        synchronize()
        self.marks.append(now())

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def vowels(completions: list[str]) -> list[float]:
    """The reward."""
    return count_vowels(completions)


def parts(task: str, folder: str, work: Workload) -> tuple[Any, Any]:
    """Module and data of a task."""
    rows = {"batch_size": work.batch, "max_length": MAX_LENGTH, "show_example": False}
    if task == "sft":
        return SFTModule(folder, dtype=work.dtype, compile=work.compile), SFTDataModule(work.conversations(), **rows)
    if task == "rl":
        module = PolicyRLModule(
            folder,
            dtype=work.dtype,
            compile=work.compile,
            rewards=[FunctionReward(vowels)],
            kl=KLPenalty(0.04, place="loss"),
            sampler=Sampler(max_tokens=work.new_tokens, cuda_graphs=work.cuda_graphs),
        )
        sizes = {"prompts_per_round": work.groups, "group_size": work.group_size, "minibatches": 1}
        return module, PromptDataModule(work.prompts(), max_prompt_tokens=MAX_LENGTH, show_example=False, **sizes)
    scorer = RewardHead() if task == "reward" else ImplicitReward(beta=0.1)
    module = PreferenceModule(folder, scorer=scorer, dtype=work.dtype, compile=work.compile)
    return module, PreferenceDataModule(work.pairs(), **rows)


def trainer(steps: int, root: Path, work: Workload, callbacks: list[Any]) -> pl.Trainer:
    """A Trainer that runs a number of steps and writes nothing."""
    return pl.Trainer(
        accelerator="gpu" if work.device == "cuda" else work.device,
        devices=1,
        max_epochs=steps,
        max_steps=steps,
        precision=work.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )


class Training:
    """Steps of a task: a call runs a number of them and returns the seconds of each."""

    def __init__(self, task: str, folder: Path, work: Workload) -> None:
        self.module, self.data = parts(task, str(folder), work)
        self.root, self.work = folder.parent / "run", work

    def __call__(self, steps: int, callbacks: Sequence[Any] = ()) -> list[float]:
        times = StepTimes()
        trainer(steps, self.root / "ours", self.work, [times, *callbacks]).fit(self.module, self.data)
        return times.seconds

    @property
    def packs(self) -> bool:
        """True if rows were packed and prompts shared; known after a call."""
        return bool(self.module.packed_forward.packs)


class Generation:
    """Rounds of sampling: a call runs a number of them and returns the seconds of each."""

    def __init__(self, folder: Path, work: Workload) -> None:
        from transformers import AutoModelForCausalLM

        self.work, tokenizer = work, work.load_tokenizer()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=work.dtype).eval().to(work.device)
        self.engine = LocalEngine(model, tokenizer.decode, slots=work.generate_batch, cuda_graphs=work.cuda_graphs)
        self.prompts = generation_prompts(work, tokenizer)

    def __call__(self, steps: int) -> list[float]:
        seconds = []
        for step in range(steps):
            start = now()
            seeds = [step * len(self.prompts) + i for i in range(len(self.prompts))]
            with torch.autocast(self.work.device, dtype=torch.bfloat16, enabled=self.work.autocast):
                samples = self.engine.generate(self.prompts, SamplingParams(max_tokens=self.work.new_tokens), seeds)
            synchronize()
            seconds.append(now() - start)
            assert all(len(sample.ids) == self.work.new_tokens for sample in samples)
        return seconds

    @property
    def packs(self) -> bool:
        """True if prompts were packed; known after a call."""
        return self.engine.packed_forward.packs


def runner(task: str, folder: Path, work: Workload) -> Training | Generation:
    """The object that runs steps of a task."""
    return Generation(folder, work) if task == "generate" else Training(task, folder, work)


def generation_prompts(work: Workload, tokenizer: Any) -> list[list[int]]:
    """Distinct prompts, as token ids."""
    return [
        tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        for pair in work.pairs(work.generate_batch)
    ]


def lightning_cost(steps: int, root: Path, work: Workload) -> float:
    """Median seconds of Lightning's own overhead per step: the same Trainer with a module of one weight."""

    class Empty(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.weight * 0.0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    times = StepTimes()
    trainer(steps, root, work, [times]).fit(Empty(), torch.utils.data.DataLoader([0]))
    return sorted(times.seconds)[len(times.seconds) // 2]


def prepared(task: str, folder: Path, work: Workload) -> list[Any]:
    """The rendered rows of an epoch; for `generate` the prompts."""
    if task == "generate":
        return generation_prompts(work, work.load_tokenizer())
    module, data = parts(task, str(folder), work)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    return data.prepared["train"].rows


def operations(task: str, folder: Path, work: Workload) -> float:
    """Number of operations that a step needs, see `flops.needed`."""
    from benchmarks.steps.flops import needed

    epoch = work.batches if task in ("sft", "reward", "dpo") else 1
    return needed(task, work, prepared(task, folder, work)) / epoch


KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise"),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer": ("aten::_fused_adamw_",),
}


class SecondStep(pl.Callback):
    """Profiles the second step, because the first one allocates the optimizer's state."""

    def __init__(self) -> None:
        self.recorded = torch.profiler.profile()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            self.recorded.start()
        elif trainer.global_step == 2:
            self.recorded.stop()


def profile(task: str, folder: Path, work: Workload) -> dict[str, float]:
    """Fractions of a step's time by kind of operation; `rest` is Python, Lightning and small operations' overhead."""
    run = runner(task, folder, work)
    if isinstance(run, Training):
        second = SecondStep()
        _, seconds = run(2, [second])
        recorded = second.recorded
    else:
        run(1)
        with torch.profiler.profile() as recorded:
            (seconds,) = run(1)
    times: dict[str, float] = dict.fromkeys([*KINDS, "elementwise"], 0.0)
    for event in recorded.key_averages():
        if event.key.startswith(("aten::", "mkldnn::")):
            kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "elementwise")
            times[kind] += event.self_cpu_time_total / 1e6
    seconds = max(seconds, sum(times.values()))  # the profiler has wall time, `seconds` may be CPU time
    times["rest"] = seconds - sum(times.values())
    return {kind: value / seconds for kind, value in times.items()}
