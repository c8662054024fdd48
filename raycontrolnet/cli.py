"""The command line: `raycontrolnet train`, `tune`, `check` and the other commands. Flags in, exit codes out."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import Annotated, Any, NamedTuple

from raycontrolnet.cluster.cpus import variables_for_threads
from raycontrolnet.config.check_config import CheckConfig, CheckSettings
from raycontrolnet.config.condition_config import CONDITION_GROUPS, ConditionConfig
from raycontrolnet.config.declare import title
from raycontrolnet.config.flag_types import as_default, own_types
from raycontrolnet.config.foreign_flags import ADVICE, SCRIPT_FLAGS, foreign_names, stray_words
from raycontrolnet.config.generate_config import GENERATE_GROUPS, GenerateConfig
from raycontrolnet.config.spellings import SPELLINGS, in_our_spelling, misspelt
from raycontrolnet.config.sweep_config import SweepConfig, SweepSettings
from raycontrolnet.config.train_config import GROUPS, TrainConfig, typed_settings
from raycontrolnet.config.values import read_yaml, setting_types, unknown_names
from raycontrolnet.errors import ConfigError, Interrupted, RunError, UserError, end_told, interruption
from raycontrolnet.signals import end_if_threads_left, ending_signals_raised, process_ended_in_haste
from raycontrolnet.storage.uri import shown_name
from raycontrolnet.text import first_of, perhaps
from raycontrolnet.version import __version__

USAGE = f"""\
raycontrolnet {__version__}: the ControlNet trainer for Ray

  raycontrolnet train [--config FILE.yaml] [FLAGS]   train a ControlNet; `raycontrolnet train --help` lists the flags
  raycontrolnet tune [FLAGS]                         train many that differ in some settings, and rank them
  raycontrolnet check [FLAGS]                        say what training with the same flags needs: memory, time, disk
  raycontrolnet prepare [FLAGS]                      encode the images once, for training with the same flags
  raycontrolnet condition [FLAGS]                    make conditioning images of pictures: edges, blur or grey
  raycontrolnet generate [FLAGS]                     draw images with a trained ControlNet
  raycontrolnet demo [FLAGS]                         train a small one on data made here, to see that it works
  raycontrolnet --version
"""
WITH_FILE = "--config FILE.yaml reads the same settings from a file; flags override it."


class Command(NamedTuple):
    """A command with settings."""

    run: str
    """Function that takes the config, as `module:name`: modules with torch and Ray are imported late."""
    config: Callable[..., Any]
    """Makes the config that `run` takes from the settings."""
    groups: tuple[Any, ...]
    """Classes that declare the settings: the sections of --help."""
    description: str
    file: bool = True
    """Settings may come from the file of --config."""
    defaults: str | None = None
    """Mapping of defaults that differ from those in `groups`, as `module:name`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    It is 0, 1 for a failed run, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM, 141 if nobody reads the output.
    """
    try:
        try:
            with process_ended_in_haste() if argv is None else nullcontext():
                code = _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `raycontrolnet train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it exits
        code = 128 + signal.SIGPIPE
    if argv is None:
        end_if_threads_left(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    if argv is None:
        _hide_token()
        os.environ.update(variables_for_threads())  # before torch is imported, and for the processes of our own Ray
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"{command}: no such command{perhaps(command, COMMANDS)}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    stands = _not_begun(command)
    try:
        with ending_signals_raised(), end_told(sys.stderr, lambda: f"raycontrolnet {command} was ended."):
            config = parse(command, rest)
            stands = _not_begun(command, _place(config))
            run = _load(COMMANDS[command].run)  # takes seconds
            stands = f"Interrupted. raycontrolnet {command} was ended."
            run(config)
    except (UserError, RunError) as error:
        _say(f"error: {error}")
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as error:
        told = error if isinstance(error, Interrupted) else interruption(error, lambda: stands)
        _say(str(told))
        return told.exit_code
    return 0


def _not_begun(command: str, place: str = "") -> str:
    return f"Interrupted before raycontrolnet {command} began: nothing{place} was changed; run the same command again."


def _place(config: Any) -> str:
    """Return ` in FOLDER` for a command that writes to one."""
    folder = getattr(getattr(config, "train", config), "output_dir", None)
    return f" in {shown_name(folder)}" if folder else ""


def _say(message: str) -> None:
    with suppress(OSError):  # the terminal may be closed, as after SIGHUP
        print(message, file=sys.stderr, flush=True)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(f"raycontrolnet.{module}"), name)


def _hide_token() -> None:
    """Restart with --hub_token moved to the environment: every user sees command lines, and Ray stores them."""
    for index, argument in enumerate(sys.argv):
        name, has_value, token = argument.replace("-", "_").partition("=")
        if len(name) >= len("__hub_t") and "__hub_token".startswith(name):  # which `_whole_flags` would complete
            token = argument.partition("=")[2] if has_value else "".join(sys.argv[index + 1 : index + 2])
            if not token or token.startswith("--"):
                return  # no token to hide; the parser reports what is missing
            rest = sys.argv[1:index] + sys.argv[index + (1 if has_value else 2) :]
            os.environ["HF_TOKEN"] = token
            os.execv(sys.executable, [sys.executable, "-m", "raycontrolnet", *rest])


def parse(command: str, argv: Sequence[str]) -> Any:
    """Return the config of a command: flags over `--config FILE.yaml` over the defaults.

    Raises:
        ConfigError: bad settings, all at once.
        SystemExit: from tyro: 0 for --help, 2 for unknown flags and values of the wrong type.
    """
    found = COMMANDS[command]
    path, flags = _config_flag(argv) if found.file else (None, argv)
    known = {name: kind for group in found.groups for name, kind in setting_types(group).items()}
    place = f"--config={shown_name(str(path))}"
    given = read_yaml(path, place) if path else {}
    # In a file, a sweep's space may be the mapping itself, which a flag cannot be.
    space = given.pop("space") if "space" in known and isinstance(given.get("space"), dict) else None
    from_file, problems = typed_settings(given, known, place)
    problems += foreign_names(given, f"{place}: ", known)
    if problems := unknown_names(given, {**ADVICE, **known}, place) + problems:
        raise ConfigError(problems)
    defaults = {**(_load(found.defaults) if found.defaults else {}), **from_file}
    trains, spare = "max_train_steps" in known, {*SPELLINGS, *SCRIPT_FLAGS}
    flags = _whole_flags(flags, {*known, *(spare if trains else ())})
    flags = in_our_spelling(flags) if trains else flags
    problems = stray_words(command, flags) + misspelt(flags, known)
    problems += foreign_names(_names(flags), "--", known) if trains else []
    if problems and "--help" not in flags:
        raise ConfigError(problems)
    settings = _parsed(flags, found.groups, defaults, f"raycontrolnet {command}", found.description)
    if space is not None and settings["space"] is None:
        settings["space"] = space
    return found.config(**settings)


def _config_flag(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the file of --config and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, flags = parser.parse_known_args(argv)
    return found.config or None, flags


def _whole_flags(argv: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the arguments with beginnings of flags that can mean one alone completed, as argparse does.

    Raises:
        ConfigError: for beginnings that can mean several.
    """
    names, whole, problems = set(known), [], []
    for argument in argv:
        flag, has_value, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        whole_name = flag == name or name in names or name in ADVICE
        meant = [] if whole_name else [other for other in names if other.startswith(name)]
        whole.append(f"--{meant[0]}{has_value}{value}" if len(meant) == 1 and name else argument)
        if len(meant) > 1 and name:
            useful = sorted(other for other in meant if other not in SCRIPT_FLAGS) or sorted(meant)
            several = first_of([f"--{other}" for other in useful])
            problems.append(f"{flag}: can mean {several}; write more of it")
    if problems and "--help" not in argv:
        raise ConfigError(problems)
    return whole


