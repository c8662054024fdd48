"""The pass over the pictures on Ray: names of pictures in, files of conditioning images out.

name chunks of pictures (a task)  ->  decode, make, store (tasks on CPUs)
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from raycontrolnet.cluster.blocks import WHOLE_BLOCKS, catch, from_block, generate, results, to_block
from raycontrolnet.cluster.cpus import COUNT_CPUS
from raycontrolnet.conditions.recipes import Recipe
from raycontrolnet.data.transforms import encode_conditioning
from raycontrolnet.errors import DataError, RunError
from raycontrolnet.storage.folder import CacheFolder

if TYPE_CHECKING:
    import ray

MAKING_CPUS = 1 - COUNT_CPUS
"""Of a task, which has one thread: all but what the naming needs, so that a single CPU is enough for both."""
MOST_PICTURES = 32
"""That one task makes: a second or a few."""
CHUNKS = 64
"""At least so many, if there are enough pictures: for many CPUs, and for a count that moves."""


class ToMake(NamedTuple):
    picture: str
    """Absolute path."""
    name: str
    """Of the conditioning image, below the folder."""


class Outcome(NamedTuple):
    """What has become of a picture."""

    name: str
    num_bytes: int
    """Of its conditioning image; 0 if there is none."""
    problem: str | None = None
    """Why it cannot be used."""


@dataclass(frozen=True)
class MakeJob:
    """Which conditioning images are to be made, and how. Plain data for tasks."""

    recipe: Recipe
    folder: str
    """Absolute path of the conditioning images' folder."""
    items: Sequence[ToMake]

    def chunks(self) -> Iterator[Sequence[ToMake]]:
        size = min(MOST_PICTURES, max(1, len(self.items) // CHUNKS))
        return (self.items[start : start + size] for start in range(0, len(self.items), size))


def make_on_ray(job: MakeJob) -> Iterator[list[Outcome]]:
    """All conditioning images of the job on the connected Ray cluster, in the order in which they are done.

    Raises:
        RunError: if one cannot be written.
    """
    import ray

    dataset = generate(_chunks, ray.put(job)).map_batches(
        _make, fn_args=(job.recipe, job.folder), num_cpus=MAKING_CPUS, **WHOLE_BLOCKS
    )
    yield from results(dataset)


def _chunks(job_ref: ray.ObjectRef[MakeJob]) -> Iterator[Sequence[ToMake]]:
    import ray

    return ray.get(job_ref).chunks()


def _make(table: pa.Table, recipe: Recipe, folder: str) -> pa.Table:
    import cv2

    cv2.setNumThreads(1)  # there are as many tasks as CPUs
    return to_block(catch(lambda items: [make(item, recipe, folder) for item in items], from_block(table)))


def make(item: ToMake, recipe: Recipe, folder: str) -> Outcome:
    """Make a conditioning image and write it, whole or not at all.

    Raises:
        RunError: if it cannot be written, as on a full disk.
    """
    try:
        item.picture.encode()
        png = encode_conditioning(recipe.make(item.picture))
    except UnicodeEncodeError:
        shown = item.picture.encode(errors="backslashreplace").decode()
        return Outcome(item.name, 0, f"{shown}: its name is not valid UTF-8; rename it")
    except DataError as error:
        return Outcome(item.name, 0, str(error))
    place, _, name = f"{folder}/{item.name}".rpartition("/")
    try:
        CacheFolder(place).write(name, png)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return Outcome(item.name, 0, f"{item.picture}: its name is too long for {name} to be written; shorten it")
        raise RunError(f"{place} cannot be written to: {error.strerror or error}") from error
    return Outcome(item.name, len(png))
