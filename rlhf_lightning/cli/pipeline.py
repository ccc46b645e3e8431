"""`rlhf pipeline FILE`."""

import argparse
import json
from dataclasses import asdict

from rlhf_lightning.cli.options import Parser
from rlhf_lightning.files import visible
from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.pipeline.run import run_pipeline


def run(args: list[str]) -> int:
    """Run a pipeline file and list its results."""
    parser = Parser(
        prog="rlhf pipeline",
        description="Run the stages of a pipeline file. Finished stages are skipped, an interrupted stage resumes,\n"
        "and a stage whose inputs have changed is refused until you name it with --rerun.",
        epilog="example: rlhf pipeline configs/pipeline.yaml --rerun policy\n"
        "         rlhf pipeline configs/pipeline.yaml -c configs/overlays/cpu.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", help="YAML or JSON: name, seed, stages")
    parser.add_argument("--root", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--rerun",
        action="append",
        default=[],
        metavar="STAGE",
        help="run this stage again, and the stages that depend on it",
    )
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE", help="merged over the settings of every stage"
    )
    parser.add_argument(
        "--verify",
        metavar="RUN",
        help="check a run's inputs and outputs against their recorded hashes; exit code 1 if one differs",
    )
    parser.add_argument("--json", action="store_true", help="with --verify: print JSON")
    options = parser.parse_args(args[1:])
    if options.verify:
        if options.file or options.root or options.rerun or options.config:
            parser.error("--verify takes the folder of a run, and no other argument than --json")
        return verify(options.verify, options.json)
    if not options.file:
        parser.error("give a pipeline file, or --verify RUN")
    if options.json:
        parser.error("--json needs --verify")
    plan = read_plan(options.file, options.root, options.config)
    from rlhf_lightning.cli.check import check_plan  # imports what --help does not need

    check_plan(plan)
    manifest = run_pipeline(plan, rerun=options.rerun)
    for name, stage in manifest["stages"].items():
        print(visible(f"{name:<14}{stage['status']:<10}{stage.get('model', '')}"))
    if (page := plan.root / "report.html").exists():
        print(visible(f"report: {page}"))
    policies = [stage.name for stage in plan.stages if stage.kind != "preference"]
    if policies:
        print(visible(f"chat with it: rlhf chat {plan.model(policies[-1])}"))
    return 0


def verify(run_folder: str, as_json: bool) -> int:
    """Print which parts of a run are unchanged.

    Returns:
        The exit code: 0 if all are, 1 if something differs, is missing or unfinished.
    """
    from rlhf_lightning.pipeline.verify import HUB, SAME, verify_run

    checks = verify_run(run_folder)
    bad = sum(check.status not in (SAME, HUB) for check in checks)
    if as_json:
        print(json.dumps({"run": run_folder, "ok": not bad, "checks": [asdict(check) for check in checks]}, indent=2))
        return int(bool(bad))
    for check in checks:
        print(visible(f"{check.status:<13}{check.stage:<14}{check.what:<17}{check.path}"))
    print(f"{len(checks)} checked, {bad} differ from the record" if bad else f"{len(checks)} checked, all as recorded")
    return int(bool(bad))
