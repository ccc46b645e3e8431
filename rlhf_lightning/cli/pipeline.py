"""`rlhf pipeline FILE`."""

import argparse

from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.pipeline.run import run_pipeline


def run(args: list[str]) -> int:
    """Run a pipeline file and list what it left."""
    parser = argparse.ArgumentParser(
        prog="rlhf pipeline",
        description="Run the stages of a pipeline file. What is finished is not run again, what was interrupted "
        "resumes, and a stage whose inputs changed says so.",
        epilog="example: rlhf pipeline configs/pipeline.yaml --rerun policy\n"
        "         rlhf pipeline configs/pipeline.yaml -c configs/overlays/cpu.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="YAML or JSON: name, seed, stages")
    parser.add_argument("--root", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--rerun", action="append", default=[], metavar="STAGE", help="run this stage and its children anew"
    )
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE", help="laid over the settings of every stage"
    )
    options = parser.parse_args(args[1:])
    manifest = run_pipeline(read_plan(options.file, options.root, options.config), rerun=options.rerun)
    for name, stage in manifest["stages"].items():
        print(f"{name:<14}{stage['status']:<10}{stage.get('model', '')}")
    return 0
