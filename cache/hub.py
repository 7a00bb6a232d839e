"""Files of models that are named as on the Hugging Face hub, such as `HuggingFaceTB/SmolLM2-135M`."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from potstill.cache.errors import InvalidInput

_CONNECT_SECONDS = 5.0
_PORTS = {"http": 80}


def may_be_hub_name(name: str) -> bool:
    """Tell whether a name that no file or folder here has may be one of the hub."""
    return not (Path(name).exists() or name.startswith(("/", ".", "~")) or name.endswith(".json"))


def hub_file(name: str, file: str, *, revision: str = "") -> Path:
    """Find a file of a model in the local copy of the hub (`HF_HOME`), where it is put first if it is not there.

    Raises:
        InvalidInput: the hub has no such model or file, or cannot be reached and the copy lacks it.
    """
    # Set before it is imported: five lines of its retries would come before our one.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from huggingface_hub import errors, hf_hub_download  # noqa: PLC0415 -- files and folders do without it

    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        reason = re.split(r"\n|\. ", str(error).strip())[0].rstrip(".")
        raise InvalidInput(f"{file} of {name!r} cannot be had from the Hugging Face hub: {reason}") from error


def require_reachable(name: str, setting: str) -> None:
    """Refuse at once a name that is nothing here and cannot be looked up: the hub's library tries for half a minute.

    Raises:
        InvalidInput: it can be no name of the hub, or the hub cannot be reached and the local copy lacks it.
    """
    from huggingface_hub import constants, errors, try_to_load_from_cache  # noqa: PLC0415 -- as in `hub_file`

    told = f"{setting} is {name!r}: there is no such folder here"
    if not may_be_hub_name(name):
        raise InvalidInput(told)
    try:
        kept = try_to_load_from_cache(name, "config.json")
    except errors.HFValidationError as error:
        raise InvalidInput(f"{told}, and it is no name of the Hugging Face hub") from error
    # Through a proxy the hub may be reached where it has no address here.
    if isinstance(kept, str) or constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or _PORTS.get(hub.scheme, 443)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise InvalidInput(f"{told}, and the Hugging Face hub at {constants.ENDPOINT} cannot be reached") from error


def optional_hub_file(name: str, file: str) -> Path | None:
    """Find a file that a model need not have, as `hub_file`; None where the hub has none.

    With `HF_HUB_OFFLINE` set, the local copy is all there is.

    Raises:
        InvalidInput: the hub cannot be reached, and the local copy lacks the file.
    """
    from huggingface_hub import constants, errors  # noqa: PLC0415 -- files and folders do without it

    try:
        return hub_file(name, file)
    except InvalidInput as error:
        cause = error.__cause__
        unasked = isinstance(cause, errors.LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        if unasked:
            raise InvalidInput(
                f"whether {name!r} has a {file} cannot be asked of the Hugging Face hub; set HF_HUB_OFFLINE=1 to do "
                "with the local copy"
            ) from error
        if isinstance(cause, errors.EntryNotFoundError):
            return None
        raise
