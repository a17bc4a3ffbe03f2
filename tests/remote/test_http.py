import copy
import gzip
import logging
import pickle
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import repeat

import pytest

from distillkit.errors import ConfigError, GenerationError
from distillkit.generators.server import ServerGenerator
from distillkit.remote import http
from helpers.served import KEY, SAMPLING, prompts_of, ready
from helpers.servers import Reply, chat, closed_port, echo, first, serving

# ── failures that pass ────────────────────────────────────────────────────────────────────────────────────────────────

HALF = b'{"model": "strong", "choices": [{"mess'
PASSING = {
    "429": lambda: Reply({"error": {"message": "slow down"}}, 429),
    "500": lambda: Reply(b"oops", 500),
    "502": lambda: Reply(b"<html>Bad gateway</html>", 502),
    "503": lambda: Reply(b"", 503),
    "half a JSON": lambda: Reply(HALF),
    "half an answer": lambda: Reply(HALF, cut=400),
    "not UTF-8": lambda: Reply(b'{"a": "\xff\xfe"}'),
    "no object": lambda: Reply([1, 2]),
    "no choice": lambda: Reply({"model": "strong", "choices": []}),
    "an error as an answer": lambda: Reply({"error": {"message": "overloaded"}}),
    "an end that is none": lambda: chat("x", "abort"),
    "a reset": lambda: Reply(reset=True),
    "a hang": lambda: Reply(hang=True),
    "a drip": lambda: Reply({"model": "strong", "padding": "x" * 400}, drip=0.05),
    "headers in drips": lambda: Reply(raw=(bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 400)),
    "informational responses without end": lambda: Reply(raw=repeat(b"HTTP/1.1 100 Continue\r\n\r\n")),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name):
    with serving(first(2, PASSING[name])) as server:
        found = ready(server.url, concurrency=1, timeout=0.25).generate(prompts_of("a", "b"), SAMPLING)
    assert [response.text for response in found] == ["You ask: a", "You ask: b"]
    assert server.questions() == ["a", "a", "a", "b"]
    assert len({(request.question, request.body["seed"]) for request in server.requests}) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("429", "status 429: slow down"),
        ("500", "status 500: oops"),
        ("503", "status 503"),
        ("half a JSON", "a response of 38 bytes that is not JSON"),
        ("a hang", r"no response within 0.25 s"),
        ("a drip", r"no response within 0.25 s"),
        ("headers in drips", r"no response within 0.25 s"),
        ("informational responses without end", r"no response within 0.25 s"),
        ("half an answer", "RemoteProtocolError"),
        ("a reset", r"ReadError \("),
        ("no choice", "without a choice"),
        ("an end that is none", "finish_reason 'abort'"),
    ],
)
def test_what_does_not_pass_is_given_up_with_one_line(name, said):
    with serving(lambda _: PASSING[name]()) as server, pytest.raises(GenerationError) as caught:
        ready(server.url, concurrency=1, timeout=0.25).generate(prompts_of("a", "b"), SAMPLING)
    line = str(caught.value)
    assert line.startswith(f"{server.url}/chat/completions: failed after 3 tries in ")
    assert pytest.RaisesExc(GenerationError, match=said).matches(caught.value)
    assert line.endswith("and run the same command again; only the other 2 are requested.")
    assert "\n" not in line
    assert server.questions() == ["a"] * 3  # and b, which waits behind it, is not asked at all


def test_nobody_there_is_given_up_with_one_line():
    url = f"http://127.0.0.1:{closed_port()}/v1"
    with pytest.raises(
        GenerationError, match=r"/models: failed after 3 tries in \d+ s. .* ConnectError \(.*(refused|failed).*\)"
    ):
        ready(url).generate(prompts_of("a"), SAMPLING)


def test_what_had_come_is_carried_along():
    with (
        serving(lambda request: Reply(b"", 503) if request.question == "c" else echo(request)) as server,
        pytest.raises(GenerationError, match="2 of 4 responses were received and saved") as caught,
    ):
        ready(server.url, concurrency=1).generate(prompts_of("a", "b", "c", "d"), SAMPLING)
    assert [response.text for response in caught.value.finished] == ["You ask: a", "You ask: b"]
    assert server.questions() == ["a", "b", "c", "c", "c"]


def test_what_is_under_way_when_another_fails_is_waited_for():
    def behave(request):
        if request.question == "bad":
            return Reply(b"", 400)
        time.sleep(0.1)
        return echo(request)

    with serving(behave) as server, pytest.raises(GenerationError) as caught:
        ready(server.url, concurrency=2).generate(prompts_of("slow", "bad", "c", "d"), SAMPLING)
    assert [response.text for response in caught.value.finished] == ["You ask: slow"]
    assert sorted(server.questions()) == ["bad", "slow"]


