"""CPUs: how many this machine has, and what each process of a run reserves of them."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from raycontrolnet.cluster.environment import unless_chosen

LOADING_CPUS = 1
"""CPUs that workers must leave to loading. Ray Data shares out whole CPUs only: with less, loading stalls."""
MIN_CPU_SHARE = 0.25
"""CPUs of a worker, at least; a larger share is a multiple of it."""
TASK_CPUS = 0.25
"""CPUs that one loading task reserves: few, so that loading finds room beside workers that take nearly every CPU."""
COUNT_CPUS = 0.01
"""CPUs of the task that lists what is to be loaded."""
LOADING_NICENESS = 15

SPINS = {"GOMP_SPINCOUNT": "10000"}
"""Rounds for which a thread of libgomp spins before it sleeps, about 20 microseconds; by default it is milliseconds,
the time of those it waits for where cores are few and busy. On two cores that two other programs kept busy an update of
the demo ran 1.3 to 2 times as fast, on idle ones as fast to 5%; without spinning (OMP_WAIT_POLICY=PASSIVE) it took 1.6
times as long on idle ones. libgomp reads the variable when torch is imported."""
WAIT_POLICY = "OMP_WAIT_POLICY"
"""OpenMP's own variable for the same, which a user may have set instead."""

CGROUP = Path("/sys/fs/cgroup")
QUOTA_FILES = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""A container's CPU time and the period for which it is granted, in versions 2 and 1 of Linux's cgroups."""


def machine_cpus() -> int:
    """Return how many CPUs this process may use, at least 1: those of the machine, or a container's share of them.

    Ray counts them when it starts, but tells the number only afterwards; a local Ray is started with one more.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpus, _container_cpus())))


def _container_cpus() -> float:
    """Return the CPUs that a container may use, infinity without a limit."""
    for names in QUOTA_FILES:
        with suppress(OSError, ValueError):  # there is no such file, or the quota is "max"
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            if quota > 0:
                return quota / period
    return math.inf


def threads_for(cpus: float) -> int:
    """Return the threads of a process that has `cpus` CPUs, rounded up: loading rarely uses the fraction."""
    return max(1, math.ceil(cpus))


def variables_for_threads() -> dict[str, str]:
    """Return the environment variables for processes that compute on CPUs; none if the user has chosen."""
    return {} if WAIT_POLICY in os.environ else unless_chosen(SPINS)


def let_training_go_first() -> None:
    """Give this loading process the lowest priority: it shares cores with workers whose threads wait for each other."""
    os.nice(max(0, LOADING_NICENESS - os.nice(0)))
