"""Why a request is not answered: a status of HTTP and one line for people."""

import math


class Refusal(Exception):
    """A request that is refused.

    Args:
        status: The status of HTTP.
        message: One line, without paths of the server.
        field: The field of the request that is to blame, "" for none.
        retry_after: Seconds after which it may be tried again; 0 = no advice.
    """

    def __init__(
        self, status: int, message: str, *, field: str = "", retry_after: float = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.field = field
        self.retry_after = retry_after

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
