"""`rlhf pipeline FILE`."""

import argparse
import json
from dataclasses import asdict

from rlhf_lightning.cli.options import Parser
from rlhf_lightning.files import visible
from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.pipeline.run import run_pipeline


def run(args: list[str]) -> int:
    """Run a pipeline file and print the status and model folder of each stage."""
    parser = Parser(
        prog="rlhf pipeline",
        description="Run the stages of a pipeline file. Finished stages are skipped, and an interrupted stage is\n"
        "resumed. If the inputs of a finished stage have changed, run it again with --rerun.",
        epilog="example: rlhf pipeline rlhf:pipeline --rerun policy\n"
        "         rlhf pipeline rlhf:pipeline -c rlhf:overlays/cpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", help="pipeline file (YAML or JSON), or rlhf:NAME for one of `rlhf configs`")
    parser.add_argument("--root", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--rerun",
        action="append",
        default=[],
        metavar="STAGE",
        help="run this stage again, and all stages that depend on it; may be repeated",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="config file that is merged over the settings of every stage; may be repeated",
    )
    parser.add_argument(
        "--verify",
        metavar="RUN",
        help="compare the inputs and outputs of a run with their recorded hashes; exit code 1 if any has changed",
    )
    parser.add_argument("--json", action="store_true", help="with --verify: print a JSON object")
    options = parser.parse_args(args[1:])
    if options.verify:
        if options.file or options.root or options.rerun or options.config:
            parser.error("--verify takes the folder of a run, and no other argument but --json")
        return verify(options.verify, options.json)
    if not options.file:
        parser.error("give a pipeline file, or --verify RUN")
    if options.json:
        parser.error("--json has no effect without --verify")
    plan = read_plan(options.file, options.root, options.config)
    from rlhf_lightning.cli.check import check_plan  # imported late, because --help does not need torch

    check_plan(plan)
    manifest = run_pipeline(plan, rerun=options.rerun)
    for name, stage in manifest["stages"].items():
        print(visible(f"{name:<14}{stage['status']:<10}{stage.get('model', '')}"))
    if (page := plan.root / "report.html").exists():
        print(visible(f"report: {page}"))
    policies = [stage.name for stage in plan.stages if stage.kind != "preference"]
    if policies:
        print(visible(f"chat with the model: rlhf chat {plan.model(policies[-1])}"))
    return 0


def verify(run_folder: str, as_json: bool) -> int:
    """Print which inputs and outputs of a run are unchanged.

    Returns:
        The exit code: 0 if all are unchanged, 1 if any differs, is missing or is unfinished.
    """
    from rlhf_lightning.pipeline.verify import HUB, SAME, verify_run

    checks = verify_run(run_folder)
    bad = sum(check.status not in (SAME, HUB) for check in checks)
    if as_json:
        print(json.dumps({"run": run_folder, "ok": not bad, "checks": [asdict(check) for check in checks]}, indent=2))
        return int(bool(bad))
    for check in checks:
        print(visible(f"{check.status:<13}{check.stage:<14}{check.what:<17}{check.path}"))
    print(f"{len(checks)} checked, {bad} differ from the record" if bad else f"{len(checks)} checked, all unchanged")
    return int(bool(bad))
