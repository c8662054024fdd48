"""The data set of Ray Train's workers: made for as many as there are, at every start of an elastic run too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray.data
from ray.data import ExecutionOptions

from raycontrolnet import TrainConfig
from raycontrolnet.cluster.data_of_workers import DataOfWorkers
from raycontrolnet.data.stream import MOST_IN_BUNDLE, StreamLayout
from raycontrolnet.launch.training_stream import TrainingStream
from raycontrolnet.storage.run_folder import RunFolder


@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_it_is_made_for_the_workers_there_are(num_workers: int) -> None:
    made: list[int] = []

    def make(number: int) -> ray.data.Dataset:
        made.append(number)
        return ray.data.from_items([{"of": number}] * 6)

    config = DataOfWorkers(make, ExecutionOptions(preserve_order=True))
    shards = config.configure({"train": None}, num_workers, None, None)
    assert [list(shard) for shard in shards] == [["train"]] * num_workers
    assert made == [num_workers]
    if num_workers == 1:  # several wait for each other
        assert [row["of"] for row in shards[0]["train"].iter_rows()] == [1] * 6


def layout(workers: str, there: int, done: int = 0) -> StreamLayout:
    config = TrainConfig(
        pretrained_model_name_or_path="base", train_data_dir="data", num_workers=workers, train_batch_size=4,
        max_train_steps=100,
    )  # fmt: skip
    stream = TrainingStream(config, RunFolder("run"), "an id", None, 1000, None, batch_bytes=1000)
    checkpoint: Any = SimpleNamespace(step=done, samples=done * 16, facts={}) if done else None
    return stream.layout(there, checkpoint)


@pytest.mark.parametrize("there", [1, 3, 4])
def test_an_elastic_run_gets_several_batches_at_a_time(there: int) -> None:
    """In turn for each worker, as `Share.place` says, also where the workers do not divide an update."""
    found = layout("1:4", there, done=10)
    bundles = found.bundles()
    first = [next(bundles) for _ in range(20 * there)]
    assert max(map(len, first)) == MOST_IN_BUNDLE
    for rank in range(there):
        of_rank = [sample for bundle in first[rank::there] for sample in bundle]
        assert of_rank == [160 + 4 * (micro_step * there + rank) for micro_step in range(len(of_rank))]


def test_a_run_of_a_fixed_number_ends() -> None:
    assert layout("4", 4, done=10).micro_steps == 90
    assert sum(map(len, layout("4", 4).bundles())) == 400
