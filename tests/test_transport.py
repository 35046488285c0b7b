"""The connection: the key, the address, TLS, proxies, and replies that are no HTTP."""

from __future__ import annotations

import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import KEY, Run, make_certificate
from server import Server

Runner = Callable[..., Run]
Spawn = Callable[..., "subprocess.Popen[str]"]
Patch = pytest.MonkeyPatch

GOOD = "Fine. [ok]"
BAD = "Bad. [canned=case]"
ONCE = ("--max-attempts", "1")


def refused(result: Run) -> str:
    """The last line of a run that came to nothing."""
    assert result.code == 2 and "Traceback" not in result.err
    assert not any(row["response"] for row in result.rows)
    return result.err.splitlines()[-1]


# --- The key and the account ----------------------------------------------------------
@pytest.mark.parametrize(
    "key", [None, "", "  ", "\n", "two words", "two\nlines", "schlüssel", "\udcff"]
)
def test_no_usable_key(
    server: Server, run: Runner, monkeypatch: Patch, key: str | None
) -> None:
    """Without a usable key the variable to set is named, and nothing is sent."""
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    assert "OPENAI_API_KEY" in refused(run([GOOD]))
    assert server.total == 0


def test_blanks_around_the_key(server: Server, run: Runner, monkeypatch: Patch) -> None:
    """A line break behind the key, as from a file, does no harm."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert run([GOOD]).code == 0
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_account_is_sent(server: Server, run: Runner, monkeypatch: Patch) -> None:
    """Organization and project of the environment go out with each request."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    assert run([GOOD]).code == 0
    headers = server.requests[0].headers
    assert headers["openai-organization"] == "org-1"
    assert headers["openai-project"] == "proj-1"


# --- The key and the terminal's escapes are never shown -------------------------------
SECRET = f"{KEY}\x1b[2J"


def test_header_of_a_table(server: Server, run: Runner, tmp_path: Path) -> None:
    """The names of the columns are said, but not as they stand."""
    source = tmp_path / "in.csv"
    source.write_text(f"id,name {SECRET}\n1,a\n", encoding="utf-8")
    line = refused(run(source, "--field", "text"))
    assert "name" in line and KEY not in line and "\x1b" not in line


def test_prompt_and_model(server: Server, run: Runner) -> None:
    """Nor the first prompt of a pilot, nor the model of the answers in OUTPUT."""
    messages = ["Fine. \x1b[2J", "two"]
    pilot = run(messages, "--limit", "1", "--model", f"model {SECRET}")
    again = run(messages)
    assert (pilot.code, again.code, server.total) == (0, 2, 1)
    assert "Fine." in pilot.err and "model" in again.err.splitlines()[-1]
    assert KEY not in pilot.err + again.err and "\x1b" not in pilot.err + again.err


# --- The address ----------------------------------------------------------------------
def test_slash_behind_the_address(
    server: Server, run: Runner, monkeypatch: Patch
) -> None:
    """A slash at the end does no harm."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    assert run([GOOD]).code == 0


def test_failed_connection_names_the_address(run: Runner, monkeypatch: Patch) -> None:
    """The row of a connection that failed says where to it was to go."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    (row,) = run([GOOD], *ONCE).rows
    assert row["error"]["type"] == "connection"
    assert "127.0.0.1:9" in row["error"]["message"]


