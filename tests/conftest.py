"""Fixtures of all tests: a clean environment, a server, the template run on it."""

from __future__ import annotations

import contextlib
import datetime
import gc
import ipaddress
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

sys.path.insert(0, str(Path(__file__).parent.parent))

from server import Server

import async_template

ROOT = Path(__file__).parent.parent
KEY = "sk-test-0123456789"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, unclosed sockets and files included; no test may hang."""
    config.addinivalue_line("filterwarnings", "error")
    # Files alone have tests of their own, in test_replies: with the line below a file
    # left open fails those, and not any test that happens to run.
    ignore = "ignore:unclosed file:ResourceWarning"
    config.addinivalue_line("filterwarnings", ignore)
    if config.getoption("timeout", None) is None:
        config.option.timeout = 60


def make_certificate(path: Path) -> Path:
    """Writes a certificate for 127.0.0.1, with its key; returns the path."""
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
    public = made.sign(key, hashes.SHA256()).public_bytes(pem)
    path.write_bytes(public + key.private_bytes(pem, raw, plain))
    return path


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The one authority that is trusted, since to load all takes 20 ms a run."""
    return str(make_certificate(tmp_path_factory.mktemp("authority") / "cert.pem"))


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch, authority: str) -> Iterator[None]:
    """No settings from outside, short waits, and nothing left behind by `main`."""
    monkeypatch.setenv("SSL_CERT_FILE", authority)
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(async_template, "BACKOFF", 0.01)
    # A test run in the background ignores it, and so would what the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = [
        signal.SIGINT,
        signal.SIGTERM,
        *[getattr(signal, "SIGHUP", signal.SIGTERM)],
    ]
    before = [signal.getsignal(number) for number in numbers]
    yield
    gc.unfreeze()  # `main` freezes what is there
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A started server that the environment points to."""
    with Server() as started:
        monkeypatch.setenv("OPENAI_BASE_URL", started.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield started


@dataclass
class Run:
    """What a run came to."""

    code: int
    rows: list[dict[str, Any]]
    err: str
    out_path: Path


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs the template on messages, or on a file, into out.jsonl of `tmp_path`."""

    def run(messages: Sequence[str] | Path, *options: str) -> Run:
        source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
        if isinstance(messages, Path):
            source = messages
        else:
            source.write_text("\n".join(messages), encoding="utf-8", newline="\n")
        capsys.readouterr()
        try:
            code = async_template.main([str(source), str(out), *options])
        except SystemExit as stop:
            code = int(stop.code or 0)
        text = out.read_text(encoding="utf-8") if out.is_file() else ""
        rows = [json.loads(line) for line in text.split("\n") if line]
        return Run(code, rows, capsys.readouterr().err, out)

    return run


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the real script in `tmp_path`; killed at the end if still alive."""
    with contextlib.ExitStack() as stack:

        def spawn(*args: object, **env: str) -> subprocess.Popen[str]:
            command = [sys.executable, str(ROOT / "async_template.py"), *map(str, args)]
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=os.environ | env,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                encoding="utf-8",
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield spawn
