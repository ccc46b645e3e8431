"""Reading the fields of a JSON request; nothing that a client wrote is ignored."""

import json

from rlhf_lightning.errors import cut, first_line
from rlhf_lightning.types import JSON

NEUTRAL: dict[str, tuple[JSON, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
}
"""Fields that are not supported, with the values that change nothing and are accepted."""


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: What is wrong and what to do.
        param: The field that it is about.
        code: OpenAI's code of the error.
        status: Status of the response.
        kind: OpenAI's type of the error.

    Example:
        >>> RequestError("n is 0; it must be at least 1", "n").body()["error"]["param"]
        'n'
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status, self.kind = message, param, code, status, kind

    def body(self) -> dict[str, JSON]:
        """The error as OpenAI's API writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def json_of(content: bytes) -> JSON:
    """The value that a request's JSON contains.

    Args:
        content: The body.

    Raises:
        RequestError: If it is not valid JSON, or a text in it is not valid Unicode.
    """
    try:
        value: JSON = json.loads(content)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not valid JSON ({first_line(error)})") from None
    return value


class Fields:
    """The fields of a request. Each is taken once; `finish` refuses those that nobody took.

    Args:
        body: The request. Fields that are null count as absent.
        where: Name of the object within the request, for messages; empty for the request itself.

    Raises:
        RequestError: If it is not an object.

    Example:
        >>> fields = Fields({"n": 2})
        >>> fields.whole("n", 1, 8)
        2
    """

    def __init__(self, body: JSON, where: str = "") -> None:
        if not isinstance(body, dict):
            raise RequestError(f"{where or 'the request'} must be a JSON object", where or None)
        self.where = where
        self._values = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> JSON:
        """The value of a field; None if it is absent."""
        return self._values.pop(name, None)

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number within bounds."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.error(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number within bounds."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(name, value, f"a whole number from {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, value, "text")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text, or a list of at most `most` texts, none of them empty; no texts if it is absent."""
        value = self.take(name)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        found = tuple(item for item in items if isinstance(item, str) and item)
        if len(found) < len(items) or len(items) > most:
            raise self.error(name, value, f"a text or a list of up to {most} texts, none of them empty")
        return found

    def finish(self) -> None:
        """Refuse the fields that were not taken, unless they change nothing."""
        for name, value in self._values.items():
            if value in NEUTRAL.get(name, ()):
                continue
            only = "".join(f"; only {json.dumps(one)} is accepted" for one in NEUTRAL.get(name, ())[:1])
            raise RequestError(
                f"{self._path(name)} is not supported by this server{only}", self._path(name), "unsupported_parameter"
            )

    def error(self, name: str, value: JSON, wanted: str) -> RequestError:
        """An error about the value of a field.

        Args:
            name: The field.
            value: Its value.
            wanted: What it must be.
        """
        path = self._path(name)
        return RequestError(f"{path} is {cut(json.dumps(value), 80)}; it must be {wanted}", path, "invalid_value")

    def _path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name
