"""The licence in the model card: the one in the settings, or else the base model's own, or none."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.files import hub_api

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
"""Wait of a finished run for the Hub to name a licence."""

CARD = "README.md"

_URL = re.compile(r"https?://[^\s<>()\[\]\\]+")
_FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Licence:
    """The licence in a card's metadata, and its source."""

    ids: tuple[str, ...] = ()
    """The Hub's short names; nearly always one. None if neither the settings nor the base model name a licence."""
    source: Literal["settings", "base", "unknown"] = "unknown"
    name: str | None = None
    """Name of a licence without a short name (`other`)."""
    link: str | None = None
    """Address of its text."""

    def metadata(self) -> dict[str, Any]:
        """Return the entries for a card's metadata."""
        ids = self.ids[0] if len(self.ids) == 1 else list(self.ids)
        return {"license": ids or None, "license_name": self.name, "license_link": self.link}


def find_licence(license_id: str | None, model: ModelConfig, token: str | None) -> Licence:
    """Find the licence for the card of a finished run. Never raise, and wait for the Hub a few seconds at most.

    Args:
        license_id: `--license`.
        model: the base model, whose licence is taken where none is given.
        token: for a private base model on the Hub.
    """
    if license_id is not None:
        return Licence((license_id,), "settings")
    base = model.pretrained_model_name_or_path
    if is_hub_id(base):
        files = f"https://huggingface.co/{base}/blob/{model.revision or 'main'}/"
        found = _from_metadata(_hub_metadata(model, token) or _cached_metadata(model), files)
    else:
        found = _from_metadata(_local_metadata(Path(base) / CARD))
    if found is None:
        logger.warning("%s names no licence: the model card leaves it out; --license names one", base)
    return found or Licence()


def is_hub_id(name: str) -> bool:
    """Check that `name` is an id on the Hub, not a local folder."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _from_metadata(metadata: Mapping[str, Any], files: str | None = None) -> Licence | None:
    """Return the licence that a card's metadata names, if any.

    Args:
        files: address of the card's folder, to which its links are relative.
    """
    given = metadata.get("license")
    ids = tuple(str(one) for one in (given if isinstance(given, list) else [given]) if one)
    if not ids:
        return None
    name, link = (str(metadata[key]) if metadata.get(key) else None for key in ("license_name", "license_link"))
    if link is not None and not _URL.fullmatch(link):
        link = files + link if files and _FILE.fullmatch(link) else None
    return Licence(ids, "base", name, link)


def _local_metadata(card: Path) -> Mapping[str, Any]:
    """Read a model card's metadata; empty if there is no such file or it cannot be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (FileNotFoundError, NotADirectoryError):  # or of a single file
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s: no licence can be read from it (%s)", card, type(error).__name__)
        return {}


def _cached_metadata(model: ModelConfig) -> Mapping[str, Any]:
    """Read the card in the Hub's cache, where a base model that was downloaded whole has it."""
    from huggingface_hub import try_to_load_from_cache

    base = model.pretrained_model_name_or_path
    found = try_to_load_from_cache(base, CARD, cache_dir=model.cache_dir, revision=model.revision)
    return _local_metadata(Path(found)) if isinstance(found, str) else {}


def _hub_metadata(model: ModelConfig, token: str | None) -> Mapping[str, Any]:
    """Ask the Hub for the card's metadata; empty if it does not answer in time."""
    base = model.pretrained_model_name_or_path
    found: dict[str, Any] = {}

    def ask() -> None:
        try:
            info = hub_api(token).model_info(
                base, revision=model.revision, timeout=ANSWER_TIMEOUT_S, expand=["cardData"]
            )
            found.update(info.card_data.to_dict() if info.card_data else {})
        except Exception as error:  # noqa: BLE001 (a finished run is worth more than its licence)
            # Only the error's type: its text may hold the request, and with it the token.
            logger.warning("the Hub does not tell the licence of %s (%s)", base, type(error).__name__)

    # In a thread, which is left behind: the library's timeout is per read, and there is none for the name look-up.
    asking = threading.Thread(target=ask, name="licence", daemon=True)
    asking.start()
    asking.join(ANSWER_TIMEOUT_S)
    return dict(found)
