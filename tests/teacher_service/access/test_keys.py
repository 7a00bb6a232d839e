"""The file of API keys, and the ring of a running service that reads it again."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from potstill.cache.errors import AlreadyExists, InvalidInput, NotFound, Unavailable
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.key_ring import KeyRing
from potstill.teacher_service.access.keys_file import add_key, hash_key, read_keys, remove_key
from potstill.teacher_service.access.quotas import Quota
from tests.support.command_line import refused as refused_command, run


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_running_service_notices_changes_within_a_second(tmp_path: Path) -> None:
    clock = Clock()
    file = tmp_path / "keys.toml"
    first = add_key(file, "first", Role.TRAINER, Quota())
    ring = KeyRing(file, clock)
    second = add_key(file, "second", Role.ADMIN, Quota(tokens_per_day=5))
    assert ring.find(second) is None
    clock.now += 1.0
    found = ring.find(second)
    assert found is not None
    assert (found.name, found.role, found.quota.tokens_per_day) == ("second", Role.ADMIN, 5)
    remove_key(file, "first")
    ring.reload()  # what SIGHUP does
    assert ring.find(first) is None


BROKEN = ["[keys", "", "gone", "pipe", '[keys.a]\nrole = "king"\nsha256 = ""\n', "others write"]
BROKEN += ["x = " + "[" * 5_000, "x = " + "9" * 5_000]


@pytest.mark.parametrize("broken", BROKEN)
def test_no_key_is_good_while_the_file_is_broken_and_the_log_says_so_once(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    file = tmp_path / "keys.toml"
    key = add_key(file, "first", Role.TRAINER, Quota())
    ring = KeyRing(file, clock)
    if broken == "gone":
        file.unlink()
    elif broken == "pipe":
        file.unlink()
        os.mkfifo(file, 0o600)
    elif broken == "others write":
        file.chmod(0o666)
    else:
        file.write_text(broken)
    for _ in range(5):
        clock.now += 2.0
        assert ring.failed == (broken != "")  # an empty file is a right one: nobody has a key any more
        if ring.failed:
            with pytest.raises(Unavailable, match="its log says why"):
                ring.find(key)
        else:
            assert ring.find(key) is None
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == (broken != "")
    assert all("no API key is good" in record.getMessage() and "\n" not in record.getMessage() for record in errors)


def test_every_key_of_many_is_found_and_near_misses_are_not(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    keys = {f"key-{number}": add_key(file, f"key-{number}", Role.TRAINER, Quota()) for number in range(8)}
    ring = KeyRing(file)
    for name, key in keys.items():
        found = ring.find(key)
        assert found is not None
        assert found.name == name
        for near in (key[:-1], key + "x", key.swapcase(), " " + key, hash_key(key), key + "\udcff", ""):
            assert ring.find(near) is None
    assert ring.find("x" * 10**6) is None


def test_only_hashes_are_kept_for_the_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, "a.b-c_1", Role.BATCH, Quota(tokens_per_minute=7, tokens_per_day=9))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text()
    assert len(key) > 40
    record = read_keys(file)["a.b-c_1"]
    assert (record.role, record.quota) == (Role.BATCH, Quota(tokens_per_minute=7, tokens_per_day=9))
    assert record.sha256 == hash_key(key)
    with pytest.raises(AlreadyExists, match="'a.b-c_1'"):
        add_key(file, "a.b-c_1", Role.BATCH, Quota())
    with pytest.raises(NotFound, match="it has a.b-c_1"):
        remove_key(file, "nobody")
    with pytest.raises(InvalidInput, match="'a b'"):
        add_key(file, "a b", Role.BATCH, Quota())
    assert os.listdir(tmp_path) == ["keys.toml"]
    with pytest.raises(InvalidInput, match="cannot be opened"):
        add_key(tmp_path / "nowhere" / "keys.toml", "a", Role.ADMIN, Quota())
    with pytest.raises(InvalidInput, match="potstill keys add"):
        read_keys(tmp_path / "nothing.toml")


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, "a", Role.ADMIN, Quota())
    file.chmod(0o622)
    with pytest.raises(InvalidInput, match=r"mode 622.*chmod go-w"):
        KeyRing(file)


def test_a_changed_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, "a", Role.ADMIN, Quota())
    file.chmod(0o644)
    add_key(file, "b", Role.TRAINER, Quota())
    remove_key(file, "a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_a_change_by_a_link_changes_the_file_that_the_service_reads(tmp_path: Path) -> None:
    file, link = tmp_path / "real" / "keys.toml", tmp_path / "keys.toml"
    file.parent.mkdir()
    link.symlink_to(file)
    add_key(link, "a", Role.ADMIN, Quota())
    add_key(file, "b", Role.TRAINER, Quota())
    remove_key(link, "a")
    assert link.is_symlink()
    assert list(read_keys(file)) == ["b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_change_by_root_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    add_key(file, "a", Role.ADMIN, Quota())
    os.chown(file, 4711, 4712)
    remove_key(file, "a")
    assert (file.stat().st_uid, file.stat().st_gid) == (4711, 4712)


HASH = "0" * 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys = 3", "only tables"),
        ("[other]", "only tables"),
        ("[keys]\na = 3", "keys.a is not a table"),
        (f'[keys.a]\nrole = "admin"\nsha256 = "{HASH}"\nkey = "x"', "unknown key 'key'"),
        (f'[keys.a]\nrole = "king"\nsha256 = "{HASH}"', "trainer, batch, admin"),
        ('[keys.a]\nrole = "admin"\nsha256 = "abc"', "64 hex digits"),
        ('[keys.a]\nrole = "admin"', "64 hex digits"),
        (f'[keys.a]\nrole = "admin"\nsha256 = "{HASH}"\ntokens_per_day = 0', "tokens_per_day is 0"),
        (f'[keys.a]\nrole = "admin"\nsha256 = "{HASH}"\ntokens_per_minute = true', "tokens_per_minute is True"),
        (f'[keys."a b"]\nrole = "admin"\nsha256 = "{HASH}"', "a name is"),
        (f'[keys.a]\nrole="admin"\nsha256="{HASH}"\n[keys.b]\nrole="admin"\nsha256="{HASH}"', "the same sha256"),
    ],
)
def test_a_bad_keys_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(InvalidInput) as caught:
        read_keys(file)
    assert words in caught.value.detail
    assert str(file) in caught.value.detail


def test_keys_are_added_listed_and_removed_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.toml")
    assert run("keys", "add", "ann", "--role", "trainer", "--tokens-per-minute", "5", "--file", file) == 0
    found = KeyRing(Path(file)).find(capsys.readouterr().out.strip())
    assert found is not None
    assert found.name == "ann"
    assert run("keys", "list", "--file", file) == 0
    assert capsys.readouterr().out == "ann\ttrainer\t5 tokens a minute\n"
    line = refused_command(capsys, "keys", "add", "ann", "--role", "admin", "--file", file)
    assert line.startswith("already_exists: ")
    assert run("keys", "remove", "ann", "--file", file) == 0
    assert run("keys", "list", "--file", file) == 0
    assert capsys.readouterr().out == ""
    line = refused_command(capsys, "keys", "add", "bob", "--role", "admin", "--tokens-per-day", "0", "--file", file)
    assert line == "invalid_input: tokens_per_day is 0; it must be a whole number from 1, or left out for no limit"
    assert run("keys", "list", "--file", file) == 0
