"""Room on the disk, and in a quota, for the checkpoints that a run will write."""

from __future__ import annotations

import shutil

from raycontrolnet.config.output_settings import OutputConfig
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.optimizers import state_bytes_per_weight
from raycontrolnet.model.size import FP32_BYTES
from raycontrolnet.storage.quota import quota_forbids
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.text import counted, file_size
from raycontrolnet.training.schedule import Schedule, due_steps


def check_room(
    folder: RunFolder, weights: int, schedule: Schedule, step: int, config: TrainConfig, *, least: bool = False
) -> None:
    """Check that there is room for the checkpoints after update `step` and the final weights.

    Args:
        weights: bytes of the ControlNet in fp32.
        least: it may have more.

    Raises:
        UserError: if there is not.
    """
    moments = int(weights * state_bytes_per_weight(config) / FP32_BYTES)
    one = weights + moments + weights * config.use_ema
    to_come = len(due_steps(config.checkpointing_steps, schedule.total_updates, schedule.total_updates))
    to_come -= len(due_steps(config.checkpointing_steps, step, schedule.total_updates))
    output_dir, given_up = folder.path, 0
    limit = 1 if folder.is_stored else config.checkpoints_total_limit
    usage = shutil.disk_usage(output_dir)
    if not usage.total:  # of a file system that does not tell
        return
    if limit is not None:
        there = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
        given_up = sum(file.stat().st_size for path in there for file in path.rglob("*") if file.is_file())
        to_come = min(len(there) + to_come, limit + 1)  # the oldest is deleted once the newest is whole
    needed, free = to_come * one + final_bytes(weights, config), usage.free + given_up
    if needed > free:
        why = f"need {file_size(needed)}, and {file_size(free)} are free"
    elif quota_forbids(output_dir, needed - given_up):
        why = f"need {file_size(needed)}, which your quota there does not allow"
    else:
        return
    size = f"{'at least ' * least}{file_size(one)}"
    raise UserError(
        f"--output_dir={output_dir}: {counted(to_come, 'checkpoint')} of {size} and the weights {why}; keep fewer "
        "with --checkpoints_total_limit, or name another folder"
    )


def final_bytes(weights: int, output: OutputConfig) -> int:
    """Return the bytes of the final weights, of which there are `weights` bytes in fp32."""
    return round(weights * (1 if output.save_precision == "fp32" else 0.5) * (2 if output.save_name else 1))
