"""Runs the stages of a plan, each in its own process; later stages use the model folders of earlier ones."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import yaml

from rlhf_lightning.data.records import check_there, fingerprint
from rlhf_lightning.data.row_filter import filter_fingerprint
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import FORMAT, duration, hash_model, read_object, real_path, visible, write_json
from rlhf_lightning.pipeline.eta import Eta
from rlhf_lightning.pipeline.plan import Plan, Stage, merged, read_plan, section
from rlhf_lightning.pipeline.stage_process import StageProcess
from rlhf_lightning.pipeline.verify import settings_hash
from rlhf_lightning.report import report_after_stage
from rlhf_lightning.report.records import Manifest, StageEntry, StageFacts, StageInputs, read_manifest, read_record
from rlhf_lightning.run_folder import PIPELINE_RESULTS, claim, claims
from rlhf_lightning.types import JSON

log = logging.getLogger(__name__)
MODEL_REWARD = "rlhf_lightning.rewards.ModelReward"
BY_ONE_MODEL = ("ModelReward", "GenerativeReward")
SOURCES = ("train", "validation", "test", "episodes")


def run_pipeline(
    plan: Plan | Mapping[str, JSON] | str | Path, root: str | Path | None = None, rerun: Sequence[str] = ()
) -> Manifest:
    """Run a pipeline. Finished stages are skipped, and an interrupted stage is resumed.

    Args:
        plan: A plan, or what `read_plan` takes.
        root: Folder of the run; `runs/NAME` by default.
        rerun: Stages to run again, together with the stages that depend on them.

    Returns:
        The manifest: for each stage its status, inputs, seconds, metrics and model folder.

    Raises:
        ConfigError: If the plan is invalid, or the inputs of a stage have changed since it ran.
        UserError: If a stage failed.
    """
    checked = plan if isinstance(plan, Plan) else read_plan(plan, root)
    with claims(), StageProcess() as signals:
        claim(checked.root, PIPELINE_RESULTS)
        runner = _Runner(checked, rerun, signals)
        for stage in checked.stages:
            runner.run(stage)
    return runner.manifest


def stage_settings(plan: Plan, stage: Stage, failed: Mapping[str, Stage] | None = None) -> dict[str, JSON]:
    """The whole configuration of a stage, including the model folders of other stages.

    Args:
        plan: The plan.
        stage: The stage.
        failed: The failed stages by name.

    Raises:
        UserError: If the stage starts from a stage that failed.
    """
    failed = failed or {}
    model: dict[str, JSON] = {}
    if stage.start:
        if stage.start in failed:
            raise UserError(f"stage {stage.name} starts from {stage.start}, which failed")
        model["model"] = plan.model(stage.start)
    if stage.reward:
        model["rewards"] = _rewards(plan, stage, stage.reward, failed)
    if stage.critic:
        if stage.critic in failed:
            raise UserError(f"the critic of stage {stage.name} starts from {stage.critic}, which failed")
        model["critic"] = {"model": plan.model(stage.critic)}
    return merged(stage.settings, {"model": model} if model else {})


def _rewards(plan: Plan, stage: Stage, source: str, failed: Mapping[str, Stage]) -> list[JSON]:
    """A stage's rewards with the model of `source`: in those that lack a model, or else in a `ModelReward` besides."""
    given = section(stage.settings, "model").get("rewards")
    own: list[JSON] = given if isinstance(given, list) else []
    if source in failed:
        return [*(reward for reward in own if not _lacks_model(reward)), failed[source].rule_reward]
    if not any(_lacks_model(reward) for reward in own):
        own = [*own, {"class_path": MODEL_REWARD}]
    return [_with_model(plan, stage, source, reward) if _lacks_model(reward) else reward for reward in own]


def _lacks_model(reward: JSON) -> TypeGuard[dict[str, JSON]]:
    """True for a reward by one model that its settings do not name."""
    return (
        isinstance(reward, dict)
        and str(reward.get("class_path")).rpartition(".")[2] in BY_ONE_MODEL
        and "model" not in section(reward, "init_args")
    )


def _with_model(plan: Plan, stage: Stage, source: str, reward: dict[str, JSON]) -> JSON:
    scorer = {} if str(reward["class_path"]).endswith("GenerativeReward") else _own_scorer(plan, stage)
    return {**reward, "init_args": {"model": plan.model(source), **scorer, **section(reward, "init_args")}}


def _own_scorer(plan: Plan, stage: Stage) -> dict[str, str]:
    """The user's own scorer class in the settings of the stage that is the reward of this one, if any."""
    trained = next((one for one in plan.stages if one.name == stage.reward), None)
    scorer = section(trained.settings, "model").get("scorer") if trained else None
    path = str((scorer.get("class_path") if isinstance(scorer, dict) else scorer) or "")
    return {"scorer": path} if "." in path and not path.startswith("rlhf_lightning.") else {}


def check_data(plan: Plan, stage: Stage) -> None:
    """Raise `DataError` if a data file of the stage is missing. Files that the run creates itself are not checked."""
    data, root = section(stage.settings, "data"), real_path(plan.root)
    for name in SOURCES:
        for file in given if isinstance(given := data.get(name), list) else [given]:
            if isinstance(file, str) and not real_path(file).is_relative_to(root):
                check_there(file)


