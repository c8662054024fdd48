"""Settings: the 52 flags of the contract, every rule with its message, YAML files, and no secret anywhere."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import flags

from raycontrolnet.cli import main, parse
from raycontrolnet.config.checks import with_absolute_paths
from raycontrolnet.config.declare import title
from raycontrolnet.config.settings import LR_SCHEDULERS
from raycontrolnet.config.train_config import GROUPS, TrainConfig, changed_settings, public_settings
from raycontrolnet.config.values import setting_types
from raycontrolnet.config.yaml_words import load_yaml
from raycontrolnet.errors import ConfigError, UserError

# Copied by hand from the existing scripts: names, types and defaults are a contract.
FLAGS: dict[str, dict[str, Any]] = {
    "STR": {
        "pretrained_model_name_or_path": "", "controlnet_model_name_or_path": None, "revision": None, "variant": None,
        "tokenizer_name": None, "output_dir": "controlnet-model", "cache_dir": None, "resume_from_checkpoint": None,
        "lr_scheduler": "constant", "hub_token": None, "hub_model_id": None, "logging_dir": "logs",
        "report_to": "tensorboard", "mixed_precision": None, "tracker_project_name": "train_controlnet",
    },
    "ONE OR MORE STR": {
        "dataset_name": None, "dataset_config_name": None, "train_data_dir": None, "image_column": "image",
        "conditioning_image_column": "conditioning_image", "caption_column": "text",
    },
    "INT": {
        "seed": None, "resolution": 512, "train_batch_size": 4, "num_train_epochs": 1, "max_train_steps": None,
        "checkpointing_steps": 500, "checkpoints_total_limit": None, "gradient_accumulation_steps": 1,
        "lr_warmup_steps": 500, "lr_num_cycles": 1, "dataloader_num_workers": 0, "max_train_samples": None,
        "num_validation_images": 4, "validation_steps": 100,
    },
    "FLAG": {
        "gradient_checkpointing": False, "scale_lr": False, "use_8bit_adam": False, "push_to_hub": False,
        "allow_tf32": False, "enable_xformers_memory_efficient_attention": False, "set_grads_to_none": False,
    },
    "FLOAT": {
        "learning_rate": 5e-06, "lr_power": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01,
        "adam_epsilon": 1e-08, "max_grad_norm": 1.0, "proportion_empty_prompts": 0.0,
    },
    "STRS": {
        "validation_prompt": None, "validation_image": None,
    },
}  # fmt: skip
"""Type -> name -> default."""
OWN_FLAGS: dict[str, dict[str, Any]] = {
    "STR": {
        "num_workers": "1", "accelerator_type": None, "address": None, "cache_latents": "auto",
        "latents_cache_dir": None, "latents_dtype": "float16", "on_bad_sample": "fail", "license": None,
        "on_nan": "fail", "save_precision": "fp32", "save_name": None, "base_config": None,
        "control_fidelity": None, "tracker_group": None, "size_conditioning": "fixed", "loss": "mse",
        "timestep_sampling": None, "crop": "center",
        "optimizer": "torch.optim.AdamW", "cuda_graphs": "auto",
    },
    "VALUES": {
        "optimizer_args": None,
    },
    "BOOL": {
        "use_gpu": None,
    },
    "FLAG": {
        "compile": False, "use_ema": False, "random_flip": False, "rescale_betas_zero_snr": False,
        "aspect_buckets": False,
    },
    "FLOAT": {
        "cpus_per_worker": None, "validation_split": None, "max_bad_fraction": 0.01, "guidance_scale": None,
        "wait_timeout_s": None, "hang_timeout_s": 600.0, "snr_gamma": None, "huber_delta": 0.1, "logit_mean": 0.0,
        "logit_std": 1.0, "high_noise_power": 3.0, "noise_offset": 0.0, "input_perturbation": 0.0,
        "ema_decay": 0.9999,
    },
    "INT": {
        "max_failures": 3, "max_preemption_failures": -1, "latents_batch_size": 4, "max_nan": 10,
    },
    "FLOATS": {
        "data_weights": None,
    },
}  # fmt: skip
XL_FLAGS: dict[str, dict[str, Any]] = {
    "STR": {
        "pretrained_vae_model_name_or_path": None, "image_interpolation_mode": None,
    },
    "INT": {
        "crops_coords_top_left_h": 0, "crops_coords_top_left_w": 0,
    },
}  # fmt: skip
"""Flags that the script for SDXL has besides; there the default of image_interpolation_mode is lanczos."""
KINDS = {name: kind for flags in (FLAGS, XL_FLAGS, OWN_FLAGS) for kind, names in flags.items() for name in names}

Settings = dict[str, Any]
MINIMAL: Settings = {"pretrained_model_name_or_path": "base", "train_data_dir": "data"}
DEFAULTS = {setting.name: setting.default for setting in dataclasses.fields(TrainConfig)}


@pytest.fixture
def image(tmp_path: Path) -> str:
    (tmp_path / "image.png").write_bytes(b"its content is checked later")
    return str(tmp_path / "image.png")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Return write(text), which returns the path of a YAML file."""

    def write(text: str) -> str:
        (tmp_path / "settings.yaml").write_text(text)
        return str(tmp_path / "settings.yaml")

    return write


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**MINIMAL | settings)


