"""The API's errors, with OpenAI's error body."""

from typing import Any

from rayml.errors import RaymlError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "server_error"}


class ApiError(RaymlError):
    """An error response.

    Args:
        status: HTTP status code.
        message: what is wrong, and what is allowed.
        param: the field at fault, if any.
        code: for programs, such as `context_length_exceeded`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        error_type = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}


def busy_error(message: str) -> ApiError:
    """Return the error for a request that may be sent again a little later."""
    return ApiError(429, message, code="overloaded")
