"""`rlhf report RUN`, and the report at the end of a stage."""

from pathlib import Path

from rlhf_lightning.cli.options import Parser, add_overwrite, check_writable
from rlhf_lightning.files import visible
from rlhf_lightning.report import write_report


def run(args: list[str]) -> int:
    """Write the report and print its path."""
    parser = Parser(
        prog="rlhf report",
        description="Write report.html, a page about a pipeline or a stage: curves, reward against KL, calibration, "
        "answers before and after training, warnings, lineage and configs. It needs no scripts and no network. Each "
        "stage writes its report when it ends; this command can also be used while a stage runs.",
        epilog="example: rlhf report runs/quickstart",
    )
    parser.add_argument("run", type=Path, help="folder of a pipeline or of a stage")
    parser.add_argument("--output", type=Path, help="HTML file to write (default: report.html in the folder)")
    add_overwrite(parser)
    options = parser.parse_args(args[1:])
    if options.output:
        check_writable("--output", options.output, options.overwrite)
    print(visible(str(write_report(options.run, options.output))))
    return 0