def problems(**settings: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        config(**settings)
    return error.value.problems


def parsed(*flags: str) -> TrainConfig:
    found = parse("train", flags)
    assert isinstance(found, TrainConfig)
    return found


# --- the flags ---


def test_there_are_52_flags_and_our_own() -> None:
    assert sum(map(len, FLAGS.values())) == 52
    assert sum(map(len, XL_FLAGS.values())) == 4
    assert KINDS.keys() == DEFAULTS.keys()


def test_defaults() -> None:
    types = {"STR": str, "ONE OR MORE STR": str, "INT": int, "FLOAT": float, "FLAG": bool}
    for kind, names in [*FLAGS.items(), *XL_FLAGS.items(), *OWN_FLAGS.items()]:
        assert {name: DEFAULTS[name] for name in names} == names
        assert {type(DEFAULTS[name]) for name in names} <= {types.get(kind), type(None)}


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flag is shown with its type, its docstring and its default, each group with its title."""
    monkeypatch.setenv("COLUMNS", "100")  # in a wider terminal, tyro sets the groups side by side
    with redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]|-{5,}", " ", shown.getvalue()).split())
    docstrings = field_docstrings()
    assert docstrings.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        default = DEFAULTS[name]
        texts = {"STR": "STR", "STRS": "STR [STR ...]", "FLAG": f", --no_{name}", "BOOL": "{None,True,False}"}
        texts["VALUES"] = "NAME=VALUE [NAME=VALUE ...]"
        texts |= {"ONE OR MORE STR": "STR [STR ...]", "FLOATS": "FLOAT [FLOAT ...]"}
        type_text = texts.get(kind, kind if default is not None else f"{{None}}|{kind}")
        default_text = repr(default) if default == "" else default
        separator = "" if kind == "FLAG" else " "
        assert f"--{name}{separator}{type_text} {docstrings[name]} (default: {default_text})" in text
        assert len(docstrings[name].split()) >= 2
    missing = [group for group in GROUPS if f"{title(group).lower()} options {group.__doc__} --" not in text]
    assert missing == [], text


@pytest.mark.parametrize("name", ["hub_model_id", "revision", "cache_dir", "tracker_group", "variant"])
def test_none_is_a_text_like_any_other(name: str, tmp_path: Path) -> None:
    required = ("--pretrained_model_name_or_path", "b", "--train_data_dir", "d")
    (tmp_path / "control.png").touch()
    pair = ("--validation_prompt", "None", "--validation_image", str(tmp_path / "control.png"))
    given = parsed(*required, f"--{name}", "None", *pair, "--seed", "None")
    assert getattr(given, name) == "None"
    assert (given.validation_prompt, given.seed) == (("None",), None)
    assert getattr(parsed(*required), name) is None
    file = tmp_path / "c.yaml"
    file.write_text(f"{name}: of the file\n")
    assert getattr(parsed(*required, "--config", str(file)), name) == "of the file"


def field_docstrings() -> dict[str, str]:
    """Return setting name -> docstring below it, from the source of the groups."""
    files = {Path(str(sys.modules[group.__module__].__file__)) for group in GROUPS}
    found = {}
    for node in [node for file in files for node in ast.parse(file.read_text()).body]:
        if isinstance(node, ast.ClassDef) and node.name in {group.__name__ for group in GROUPS}:
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(field.target, ast.Name)
                    assert isinstance(below, ast.Expr)
                    assert isinstance(below.value, ast.Constant)
                    found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def other_values(image: str) -> Settings:
    """Return a value for every setting, different from its default and, except for switches, from the others'."""
    kinds: dict[str, Callable[[int], Any]] = {
        "STR": lambda index: f"a b{index}",
        "ONE OR MORE STR": lambda index: f"a b{index}",
        "STRS": lambda index: (f"a b{index}", "c"),
        "FLOATS": lambda index: (0.5, float(index)),
        "INT": lambda index: 24 + index,
        "FLOAT": lambda index: 0.25 + index / 1000,
        "FLAG": bool,  # in place of which comes the other of both
        "BOOL": lambda _: True,
        "VALUES": lambda index: f"seed={index} amsgrad=true",
    }
    own = {
        "lr_scheduler": "cosine", "mixed_precision": "bf16", "report_to": "wandb", "num_workers": "2:4",
        "cache_latents": "on", "latents_dtype": "float32", "on_bad_sample": "skip", "on_nan": "skip",
        "license": "openrail++", "image_interpolation_mode": "lanczos", "size_conditioning": "real",
        "save_precision": "bf16", "save_name": "edges", "loss": "huber", "timestep_sampling": "logit_normal",
        "high_noise_power": 2.5, "optimizer": "torch.optim.RAdam", "crop": "random",
        "control_fidelity": "shape", "validation_image": (image, image), "resolution": 256, "cuda_graphs": "on",
    }  # fmt: skip
    own |= {name: not DEFAULTS[name] for name, kind in KINDS.items() if kind == "FLAG"}
    values = {name: own.get(name, kinds[kind](index)) for index, (name, kind) in enumerate(KINDS.items())}
    assert all(value != DEFAULTS[name] for name, value in values.items())
    return values


@pytest.mark.parametrize("form", ["words", "equals", "yaml", "python"])
@pytest.mark.parametrize(
    "without",
    [
        ("train_data_dir", "data_weights", "compile", "optimizer"),
        (
            "dataset_name",
            "dataset_config_name",
            "data_weights",
            "enable_xformers_memory_efficient_attention",
            "use_8bit_adam",
            "adam_beta1",
            "adam_beta2",
            "adam_weight_decay",
            "adam_epsilon",
        ),
    ],
)
def test_settings_arrive(form: str, without: tuple[str, ...], image: str, file: Callable[[str], str]) -> None:
    """By `--name value`, `--name=value`, YAML and Python: one name and one value."""
    values = {name: value for name, value in other_values(image).items() if name not in without}
    if form == "python":
        found = TrainConfig(**values)
    elif form == "yaml":
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        found = parsed("--config", file(yaml.safe_dump(plain)))
    else:
        argv = []
        for name, value in values.items():
            words = [] if KINDS[name] == "FLAG" else [str(v) for v in (value if isinstance(value, tuple) else [value])]
            joined = form == "equals" and len(words) == 1
            flag = f"--no_{name}" if value is False else f"--{name}"
            argv += [f"{flag}={words[0]}"] if joined else [flag, *words]
        found = parsed(*argv)
    for name, value in values.items():
        assert getattr(found, name) == value
        assert type(getattr(found, name)) is type(value)


def test_what_makes_no_sense_here_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("enable_npu_flash_attention: true\n")
    message = f"--config={file}: enable_npu_flash_attention: is for Ascend NPUs, on which raycontrolnet does not run"
    with pytest.raises(ConfigError) as refused:
        parse("train", ["--config", str(file)])
    assert str(refused.value) == f"{message}; leave it out"


@pytest.mark.parametrize("argument", ["--enable_npu_flash_attention", "--enable-npu-flash-attention", "--enable_npu"])
def test_flags_that_make_no_sense_here(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script for SDXL has one."""
    assert main(["train", *flags(MINIMAL), argument]) == 2
    message = "--enable_npu_flash_attention: is for Ascend NPUs, on which raycontrolnet does not run; leave it out"
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "FLAG"])
def test_a_switch_turns_itself_alone(name: str) -> None:
    default = DEFAULTS[name]
    turned = f"--no_{name}" if default else f"--{name}"
    assert changed_settings(parsed(*flags(MINIMAL), turned)) == MINIMAL | {name: not default}


# --- the rules ---

LICENCES = "https://hf.co/docs/hub/repositories-licenses"
RULES: dict[str, list[tuple[str, Any]]] = {
    "needs --dataset_name": [("dataset_config_name", "c")],
    "must be in [0, 1]": [
        ("proportion_empty_prompts", 1.5), ("proportion_empty_prompts", -0.1), ("max_bad_fraction", 2),
    ],
    "must be one of auto, on, off": [("cache_latents", "yes"), ("cuda_graphs", "yes")],
    "must be one of float16, float32": [("latents_dtype", "half")],
    "must be one of fixed, real": [("size_conditioning", "own")],
    "must be one of nearest, nearest_exact, bilinear, bicubic, box, hamming, lanczos; perhaps you meant lanczos": [
        ("image_interpolation_mode", "lanczo"),
    ],
    "must be one of fp32, fp16, bf16": [("save_precision", "half")],
    "must be one of fail, skip": [("on_bad_sample", "drop"), ("on_nan", "stop")],
    "must be a fraction below 1, a count of at least 2, or 0 for none": [
        ("validation_split", -0.1), ("validation_split", 1), ("validation_split", 2.5),
    ],
    "must be at least 1": [
        ("latents_batch_size", 0), ("max_nan", 0),
        ("max_train_samples", 0), ("train_batch_size", 0), ("num_train_epochs", 0),
        ("max_train_steps", 0), ("gradient_accumulation_steps", 0), ("lr_num_cycles", 0), ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0), ("num_validation_images", 0), ("validation_steps", 0),
    ],
    "must be divisible by 8; use 496 or 504": [("resolution", 500)],
    "must be divisible by 8; use 8": [("resolution", 7), ("resolution", 0), ("resolution", -8)],
    "must be one of linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup; perhaps"
    " you meant cosine": [
        ("lr_scheduler", "cosin"),
    ],
    "must be one of no, fp16, bf16": [("mixed_precision", "int4")],
    "must be one of no, fp16, bf16; perhaps you meant fp16": [("mixed_precision", "fp61")],
    "must be one of tensorboard, wandb, comet_ml, all, none, or several with commas": [
        ("report_to", "wandb,tensorbord"),
    ],
    "must be in [0, 1)": [("adam_beta1", 1.0), ("adam_beta2", -0.5), ("ema_decay", 1.0)],
    "must be above 0": [("max_grad_norm", 0.0), ("cpus_per_worker", 0)],
    "must be one of mse, huber; perhaps you meant huber": [("loss", "hubert")],
    "must be one of uniform, logit_normal, high_noise; perhaps you meant logit_normal": [
        ("timestep_sampling", "logitnormal"),
    ],
    "must be in [1e-06, 1e+06]": [("huber_delta", 0.0), ("huber_delta", -0.1), ("huber_delta", 1e7)],
    "must be a number above 0": [
        ("snr_gamma", 0.0), ("snr_gamma", -5.0), ("snr_gamma", float("inf")), ("logit_std", 0.0), ("logit_std", -1.0),
    ],
    "must be a number of at least 0": [
        ("noise_offset", -0.1), ("noise_offset", float("inf")), ("input_perturbation", -0.1),
        ("input_perturbation", float("inf")),
    ],
    "must be a finite number": [("logit_mean", float("inf")), ("logit_mean", -float("inf"))],
    "must be a number of at least 1; 1 is uniform": [("high_noise_power", 0.5), ("high_noise_power", float("inf"))],
    "must be in [0, 2**63)": [("seed", -1), ("seed", 2**63)],
    "names a whole bucket; name a folder in it": [("output_dir", "s3://bucket"), ("output_dir", "gs://bucket/")],
    f"must be one of the Hub's short names, such as apache-2.0 ({LICENCES})": [
        ("license", "MIT Licence"), ("license", "LICENSE.md"),
    ],
    "must be a number, or MIN:MAX": [("num_workers", "two"), ("num_workers", "1:x")],
    "must be 0 or more, or MIN:MAX with 1 <= MIN <= MAX": [
        ("num_workers", "-1"), ("num_workers", "4:2"), ("num_workers", "0:2"),
    ],
    "must be at least 0": [
        ("lr_warmup_steps", -1), ("max_failures", -1), ("dataloader_num_workers", -1), ("learning_rate", -1),
        ("adam_weight_decay", -1), ("adam_epsilon", -1),
        ("crops_coords_top_left_h", -1), ("crops_coords_top_left_w", -8),
    ],
}  # fmt: skip
"""Rule -> (setting, value) that breaks it."""
NOT_SENT = ", a folder of an object store, and its files would not be sent there; name a folder in it, such as logs"
SEVERAL_NUMBERS = "must be several numbers: in a file a list, as [1, 3]; as a flag with spaces, as 1 3"
OTHER_RULES: list[tuple[Settings, str]] = [
    ({"train_data_dir": None}, "--train_data_dir, --dataset_name: give one of them (neither is given)"),
    (
        {"train_data_dir": ("a", "b"), "dataset_name": "c", "caption_column": ("one", "two")},
        "--caption_column=one two: 2 for 3 sources; give one for all, or one for each",
    ),
    ({"image_column": ["one", "two"]}, "--image_column=one two: 2 for 1 source; give one for all, or one for each"),
    (
        {"dataset_name": ("a", "b"), "dataset_config_name": ("x", "y", "z")},
        "--dataset_config_name=x y z: 3 for 2 sources of --dataset_name; give one for all, or one for each",
    ),
    ({"data_weights": (1,)}, "--data_weights 1: needs several sources, of --train_data_dir or --dataset_name"),
    (
        {"dataset_name": "d", "data_weights": (1, 2, 0.5)},
        "--data_weights 1 2 0.5: 3 for 2 sources; give one for each, first for --train_data_dir",
    ),
    *(
        (
            {"dataset_name": "d", "data_weights": (1, weight)},
            f"--data_weights 1 {weight}: must be finite numbers above 0; leave out a source that is not to be used",
        )
        for weight in (0, -1, "inf")
    ),
    ({"dataset_name": "d", "data_weights": (1, "nan")}, "--data_weights=(1, 'nan'): must be finite numbers"),
    ({"dataset_name": "d", "data_weights": ("1", "two")}, "--data_weights 1 two: must be finite numbers"),
    *(
        ({"dataset_name": "d", "data_weights": weights}, f"--data_weights{shown}: {SEVERAL_NUMBERS}")
        for weights, shown in (("1 3", "='1 3'"), ("1,3", "='1,3'"), (("1,3",), " 1,3"), (["1, 3"], "=['1, 3']"))
    ),
    (
        {"pretrained_model_name_or_path": ""},
        "--pretrained_model_name_or_path: required; a local folder or a Hub id of a Stable Diffusion model",
    ),
    (
        {"latents_cache_dir": ""},
        "--latents_cache_dir: has no value; name a folder, or leave it out for the default one",
    ),
    (
        {"latents_cache_dir": "s3://id:key@bucket/x"},
        "--latents_cache_dir: leave keys and tokens out of the URI; put them into the machines' environment",
    ),
    (
        {"latents_cache_dir": "abfss://box@account.dfs.core.windows.net/x?sas_token=abc"},
        "--latents_cache_dir: leave keys and tokens out of the URI; put them into the machines' environment",
    ),
    (
        {"train_data_dir": "s3://id:key@bucket/x"},
        "--train_data_dir: leave keys and tokens out of the URI; put them into the machines' environment",
    ),
    (
        {"train_data_dir": None, "dataset_name": "s3://bucket/x?endpoint_override=id:key@host"},
        "--dataset_name: leave keys and tokens out of the URI; put them into the machines' environment",
    ),
    (
        {"cache_latents": "off", "on_bad_sample": "skip"},
        "--on_bad_sample=skip: bad samples are found when latents are cached; leave out --cache_latents=off",
    ),
    ({"validation_prompt": "red"}, "--validation_image: required with --validation_prompt"),
    (
        {"control_fidelity": "canny"},
        (
            "--control_fidelity=canny: there are no validation images to score; "
            "add --validation_prompt and --validation_image"
        ),
    ),
    ({"train_batch_size": 2**63}, f"--train_batch_size={2**63}: must be below 2**63"),
    ({"output_dir": ""}, "--output_dir: has no value; name a folder"),
    (
        {"logging_dir": "s3://id:key@bucket/l"},
        "--logging_dir=s3://bucket/l: must be a folder in --output_dir, not a URI; name a folder in it, such as logs",
    ),
    *(
        ({"output_dir": "s3://bucket/run", "logging_dir": given}, f"--logging_dir={given}: {problem}{NOT_SENT}")
        for given, problem in (
            ("/data/logs", "is not in --output_dir"),
            ("../logs", "is not in --output_dir"),
            ("logs/../..", "is not in --output_dir"),
            ("./", "is --output_dir itself"),
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "value", "rule"), [(*broken, rule) for rule, examples in RULES.items() for broken in examples]
)
def test_a_rule(name: str, value: Any, rule: str) -> None:
    shown = float(value) if KINDS[name] == "FLOAT" else value
    assert problems(**{name: value}) == (f"--{name}={shown}: {rule}",)


@pytest.mark.parametrize(("settings", "message"), OTHER_RULES)
def test_other_rules(settings: Settings, message: str) -> None:
    assert problems(**settings) == (message,)


def test_rules_about_files(image: str, tmp_path: Path) -> None:
    assert problems(validation_image=image) == ("--validation_prompt: required with --validation_image",)
    assert problems(validation_prompt=["a", "b"], validation_image=[image] * 3) == (
        "--validation_prompt, --validation_image: 2 prompts and 3 images; give equal counts, or a single one of either",
    )
    assert problems(validation_prompt="a", validation_image=image, control_fidelity="shapes") == (
        "--control_fidelity=shapes: must be one of shape, canny; perhaps you meant shape",
    )
    assert problems(output_dir=image) == (f"--output_dir={image}: is a file; name a folder",)
    missing = [str(tmp_path), str(tmp_path / "gone.png")]
    assert problems(validation_prompt="a", validation_image=missing) == (
        f"--validation_image={missing[0]}: is a folder; name a file in it",
        f"--validation_image={missing[1]}: no such file",
    )


@pytest.mark.parametrize(
    ("path", "uri"),
    [("s3:/bucket/x", "s3://bucket/x"), ("gs//b/x", "gs://b/x"), ("S3:/b/x", "s3://b/x"), ("hdfs:x/y", "hdfs://x/y")],
)
def test_a_uri_with_a_slip(path: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name would be written to; one that is there may be meant."""
    said = f"{path}: is no URI; perhaps you meant {uri}, or ./{path}"
    assert problems(output_dir=path) == (f"--output_dir={said}",)
    with pytest.raises(ConfigError, match=f"^--train_data_dir={re.escape(said)}$"):
        with_absolute_paths(config(train_data_dir=path))
    monkeypatch.chdir(tmp_path)
    Path(path).mkdir(parents=True)
    assert config(output_dir=path).output_dir == path
    for other in ("s3/x", "a//b", "run:1", f"./{path}", "c:/x", str(tmp_path / "s3:" / "x")):
        config(output_dir=other)


@pytest.mark.parametrize(("prompts", "images", "pairs"), [(2, 2, 2), (1, 3, 3), (3, 1, 3), (1, 1, 1), (0, 0, 0)])
def test_validation_pairs(prompts: int, images: int, pairs: int, tmp_path: Path) -> None:
    """A single one is reused; equal counts go together."""
    paths = [str(tmp_path / f"{i}.png") for i in range(images)]
    for path in paths:
        Path(path).write_bytes(b"")
    texts = [f"prompt {i}" for i in range(prompts)]
    found = config(validation_prompt=texts or None, validation_image=paths or None).validation_pairs
    assert len(found) == pairs
    assert found == tuple((texts[min(i, prompts - 1)], paths[min(i, images - 1)]) for i in range(pairs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": "big"}, "--resolution='big': must be a whole number"),
        ({"resolution": 512.0}, "--resolution=512.0: must be a whole number"),
        ({"seed": True}, "--seed=True: must be a whole number"),
        ({"learning_rate": "fast"}, "--learning_rate='fast': must be a number"),
        ({"learning_rate": float("nan")}, "--learning_rate=nan: must be a number"),
        ({"max_grad_norm": "nan"}, "--max_grad_norm='nan': must be a number"),
        ({"snr_gamma": float("nan")}, "--snr_gamma=nan: must be a number"),
        ({"huber_delta": "nan"}, "--huber_delta='nan': must be a number"),
        ({"noise_offset": "NaN"}, "--noise_offset='NaN': must be a number"),
        ({"learning_rate": True}, "--learning_rate=True: must be a number"),
        ({"scale_lr": "yes"}, "--scale_lr='yes': must be true or false"),
        ({"scale_lr": 1}, "--scale_lr=1: must be true or false"),
        ({"output_dir": ["a"]}, "--output_dir=['a']: must be a text"),
        ({"validation_prompt": [1]}, "--validation_prompt=[1]: must be a text or a list of texts"),
        ({"hub_token": ["hf_ShownNowhere"]}, "--hub_token: must be a text"),
    ],
)
def test_a_wrong_type(settings: Settings, message: str) -> None:
    assert problems(**settings) == (message,)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resolution", "a whole number"), ("seed", "a whole number"), ("learning_rate", "a number"),
        ("snr_gamma", "a number"), ("scale_lr", "true or false"), ("use_gpu", "true or false"),
        ("data_weights", "a number"), ("output_dir", "a text"), ("crop", "a text"), ("image_column", "a text"),
    ],
)  # fmt: skip
def test_no_value(name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Null, or an empty text where there is no such value; what is optional may be null."""
    file, optional = tmp_path / "run.yaml", getattr(TrainConfig, name) is None
    for given in ("", '""', '" "'):
        if (given and words == "a text") or (not given and optional):
            continue
        file.write_text(f"{name}: {given}\n")
        with pytest.raises(ConfigError) as error:
            parse("train", [*flags(MINIMAL), "--config", str(file)])
        assert str(error.value) == f"--config={file}: {name}: has no value; give {words}, or leave it out"
    for value in (None, "", " "):
        if (value is None and optional) or (value is not None and words == "a text"):
            continue
        assert problems(**{name: value}) == (f"--{name}: has no value; give {words}, or leave it out",)
    if words.endswith("number") and name != "data_weights":
        with pytest.raises(SystemExit, match="2"):
            parse("train", [*flags(MINIMAL), f"--{name}", ""])
        said = " ".join(capsys.readouterr().err.replace("│", "").split())
        assert f"Error parsing --{name}: has no value; give {words}, or leave it out" in said


def test_an_optional_setting_may_be_null(tmp_path: Path) -> None:
    optional = [
        name for name in setting_types(TrainConfig) if getattr(TrainConfig, name) is None and name not in MINIMAL
    ]
    assert len(optional) > 20
    (tmp_path / "run.yaml").write_text("".join(f"{name}:\n" for name in optional))
    found = parse("train", [*flags(MINIMAL), "--config", str(tmp_path / "run.yaml")])
    assert all(getattr(found, name) is None for name in optional)


def test_empty_texts() -> None:
    """Only a prompt, a token and arguments may be; what no rule of its own names is named."""
    may_be = {"hub_token", "optimizer_args"}
    for name in [
        name
        for name, kind in setting_types(TrainConfig).items()
        if kind in (str, str | None, str | tuple[str, ...] | None)
    ]:
        if name not in {*may_be, "pretrained_model_name_or_path"}:
            found = problems(**{name: ""})
            assert any(line.startswith((f"--{name}: has no value; ", f"--{name}=: needs ")) for line in found), name
    assert config(**dict.fromkeys(may_be, "")).hub_token == ""
    two = {"train_data_dir": ("a", "b"), "image_column": ("image", " ")}
    assert problems(**two) == ("--image_column: has no value; give one, or leave it out",)
    assert problems(crop="") == ("--crop: has no value; must be one of center, top, random",)


def test_all_problems_at_once() -> None:
    found = problems(
        pretrained_model_name_or_path="", train_data_dir=None, resolution=500, proportion_empty_prompts=2,
        lr_scheduler="x", train_batch_size=0, checkpointing_steps=0, num_workers="x", validation_prompt="p",
        mixed_precision="x", report_to="x",
    )  # fmt: skip
    assert len(found) == 11
    with pytest.raises(ConfigError) as error:
        config(resolution=500, seed=-1)
    assert str(error.value).splitlines() == list(error.value.problems)
    assert len(problems(resolution="x", learning_rate="y", scale_lr="z")) == 3
    assert isinstance(error.value, UserError)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"proportion_empty_prompts": 0}, {"proportion_empty_prompts": 1}, {"resolution": 8}, {"lr_warmup_steps": 0},
        {"learning_rate": 0}, {"max_grad_norm": float("inf")}, {"seed": 0}, {"seed": 2**63 - 1}, {"adam_beta1": 0},
        {"report_to": "all"}, {"report_to": "none"}, {"report_to": "wandb, comet_ml"}, {"num_workers": 0},
        {"num_workers": "0"}, {"num_workers": "1:4"}, {"num_workers": "3:3"}, {"max_failures": 0},
        {"train_data_dir": None, "dataset_name": "a/b", "dataset_config_name": "c"}, {"mixed_precision": None},
        *({"mixed_precision": name} for name in ("no", "fp16", "bf16")),
        *({"lr_scheduler": name} for name in LR_SCHEDULERS),
    ],
)  # fmt: skip
def test_what_is_allowed(settings: Settings) -> None:
    found = config(**settings)
    for name, value in settings.items():
        assert getattr(found, name) == (str(value) if name == "num_workers" else value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().seed = 1  # type: ignore[misc]
    with pytest.raises(ConfigError, match="resolution"):
        dataclasses.replace(config(), resolution=9)
    with pytest.raises(TypeError, match="lerning_rate"):
        config(lerning_rate=1.0)


def test_trackers_and_workers() -> None:
    assert config(report_to="none").trackers == ()
    assert config(report_to="wandb, comet_ml").trackers == ("wandb", "comet_ml")
    assert config(report_to="all").trackers == ("tensorboard", "wandb", "comet_ml")
    assert config().worker_range == (1, 1)
    assert config(num_workers="2:8").worker_range == (2, 8)


# --- YAML ---


def test_yaml_and_flags(file: Callable[[str], str], image: str) -> None:
    """The same names; YAML 1.1's texts for numbers; flags override the file, which overrides the defaults."""
    path = file(
        f"pretrained_model_name_or_path: base\ntrain_data_dir: data\nlearning_rate: 1e-5\nadam_epsilon: 1\n"
        f"resolution: 64\nvalidation_prompt: red circle\nvalidation_image: [{image}, {image}]\nscale_lr: true\n"
        "num_workers: 2\nseed:\n"
    )
    found = parsed("--config", path, "--resolution", "128", "--no_scale_lr")
    assert (found.learning_rate, found.adam_epsilon, type(found.adam_epsilon)) == (1e-5, 1.0, float)
    assert (found.resolution, found.scale_lr, found.num_workers, found.seed) == (128, False, "2", None)
    assert found.validation_pairs == (("red circle", image), ("red circle", image))
    assert found.train_batch_size == 4
    again = parsed(f"--config={path}")
    assert (again.resolution, again.scale_lr) == (64, True)
    assert again == TrainConfig(**yaml.safe_load(Path(path).read_text()))


def test_words_that_yaml_takes_for_booleans(file: Callable[[str], str]) -> None:
    """As they were written for a setting that is a text, booleans for a switch and in an optimizer's arguments."""
    start = "pretrained_model_name_or_path: base\ntrain_data_dir: [no, 'on']\n"
    found = parsed("--config", file(f"{start}mixed_precision: no\ncache_latents: off\nrandom_flip: yes\nuse_gpu: No\n"))
    assert (found.mixed_precision, found.cache_latents, found.random_flip, found.use_gpu) == ("no", "off", True, False)
    assert found.train_data_dir == ("no", "on")
    assert yaml.safe_load(yaml.safe_dump(public_settings(found)))["mixed_precision"] == "no"
    text = f"{start}cache_latents: on\noptimizer: torch.optim.NAdam\noptimizer_args: {{foreach: off, x: {{y: 'on'}}}}\n"
    found = parsed("--config", file(text))
    assert (found.cache_latents, found.optimizer_args) == ("on", 'foreach=false x={"y": "on"}')
    for text, message in {
        "mixed_precision: off": "--mixed_precision=off: must be one of no, fp16, bf16",
        "cache_latents: true": "--cache_latents=true: must be one of auto, on, off",
        "cache_latents: No": "--cache_latents=No: must be one of auto, on, off",
        "resolution: on": "resolution: 'on' must be a whole number",
        "learning_rate: false": "learning_rate: 'false' must be a number",
        "random_flip: !!bool 3": "random_flip: '3' must be true or false",
        "random_flip: 'yes'": "random_flip: 'yes' must be true or false",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parsed("--config", file(start + text))


def test_merges_of_yaml_are_no_keys_there_twice() -> None:
    """Each key of a merge may be given again, and there may be several merges."""
    merged = "a: &a {eps: 1}\nb: &b {<<: *a, eps: 2}\nc: {<<: *a, <<: *b}\nd: {<<: *b, eps: 3}\n"
    assert load_yaml(merged) == {"a": {"eps": 1}, "b": {"eps": 2}, "c": {"eps": 2}, "d": {"eps": 3}}


TABS = (
    "is not valid YAML (while scanning for the next token found character '\\t' that cannot start any token in "
    '"<unicode string>", line 2, column 1: seed: 3 ^); indent with spaces, not tabs'
)


def test_config_yaml_can_be_read_again(file: Callable[[str], str], image: str) -> None:
    """--config reads what a run writes."""
    given = config(learning_rate=3e-7, validation_prompt=["a", "b"], validation_image=image, seed=2**62)
    path = file(yaml.safe_dump(public_settings(given), sort_keys=False))
    assert parsed("--config", path) == given


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("a: [1\n", ["is not valid YAML"]),
        ("resolution: 64\n\tseed: 3\n", [TABS]),
        ("seed: 1\nresolution: 64\nseed: 2\n", ["is not valid YAML (seed is there twice, in lines 1 and 3; keep one)"]),
        ("optimizer_args: {eps: 1, eps: 2}\n", ["is not valid YAML (eps is there twice, in line 1; keep one)"]),
        ("- learning_rate\n", ["must be a list of `setting: value` lines"]),
        ("learning_rate\n", ["must be a list of `setting: value` lines"]),
        ("learning_rate: fast\n", ["learning_rate: 'fast' must be a number"]),
        ("data_weights: 1 3\n", [f"data_weights: '1 3' {SEVERAL_NUMBERS}"]),
        ("data_weights: [a, 3]\n", ["data_weights: ['a', 3] must be finite numbers"]),
        ("learning_rate: [1]\n", ["learning_rate: [1] must be a number"]),
        ("scale_lr: 'true'\n", ["scale_lr: 'true' must be true or false"]),
        ("3: 4", ["unknown setting 3; raycontrolnet train --help lists the settings"]),
        (
            "lerning_rate: 1\nresolution: x\nfoo: 2\nhub_token: [hf_ShownNowhere]\n",
            [
                "unknown setting lerning_rate; perhaps you meant learning_rate",
                "unknown setting foo; raycontrolnet train --help lists the settings",
                "resolution: 'x' must be a whole number",
                "hub_token: must be a text",
            ],
        ),
    ],
)
def test_a_bad_file(text: str, messages: list[str], file: Callable[[str], str]) -> None:
    """All problems are found at once."""
    path = file(text)
    with pytest.raises(ConfigError) as error:
        parsed("--config", path, *flags(MINIMAL))
    found = [problem.partition(" (while parsing")[0] for problem in error.value.problems]
    assert found == [f"--config={path}: {message}" for message in messages]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    for path, reason in (
        (tmp_path / "gone.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary.yaml", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ):
        with pytest.raises(ConfigError) as error:
            parsed("--config", str(path))
        assert error.value.problems == (f"--config={path}: cannot be read ({reason})",)


def test_an_empty_file_is_no_settings(file: Callable[[str], str]) -> None:
    assert parsed("--config", file("# nothing\n"), *flags(MINIMAL)) == config()


# --- secrets ---


def test_the_token_is_shown_nowhere() -> None:
    """Tests in test_secrets.py look at what a run leaves."""
    secret = "hf_ShownNowhere"
    given = config(hub_token=secret)
    assert given.hub_token == secret
    assert secret not in repr(given) + str(given)
    assert "hub_token" not in public_settings(given)
    assert secret not in str(public_settings(given)) + str(changed_settings(given))
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(given, resolution=9, seed=-1)
    assert secret not in str(error.value)


def test_public_and_changed_settings() -> None:
    given = config(seed=3)
    assert public_settings(given).keys() == KINDS.keys() - {"hub_token"}
    assert changed_settings(given) == MINIMAL | {"seed": 3}


@pytest.mark.parametrize(
    ("output_dir", "logging_dir", "pattern"),
    [
        ("s3://bucket/run", "./tracks/../logs/", "logs/*"),
        ("s3://bucket/run", "..logs", "..logs/*"),
        ("run", "/data/logs", "/data/logs/*"),  # on a disk they may be anywhere
        ("run", "../logs", "../logs/*"),
    ],
)
def test_folders_for_logs(output_dir: str, logging_dir: str, pattern: str) -> None:
    config = TrainConfig(
        pretrained_model_name_or_path="a/b", train_data_dir="d", output_dir=output_dir, logging_dir=logging_dir
    )
    assert config.logging_pattern == pattern
