"""Imports modules from the current folder, but only those that the user has named.

If the folder were on `sys.path`, as with `python -m`, any import in a library could resolve to it. For example, a
downloaded model folder with the name of a package that is not installed would be imported as that package.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType

from rlhf_lightning.files import real_path

_DOTTED = re.compile(r"(?<![\w./\\-])([A-Za-z_]\w*)\.(?=[A-Za-z_])")
_FILE = re.compile(r"[^\s'\"\[\]{},:=]+\.ya?ml")


SCORER_HELP = "dotted path of your own scorer class, if the preference model was trained with one"


class UserFolder(MetaPathFinder):
    """Import finder for named modules of a folder, and for modules next to them that they import.

    Args:
        folder: The folder.

    Example:
        >>> finder = UserFolder(Path("."))
        >>> finder.named.add("my_rewards")
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.named: set[str] = set()
        self._served: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a top-level module; packages find their submodules themselves."""
        if path is not None or not (fullname in self.named or _importer() in self._served):
            return None
        spec = PathFinder.find_spec(fullname, [str(self.folder)], target)
        if spec is not None:
            self._served.add(fullname)
        return spec


def _importer() -> str:
    """Top-level name of the module that requested the import."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] if frame else ""


def allow_user_code(texts: Iterable[str]) -> None:
    """Allow imports from the current folder of modules that are named in texts, or in YAML files named there.

    Args:
        texts: Arguments of the command, or the text of settings.
    """
    here = Path.cwd()
    finder = next((one for one in sys.meta_path if isinstance(one, UserFolder) and one.folder == here), None)
    if finder is None:
        finder = UserFolder(here)
        sys.meta_path.insert(0, finder)
    finder.named |= _names(texts, here)


def import_scorer(path: str | None) -> None:
    """Import the user's own scorer class. Model folders may only name scorers that were imported like this."""
    if path is not None:
        from rlhf_lightning.imports import imported

        imported(path, "--scorer")


def _names(texts: Iterable[str], folder: Path) -> set[str]:
    found: set[str] = set()
    waiting, seen = [(text, folder) for text in texts], set[Path]()
    while waiting:
        text, place = waiting.pop()
        found |= set(_DOTTED.findall(text))
        for name in _FILE.findall(text):
            for file in {real_path(folder / name), real_path(place / name)} - seen:
                if file.is_file():
                    seen.add(file)
                    waiting.append((file.read_text(encoding="utf-8", errors="replace"), file.parent))
    return found