@pytest.mark.parametrize("date", [False, True], ids=["seconds", "date"])
def test_it_waits_as_long_as_the_server_asks(date):
    wait = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if date else "0.4"
    with serving(first(1, lambda: Reply(b"", 429, {"Retry-After": wait}))) as server:
        start = time.monotonic()
        found = ready(server.url).generate(prompts_of("a"), SAMPLING)
    assert found[0].text == "You ask: a"
    assert 0.4 <= time.monotonic() - start < 3


def test_it_does_not_wait_longer_than_allowed():
    with (
        serving(lambda _: Reply(b"", 429, {"Retry-After": "3600"})) as server,
        pytest.raises(
            GenerationError, match=r"failed after 1 try in 0 s\. .* status 429; the server asks to wait 3600 s"
        ),
    ):
        ready(server.url).generate(prompts_of("a"), SAMPLING)
    assert len(server.requests) == 1


def test_waits_grow_and_differ_and_are_said(caplog):
    waits = []
    with serving(lambda _: Reply(b"", 503)) as server:
        generator = ready(server.url, retries=5, backoff=0.02, max_wait=0.1)
        with pytest.raises(GenerationError):
            generator.generate(prompts_of("a"), SAMPLING)
        start = time.monotonic()
        with pytest.raises(GenerationError):
            generator.generate(prompts_of("a"), SAMPLING)
        waits.append(time.monotonic() - start)
    least = sum(min(0.02 * 2**number / 2, 0.1) for number in range(5))
    assert least <= waits[0] < 5 * least
    assert len(server.requests) == 12
    said = [record.message for record in caplog.records if "trying again" in record.message]
    assert len(said) == 2  # once for each call, not for each of the 10 waits
    assert said[0].startswith(f"{server.url}/chat/completions: status 503; trying again in 0.0")


# ── failures that don't pass, and the key ─────────────────────────────────────────────────────────────────────────────


def test_a_refused_request_is_not_repeated_and_the_server_says_why():
    message = {"error": {"message": "max_tokens is too large:\n 99999.", "type": "invalid_request_error"}}
    with (
        serving(lambda _: Reply(message, 400)) as server,
        pytest.raises(
            GenerationError, match=r"rejected the request with status 400: max_tokens is too large: 99999\. 0 of"
        ),
    ):
        ready(server.url, concurrency=1).generate(prompts_of("a", "b"), SAMPLING)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 404, 422])
def test_other_refusals_are_not_repeated_either(status):
    reply = Reply({"detail": "no"}, status, {"Location": "http://127.0.0.1:1/elsewhere"})
    with serving(lambda _: reply) as server, pytest.raises(GenerationError, match=rf"status {status}: no\."):
        ready(server.url).generate(prompts_of("a"), SAMPLING)
    assert len(server.requests) == 1


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("STRONG_API_KEY", KEY)
    return KEY


