"""TensorBoard, Weights & Biases and Comet behind one interface. A tracker that fails is dropped; the run goes on.

The offline modes are the tools' own: `WANDB_MODE=offline`, `COMET_START_ONLINE=0`. Secret settings, and the command
line, which may hold a token, do not reach a tracker.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raycontrolnet.config.output_settings import OutputConfig
from raycontrolnet.config.train_config import names_with
from raycontrolnet.signals import haste
from raycontrolnet.storage.uri import shown_uri
from raycontrolnet.training.background import begun

logger = logging.getLogger(__name__)

_PACKAGES = {
    "tensorboard": ("tensorboard", "pip install tensorboard"),
    "wandb": ("wandb", "pip install 'raycontrolnet[wandb]'"),
    "comet_ml": ("comet_ml", "pip install 'raycontrolnet[comet]'"),
}


def resolve(output: OutputConfig) -> tuple[str, ...]:
    """List the trackers that `--report_to` asks for, each once. `all` means those that are installed."""
    names = tuple(dict.fromkeys(output.trackers))
    return tuple(name for name in names if _installed(name)) if output.report_to == "all" else names


def check_trackers(output: OutputConfig) -> list[str]:
    """List the trackers whose package is missing, with the command that installs it."""
    return [
        f"--report_to={name}: the package {_PACKAGES[name][0]} is not installed: {_PACKAGES[name][1]}"
        for name in resolve(output)
        if not _installed(name)
    ]


def _installed(name: str) -> bool:
    # Not find_spec: wandb leaves a folder `wandb` in the working directory, which Python would take for the package.
    try:
        version(_PACKAGES[name][0])
    except PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class Run:
    """Facts about the run for every tracker."""

    logging_dir: Path
    """TensorBoard's files go to its folder `project`, as in diffusers' scripts."""
    project: str
    name: str
    settings: Mapping[str, Any]
    done_steps: int
    """Updates of the run before this start; if above 0, the trackers continue their earlier curves."""
    group: str | None

    def kept_id(self, tracker: str) -> str:
        """Return the run's id at `tracker` (32 hex digits), kept in a file so that a resumed run finds its curves."""
        path = self.logging_dir / f"{tracker}_id.txt"
        if self.done_steps == 0 or not path.is_file():
            path.write_text(uuid.uuid4().hex, encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()


class Tracker(ABC):
    """One tool, made from a `Run`, whose settings it stores. Every method may raise; `Trackers` handles it."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def images(self, step: int, key: str, paths: Sequence[Path], caption: str) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class TensorBoard(Tracker):
    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint that the run resumes from are done again: hide what was written for them.
        purge_step = run.done_steps + 1 if run.done_steps else None
        self._writer: Any = SummaryWriter(str(run.logging_dir / run.project), purge_step=purge_step)
        self._writer.add_hparams({name: _plain(value) for name, value in run.settings.items()}, {}, run_name=".")
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, key: str, paths: Sequence[Path], caption: str) -> None:
        for index, path in enumerate(paths):
            name = key if len(paths) == 1 else f"{key}/{index:02d}"
            self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self._writer.add_text(f"{key}/prompt", caption, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb(Tracker):
    def __init__(self, run: Run):
        import wandb

        self._wandb = wandb
        with _without_arguments():
            self._run: Any = wandb.init(
                project=run.project,
                name=run.name,
                group=run.group,
                dir=os.environ.get("WANDB_DIR", run.logging_dir),
                config=dict(run.settings),
                id=run.kept_id("wandb"),
                resume="allow",
                reinit="create_new",  # several runs in one process do not end each other
                # No copy of the terminal, which has a progress line; no git, whose remote may hold a token.
                settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
            )
        # Validation may arrive after later steps: the step is a value, not the order of arrival.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if self._run.url:
            logger.info("W&B: %s", self._run.url)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def images(self, step: int, key: str, paths: Sequence[Path], caption: str) -> None:
        images = [self._wandb.Image(str(path), caption=caption) for path in paths]
        self._run.log({key: images, "step": step})

    def close(self) -> None:
        self._run.finish()


class Comet(Tracker):
    def __init__(self, run: Run):
        # It would patch torch and TensorBoard to log their numbers twice, and print to the terminal.
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
        import comet_ml

        off = ("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_host")
        logs = ("auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_log_co2")
        options: dict[str, Any] = dict.fromkeys((*off, *logs), False)
        config = comet_ml.ExperimentConfig(
            name=run.name,
            offline_directory=os.environ.get("COMET_OFFLINE_DIRECTORY", str(run.logging_dir)),
            display_summary_level=0,
            **options,
        )
        with _without_arguments():
            self._experiment: Any = comet_ml.start(
                project_name=run.project, experiment_key=run.kept_id("comet_ml"), experiment_config=config
            )
        self._experiment.log_parameters(dict(run.settings))
        if self._experiment.url:
            logger.info("Comet: %s", self._experiment.url)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._experiment.log_metrics(dict(values), step=step)

    def images(self, step: int, key: str, paths: Sequence[Path], caption: str) -> None:
        for index, path in enumerate(paths):
            name = key if len(paths) == 1 else f"{key}/{index:02d}"
            self._experiment.log_image(str(path), name=name, step=step, metadata={"prompt": caption})

    def close(self) -> None:
        self._experiment.end()


def _close(name: str, tracker: Tracker) -> None:
    """Close a tracker; in haste beside this thread, for some wait until all is uploaded."""
    if not haste().has_begun:
        tracker.close()  # which a second signal interrupts
        return
    done = begun(tracker.close, name, set())
    if haste().wait(lambda seconds: bool(wait([done], seconds).done)):
        done.result()
    else:
        logger.warning("%s is not waited for any longer: its last figures may not arrive", name)


_KINDS: dict[str, Callable[[Run], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "comet_ml": Comet}


class Trackers:
    """The open trackers. No method raises: a tracker that fails is logged once and dropped."""

    def __init__(self, names: Sequence[str], run: Run):
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._dropped_if_it_fails(name):
                run.logging_dir.mkdir(parents=True, exist_ok=True)
                self._open[name] = _KINDS[name](run)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trackers still in use."""
        return tuple(self._open)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers under their names.

        Args:
            step: of the optimizer's updates, counted from 1.
        """
        self._each("scalars", step, values)

    def images(self, step: int, key: str, paths: Sequence[Path], caption: str) -> None:
        """Log image files under `key`, which is unique per pair, with their prompt as the caption."""
        self._each("images", step, key, paths, caption)

    def close(self) -> None:
        """Write out everything, in haste as far as it gets. A second call does nothing."""
        for name, tracker in list(self._open.items()):
            with self._dropped_if_it_fails(name):
                _close(name, tracker)
        self._open.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._open.items()):
            with self._dropped_if_it_fails(name):
                getattr(tracker, method)(*arguments)

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # they raise what they like, and some exit
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning("%s failed (%s); the run goes on without it", name, reason)
            logger.debug("traceback of %s", name, exc_info=True)
            self._open.pop(name, None)


def open_trackers(
    output: OutputConfig, settings: Mapping[str, Any], done_steps: int = 0, folder: Path | None = None
) -> Trackers:
    """Open the trackers that `output` asks for, on rank 0 only.

    Args:
        settings: the hyperparameters to store, without the secrets among them.
        done_steps: updates done before this start, if the run resumes.
        folder: the run's on this machine; by default its output_dir.
    """
    secrets = names_with("secret")
    run = Run(
        logging_dir=Path(folder or output.output_dir, output.logging_dir).absolute(),
        project=output.tracker_project_name,
        name=Path(shown_uri(output.output_dir)).name,
        settings={name: value for name, value in settings.items() if name not in secrets},
        done_steps=done_steps,
        group=output.tracker_group,
    )
    return Trackers(resolve(output), run)


@contextmanager
def _without_arguments() -> Iterator[None]:
    """Hide the command line from tools that store it: it may hold --hub_token."""
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments


def _plain(value: Any) -> str | int | float | bool:
    """Convert a setting to a value that TensorBoard takes as a hyperparameter."""
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value, default=str)
