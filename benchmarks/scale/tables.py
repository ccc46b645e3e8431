"""The tables of the estimates, as Markdown."""

from typing import Any

from benchmarks.scale.paper import (
    MODELS,
    SIZE,
    Hardware,
    Load,
    rollout,
    training_memory,
    training_time,
)

GPUS = (1, 8, 64)
PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "casts", "logits")


def settings() -> list[tuple[str, str, int, bool]]:
    """Combinations of model, precision, number of GPUs, and DDP or FSDP2."""
    layouts = [(gpus, sharded) for gpus in GPUS for sharded in (False, True) if gpus > 1 or not sharded]
    return [(name, precision, *layout) for name in MODELS for precision in SIZE for layout in layouts]


def rows(load: Load, hardware: Hardware) -> list[dict[str, Any]]:
    """All numbers: bytes and seconds of one GPU, with gradient checkpointing."""
    found = []
    room = 0.9 * hardware.memory
    for name, precision, gpus, sharded in settings():
        plain, memory = (training_memory(name, gpus, sharded, flag, load, precision) for flag in (False, True))
        times = training_time(name, gpus, sharded, True, load, hardware, precision)
        samples = rollout(name, gpus, sharded, load, hardware, precision)
        found.append(
            {
                "model": name,
                "precision": precision,
                "gpus": gpus,
                "strategy": "FSDP2" if sharded else "DDP" if gpus > 1 else "one",
                **{part: getattr(memory, part) for part in PARTS},
                "total": memory.total,
                "total_without_checkpointing": plain.total,
                "fits": memory.total <= room,
                "compute": times.compute,
                "communication": times.communication,
                "optimizer_step": times.optimizer,
                "tokens_per_second": gpus * load.tokens / times.step,
                "sampling_memory": samples.memory,
                "sampling_fits": samples.memory <= room,
                "cache": samples.cache,
                "weights_for_sampling": samples.gathers,
                "sampled_tokens_per_second": gpus * samples.rate(load.rows),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Tables of memory, training and sampling. Combinations that do not fit have no times."""
    lines = [
        f"| model | precision | GPUs | strategy | {' | '.join(PARTS)} | total | without checkpointing | fits |",
        "|---" * (len(PARTS) + 7) + "|",
    ]
    for row in found:
        sizes = " | ".join(_gb(row[part]) for part in (*PARTS, "total", "total_without_checkpointing"))
        lines.append(f"| {_name(row)} | {sizes} | {'yes' if row['fits'] else 'no'} |")
    lines += [
        "",
        "| model | precision | GPUs | strategy | arithmetic | communication | optimizer | tokens/s, all GPUs "
        "| sampling: memory | of it cache | weights | tokens/s, all GPUs |",
        "|---" * 12 + "|",
    ]
    for row in found:
        times = [f"{row[part]:.2g} s" for part in ("compute", "communication", "optimizer_step")]
        cells = [*times, f"{row['tokens_per_second']:,.0f}"] if row["fits"] else ["–"] * 4
        rate = f"{row['sampled_tokens_per_second']:,.0f}" if row["sampling_fits"] else "–"
        cells += [_gb(row["sampling_memory"]), _gb(row["cache"]), row["weights_for_sampling"], rate]
        lines.append(f"| {_name(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']} | {row['precision']} | {row['gpus']} | {row['strategy']}"


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}" if value < 1e11 else f"{value / 1e9:,.0f}"