def test_the_key_is_sent_and_is_nowhere_else(key, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(first(1, PASSING["429"])) as server:
        generator = ready(server.url, key_variable="STRONG_API_KEY")
        generator.generate(prompts_of("a"), SAMPLING)
    assert {request.headers["authorization"] for request in server.requests + server.listed} == {f"Bearer {key}"}
    assert caplog.text  # the HTTP library says what it does
    for place in (caplog.text, str(vars(generator)), str(vars(copy.deepcopy(generator))), generator.identity()):
        assert key not in place
    assert key.encode() not in pickle.dumps(generator)


def test_without_a_variable_no_key_is_sent_whatever_the_environment_holds(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as server:
        ready(server.url).generate(prompts_of("a"), SAMPLING)
    assert all("authorization" not in request.headers for request in server.requests + server.listed)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_one_line_that_names_the_variable_and_no_key(status, key):
    reply = Reply({"error": {"message": f"Incorrect API key provided: {key}"}}, status)
    with serving(lambda _: reply) as server, pytest.raises(GenerationError) as caught:
        ready(server.url, key_variable="STRONG_API_KEY").generate(prompts_of("a"), SAMPLING)
    message = (
        f"authentication failed ({status}). The server rejected the API key in the environment variable STRONG_API_KEY"
    )
    assert message in str(caught.value)
    assert key not in str(caught.value)
    assert len(server.requests) == 1


def test_a_server_that_wants_a_key_says_so_where_none_is_named():
    with (
        serving(lambda _: Reply(b"", 401)) as server,
        pytest.raises(
            GenerationError, match=r"authentication failed \(401\)\. Set `key_variable` to the environment variable"
        ),
    ):
        ready(server.url).generate(prompts_of("a"), SAMPLING)


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_repeats_the_key_is_quoted_without_it(status, key, caplog):
    with (
        serving(lambda request: Reply(f"bad: {request.headers['authorization']}".encode(), status)) as server,
        pytest.raises(GenerationError, match=rf"status {status}: bad: Bearer \*\*\*\."),
    ):
        ready(server.url, key_variable="STRONG_API_KEY").generate(prompts_of("a"), SAMPLING)
    assert key not in caplog.text


def test_an_answer_that_holds_the_key_is_not_kept(key):
    with (
        serving(lambda request: chat(f"You sent {request.headers['authorization']}")) as server,
        pytest.raises(
            GenerationError, match="the response contains the API key of STRONG_API_KEY, so it was discarded"
        ) as caught,
    ):
        ready(server.url, key_variable="STRONG_API_KEY").generate(prompts_of("a"), SAMPLING)
    assert (caught.value.finished, key in str(caught.value)) == ((), False)


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_without_end_is_refused_before_it_fills_the_memory(packed, monkeypatch):
    monkeypatch.setattr(http, "_MAX_CONTENT", 2**20)
    content = b" " * 2**24
    headers = {"Content-Encoding": "gzip"} if packed else {}
    reply = Reply(gzip.compress(content) if packed else content, headers=headers)
    with serving(lambda _: reply) as server, pytest.raises(GenerationError, match="a response of more than 1 MiB"):
        ready(server.url).generate(prompts_of("a"), SAMPLING)
    assert len(server.requests) == 1


# ── consent ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_configuration_may_send_api_keys_and_no_other_variable(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"would send the environment variable HF_TOKEN.*DISTILLKIT_ALLOW=key:HF_TOKEN"
    ):
        ServerGenerator("https://example.org/v1", "m", key_variable="HF_TOKEN")
    monkeypatch.setenv("DISTILLKIT_ALLOW", "code, key:HF_TOKEN")
    ServerGenerator("https://example.org/v1", "m", key_variable="HF_TOKEN")


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "localhost.example.org", "127.0.0.1.example.org"])
def test_a_key_does_not_leave_the_machine_in_clear_text(host, key, monkeypatch):
    url = f"http://{host}:1/v1"
    with pytest.raises(ConfigError, match="would get the API key of STRONG_API_KEY in clear text: use https"):
        client(url)
    client(f"https://{host}:1/v1")
    monkeypatch.setenv("DISTILLKIT_ALLOW", "http_key")
    client(url)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "localhost"])
def test_within_the_machine_a_key_needs_no_https(host, key):
    client(f"http://{host}:1/v1")


def client(url):
    return http.Client(url, "STRONG_API_KEY", 1.0, 0, 0.0, 1.0, 1)


def test_requests_within_the_machine_go_through_no_proxy(key, monkeypatch):
    with serving() as server, serving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        ready(server.url, key_variable="STRONG_API_KEY").generate(prompts_of("a"), SAMPLING)
    assert len(server.requests) == 1
    assert proxy.requests + proxy.listed == []


@pytest.mark.parametrize("value", ["", "  ", "sk-two words", "sk-line\nbreak-in-it", "schlüssel"])
def test_a_variable_without_a_key_is_an_error_that_shows_no_value(value, monkeypatch):
    monkeypatch.setenv("STRONG_API_KEY", value)
    with pytest.raises(ConfigError, match="The environment variable STRONG_API_KEY ") as caught:
        ready("http://127.0.0.1:1/v1", key_variable="STRONG_API_KEY").generate(prompts_of("a"), SAMPLING)
    assert not value.strip() or value not in str(caught.value)


@pytest.mark.parametrize("name", [KEY, "0abc", "abcdef0123", "", "A B", "A=B"])
def test_what_may_be_a_key_is_refused_as_the_name_of_its_variable_and_not_shown(name):
    with pytest.raises(ConfigError, match="must be the name of an environment variable in capital letters") as caught:
        ServerGenerator("http://127.0.0.1:1/v1", "m", key_variable=name)
    assert not name or f"{name}" not in str(caught.value).replace("OPENAI_API_KEY", "")


@pytest.mark.parametrize(
    "url",
    [f"http://me:{KEY}@host/v1", f"http://{KEY}@host/v1", f"http://host/v1?api_key={KEY}", f"http://host/v1#{KEY}"],
)
def test_a_url_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match="must contain neither user, password, query nor fragment") as caught:
        ServerGenerator(url, "m")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(
        ConfigError, match=r"ServerGenerator\.url (must start with http:// or https://|is not a valid URL)"
    ):
        ServerGenerator(url, "m")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"api": "responses"}, "api must be chat or completions, got 'responses'"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"backoff": -0.5}, "backoff must be at least 0, got -0.5"),
        ({"timeout": 0}, "timeout must be above 0 s, got 0"),
        ({"max_wait": 0}, "max_wait must be above 0 s, got 0"),
        ({"extra": {"seed": 1, "temperature": 2}}, "extra can't set seed, temperature: the model and the sampling set"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ConfigError, match=rf"ServerGenerator\.{said}"):
        ServerGenerator("http://127.0.0.1:1/v1", "m", **settings)
