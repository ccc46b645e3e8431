"""`rlhf label`: a web page on which people compare answers."""

import argparse
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.cli.options import Parser, add_weight_flags, check_options, device_of
from rlhf_lightning.cli.rendering_flags import (
    add_rendering_flags,
    add_sampling_flags,
    rendering_options,
    sampling_of,
    say,
)
from rlhf_lightning.cli.web_flags import access_of, add_web_flags, check_port, reachable
from rlhf_lightning.errors import ConfigError, check_whole, missing_package
from rlhf_lightning.files import as_json, hash_model
from rlhf_lightning.types import JSON

if TYPE_CHECKING:
    from rlhf_lightning.labeling.agreement import LabelReport, Rate
    from rlhf_lightning.labeling.ensemble import Ensemble
    from rlhf_lightning.labeling.queue import Assignment, LabelQueue
    from rlhf_lightning.labeling.sampling import AnsweringModel, AnswerSampler
    from rlhf_lightning.web import Access

TOKEN = "RLHF_LABEL_TOKEN"
"""Environment variable with the token that annotators must give."""


def run(args: list[str]) -> int:
    """Serve the page until Ctrl-C, then print a report; with `--report`, only print the report of a session."""
    options = _parse(args[1:])
    from rlhf_lightning.cli.logs import setup_logging

    setup_logging("warning", None)
    if options.report:
        _report(options.report, options.json)
        return 0
    if options.judge:
        _judge(options)
        return 0
    _check(options)
    try:
        from rlhf_lightning import web
        from rlhf_lightning.labeling.server import LabelServer
    except ModuleNotFoundError as error:
        raise missing_package(error, "rlhf label", "label") from None
    from rlhf_lightning.labeling.queue import LabelQueue
    from rlhf_lightning.labeling.store import LabelStore

    assignment = _assignment(options)
    access = access_of(options, TOKEN)
    with ExitStack() as opened:
        place = opened.enter_context(web.bound(options.host, options.port))
        models = _models(options)
        ensemble = _ensemble(options)
        store = LabelStore(options.out, _settings(options, models), options.ties)
        opened.callback(store.close)
        queue = LabelQueue(store, assignment)
        sampler = _fill(options, queue, models, ensemble)
        pages = LabelServer(queue, access)
        if sampler is not None:
            opened.callback(sampler.stop)
            pages = LabelServer(queue, access, lambda: sampler.is_running, lambda: sampler.failed)
        _greet(web.address_of(place), options.host, access)
        with suppress(KeyboardInterrupt):  # this is how labeling ends
            web.web_server(pages.app()).run(sockets=[place])
        if sampler is not None and sampler.is_running:
            say("waiting for the answers that are being sampled")
    if any(store.decisions.values()):
        _report(options.out, options.json)
    return 0


def _judge(options: argparse.Namespace) -> None:
    """Let a judge decide the comparisons of a session, or of given answers, and print the report."""
    from rlhf_lightning.cli.judge_file import read_judge
    from rlhf_lightning.labeling.comparisons import given_answers, pairs_of_answers
    from rlhf_lightning.labeling.judge import label_by_judge
    from rlhf_lightning.labeling.revision import add_revisions
    from rlhf_lightning.labeling.store import LabelStore, session_settings
    from rlhf_lightning.rewards import PairwiseJudgeReward

    if options.model:
        raise ConfigError(
            "--judge decides about given answers or those of an earlier session; sample the answers with rlhf generate "
            "--json, and name that file with --responses instead of --model"
        )
    check_whole("--revise", options.revise, 0)
    _check_out(options)
    judge = read_judge(options.judge)
    if not isinstance(judge, PairwiseJudgeReward):
        raise ConfigError(f"--judge: {options.judge}: two answers are compared; add pairwise: true")
    if options.revise and not options.responses:
        raise ConfigError("--revise needs the answers to revise: --responses FILE")
    if judge.columns:
        raise ConfigError("the judge needs the columns of a data row, which comparisons do not have; remove columns")
    known = session_settings(options.out)
    if known is None and not options.responses:
        raise ConfigError(f"{options.out} has no session yet; give the answers to compare with --responses")
    client = judge.judge.build()
    settings = _settings(options, []) if options.responses or known is None else known
    with closing(LabelStore(options.out, settings, options.ties)) as store:
        answers = given_answers(options.responses, options.limit)
        store.add(pairs_of_answers(answers))
        if options.revise:
            each = [(question, candidate) for question, candidates in answers for candidate in candidates]
            left_out = add_revisions(store, each, judge, client, options.revise)
            if left_out:
                say(f"{left_out} answers have tool calls or several turns; they are not revised")
        say(f"the annotator is called {label_by_judge(store, _assignment(options), judge, client)!r}")
    _report(options.out, options.json)