class _Runner:
    def __init__(self, plan: Plan, rerun: Sequence[str], signals: StageProcess) -> None:
        self.plan, self.signals = plan, signals
        names = {stage.name for stage in plan.stages}
        if unknown := set(rerun) - names:
            raise ConfigError(
                f"--rerun {sorted(unknown)[0]}: the pipeline has no such stage; stages are {', '.join(sorted(names))}"
            )
        self.rerun: set[str] = set().union(*(plan.descendants(name) for name in rerun))
        self.failed: dict[str, Stage] = {}
        self.path = plan.root / "manifest.json"
        plan.root.mkdir(parents=True, exist_ok=True)
        before = read_manifest(self.path).get("stages") or {}
        (plan.root / "pipeline.yaml").write_text(yaml.safe_dump(plan.source, sort_keys=False, allow_unicode=True))
        self.manifest: Manifest = {"format": FORMAT, "name": plan.name, "seed": plan.seed, "stages": before}
        self.clock = Eta(plan, self.manifest["stages"])

    def run(self, stage: Stage) -> None:
        """Run a stage, unless it is finished."""
        place = f"[{self.plan.stages.index(stage) + 1}/{len(self.plan.stages)}] {stage.name}"
        settings = stage_settings(self.plan, stage, self.failed)
        inputs = self._inputs(stage, settings)
        entry = self.manifest["stages"].get(stage.name)
        fresh = stage.name in self.rerun
        if entry and not fresh and entry["status"] != "failed":
            self._refuse_changed(stage, entry["inputs"], inputs)
            if entry["status"] == "finished" and (self.plan.folder(stage.name) / "stage.json").exists():
                print(visible(f"{place}: already finished"), flush=True)
                return
        where = self.plan.folder(stage.name)
        print(visible(f"{place}: {stage.kind} in {where} ({self.clock.before(stage)})"), flush=True)
        self._record(stage, {"status": "running", "inputs": inputs})
        started = time.time()
        code = self._process(stage, settings, fresh)
        if code == 0:
            self._finish(stage, inputs, time.time() - started)
        else:
            self._fail(stage, inputs, code)

    # -- inputs ---------------------------------------------------------------------------------------------------

    def _inputs(self, stage: Stage, settings: dict[str, JSON]) -> StageInputs:
        """Hashes of all inputs that the result of a stage depends on."""
        sources = {name: section(settings, "data").get(name) for name in SOURCES}
        inputs: StageInputs = {
            "settings": settings_hash(settings),
            "data": {
                name: digest
                for name, source in sources.items()
                if isinstance(source, str | list | dict) and source and (digest := fingerprint(source, name))
            },
            "seed": self.plan.seed,
        }
        if (rules := filter_fingerprint(section(settings, "data").get("filter"))) is not None:
            inputs["filter"] = rules
        for key, reference in stage.handed.items():
            inputs[key] = self._hash(reference)
        return inputs

    def _hash(self, reference: str) -> str:
        if reference in self.failed:
            return "failed"
        return hash_model(Path(self.plan.model(reference))) or reference

    def _refuse_changed(self, stage: Stage, before: StageInputs, now: StageInputs) -> None:
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            raise ConfigError(
                f"the inputs of stage {stage.name} have changed since it ran: {', '.join(changed)}. Run it and the "
                f"stages that depend on it again with --rerun {stage.name}, or give the pipeline another name."
            )

    # -- the process ----------------------------------------------------------------------------------------------

    def _process(self, stage: Stage, settings: dict[str, JSON], fresh: bool) -> int:
        folder = self.plan.folder(stage.name)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "input.yaml"
        config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        command = [sys.executable, "-m", "rlhf_lightning", stage.kind, "fit", "-c", str(config)]
        command += ["--trainer.default_root_dir", str(folder), "--seed_everything", str(self.plan.seed)]
        command += ["--log_file", str(self.plan.root / "logs" / "run.log")]
        return self.signals.run(command + (["--fresh"] if fresh else []))

    # -- results --------------------------------------------------------------------------------------------------

    def _record(self, stage: Stage, entry: StageEntry) -> None:
        entry = {"kind": stage.kind, "configs": stage.configs, "handed": stage.handed, **entry}
        self.manifest["stages"][stage.name] = entry
        write_json(self.path, self.manifest)
        if entry["status"] != "running":
            report_after_stage(self.plan.root)

    def _finish(self, stage: Stage, inputs: StageInputs, seconds: float) -> None:
        folder = self.plan.folder(stage.name)
        facts = read_record(folder / "stage.json", StageFacts)
        parent = {"stage": stage.start, "hash": inputs["start"]} if stage.start else None
        written = {**read_object(folder / "stage.json"), "name": stage.name, "parent": parent, "inputs": inputs}
        for path in (folder / "stage.json", folder / "model" / "stage.json"):
            write_json(path, written)
        entry: StageEntry = {"status": "finished", "inputs": inputs, "seconds": round(seconds, 1)}
        entry |= {"model": str(folder / "model"), "model_hash": facts["model_hash"], "metrics": facts["metrics"]}
        self._record(stage, entry)
        print(f"{visible(stage.name)}: finished in {duration(seconds)}", flush=True)
        if self.signals.asked:  # the signal came too late to stop the stage
            raise KeyboardInterrupt

    def _fail(self, stage: Stage, inputs: StageInputs, code: int) -> None:
        # A stage that was asked to stop has not failed, whatever its exit code; on_failure does not apply.
        if code == 130 or self.signals.asked:
            raise KeyboardInterrupt
        self._record(stage, {"status": "failed", "inputs": inputs, "exit_code": code})
        if stage.rule_reward is None:
            where = self.plan.root / "logs" / "run.log"
            raise UserError(f"stage {stage.name} failed (exit code {code}); its error is above and in {where}")
        self.failed[stage.name] = stage
        rule = stage.rule_reward["class_path"]
        said = (
            f"stage {stage.name} failed (exit code {code}). The pipeline continues as set by on_failure, with the rule"
        )
        print(visible(f"WARNING: {said} reward {rule}; reward_source_prm is 0."), flush=True)
