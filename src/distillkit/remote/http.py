"""HTTP client for model servers: retries transient failures, and reports permanent ones in one line.

The API key is read from the environment when a client is created. It is never stored in an attribute that is copied,
logged or saved, and it is masked in quoted server messages. It is sent over HTTPS or within this machine only.
"""

import ipaddress
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from distillkit.errors import ConfigError, ServerError
from distillkit.remote import consent

_log = logging.getLogger(__name__)

T = TypeVar("T")
_TRANSIENT_STATUSES = (408, 409, 425, 429)  # and every status from 500
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SHORTEST_SECRET = 8  # `EMPTY`, the usual placeholder for servers without keys, may occur in a normal response
_WARNING_INTERVAL = 10.0  # seconds between two warnings about retries
_MAX_CONTENT = 64 * 2**20  # bytes of a response, unpacked
_KEY_ENDING = "_API_KEY"


class TransientError(Exception):
    """A failure that may not occur again if the request is retried.

    Args:
        reason: Description of the failure.
        wait: Seconds to wait before the next try, as the server requested; None if it requested nothing.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class MissingError(ServerError):
    """The server does not provide this path."""


class StoppedError(Exception):
    """The request was cancelled because another one failed."""


class Client:
    """A thread-safe client of one server. Use it as a context manager.

    Args:
        url: Base URL of the API, such as `http://127.0.0.1:8000/v1`.
        key_variable: Name of the environment variable that holds the API key; None sends no key.
        timeout: Seconds within which a response must be complete, from the attempt to connect to the last byte.
        retries: Number of retries after a transient failure.
        backoff: Seconds before the second try. It doubles with each further try, and half of it is random.
        max_wait: Longest wait before a try, in seconds. If the server requests a longer one, the request fails.
        concurrency: Maximum number of simultaneous requests.

    Raises:
        ConfigError: If the environment variable is not set, does not hold a valid key, or is not one that a
            configuration may send (see `check_variable`), or the key would be sent in clear text to another machine.
    """

    def __init__(
        self,
        url: str,
        key_variable: str | None,
        timeout: float,
        retries: int,
        backoff: float,
        max_wait: float,
        concurrency: int,
    ) -> None:
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.backoff, self.max_wait = backoff, max_wait
        self._variable, self._key = key_variable, _key(key_variable)
        is_local = _is_loopback(httpx2.URL(url).host)
        if self._key is not None and not is_local and not self.url.startswith("https:"):
            consent.require("http_key", f"{self.url} would get the API key of {key_variable} in clear text: use https")
        self._http = httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity"}
            | ({} if self._key is None else {"Authorization": f"Bearer {self._key}"}),
            timeout=None,  # the time-out is that of the whole exchange
            verify=self.url.startswith("https:"),  # loading the certificates takes 0.1 s, and only https needs them
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            trust_env=not is_local,  # requests within this machine, and their key, don't go through a proxy
        )
        self._stack = ExitStack()
        self._stopped, self._last_warning = threading.Event(), float("-inf")
        # Not the global generator: its state belongs to training and must not change.
        self._random = random.SystemRandom()

    def __enter__(self) -> "Client":
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._stack.callback(self._close)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _close(self) -> None:
        with suppress(RuntimeError):  # aborted: the event loop, and the connections with it, are gone
            self._portal.call(self._http.aclose)

    def stop(self) -> None:
        """Cancels all requests that have not been sent yet, and all retries."""
        self._stopped.set()

    def abort(self) -> None:
        """Cancels all requests, those under way as well: the process is about to end."""
        self.stop()
        self._portal.call(self._portal.stop, True)

    def request(self, path: str, body: dict[str, Any] | None, parse: Callable[[dict[str, Any]], T]) -> T:
        """Sends a request, with retries, and returns the parsed response.

        Args:
            path: Path after the base URL, such as `/models`.
            body: JSON object to POST; None sends a GET request.
            parse: Converts the JSON object of the response; raises `TransientError` if the object is malformed.

        Raises:
            ServerError: If the server rejects the request, or all tries failed.
            StoppedError: If `stop` was called before this request, or while it waited for a retry.
        """
        if self._stopped.is_set():
            raise StoppedError
        start = time.monotonic()
        for attempt in range(1, self.retries + 2):
            try:
                return parse(self._send_once(path, body))
            except TransientError as error:
                failure = error
            wait = self.backoff * 2 ** (attempt - 1) * self._random.uniform(0.5, 1)
            wait = min(wait, self.max_wait) if failure.wait is None else max(failure.wait, min(wait, self.max_wait))
            if attempt > self.retries or wait > self.max_wait:
                break
            self._warn(f"{self.url}{path}: {failure}; trying again in {wait:.1f} s")
            if self._stopped.wait(wait):
                raise StoppedError
        tries = "1 try" if attempt == 1 else f"{attempt} tries"
        message = f"{self.url}{path}: failed after {tries} in {time.monotonic() - start:.0f} s. Last failure: {failure}"
        if failure.wait is not None and failure.wait > self.max_wait:
            message += f"; the server asks to wait {failure.wait:.0f} s, more than the limit of {self.max_wait:g} s"
        raise ServerError(message)

    def _send_once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Sends a request once and returns the JSON object of the response.

        Raises:
            TransientError: If it failed in a way that a retry may fix.
            ServerError: If the server rejects the request, or its response contains the API key.
        """
        try:
            status, headers, content = self._portal.call(self._exchange, "GET" if body is None else "POST", path, body)
        except (CancelledError, RuntimeError) as error:
            if not self._stopped.is_set():
                raise
            raise StoppedError from error
        except TimeoutError as error:
            raise TransientError(f"no response within {self.timeout:g} s") from error
        except httpx2.RequestError as error:
            reason = self._masked(_first_cause(error)) or "no reason given"
            raise TransientError(f"{type(error).__name__} ({reason})") from error
        if status in _TRANSIENT_STATUSES or status >= 500:
            raise TransientError(f"status {status}{self._quoted(content)}", _retry_after(headers.get("retry-after")))
        if status in (401, 403):
            raise ServerError(f"{self.url}{path}: {self._authentication_failure(status)}")
        if status != 200:
            kind = MissingError if status in (404, 405) else ServerError
            raise kind(f"{self.url}{path}: the server rejected the request with status {status}{self._quoted(content)}")
        if self._key is not None and len(self._key) >= _SHORTEST_SECRET and self._key.encode() in content:
            raise ServerError(
                f"{self.url}{path}: the response contains the API key of {self._variable}, so it was discarded"
            )
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
            raise TransientError(f"a response of {len(content)} bytes that is not JSON") from error
        if not isinstance(reply, dict):
            raise TransientError("a response that is not a JSON object")
        return reply

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, httpx2.Headers, bytes]:
        """Sends a request and returns the status, headers and content of the response.

        The time-out covers the whole exchange, even if the server sends a byte now and then, or informational responses
        without end.

        Raises:
            RequestError: If the connection fails.
            TimeoutError: If the time-out is exceeded.
            ServerError: If the content is larger than `_MAX_CONTENT`.
        """
        content = bytearray()
        with anyio.fail_after(self.timeout):
            async with self._http.stream(method, self.url + path, json=body) as reply:
                async for part in reply.aiter_bytes():
                    content += part
                    if len(content) > _MAX_CONTENT:
                        raise ServerError(f"{self.url}{path}: a response of more than {_MAX_CONTENT >> 20} MiB")
        return reply.status_code, reply.headers, bytes(content)

    def _authentication_failure(self, status: int) -> str:
        failure = f"authentication failed ({status})"
        if self._variable is None:
            return f"{failure}. Set `key_variable` to the environment variable that holds the API key."
        return f"{failure}. The server rejected the API key in the environment variable {self._variable}: correct it."

    def _quoted(self, content: bytes) -> str:
        """The error message in a response, as the end of a sentence; empty if there is none."""
        text = content.decode("utf-8", "replace")
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            reply = text
        for name in ("error", "message", "detail"):
            if isinstance(reply, dict) and reply.get(name):
                reply = reply[name]
        message = self._masked(reply if isinstance(reply, str) else json.dumps(reply))
        return f": {message}" if message else ""

    def _masked(self, text: str) -> str:
        """The text on one line of at most 300 characters, with the API key masked."""
        masked = text if self._key is None else text.replace(self._key, "***")
        line = " ".join(masked.split()).rstrip(".")
        return line if len(line) <= 300 else f"{line[:300]}…"

    def _warn(self, message: str) -> None:
        """Logs a warning, unless another one was logged within `_WARNING_INTERVAL`."""
        now = time.monotonic()
        if now - self._last_warning >= _WARNING_INTERVAL:  # a race of two threads only repeats the line
            self._last_warning = now
            _log.warning("%s", message)


