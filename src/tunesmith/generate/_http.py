"""JSON over HTTP to one server, with errors that say what to do.

Takes routes and objects, gives the answer's JSON, or its text where it is none. A request that the server puts off (429, 503) is sent
again after a while; a redirect is not followed, since the token would go with it.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from ..errors import RecipeError, RolloutFailed

# Seconds before the first repetition, doubled each time, at most LONGEST_WAIT; the server's own Retry-After counts where it gives one.
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
PUT_OFF = (429, 503)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerRefused(RolloutFailed):
    """The server answered with an error. status: HTTP's number. message: the server's words."""

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None, status: int = 0, message: str = ""):
        super().__init__(what, where=where, mend=mend)
        self.status, self.message = status, message


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object, **kwargs: object) -> None:
        """Follows nothing: the answer becomes an HTTPError."""


class Client:
    """Posts to the routes under url/v1. url: http or https, with or without /v1. token: sent as the bearer, or None. timeout: seconds."""

    def __init__(self, url: str, *, token: str | None, timeout: float, retries: int):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise RecipeError("not the address of a server", where=parts.hostname or url, mend="give it as http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries = timeout, retries
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def address(self, route: str) -> str:
        """The whole address of a route."""
        return f"{self.url}/v1/{route}"

    def post(self, route: str, request: dict[str, Any]) -> Any:
        """The answer's JSON, or its text where it is no JSON.

        Raises ServerRefused for an error status, and RolloutFailed where the server cannot be reached or does not answer in time.
        """
        for repeated in range(self.retries + 1):
            try:
                return self._once(route, request)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in PUT_OFF or repeated == self.retries:
                        raise self._refused(route, error) from error
                    time.sleep(_wait(error.headers.get("Retry-After"), repeated))
        raise AssertionError("the last repetition returns or raises")

    def _once(self, route: str, request: dict[str, Any]) -> Any:
        sent = urllib.request.Request(self.address(route), json.dumps(request).encode(), self._headers, method="POST")
        try:
            with self._opener.open(sent, timeout=self.timeout) as answer:
                text = answer.read().decode("utf-8", errors="replace")
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
            raise self._unreachable(route, error) from error
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _unreachable(self, route: str, error: Exception) -> RolloutFailed:
        reason = getattr(error, "reason", error)
        where = self.address(route)
        if isinstance(reason, TimeoutError):
            return RolloutFailed(f"no answer within {self.timeout:g} seconds", where=where, mend="see whether the server is overloaded")
        if isinstance(reason, ConnectionRefusedError):
            return RolloutFailed("nothing listens there", where=where, mend="start the server, or correct its address")
        return RolloutFailed(f"the server cannot be reached: {reason or type(reason).__name__}", where=where)

    def _refused(self, route: str, error: urllib.error.HTTPError) -> ServerRefused:
        message = _message(error.read().decode("utf-8", errors="replace"))
        mends = {401: "set OPENAI_API_KEY to the server's key", 403: "set OPENAI_API_KEY to the server's key"}
        mends |= dict.fromkeys(PUT_OFF, "the server stayed overloaded: lower the concurrency, or wait")
        mends |= dict.fromkeys((301, 302, 303, 307, 308), "redirects are not followed: name the address that it points to")
        what = f"the server refused with {error.code}: {message or error.reason}"
        return ServerRefused(what, where=self.address(route), mend=mends.get(error.code), status=error.code, message=message)


def _message(text: str) -> str:
    """What an error's body says: OpenAI's and vLLM's {"error": {"message"}}, FastAPI's {"detail"}, or the text itself, shortened."""
    try:
        body = json.loads(text)
    except ValueError:
        return text.strip()[:500]
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return str(body)[:500]


def _wait(retry_after: str | None, repeated: int) -> float:
    """Seconds to wait before sending again."""
    try:
        asked = float(retry_after) if retry_after is not None else FIRST_WAIT * 2**repeated
    except ValueError:  # a date
        asked = FIRST_WAIT * 2**repeated
    return min(LONGEST_WAIT, max(0.0, asked))
