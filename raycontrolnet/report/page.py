"""What the pages of reports share: frame, boxes and tables; one file, without scripts or outside links."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.storage.files import replacing
from raycontrolnet.text import duration

REPORT_FILE = "report.html"

_STATES = ("running", "finished", "failed", "interrupted")
"""Those that the style sheet knows."""


def write(folder: Path, page: str) -> Path:
    """Write `folder`/report.html, whole or not at all; returns its path."""
    with replacing(folder / REPORT_FILE) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))
    return folder / REPORT_FILE


def frame(name: str, state: str, sections: Iterable[str], *more_styles: Path) -> str:
    """The page: `sections` are HTML, the rest is text.

    Args:
        more_styles: style sheets beside that of every report.
    """
    styles = (Path(__file__).with_name("report.css"), *more_styles)
    style = "".join(path.read_text(encoding="utf-8") for path in styles)
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(name)}: {escape(state)}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def title(name: str, state: str) -> str:
    """Of a run or a sweep."""
    badge = f'<span class="state {_class(state)}">{escape(state)}</span>'
    return f'<div class="title"><h1>{escape(name)}</h1>{badge}</div>'


def progress(state: str, done: int, of: int) -> str:
    return f'<progress class="{_class(state)}" value="{done}" max="{of}"></progress>'


def _class(state: str) -> str:
    return state if state in _STATES else ""


def figures(entries: Iterable[tuple[str, str, str]]) -> Iterable[str]:
    """The few numbers at the top: (title, value, note) of each, as HTML."""
    yield '<dl class="figures">'
    for heading, value, note in entries:
        yield f"<div><dt>{heading}</dt><dd><b>{value}</b><br><small>{note}</small></dd></div>"
    yield "</dl>"


def card(heading: str, legend: Mapping[str, str], content: str) -> str:
    """A box of the page, of HTML; `legend` names the curves by the CSS variables of their colours."""
    entries = "".join(
        f'<span><i style="background: var(--{colour})"></i>{words}</span>' for colour, words in legend.items()
    )
    legend_line = f'\n<p class="legend">{entries}</p>' if entries else ""
    return f'<section class="card">\n<h3>{heading}</h3>{legend_line}\n{content}\n</section>'


def breakable(name: str) -> str:
    """The name of a setting, as HTML that a narrow screen may break."""
    return escape(name).replace("_", "_<wbr>")


def table(settings: Mapping[str, Any]) -> str:
    shown = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in settings.items()}
    rows = [f"<tr><td>{breakable(name)}</td><td>{escape(value)}</td></tr>" for name, value in shown.items()]
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def settings(heading: str, found: Mapping[str, Any]) -> Iterable[str]:
    """Settings of a run, in two tables: those that are not at their defaults, and all; without secrets."""
    defaults = {setting.name: setting.default for setting in dataclasses.fields(TrainConfig)}
    secret = {setting.name for setting in dataclasses.fields(TrainConfig) if setting.metadata.get("secret")}
    shown = {name: value for name, value in found.items() if name not in secret}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in shown.items()}
    changed = {name: value for name, value in shown.items() if name not in defaults or plain[name] != defaults[name]}
    if shown:
        yield f"<h2>{heading}</h2>\n<p>Those that differ from their defaults:</p>"
        yield table(changed)
        yield f"<details><summary>All {len(shown)} settings</summary>\n{table(shown)}\n</details>"


def versions(found: Any) -> Iterable[str]:
    """A line with the versions of packages, if they are known."""
    if isinstance(found, dict):
        listed = ", ".join(f"{name} {version}" for name, version in found.items())
        yield f'<p class="pale">{escape(listed)}</p>'


def time(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"
