"""Names of Ray that are private, alpha or undocumented: each is there, and Ray calls what the package hangs on it.

A hook that a new Ray has renamed would not fail: it would switch off Ctrl-C, or the quick end of a run, without a word.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import mmap
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import ray.data
import ray.train
import ray.train.collective
import ray.tune
from processes import wait_for
from ray._common import constants
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.thirdparty import pynvml
from ray._private.utils import check_version_info
from ray.experimental import internal_kv
from ray.job_config import JobConfig
from ray.train._internal.session import _TrainSession
from ray.train.v2._internal import constants as train_constants
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.tune.execution import cluster_info
from ray.tune.execution.class_cache import _ActorClassCache
from ray.tune.experiment import Trial
from ray.tune.experimental.output import get_air_verbosity
from ray.tune.trainable.function_trainable import FunctionTrainable, wrap_function

import raycontrolnet
from raycontrolnet.cluster import gpus, nodes, session, tuning
from raycontrolnet.cluster import trainer as cluster_trainer
from raycontrolnet.cluster.blocks import generate, results
from raycontrolnet.cluster.elastic import ElasticPolicy
from raycontrolnet.cluster.environment import JOB_CONFIG
from raycontrolnet.cluster.idle import RestWhenIdle
from raycontrolnet.cluster.trainer import (
    CONTROLLER_ENVIRONMENT,
    InterruptibleTrainer,
    _waits_for_dashboard,
    has_dashboard,
)
from raycontrolnet.cluster.tuning import TUNE_ENVIRONMENT, OrderlyEnd, ends_orderly, trial_error, tune_environment
from raycontrolnet.cluster.unfinished import FinishesFirst
from raycontrolnet.cluster.worker import (
    RECORDS_OF_RAY,
    from_rank_zero,
    remove_ray_records,
    report_checkpoint,
    this_node_is_to_be_reclaimed,
    wait_for_all,
)
from raycontrolnet.errors import RunError, root_cause

DEVELOPER_NAMES = {
    "ray.ObjectRef",
    "ray.available_resources",
    "ray.data.ExecutionOptions",
    "ray.data.ExecutionResources",
    "ray.tune.schedulers.TrialScheduler",
    "ray.tune.search.Searcher",
    "ray.tune.search.optuna.OptunaSearch",
}
"""Names used outside cluster/ that Ray documents without calling them a public interface."""


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_controller_is_made_as_we_make_it() -> None:
    own = inspect.signature(DataParallelTrainer._initialize_and_run_controller).parameters
    assert [(name, each.kind.name) for name, each in own.items()][1:] == [("controller_init_kwargs", "VAR_KEYWORD")]
    assert {"callbacks", "scaling_policy"} <= {*parameters(TrainController)}
    for name, is_async in {"run": True, "abort": True, "get_result": False}.items():
        method = getattr(TrainController, name)
        # An earlier test may have made it an actor's class, to whose methods Ray adds its tracing.
        assert [name for name in parameters(method) if name != "_ray_trace_ctx"] == ["self"]
        assert inspect.iscoroutinefunction(method) == is_async
    assert ray._raylet.RAY_NODE_ID_KEY == "ray.io/node-id"
    assert list(CONTROLLER_ENVIRONMENT) == [constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR]
    assert train_constants.get_env_vars_to_propagate().items() <= os.environ.items()
    assert train_constants.is_v2_enabled()
    assert "before_worker_group_shutdown" in vars(WorkerGroupCallback).keys() & vars(FinishesFirst).keys()
    assert parameters(WorkerGroup.execute_single_async)[1:3] == ["rank", "fn"]
    own_methods = {name for name in vars(ElasticPolicy) if not name.startswith("__")}
    assert own_methods <= vars(ElasticScalingPolicy).keys()


def test_names_are_rays() -> None:
    assert set(RECORDS_OF_RAY) == {
        train_constants.VALIDATE_STORAGE_MARKER_FILENAME,
        train_constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    }
    assert constants.HEAD_NODE_RESOURCE_NAME == nodes.HEAD
    assert f'"{nodes.BOOTSTRAP_CONFIG}"' in inspect.getsource(cluster_info)
    assert ray_constants.RAY_WORKER_NICENESS in session.ENVIRONMENT
    for name in set(re.findall(r"pynvml\.(\w+)", inspect.getsource(gpus))):
        assert callable(getattr(pynvml, name))
    assert RAY_JOB_CONFIG_JSON_ENV_VAR == JOB_CONFIG
    assert JobConfig.from_json({"runtime_env": {"env_vars": {"A": "1"}}}).runtime_env == {"env_vars": {"A": "1"}}
    assert f'"{session.MATCH_LEVEL}", "patch"' in inspect.getsource(check_version_info)


def test_raylet_reads_our_environment_variables() -> None:
    """Each is RAY_ and the name of a setting, which is nowhere but in the binary."""
    names = [name for name in (*session.ENVIRONMENT, session.STARTUP_CONCURRENCY) if name != name.upper()]
    assert len(names) == 3
    path = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raylet:
        assert [name for name in names if raylet.find(name.removeprefix("RAY_").encode()) < 0] == []
        assert raylet.find(b"no_setting_of_this_name") < 0


def test_workers_interface() -> None:
    given = {"checkpoint_upload_mode", "checkpoint_upload_fn", "delete_local_checkpoint_after_upload"}
    assert {"metrics", "checkpoint", "checkpoint_dir_name", *given} <= {*parameters(ray.train.report)}
    assert ray.train.CheckpointUploadMode.ASYNC
    assert len(parameters(ray.train.collective.broadcast_from_rank_zero)) == 1
    assert parameters(ray.train.collective.barrier) == []
    cause = RunError("out of memory")
    assert root_cause(ray.train.WorkerGroupError("a worker failed", {0: cause})) is cause


def test_tunes_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "7")
    undocumented = {"RAY_AIR_NEW_OUTPUT"}
    assert set(TUNE_ENVIRONMENT) - undocumented <= ray.tune.constants.TUNE_ENV_VARS
    assert get_air_verbosity(0) is not None
    before = dict(os.environ)
    with tune_environment({"MALLOC_ARENA_MAX": "1"}):
        assert get_air_verbosity(0) is None, "Tune's table is shown"
        assert TUNE_ENVIRONMENT.items() <= os.environ.items()
        trial = _ActorClassCache().get(type("Trial", (), {}))
        assert trial._default_options["runtime_env"]["env_vars"]["MALLOC_ARENA_MAX"] == "1"
    assert dict(os.environ) == before
    assert importlib.import_module("ray.tune.analysis.experiment_analysis").logger.name.startswith(tuning.QUIET_LOGGER)


def test_why_a_trial_was_given_up(tmp_path: Path) -> None:
    assert isinstance(Trial.pickled_error_file, property)
    assert {"num_failures", "last_result"} <= set(dir(Trial))
    assert "self.config = " in inspect.getsource(Trial.__init__)
    file = tmp_path / "error.pkl"
    file.write_bytes(ray.cloudpickle.dumps(RunError("out of memory")))
    assert str(trial_error(SimpleNamespace(pickled_error_file=file))) == "out of memory"
    file.write_bytes(b"no pickle")
    assert trial_error(SimpleNamespace(pickled_error_file=file)) is None
    assert trial_error(SimpleNamespace(pickled_error_file=None)) is None


def test_tune_mixes_in_our_end_of_a_trial() -> None:
    def trial(config: dict[str, Any]) -> None:
        pass

    wrapped = wrap_function(ends_orderly(trial))
    assert wrapped.__mro__[1:3] == (OrderlyEnd, FunctionTrainable)
    assert {"step", "reset_config", "cleanup"} <= vars(FunctionTrainable).keys() & vars(OrderlyEnd).keys()
    assert "TUNE_FUNCTION_THREAD_TIMEOUT_S" in inspect.getsource(FunctionTrainable.reset_config)
    assert "self.training_thread = " in inspect.getsource(_TrainSession.reset)


@pytest.mark.usefixtures("_local_ray")
def test_a_run_calls_the_hooks(tmp_path: Path) -> None:
    """The controller is ours, without the actor that ends late; Ctrl-C stays Python's; a worker has our priority."""

    def work() -> dict[str, Any]:
        folder = tmp_path / "run" / "checkpoint-1"
        folder.mkdir()
        report_checkpoint({"loss": from_rank_zero(0.5)}, folder.name, str(folder))
        wait_for_all()
        rows = list(ray.train.get_dataset_shard("train").iter_rows())
        others = {process.name() for process in psutil.Process(os.getppid()).children()}
        names = [group["name"] for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
        return {
            "niceness": os.nice(0),
            "cwd": Path.cwd(),
            "rows": rows,
            "others": others,
            "places": names,
            "board": has_dashboard(),
            "pid": os.getpid(),
        }

    trainer = InterruptibleTrainer(
        work,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path), name="run"),
        datasets={"train": lambda: ray.data.from_items([3])},  # a function, called when the workers start
    )
    assert [_waits_for_dashboard(each) for each in trainer._create_default_callbacks()].count(True) == 1
    trainer.one_machine = True
    pids = tmp_path / "pids"

    def finished(_: float) -> bool:
        pids.write_text(str(os.getpid()))
        return True

    trainer.finished = finished
    handler = signal.getsignal(signal.SIGINT)
    answers: list[bool] = []

    def ask() -> None:
        wait_for(lambda: trainer.controller is not None, 60)
        answers.append(trainer.answers(60))

    asking = threading.Thread(target=ask)
    asking.start()
    result = trainer.fit_or_abort()
    asking.join()
    assert answers == [True], "SIGTERM would end a run before its checkpoint is written"
    assert trainer._groups_name, "Ray does not call our _initialize_and_run_controller"
    assert signal.getsignal(signal.SIGINT) is handler, "Ray takes Ctrl-C"
    seen = result.return_value
    assert any(name.startswith("ray::TrainController") for name in seen["others"])
    assert not [name for name in seen["others"] if name.startswith("ray::PlacementGroup")], "the run ends 12 s late"
    assert not [name for name in seen["others"] if name.startswith("ray::Preemption")]
    assert [name for name in seen["places"] if name.startswith(trainer._groups_name)], (
        "a killed run would keep its CPUs"
    )
    assert pids.read_text() == str(seen["pid"]), "a checkpoint that is being written is lost when a worker fails"
    assert not seen["board"], "the driver knows better than a worker, in which a sweep's trial runs"
    assert (seen["niceness"], seen["cwd"], seen["rows"]) == (os.nice(0), Path.cwd(), [{"item": 3}])
    assert result.metrics["loss"] == 0.5
    assert Path(result.checkpoint.path) == tmp_path / "run" / "checkpoint-1"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-1", *RECORDS_OF_RAY}
    remove_ray_records(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


@pytest.mark.usefixtures("_local_ray")
def test_a_controller_that_is_gone_does_not_answer() -> None:
    """As where Ray's processes got SIGTERM with the driver: the run is not waited for then."""

    class Busy:  # here: Ray's processes know no module of tests
        async def wait(self) -> None:
            time.sleep(60)

    trainer = InterruptibleTrainer(lambda: None)
    assert trainer.answers(0.0), "it is not there yet, or no more"
    trainer.controller = ray.remote(num_cpus=0)(Busy).remote()
    ray.get(trainer.controller.__ray_ready__.remote())
    trainer.controller.wait.remote()
    time.sleep(1)
    assert trainer.answers(5), "it waits for rank 0's checkpoint, which would be lost"
    ray.kill(trainer.controller)
    wait_for(lambda: not trainer.answers(60), 60)
    trainer.controller = None


def places(trainer: InterruptibleTrainer) -> list[str]:
    """Return the placement groups that a run holds."""
    return [group["name"] for group in trainer._placement_groups() if group["state"] != "REMOVED"]


@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize("workers_start", [False, True])
def test_a_run_in_a_thread_is_aborted(tmp_path: Path, workers_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a sweep's trial, which Tune runs in a thread, is ended from another; even while its workers are starting.

    The next run gets their CPUs: Ray itself would keep them for a controller that was killed.
    """
    monkeypatch.setattr(cluster_trainer, "ABORT_TIMEOUT_S", 0.1)  # a controller that starts workers does not answer
    trainer = InterruptibleTrainer(
        lambda: time.sleep(600),
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path), name="run"),
    )
    trainer.abort()  # there is nothing to stop yet
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    while trainer.controller is None:
        assert thread.is_alive()
        time.sleep(0.05)
    if workers_start:
        wait_for(lambda: bool(places(trainer)), timeout_s=60)
    trainer.abort()
    thread.join(timeout=30)
    assert not thread.is_alive()
    wait_for(lambda: not places(trainer), timeout_s=10)
    wait_for(lambda: ray.available_resources().get("CPU") == 3, timeout_s=30)
    assert [type(error) for error in raised] == [ray.exceptions.ActorDiedError]


@pytest.mark.usefixtures("_local_ray")
def test_a_node_that_stays_is_not_reclaimed() -> None:
    """One that goes is noticed: see test_sweep_cluster.py."""
    assert this_node_is_to_be_reclaimed() == 0


@pytest.mark.usefixtures("_local_ray")
def test_a_dashboard_is_found_where_ray_puts_its_address() -> None:
    assert not has_dashboard()
    url = {"key": "webui:url", "namespace": ray_constants.KV_NAMESPACE_DASHBOARD}
    before = internal_kv._internal_kv_get(**url)
    internal_kv._internal_kv_put(**url, value="127.0.0.1:8265")
    try:
        assert has_dashboard()
    finally:
        internal_kv._internal_kv_put(**url, value=before)
    assert not has_dashboard()


@pytest.mark.usefixtures("_local_ray")
def test_ray_data_asks_the_idle_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called with every turn of the loop, and finds its way to the counts of the operators."""
    called: list[RestWhenIdle] = []
    original = RestWhenIdle.on_execution_step

    def spy(self: RestWhenIdle, executor: Any) -> None:
        original(self, executor)
        called.append(self)

    monkeypatch.setattr(RestWhenIdle, "on_execution_step", spy)
    assert list(results(generate(lambda stop: iter(range(stop)), 5))) == [0, 1, 2, 3, 4]
    assert called, "Ray Data does not call the callback"
    (submitted, finished, outputs), *_ = [done for done in called[-1]._done or () if done[0]]
    assert (submitted, finished) == (1, 1)
    assert outputs == 5, "each object is a block of its own"


def rays_names(path: Path) -> set[str]:
    """Return the names below `ray` that a file uses, such as `ray.data.Dataset`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names, found = {"ray": "ray"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ray":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in names:
            found.add(".".join([names[node.id], *reversed(parts)]))
    return found


def is_public(name: str) -> bool:
    """Check that Ray calls `name`, or the class that it belongs to, stable or beta, and public."""
    parts = name.split(".")
    found: Any = ray
    for index, part in enumerate(parts[1:], 1):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[: index + 1]))
        found = getattr(found, part)
        if ".".join(parts[: index + 1]) in DEVELOPER_NAMES:
            return True
        if getattr(getattr(found, "_annotated_type", None), "value", None) == "PublicAPI":
            return "PublicAPI (alpha)" not in (found.__doc__ or "")
    return isinstance(found, ModuleType)


def test_outside_cluster_ray_is_used_by_its_public_names() -> None:
    """The rest lives in cluster/, each with a line that says why."""
    package = Path(raycontrolnet.__file__).parent
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "cluster"]
    used = {(str(path.relative_to(package)), name) for path in files for name in rays_names(path)}
    assert len(used) >= 40
    assert sorted(each for each in used if not is_public(each[1])) == []
    inside = {name for path in (package / "cluster").glob("*.py") for name in rays_names(path)}
    assert {name for name in inside if not is_public(name)} >= {
        "ray.data._internal.execution.execution_callback.ExecutionCallback",
        "ray.train.CheckpointUploadMode.ASYNC",
        "ray.train.v2.api.data_parallel_trainer.TrainController",
        "ray.nodes",
    }
