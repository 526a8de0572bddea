"""Why a request is not answered: a status of HTTP and one line for people."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

MAX_MESSAGE = 400
"""Longest message in characters: some quote what they were given."""


class Refusal(Exception):
    """A request that is refused.

    Args:
        status: The status of HTTP.
        message: One line, without paths of the server.
        field: The field of the request that is to blame, "" for none.
        retry_after: Seconds after which it may be tried again; 0 = no advice.
        is_quoted: Whether the message is that of an error below, which may name paths: the
            application takes them out.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str = "",
        retry_after: float = 0,
        is_quoted: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.field = field
        self.retry_after = retry_after
        self.is_quoted = is_quoted

    @property
    def content(self) -> dict[str, dict[str, str | None]]:
        """The body of the answer."""
        return {"error": {"message": self.message, "field": self.field or None}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        headers = {}
        if self.retry_after:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


@contextmanager
def refuse_value_errors(field: str = "") -> Iterator[None]:
    """Turns a ValueError in the block into a Refusal 422 of a field.

    For blocks that fail only where the request is wrong. Everywhere else a ValueError is a fault of
    the server, which is logged and answered with 500.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)[:MAX_MESSAGE]
        raise Refusal(422, message, field=field, is_quoted=True) from error