def _names(flags: Iterable[str]) -> list[str]:
    return [flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")]


def _parsed(
    argv: Sequence[str], groups: Sequence[Any], defaults: Mapping[str, Any], program: str, description: str
) -> dict[str, Any]:
    """Return setting name -> value, for every setting of `groups`."""
    import tyro

    # tyro makes a section of --help from each field of a dataclass that is itself one.
    fields = [(title(group).lower(), Annotated[group, tyro.conf.OmitArgPrefixes]) for group in groups]
    own = [
        {name: as_default(defaults[name], kind) for name, kind in setting_types(group).items() if name in defaults}
        for group in groups
    ]
    flags = dataclasses.make_dataclass("Flags", fields)
    parsed = tyro.cli(
        flags,
        prog=program,
        description=description,
        args=argv,
        default=flags(*(group(**settings) for group, settings in zip(groups, own, strict=True))),
        use_underscores=True,
        registry=own_types(),
    )
    return {name: value for section, _ in fields for name, value in vars(getattr(parsed, section)).items()}


def _beside_train(own: Any, config: Callable[..., Any]) -> Callable[..., Any]:
    """Return what makes a config of the settings of `own` and, as `train`, of those of a run."""

    def make(**settings: Any) -> Any:
        mine = {name: settings.pop(name) for name in setting_types(own)}
        return config(train=TrainConfig(**settings), **mine)

    return make


COMMANDS = {
    "train": Command("launch.fit:fit", TrainConfig, GROUPS, f"Train a ControlNet. {WITH_FILE}"),
    "tune": Command(
        "tune.sweep:sweep",
        _beside_train(SweepSettings, SweepConfig),
        (SweepSettings, *GROUPS),
        "Train many ControlNets that differ in some settings (--space), stop the weak ones early, and rank them. "
        f"{WITH_FILE}",
    ),
    "check": Command(
        "launch.check:check_on_stdout",
        _beside_train(CheckSettings, CheckConfig),
        (CheckSettings, *GROUPS),
        "Say what training with the same flags needs: memory, time, disk. No weights are read, nothing is trained. "
        f"{WITH_FILE}",
    ),
    "prepare": Command(
        "latents.prepare:prepare",
        TrainConfig,
        GROUPS,
        f"Encode the images once, for `raycontrolnet train` with the same flags. {WITH_FILE}",
    ),
    "condition": Command(
        "conditions.condition:condition",
        ConditionConfig,
        CONDITION_GROUPS,
        "Make conditioning images of a folder of pictures, and the metadata.jsonl to train on both.",
        file=False,
    ),
    "generate": Command(
        "sampling.generate:generate",
        GenerateConfig,
        GENERATE_GROUPS,
        "Draw images with a trained ControlNet, as validation does.",
        file=False,
    ),
    "demo": Command(
        "demo.demo:run_demo",
        TrainConfig,
        GROUPS,
        f"Train a small ControlNet on data made here. {WITH_FILE}",
        defaults="demo.demo:demo_settings",
    ),
}
