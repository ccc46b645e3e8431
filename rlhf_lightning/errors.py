"""Errors that a person can mend. The command line prints them in one line and exits with code 2."""


class UserError(Exception):
    """Something in the user's files, flags or models is wrong; the message says what, where and what to do."""


class ConfigError(UserError):
    """A setting, a model or a tokenizer does not fit."""


class DataError(UserError):
    """A file or a row of data does not fit; the message names file and line."""


MOST = 2**31 - 1
"""No setting counts further."""


def check_whole(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Refuse what is no whole number in these bounds; raises `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if value > most:
        raise ConfigError(f"{name} is {value}; it must be at most {most}")


def check_seed(name: str, value: int) -> None:
    """Refuse a seed that numpy does not take; raises `ConfigError`."""
    if not 0 <= value < 2**32:
        raise ConfigError(f"{name} {value}: a seed is a whole number from 0 to 4294967295")


def check_object(name: str, value: object, example: str) -> None:
    """Refuse a name, a number or a class where an object of settings belongs; raises `ConfigError`."""
    if isinstance(value, type):
        raise ConfigError(f"{name} is the class {value.__name__}; pass an instance of it: {value.__name__}(…)")
    if isinstance(value, str | int | float | dict | list | tuple | set):
        raise ConfigError(f"{name} is {value!r}; in Python pass an object, for example {example}")
