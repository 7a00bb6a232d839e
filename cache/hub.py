"""Files of models that are named as on the Hugging Face hub, such as `HuggingFaceTB/SmolLM2-135M`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from potstill.cache.errors import InvalidInput


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
