"""A real S3 server (moto) on a loopback port, in a process of its own, which prints its port."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.paths import ROOT

REGION = "us-east-1"
PAGE = 40
"""The most objects in one answer to a listing, which are 1,000 at Amazon's."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """Endpoint of a running server; a client needs the variables of `environment`."""

    endpoint: str

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ALLOW_HTTP": "true",
        }

    def new_bucket(self) -> str:
        """The URL of a fresh root; below a prefix, as in real buckets."""
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        self.make_bucket(bucket)
        return f"s3://{bucket}/caches/one"

    def make_bucket(self, name: str) -> None:
        self._request("PUT", f"/{name}")

    def delete_bucket(self, url: str) -> None:
        """Remove the empty bucket of a root."""
        self._request("DELETE", "/" + url.removeprefix("s3://").split("/", 1)[0])

    def require_credentials(self, *, required: bool) -> None:
        """Authenticate requests from now on, or no longer; no user exists, so all are refused then."""
        self._request("POST", "/moto-api/reset-auth", b"0" if required else b"1000000000")

    def _request(self, method: str, path: str, data: bytes | None = None) -> None:
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(self.endpoint + path, data, headers, method=method)).close()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    command = [sys.executable, "-m", "tests.support.processes.s3"]
    environment = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=null, text=True, cwd=ROOT, env=environment) as process:
        try:
            assert process.stdout is not None
            yield S3Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


def main() -> None:
    from moto.server import create_backend_app
    from werkzeug.serving import make_server

    # moto's own dispatcher looks its services up on the disk for every request.
    s3, control = create_backend_app("s3"), create_backend_app("moto_api")

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        return (control if environ["PATH_INFO"].startswith("/moto-api/") else s3)(environ, start_response)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
