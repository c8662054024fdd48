"""The model card: what it says, what it keeps to itself, and that its code runs as it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from test_report import write_images

from raycontrolnet.config.train_config import TrainConfig, changed_settings
from raycontrolnet.hub.licence import Licence
from raycontrolnet.hub.model_card import write_model_card
from raycontrolnet.training import validation

TOKEN = "hf_TheRightToken"
EVIL = 'red `circle` | <script>alert(1)</script> ![x](y)\n---\nlicense: mit\n```"""'


@pytest.fixture
def run_folder(tmp_path: Path, tiny_base: Path) -> Path:
    """Write a finished run's folder with its weights."""
    folder = tmp_path / "circles-run"
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8)).save_pretrained(folder)
    return folder


def settings_of(folder: Path, base: Path, **settings: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "train_data_dir": "data/circles",
        "output_dir": str(folder),
    }
    return changed_settings(TrainConfig(**given | {"resolution": 32, "hub_token": TOKEN, "seed": 3} | settings))


def finish_validation(folder: Path, step: int, *prompts: str) -> None:
    """Make a validation as it is left in a run's folder, without drawing."""
    write_images(folder, range(step, step + 1), list(prompts), resolution=32)


def parts(card: Path) -> tuple[dict[str, Any], str]:
    _, metadata, text = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_card(run_folder: Path, tiny_base: Path) -> None:
    finish_validation(run_folder, 1, "an older one")
    finish_validation(run_folder, 2, "red circle", EVIL, " ")
    image = str(tiny_base / "model_index.json")
    changed = {"learning_rate": 1e-4, "validation_prompt": (EVIL,), "validation_image": (image,)}
    settings = settings_of(run_folder, tiny_base, **changed)
    facts: dict[str, Any] = {
        "step": 1234,
        "loss": 0.123456,
        "control_gap": None,
        "started": 1e9,
        "push_failure": "nobody's business",
        "versions": {"torch": 2, "ray": "3"},
    }
    card = write_model_card(run_folder, settings, facts)
    assert card == run_folder / "README.md"
    metadata, text = parts(card)
    assert metadata == {
        "library_name": "diffusers",
        "tags": [
            "stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "controlnet",
            "diffusers-training",
        ],
        "inference": True,
    }  # fmt: skip
    assert text.startswith(
        "\n# circles-run\n\nA ControlNet for `tiny_base0`, trained with raycontrolnet on `circles`.\n"
    )
    figures = ("- updates: `1,234`", "- loss of the last update: `0.1235`", "- versions: `torch 2, ray 3`")
    assert "\n## Training\n\n" + "\n".join(figures) + "\n\nSettings" in text
    assert "\n- `learning_rate`: `0.0001`\n" in text
    assert '\n- `validation_image`: `["model_index.json"]`\n' in text
    assert "hub_token" not in text
    assert "nobody's business" not in text
    assert TOKEN not in text
    assert str(run_folder.parent) not in text.replace(repr(str(run_folder)), "").replace(repr(str(tiny_base)), "")
    assert "an older one" not in text
    links = re.findall(r"^!\[[^]]*]\((.*)\)$", text, flags=re.MULTILINE)
    assert links == [f"images/pair-{pair:02d}-grid.png" for pair in range(3)]
    for link in links:
        grid = validation.step_folder(run_folder, 2) / Path(link).name
        assert (run_folder / link).read_bytes() == grid.read_bytes()
    assert "\n`red circle`:\n" in text
    assert "\nThe empty prompt:\n" in text


def test_what_the_held_out_rows_say(run_folder: Path, tiny_base: Path) -> None:
    never = "control_appeared_at_step"
    facts = {"val_loss": 0.1234567, "control_gap": 0.000123456, never: 1200}
    _, text = parts(write_model_card(run_folder, settings_of(run_folder, tiny_base), facts))
    assert "\n- held-out loss: `0.1235`\n- control gap (" in text
    assert "): `0.0001235`\n- control appeared at update `1,200`\n" in text
    _, text = parts(write_model_card(run_folder, settings_of(run_folder, tiny_base), facts | {never: None}))
    assert "): `0.0001235`\n- no control yet\n" in text
    _, text = parts(write_model_card(run_folder, settings_of(run_folder, tiny_base), dict.fromkeys(facts)))
    assert "held-out" not in text
    assert "- control appeared" not in text
    assert "no control yet" not in text


