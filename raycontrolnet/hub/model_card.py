"""The README.md of a finished run: what was trained, on what, how to load it, and what it draws."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycontrolnet.config.data_sources import named
from raycontrolnet.config.output_settings import SAFETENSORS
from raycontrolnet.config.settings import DataConfig
from raycontrolnet.config.train_config import names_with
from raycontrolnet.hub.licence import Licence, is_hub_id
from raycontrolnet.model.base_family import family_of_saved
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.families.unet import ZERO_SNR
from raycontrolnet.model.single_file import is_single_file
from raycontrolnet.sampling.images import PairImages
from raycontrolnet.storage.files import replacing
from raycontrolnet.storage.uri import is_uri, shown_uri
from raycontrolnet.training import validation

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

TAGS = ("text-to-image", "diffusers", "controlnet", "diffusers-training")
"""Tags besides those of the base model's family."""

FIGURES = {
    "step": "updates",
    "samples": "samples",
    "loss": "loss of the last update",
    "val_loss": "held-out loss",
    "control_gap": "control gap (the held-out loss with another row's control image, less that with its own)",
    "control_fidelity": "control fidelity of the images drawn last (0 to 1: how well they obey their control images)",
    "versions": "versions",
}
"""Entries of run.json that the card shows -> their titles."""


LOAD_OPTIONS = {"revision": "revision", "variant": "variant", "base_config": "config"}
"""Settings -> what diffusers calls them when it loads the base model."""


def write_model_card(
    output_dir: str | Path,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    title: str | None = None,
    licence: Licence | None = None,
    place: str | None = None,
) -> Path:
    """Write README.md and, from the last validation, `images/`; replace those of an earlier run.

    Args:
        settings: those of the run that differ from their defaults, without secrets; see `changed_settings`.
        facts: entries of run.json; shown are `FIGURES` and control_appeared_at_step, those that are there.
        repo_id: repository of a later push, for the code that loads the model; without it the code loads `output_dir`.
        title: without a repo_id; by default the folder's name.
        licence: of `find_licence`.
        place: path or URI of the folder, for the code; by default `output_dir`.

    Returns:
        The path of README.md.
    """
    from huggingface_hub import ModelCard

    output_dir, licence = Path(output_dir), licence or Licence()
    family = family_of_saved(output_dir)
    shown = {name: value for name, value in settings.items() if name not in names_with("left_out_of_card")}
    card = ModelCard.from_template(
        _metadata(settings, licence, family),
        template_path=str(TEMPLATE),
        name=repo_id or title or (place or str(output_dir.resolve())).rpartition("/")[2],
        base=_link(settings["pretrained_model_name_or_path"]),
        data=_data(settings),
        examples=_copy_examples(output_dir, facts.get("step")),
        single_file=f"{settings['save_name']}{SAFETENSORS}" if settings.get("save_name") else None,
        **_loading(settings, family, repo_id, place or str(output_dir)),
        resolution=settings.get("resolution", DataConfig.resolution),
        of_many_shapes=settings.get("aspect_buckets", DataConfig.aspect_buckets),
        figures={title: facts[name] for name, title in FIGURES.items() if facts.get(name) is not None},
        control_gap=facts.get("control_gap"),
        control_step=facts.get("control_appeared_at_step"),
        settings={name: json.dumps(_without_folders(value), ensure_ascii=False) for name, value in shown.items()},
        licence=licence,
        text=_text,
        code=_code,
        plain=_plain,
        repr=repr,  # makes safe literals of whatever users call their folders and prompts
    )
    with replacing(output_dir / "README.md") as partial:
        card.save(partial)
    return output_dir / "README.md"


def _metadata(settings: Mapping[str, Any], licence: Licence, family: Family) -> ModelCardData:
    """Return the card's head, which the Hub reads."""
    from huggingface_hub import ModelCardData

    base, datasets = settings["pretrained_model_name_or_path"], _datasets(settings)
    return ModelCardData(
        **licence.metadata(),
        library_name="diffusers",
        base_model=base if is_hub_id(base) else None,  # the Hub refuses a card that names a local folder
        datasets=datasets or None,
        tags=[*family.tags, *TAGS],
        inference=True,
    )


def _datasets(settings: Mapping[str, Any]) -> list[str]:
    """Return the ids of the data sets that are on the Hub."""
    return [name for name in dict.fromkeys(named(settings.get("dataset_name"))) if is_hub_id(name)]


def _data(settings: Mapping[str, Any]) -> str:
    """Return the data as the text names them."""
    on_hub = _datasets(settings)
    names = dict.fromkeys([*named(settings.get("train_data_dir")), *named(settings.get("dataset_name"))])
    shown = [_link(name, "datasets/") if name in on_hub else _folder(name) for name in names]
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def _loading(settings: Mapping[str, Any], family: Family, repo_id: str | None, place: str) -> dict[str, Any]:
    """Return the values of the code that loads the models; in a repository it names no folders of this machine."""

    def named(value: Any) -> Any:
        return value if repo_id is None else _without_folders(value)

    base, vae = settings["pretrained_model_name_or_path"], settings.get("pretrained_vae_model_name_or_path")
    return {
        "controlnet_path": repo_id or place,
        "base_path": named(base),
        "vae_path": named(vae),
        "family": family,
        "base_loader": "from_single_file" if is_single_file(base) else "from_pretrained",
        "sampler_options": ZERO_SNR if settings.get("rescale_betas_zero_snr") else {},
        "load_options": {option: named(settings[name]) for name, option in LOAD_OPTIONS.items() if settings.get(name)},
    }


def _copy_examples(output_dir: Path, last_step: int | None) -> list[PairImages]:
    """Copy the grids and control images of the last validation to `images/`, which is uploaded."""
    folder = output_dir / "images"
    for path in folder.glob("pair-*.png"):
        path.unlink()
    examples = []
    for pair in validation.latest(output_dir, last_step):
        if pair.grid.is_file() and pair.control.is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(pair.grid, folder / pair.grid.name)
            shutil.copyfile(pair.control, folder / pair.control.name)
            examples.append(pair)
    return examples


def _without_folders(value: Any) -> Any:
    """Shorten absolute paths and URIs to their last part: somebody's folders and buckets are private."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return _last_part(value) if isinstance(value, str) and (is_uri(value) or Path(value).is_absolute()) else value


def _link(name: str, prefix: str = "") -> str:
    if is_hub_id(name):
        return f"[{_text(name)}](https://huggingface.co/{prefix}{name})"
    return _folder(name)


def _folder(path: str) -> str:
    return _code(_last_part(path))


def _last_part(path: str) -> str:
    return Path(shown_uri(path) if is_uri(path) else path).name


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def _text(text: str) -> str:
    """Escape user text, so that markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~])", r"\\\1", _one_line(text))


def _code(text: str) -> str:
    """Make user text a code span, fenced by more backticks than it holds: nothing in it is markup."""
    text = _one_line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"
