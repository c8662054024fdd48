"""The pass over the pictures on Ray: paths of pictures in, files of conditioning images out.

name chunks of pictures (a task)  ->  decode, make, store (tasks on CPUs)
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from raycontrolnet.cluster.blocks import WHOLE_BLOCKS, catch, from_block, generate, results, to_block
from raycontrolnet.cluster.cpus import COUNT_CPUS
from raycontrolnet.cluster.shared_files import SharedFiles, check_nodes_see
from raycontrolnet.cluster.versions import check_versions
from raycontrolnet.conditions.recipes import Recipe
from raycontrolnet.data.transforms import encode_conditioning
from raycontrolnet.errors import DataError
from raycontrolnet.storage.folder import CacheFolder, writing_to

if TYPE_CHECKING:
    import ray

MAKING_CPUS = 1 - COUNT_CPUS
"""CPUs of a task, which has one thread: a single CPU must suffice for it and the task that names the pictures."""
MOST_PICTURES = 32
"""Most pictures of one task, which takes a few seconds then."""
CHUNKS = 64
"""Fewest tasks, given enough pictures: for many CPUs, and for a counter that moves."""


class ToMake(NamedTuple):
    picture: str
    """Absolute path."""
    name: str
    """Name of the conditioning image, below the folder."""


class Outcome(NamedTuple):
    """Result for one picture."""

    name: str
    num_bytes: int
    """Size of its conditioning image; 0 if there is none."""
    problem: str | None = None
    """Reason why the picture cannot be used."""


def make_on_ray(items: Sequence[ToMake], recipe: Recipe, folder: str, pictures: SharedFiles) -> Iterator[list[Outcome]]:
    """Make conditioning images on the connected Ray cluster; yield results as tasks finish.

    Args:
        folder: absolute path of the conditioning images' folder.
        pictures: some of them, which the nodes must see.

    Raises:
        UserError: if a node does not see the pictures (which are not bad), or has another version of this package.
        RunError: if one cannot be written.
    """
    import ray

    check_versions()
    check_nodes_see([pictures])
    dataset = generate(_chunks, ray.put(items)).map_batches(
        _make, fn_args=(recipe, folder, pictures), num_cpus=MAKING_CPUS, **WHOLE_BLOCKS
    )
    yield from results(dataset)


def _chunks(items_ref: ray.ObjectRef[Sequence[ToMake]]) -> Iterator[Sequence[ToMake]]:
    import ray

    items = ray.get(items_ref)
    size = min(MOST_PICTURES, max(1, len(items) // CHUNKS))
    return (items[start : start + size] for start in range(0, len(items), size))


def _make(table: pa.Table, recipe: Recipe, folder: str, pictures: SharedFiles) -> pa.Table:
    import cv2

    cv2.setNumThreads(1)  # there are as many tasks as CPUs

    def make_all(items: Sequence[ToMake]) -> list[Outcome]:
        pictures.check_here()
        return [make(item, recipe, folder) for item in items]

    return to_block(catch(make_all, from_block(table)))


def make(item: ToMake, recipe: Recipe, folder: str) -> Outcome:
    """Make a conditioning image and write it atomically.

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
    with writing_to(place):
        try:
            CacheFolder(place).write(name, png)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return Outcome(item.name, 0, f"{item.picture}: its name is too long for {name} to be written; shorten it")
    return Outcome(item.name, len(png))