def test_no_api(server: Server, spawn: Spawn, tmp_path: Path) -> None:
    """A web page in a 200 since the start, or no scheme: it ends within 15 s."""
    (tmp_path / "in.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    server.default = "html"
    page = spawn("in.txt", "page.jsonl")
    other = spawn("in.txt", "other.jsonl", OPENAI_BASE_URL="127.0.0.1:9/v1")
    said, also_said = page.communicate()[1], other.communicate()[1]
    assert server.requests[-1].at - server.requests[0].at < 15
    assert (page.returncode, other.returncode) == (2, 2)
    assert "Bad gateway" in said.splitlines()[-1]
    assert "127.0.0.1:9" in also_said and "Traceback" not in said + also_said


def test_reason_of_a_wait(server: Server, spawn: Spawn, tmp_path: Path) -> None:
    """Some servers refuse an unknown model for now: soon a line has their words."""
    (tmp_path / "in.txt").write_text("one\n", encoding="utf-8")
    server.default = "503:code=model_not_found:message=No model of that name."
    process = spawn("in.txt", "out.jsonl")
    assert process.stderr
    assert any("No model of that name." in line for line in process.stderr)
    assert time.monotonic() - server.requests[0].at < 15


# --- TLS and proxies ------------------------------------------------------------------
@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, with its key, that only those trust who are told."""
    return make_certificate(tmp_path_factory.mktemp("tls") / "cert.pem")


@pytest.fixture
def tls_server(certificate: Path, monkeypatch: Patch) -> Iterator[Server]:
    """A started server with TLS that the environment points to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Server(ssl_context=context) as started:
        monkeypatch.setenv("OPENAI_BASE_URL", started.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield started


def test_tls_reuses_connections(
    tls_server: Server, run: Runner, certificate: Path, monkeypatch: Patch
) -> None:
    """A certificate of one's own is trusted by SSL_CERT_FILE; connections are kept."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    result = run([f"number {number}" for number in range(100)], "--concurrency", "10")
    assert (result.code, tls_server.total) == (0, 100)
    assert tls_server.connections <= 10


def test_unknown_certificate(tls_server: Server, run: Runner) -> None:
    """A certificate that isn't trusted is the reason, and nothing is sent."""
    (row,) = run([GOOD], *ONCE).rows
    assert tls_server.total == 0
    assert row["error"]["type"] == "connection"
    assert "certificate verify failed" in row["error"]["message"]


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_useless_cert_file(
    server: Server, run: Runner, tmp_path: Path, monkeypatch: Patch, content: str | None
) -> None:
    """An SSL_CERT_FILE that holds no certificate ends the run with a line."""
    path = tmp_path / "my.pem"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    assert refused(run([GOOD])) and server.total == 0


@pytest.mark.parametrize("user", ["", "me:secret@"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # for the SDK
def test_proxy(server: Server, run: Runner, monkeypatch: Patch, user: str) -> None:
    """A proxy of the environment is used: the host that is asked for need not exist."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://nowhere.invalid/v1")
    monkeypatch.setenv("HTTP_PROXY", f"http://{user}127.0.0.1:{server.port}")
    result = run(["a", "b", "c"], "--timeout", "5")
    assert (result.code, server.total) == (0, 3)


def test_no_proxy(server: Server, run: Runner, monkeypatch: Patch) -> None:
    """NO_PROXY names hosts that are reached without the proxy, here a dead one."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert run(["a", "b", "c"]).code == 0


# --- Odd replies ----------------------------------------------------------------------
SECRET_BYTES = SECRET.encode()
HEADS = {
    "reason phrase": b"502 Kap\xc3\xbctt",
    "reason phrase, latin": b"502 Kap\xfctt",
    "key in the status": b"5xx " + SECRET_BYTES,
    "key in the reason": b"400 " + SECRET_BYTES,
    "key in a header": b"200 OK\r\nx: Bearer " + SECRET_BYTES,
    "redirect to a fault": b"307 Moved\r\nlocation: http://[\xff",
}
EMPTY = b"\r\ncontent-length: 0\r\n\r\n"
REPLIES: dict[str, tuple[int, dict[str, str], bytes]] = {
    name: (0, {}, b"HTTP/1.1 " + head + EMPTY) for name, head in HEADS.items()
}
PLACES = ["http://[", "/v1/responses", "http://127.0.0.1:9/v1/responses", "/stats"]
REPLIES |= {f"redirect to {place}": (307, {"location": place}, b"") for place in PLACES}
REPLIES |= {"redirect to nowhere": (308, {}, b"")}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", REPLIES)
def test_odd_reply_is_a_row(server: Server, run: Runner, name: str) -> None:
    """It is its own message's trouble, after a few tries a row; the others land."""
    server.canned["case"] = REPLIES[name]
    result = run([GOOD, BAD, "Fine as well. [ok]"], "--max-attempts", "2")
    answers = [row["response"] is not None for row in result.rows]
    said = result.rows[1]["error"]["message"]
    assert (result.code, answers) == (1, [True, False, True])
    assert said.isprintable() and KEY[:10] not in said + result.err
    assert "\x1b" not in result.err and "Traceback" not in result.err
