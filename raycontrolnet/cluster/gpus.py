"""A look at the GPUs of the connected cluster: whether they compute in bf16."""

from __future__ import annotations

from collections.abc import Callable

from raycontrolnet.cluster import session
from raycontrolnet.cluster.each_node import on_each_node
from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.text import error_message

LEAST_CAPABILITY = 8
"""CUDA's compute capability from which on GPUs have bf16 (Ampere): torch emulates it on older ones, slowly."""


def gpus_have_bf16(resources: WorkerResources) -> bool | None:
    """Check whether all GPUs of the nodes that are up, and have room for a worker, compute in bf16.

    It takes no GPU and no memory of one.

    Returns:
        None if no such node is up, or one cannot say, as with GPUs that are not NVIDIA's.
    """
    look = _looker()
    answers = [("", look(LEAST_CAPABILITY))] if session.is_own() else []
    answers += on_each_node(look, LEAST_CAPABILITY, of=resources.fit_on)
    found = [answer for _, answer in answers]
    return None if not found or None in found else all(found)


class Question:
    """The question to a GPU that a worker would get, once there is one: whether it computes in bf16."""

    def __init__(self, resources: WorkerResources):
        import ray

        def look() -> bool:
            """Ask torch."""
            import torch

            return bool(torch.cuda.is_bf16_supported(including_emulation=False))

        self._answer = ray.remote(look).options(**resources.actor_options).remote()

    def answer(self) -> bool:
        """Wait for the answer.

        Raises:
            ConnectionError: if there will be none.
        """
        import ray

        try:
            return ray.get(self._answer)
        except ray.exceptions.RayError as error:
            raise ConnectionError(error_message(error, 500)) from error

    def withdraw(self) -> None:
        """Give the GPU, or the place in the queue for one, back; if the answer is there, that is done."""
        import ray

        # Ray ends this process if a task is cancelled while it notes that the task is done (ray-project/ray#54738).
        answered, _ = ray.wait([self._answer], timeout=0)
        if not answered:
            ray.cancel(self._answer, force=True)


def _looker() -> Callable[[int], bool | None]:
    def look(least: int) -> bool | None:
        """Return whether each GPU has at least this capability; None if there are none, or NVML is missing."""
        # Private: the driver's library, as Ray brings it. Without it a task would have to take a GPU to ask torch.
        from ray._private.thirdparty import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        try:
            gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            major = [pynvml.nvmlDeviceGetCudaComputeCapability(gpu)[0] for gpu in gpus]
        except pynvml.NVMLError:
            return None
        finally:
            pynvml.nvmlShutdown()
        return min(major) >= least if major else None

    return look
