"""`rlhf report RUN`, and the report at the end of a stage."""

from pathlib import Path

from rlhf_lightning.cli.options import Parser, add_overwrite, check_writable
from rlhf_lightning.files import visible
from rlhf_lightning.report import write_report


def run(args: list[str]) -> int:
    """Write the report and print its path."""
    parser = Parser(
        prog="rlhf report",
        description="Write report.html, a page about a pipeline or a stage that needs no scripts and no network: "
        "curves, reward against KL, calibration, answers before and after training, warnings, lineage and configs. "
        "Each stage writes it when it ends; for a running stage it shows the progress so far.",
        epilog="example: rlhf report runs/quickstart",
    )
    parser.add_argument("run", type=Path, help="folder of a pipeline or of a stage")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the folder)")
    add_overwrite(parser)
    options = parser.parse_args(args[1:])
    if options.output:
        check_writable("--output", options.output, options.overwrite)
    print(visible(str(write_report(options.run, options.output))))
    return 0
