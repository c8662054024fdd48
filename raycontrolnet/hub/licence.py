"""The licence that a model card names: the one that the settings give, or else the base model's own."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.version import __version__

logger = logging.getLogger(__name__)

DEFAULT_LICENCE = "creativeml-openrail-m"
"""Of Stable Diffusion 1.x, and what the scripts that users know write."""

ANSWER_TIMEOUT_S = 5.0
"""How long a finished run waits for the Hub to name a licence."""

CARD = "README.md"

_URL = re.compile(r"https?://[^\s<>()\[\]\\]+")
_FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Licence:
    """What the card says under `license`, and why."""

    ids: tuple[str, ...] = (DEFAULT_LICENCE,)
    """By the Hub's short names; nearly always one."""
    source: Literal["settings", "base", "default"] = "default"
    """Who says so; `default` is a guess, because nobody does."""
    name: str | None = None
    """Of a licence that has no short name: `other`."""
    link: str | None = None
    """To its text."""

    def metadata(self) -> dict[str, Any]:
        """For the head of a card."""
        ids = self.ids[0] if len(self.ids) == 1 else list(self.ids)
        return {"license": ids, "license_name": self.name, "license_link": self.link}


def find_licence(config: TrainConfig, token: str | None) -> Licence:
    """The licence for the card of a finished run. Never raises, and waits for the Hub for a few seconds at most.

    Args:
        token: for a base model on the Hub that is private.
    """
    if config.license is not None:
        return Licence((config.license,), "settings")
    base = config.pretrained_model_name_or_path
    if not is_hub_id(base):
        return _in_head(_head(Path(base) / CARD)) or Licence()
    files = f"https://huggingface.co/{base}/blob/{config.revision or 'main'}/"
    return _in_head(_head_on_hub(config, token) or _head_in_cache(config), files) or Licence()


def is_hub_id(name: str) -> bool:
    """Whether `name` is an id on the Hub, not a local folder."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _in_head(head: Mapping[str, Any], files: str | None = None) -> Licence | None:
    """The licence that a card's head names, if it does.

    Args:
        files: address of the folder that the card lies in, to which its links are relative.
    """
    given = head.get("license")
    ids = tuple(str(one) for one in (given if isinstance(given, list) else [given]) if one)
    if not ids:
        return None
    name, link = (str(head[key]) if head.get(key) else None for key in ("license_name", "license_link"))
    if link is not None and not _URL.fullmatch(link):
        link = files + link if files and _FILE.fullmatch(link) else None
    return Licence(ids, "base", name, link)


def _head(card: Path) -> Mapping[str, Any]:
    """What a model card's YAML head says; nothing if there is no such file or it cannot be understood."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s: no licence can be read from it (%s)", card, type(error).__name__)
        return {}


def _head_in_cache(model: ModelConfig) -> Mapping[str, Any]:
    """Of a base model that was downloaded whole."""
    from huggingface_hub import try_to_load_from_cache

    base = model.pretrained_model_name_or_path
    found = try_to_load_from_cache(base, CARD, cache_dir=model.cache_dir, revision=model.revision)
    return _head(Path(found)) if isinstance(found, str) else {}


def _head_on_hub(model: ModelConfig, token: str | None) -> Mapping[str, Any]:
    """As the Hub has it now; nothing if it is not reached."""
    from huggingface_hub import HfApi

    base = model.pretrained_model_name_or_path
    heads: list[Mapping[str, Any]] = []

    def ask() -> None:
        try:
            info = HfApi(token=token, library_name="raycontrolnet", library_version=__version__).model_info(
                base, revision=model.revision, timeout=ANSWER_TIMEOUT_S, expand=["cardData"]
            )
            heads.append(info.card_data.to_dict() if info.card_data else {})
        except Exception as error:  # noqa: BLE001 (no licence is worth a finished run)
            # Its kind alone: nothing of the request, which holds the token.
            logger.warning("the Hub does not tell the licence of %s (%s)", base, type(error).__name__)

    # In a thread that is left behind: the library's limit is for every single read, and none for finding the address.
    asking = threading.Thread(target=ask, name="licence", daemon=True)
    asking.start()
    asking.join(ANSWER_TIMEOUT_S)
    return heads[0] if heads else {}
