"""README, the guides and the examples are complete and name what there is: settings, flags, commands, files, links."""

from __future__ import annotations

import re
import runpy
import signal
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from documents import BLOCKS, GUIDES, INSTALLATION, ROOT, TEXTS, block, section

from raycontrolnet import ConditionConfig, GenerateConfig, TrainConfig, cli
from raycontrolnet.config.check_config import CheckSettings
from raycontrolnet.config.foreign_flags import SCRIPT_FLAGS
from raycontrolnet.config.space import read_space
from raycontrolnet.config.spellings import SPELLINGS
from raycontrolnet.config.sweep_config import SweepSettings
from raycontrolnet.config.values import setting_types
from raycontrolnet.errors import Interrupted, RunError, UserError
from raycontrolnet.model.families.registry import families

MAKE_SETTINGS = ROOT / "examples" / "guides" / "make_settings.py"
CHANGELOG, CONTRIBUTING = ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".yaml"))


def test_the_documents_are_read() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 200
    assert len(GUIDES) >= 7
    assert Counter(found.kind for found in BLOCKS) == {
        "run": 10, "slow": 7, "job": 1, "cluster": 1, "runtime_env": 1, "skip": 15, "sweep": 1, "sweep.py": 1,
        "metadata.jsonl": 1, "space.yaml": 1,
    }  # fmt: skip
    fences = sum(len(re.findall(r"^```\w+$", text, re.M)) for text in TEXTS.values())
    assert len(BLOCKS) == fences, "a block without a comment for the tests"
    first = next(found for found in BLOCKS if found.kind == "run")
    assert first.output_dirs == ["my-controlnet"]
    assert "my-images" in first.command
    assert sum(found.text.startswith(INSTALLATION) for found in BLOCKS) == 1


def test_the_default_space(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(block("space.yaml").text)
    assert read_space(tmp_path / "space.yaml") == read_space(None)


def test_settings_are_those_of_the_code() -> None:
    written = TEXTS["settings.md"] == runpy.run_path(str(MAKE_SETTINGS))["settings_page"]()
    assert written, "run `python examples/guides/make_settings.py`"
    commands = {"train": TrainConfig, "tune": SweepSettings, "check": CheckSettings}
    commands |= {"generate": GenerateConfig, "condition": ConditionConfig}
    for command, config in commands.items():
        tables = section("settings.md", f"raycontrolnet {command}")
        listed = re.findall(r"^\| `--(\w+)`(?: \*)? \| \w.* \| .* \| \S.* \|$", tables, re.M)
        assert sorted(listed) == sorted(setting_types(config))


def test_families_are_listed() -> None:
    """In the README's table, and in the help."""
    rows = re.findall(r"^\| \[?(Stable [^|\]]*?)(?:\]\(\S+\))? \| `(\w+)` \|$", TEXTS["README.md"], re.M)
    assert rows == [(family.title, family.pipeline) for family in families()]
    (meaning,) = re.findall(r"^\| `--pretrained_model_name_or_path` \* \| .* \| (.*) \|$", TEXTS["settings.md"], re.M)
    assert [family.title for family in families() if family.title not in meaning] == []


def test_flags_exist() -> None:
    """Ours have underscores or are one word; what has hyphens belongs to others."""
    of_others = {"logdir", "head", "region", "query", "output", "name", "port", "ulimit"}
    of_others |= {"include", "signal", "submit", "install", "reason"}  # Slurm, train_on_cluster.py, ray drain-node
    ours = {"config", "help", *SCRIPT_FLAGS, *SPELLINGS, *setting_types(SweepSettings)}
    ours |= {
        name
        for config in (TrainConfig, CheckSettings, GenerateConfig, ConditionConfig)
        for name in setting_types(config)
    }
    ours |= {f"no_{name}" for name in ours}
    others = {path.name: path.read_text(encoding="utf-8") for path in (*EXAMPLES, CHANGELOG, ROOT / "cluster.yaml")}
    flags = {name: set(re.findall(r"(?<![\w-])--(\w+)(?![\w-])", text)) for name, text in {**TEXTS, **others}.items()}
    assert {name: unknown for name, found in flags.items() if (unknown := found - ours - of_others)} == {}
    assert len(flags["README.md"]) >= 20
    assert sum(map(len, flags.values())) >= 200


def test_commands_are_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    shell = "\n".join(found.text for found in BLOCKS if found.language == "bash")
    commands = set(re.findall(r"raycontrolnet ([a-z]+)\b", shell))
    assert commands == {"train", "tune", "check", "prepare", "condition", "generate", "demo"}
    assert commands <= set(re.findall(r"raycontrolnet ([a-z]+)\b", usage))


def test_exit_codes() -> None:
    table = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", TEXTS["outputs.md"], re.M)}
    ends = {name: 128 + number for name, number in (("Ctrl-C", signal.SIGINT), ("SIGTERM", signal.SIGTERM))}
    assert set(table) == {0, RunError.exit_code, UserError.exit_code, *ends.values()}
    assert all(name in table[code] for name, code in ends.items())
    assert Interrupted("").exit_code == 130


def test_links_lead_to_files_and_headings() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *GUIDES, CHANGELOG, CONTRIBUTING)}
    links = {
        (path, target)
        for path, text in texts.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if "://" not in target
    }
    assert len(links) >= 35
    assert [link for link in links if not leads_somewhere(*link)] == []
    of_readme = {(ROOT / target).resolve() for path, target in links if path.name == "README.md"}
    assert {*GUIDES, *EXAMPLES} - of_readme == {MAKE_SETTINGS}


def leads_somewhere(path: Path, target: str) -> bool:
    """Check a link in the document `path`."""
    name, _, anchor = target.partition("#")
    file = path.parent / name if name else path
    if not file.is_file() or not anchor:
        return file.is_file()
    titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return anchor in [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles]


def test_contributing_names_files() -> None:
    """The tests may run without the package's sources beside them: they are where Python finds them."""
    spec = find_spec("raycontrolnet")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    names = re.findall(r"`([\w/]+\.(?:py|md|toml|css))`", CONTRIBUTING.read_text(encoding="utf-8"))
    assert len(names) >= 15
    assert [name for name in names if not (package / name).is_file() and not (ROOT / name).is_file()] == []


def test_examples_say_how_long_they_take() -> None:
    assert len(EXAMPLES) >= 6
    for path in EXAMPLES:
        head = path.read_text(encoding="utf-8").splitlines()[:5]
        assert re.search(r"(Takes|about) .*(second|minute|hour|day)s?\b", "\n".join(head)), path
