"""The trials of a sweep for TensorBoard's HPARAMS tab: one of its runs per trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycontrolnet.tune.records import Trial, as_text

EVENTS = "events.out.tfevents.*"
STATUSES = {"finished": "STATUS_SUCCESS", "stopped": "STATUS_SUCCESS", "failed": "STATUS_FAILURE"}
"""TensorBoard's statuses. An open TensorBoard never changes one that it has read: a trial has none before its end."""


def write_hparams(logs_dir: Path, trial: Trial, objective: str) -> None:
    """Write the trial's settings, and its figures over steps, to `logs_dir/<trial>`, in place of what was there.

    The tab shows each figure at its last step: val_loss, control_gap, loss, ... under their names, and the objective as
    `objective/<name>` too. A setting that is None has no value there.

    The earlier file is emptied, and deleted the next time: an open TensorBoard waits for a file that is gone, but
    forgets one that became empty.

    `SummaryWriter.add_hparams` is not used: it describes an experiment per trial, of which TensorBoard reads one and
    leaves out the settings that only other trials have, and it calls every trial a success without a time.

    Raises:
        OSError: the files cannot be written; the earlier ones stay.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = logs_dir / trial.record.name
    earlier = set(folder.glob(EVENTS))
    writer: Any = SummaryWriter(str(folder), purge_step=0)
    try:
        try:
            for summary in _summaries(trial):
                writer.file_writer.add_summary(summary, 0)
            for report in trial.reports:
                for tag, value in _scalars(report, objective).items():
                    writer.add_scalar(tag, value, int(report["step"]))
        finally:
            writer.close()
    except BaseException:
        for path in set(folder.glob(EVENTS)) - earlier:
            path.unlink()
        raise
    for path in earlier:
        if path.stat().st_size:
            path.write_bytes(b"")
        else:
            path.unlink()


def _scalars(report: Mapping[str, float], objective: str) -> dict[str, float]:
    found = {name: value for name, value in report.items() if name != "step" and math.isfinite(value)}
    return found | ({f"objective/{objective}": found[objective]} if objective in found else {})


def _summaries(trial: Trial) -> list[Any]:
    """Return the start of TensorBoard's session, with the settings, and its end."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2  # type: ignore[import-untyped]

    record = trial.record
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=record.started or 0.0)
    for name, value in record.settings.items():
        if isinstance(value, bool):  # which is an int too
            start.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
            start.hparams[name].number_value = value
        elif value is not None:
            start.hparams[name].string_value = as_text(value)
    contents = {metadata.SESSION_START_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_start_info=start)}
    if record.ended:
        status = api_pb2.Status.Value(STATUSES[record.state])
        ended_s = (record.started or 0.0) + record.seconds
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=ended_s)
        contents[metadata.SESSION_END_INFO_TAG] = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    described = {tag: metadata.create_summary_metadata(content) for tag, content in contents.items()}
    empty = metadata.NULL_TENSOR
    return [Summary(value=[Summary.Value(tag=tag, metadata=words, tensor=empty)]) for tag, words in described.items()]
