"""The connection: TLS, a proxy, many in flight, limits of the system, start-up."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from server import Server

ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(sys.platform == "win32", reason="uses ulimit")
KEY = {"OPENAI_API_KEY": "sk-test-0123456789"}
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 that only those trust who are told to."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now - day, now + day
    )
    made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    made = made.add_extension(x509.BasicConstraints(True, None), critical=True)
    pem = serialization.Encoding.PEM
    raw, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    cert, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    private.write_bytes(key.private_bytes(pem, raw, plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, private)
    return cert, context


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and standard error of a process that ends by itself."""
    _, err = process.communicate(timeout=50)
    return process.returncode, err


def write(folder: Path, count: int) -> Path:
    """An INPUT of so many messages."""
    path = folder / "in.txt"
    path.write_text("".join(f"message {n}\n" for n in range(count)), encoding="utf-8")
    return path


def test_tls_reuses_connections(
    certificate: tuple[Path, ssl.SSLContext], spawn: Spawn, tmp_path: Path
) -> None:
    """A certificate of one's own is trusted by SSL_CERT_FILE; connections are kept."""
    cert, context = certificate
    with Server(ssl_context=context) as server:
        env = {"OPENAI_BASE_URL": server.url, "SSL_CERT_FILE": str(cert), **KEY}
        code, err = finish(
            spawn(write(tmp_path, 200), "out.jsonl", "--concurrency", 10, **env)
        )
        assert (code, server.total) == (0, 200), err
        assert server.connections <= 10
        assert "Warning" not in err and "Unclosed" not in err


def test_proxy_of_the_environment(server: Server, spawn: Spawn, tmp_path: Path) -> None:
    """HTTP_PROXY is used, so that the host that is asked for need not exist."""
    proxy = server.url.removesuffix("/v1")
    env = {"OPENAI_BASE_URL": "http://nowhere.invalid/v1", "HTTP_PROXY": proxy, **KEY}
    process = spawn(write(tmp_path, 3), "out.jsonl", "--timeout", 5, **env)
    code, err = finish(process)
    assert (code, server.total) == (0, 3), err


def test_no_proxy_is_kept(server: Server, spawn: Spawn, tmp_path: Path) -> None:
    """NO_PROXY names hosts that are reached without the proxy, here a dead one."""
    env = {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", **KEY}
    env["OPENAI_BASE_URL"] = server.url
    code, err = finish(spawn(write(tmp_path, 3), "out.jsonl", **env))
    assert (code, server.total) == (0, 3), err


def test_offline_needs_no_proxy(spawn: Spawn, tmp_path: Path) -> None:
    """The stand-in is on this machine: no proxy of the environment is asked for it."""
    env = {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
    code, err = finish(spawn(write(tmp_path, 3), "out.jsonl", "--offline", **env))
    assert code == 0, err


def limited(folder: Path, ulimit: str, url: str, concurrency: int) -> tuple[int, str]:
    """A run under that limit of open files."""
    command = (
        f"{ulimit}; exec {sys.executable} {ROOT / 'async_template.py'} in.txt o.jsonl"
    )
    shell = ["sh", "-c", f"{command} --concurrency {concurrency}"]
    env = {"OPENAI_BASE_URL": url, "PATH": "/usr/bin:/bin", **KEY}
    done = subprocess.run(shell, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


@posix
def test_soft_limit_of_open_files_is_raised(server: Server, tmp_path: Path) -> None:
    """More in flight than the soft limit of open files allows."""
    write(tmp_path, 600)
    server.latency = 0.3
    code, err = limited(tmp_path, "ulimit -Sn 64", server.url, 200)
    assert (code, server.total) == (0, 600), err
    assert server.peak > 64


@posix
def test_hard_limit_of_open_files_is_said(server: Server, tmp_path: Path) -> None:
    """More than the system allows is said before anything is sent."""
    write(tmp_path, 300)
    code, err = limited(tmp_path, "ulimit -n 64", server.url, 200)
    assert (code, server.total) == (2, 0)
    assert "--concurrency" in err and "Traceback" not in err


def test_help_does_not_import_the_sdk() -> None:
    """What --help needs is imported before it answers, and the SDK is not among it."""
    code = (
        "import sys, async_template, json\n"
        "try: async_template.main(['--help'])\n"
        "except SystemExit: print(json.dumps('openai' in sys.modules), file=sys.stderr)"
    )
    command: list[Any] = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stderr) is False
