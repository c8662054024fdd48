"""Processes that a command left behind."""

from __future__ import annotations

import os

import psutil


def processes_of_session(leader: int) -> list[psutil.Process]:
    """Those that live in the session that process `leader` began: Ray's end a moment after their driver."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found
