"""Why a request is refused, with its HTTP status, in the form that clients of the OpenAI API read."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel
from starlette.exceptions import HTTPException

GONE = 499
"""The status, in logs and metrics alone, of a request whose client did not wait for the answer."""

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ProblemReply(BaseModel):
    """The body of every answer that is not a success."""

    error: Problem


class Refusal(HTTPException):
    """A request that is not served: one sentence, the field it is about, and a word for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        headers = {"Retry-After": str(retry_after)} if retry_after else None
        if status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def problem(status: int, message: str, param: str | None = None, code: str | None = None) -> ProblemReply:
    """The body of a refusal."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ProblemReply(error=Problem(message=message, type=kind, param=param, code=code))


def documented(*statuses: int) -> Mapping[int | str, dict[str, object]]:
    """What the OpenAPI document says of refusals."""
    return {status: {"model": ProblemReply} for status in statuses}
