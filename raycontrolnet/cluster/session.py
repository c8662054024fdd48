"""Ray for the time of a run: started here, or connected to."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raycontrolnet.cluster.cpus import LOADING_CPUS, machine_cpus
from raycontrolnet.cluster.environment import passed_on_to_job
from raycontrolnet.cluster.tokens import channel_to, take_token_mode_of, token_mode_kept
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)

LOCAL, AUTO = "local", "auto"
ANSWER_TIMEOUT_S = 10.0
ENVIRONMENT = {
    # Without it Ray Train changes the workers' folder, and relative paths in a data set mean another place there.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Undocumented, as those below. Ray's 15 lets everything else on the machine go first: with threads that wait for
    # each other, a busy neighbour then slows training tenfold. Loading tasks lower their own priority.
    "RAY_worker_niceness": "0",
    # Without it Ray ends loading processes that are idle for a second, as between two batches; a new one takes seconds
    # to import everything.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
}
STARTUP_CONCURRENCY = "RAY_worker_maximum_startup_concurrency"
"""Undocumented. Ray warns of more than four times as many processes as this; a run on two CPUs has ten."""

MATCH_LEVEL = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"
"""Undocumented. With the value "minor", Ray takes a Python that differs in the third number alone."""
RAYS_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
"""In Ray's message, for the cluster and then for this process."""


_own = False


def set_up_environment() -> None:
    """Set our defaults of Ray's environment variables, unless the user has set them."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(STARTUP_CONCURRENCY, str(max(4, machine_cpus())))


def is_own() -> bool:
    """Check whether the connected Ray is one that `ray_session` has started."""
    return _own


def on_a_cluster(address: str | None) -> bool:
    """Check whether `ray_session` will use a Ray that is not its own, on this machine alone."""
    import ray

    return ray.is_initialized() or _target(address) != LOCAL


def runs_on_a_cluster(run: ClusterConfig) -> bool:
    """Check whether a run is neither in this process nor on a Ray of its own."""
    return not run.in_this_process and on_a_cluster(run.address)


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Provide Ray: the one that is connected, or the one at `address` or RAY_ADDRESS, or else a new local one.

    At the end, what was started or connected to here is left again; what was there before stays.

    Raises:
        ConfigError: if there is no cluster at the address, one of another version, or one that asks for another token.
        RunError: if none can be started here.
    """
    import ray

    set_up_environment()
    if ray.is_initialized():
        yield
        return
    global _own
    with token_mode_kept():
        _connect(address)
        _own = _target(address) == LOCAL
        try:
            yield
        finally:
            _own = False
            ray.shutdown()


def _connect(address: str | None) -> None:
    from ray.exceptions import AuthenticationError

    target, origin = _target(address), "--address" if address else "RAY_ADDRESS"
    before = signal.getsignal(signal.SIGTERM)
    try:
        if target == LOCAL:
            _start_here()
        else:
            _connect_to(target, origin)
    except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
        if refusal := _version_refused(error):
            raise ConfigError([f"{origin}={target}: {refusal}"]) from error
        problem = (
            f"{origin}={target}: no Ray cluster answers there ({error_message(error, 200)}). Start one with "
            f"`ray start --head`, or {'leave it out' if address else 'unset it'} to work on this machine alone"
        )
        raise ConfigError([problem]) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's handler would end the process without a word


def _connect_to(address: str, origin: str) -> None:
    import ray

    take_token_mode_of(_answering(address), f"{origin}={address}")
    variables = passed_on_to_job()  # a Ray of our own has all of this process's
    # Nothing at all if there are none: processes that Ray has started in advance would be of no use.
    ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": variables} if variables else None)
    if variables:
        shown = " ".join(f"{name}={value}" for name, value in variables.items())
        logger.info("passed on to the workers: %s", shown)


def _start_here() -> None:
    """Start a Ray on this machine; once more if it was too slow, as on a busy one."""
    import ray

    # Loading gets a CPU beside the real ones: it is idle most of the time, and workers need not give one up.
    cpus = machine_cpus() + LOADING_CPUS
    for last in (False, True):
        try:
            ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, log_to_driver=False)
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            if "AF_UNIX" in str(error):
                name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
                folder = os.environ.get(name, "")
                problem = f"{name}={folder[:60]}{'...' * (len(folder) > 60)}: too long for the paths of Ray's sockets"
                raise ConfigError([f"{problem} (107 bytes); set RAY_TMPDIR to a short folder, such as /tmp"]) from error
            if last:
                raise RunError(
                    f"Ray could not be started on this machine, twice ({error_message(error, 200)}): is it overloaded? "
                    "Try again when less is running"
                ) from error
            logger.warning("Ray could not be started, and is started again", exc_info=True)


def _target(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or LOCAL


def _version_refused(error: BaseException) -> str | None:
    """Return what to tell users if `error` is Ray's refusal of another version of Ray or Python; else None."""
    found = RAYS_VERSIONS.findall(str(error))
    if "Version mismatch" not in str(error) or len(found) != 2:
        return None
    (ray_there, python_there), (ray_here, python_here) = found
    if ray_there != ray_here:
        name, there, here = "Ray", ray_there, ray_here
        way_out = f"run pip install 'ray[data,default,train,tune]=={there}' here"
    else:
        name, there, here = "Python", python_there, python_here
        way_out = f"start the run with Python {there}"
        if there.split(".")[:2] == here.split(".")[:2]:
            way_out += f", or set {MATCH_LEVEL}=minor"
    return f"the cluster runs {name} {there}, this process {name} {here}; {way_out}, or use `ray job submit`"


def _answering(address: str) -> str | None:
    """Return HOST:PORT of a cluster that has answered; None of one that cannot be asked, but by Ray itself.

    Raises:
        OSError: if nobody answers as Ray does: it would try for minutes, printing, and crash.
    """
    from ray._private.services import canonicalize_bootstrap_address

    place = canonicalize_bootstrap_address(address) or "" if address == AUTO else address
    host, _, port = place.rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        return None
    socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return None
    import grpc

    with channel_to(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            raise OSError(f"what listens there has not answered within {ANSWER_TIMEOUT_S:g} s") from None
    return place
