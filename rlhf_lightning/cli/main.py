"""Entry point of `rlhf`. Heavy imports wait until the command is known."""

import ctypes
import errno
import logging
import os
import sys
import traceback
from contextlib import ExitStack
from importlib import import_module
from types import TracebackType

from rlhf_lightning import __version__
from rlhf_lightning.checkpointing.signals import ended_once
from rlhf_lightning.cli.configs import with_shipped
from rlhf_lightning.cli.console import BROKEN_PIPE, open_standard_streams, silence, steady_console
from rlhf_lightning.errors import UserError, cut
from rlhf_lightning.files import DISK_FULL, visible
from rlhf_lightning.sys_exit import exit_of_user_code

COMMANDS = {
    "sft": ("rlhf_lightning.cli.stage", "supervised fine-tuning: fit, validate, test, predict"),
    "preference": (
        "rlhf_lightning.cli.stage",
        "preference learning (reward model, DPO, …): fit, validate, test, predict",
    ),
    "policy": ("rlhf_lightning.cli.stage", "policy RL: fit, validate, test, predict"),
    "pipeline": ("rlhf_lightning.cli.pipeline", "run the stages of a pipeline file, one after the other"),
    "score": ("rlhf_lightning.cli.score", "score responses, or the two sides of pairs, with a preference model"),
    "evaluate": ("rlhf_lightning.cli.evaluate", "measure a policy on prompts or a benchmark, or compare two policies"),
    "best-of": (
        "rlhf_lightning.cli.evaluate",
        "sample N responses to each prompt and keep the one with the best reward",
    ),
    "generate": ("rlhf_lightning.cli.generate", "print a model's answers to prompts, as text or JSON lines"),
    "label": ("rlhf_lightning.cli.label", "compare answers on a web page, to make pairs for preference learning"),
    "chat": ("rlhf_lightning.cli.chat", "chat with one or several models"),
    "serve": ("rlhf_lightning.cli.serve", "serve a model with OpenAI's API"),
    "tinker": ("rlhf_lightning.cli.tinker", "serve a model for training through Tinker's API"),
    "export": ("rlhf_lightning.cli.export", "merge an adapter, change the dtype, or upload to the Hub"),
    "init": ("rlhf_lightning.cli.init", "create a project folder with configs and example data"),
    "configs": ("rlhf_lightning.cli.configs", "list the configs that come with the package, or copy one to edit"),
    "filter": ("rlhf_lightning.cli.filter", "remove or mark rows by rules, or measure the rules on labeled rows"),
    "data": ("rlhf_lightning.cli.data", "check a data file: lengths, duplicates, bad rows, trained tokens"),
    "report": ("rlhf_lightning.cli.report", "write a run's report.html: curves, samples, warnings, lineage"),
    "quickstart": ("rlhf_lightning.cli.quickstart", "run all stages on a small generated model, or on your own"),
}
RUNS = ("sft", "preference", "policy", "pipeline", "quickstart")
"""Commands that continue when the reader of their output has exited."""
EXAMPLES = """examples:
  rlhf quickstart
  rlhf sft fit -c rlhf:sft --data.train chats.jsonl
  rlhf policy fit -c rlhf:policy --trainer.max_steps 100
  rlhf pipeline rlhf:pipeline
  rlhf chat runs/policy/model --and runs/sft/model
  rlhf score runs/preference/model pairs.jsonl
  rlhf evaluate runs/policy/model runs/sft/model prompts.jsonl --reward runs/preference/model

`rlhf COMMAND --help` describes each command.
Exit codes: 0 success, 1 internal error (`data check`: some rows are bad; `pipeline --verify`: something has
changed), 2 error in files or flags, 130 interrupted."""

UNWRITABLE = {
    **dict.fromkeys(DISK_FULL, "free disk space, or write to another disk"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "change its permissions, or choose another path"),
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.ELOOP: "the links are circular; remove them",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "the path is a folder, not a file; choose another path",
}
"""What to do about errors of a disk or folder, for any command; `refusals` has more specific advice for stages."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of glibc's `mallopt`: free memory at the end of the heap beyond which it shrinks, -1 for never, and
the largest number of allocations outside of the heap."""
CACHED_PRODUCTS = 256
"""Number of products of different sizes whose code oneDNN and PyTorch keep; a step has fewer."""
LONGEST = 300
"""Number of characters at which a path is cut off in messages."""


def usage() -> str:
    """The text of `rlhf --help`."""
    lines = [f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: rlhf COMMAND …", "", "RLHF as plain PyTorch Lightning.", "", *lines, "", EXAMPLES])


def prepare_environment() -> None:
    """Reduce page faults on a CPU, which otherwise take up to a third of a step's time, and bound its memory.

    PyTorch reads an environment variable when it is imported, and enables large pages for large tensors. glibc keeps
    freed memory for the next step instead of returning it to the system, which would clear every page again. oneDNN
    and PyTorch keep the code of each product that they have computed, about half a megabyte for each number of rows;
    by default of 1,024 products each, which rows of different lengths would fill.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(CACHED_PRODUCTS))
    if os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1") != "0" and sys.platform == "linux":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc allocate all memory in its heap, and never shrink it; other C libraries are left as they are."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


def main(args: list[str] | None = None) -> None:
    """Run a command, and exit with its code.

    Args:
        args: Arguments; those of the process by default.
    """
    open_standard_streams()
    sys.excepthook = _traceback
    try:
        try:
            code = _command(sys.argv[1:] if args is None else args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        silence()
        code = BROKEN_PIPE
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        if error.errno in DISK_FULL:
            silence()  # the rest of the output cannot be written either
        name = cut(str(error.filename or "the output"), LONGEST)
        code = _fail(f"{name}: {error.strerror}; {UNWRITABLE[error.errno]}")
    sys.exit(code)


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback with control characters escaped, because an exception may quote a row or a model."""
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))


def _command(args: list[str]) -> int:
    """Run a command and return its exit code."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"rlhf-lightning {__version__}")
        return 0
    if args[0] not in COMMANDS:
        from rlhf_lightning.cli.suggestions import command

        close = command(args[0], COMMANDS)
        hint = f"; did you mean rlhf {close}?" if close else ""
        return _fail(f"unknown command {args[0]!r}; commands are {', '.join(COMMANDS)}{hint}")
    if args[0] in RUNS and (odd := [arg for arg in args if any("\ud800" <= char <= "\udfff" for char in arg)]):
        return _fail(f"{odd[0]}: not valid UTF-8, so it cannot be stored in a config file; rename the file")
    prepare_environment()
    with ExitStack() as around:
        if args[0] in RUNS:
            around.enter_context(steady_console())
        around.enter_context(ended_once())
        try:
            code: int = import_module(COMMANDS[args[0]][0]).run(with_shipped(args))
        except UserError as error:
            code = _fail(str(error))
        except (KeyboardInterrupt, SystemExit) as error:
            if found := exit_of_user_code(error):
                return _fail(str(found))
            if isinstance(error, SystemExit):
                raise
            print("interrupted", file=sys.stderr)
            code = 130
        return code


def _fail(message: str) -> int:
    log = logging.getLogger("rlhf_lightning")
    if log.handlers:
        log.error("error: %s", message)  # to the console, and to the log file of the run
    else:
        print(f"error: {visible(message)}", file=sys.stderr)
    return 2
