"""A fault at every moment of a run: nothing that was finished is lost, and the weights are those of an undisturbed run.

    pytest -n 0 -m slow tests/faults                      # 189 faults, three hours on two CPUs
    FAULTS_RESULTS=faults.jsonl pytest -n 0 -m slow tests/faults -k draw0

At the end the table is printed, of the faults that FAULTS_RESULTS holds too; those that stand there are not repeated.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hub_stand_in import HubStandIn
from moments import (
    BATCH_SIZE,
    EVERY,
    MOMENTS,
    NODE,
    NOT_THERE,
    PREPARE,
    PUSH,
    SHARDS,
    STORAGE,
    TARGETS,
    TRAINING,
    UPDATES,
    WORKERS,
    draw_plan,
)
from runs import WEIGHTS
from s3_server import BUCKET, S3Server, proxy_that_goes_away, s3
from scene import PAUSES, Scene
from table import Outcome, add_result, results, table
from targets import fault_of

from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.latents.manifest import SHARD_ROWS

__all__ = ["s3"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DRAWS = 3
TOKEN = "hf_OfTheFaultTable"
REPOSITORY = "someone/faults"
CASES = [
    pytest.param(target, moment, draw, id=f"{target}-{moment}-draw{draw}".replace(" ", "_"))
    for draw in range(DRAWS)
    for target in TARGETS
    for moment in MOMENTS
    if (moment, target) not in NOT_THERE
]


@dataclass
class Stage:
    """Everything that scenes share."""

    root: Path
    settings: dict[str, Any]
    environment: dict[str, str]
    hub: HubStandIn
    store: S3Server
    away: Any
    """Event; while it is set the store answers nothing."""
    number: int = 0

    @property
    def moment(self) -> Path:
        """The folder in which processes meet."""
        (folder := self.root / "moment").mkdir(exist_ok=True)
        return folder


@pytest.fixture(scope="module")
def stage(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("faults")
    data = write_shapes(root / "data", SHARDS * SHARD_ROWS, resolution=32)
    settings = {
        "pretrained_model_name_or_path": str(tiny_base), "train_data_dir": str(data), "resolution": 32, "seed": 0,
        "num_workers": str(WORKERS), "cpus_per_worker": 0.75, "use_gpu": False,
    }  # fmt: skip
    environment = {"XDG_CACHE_HOME": str(root / "cache"), "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(root / "hf")}
    with HubStandIn(TOKEN) as hub, proxy_that_goes_away(s3.endpoint) as (address, away):
        environment |= s3.environment | {"AWS_ENDPOINT_URL": address, "HF_ENDPOINT": hub.url}
        yield Stage(root, settings, environment, hub, s3, away)


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    return {
        "train_batch_size": BATCH_SIZE, "max_train_steps": UPDATES, "checkpointing_steps": EVERY,
        "checkpoints_total_limit": 1, "cache_latents": "off", "learning_rate": 1e-3, "report_to": "none",
    }  # fmt: skip


@pytest.fixture
def place(stage: Stage, request: pytest.FixtureRequest) -> str:
    """Return the folder, or the URI, that a scene writes to."""
    stage.number += 1
    target, moment = request.node.callspec.params["target"], request.node.callspec.params["moment"]
    name = f"scene-{stage.number}"
    return f"s3://{BUCKET}/{name}" if target == STORAGE and moment != PUSH else str(stage.root / name)


@pytest.fixture
def two_nodes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Start a head without CPUs and two nodes, each with room for the run; return the environment of its drivers."""
    from ray.cluster_utils import Cluster

    of_nodes = {"RAY_AUTH_MODE": "disabled", "FAULTS_FOLDER": str(stage.moment)}
    for name, value in {**stage.environment, **of_nodes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(PAUSES), prepend=os.pathsep)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
    cluster.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _table_at_the_end(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if found := results():
        request.config.pluginmanager.getplugin("terminalreporter").write_line(f"\n{table(found)}")


def command_of(stage: Stage, moment: str, place: str, training: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the command, and what goes on with it."""
    settings = stage.settings | ({"latents_cache_dir": place} if moment == PREPARE else {"output_dir": place})
    if moment != PREPARE:
        settings |= training
    if moment == PUSH:
        settings |= {"push_to_hub": True, "hub_model_id": REPOSITORY}
    file = stage.root / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = ["prepare" if moment == PREPARE else "train", "--config", str(file)]
    return command, command if moment == PREPARE else [*command, "--resume_from_checkpoint", "latest"]


def files_of(stage: Stage, place: str) -> dict[str, bytes]:
    """Return name -> content of what a scene has left."""
    if place.startswith("s3://"):
        name = place.rpartition("/")[2]
        return {key.removeprefix(f"{name}/"): stage.store.read(key) for key in stage.store.names(f"{name}/")}
    files = (path for path in Path(place).rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(stage: Stage, training: dict[str, Any]) -> dict[str, dict[str, bytes]]:
    """Return moment -> what the commands leave without a fault."""
    found = {}
    for moment in (TRAINING[0], PREPARE):
        place = str(stage.root / f"undisturbed-{moment}")
        command, _ = command_of(stage, moment, place, training)
        environment = os.environ | stage.environment
        subprocess.run([sys.executable, "-m", "raycontrolnet", *command], check=True, env=environment)
        found[moment] = files_of(stage, place)
    return found


def losses(files: dict[str, bytes]) -> list[tuple[int, float]]:
    lines = files["metrics.jsonl"].decode().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    return {Path(name).name: content for name, content in files.items() if name.endswith(".arrow")}


@pytest.mark.parametrize(("target", "moment", "draw"), CASES)
def test_a_fault(
    target: str, moment: str, draw: int, stage: Stage, place: str, training: dict[str, Any],
    undisturbed: dict[str, dict[str, bytes]], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if any((known.target, known.moment, known.draw) == (target, moment, draw) for known in results()):
        pytest.skip("its result is known")
    random = Random(f"{target} {moment} {draw}")
    plan = draw_plan(target, moment, random)
    environment = stage.environment | (request.getfixturevalue("two_nodes") if target == NODE else {})
    environment |= {"HF_TOKEN": TOKEN} if moment == PUSH else {}
    stage.hub.files.clear()
    scene = Scene(stage.moment, *command_of(stage, moment, place, training), environment)
    ended = scene.play(plan, fault_of(target, moment, scene, random, stage.away))
    stage.away.clear()
    files = files_of(stage, place)
    if moment == PREPARE:
        same, lost = shards(files) == shards(undisturbed[PREPARE]) and len(shards(files)) == SHARDS, 0
        recovered = ended - scene.disturbed_at
    else:
        whole = undisturbed[TRAINING[0]]
        same = files[WEIGHTS] == whole[WEIGHTS] and losses(files) == losses(whole)
        lost, recovered = lost_and_recovered(files, scene, ended)
    if moment == PUSH:
        same = same and stage.hub.files.get(REPOSITORY, {}).get(WEIGHTS) == files[WEIGHTS]
    add_result(Outcome(target, moment, draw, plan.detail, scene.codes, round(recovered, 1), lost, same))
    assert scene.codes[-1] == 0, scene.said()
    assert same, "other weights, losses, latents or files on the Hub than without the fault"
    assert lost <= EVERY


def lost_and_recovered(files: dict[str, bytes], scene: Scene, ended: float) -> tuple[int, float]:
    """Return updates that were done again, and the seconds from the fault to the first update that was new."""
    records = [json.loads(line) for line in files["metrics.jsonl"].decode().splitlines()]
    begun = [int(step) for step in re.findall(r"update (\d+) on: \d worker", files["run.log"].decode())]
    fault = scene.disturbed_at
    done = int((scene.folder / "done").read_text()) if (scene.folder / "done").exists() else 0
    lost = sum(max(0, done - step) for step in begun[1:2])
    new = [record["time"] for record in records if record["step"] > done and record["time"] > fault]
    return lost, (new[0] if new else ended) - fault
