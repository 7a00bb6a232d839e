"""`potstill serve` with keys and with TLS, as processes."""

from __future__ import annotations

import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from potstill.cache.errors import InvalidInput
from potstill.clients.http_teacher import SyncHttpTeacher
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.keys_file import add_key, remove_key
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.serve import check_tls
from potstill.teacher_service.settings.service import TlsSettings
from tests.support import http
from tests.support.fakes import FakeTeacher
from tests.support.processes.certificate import make_certificate
from tests.support.processes.serve_process import Serving, refused
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.waiting import until


@pytest.fixture
def behind_url() -> Iterator[str]:
    with serving_teachers(hosted("deep", FakeTeacher())) as url:
        yield url


def test_with_keys_any_host_is_served_and_keys_are_read_again_on_sighup(tmp_path: Path, behind_url: str) -> None:
    keys, config = tmp_path / "keys.toml", tmp_path / "serve.toml"
    old = add_key(keys, "old", Role.TRAINER, Quota())
    config.write_text(f'host = "0.0.0.0"\n[access]\nkeys_file = "{keys}"\n')
    served = Serving(str(config), "--teacher", f"smol={behind_url}")
    address = served.url.replace("0.0.0.0", "127.0.0.1") + "/v1/teachers"

    def status(key: str) -> int:
        return http.get(address, headers={"authorization": f"Bearer {key}"}).status_code

    assert (http.get(address).status_code, status(old)) == (401, 200)
    admin = add_key(keys, "new", Role.ADMIN, Quota())
    remove_key(keys, "old")
    served.process.send_signal(signal.SIGHUP)
    until(lambda: (status(old), status(admin)) == (401, 200))
    # Actions of admins are told on stderr when there is no file for them.
    headers = {"authorization": f"Bearer {admin}"}
    assert http.put(f"{address}/smol/replicas", json={"replicas": 1}, headers=headers).status_code == 200
    status_at_end, stderr = served.stop()
    assert status_at_end == 0
    assert "travel in the clear" in stderr
    assert "potstill.audit" in stderr
    assert admin not in stderr


def test_tls_is_served_and_trusted_by_clients_that_know_the_certificate(
    tmp_path: Path, behind_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    certfile, keyfile = make_certificate(tmp_path)
    config = tmp_path / "serve.toml"
    config.write_text(f'[tls]\ncertfile = "{certfile}"\nkeyfile = "{keyfile}"\n')
    served = Serving(str(config), "--teacher", f"smol={behind_url}")
    assert served.url.startswith("https://127.0.0.1:")
    trusting = ssl.create_default_context(cafile=str(certfile))
    assert http.get(f"{served.url}/readyz", verify=trusting).status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        http.get(f"{served.url}/readyz")
    monkeypatch.setenv("SSL_CERT_FILE", str(certfile))
    with SyncHttpTeacher(served.url, "smol") as teacher:
        assert teacher.identity.vocab_size == 64
    assert served.stop()[0] == 0


def test_bad_files_for_keys_and_audit_are_one_line(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(f'[access]\nkeys_file = "{tmp_path}/none.toml"')
    line = refused(str(config), "--port", "0", "--teacher", "a=m")
    assert "none.toml: cannot be read" in line
    assert "potstill keys add" in line


def test_files_that_are_no_certificate_and_key_are_named(tmp_path: Path) -> None:
    certfile, keyfile = make_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    _, wrong = make_certificate(tmp_path / "other")
    check_tls(TlsSettings(certfile=str(certfile), keyfile=str(keyfile)))
    for cert, key, words in (
        (certfile, tmp_path / "none.pem", "there is no file"),
        (certfile, wrong, "no pair of PEM certificate and key"),
        (keyfile, keyfile, "no pair of PEM certificate and key"),
    ):
        with pytest.raises(InvalidInput, match=words):
            check_tls(TlsSettings(certfile=str(cert), keyfile=str(key)))