def _check(options: argparse.Namespace) -> None:
    if bool(options.model) == bool(options.responses):
        raise ConfigError("give either a model that answers, with --model, or given answers, with --responses")
    if options.model and not options.prompts:
        raise ConfigError("--model needs the prompts that it answers: --prompts FILE")
    if options.responses and (options.prompts or options.and_):
        raise ConfigError("--prompts and --and are for answers of a model; --responses has both prompts and answers")
    if options.revise:
        raise ConfigError("--revise lets a judge revise answers; add --judge FILE")
    _check_out(options)
    if options.reward and options.pick != "uncertain":
        raise ConfigError("--reward gives the ensemble of --pick uncertain; add that flag")
    check_whole("--ahead", options.ahead)
    check_port(options)
    check_options(options)


def _check_out(options: argparse.Namespace) -> None:
    if options.out is None:
        raise ConfigError("give the file of pairs to write: --out pairs.jsonl")
    if options.out.suffix != ".jsonl":
        raise ConfigError(f"--out {options.out}: the file has JSON lines, so its name must end with .jsonl")


def _assignment(options: argparse.Namespace) -> "Assignment":
    from rlhf_lightning.labeling.page import NAME
    from rlhf_lightning.labeling.queue import Assignment

    names = [" ".join(name.split()) for name in (options.annotators or "").split(",")]
    names = list(dict.fromkeys(name for name in names if name))
    if long := [name for name in names if len(name) > NAME]:
        raise ConfigError(f"--annotators: {long[0]!r} has more than {NAME} characters")
    return Assignment(
        options.overlap / 100, tuple(names), options.queue == "separate", options.pick == "uncertain", options.seed
    )


def _models(options: argparse.Namespace) -> "list[AnsweringModel]":
    """The models that answer, with their prompts."""
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.labeling.sampling import AnsweringModel

    found = []
    for name in dict.fromkeys([*([options.model] if options.model else []), *options.and_]):
        policy = Policy(name, options.dtype, device_of(options.device), rendering_options(options))
        sampling, said = sampling_of(options, name, policy)
        say(policy.asking.describe(), said)
        found.append(AnsweringModel(name, policy, policy.prompts(options.prompts, options.limit), sampling))
    if len(found) == 1 and found[0].sampling.get("temperature") == 0:
        raise ConfigError(
            "the temperature is 0, so both answers of the model would be the same; set --temperature above 0, or name "
            "another model with --and"
        )
    return found


def _ensemble(options: argparse.Namespace) -> "Ensemble | None":
    """The preference models of `--pick uncertain`."""
    if options.pick != "uncertain":
        return None
    from rlhf_lightning.labeling.ensemble import Ensemble
    from rlhf_lightning.models.reward_model import RewardModel

    device = device_of(options.device)
    return Ensemble([RewardModel(name, options.dtype).to(device) for name in options.reward])


def _settings(options: argparse.Namespace, models: "list[AnsweringModel]") -> dict[str, JSON]:
    """What all answers of a session share."""
    named: list[JSON] = [
        {
            "name": one.name,
            "sha256": hash_model(Path(one.name).expanduser()),
            "sampling": one.sampling_record(options.max_tokens),
        }
        for one in models
    ]
    rendering: dict[str, JSON] = rendering_options(options) if models else {}
    return {"seed": options.seed, "models": named, "rendering": rendering}


def _fill(
    options: argparse.Namespace,
    queue: "LabelQueue",
    models: "list[AnsweringModel]",
    ensemble: "Ensemble | None",
) -> "AnswerSampler | None":
    """Put given answers into the queue, or begin to sample answers."""
    from rlhf_lightning.labeling.comparisons import given_answers, pairs_of_answers
    from rlhf_lightning.labeling.sampling import AnswerSampler

    if models:
        sampler = AnswerSampler(
            queue, models, options.max_tokens, options.seed, options.batch_size, options.ahead, ensemble
        )
        sampler.start()
        return sampler
    comparisons = pairs_of_answers(given_answers(options.responses, options.limit))
    comparisons = [one for one in comparisons if one.id not in queue.store.comparisons]
    if ensemble is not None:
        comparisons = ensemble.scored(comparisons)
    queue.add(comparisons)
    return None


def _greet(address: str, host: str, access: "Access") -> None:
    address = reachable(address, host)
    print(f"open {address}{f'#{access.token}' if access.token else ''} to compare answers; Ctrl-C ends", flush=True)
    if access.token:
        print(f"annotators need the token {access.token}", flush=True)


# -- report -----------------------------------------------------------------------------------------------------------


def _report(out: Path, as_object: bool) -> None:
    """Print the report of the session that wrote a file of pairs."""
    from rlhf_lightning.labeling.agreement import label_report
    from rlhf_lightning.labeling.store import read_session, session_folder

    folder = session_folder(out)
    if not (folder / "decisions.jsonl").is_file():
        raise ConfigError(f"--report {out}: there is no {folder / 'decisions.jsonl'}; name the --out of rlhf label")
    report = label_report(*read_session(folder))
    if as_object:
        print(as_json(report.record(), indent=2))
    else:
        _show(report)


