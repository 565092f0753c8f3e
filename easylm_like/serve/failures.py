"""What the server answers when it cannot: OpenAI's error object, one sentence with the real cause."""

from collections.abc import Mapping

from easylm_like.serve.request import Busy, Closing

Json = dict[str, object]

RETRY_AFTER = "1"  # seconds: about the time in which a slot becomes free, or another server takes over
KINDS = {429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets no answer: HTTP status, sentence, and OpenAI's `code` and `param` (the field at fault)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> Json:
        """Return the JSON object that the client gets."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, code: str | None = None, param: str | None = None) -> ApiError:
    """Return the error for a request that must be changed before it is sent again."""
    return ApiError(400, message, code=code, param=param)


def turned_away(error: Busy | Closing) -> ApiError:
    """Return the error for a request that may be sent again as it is, here or elsewhere."""
    headers = {"Retry-After": RETRY_AFTER}
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=headers)
    return ApiError(503, str(error), code="service_unavailable", headers={**headers, "Connection": "close"})
