"""API keys in a TOML file: the name, role, quota and SHA-256 of each, never the key itself.

    [keys.trainer-1]
    role = "trainer"
    sha256 = "9f86..."
    tokens_per_minute = 100000

A key is 256 random bits. Slow, salted hashes protect what people choose, because that can be guessed; nobody guesses
256 bits from their SHA-256, so a plain hash is enough and a request costs microseconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.cache.errors import AlreadyExists, InvalidInput, NotFound
from potstill.cache.named_files import read_toml
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.settings.service import NAME_PATTERN

_PREFIX = "potstill_"  # lets scanners for leaked secrets find a key
_HASH = re.compile(r"[0-9a-f]{64}")
_KNOWN = ("role", "sha256", "tokens_per_minute", "tokens_per_day")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One key's entry in the file."""

    name: str
    role: Role
    sha256: str
    quota: Quota = field(default_factory=Quota)


def new_key() -> str:
    """A fresh random key: `potstill_` and 256 bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """The SHA-256 of a key, in hex."""
    # Bytes of a header that are no text must not raise here: they are just no key.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> dict[str, KeyRecord]:
    """Read every key of the file, by name.

    Raises:
        InvalidInput: it cannot be read, is not what `potstill keys` writes, or others may write it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        way_out = f"make it with `potstill keys add NAME --role admin --file {path}`"
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}; {way_out}") from error
    if not stat.S_ISREG(mode):
        raise InvalidInput(f"{path}: is not a file")  # a pipe would be waited for, and with it all requests
    if not os.access(path, os.R_OK):
        way_out = "chown it to the user that serves, or chmod 644: it holds names, roles and hashes, no keys"
        raise InvalidInput(f"{path}: user {os.geteuid()} may not read it (mode {mode & 0o777:o}); {way_out}")
    table = read_toml(path)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = f"others may write it (mode {mode & 0o777:o}) and make themselves admins"
        raise InvalidInput(f"{path}: {what}; chmod go-w")
    keys = table.get("keys", {})
    if set(table) - {"keys"} or not isinstance(keys, dict):
        raise InvalidInput(f"{path}: only tables [keys.NAME] belong here")
    records = {name: _record(path, name, value) for name, value in keys.items()}
    if len({record.sha256 for record in records.values()}) < len(records):
        raise InvalidInput(f"{path}: two names have the same sha256; every name needs its own key")
    return records


def add_key(path: Path, name: str, role: Role, quota: Quota) -> str:
    """Add a key to the file, which is made if it is not there; returns the key, which is kept nowhere.

    Raises:
        InvalidInput: a bad name, or a file that cannot be read or written. AlreadyExists: the name is taken.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidInput(f"the name {name[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'")
    key = new_key()
    with _changing(path) as records:
        if name in records:
            raise AlreadyExists(f"{path} has a key {name!r}; remove it first, or choose another name")
        records[name] = KeyRecord(name, role, hash_key(key), quota)
    return key


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file.

    Raises:
        NotFound: there is none of that name. InvalidInput: the file cannot be read or written.
    """
    with _changing(path) as records:
        if name not in records:
            raise NotFound(f"{path} has no key {name[:80]!r}; it has {', '.join(records) or 'none'}")
        del records[name]


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, KeyRecord]]:
    """Lend the records to be changed in place, and write them back at the end. Two writers take turns."""
    path = path.resolve()  # a link stays one: the service may read what it leads to by another name
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise InvalidInput(f"{path.parent}: cannot be opened: {error.strerror}") from error
    try:
        # The folder, because the file is not changed but replaced: a lock on the old one would keep nobody out.
        fcntl.flock(folder, fcntl.LOCK_EX)
        records = read_keys(path) if path.exists() else {}
        yield records
        _write(path, records)
        os.fsync(folder)  # a rename outlives a power cut only once its folder is on the disk
    finally:
        os.close(folder)


def _write(path: Path, records: Mapping[str, KeyRecord]) -> None:
    """Put a whole file in place of the old one, with its owner and mode; a new one is readable by the owner only."""
    text = "".join(_table(record) for record in records.values())
    try:
        # In the same folder, as only a rename within a file system replaces the old file at once.
        number, fresh = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # with mode 600
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                _own_like(path, number)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(fresh).replace(path)
        except BaseException:
            Path(fresh).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error


def _own_like(path: Path, number: int) -> None:
    """Give an open file the owner, group and mode of `path`, if that is there.

    The user who changes keys, often root, need not be the one who serves, and who has to read them on.
    """
    try:
        old = path.stat()
    except FileNotFoundError:
        return
    mine = os.fstat(number)
    if (mine.st_uid, mine.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(number, old.st_uid, old.st_gid)
        except PermissionError as error:
            who = f"user {old.st_uid} and group {old.st_gid}"
            raise InvalidInput(f"{path}: belongs to {who}; change keys as that user, or as root") from error
    os.fchmod(number, stat.S_IMODE(old.st_mode))


def _table(record: KeyRecord) -> str:
    lines = [f'[keys."{record.name}"]', f'role = "{record.role.value}"', f'sha256 = "{record.sha256}"']
    limits = {"tokens_per_minute": record.quota.tokens_per_minute, "tokens_per_day": record.quota.tokens_per_day}
    lines += [f"{name} = {value}" for name, value in limits.items() if value is not None]
    return "\n".join(lines) + "\n\n"


def _record(path: Path, name: str, value: Any) -> KeyRecord:
    where = f"{path}: keys.{name}"
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidInput(f"{where}: a name is 1 to 64 letters, digits, '.', '_' or '-'")
    if not isinstance(value, dict):
        raise InvalidInput(f"{where} is not a table")
    unknown = next((key for key in value if key not in _KNOWN), None)
    if unknown is not None:
        raise InvalidInput(f"{where}: unknown key {unknown!r}; known are {', '.join(_KNOWN)}")
    roles = [role.value for role in Role]
    if value.get("role") not in roles:
        raise InvalidInput(f"{where}: role is {value.get('role')!r}; it is one of {', '.join(roles)}")
    if not isinstance(value.get("sha256"), str) or not _HASH.fullmatch(value["sha256"]):
        raise InvalidInput(f"{where}: sha256 must be 64 hex digits; let `potstill keys add` write it")
    try:
        quota = Quota(tokens_per_minute=value.get("tokens_per_minute"), tokens_per_day=value.get("tokens_per_day"))
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error.detail}") from error
    return KeyRecord(name, Role(value["role"]), value["sha256"], quota)