def _show(report: "LabelReport") -> None:
    from rich.console import Console
    from rich.table import Table

    from rlhf_lightning.files import visible

    console = Console(highlight=False, markup=False)
    table = Table(title=visible(f"{report.comparisons} comparisons, {report.pairs} pairs"))
    for column in ("annotator", "A", "B", "tie", "both bad", "skip", "seconds (median)", "chose A"):
        table.add_column(column, justify="left" if column == "annotator" else "right")
    for name, facts in report.annotators.items():
        counts = [str(count) for count in facts.choices.values()]
        table.add_row(visible(name), *counts, f"{facts.seconds:.1f}", _percent(facts.chose_a, counted=False))
    console.print(table)
    console.print(f"position bias: A was chosen in {_percent(report.chose_a)} of the choices of A or B")
    for pair in report.agreement:
        who = visible(" and ".join(pair.annotators))
        console.print(f"{who}: agree in {_percent(pair.agreed)}, Cohen's kappa {_number(pair.cohen_kappa)}")
    if report.fleiss_raters:
        by = f"{report.fleiss_count} comparisons with {report.fleiss_raters} decisions"
        console.print(f"Fleiss' kappa {_number(report.fleiss_kappa)} ({by})")
        alpha, count = _number(report.krippendorff_alpha), report.krippendorff_count
        console.print(f"Krippendorff's alpha {alpha} ({count} comparisons with two or more decisions)")
    for names, rate in report.models.items():
        console.print(visible(f"{names}: {_percent(rate)}"))


def _percent(rate: "Rate", counted: bool = True) -> str:
    if rate.rate is None:
        return "–"
    among = f", n = {rate.count}" if counted else ""
    return f"{100 * rate.rate:.0f}% ({100 * rate.low:.0f}–{100 * rate.high:.0f}{among})"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rlhf label",
        description="Serve a web page on which people compare two answers to a prompt, blind and in random order, and\n"
        "write their choices as pairs for rlhf preference. Ctrl-C ends; the same command continues.",
        epilog="example: rlhf label --model runs/sft/model --prompts prompts.jsonl --out pairs.jsonl\n"
        "         rlhf label --responses answers.jsonl --out pairs.jsonl --annotators Ann,Ben --overlap 20\n"
        "         rlhf label --report pairs.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder, Hub id or GGUF file of the model that answers, or an adapter")
    parser.add_argument(
        "--and",
        dest="and_",
        action="append",
        default=[],
        metavar="MODEL",
        help="another model; answers of two models are then compared; may be repeated",
    )
    parser.add_argument("--prompts", metavar="FILE", help="rows with prompt or messages, or a .txt file")
    parser.add_argument(
        "--responses",
        action="append",
        default=[],
        metavar="FILE",
        help="compare these answers instead: rows with prompt and response, responses, or chosen and rejected; may be "
        "repeated",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSONL file of pairs to write")
    parser.add_argument("--ties", action="store_true", help="also write ties, as rows with tie: true")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print agreement, position bias and time instead")
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    people = parser.add_argument_group("annotators")
    people.add_argument("--annotators", metavar="NAMES", help="names, separated by commas (default: any name)")
    people.add_argument(
        "--queue",
        choices=("shared", "separate"),
        default="shared",
        help="shared: each annotator gets the next comparison; separate: they are divided in advance (default: shared)",
    )
    people.add_argument(
        "--overlap",
        type=float,
        default=10.0,
        metavar="PERCENT",
        help="percentage of the comparisons that every annotator decides (default: 10)",
    )
    people.add_argument(
        "--pick",
        choices=("order", "uncertain"),
        default="order",
        help="uncertain: show first where the models of --reward disagree (default: order)",
    )
    people.add_argument(
        "--reward", action="append", default=[], metavar="MODEL", help="preference model of the ensemble; repeat it"
    )
    people.add_argument(
        "--judge",
        type=Path,
        metavar="FILE",
        help="no page: let a judge behind an endpoint decide all comparisons of --responses, or of the session of "
        "--out; YAML file with pairwise: true (docs/judges.md)",
    )
    people.add_argument(
        "--revise",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="with --judge: the judge first criticizes and revises each answer this many times, and then also compares "
        "the answer with its revision (default: 0)",
    )
    add_web_flags(parser, "page", 8765, "annotators", TOKEN)
    add_sampling_flags(parser)
    parser.add_argument("--limit", type=int, help="use only the first LIMIT prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of answers, order and overlap (default: 0)")
    parser.add_argument(
        "--ahead", type=int, default=32, help="number of comparisons kept ready for each annotator (default: 32)"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="number of prompts answered together (default: 4)")
    add_weight_flags(parser)
    add_rendering_flags(parser)
    return parser.parse_args(args)
