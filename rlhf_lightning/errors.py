"""Errors that a person can mend. The command line prints them in one line and exits with code 2."""


class UserError(Exception):
    """Something in the user's files, flags or models is wrong; the message says what, where and what to do."""


class ConfigError(UserError):
    """A setting, a model or a tokenizer does not fit."""


class DataError(UserError):
    """A file or a row of data does not fit; the message names file and line."""
