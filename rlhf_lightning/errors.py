"""Errors that the user can fix. The command line prints them in one line and exits with code 2."""

from collections.abc import Iterable
from typing import TypeGuard


class UserError(Exception):
    """A file, flag or model of the user is wrong; the message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """A setting, a model or a tokenizer is unsuitable."""


class DataError(UserError):
    """A data file or row is unusable; the message names the file and line."""


class SyncError(UserError):
    """A sampling engine does not hold the policy's weights; the message says how that was noticed."""


def quoted(names: Iterable[str], none: str = "nothing") -> str:
    """Names for a message, each in quotes; `none` if there are no names."""
    return ", ".join(map(repr, names)) or none


MOST = 2**31 - 1
"""Largest value of an integer setting."""


LARGEST = (2 - 2**-23) * 2.0**127
"""Largest float32, in which rewards, margins and advantages are computed."""


def is_finite(value: object) -> TypeGuard[float]:
    """True for a number, other than a boolean, that is finite as float32.

    Example:
        >>> is_finite(1.5), is_finite(10**400), is_finite(float("nan")), is_finite(True)
        (True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def cut(text: str, length: int) -> str:
    """A text for a message, cut off after `length` characters."""
    return text if len(text) <= length else f"{text[:length]}…"


def short(value: object) -> str:
    """The `repr` of a value for a message, cut to 80 characters."""
    return cut(repr(value), 80)


def check_whole(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Raise `ConfigError` unless a value is an integer within bounds.

    Args:
        name: Name of the setting.
        value: The value.
        least: Smallest allowed value.
        most: Largest allowed value.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if value > most:
        raise ConfigError(f"{name} is {value}; it must be at most {most}")


def check_seed(name: str, value: object) -> int:
    """Return a seed; raise `ConfigError` if numpy does not accept it."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from 0 to 4294967295")
    return value


DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """Raise `ConfigError` unless a `--dtype` is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def missing_package(error: ModuleNotFoundError, what: str, extra: str) -> ConfigError:
    """The error about a package that is not installed.

    Args:
        error: The error of the import.
        what: What needs the package.
        extra: The extra that installs it.
    """
    return ConfigError(f"{what} needs the package {error.name}; install it with pip install 'rlhf-lightning[{extra}]'")


def check_object(name: str, value: object, example: str) -> None:
    """Raise `ConfigError` if a name, a number or a class is given instead of an object.

    Args:
        name: Name of the setting.
        value: The value.
        example: Example of an object, for the message.
    """
    if isinstance(value, type):
        raise ConfigError(f"{name} is the class {value.__name__}; pass an instance of it: {value.__name__}(…)")
    if isinstance(value, str | int | float | dict | list | tuple | set):
        raise ConfigError(f"{name} is {value!r}; in Python pass an object, for example {example}")
