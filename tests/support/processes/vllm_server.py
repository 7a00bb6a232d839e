"""Servers as processes of their own: vLLM's, and ours in front of the same model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support import http

_START_SECONDS = 900.0  # vLLM takes one minute on an idle machine
_STOP_SECONDS = 30.0


@contextmanager
def vllm_serving(model: Path, *, max_logprobs: int = 64, name: str = "tiny") -> Iterator[str]:
    """`vllm serve` on a loopback port with float32 numerics like our teachers'; yields its URL."""
    port = free_port()
    arguments = ["--model", model, "--served-model-name", name, "--host", "127.0.0.1", "--port", port]
    arguments += ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"]
    arguments += ["--max-logprobs", max_logprobs, "--hf-overrides", '{"head_dtype": "float32"}']
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, arguments)]
    log = model.parent / "vllm-server.log"
    with process_serving(command, f"http://127.0.0.1:{port}", log, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as url:
        yield url


@contextmanager
def potstill_serving(model: Path, *, cache: Path | None = None, name: str = "tiny") -> Iterator[str]:
    """`potstill serve` of one model on a loopback port; yields its URL."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "potstill.clients.cli",
        "serve",
        "--teacher",
        f"{name}={model}",
        "--port",
        str(port),
    ]
    command += [] if cache is None else ["--cache", str(cache)]
    log = model.parent / "potstill-server.log"
    with process_serving(command, f"http://127.0.0.1:{port}", log, {}) as url:
        yield url


@contextmanager
def process_serving(command: Sequence[str], url: str, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run a server until its `/health` answers 200; what it says goes into `log`."""
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}) as process,
    ):
        try:
            _wait(process, url, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            if http.get(f"{url}/health", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no server after {_START_SECONDS:g} seconds: {log.read_text()[-2000:]}")
