"""Errors as OpenAI's API words them."""

from typing import Any


class ApiError(Exception):
  """Ends a request with a status and one clear line.

  Attributes:
    status: of HTTP.
    message: names the fault and the remedy.
    param: field of the request that is at fault, if one is.
    code: a word that programs can look for, if there is one.
    headers: further headers of the response.
  """

  def __init__(
      self, status: int, message: str, *, param: str | None = None, code: str | None = None,
      headers: dict[str, str] | None = None,
  ):
    super().__init__(message)
    self.status = status
    self.message = message
    self.param = param
    self.code = code
    self.headers = headers or {}

  def body(self) -> dict[str, Any]:
    """The JSON object that clients expect."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
    kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
