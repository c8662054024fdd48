"""The pages of reports: filled templates, each one file without outside links.

A policy in the page's head allows one script, which shows the age of the page of a running run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from base64 import b64encode
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from raycontrolnet.config.train_config import TrainConfig, names_with
from raycontrolnet.storage.files import replacing
from raycontrolnet.text import duration, short_number

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")
OVERDUE_MINUTES = 10
"""Age from which on a running run may have ended without a word: live_report.py writes its page every 3 minutes."""


def write(folder: Path, page: str) -> Path:
    """Write `folder`/report.html, whole or not at all, and return its path."""
    with replacing(folder / REPORT_FILE) as partial_file:
        partial_file.write_bytes(page.encode("utf-8", "replace"))
    return folder / REPORT_FILE


def render(template: Path, **values: Any) -> str:
    """Return the page that `template` makes of `values`: all text is escaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "as_json": as_json,
        "plain": plain,
        "breakable": _breakable,
        "duration": partial(duration, fine=True),
        "thousands": "{:,}".format,
    }
    script = (TEMPLATES / "age.js").read_text(encoding="utf-8")
    return environment.get_template(template.name).render(
        written=datetime.fromtimestamp(time.time(), timezone.utc),
        overdue_minutes=OVERDUE_MINUTES,
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        **values,
    )


as_json = partial(json.dumps, ensure_ascii=False, default=str)


def plain(value: Any) -> str:
    """Return a setting's value as a person writes it: rounded, and without quotes or brackets around it."""
    if isinstance(value, float) and math.isfinite(value):
        return short_number(value)
    if isinstance(value, str):
        return value or "(empty)"
    if isinstance(value, (list, tuple)) and not any(isinstance(one, (list, tuple, dict)) for one in value):
        return ", ".join(map(plain, value)) or "(empty)"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {plain(one)}" for name, one in value.items()) or "(empty)"
    return as_json(value)


def _breakable(name: str) -> Markup:
    """Return the name of a setting, which a narrow screen may break."""
    return escape(name).replace("_", Markup("_<wbr>"))


def settings(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return those settings of a run that differ from their defaults, and all; without secrets."""
    defaults = {setting.name: setting.default for setting in dataclasses.fields(TrainConfig)}
    secrets = names_with("secret")
    shown = {name: value for name, value in found.items() if name not in secrets}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in shown.items()}
    changed = {name: value for name, value in shown.items() if name not in defaults or plain[name] != defaults[name]}
    return changed, shown
