"""The files of a model in diffusers' layout, in a folder or on the Hub: their names, and the small ones' content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycontrolnet.quiet import no_progress_bars
from raycontrolnet.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LFS_POINTER = b"version https://git-lfs"
"""Beginning of what `git clone` leaves in place of weights without git-lfs."""
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"

SMALL_FILES = ("*.json", "*.txt")
"""Configurations and tokenizers."""
ANSWER_TIMEOUT_S = 5.0
"""Wait for the Hub's first answer; nothing is retried, since loading the model asks again."""


class NotThere(Exception):
    """A Hub model that cannot be loaded; the message is the reason, and the way out."""


class NotKnown(Exception):
    """A Hub model that cannot be looked at now; loading it asks again, with retries, and says what is wrong."""


class Unreachable(NotThere):
    """A Hub model that is not in the cache, without a way to the Hub from this machine."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, as far as they are known without downloading it."""

    names: frozenset[str] | None
    """Paths below the model's folder, two levels deep; None if only the Hub's cache was there to look at."""
    find: Callable[[str], Path | None]
    """Local path of a small file, downloaded if needed; None if there is none or it cannot be had."""
    folder: Path | None = None
    """The model's folder, if it is a local one."""

    def find_one(self, names: Iterable[str]) -> Path | None:
        """Return the path of the first of these small files that is there, as `find`."""
        return next((path for name in names if (path := self.find(name))), None)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file; empty if it cannot be had, or is no mapping: loading the model then says why."""
        path = self.find(name)
        try:
            content = json.loads(path.read_bytes()) if path else {}
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def hub_api(token: str | None) -> HfApi:
    """Return the Hub's client, which tells the Hub the name and version of this package."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="raycontrolnet", library_version=__version__)


def local_files(folder: Path) -> ModelFiles:
    """Return the files of the model in `folder`."""
    files = (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
    names = frozenset(path.relative_to(folder).as_posix() for path in files)
    return ModelFiles(names, lambda name: folder / name if name in names else None, folder)


def cached_files(name: str, *, revision: str | None, cache_dir: str | None) -> ModelFiles:
    """Return the files of a model in the Hub's cache; arguments as of `hub_files`."""
    from huggingface_hub import try_to_load_from_cache

    def find(file: str) -> Path | None:
        found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
        return Path(found) if isinstance(found, str) else None

    return ModelFiles(None, find)


def hub_files(
    name: str, main_files: Sequence[str], *, revision: str | None, cache_dir: str | None, token: str | None
) -> ModelFiles:
    """Ask the Hub for a model's files, and its cache if the Hub does not answer or does not have the model any more.

    Args:
        name: Hub id.
        main_files: one of these a model in the cache has.
        revision: branch, tag or commit.
        cache_dir: the Hub's cache, if not the usual one.
        token: for private models.

    Raises:
        NotThere: if the model is neither on the Hub nor in the cache.
        Unreachable: if it is not in the cache, and the Hub cannot be reached.
        NotKnown: if it is not in the cache, and the Hub gives no answer to go by.
    """
    cached = cached_files(name, revision=revision, cache_dir=cache_dir)

    def download(file: str) -> Path | None:
        return _download(name, file, revision, cache_dir, token) if names is None or file in names else None

    try:
        names = _names_on_hub(name, revision, token)
    except (NotThere, NotKnown):
        if cached.find_one(main_files):
            return cached
        raise
    return ModelFiles(names, download)


def _names_on_hub(name: str, revision: str | None, token: str | None) -> frozenset[str] | None:
    """Ask the Hub for the names of a model's files, once; raises as `hub_files`."""
    from huggingface_hub.errors import (
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = hub_api(token).model_info(name, revision=revision, timeout=ANSWER_TIMEOUT_S, expand=["siblings"])
    except RevisionNotFoundError:
        raise NotThere(f"has no revision {revision} on the Hub; look at https://huggingface.co/{name}/tree") from None
    except RepositoryNotFoundError:
        problem = "no such folder, and no such model on the Hub"
        raise NotThere(f"{problem}; correct it, or, if it is private, give --hub_token or `hf auth login`") from None
    except OfflineModeIsEnabled:
        problem = "no such folder, and, as a Hub id, not in the cache, while HF_HUB_OFFLINE is set"
        raise Unreachable(f"{problem}; correct the path, or download it with `hf download {name}`") from None
    except Exception as error:
        if not _unreachable(error):
            raise NotKnown from error
        problem = "no such folder, and, as a Hub id, not in the cache, and the Hub cannot be reached"
        raise Unreachable(f"{problem}; correct the path, or run `hf download {name}` where it can") from None
    return None if info.siblings is None else frozenset(file.rfilename for file in info.siblings)


def _unreachable(error: BaseException) -> bool:
    """Check that `error` says that there is no way to the Hub, rather than that it takes its time."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError") or isinstance(
        error, ConnectionError
    )


def _download(name: str, file: str, revision: str | None, cache_dir: str | None, token: str | None) -> Path | None:
    """Download a small file; return None if there is none.

    Raises:
        NotThere: if the Hub asks for consent first.
        NotKnown: if it cannot be had now.
    """
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError

    api = hub_api(token)
    try:
        with no_progress_bars("huggingface_hub"):
            return Path(api.hf_hub_download(name, file, revision=revision, cache_dir=cache_dir))
    except RemoteEntryNotFoundError:
        return None
    except GatedRepoError:
        problem = f"asks for consent: accept its conditions at https://huggingface.co/{name}"
        raise NotThere(f"{problem}, and give --hub_token or `hf auth login`") from None
    except Exception as error:
        raise NotKnown from error
