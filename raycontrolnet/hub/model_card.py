"""The README.md of a finished run: what was trained, on what, how to load it, and what it draws."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycontrolnet.config.train_config import TrainConfig, changed_settings, names_with
from raycontrolnet.hub.licence import Licence, is_hub_id
from raycontrolnet.storage.files import replacing
from raycontrolnet.training import validation

TAGS = (
    "stable-diffusion",
    "stable-diffusion-diffusers",
    "text-to-image",
    "diffusers",
    "controlnet",
    "diffusers-training",
)

_FACTS = {
    "step": "updates",
    "samples": "samples",
    "loss": "loss of the last update",
    "val_loss": "held-out loss",
    "control_gap": "control gap (the held-out loss with another row's control image, less that with its own)",
    "control_fidelity": "control fidelity of the images drawn last (0 to 1: how well they obey their control images)",
    "versions": "versions",
}
"""What of a run's status the card shows, and under which name."""


def write_model_card(
    output_dir: str | Path,
    config: TrainConfig,
    facts: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    title: str | None = None,
    licence: Licence | None = None,
) -> Path:
    """Write README.md and, from the last validation, `images/`; replaces those of an earlier run.

    Args:
        facts: what the run came to, such as run.json holds it. Shown are step, samples, loss, val_loss, control_gap,
            control_appeared_at_step, control_fidelity and versions, those that are there.
        repo_id: where it will be pushed, for the code that loads it; without it the code loads `output_dir`.
        title: without a repo_id; by default the folder's name.
        licence: of `find_licence`.

    Returns:
        The path of README.md.
    """
    from huggingface_hub import ModelCard, ModelCardData

    output_dir = Path(output_dir)
    base = config.pretrained_model_name_or_path
    dataset = config.dataset_name if config.dataset_name and is_hub_id(config.dataset_name) else None
    data = _link(dataset, "datasets/") if dataset else _folder(config.dataset_name or config.train_data_dir or "")
    licence = licence or Licence()
    metadata = ModelCardData(
        **licence.metadata(),
        library_name="diffusers",
        base_model=base if is_hub_id(base) else None,  # the Hub refuses a card that names a local folder
        datasets=[dataset] if dataset else None,
        tags=list(TAGS),
        inference=True,
    )
    examples = _copy_examples(output_dir, facts.get("step"))
    name = repo_id or title or output_dir.resolve().name
    sections = [
        f"# {_text(name)}",
        f"A ControlNet for {_link(base)}, trained with raycontrolnet on {data}.",
        *_examples_section(examples),
        "## How to use it",
        f"```python\n{_snippet(output_dir, config, repo_id, examples)}\n```",
        "## Training",
        _facts_list(facts),
        "Settings that differ from their defaults:",
        _settings_list(config),
        "## Licence",
        _licence_text(licence, _link(base)),
    ]
    body = "\n\n".join(section for section in sections if section)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")
    with replacing(output_dir / "README.md") as partial:
        card.save(partial)
    return output_dir / "README.md"


def _copy_examples(output_dir: Path, last_step: int | None) -> list[validation.PairResult]:
    """The last validation, its grids and control images copied to `images/`, which is uploaded."""
    folder = output_dir / "images"
    for path in folder.glob("pair-*.png"):
        path.unlink()
    examples = []
    for result in validation.latest(output_dir, last_step):
        if result.grid.is_file() and result.control.is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(result.grid, folder / result.grid.name)
            shutil.copyfile(result.control, folder / result.control.name)
            examples.append(result)
    return examples


def _examples_section(examples: Sequence[validation.PairResult]) -> list[str]:
    if not examples:
        return []
    pictures = [
        f"{_code(result.prompt) if result.prompt.strip() else 'The empty prompt'}:\n\n"
        f"![control image and results of pair {result.pair}](images/{result.grid.name})"
        for result in examples
    ]
    return ["## Examples", f"After {examples[0].step:,} updates; the control image comes first.", *pictures]


def _snippet(
    output_dir: Path, config: TrainConfig, repo_id: str | None, examples: Sequence[validation.PairResult]
) -> str:
    """Code that draws an image. `repr` makes safe literals of whatever users call their folders and prompts."""
    base = config.pretrained_model_name_or_path
    if repo_id is not None:
        base = _without_folders(base)
    options = "".join(
        f", {name}={value!r}" for name in ("revision", "variant") if (value := getattr(config, name)) is not None
    )
    prompt = examples[0].prompt if examples else "your prompt"
    return f"""\
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UniPCMultistepScheduler
from diffusers.utils import load_image

controlnet = ControlNetModel.from_pretrained({repo_id or str(output_dir)!r})
pipeline = StableDiffusionControlNetPipeline.from_pretrained({base!r}, controlnet=controlnet{options})
pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
# pipeline.to("cuda")

control = load_image("control.png")  # your control image, {config.resolution} x {config.resolution} pixels
image = pipeline({prompt!r}, image=control, num_inference_steps=20).images[0]
image.save("image.png")"""


def _licence_text(licence: Licence, base: str) -> str:
    """Args: base: the base model, as markdown."""
    named = " and ".join(map(_code, licence.ids))
    if licence.name or licence.link:
        name = _text(licence.name or "its text")
        named += f" ([{name}]({licence.link}))" if licence.link else f" ({name})"
    return {
        "settings": f"{named}, chosen for this model. Check that it fits with the licence of the base model, {base}.",
        "base": f"{named}, the licence of the base model, {base}.",
        "default": f"{named}, that of Stable Diffusion 1.x: none was found for the base model, {base}. Check it.",
    }[licence.source]


def _facts_list(facts: Mapping[str, Any]) -> str:
    shown = {title: facts[name] for name, title in _FACTS.items() if facts.get(name) is not None}
    lines = [f"{title}: {_code(_plain(value))}" for title, value in shown.items()]
    if facts.get("control_gap") is not None:
        step = facts.get("control_appeared_at_step")
        lines.append("no control yet" if step is None else f"control appeared at update {_code(_plain(step))}")
    return "\n".join(f"- {line}" for line in lines)


def _settings_list(config: TrainConfig) -> str:
    left_out = names_with("left_out_of_card")
    shown = {name: value for name, value in changed_settings(config).items() if name not in left_out}
    dumped = {name: json.dumps(_without_folders(value), ensure_ascii=False) for name, value in shown.items()}
    return "\n".join(f"- {_code(name)}: {_code(value)}" for name, value in dumped.items())


def _without_folders(value: Any) -> Any:
    """Absolute paths as their last part: where they lie on someone's machine is nobody's business."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _link(name: str, prefix: str = "") -> str:
    if is_hub_id(name):
        return f"[{_text(name)}](https://huggingface.co/{prefix}{name})"
    return _folder(name)


def _folder(path: str) -> str:
    return _code(Path(path).name)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def _text(text: str) -> str:
    """User text as markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~])", r"\\\1", _one_line(text))


def _code(text: str) -> str:
    """User text as a code span, fenced by more backticks than it holds: nothing in it is markup."""
    text = _one_line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"
