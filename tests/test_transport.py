"""The connection: addresses, keys, TLS, proxies, limits of the system."""

from __future__ import annotations

import http.server
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, ROOT, Run, make_certificate
from server import Server, sample_answer

Runner = Callable[..., Run]
Spawn = Callable[..., "subprocess.Popen[str]"]

GOOD = "Fine. [ok]"
ONCE = ("--max-attempts", "1")


def line_about(result: Run, word: str) -> str:
    """The only line on the screen that has this word."""
    (line,) = [line for line in result.err.splitlines() if word in line]
    assert "Traceback" not in result.err
    return line


# --- The key and the account ----------------------------------------------------------


@pytest.mark.parametrize(
    "key", [None, "", "  ", "\n", "two words", "two\nlines", "schlüssel", "\udcff"]
)
def test_no_usable_key(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """Without a usable key the variable to set is named, and nothing is sent."""
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    result = run([GOOD])
    assert result.code == 2 and line_about(result, "OPENAI_API_KEY")
    assert server.total == 0 and result.rows == []


def test_blanks_around_the_key(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line break behind the key, as from a file, does no harm."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert run([GOOD]).code == 0
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("value", ["org-1\n", "org\r\n-1", "örg"])
@pytest.mark.parametrize("name", ["OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
def test_unusable_account(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """What cannot be sent is named before anything is."""
    monkeypatch.setenv(name, value)
    result = run([GOOD])
    assert result.code == 2 and line_about(result, name)
    assert server.total == 0 and result.rows == []


def test_account_is_sent(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Organization and project of the environment go out with each request."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    assert run([GOOD]).code == 0
    headers = server.requests[0].headers
    assert headers["openai-organization"] == "org-1"
    assert headers["openai-project"] == "proj-1"


# --- The address ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/v1",
        "localhost/v1",
        "ftp://localhost",
        "http://",
        "http:///v1",
        "http://a b/v1",
        "http://[::1/v1",
        "http://127.0.0.1:port/v1",
        "http://127.0.0.1/v1\n/x",
    ],
)
def test_no_address(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """An address that is none is named in one line, and nothing is asked."""
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    result = run([GOOD])
    assert result.code == 2 and result.rows == []
    assert url.partition("\n")[0] in line_about(result, "OPENAI_BASE_URL")


def test_slash_behind_the_address(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slash at the end does no harm."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    assert run([GOOD]).code == 0


@pytest.fixture
def targets() -> Iterator[list[str]]:
    """The port of a server that refuses all, then what it was asked for."""
    seen: list[str] = []

    class Spy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append(self.path)
            self.send_error(401)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Spy) as spy:
        seen.append(str(spy.server_port))
        thread = threading.Thread(target=spy.serve_forever, args=[0.01])
        thread.start()
        yield seen
        spy.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("base", "target"),
    [
        ("/v1", "/v1/responses"),
        ("/openai/v1/", "/openai/v1/responses"),
        ("/v1?api-version=preview", "/v1/responses?api-version=preview"),
        ("/v1/?a=1&b=x%20y", "/v1/responses?a=1&b=x+y"),
    ],
)
def test_query_of_the_address(
    targets: list[str],
    run: Runner,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    target: str,
) -> None:
    """The path of the API goes behind the path of the address, before its query."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{targets.pop()}{base}")
    assert run([GOOD]).code == 2
    assert [each.replace("%20", "+") for each in targets] == [target]


def test_failed_connection_names_the_address(
    run: Runner, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of a connection that failed says where to it was to go."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    result = run([GOOD], *ONCE)
    assert result.rows[0]["error"]["type"] == "connection"
    assert "http://127.0.0.1:9/v1" in result.rows[0]["error"]["message"]


# --- TLS ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, with its key, that only those trust who are told."""
    return make_certificate(tmp_path_factory.mktemp("tls") / "cert.pem")


@pytest.fixture
def tls_server(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A started server with TLS that the environment points to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Server(ssl_context=context) as started:
        monkeypatch.setenv("OPENAI_BASE_URL", started.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield started


def test_tls_reuses_connections(
    tls_server: Server, run: Runner, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate of one's own is trusted by SSL_CERT_FILE; connections are kept."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    result = run([f"number {number}" for number in range(100)], "--concurrency", "10")
    assert (result.code, tls_server.total) == (0, 100)
    assert tls_server.connections <= 10


@pytest.mark.parametrize("bundle", [False, True])
def test_unknown_certificate(
    tls_server: Server,
    run: Runner,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle: bool,
) -> None:
    """A certificate that isn't trusted leads to SSL_CERT_FILE, and nothing is sent."""
    if bundle:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    result = run([GOOD], *ONCE)
    assert (result.code, tls_server.total) == (1, 0)
    assert result.rows[0]["error"]["type"] == "connection"
    assert "SSL_CERT_FILE" in result.rows[0]["error"]["message"]
    assert "SSL_CERT_FILE" in result.err


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_useless_cert_file(
    server: Server,
    run: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
) -> None:
    """An SSL_CERT_FILE that holds no certificate is named in a line."""
    path = tmp_path / "my.pem"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    result = run([GOOD])
    assert (result.code, server.total) == (2, 0)
    assert line_about(result, "SSL_CERT_FILE")


# --- Proxies --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "user"),
    [("HTTP_PROXY", ""), ("http_proxy", "me:secret@"), ("ALL_PROXY", "")],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # for the SDK
def test_proxy(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, name: str, user: str
) -> None:
    """A proxy of the environment is used: the host that is asked for need not exist."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://nowhere.invalid/v1")
    monkeypatch.setenv(name, f"http://{user}127.0.0.1:{server.port}")
    result = run(["a", "b", "c"], "--timeout", "5")
    assert (result.code, server.total) == (0, 3)


def test_no_proxy(server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_PROXY names hosts that are reached without the proxy, here a dead one."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert run(["a", "b", "c"]).code == 0


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks4"])
def test_socks_proxy(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A SOCKS proxy, which doesn't work, is named as what is in the way."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://nowhere.invalid/v1")
    server.default = "drop"
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:{server.port}")
    result = run(["x"], *ONCE)
    assert result.code in (1, 2) and "Traceback" not in result.err
    assert "SOCKS" in result.err and "ALL_PROXY" in result.err


@pytest.mark.parametrize(
    ("name", "proxy"),
    [
        ("NO_PROXY", "127.0.0.1"),
        ("NO_PROXY", "*"),
        ("HTTP_PROXY", "http://127.0.0.1:{port}"),
    ],
)
def test_socks_proxy_for_others(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    """A SOCKS proxy that this address does not need is no reason to stop."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("FTP_PROXY", "ftp://127.0.0.1:9")
    monkeypatch.setenv(name, proxy.format(port=server.port))
    assert run([GOOD], *ONCE).code == 0


@pytest.mark.parametrize(
    "proxy", ["ftp://127.0.0.1:9", "http://[::1", "http://me:secret@a:b"]
)
def test_odd_proxy(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """A proxy that is none leads to its variable, without the password in it."""
    monkeypatch.setenv("HTTP_PROXY", proxy)
    result = run(["x"], *ONCE)
    assert result.code in (1, 2) and server.total == 0
    assert line_about(result, "_PROXY") and "secret" not in result.err


def test_offline_needs_no_network(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, proxy or address of the environment plays a part in --offline."""
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "ALL_PROXY", "OPENAI_ORG_ID"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert run([GOOD], "--offline").code == 0


# --- Limits of the system -------------------------------------------------------------


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")


def shell(folder: Path, script: str, *options: str) -> tuple[int, str]:
    """A run under a shell's script, in which "$@" is the command."""
    command = [sys.executable, str(ROOT / "async_template.py"), *options]
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command], cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stderr


@posix
def test_soft_limit_of_open_files_is_raised(server: Server, tmp_path: Path) -> None:
    """More are in flight than the soft limit of open files allows."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        server.hold = 0 if server.peak >= 100 else 100  # from the first answer on
        return sample_answer(body)

    server.answer = answer
    (tmp_path / "in.txt").write_text("\n".join(map(str, range(150))), encoding="utf-8")
    options = ("in.txt", "out.jsonl", "--concurrency", "120", "--timeout", "10")
    code, err = shell(tmp_path, 'ulimit -Sn 64; exec "$@"', *options)
    assert (code, server.total) == (0, 150), err


@posix
def test_hard_limit_of_open_files_is_said(server: Server, tmp_path: Path) -> None:
    """More than the system allows is said before anything is sent."""
    (tmp_path / "in.txt").write_text("one\ntwo\n", encoding="utf-8")
    options = ("in.txt", "out.jsonl", "--concurrency", "200")
    code, err = shell(tmp_path, 'ulimit -n 64; exec "$@"', *options)
    assert (code, server.total) == (2, 0)
    assert "--concurrency" in err and "Traceback" not in err


@posix
def test_soft_limit_of_open_files_is_not_lowered(server: Server, run: Runner) -> None:
    """A notebook's kernel keeps what it may open."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        high = (before[1], before[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, high)
        assert run([GOOD]).code == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == high
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@posix
def test_nobody_reads_the_chatter(server: Server, tmp_path: Path) -> None:
    """With standard error closed the run goes on, and ends well."""
    (tmp_path / "in.txt").write_text("one\ntwo\n", encoding="utf-8")
    code, _ = shell(tmp_path, 'exec "$@" 2>&-', "in.txt", "out.jsonl")
    assert (code, server.total) == (0, 2)


@posix
def test_closed_standard_input(server: Server, tmp_path: Path) -> None:
    """A standard input that is closed is said in a line."""
    code, err = shell(tmp_path, 'exec "$@" <&-', "-", "out.jsonl")
    assert (code, server.total) == (2, 0)
    assert "standard input" in err and "Traceback" not in err
