"""Requests to an object store: tried again where the network failed, and explained in a line without keys."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from raycontrolnet.signals import haste
from raycontrolnet.storage.files import FolderClosedError
from raycontrolnet.storage.left_requests import LeftError, unless_left
from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)

T = TypeVar("T")

READ_WAITS_S = (1.0, 2.0)
"""Seconds to wait before a read that failed is tried again: a sample that cannot be read may be left out."""
RUN_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""The same for what a run writes, and goes on from. pyarrow itself tries three times, within two seconds."""
REQUESTS = 32
"""Requests that a process makes at a time: each of them is mostly waiting."""
_LONGEST_REASON = 120
_NOISE = re.compile(r"^When .*?: (?=AWS Error)| \(Request ID: .*$")
"""Parts of pyarrow's reasons that help nobody."""
_LASTING = re.compile(
    "ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|NO_SUCH_|NOT_FOUND|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH"
)
"""Errors of stores that another try cannot change."""
_KEYS_IN_URIS = re.compile(r"(?<=://)[^\s'\"]*@|(?<=://)([^\s'\"?]*)\?[^\s'\"]*")
"""User and password, or what comes before the options and they: pyarrow quotes URIs whole."""
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def reached(attempt: Callable[[], T], waits_s: Sequence[float] | None = None) -> T:
    """Return what `attempt` gets from a store, tried again while the network fails.

    Args:
        waits_s: see `tried_again`; by default `READ_WAITS_S`.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such thing.
        FolderClosedError: if `attempt` does.
        LeftError: a second signal has come.
        OSError: with the reason in one bounded line, without keys.
    """
    waits_s = READ_WAITS_S if waits_s is None else waits_s
    try:
        return tried_again(lambda: unless_left(attempt), waits_s, is_lasting, "an object store failed")
    except (FileNotFoundError, NotADirectoryError, FolderClosedError, LeftError):
        raise
    except Exception as error:  # noqa: BLE001 - pyarrow and fsspec raise ValueError, ImportError and more
        raise OSError(reason(error)) from None


def tried_again(
    attempt: Callable[[], T], waits_s: Sequence[float], is_final: Callable[[OSError], bool], problem: str
) -> T:
    """Return what `attempt` returns; while it raises an OSError that is not final, wait and try again.

    Args:
        waits_s: seconds to wait before each further try; after the last, the error is raised.
        is_final: says of an error that another try cannot change it.
        problem: for the log, as "s3://bucket cannot be reached".
    """
    for wait_s in waits_s:
        try:
            return attempt()
        except OSError as error:
            if is_final(error):
                raise
            logger.warning("%s, and is tried again: %s", problem, reason(error))
        haste().sleep(wait_s)
    return attempt()


def is_lasting(error: OSError) -> bool:
    """Check whether another try cannot change `error`, of a store or a disk."""
    lasting = (FileNotFoundError, NotADirectoryError, PermissionError, FolderClosedError, LeftError)
    return isinstance(error, lasting) or _LASTING.search(str(error)) is not None


def reason(error: Exception, longest: int = _LONGEST_REASON) -> str:
    """Return why a request to a store failed, in at most `longest` letters, without keys."""
    text = _NOISE.sub("", error_message(error))
    if "NETWORK_CONNECTION" in text:
        address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        details = text.rpartition("Details: ")[2].rstrip(": ")
        text = f"{address or 'the store'} does not answer: {details}"
    text = _KEYS_IN_URIS.sub(r"\1", text)
    for secret in filter(None, map(os.environ.get, _SECRET_VARIABLES)):
        text = text.replace(secret, "***")
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
