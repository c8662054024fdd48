"""Checks of settings against this machine, before Ray starts: folders, extras, device, token."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycontrolnet.config.declare import facts_of
from raycontrolnet.config.rules import is_about, path_problem
from raycontrolnet.config.settings import OptimConfig, StepConfig
from raycontrolnet.config.train_config import FACTS, TrainConfig, names_with
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.storage.uri import as_path
from raycontrolnet.version import __version__

VERSIONS_OF = ("ray", "torch", "diffusers", "transformers", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide what a run computes."""
    return {"raycontrolnet": __version__} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add the error of a check to `problems` instead of raising it, so that the next checks run too."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems
    except UserError as error:
        problems.append(str(error))


def missing_extras(config: OptimConfig | StepConfig, problems: Iterable[str] = ()) -> Iterator[str]:
    """Yield a problem for each setting that needs an optional package that is not installed.

    Args:
        config: the settings.
        problems: those found before; a setting that has one there needs no package for now.
    """
    found = tuple(problems)
    for name in facts_of(type(config)):
        problem = package_problem(name, getattr(config, name))
        if problem and not any(is_about(name, other) for other in found):
            yield problem


def package_problem(name: str, value: Any) -> str | None:
    """Return a problem if the setting `name` needs an optional package for `value`, and it is not installed."""
    missing = missing_package(name) if value else None
    return f"--{name}: {missing}" if missing else None


def missing_package(name: str) -> str | None:
    """Return in words that the optional package of the setting `name` is not installed here, and what installs it."""
    package, extra = FACTS[name].get("package", (None, ""))
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed; run pip install 'raycontrolnet[{extra}]'"


def unwritable(folder: Path, flag: str) -> str | None:
    """Return why results cannot be written to `folder`, which is created if needed; None if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # os.access says yes to root, even where root cannot write
            pass
    except OSError as error:
        return f"--{flag}={folder}: cannot be written ({error.strerror}); name another folder"
    return None


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the settings with absolute paths, as workers run in other directories."""
    return dataclasses.replace(config, **{name: absolute(name, getattr(config, name)) for name in names_with("path")})


def absolute(name: str, value: Any) -> Any:
    """Return `value` of the setting `name`, as an absolute path if it is one; Hub ids and URIs stay as they are."""
    kind = FACTS[name].get("path")
    if isinstance(value, tuple):
        return tuple(absolute(name, item) for item in value)
    if value is None or kind is None:
        return value
    value = as_path(value)
    if kind != "local" and "://" in value:
        return value
    path = resolved(name, value)
    return value if kind == "or id" and not path.exists() else str(path)


def resolved(name: str, value: str) -> Path:
    """Return the absolute path that the setting `name` means.

    Raises:
        ConfigError: if it is none.
    """
    if problem := path_problem(name, value):
        raise ConfigError([problem])
    path = Path(value).expanduser()
    # A link to a file keeps its name, which says what it is: the Hub's cache links to files without an ending.
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def check_device(
    use_gpu: bool | None,
    config: Any = None,
    *,
    has_gpu: bool,
    work: str = "train",
    from_run: Container[str] = (),
) -> bool:
    """Return whether to use a GPU: as `use_gpu` says, by default if there is one.

    Args:
        use_gpu: the setting of that name.
        config: settings that must suit the device as well.
        has_gpu: there is a GPU to use.
        work: verb for what the device is for.
        from_run: names of settings that are not flags but come from a run's config.yaml.

    Raises:
        ConfigError: if there is no GPU, and `use_gpu` or a value in `config` needs one.
    """
    if use_gpu and not has_gpu:
        raise ConfigError([no_gpu("there is no GPU here", work)])
    use_gpu = has_gpu if use_gpu is None else use_gpu
    problems = []
    for name in names_with("gpu_only"):
        value, instead = FACTS[name]["gpu_only"]
        if not use_gpu and getattr(config, name, None) == value:
            shown = "" if value is True else f"={value}"
            whose = " (the run's own)" if name in from_run else ""
            problems.append(f"--{name}{shown}{whose}: needs a GPU; {instead}")
    if problems:
        raise ConfigError(problems)
    return use_gpu


def no_gpu(reason: str, work: str = "train") -> str:
    """Return the problem of `--use_gpu` without a GPU."""
    return f"--use_gpu=True: {reason}; leave the flag out to {work} on the CPU"


def find_token(hub_token: str | None) -> str | None:
    """Return the Hub token to use: --hub_token, or else HF_TOKEN or that of `hf auth login`."""
    from huggingface_hub import get_token

    return hub_token or get_token()
