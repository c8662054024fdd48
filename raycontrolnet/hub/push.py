"""The push to the Hugging Face Hub: the final weights, their model card and example images."""

from __future__ import annotations

import logging
import re
import shlex
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raycontrolnet.config.checks import find_token
from raycontrolnet.config.output_settings import HubConfig
from raycontrolnet.errors import RunError
from raycontrolnet.model.files import hub_api
from raycontrolnet.quiet import no_progress_bars, only_errors
from raycontrolnet.text import error_message, printable

logger = logging.getLogger(__name__)

UPLOADED = ("config.json", "diffusion_pytorch_model.safetensors", "README.md", "images/*.png")
"""Files that are uploaded, relative to output_dir, besides the one file of --save_name: no checkpoints, no logs, no
settings file."""

WEIGHTS = UPLOADED[:2]
"""Files that diffusers needs to load the ControlNet."""


LONGEST_NAME = 96
"""Letters of a repository's name that the Hub allows."""


def check_push(hub: HubConfig, output_dir: str | Path) -> list[str]:
    """List the problems that would keep the run from being pushed, as far as they show without asking the Hub."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils
    problems = []
    if hub.push_to_hub and find_token(hub.hub_token) is None:
        problems.append("--push_to_hub: needs a token: give --hub_token, set HF_TOKEN, or run `hf auth login`")
    if hub.hub_model_id is not None:
        try:
            utils.validate_repo_id(hub.hub_model_id)
        except utils.HFValidationError as error:
            reason = error_message(error).partition(f": '{hub.hub_model_id}'")[0]
            problems.append(f"--hub_model_id={hub.hub_model_id[:100]}: {reason[:150].rstrip('.')}")
    elif hub.push_to_hub and not repo_name(output_dir, None):
        folder = Path(output_dir).resolve().name
        problem = f"needs a name for the repository, and the folder {folder!r} of --output_dir gives none"
        problems.append(f"--push_to_hub: {problem}; give --hub_model_id")
    return problems


def resolve_repo_id(
    output_dir: str | Path, hub_model_id: str | None, token: str | None, single_file: str | None = None
) -> str:
    """Return `owner/name`: as given, or under the token's user; by default the name is the folder's.

    Args:
        output_dir: the run's folder.
        hub_model_id: the setting.
        token: of `find_token`.
        single_file: as for `push_to_hub`, for the message of a failure.

    Raises:
        RunError: if the Hub has to be asked for the token's user and does not answer.
    """
    name = repo_name(output_dir, hub_model_id)
    if "/" in name:
        return name

    def ask() -> str:
        return _api(token).whoami(token=token)["name"]

    return f"{_attempt(ask, Path(output_dir), name, token, single_file)}/{name}"


def repo_name(output_dir: str | Path, hub_model_id: str | None) -> str:
    """Return the repository's name as it is known without the Hub, by default made of the folder's, without an owner.

    It is empty if the folder's name has no letter that the Hub allows.
    """
    if hub_model_id:
        return hub_model_id
    folder = unicodedata.normalize("NFKD", Path(output_dir).resolve().name).encode("ascii", "ignore").decode()
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9_.]+", "-", folder)).strip("-.")
    name = name[:LONGEST_NAME].strip("-.")
    while name.lower().endswith(".git"):
        name = name[: -len(".git")].strip("-.")
    return name


def push_to_hub(output_dir: str | Path, *, repo_id: str, token: str | None, single_file: str | None = None) -> str:
    """Create the repository if there is none, and upload `UPLOADED` and `single_file` in one commit.

    `HfApi.upload_folder` may split a push into several commits, and its patterns match in subfolders too.

    Args:
        repo_id: `owner/name`, see `resolve_repo_id`.
        token: of `find_token`; used for every call, and shown nowhere.
        single_file: name of the one file with the weights.

    Returns:
        The repository's address.

    Raises:
        RunError: if the push fails. Nothing in `output_dir` is changed; the message says how to push again.
    """
    from huggingface_hub import CommitOperationAdd

    output_dir = Path(output_dir)

    def push() -> str:
        paths = _files(output_dir, single_file)
        api = _api(token)
        url = api.create_repo(repo_id, token=token, exist_ok=True)
        logger.info("uploading %d files, %.0f MB", len(paths), sum(path.stat().st_size for path in paths) / 1e6)
        additions = [CommitOperationAdd(path.relative_to(output_dir).as_posix(), path) for path in paths]
        with no_progress_bars("huggingface_hub"), only_errors():
            api.create_commit(repo_id, additions, commit_message="End of training", token=token)
        return str(url)

    return _attempt(push, output_dir, repo_id, token, single_file)


def push_command(output_dir: str | Path, repo_id: str, single_file: str | None = None) -> str:
    """Return the shell command that does the same push, with the token from HF_TOKEN or the login."""
    includes = [part for pattern in _uploaded(single_file) for part in ("--include", pattern)]
    return shlex.join(["hf", "upload", repo_id, str(output_dir), ".", *includes])


def _uploaded(single_file: str | None) -> tuple[str, ...]:
    return (*UPLOADED, single_file) if single_file else UPLOADED


def _files(output_dir: Path, single_file: str | None) -> list[Path]:
    missing = [name for name in WEIGHTS if not (output_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{output_dir} has no {' and no '.join(missing)}")
    return [path for pattern in _uploaded(single_file) for path in sorted(output_dir.glob(pattern)) if path.is_file()]


def _api(token: str | None) -> Any:
    if not token:
        raise PermissionError("there is no token: give --hub_token, set HF_TOKEN, or run `hf auth login`")
    return hub_api(token)


def _attempt(
    action: Callable[[], str], output_dir: Path, repo_id: str, token: str | None, single_file: str | None = None
) -> str:
    """Return `action()`; if it fails, raise a RunError with the reason and the command to push again."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 (network, files, the library's own)
        reason = _reason(error, token)
    # Raised outside the handler, so without a cause: a request there would hold the token, and errors are logged.
    raise RunError(
        f"The push to {repo_id} failed: {reason}. The finished run in {output_dir} is intact. "
        f"Push again, with HF_TOKEN set or after `hf auth login`: {push_command(output_dir, repo_id, single_file)}"
    )


def _reason(error: BaseException, token: str | None) -> str:
    while error.__cause__ is not None and _status(error) is None:  # the library may have wrapped it
        error = error.__cause__
    status = _status(error)
    if status == 401:
        return "the Hub does not accept the token (401); it may have expired or been revoked"
    if status == 403:
        return "the token may not write there (403); it needs write permission for that owner"
    if status == 404:
        return "the Hub knows no such repository or owner (404)"
    if status is not None and status >= 500:
        return f"the Hub answers with an error of its own ({status}); try again later"
    text = str(error).replace(token, "***") if token else str(error)
    return f"{printable(text).rstrip('.')} ({type(error).__name__})"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
