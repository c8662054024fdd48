"""URIs of folders and files in object stores, such as s3://bucket/folder, as pyarrow's file systems read them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from raycontrolnet.storage.left_requests import unless_left
from raycontrolnet.storage.store_requests import reason
from raycontrolnet.text import perhaps

if TYPE_CHECKING:
    from pyarrow import fs

UNUSABLE = (OSError, ValueError, ImportError, NotImplementedError)
"""Errors of pyarrow for a URI that it does not know, was built without, or cannot reach."""
STORES_WITH_BUCKETS = ("s3", "gcs")
"""pyarrow's names of file systems in which nothing can be written where there is no bucket."""


ACCESS = "check the URI, and keys and address in the environment"
"""Advice where a URI cannot be read."""
SCHEMES = ("s3", "gs", "gcs", "hdfs", "abfs", "abfss")
"""Beginnings of URIs that pyarrow reads."""


def is_uri(name: str) -> bool:
    """Check whether `name` is a URI, not a path; `file://` URIs are paths, see `as_path`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None and not name.startswith("file://")


def meant_uri(name: str) -> str | None:
    """Return the URI that a path is probably meant for, as s3:/bucket or gs//bucket; None for other names."""
    found = re.match(rf"({'|'.join(SCHEMES)})(:(?!//)|/+(?<=//)|[;,]/)", name, re.IGNORECASE)
    return f"{found[1].lower()}://{name[found.end() :].lstrip(':/;,')}" if found else None


def as_path(name: str) -> str:
    """Return the path that a `file://` URI names; other names as they are."""
    return unquote(name.removeprefix("file://")) if name.startswith("file://") else name


def shown_uri(uri: str) -> str:
    """Return `uri` for messages, without user and options, and the slash at its end; paths as they are."""
    if not is_uri(uri):
        return uri
    kind, _, rest = uri.partition("://")
    if re.match(r"[^/?@\[]*:[^/?@]*[^/?@\d][^/?@]*[/?].*@", rest):  # a key with / or ? as they are, which ends at the @
        rest = rest.rpartition("@")[2]
    authority, slash, path = rest.partition("?")[0].rstrip("/").partition("/")
    return f"{kind}://{authority.rpartition('@')[2]}{slash}{path}"


def shown_value(value: Any) -> Any:
    """Return the value of a setting, or a list or mapping of some, for messages: texts by `shown_name`."""
    if isinstance(value, Mapping):
        return {name: shown_value(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown_value(part) for part in value]
    return shown_name(value) if isinstance(value, str) else value


def shown_name(name: str) -> str:
    """Return a path, Hub id or address, which may lack its https://, for messages, without what may be a key."""
    return shown_uri(name) if is_uri(name) else re.sub(r"\?[^/?]*=.*", "", name)


def child_uri(uri: str, name: str) -> str:
    """Return the URI of `name` in the folder `uri`, with the folder's options."""
    folder, mark, options = uri.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def split_uri(uri: str) -> tuple[str, str]:
    """Return the URI of the folder that `uri` lies in, with its options, and the last part of its name."""
    place, mark, options = uri.partition("?")
    folder, _, name = place.rstrip("/").rpartition("/")
    return f"{folder}{mark}{options}", name


@lru_cache(maxsize=8)
def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of `uri`, and the path in it; for S3 AWS_* variables tell keys and address.

    Raises:
        OSError, ValueError, ImportError, NotImplementedError: if pyarrow does not know it, was built without it, or it
            cannot be reached; see `UNUSABLE`.
    """
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(uri)
    except ValueError as error:
        near = perhaps(uri.partition("://")[0], SCHEMES) if "Unrecognized filesystem" in str(error) else ""
        raise ValueError(f"{error}{near}") from None
    if system.type_name == "s3":
        # from_uri takes Arrow's patience of thirty tries, up to minutes; a copy has that of pyarrow's own constructor.
        system = pickle.loads(pickle.dumps(system))
    return system, path.rstrip("/")


def unusable(error: Exception) -> str:
    """Return why a URI cannot be used, and the way out, to follow it in a message."""
    return (
        f"cannot be used ({reason(error, 160)}); name a folder, or a URI such as s3://bucket/folder, with keys and "
        "address in the environment"
    )


def check_bucket(uri: str) -> None:
    """Check that the bucket of `uri` is there and may be read.

    Raises:
        OSError, ValueError, ImportError, NotImplementedError: if not; see `UNUSABLE`.
    """
    from pyarrow.fs import FileType

    system, path = open_uri(uri)
    bucket = path.partition("/")[0]
    if system.type_name not in STORES_WITH_BUCKETS:
        return
    if not bucket:
        raise FileNotFoundError("it names no bucket")
    if unless_left(lambda: system.get_file_info(bucket)).type == FileType.NotFound:
        raise FileNotFoundError(f"there is no bucket {bucket}, or it is not yours")
