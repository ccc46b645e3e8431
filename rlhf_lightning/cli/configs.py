"""Configs that come with the package: `rlhf configs`, and `-c rlhf:NAME` instead of a file."""

from difflib import get_close_matches
from pathlib import Path

from rlhf_lightning.cli.options import Parser
from rlhf_lightning.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "configs"
PREFIX = "rlhf:"
FLAGS = ("-c", "--config")


def shipped() -> dict[str, Path]:
    """The configs by name: `gsm8k`, `overlays/cpu`, …"""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def config_file(name: str) -> Path:
    """The file of a config.

    Args:
        name: Its name, with or without `.yaml`.

    Raises:
        ConfigError: If there is no config with that name; the message suggests the most similar one.
    """
    files = shipped()
    short = name.removesuffix(".yaml")
    if short not in files:
        close = get_close_matches(short, files, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "`rlhf configs` lists all configs"
        raise ConfigError(f"there is no config {name!r}; {hint}")
    return files[short]


def with_shipped(args: list[str]) -> list[str]:
    """Replace `-c rlhf:NAME`, `--config=rlhf:NAME` and a pipeline's `rlhf:NAME` by paths."""
    found = []
    for before, arg in zip(["", *args], args, strict=False):
        flag, equals, value = arg.partition("=")
        if equals and flag in FLAGS and value.startswith(PREFIX):
            arg = f"{flag}={config_file(value.removeprefix(PREFIX))}"
        elif arg.startswith(PREFIX) and (before in FLAGS or args[:1] == ["pipeline"]):
            arg = str(config_file(arg.removeprefix(PREFIX)))
        found.append(arg)
    return found


def run(args: list[str]) -> int:
    """List the configs, or copy one together with the files that it refers to."""
    parser = Parser(
        prog="rlhf configs",
        description="List the configs that come with the package, or copy one to edit it. A config is used with "
        "-c rlhf:NAME; no copy is needed.",
        epilog="example: rlhf configs copy mint .",
    )
    parser.add_argument(
        "action", nargs="?", choices=("copy",), help="copy a config and the files that it refers to into a folder"
    )
    parser.add_argument("name", nargs="?", help="name of the config, as listed")
    parser.add_argument("dir", nargs="?", type=Path, help="folder to copy to; existing files are not replaced")
    options = parser.parse_args(args[1:])
    if options.action is None:
        width = max(map(len, shipped()))
        for name, path in shipped().items():
            print(f"  {name:<{width}}  {title(path)}")
        return 0
    if options.name is None or options.dir is None:
        parser.error("copy needs the name of a config and a folder: rlhf configs copy mint .")
    for path in copy(options.name, options.dir):
        print(path)
    return 0


def title(path: Path) -> str:
    """First sentence of the comment at the top of a config."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    sentence = " ".join(comment).partition(". ")[0]
    return sentence.partition(", laid over")[0].removesuffix(".")


def copy(name: str, folder: Path) -> list[Path]:
    """Write a config, and the configs of its stages, into a folder.

    Args:
        name: Name of the config.
        folder: Folder to write to.

    Returns:
        The written files.

    Raises:
        ConfigError: If there is no such config, a file exists already, or the folder cannot be created.
    """
    from rlhf_lightning.files import write_text
    from rlhf_lightning.yaml_files import read_mapping

    source = config_file(name)
    stages = read_mapping(source).get("stages")
    named = [stage["config"] for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    wanted = [source, *(source.parent / str(name) for name in named)]
    written = [folder / path.name for path in wanted]
    if there := [path for path in written if path.exists()]:
        raise ConfigError(f"{there[0]}: the file exists already; choose another folder, or move the file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be created ({error.strerror})") from None
    for path, target in zip(wanted, written, strict=True):
        write_text(target, path.read_text(encoding="utf-8"))
    return written
