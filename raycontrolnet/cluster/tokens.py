"""Ray's tokens, which a cluster asks for or not: a process that does otherwise than its cluster is no use to it.

Where the cluster asks and the process shows none, nothing answers it. Where the process shows one, it also asks for
one: a cluster without tokens cannot answer, and takes the process, and all that it began, for dead. Ray 2.60 leaves
the choice to the user; a local Ray, as the demo's, sets it for its process, and writes the token that a `ray start`
on the machine later goes by.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raycontrolnet.errors import ConfigError

if TYPE_CHECKING:
    import grpc

MODE = "RAY_AUTH_MODE"
"""Environment variable: token, disabled, or what Ray takes without it."""
VARIABLES, FILE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"
"""Places of a token, in the order in which Ray looks: in an environment variable, in the file that one names, here."""
UNSET = f"unset {MODE}, which a Ray that was started in this process sets, too"
ANSWER_TIMEOUT_S = 10.0


@contextmanager
def token_mode_kept() -> Iterator[None]:
    """Give this process its own way with tokens back after the `with` block, in which a Ray may have changed it."""
    before = os.environ.get(MODE)
    try:
        yield
    finally:
        _set_mode(before)


def take_token_mode_of(address: str | None, origin: str) -> None:
    """Let this process show a token, and ask for one, if the cluster does.

    Args:
        address: HOST:PORT of a cluster's head that has answered; None where it cannot be asked, as under TLS: then a
            token that is here is shown.
        origin: the setting that names the cluster, with its value.

    Raises:
        ConfigError: if RAY_AUTH_MODE says otherwise, or there is no token.
        OSError: if the head does not answer.
    """
    chosen, tokens = os.environ.get(MODE), _raylet().AuthenticationTokenLoader.instance()
    if address is None:
        _set_mode(chosen or ("token" if tokens.has_token(ignore_auth_mode=True) else "disabled"))
        return
    asks, shows = _refuses(address), (chosen or "").lower() == "token"
    if chosen and asks and not shows:
        raise ConfigError([f"{origin}: the cluster asks for a token, and {MODE}={chosen} shows none; {UNSET}"])
    if shows and not asks:
        raise ConfigError([f"{origin}: the cluster knows no tokens, and {MODE}=token asks it for one; {UNSET}"])
    if asks and not tokens.has_token(ignore_auth_mode=True):
        problem = f"{origin}: the cluster asks for a token, and there is none here"
        raise ConfigError([f"{problem}; copy ~/.ray/auth_token from its head, or set RAY_AUTH_TOKEN to what it holds"])
    if asks and _refuses(address, tokens.get_raw_token(ignore_auth_mode=True)):
        raise ConfigError([f"{origin}: the cluster takes another token than {place_of_token()}, which is shown to it"])
    _set_mode("token" if asks else "disabled")


def place_of_token() -> str:
    """Return where Ray looks for this process's token: the name of a variable, or of the user's file."""
    return next((name for name in VARIABLES if name in os.environ), FILE)


def _refuses(address: str, token: str | None = None) -> bool:
    """Check whether a head does not answer a process that shows a token, or none.

    Raises:
        OSError: if it answers nobody.
    """
    import grpc
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    shown = [("authorization", f"Bearer {token}")] if token else []
    with channel_to(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_TIMEOUT_S, metadata=shown)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                raise OSError(f"its head does not say whether it asks for a token: {error.details()}") from error
            return True
    return False


def channel_to(address: str) -> grpc.Channel:
    """Return a way to ask a head that needs no encryption; as Ray's own, past what `http_proxy` names."""
    import grpc
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

    return grpc.insecure_channel(address, options=GLOBAL_GRPC_OPTIONS)


def _set_mode(mode: str | None) -> None:
    if mode is None:
        os.environ.pop(MODE, None)
    else:
        os.environ[MODE] = mode
    # As Ray does it: what it has read from the environment is read again; a token that it has found stays in use.
    _raylet().Config.initialize("")
    _raylet().AuthenticationTokenLoader.instance().reset_cache()


def _raylet() -> Any:
    """Return Ray's module in C++, whose types nobody has written down."""
    from ray import _raylet

    return _raylet
