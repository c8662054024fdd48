"""Environment variables that the driver passes on to the processes of a cluster, as those of NCCL.

A cluster's processes have the environment of their node. What a user sets beside the command would reach the driver
alone, and a network interface or a log level named there would do nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

PREFIXES = (
    "NCCL_",
    "TORCH_NCCL_",
    "GLOO_",
    "FI_",  # libfabric, as of AWS' network cards
    "UCX_",
    "TORCH_DISTRIBUTED_",
    "TORCH_LOGS",
    "TORCH_CPP_LOG_LEVEL",
    "TORCH_SHOW_CPP_STACKTRACES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUDNN_",
    "NVIDIA_TF32_OVERRIDE",
)
"""Beginnings of the variables' names. None holds a secret; CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS are Ray's."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Undocumented: the variable by which `ray job submit` gives a driver its runtime environment. Ray refuses a driver
that names a variable which is there already, and without this look such a job would not start."""


def passed_on(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables for the processes of a cluster; by default of this process's environment."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in sorted(given.items()) if name.startswith(PREFIXES)}


def passed_on_to_job() -> dict[str, str]:
    """Return those of `passed_on` that the job of this driver does not have from `ray job submit`."""
    job = json.loads(os.environ.get(JOB_CONFIG) or "{}")
    there = ((job.get("runtime_env") or {}).get("env_vars")) or {}
    return {name: value for name, value in passed_on().items() if name not in there}


def unless_chosen(ours: Mapping[str, str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our variables; none of them if one is set to another value, which is the user's choice.

    Args:
        environment: of this process by default; it may have our values already, from a process of ours.
    """
    given = os.environ if environment is None else environment
    return dict(ours) if all(given.get(name, value) == value for name, value in ours.items()) else {}
