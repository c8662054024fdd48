"""The command line: `raycontrolnet train | tune | prepare | condition | generate | demo`. Flags in, exit codes out."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from raycontrolnet.config.condition_config import CONDITION_GROUPS, ConditionConfig
from raycontrolnet.config.generate_config import GENERATE_GROUPS, GenerateConfig
from raycontrolnet.config.sweep_config import SweepConfig, SweepSettings
from raycontrolnet.config.train_config import GROUPS, TrainConfig, coerce, load_yaml, setting_types
from raycontrolnet.errors import ConfigError, Interrupted, RunError, UserError
from raycontrolnet.version import __version__

USAGE = f"""\
raycontrolnet {__version__}: the ControlNet trainer for Ray

  raycontrolnet train [--config FILE.yaml] [FLAGS]   train a ControlNet; `raycontrolnet train --help` lists the flags
  raycontrolnet tune [FLAGS]                         train many that differ by some settings, and rank them
  raycontrolnet prepare [FLAGS]                      encode the images once, for runs with the same flags to train from
  raycontrolnet condition [FLAGS]                    make conditioning images of pictures: edges, blur or grey
  raycontrolnet generate [FLAGS]                     draw images with a trained one
  raycontrolnet demo [FLAGS]                         train a small one on data made here, to see that it works
  raycontrolnet --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 failed run, 2 bad input, 130 Ctrl-C, 141 nobody reads the output."""
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as of `raycontrolnet train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at its end
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str] | None) -> int:
    if argv is None:
        _hide_token()
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    commands = {
        "train": train, "tune": tune, "prepare": prepare, "condition": condition, "generate": generate, "demo": demo,
    }  # fmt: skip
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in commands:
        print(f"{command}: no such command\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        commands[command](rest)
    except (UserError, RunError, Interrupted) as error:
        print(_message(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"Interrupted before raycontrolnet {command} began.", file=sys.stderr)
        return Interrupted.exit_code
    return 0


def _hide_token() -> None:
    """Start again with --hub_token moved into the environment: everyone can see a command line, and Ray stores it."""
    for index, argument in enumerate(sys.argv):
        name, has_value, token = argument.replace("-", "_").partition("=")
        if name == "__hub_token":
            token = argument.partition("=")[2] if has_value else "".join(sys.argv[index + 1 : index + 2])
            if not token or token.startswith("--"):
                return  # there is nothing to hide, and the parser says what is missing
            rest = sys.argv[1:index] + sys.argv[index + (1 if has_value else 2) :]
            os.environ["HF_TOKEN"] = token
            os.execv(sys.executable, [sys.executable, "-m", "raycontrolnet", *rest])


def train(argv: Sequence[str]) -> None:
    config = parse_train(argv)
    from raycontrolnet.launch.fit import fit

    fit(config)


def tune(argv: Sequence[str]) -> None:
    config = parse_tune(argv)
    from raycontrolnet.tune.sweep import sweep

    sweep(config)


def prepare(argv: Sequence[str]) -> None:
    config = parse_train(argv, program="raycontrolnet prepare")
    from raycontrolnet.latents.prepare import prepare as prepare_latents

    prepare_latents(config)


def condition(argv: Sequence[str]) -> None:
    config = parse_condition(argv)
    from raycontrolnet.conditions.condition import condition as make_conditions

    make_conditions(config)


def generate(argv: Sequence[str]) -> None:
    config = parse_generate(argv)
    from raycontrolnet.sampling.generate import generate as draw_images

    draw_images(config)


def demo(argv: Sequence[str]) -> None:
    from raycontrolnet.demo.demo import demo_settings

    config = parse_train(argv, defaults=demo_settings, program="raycontrolnet demo")
    from raycontrolnet.demo.demo import run_demo

    run_demo(config)


def parse_train(
    argv: Sequence[str], *, defaults: Mapping[str, Any] | None = None, program: str = "raycontrolnet train"
) -> TrainConfig:
    """Flags over `--config FILE.yaml` over `defaults` over the settings' own defaults.

    Raises:
        ConfigError: bad settings, all at once.
        SystemExit: by tyro: 0 for --help, 2 for unknown flags and values of the wrong type.
    """
    description = "Train a ControlNet. --config FILE.yaml reads the same settings from a file; flags override it."
    settings, flags = _with_file(argv, setting_types())
    groups = [_group_default(group, dict(defaults or {}) | settings.values, settings.place) for group in GROUPS]
    return TrainConfig(**_parsed(flags, groups, program, description))


def parse_tune(argv: Sequence[str]) -> SweepConfig:
    """The same for a sweep: the flags of `raycontrolnet train` and its own. In a file, `space` may be a mapping.

    Raises:
        ConfigError: bad settings, all at once.
        SystemExit: by tyro: 0 for --help, 2 for unknown flags and values of the wrong type.
    """
    description = (
        "Train many ControlNets that differ by some settings (--space), stop the weak ones early, and rank them. "
        "--config FILE.yaml reads the same settings from a file; flags override it."
    )
    known = {**setting_types(), **setting_types(SweepSettings)}
    settings, flags = _with_file(argv, known)
    space = settings.values.get("space")
    in_file = settings.values.pop("space") if isinstance(space, dict) else None
    groups = [_group_default(group, settings.values, settings.place) for group in (SweepSettings, *GROUPS)]
    parsed = _parsed(flags, groups, "raycontrolnet tune", description)
    own = {setting.name: parsed.pop(setting.name) for setting in dataclasses.fields(SweepSettings)}
    return SweepConfig(train=TrainConfig(**parsed), **own | {"space": own["space"] or in_file})


class _File(NamedTuple):
    """What `--config FILE.yaml` gives."""

    values: dict[str, Any]
    place: str | None


def _with_file(argv: Sequence[str], known: Mapping[str, Any]) -> tuple[_File, list[str]]:
    """The settings of the file that --config names, if any, and the other flags."""
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config")
    found, flags = pre.parse_known_args(argv)
    return _File(load_yaml(found.config, known) if found.config else {}, found.config), flags


def parse_condition(argv: Sequence[str]) -> ConditionConfig:
    """The flags of `raycontrolnet condition`.

    Raises:
        ConfigError: bad settings, all at once.
        SystemExit: by tyro: 0 for --help, 2 for unknown flags and values of the wrong type.
    """
    description = "Make conditioning images of a folder of pictures, and the metadata.jsonl to train on both."
    return ConditionConfig(
        **_parsed(argv, [group() for group in CONDITION_GROUPS], "raycontrolnet condition", description)
    )


def parse_generate(argv: Sequence[str]) -> GenerateConfig:
    """The flags of `raycontrolnet generate`.

    Raises:
        ConfigError: bad settings, all at once.
        SystemExit: by tyro: 0 for --help, 2 for unknown flags and values of the wrong type.
    """
    description = "Draw images with a trained ControlNet, as validation does."
    return GenerateConfig(
        **_parsed(argv, [group() for group in GENERATE_GROUPS], "raycontrolnet generate", description)
    )


def _parsed(argv: Sequence[str], defaults: Sequence[Any], program: str, description: str) -> dict[str, Any]:
    """Name -> value of every setting of the groups that `defaults` are instances of.

    tyro makes a section of --help of each group, with flat flag names, of one dataclass of dataclasses.
    """
    import tyro

    groups = [type(default) for default in defaults]
    fields = [
        ((group.__doc__ or group.__name__).lower(), Annotated[group, tyro.conf.OmitArgPrefixes]) for group in groups
    ]
    flags = dataclasses.make_dataclass("Flags", fields)
    parsed = tyro.cli(
        flags, prog=program, description=description, args=argv, default=flags(*defaults), use_underscores=True
    )
    return {
        setting.name: getattr(group, setting.name)
        for group in (getattr(parsed, name) for name, _ in fields)
        for setting in dataclasses.fields(group)
    }


def _group_default(group: type, settings: Mapping[str, Any], path: str | None) -> Any:
    own, problems = {}, []
    for setting in dataclasses.fields(group):
        if setting.name in settings:
            try:
                own[setting.name] = coerce(settings[setting.name], setting_types(group)[setting.name])
            except ValueError as error:
                shown = "" if setting.metadata.get("secret") else f"{settings[setting.name]!r} "
                problems.append(f"--config={path}: {setting.name}: {shown}{error}")
    if problems:
        raise ConfigError(problems)
    return group(**own)


def _message(error: Exception) -> str:
    prefix = "" if isinstance(error, Interrupted) else "error: "
    return "\n".join(prefix + line if i == 0 else line for i, line in enumerate(str(error).splitlines()))
