"""Full disks and used-up quotas: what a failed write means, and if a quota allows what is to be written."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_BYTES = 2**20
"""A disk with less is full."""
RESERVES_AT_ONCE = frozenset(("ext4", "xfs", "btrfs", "nfs4", "lustre", "gpfs"))
"""File systems whose `fallocate` writes nothing, and counts to quotas. On tmpfs it would take the memory itself."""


def full_errno(folder: Path, error: Exception) -> int | None:
    """Return ENOSPC or EDQUOT if `error` came of a full disk or a used-up quota, in whatever words; else None."""
    number = getattr(error, "errno", None)
    if number in FULL:
        return number
    if shutil.disk_usage(folder).free <= FULL_BYTES:
        return errno.ENOSPC
    try:  # nothing else tells of a quota, which statvfs does not know
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(FULL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refusal:
        return refusal.errno if refusal.errno in FULL else None
    return None


def quota_forbids(folder: Path, num_bytes: int) -> bool:
    """Check whether a quota forbids `num_bytes` more in `folder`; False also where that cannot be seen at once.

    For a moment the room is reserved for a file without a name.
    """
    if num_bytes <= 0 or _file_system(folder) not in RESERVES_AT_ONCE:
        return False
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return _fallocate(file.fileno(), num_bytes) == errno.EDQUOT
    return False


def _fallocate(descriptor: int, num_bytes: int) -> int:
    """Call Linux's `fallocate`; return its error number, 0 if there is none.

    `os.posix_fallocate` would write to all of the file where the file system, as an older NFS, cannot reserve.
    """
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:  # not on Linux
        return errno.EOPNOTSUPP
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return ctypes.get_errno() if fallocate(descriptor, 0, 0, num_bytes) else 0


def _file_system(folder: Path) -> str:
    """Return the type of the file system that `folder` is on; empty if it is not known."""
    import psutil

    place = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    # Of several mounts at one place the last hides the others.
    return max(enumerate(mounts), key=lambda item: (len(item[1].mountpoint), item[0]))[1].fstype if mounts else ""
