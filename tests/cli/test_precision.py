"""`--trainer.precision auto`."""

from pathlib import Path

import pytest
from jsonargparse import Namespace

from rlhf_lightning.cli import precision
from rlhf_lightning.cli.precision import choose_precision
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.auto_precision import PAYS, MeasuredPrecision, measure_precision
from rlhf_lightning.yaml_files import read_mapping
from tests.helpers.cli import rlhf
from tests.helpers.rows import chats, write_rows


def unmeasured(*sizes: int) -> MeasuredPrecision:
    raise AssertionError("a resumed run must not measure")


@pytest.mark.parametrize(("layer", "chosen"), [(PAYS, "bf16-mixed"), (PAYS - 0.01, "32-true")])
def test_choice_is_printed_saved_and_kept_on_resume(
    layer: float, chosen: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: int) -> MeasuredPrecision:
        print("sizes", *given)
        return MeasuredPrecision("AMX", product=4.0, layer=layer)

    file, root = write_rows(tmp_path / "chats.jsonl", chats(8)), tmp_path / "run"
    (tmp_path / "auto.yaml").write_text("trainer: {precision: auto, accelerator: cpu}\n")
    command = ["sft", "fit", "--model.model", base, "--data.train", str(file), "-c", str(tmp_path / "auto.yaml")]
    command += ["--trainer.default_root_dir", str(root), "--checkpoint_every", "1"]
    monkeypatch.setattr(precision, "measure_precision", measured)
    out = rlhf(*command, "--trainer.max_steps", "1")
    config = read_mapping(Path(base) / "config.json")
    assert f"sizes {config['hidden_size']} {config['intermediate_size']}" in out
    assert f"trainer.precision auto: {chosen}. bf16 (AMX): measured {layer:.1f} times float32 here" in out
    saved = read_mapping(root / "config.yaml")["trainer"]
    assert isinstance(saved, dict)
    assert saved["precision"] == chosen
    monkeypatch.setattr(precision, "measure_precision", unmeasured)
    assert "resuming" in rlhf(*command, "--trainer.max_steps", "2")
    saved = read_mapping(root / "config.yaml")["trainer"]
    assert isinstance(saved, dict)
    assert saved["precision"] == chosen


def test_without_auto_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure_precision", unmeasured)
    config = Namespace(trainer=Namespace(precision=None))
    choose_precision(config, dict)
    assert config.trainer.precision is None


def test_ranks_of_lightning_get_the_choice_and_those_of_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure_precision", unmeasured)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(precision.CHOSEN, raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        config = Namespace(trainer=Namespace(precision="auto", accelerator="cpu"))
        with pytest.raises(ConfigError, match="a launcher started several"):
            choose_precision(config, dict)
    monkeypatch.setenv(precision.CHOSEN, "bf16-mixed")
    choose_precision(config, dict)
    assert config.trainer.precision == "bf16-mixed"


def test_measurement_gives_ratios_of_the_processor() -> None:
    found = measure_precision(64, 192)
    assert 0.01 < found.product < 100
    assert 0.01 < found.layer < 100
    assert found.precision in ("bf16-mixed", "32-true")
