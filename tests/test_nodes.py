"""A cluster whose node differs from the driver's: other versions, no package, and files that it does not see."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Settings, run

from raycontrolnet import ConditionConfig, TrainConfig, condition, prepare
from raycontrolnet.cluster import each_node, shared_files, versions
from raycontrolnet.config import checks
from raycontrolnet.errors import ConfigError, UserError

pytestmark = pytest.mark.slow

RULES = "TEST_NODE_RULES"
OTHER_NODE = f'''"""Makes this node differ as a file says: hidden paths, other versions, no raycontrolnet."""
import json
import os
import sys
from importlib import metadata


def rules():
    with open(os.environ[{RULES!r}]) as file:
        return json.load(file)


real_stat, real_version = os.stat, metadata.version


def stat(path, *args, **options):
    shown = os.fspath(path) if not isinstance(path, int) else ""
    if isinstance(shown, str) and shown.startswith(tuple(rules().get("hidden", ()))):
        raise FileNotFoundError(2, "No such file or directory", shown)
    return real_stat(path, *args, **options)


class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "raycontrolnet" and rules().get("no_package"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None


os.stat, metadata.version = stat, lambda name: rules().get("versions", {{}}).get(name) or real_version(name)
sys.meta_path.insert(0, Hide)
'''


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Start a head without CPUs and a node that obeys the file: (address, file)."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # that of other tests
    folder = tmp_path_factory.mktemp("node")
    (folder / "sitecustomize.py").write_text(OTHER_NODE)
    rules = folder / "rules.json"
    rules.write_text("{}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    try:
        cluster.add_node(num_cpus=3, env_vars={RULES: str(rules), "PYTHONPATH": path})
        yield cluster.address, rules
    finally:
        cluster.shutdown()


@pytest.fixture
def node(cluster: tuple[str, Path]) -> Iterator[Callable[..., None]]:
    """Return node(hidden=..., versions=..., no_package=...): the node is so."""

    def node(**rules: object) -> None:
        cluster[1].write_text(json.dumps(rules))

    yield node
    cluster[1].write_text("{}")


@pytest.fixture
def settings(tiny_settings: Settings, cluster: tuple[str, Path]) -> Settings:
    return tiny_settings | {"num_workers": "1", "address": cluster[0], "max_failures": 0}


@pytest.fixture
def refused(settings: Settings, tmp_path: Path) -> Callable[..., str]:
    """Return refused(**settings): the message of a run that ends before it reads models."""

    def refused(**changed: Any) -> str:
        with pytest.raises(UserError) as error:
            run(settings, tmp_path / "out", **changed)
        assert error.value.exit_code == 2
        log = (tmp_path / "out" / "run.log").read_text()
        assert "update 0 on: 1 worker" not in log, "a worker has begun"
        assert len(str(error.value)) < 250 + 2 * len(str(tmp_path))
        return str(error.value)

    return refused


def test_a_node_like_the_driver(settings: Settings, tmp_path: Path) -> None:
    out = run(settings, tmp_path / "out", cache_latents="on", latents_cache_dir=str(tmp_path / "latents"))
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("release", ["2.12.1+cu126", "1.0"])
def test_another_torch(node: Callable[..., None], refused: Callable[..., str], release: str) -> None:
    node(versions={"torch": release})
    here = checks.versions()["torch"].partition("+")[0]
    message = refused()
    assert message.startswith("torch: the node ")
    assert f" has {release}, this process has " in message.replace("has torch ", "has ")
    assert message.endswith(f"; run pip install torch=={here} there, or name it in a runtime_env")


def test_no_package(node: Callable[..., None], refused: Callable[..., str]) -> None:
    node(no_package=True)
    message = refused()
    assert message.startswith("raycontrolnet: the node ")
    assert " has no raycontrolnet, this process has " in message
    assert message.endswith(" there, or bring it along as examples/train_on_cluster.py does")


@pytest.mark.parametrize("on_bad_sample", ["fail", "skip"])
def test_data_that_the_node_does_not_see(
    node: Callable[..., None], refused: Callable[..., str], circles: Path, on_bad_sample: str, tmp_path: Path
) -> None:
    """With `skip`, all rows would be bad where the node loads them."""
    node(hidden=[str(circles / "images")])
    message = refused(
        cache_latents="auto" if on_bad_sample == "skip" else "off",
        on_bad_sample=on_bad_sample,
        latents_cache_dir=str(tmp_path / "latents"),
        max_bad_fraction=1.0,
    )
    assert message.startswith(f"--train_data_dir={circles}: the node ")
    assert f" does not see {circles / 'images' / '00000.png'}; name a folder on storage that all nodes share" in message


def test_a_model_that_the_node_does_not_see(
    node: Callable[..., None], refused: Callable[..., str], tiny_base: Path
) -> None:
    node(hidden=[str(tiny_base)])
    message = refused()
    assert message.startswith(f"--pretrained_model_name_or_path={tiny_base}: the node ")
    assert f" does not see {tiny_base / 'unet' / 'config.json'}; name" in message


def test_latents_that_the_node_does_not_see(
    node: Callable[..., None], refused: Callable[..., str], settings: Settings, tmp_path: Path
) -> None:
    """The data need not be there any more."""
    cached = {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "latents")}
    prepare(TrainConfig(**settings | cached | {"num_workers": "0"}), stream=io.StringIO())
    node(hidden=[str(tmp_path / "latents")])
    assert refused(**cached).startswith(f"--latents_cache_dir={tmp_path / 'latents'}: the node ")


def test_prepare_and_condition(
    node: Callable[..., None], settings: Settings, cluster: tuple[str, Path], circles: Path, tmp_path: Path
) -> None:
    node(hidden=[str(circles / "images")])
    cached = {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "latents"), "on_bad_sample": "skip"}
    with pytest.raises(ConfigError, match=r"^--train_data_dir=.*: the node .* does not see .*; name a folder"):
        prepare(TrainConfig(**settings | cached), stream=io.StringIO())
    images: dict[str, Any] = {
        "images": str(circles / "images"),
        "caption": "a photo",
        "out": str(tmp_path / "canny"),
        "resolution": 32,
    }
    with pytest.raises(ConfigError, match=r"^--images=.*: the node .* does not see .*; name a folder"):
        condition(
            ConditionConfig(**images, condition="canny", address=cluster[0], on_bad_sample="skip"), stream=io.StringIO()
        )


@pytest.mark.parametrize("what", ["data", "latents", "model", "versions"])
def test_a_node_that_joins_late(
    node: Callable[..., None],
    settings: Settings,
    circles: Path,
    tiny_base: Path,
    tmp_path: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an autoscaler's: nobody could look at it, and its own processes say the same."""
    monkeypatch.setattr(shared_files, "on_each_node", lambda *_, **__: [])
    monkeypatch.setattr(versions, "on_each_node", lambda *_, **__: [])
    changed = {"on_bad_sample": "skip", "cache_latents": "on", "latents_cache_dir": str(tmp_path / "latents")}
    hidden, flag = {
        "data": (circles / "images", "--train_data_dir"),
        "latents": (tmp_path / "latents", "--latents_cache_dir"),
        "model": (tiny_base, "--pretrained_model_name_or_path"),
        "versions": (tmp_path / "nothing", "torch"),
    }[what]
    if what == "latents":
        prepare(TrainConfig(**settings | changed | {"num_workers": "0"}), stream=io.StringIO())
    elif what != "data":
        changed = {}
    node(hidden=[str(hidden)], versions={"torch": "1.0"} if what == "versions" else {})
    with pytest.raises(UserError) as error:
        run(settings, tmp_path / "out", **changed)
    assert str(error.value).startswith(f"{flag}=" if what != "versions" else "torch: the node")
    assert "the node " in str(error.value)
    assert error.value.exit_code == 2


def test_a_node_that_does_not_answer(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be about to go; the run tries."""
    monkeypatch.setattr(each_node, "ANSWER_TIMEOUT_S", 0.0)
    out = run(settings, tmp_path / "out")
    assert "has not answered within 0 s" in (out / "run.log").read_text()