def check_url(url: str, where: str) -> None:
    """Checks that a URL is valid and contains no secret, which would end up in every log and saved configuration.

    Args:
        url: The URL, as configured.
        where: Name of the setting, for error messages.

    Raises:
        ConfigError: If the URL is invalid or may contain a secret; the message then does not repeat it.
    """
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{where} is not a valid URL ({error}). An example: http://127.0.0.1:8000/v1.") from error
    if parts.userinfo or parts.query or parts.fragment:
        raise ConfigError(
            f"{where} must contain neither user, password, query nor fragment, because it is logged and saved. Put the "
            "API key into an environment variable and set key_variable to its name."
        )
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ConfigError(f"{where} must start with http:// or https:// and a host, got {url!r}.")


def check_variable(name: str | None, where: str) -> None:
    """Checks that `name` can be the name of an environment variable, and that a configuration may send its value.

    A value that can't be a name may be the key itself, so the error message does not repeat it. A configuration may
    name variables that end in `_API_KEY`; others need the user's consent, since they may hold anything.

    Args:
        name: Name of the variable; None passes the check.
        where: Name of the setting, for error messages.

    Raises:
        ConfigError: If it can't be a name, or its value may not be sent.
    """
    if name is None:
        return
    if not _VARIABLE.fullmatch(name):
        raise ConfigError(
            f"{where} must be the name of an environment variable in capital letters, such as OPENAI_API_KEY, never "
            "the key itself, which would be logged and saved."
        )
    if not name.endswith(_KEY_ENDING):
        consent.require(
            f"key:{name}", f"{where} would send the environment variable {name}, which does not end in {_KEY_ENDING}"
        )


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"The environment variable {variable} is not set. Set it to the server's API key.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"The environment variable {variable} does not hold a valid API key, which consists of printable ASCII "
            "characters without spaces. Correct it."
        )
    return key


def _first_cause(error: BaseException) -> str:
    """The message of the error that caused `error` in the first place, such as that of the operating system."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause
    return str(error)


def _is_loopback(host: str) -> bool:
    """Whether a host name stands for this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _retry_after(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header requests, as a number or a date; None without a valid header."""
    if header is None:
        return None
    try:
        seconds = float(header)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
        date = date.replace(tzinfo=UTC) if date.tzinfo is None else date
        return max((date - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, OverflowError):
        return None
