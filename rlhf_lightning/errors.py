"""Errors that a person can mend. The command line prints them in one line and exits with code 2."""


class UserError(Exception):
    """Something in the user's files, flags or models is wrong; the message says what, where and what to do."""


class ConfigError(UserError):
    """A setting, a model or a tokenizer does not fit."""


class DataError(UserError):
    """A file or a row of data does not fit; the message names file and line."""


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least so much; raises `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")


def check_object(name: str, value: object, example: str) -> None:
    """Refuse a name, a number or a class where an object of settings belongs; raises `ConfigError`."""
    if isinstance(value, type):
        raise ConfigError(f"{name} is the class {value.__name__}; pass an instance of it: {value.__name__}(…)")
    if isinstance(value, str | int | float | dict | list | tuple | set):
        raise ConfigError(f"{name} is {value!r}; in Python pass an object, for example {example}")
