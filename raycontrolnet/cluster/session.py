"""Ray itself: start it or connect to it, stop its workers, and keep its noise in files."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raycontrolnet.cluster.blocks import LOADING_CPUS
from raycontrolnet.errors import ConfigError
from raycontrolnet.text import error_message

LOCAL = "local"
ANSWER_TIMEOUT_S = 10.0
AUTH_TOKEN = Path("~/.ray/auth_token")


def on_a_cluster(address: str | None) -> bool:
    """Whether `ray_session` will not start a Ray of our own, on this machine alone."""
    import ray

    return ray.is_initialized() or (address or os.environ.get("RAY_ADDRESS") or LOCAL) != LOCAL


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Ray for the time of a run: the one that is already connected, `address`, RAY_ADDRESS, or a new local one.

    What this function starts or connects to, it leaves again; what was there before stays.

    Raises:
        ConfigError: if there is no cluster at the address.
    """
    import ray
    from ray._private.utils import get_num_cpus  # knows about containers' limits

    set_up_environment()
    if ray.is_initialized():
        yield
        return
    target = address or os.environ.get("RAY_ADDRESS") or LOCAL
    # On a machine of our own, loading gets a CPU beside the real ones: it is idle most of the time, so that workers
    # need not give one up.
    of_our_own = {"num_cpus": get_num_cpus() + LOADING_CPUS, "include_dashboard": False} if target == LOCAL else {}
    try:
        if target != LOCAL:
            _check_somebody_answers(target)
            if AUTH_TOKEN.expanduser().is_file():  # `ray start` then asks for it
                os.environ.setdefault("RAY_AUTH_MODE", "token")
        ray.init(address=target, log_to_driver=False, **of_our_own)
    except (OSError, ValueError, RuntimeError) as error:
        origin = "--address" if address else "RAY_ADDRESS"
        problem = (
            f"{origin}={target}: no Ray cluster answers there ({error_message(error, 200)}). Start one with "
            "`ray start --head`, or leave the address out to train on this machine alone"
        )
        raise ConfigError([problem]) from error
    try:
        yield
    finally:
        ray.shutdown()


def set_up_environment() -> None:
    """What Ray is to do otherwise than by default, where nobody has said so in the environment."""
    from ray._private.utils import get_num_cpus

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths in the data set mean the same in workers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default of 15 lets everything else on the machine go first: with two threads waiting for each other, a
    # busy neighbour then slows training tenfold. Loading tasks lower their own priority.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray ends processes that were idle for a second: between two batches, and a new one takes seconds to import all.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    # Ray warns of more than four times as many processes as it starts at once; a run on two CPUs has ten.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(4, get_num_cpus())))


def _check_somebody_answers(address: str) -> None:
    """Raise an OSError if nobody listens at HOST:PORT: Ray itself would try for minutes, printing."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
