"""One request to one server, and which kind of failure came of it."""

import asyncio
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pyquiet.scaling.backends.base import BackendError, ContextOverflowError, RefusedError, TransientError
from pyquiet.scaling.backends.circuit import Circuit

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
CONNECT_SECONDS = 10.0
# An idle connection is given up before the server does so (after 5 s, uvicorn's habit), or a request meets its end.
IDLE_SECONDS = 3.0
BUSY = frozenset({408, 409, 425, 429})
UNREACHED = frozenset({502, 503, 504})  # a gateway's words for a connection that failed
# What reading JSON of any shape may raise: an infinite count, brackets without end, an empty table.
_SENSELESS = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError, StopIteration)
OVERFLOW = re.compile(
    r"context[ _](length|window|size)|maximum (model|allowed|prompt) length|max_model_len|max_tokens must be .* got -",
    re.IGNORECASE,
)


class MalformedError(TransientError):
    """An answer of status 200 that makes no sense."""


def new_client(key: str | None) -> "httpx.AsyncClient":
    """A client without a limit on connections, which the engine's slots set; the key goes into a header."""
    try:
        import httpx
    except ImportError:
        raise ImportError('servers need httpx: pip install "pyquiet[scale]"') from None
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS),
        mounts={"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None},  # no proxy for these
    )


class Endpoint:
    """A server at `url`, which ends before "/v1".

    Attributes:
        outstanding: requests that are on the wire to it. trouble: why it is not back, where it was lost.

    Args:
        key: kept out of every message, also where the server repeats it.
    """

    def __init__(self, url: str, client: "httpx.AsyncClient", circuit: Circuit, key: str | None) -> None:
        self.url, self.circuit, self.outstanding, self.trouble = url, circuit, 0, ""
        self._client, self._key = client, key

    async def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        seconds: float,
        read: Callable[[Any], T] = lambda answer: answer,
    ) -> T:
        """What `read` makes of the JSON answer to a POST of `body`, or to a GET if there is none. Sent once.

        Raises TransientError, ContextOverflowError or RefusedError. Cancelled, it closes the connection.
        """
        response = await self._send(path, body, seconds)
        if response.status_code >= 300:
            raise self._failure(path, response)
        try:
            return read(response.json())
        except _SENSELESS as error:
            raise MalformedError(self._clean(f"{self.url}{path}: an answer that makes no sense: {error!r}")) from None

    async def _send(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> "httpx.Response":
        import httpx

        self.outstanding += 1
        try:
            async with asyncio.timeout(seconds):
                method = "GET" if body is None else "POST"
                response = await self._client.request(method, self.url + path, json=body)
        except TimeoutError:
            raise TransientError(f"{self.url}{path}: no answer in {seconds:g} s") from None
        except httpx.RequestError as error:
            self.circuit.failed()
            raise TransientError(self._clean(f"{self.url}{path}: {type(error).__name__} {error}")) from None
        finally:
            self.outstanding -= 1
        if response.status_code in UNREACHED:
            self.circuit.failed()
        else:
            self.circuit.succeeded()
        return response

    def _failure(self, path: str, response: "httpx.Response") -> BackendError:
        status, said = response.status_code, response.text
        message = self._clean(f"{self.url}{path}: status {status}: {said[:500]}")
        if status in (400, 413, 422, 500) and OVERFLOW.search(said):
            return ContextOverflowError(message)
        if status in BUSY or status >= 500:
            return TransientError(message, retry_after=retry_after(response.headers.get("retry-after")))
        if status in (401, 403):
            message += "; set the environment variable that api_key_env names to a key of this server"
        elif status < 400:
            message += f"; give the address it points to as base_url: {response.headers.get('location')}"
        return RefusedError(message)

    def _clean(self, message: str) -> str:
        return message.replace(self._key, "***") if self._key else message


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms; None without one that can be read."""
    if value is None:
        return None
    try:
        if value.strip().isdigit():
            return float(value)
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
