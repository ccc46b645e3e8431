"""Objects that record their constructor arguments, so that a checkpoint can store them as plain values."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_CLASSES: dict[str, type] = {}
"""Classes that `rebuild` may instantiate, by name: subclasses of `Settings` and classes marked `plain`.

Only classes that are already imported are listed; `rebuild` never imports a module because a file names it.
"""


class NotPlain(TypeError):
    """An argument has no plain form, such as a function or an object of another library."""


class UnknownClass(LookupError):
    """A description names a class that is unknown or not imported."""


class Settings:
    """Base class of the objects that configure a module: losses, advantages, rewards, scorers, samplers, …

    It records the arguments of the outermost constructor, so that `describe` can express the object in plain values,
    from which `rebuild` creates an equal object. Dataclasses are described by their fields. After construction the
    object is frozen, unless it has state (`state_dict`).

    Example:
        >>> class Clip(Settings):
        ...     def __init__(self, low: float = 0.2) -> None:
        ...         self.bound = 1 - low
        >>> describe(Clip(0.5))["init_args"]
        {'low': 0.5}
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _CLASSES[_name(cls)] = cls
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        if "_complete" in self.__dict__ and not name.startswith("_"):
            raise AttributeError(
                f"{type(self).__name__}.{name} cannot be set: settings are frozen after construction. Create a new "
                "object with the other value, keep mutable state in the object that the settings build, or cache "
                "values in an attribute with a leading underscore"
            )
        super().__setattr__(name, value)

    def _arguments_given(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments to call the constructor with; called once, before the outermost constructor."""
        return given

    def _constructed(self, given: Mapping[str, Any]) -> None:
        """Called once, after the outermost constructor, with its arguments."""
        if not hasattr(self, "state_dict"):  # an object with state, such as running statistics, stays mutable
            object.__setattr__(self, "_complete", True)


def plain(cls: type[T]) -> type[T]:
    """Decorator that makes a dataclass known to `describe` and `rebuild` without the base class `Settings`.

    With the base class, jsonargparse would ask for a `class_path`, to choose among subclasses.
    """
    _CLASSES[_name(cls)] = cls
    return cls


def _name(cls: type) -> str:
    """Name of a class in a description: the short name for classes of this package, the dotted name for others."""
    own = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_given" in self.__dict__:
            init(self, *args, **kwargs)
            return
        _, *named = signature.bind(self, *args, **kwargs).arguments.items()
        given = {name: value for name, value in named if name != extra}
        given = self._arguments_given({**given, **dict(named).get(extra, {})} if extra else given)
        object.__setattr__(self, "_given", given)
        positional = [p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL]
        rest = given.pop(positional[0]) if positional and positional[0] in given else ()
        init(self, *rest, **given)
        self._constructed(given)

    return constructor


def describe(value: Any) -> Any:
    """Express a value in plain values: numbers, strings, lists, dicts, and `{class_path, init_args}` for settings.

    Args:
        value: The value.

    Raises:
        NotPlain: If a part of it has no plain form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if _CLASSES.get(_name(type(value))) is type(value):
        given = getattr(value, "_given", {})
        if is_dataclass(value):
            given = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"class_path": _name(type(value)), "init_args": describe(given)}
    raise NotPlain(f"an object of type {type(value).__name__} cannot be stored as plain settings")


def arguments(value: Settings) -> dict[str, Any]:
    """All arguments of an object's constructor in plain values, including defaults.

    Args:
        value: The object.

    Raises:
        NotPlain: If one of them has no plain form.
    """
    parameters = inspect.signature(type(value)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    given: dict[str, Any] = describe({**defaults, **getattr(value, "_given", {})})
    return given


def rebuild(value: Any) -> Any:
    """The inverse of `describe`.

    Args:
        value: A description.

    Raises:
        UnknownClass: If it names a class that is not an imported subclass of `Settings`.
    """
    if isinstance(value, list | tuple):
        return [rebuild(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"class_path", "init_args"}:
        return {key: rebuild(item) for key, item in value.items()}
    name = value["class_path"]
    if not isinstance(name, str) or name not in _CLASSES:
        raise UnknownClass(f"{name!r} is not a known class")
    return _CLASSES[name](**rebuild(value["init_args"]))
