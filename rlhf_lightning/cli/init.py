"""`rlhf init DIR`."""

import json
import re
import shlex
from pathlib import Path

from rlhf_lightning.cli.options import Parser
from rlhf_lightning.files import real_path, visible

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FILES = Path(__file__).parent / "project"


def run(args: list[str]) -> int:
    """Write the files of a project, and print the next steps."""
    parser = Parser(
        prog="rlhf init",
        description="Create a project folder: a commented config for each stage, a pipeline that runs the stages, and "
        "a few example rows of each kind, to be replaced by your own data.",
        epilog="example: rlhf init my_project --model Qwen/Qwen3-0.6B",
    )
    parser.add_argument("dir", type=Path, help="folder to write; existing files are never overwritten")
    parser.add_argument(
        "--model",
        default="Qwen/Qwen3-0.6B",
        help="folder, Hub id or GGUF file to start from (default: Qwen/Qwen3-0.6B)",
    )
    options = parser.parse_args(args[1:])
    folder: Path = options.dir
    check_start(options.model)
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    write_project(folder, model)
    name = shlex.quote(model)
    print(
        visible(f"""{folder} is ready. Replace the example rows in data/ with your own, then:

  cd {shlex.quote(str(folder))}
  rlhf data check data/chats.jsonl --kind sft --model {name}
  rlhf data check data/pairs.jsonl --kind preference --model {name}
  rlhf data check data/prompts.jsonl --kind prompts --model {name}
  rlhf pipeline pipeline.yaml""")
    )
    return 0


def check_start(model: str) -> None:
    """Raise `ConfigError` for a path that is not a model folder. A Hub id is not checked."""
    from rlhf_lightning.errors import ConfigError
    from rlhf_lightning.files import check_model
    from rlhf_lightning.gguf.folder import names_gguf

    check_model(f"--model {model}", model)
    place = Path(model).expanduser()
    if names_gguf(model):
        return
    if not place.exists() and not HUB_ID.fullmatch(model):
        raise ConfigError(f"--model {model}: neither a folder (seen from {Path.cwd()}) nor a Hub id like owner/name")
    if place.is_file():
        raise ConfigError(f"--model {model}: this is a file; give a folder")


def write_project(folder: Path, model: str) -> None:
    """Write the files of a project.

    Args:
        folder: Folder to write to.
        model: Folder or Hub id of the model to start from.

    Raises:
        ConfigError: If one of the files exists already.
    """
    from rlhf_lightning.errors import ConfigError

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: this is a file; give a folder")
    files = sorted(path.relative_to(FILES) for path in FILES.rglob("*.*") if path.suffix in (".yaml", ".jsonl"))
    if there := [str(folder / file) for file in files if (folder / file).exists()]:
        raise ConfigError(f"{there[0]}: the file exists already and is not overwritten; choose another folder")
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in real_path(folder).name) or "project"
    for file in files:
        text = (FILES / file).read_text(encoding="utf-8")
        if file.suffix == ".yaml":
            # A JSON string is valid YAML, whichever characters the path contains.
            text = text.replace("@MODEL@", json.dumps(model, ensure_ascii=False)).replace("@NAME@", name)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
