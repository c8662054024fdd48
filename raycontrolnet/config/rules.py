"""Rules shared by settings of several groups and commands: each yields a line for a value that cannot be run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from raycontrolnet.storage.uri import as_path, is_uri, meant_uri, shown_uri
from raycontrolnet.text import error_message, perhaps

Problems = Iterator[str]


NO_VALUE = "has no value"


def problem_of(config: Any, name: str, problem: str) -> str:
    value = getattr(config, name)
    return f"--{name}: {NO_VALUE}; {problem}" if value == "" else f"--{name}={value}: {problem}"


def empty_problems(config: Any, problems: Iterable[str]) -> Problems:
    """Check that no setting is an empty text, or a list with one, unless `problems` have it already."""
    found = tuple(problems)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        may_be = field.default == "" or "may_be_empty" in field.metadata
        if may_be or all(text.strip() for text in texts) or any(is_about(field.name, problem) for problem in found):
            continue
        yield f"--{field.name}: {NO_VALUE}; give one, or leave it out"


def is_about(name: str, problem: str) -> bool:
    """Check whether a problem is one of the setting `name`."""
    return problem.startswith(tuple(f"--{name}{end}" for end in ":=, "))


def at_least(config: Any, minimum: float, *names: str) -> Problems:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            yield problem_of(config, name, f"must be at least {minimum}")
        elif isinstance(value, int) and value >= 2**63:
            yield problem_of(config, name, "must be below 2**63")


def above_zero(config: Any, *names: str) -> Problems:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            yield problem_of(config, name, "must be a number above 0")


def in_unit_interval(config: Any, name: str) -> Problems:
    if not 0 <= getattr(config, name) <= 1:
        yield problem_of(config, name, "must be in [0, 1]")


def one_of(config: Any, name: str, choices: tuple[str, ...]) -> Problems:
    value = getattr(config, name)
    if value is not None and value not in choices:
        yield problem_of(config, name, f"must be one of {', '.join(choices)}{perhaps(value, choices)}")


def resolution_problems(config: Any) -> Problems:
    """Check that `resolution`, if given, suits the VAE."""
    if config.resolution is not None and (config.resolution < 8 or config.resolution % 8):
        lower = config.resolution // 8 * 8
        near = f"{lower} or {lower + 8}" if lower > 0 else "8"
        yield problem_of(config, "resolution", f"must be divisible by 8; use {near}")


def guidance_problems(config: Any) -> Problems:
    """Check `guidance_scale`, if given."""
    if config.guidance_scale is not None and not 0 <= config.guidance_scale < math.inf:
        yield problem_of(config, "guidance_scale", "must be a number of at least 0")


def seed_problems(config: Any) -> Problems:
    """Check that `seed`, if given, fits 63 bits."""
    if config.seed is not None and not 0 <= config.seed < 2**63:
        yield problem_of(config, "seed", "must be in [0, 2**63)")


def path_problem(name: str, path: str) -> str | None:
    """Return why the path in the setting `name` is none: a loop of links, too long, a mistyped URI."""
    try:
        there = Path(path).expanduser().resolve().exists()
    except (OSError, RuntimeError, ValueError) as error:
        shown = f"{path[:60]}..." if len(path) > 60 else path
        return f"--{name}={shown}: cannot be used as a path ({error_message(error, 60)})"
    if not there and (uri := meant_uri(path)):
        return f"--{name}={shown_uri(path)}: is no URI; perhaps you meant {shown_uri(uri)}, or ./{shown_uri(path)}"
    return None


def folder_problems(config: Any, name: str, *, or_uri: bool = False) -> Problems:
    """Check that the setting `name` can be a folder for results, without writing to it.

    Args:
        or_uri: whether it may be in an object store.
    """
    folder = getattr(config, name)
    if not folder:
        yield f"--{name}: {NO_VALUE}; name a folder"
    elif or_uri and is_uri(folder):
        yield from secret_problems(config, name)
        if not shown_uri(folder).partition("://")[2].rpartition("/")[0]:
            yield problem_of(config, name, "names a whole bucket; name a folder in it")
    elif "://" in (as_path(folder) if or_uri else folder):
        yield problem_of(config, name, "must be a local or mounted folder; URIs are not supported yet")
    elif problem := path_problem(name, folder):
        yield problem
    elif Path(folder).exists() and not Path(folder).is_dir():
        yield problem_of(config, name, "is a file; name a folder")


def pair_problems(config: Any, prompt: str, image: str) -> Problems:
    """Check that the numbers of prompts and control images match, if both are given, and that the images exist.

    Args:
        config: the settings.
        prompt: name of the setting with the prompts.
        image: name of the setting with the images.
    """
    prompts, images = getattr(config, prompt) or (), getattr(config, image) or ()
    if prompts and images and len(prompts) != len(images) and 1 not in (len(prompts), len(images)):
        yield (
            f"--{prompt}, --{image}: {len(prompts)} prompts and {len(images)} images; "
            "give equal counts, or a single one of either"
        )
    for path in images:
        if not path.strip():
            yield f"--{image}: {NO_VALUE}; name a file"
        elif problem := path_problem(image, path):
            yield problem
        elif is_uri(path):
            yield f"--{image}={shown_uri(path)}: must be a file on a disk; copy it to this machine"
        elif not Path(path).is_file():
            yield f"--{image}={path}: {'is a folder; name a file in it' if Path(path).is_dir() else 'no such file'}"


def pairs_of(prompts: tuple[str, ...] | None, images: tuple[str, ...] | None) -> tuple[tuple[str, str], ...]:
    """Return (prompt, control image path) of each pair; a single prompt or image is used for all."""
    if not prompts or not images:
        return ()
    count = max(len(prompts), len(images))
    return tuple((prompts[i % len(prompts)], images[i % len(images)]) for i in range(count))


def secret_problems(config: Any, *names: str) -> Problems:
    """Check that the settings `names` are no URIs with keys in them, as settings are written to files."""
    for name in names:
        value = getattr(config, name) or ""
        if any(map(holds_secret, (value,) if isinstance(value, str) else value)):
            yield f"--{name}: leave keys and tokens out of the URI; put them into the machines' environment"


def holds_secret(uri: str) -> bool:
    """Check whether a URI has a password or an option that looks like a key; False for what is no URI."""
    authority, _, options = uri.partition("://")[2].partition("?")
    user = authority.partition("/")[0].rpartition("@")[0]
    words = ("secret", "token", "key", "password", "sig", "credential")
    names = [option.partition("=")[0].lower() for option in options.split("&")]
    return ":" in user or "@" in options or any(word in name for word in words for name in names)
