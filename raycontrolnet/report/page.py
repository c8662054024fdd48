"""The pages of reports: filled templates, each one file without scripts or outside links."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from raycontrolnet.config.train_config import TrainConfig, names_with
from raycontrolnet.storage.files import replacing
from raycontrolnet.text import duration

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")


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
        "as_json": partial(json.dumps, ensure_ascii=False, default=str),
        "breakable": _breakable,
        "duration": partial(duration, fine=True),
        "thousands": "{:,}".format,
    }
    return environment.get_template(template.name).render(values)


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
