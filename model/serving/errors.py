"""What a client is told when its request cannot be served, in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is not served.

    Args:
        status: of HTTP.
        message: the value, the rule and what to do, in one line.
        param: the field of the request that it is about.
        code: a word for programs.
        retry_after_s: when another try may be worth while.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers: Mapping[str, str] = {}
        if self.retry_after_s is not None:
            headers = {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(self.body(), self.status, headers=dict(headers))


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """A request whose field has a value that cannot be."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)