@pytest.mark.parametrize(
    ("licence", "head", "said"),
    [
        (
            Licence(),
            {},
            "Not known: none was found for the base model, `tiny_base0`, whose licence may bind this model too.\n",
        ),
        (
            Licence(("mit",), "settings"),
            {"license": "mit"},
            "`mit`, chosen for this model. Check that it fits with the licence of the base model, `tiny_base0`.",
        ),
        (
            Licence(("mit", "openrail++"), "base"),
            {"license": ["mit", "openrail++"]},
            "`mit` and `openrail++`, the licence of the base model, `tiny_base0`.",
        ),
        (
            Licence(("other",), "base", "a*b*", "https://example.org/licence"),
            {"license": "other", "license_name": "a*b*", "license_link": "https://example.org/licence"},
            "`other` ([a\\*b\\*](https://example.org/licence)), the licence of the base model, `tiny_base0`.",
        ),
        (Licence(("other",), "base", "mine"), {"license": "other", "license_name": "mine"}, "`other` (mine), the "),
        (
            Licence(("other",), "base", None, "https://example.org/"),
            {"license": "other", "license_link": "https://example.org/"},
            "`other` ([its text](https://example.org/)), the ",
        ),
    ],
)
def test_licence(licence: Licence, head: dict[str, Any], said: str, run_folder: Path, tiny_base: Path) -> None:
    metadata, text = parts(write_model_card(run_folder, settings_of(run_folder, tiny_base), {}, licence=licence))
    assert {name: value for name, value in metadata.items() if name.startswith("license")} == head
    assert f"\n## Licence\n\n{said}" in text


def test_user_text_is_not_markup(run_folder: Path, tiny_base: Path) -> None:
    from markdown_it import MarkdownIt

    finish_validation(run_folder, 2, EVIL)
    folder = run_folder.rename(run_folder.with_name("a <b>*run* [x](y)"))
    settings = settings_of(folder, tiny_base, caption_column=EVIL, dataset_name="a/*b*", train_data_dir=None)
    metadata, text = parts(write_model_card(folder, settings, {"versions": EVIL}))
    assert "license" not in metadata
    inline = [part for token in MarkdownIt().parse(text) for part in token.children or []]
    assert {part.type for part in inline} <= {
        "text", "text_special", "softbreak", "code_inline", "image", "link_open", "link_close"
    }  # fmt: skip
    assert [part.attrs["src"] for part in inline if part.type == "image"] == ["images/pair-00-grid.png"]
    shown = " ".join(EVIL.split())
    assert shown in [part.content for part in inline if part.type == "code_inline"]
    assert MarkdownIt().render(text).startswith("<h1>a &lt;b&gt;*run* [x](y)</h1>")


def test_a_named_vae_is_in_the_code(run_folder: Path) -> None:
    settings = settings_of(run_folder, Path("runwayml/sd"), pretrained_vae_model_name_or_path="madebyollin/vae")
    _, text = parts(write_model_card(run_folder, settings, {}))
    assert "from diffusers import AutoencoderKL, ControlNetModel," in text
    assert "\nvae = AutoencoderKL.from_pretrained('madebyollin/vae')\npipeline = " in text
    assert "controlnet=controlnet, vae=vae" in text
    settings = settings_of(run_folder, Path("runwayml/sd"), pretrained_vae_model_name_or_path="/home/me/vae")
    _, text = parts(write_model_card(run_folder, settings, {}, repo_id="someone/model"))
    assert "AutoencoderKL.from_pretrained('vae')" in text


def test_card_of_models_on_the_hub(run_folder: Path) -> None:
    settings = settings_of(run_folder, Path("runwayml/sd"), dataset_name="someone/circles", train_data_dir=None)
    metadata, text = parts(write_model_card(run_folder, settings, {}, repo_id="someone/model"))
    assert (metadata["base_model"], metadata["datasets"]) == ("runwayml/sd", ["someone/circles"])
    assert "none was found for the base model, [runwayml/sd](https://huggingface.co/runwayml/sd), whose" in text
    assert "[someone/circles](https://huggingface.co/datasets/someone/circles)" in text
    assert "ControlNetModel.from_pretrained('someone/model')" in text
    assert "Examples" not in text
    assert "![" not in text
    assert str(run_folder) not in text


def test_card_of_several_sources(run_folder: Path, tiny_base: Path) -> None:
    names = {"train_data_dir": ("/data/mine", "/data/yours"), "dataset_name": ("someone/circles", "other/squares")}
    metadata, text = parts(write_model_card(run_folder, settings_of(run_folder, tiny_base, **names), {}))
    assert metadata["datasets"] == ["someone/circles", "other/squares"]
    circles, squares = (f"[{name}](https://huggingface.co/datasets/{name})" for name in names["dataset_name"])
    assert f"on `mine`, `yours`, {circles} and {squares}." in text
    assert "/data/" not in text


def test_card_of_an_earlier_run_is_replaced(run_folder: Path, tiny_base: Path) -> None:
    finish_validation(run_folder, 2, "red circle", "blue circle")
    write_model_card(run_folder, settings_of(run_folder, tiny_base), {})
    finish_validation(run_folder, 4, "red circle")
    write_model_card(run_folder, settings_of(run_folder, tiny_base), {})
    names = sorted(path.name for path in (run_folder / "images").glob("*.png"))
    assert names == ["pair-00-control.png", "pair-00-grid.png"]
    assert "After 4 updates" in (run_folder / "README.md").read_text()
    assert not list(run_folder.glob(".README*"))


def test_snippet_runs(run_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    """As it stands in the card, with a prompt full of quotes."""
    finish_validation(run_folder, 2, EVIL)
    _, text = parts(write_model_card(run_folder, settings_of(run_folder, tiny_base), {}))
    shutil.copyfile(run_folder / "images" / "pair-00-control.png", tmp_path / "control.png")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # threads only wait at this size
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=120, check=False)
    assert done.returncode == 0
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (32, 32)
