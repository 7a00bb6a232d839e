"""Object stores by URL (`s3://`, `gs://`, `az://`, `memory://`): opening, retries, and errors in plain words.

Credentials, endpoint and region come from the environment as obstore reads it (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, `AWS_REGION`, ...; `GOOGLE_*`, `AZURE_*`), and so do its client
options (`AWS_ALLOW_HTTP=true` for plain http, `AWS_TIMEOUT=60s`, ...).
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from potstill.cache.errors import InvalidInput, StoreError, StoreSilent
from potstill.cache.forks import is_inherited

# Prefix of the environment variables that configure a store, by URL scheme.
_ENVIRONMENT = {
    "s3": "AWS_",
    "s3a": "AWS_",
    "gs": "GOOGLE_",
    "az": "AZURE_",
    "azure": "AZURE_",
    "abfs": "AZURE_",
    "abfss": "AZURE_",
    "adl": "AZURE_",
    "memory": "",
}
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "read_timeout",
    "root_certificate",
    "timeout",
)
_BOOLEAN_OPTIONS = ("allow_http", "allow_invalid_certificates")

# A request may take this long; a part of a multipart upload or a range of a read is a few MiB.
_REQUEST = timedelta(seconds=60)
_CONNECT = timedelta(seconds=5)
# Errors 5xx, refused, dropped and (of reads) timed out requests are tried again, with growing pauses, for this long.
_RETRIED = timedelta(seconds=120)
_LONGEST_PAUSE = timedelta(seconds=8)
# At the start a person is waiting, and a wrong setting is likelier than an outage.
_FIRST_REQUEST = timedelta(seconds=10)
_FIRST_RETRIED = timedelta(seconds=8)

PROBE = ".potstill-probe"
"""Object that shows if a store honours conditional puts; the only one that is put twice on purpose."""


def open_object_store(url: str, *, write: bool) -> Any:
    """Open an obstore store and reach it once; with `write`, check that it can create an object only if absent.

    Raises:
        InvalidInput: the URL's scheme is unknown, or the URL malformed; the store ignores conditional puts.
        StoreError: the bucket is missing, access is denied, or nobody answers; within about 20 seconds.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        raise InvalidInput(
            f"cannot open {url!r}: services are read by clients and by `data.cache` of a run; give the folder or "
            "object store that the service has its cache in"
        )
    if scheme not in _ENVIRONMENT:
        known = ", ".join(f"{name}://" for name in _ENVIRONMENT)
        raise InvalidInput(f"cannot open {url!r}: the scheme is not known; take a folder, file:// or {known}")
    require_not_forked(url)
    try:
        if scheme == "memory":
            return from_url(url)
        patient = _open(url, scheme, _REQUEST, _RETRIED)
        hasty = _open(url, scheme, _FIRST_REQUEST, _FIRST_RETRIED)
    except (BaseError, ValueError) as error:
        raise InvalidInput(f"cannot open {url!r}: {_first_line(error)}") from error
    _reach(hasty, url, write=write)
    return patient


def require_not_forked(url: str) -> None:
    """Refuse an object store in a forked child of a process that used one: obstore's threads are not here.

    Raises:
        InvalidInput: so it is; waiting for an answer would last for ever.
    """
    if is_inherited("obstore"):
        raise InvalidInput(
            f"{url} cannot be read in a forked process, since its parent used an object store before; start workers "
            "by spawn or forkserver (DataLoader: multiprocessing_context='spawn')"
        )


def is_absent(error: BaseException) -> bool:
    """Tell whether an error means that the object is missing, in a bucket that exists."""
    return isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)


def is_cut_short(error: BaseException) -> bool:
    """Tell whether an answer began and broke off; obstore does not retry that for small objects and listings."""
    return "body error" in _first_line(error)


def store_error(what: str, error: BaseException) -> StoreError:
    """Make the error of a failed read or write, `what` in front; StoreSilent where nobody answered."""
    kind = StoreSilent if isinstance(error, BaseError) and _is_silent(error) else StoreError
    return kind(f"{what}: {explain(error)}")


def _is_silent(error: BaseException) -> bool:
    text = str(error)
    return "error sending request" in text or "timed out" in text or is_cut_short(error)


def explain(error: BaseException) -> str:
    """Say in one line what the store answered, and what to do."""
    # obstore's exception classes are too coarse: a missing bucket and a missing object are the same class to it.
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    said = code.group(1) if code else _first_line(error)
    if "NoSuchBucket" in text or "NoSuchContainer" in text or "ContainerNotFound" in text:
        return "the bucket does not exist; create it or mend the URL"
    # Without credentials the client asks the cloud's metadata service, and the error names that address.
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return "no credentials were found; set them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or re.search(r"40[13] (Forbidden|Unauth)", text):
        return f"access is denied ({said}); check the credentials in the environment and the bucket's policy"
    if "builder error" in text:
        return "the endpoint cannot be used; check AWS_ENDPOINT_URL, and set AWS_ALLOW_HTTP=true if it is plain http"
    if _is_silent(error):
        return "the store does not answer; check the network and AWS_ENDPOINT_URL, then run it again"
    return f"{said}; free space or mend access, then run it again"


def _open(url: str, scheme: str, request: timedelta, retried: timedelta) -> Any:
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": _LONGEST_PAUSE, "base": 2}
    options: dict[str, Any] = {"timeout": request, "connect_timeout": _CONNECT, **_from_environment(scheme)}
    # The time is the bound, not the number of tries.
    retry: Any = {"max_retries": 1000, "retry_timeout": retried, "backoff": backoff}
    return from_url(url, client_options=options, retry_config=retry)  # type: ignore[call-overload]


def _from_environment(scheme: str) -> dict[str, Any]:
    """Client options from environment variables: obstore reads none of them once it is given any."""
    prefix = _ENVIRONMENT[scheme]
    found = {name: os.environ.get(prefix + name.upper()) for name in _CLIENT_OPTIONS}
    given = {name: value for name, value in found.items() if value}
    return {
        name: value.lower() in ("1", "true") if name in _BOOLEAN_OPTIONS else value for name, value in given.items()
    }


def _reach(store: Any, url: str, *, write: bool) -> None:
    try:
        next(iter(obstore.list(store, chunk_size=1)), None)
        # The second of two creates must be refused; the first is refused too once a cache was written here before.
        if not write or not (_created(store) and _created(store)):
            return
    except (BaseError, OSError) as error:
        raise StoreError(f"cannot open {url!r}: {explain(error)}") from error
    raise InvalidInput(
        f"{url!r} cannot hold a cache: it ignores If-None-Match, so two writers would overwrite each other; "
        "use a store with conditional puts"
    )


def _created(store: Any) -> bool:
    try:
        obstore.put(store, PROBE, b"potstill", mode="create", use_multipart=False)
    except AlreadyExistsError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].strip().rstrip(";:")
