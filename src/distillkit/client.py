"""Requests to a server: tried again where that may help, and given up with one line where it doesn't.

The key is read from the environment when a connection is made. It is in no attribute that is copied, logged or saved,
and what a server says is repeated without it.
"""

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from distillkit.errors import ConfigError, ServerError

_log = logging.getLogger(__name__)

T = TypeVar("T")
_PASSING = (408, 409, 425, 429)  # as is every status from 500
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SHORTEST_SECRET = 8  # `EMPTY`, which servers without keys are given, is a word that an answer may hold
_SAY_AGAIN = 10.0  # seconds between two lines about waiting


class PassingError(Exception):
    """A failure that may pass.

    Args:
        reason: What happened.
        wait: Seconds that the server asks to wait; None if it doesn't say.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class MissingError(ServerError):
    """The server has nothing at this path."""


class StoppedError(Exception):
    """The request was given up because another one had to be."""


class Client:
    """A connection to one server, for several threads. Use it as a context manager.

    Args:
        url: Where the protocol begins, such as `http://127.0.0.1:8000/v1`.
        key_variable: Name of the environment variable with the key; None sends none.
        timeout: Seconds within which an answer must be complete.
        retries: How often a request is tried again.
        backoff: Seconds before the second try; doubled for each further one, half of it by chance.
        max_wait: Longest wait before a try, in seconds. A server that asks for more is given up.
        concurrency: Most requests at once.

    Raises:
        ConfigError: If the environment variable is not set, or holds no key.
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
        self._http = httpx2.Client(
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"},
            timeout=httpx2.Timeout(timeout),
            verify=self.url.startswith("https:"),  # reading the certificates takes 0.1 s, and only https needs them
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._stopped, self._said = threading.Event(), float("-inf")
        # Neither read nor moved: the global random numbers belong to training.
        self._random = random.SystemRandom()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def stop(self) -> None:
        """Nothing is asked, or tried again, from now on."""
        self._stopped.set()

    def ask(self, path: str, body: dict[str, Any] | None, read: Callable[[dict[str, Any]], T]) -> T:
        """What `read` makes of the answer.

        Args:
            path: Behind the URL, such as `/models`.
            body: What is posted; None asks without a body.
            read: Takes the answer's JSON object; raises `PassingError` if it is not what it should be.

        Raises:
            ServerError: If the server refuses, or it was tried often enough.
            StoppedError: If `stop` was called before, or while this request waited.
        """
        if self._stopped.is_set():
            raise StoppedError
        start = time.monotonic()
        for number in range(1, self.retries + 2):
            try:
                return read(self._once(path, body))
            except PassingError as failure:
                last = failure
            wait = self.backoff * 2 ** (number - 1) * self._random.uniform(0.5, 1)
            wait = min(wait, self.max_wait) if last.wait is None else max(last.wait, min(wait, self.max_wait))
            if number > self.retries or wait > self.max_wait:
                break
            self._say(f"{self.url}{path}: {last}; trying again in {wait:.1f} s")
            if self._stopped.wait(wait):
                raise StoppedError
        asks = f", and it asks to wait {last.wait:.0f} s" if last.wait is not None and last.wait > self.max_wait else ""
        tries = "1 try" if number == 1 else f"{number} tries"
        raise ServerError(
            f"{self.url}{path}: given up after {tries} in {time.monotonic() - start:.0f} s, the last one failed with "
            f"{last}{asks}"
        )

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            status, headers, content = self._exchange("GET" if body is None else "POST", path, body)
        except httpx2.TimeoutException as error:
            raise PassingError(f"no answer within {self.timeout:g} s") from error
        except httpx2.RequestError as error:
            raise PassingError(f"{type(error).__name__} ({self._shown(str(error)) or 'no reason given'})") from error
        if status in _PASSING or status >= 500:
            raise PassingError(f"status {status}{self._said_by(content)}", _asked_wait(headers.get("retry-after")))
        if status in (401, 403):
            raise ServerError(f"{self.url}{path}: {self._refused(status)}")
        if status != 200:
            kind = MissingError if status in (404, 405) else ServerError
            raise kind(f"{self.url}{path}: the server refuses the request, status {status}{self._said_by(content)}")
        if self._key is not None and len(self._key) >= _SHORTEST_SECRET and self._key.encode() in content:
            raise ServerError(f"{self.url}{path}: the answer holds the key of {self._variable} and is not kept")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
            raise PassingError(f"an answer of {len(content)} bytes that is not JSON") from error
        if not isinstance(answer, dict):
            raise PassingError("an answer that is not a JSON object")
        return answer

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and content; the time-out is for all of it, also where the server sends a byte now and then.

        Raises:
            RequestError: If the connection fails or the time is over.
        """
        end, parts = time.monotonic() + self.timeout, []
        with self._http.stream(method, self.url + path, json=body) as answer:
            for part in answer.iter_bytes():
                parts.append(part)
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("the time is over")
        return answer.status_code, answer.headers, b"".join(parts)

    def _refused(self, status: int) -> str:
        if self._variable is None:
            return (
                f"the server wants a key (status {status}): name the environment variable that holds it, key_variable"
            )
        return f"the server refuses the key in the environment variable {self._variable} (status {status}): correct it"

    def _said_by(self, content: bytes) -> str:
        """What a server says of a failure, as the end of a sentence."""
        text = content.decode("utf-8", "replace")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = text
        for name in ("error", "message", "detail"):
            if isinstance(answer, dict) and answer.get(name):
                answer = answer[name]
        said = self._shown(answer if isinstance(answer, str) else json.dumps(answer))
        return f": {said}" if said else ""

    def _shown(self, text: str) -> str:
        """One line of it, without the key."""
        hidden = text if self._key is None else text.replace(self._key, "***")
        line = " ".join(hidden.split()).rstrip(".")
        return line if len(line) <= 300 else f"{line[:300]}…"

    def _say(self, line: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_AGAIN:  # two threads may both say it: no harm
            self._said = now
            _log.warning("%s", line)


def check_url(url: str, where: str) -> None:
    """Refuses a URL that no server could have, or that holds a secret, which would be in every log and config.

    Raises:
        ConfigError: If it is one; it is not repeated then.
    """
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{where} is no URL ({error}): write one such as http://127.0.0.1:8000/v1.") from error
    if parts.userinfo or parts.query or parts.fragment:
        raise ConfigError(
            f"{where} must hold neither user, password, query nor fragment: it is logged and saved. Put a key into an "
            "environment variable and name that in key_variable."
        )
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ConfigError(f"{where} must begin with http:// or https:// and a host, got {url!r}.")


def check_variable(name: str | None, where: str) -> None:
    """Refuses what can't be the name of an environment variable: it may be the key itself, and is not repeated.

    Raises:
        ConfigError: If it can't.
    """
    if name is not None and not _VARIABLE.fullmatch(name):
        raise ConfigError(
            f"{where} must be the name of an environment variable in capital letters, such as OPENAI_API_KEY, never "
            "the key itself, which would be logged and saved."
        )


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"The environment variable {variable} is not set: put the server's key into it.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"The environment variable {variable} holds no key: it has characters that no header may have."
        )
    return key


def _asked_wait(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number or a date."""
    if header is None:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    date = date.replace(tzinfo=UTC) if date.tzinfo is None else date
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)
