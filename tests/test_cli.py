"""The command line: exit codes, messages for every kind of bad input, and never a traceback."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from runs import flags

from raycontrolnet import cli, signals, train_controlnet
from raycontrolnet.cli import main, parse
from raycontrolnet.cluster.cpus import SPINS
from raycontrolnet.config.foreign_flags import ADVICE
from raycontrolnet.config.values import setting_types
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch import fit as launch_fit
from raycontrolnet.version import __version__

Settings = dict[str, Any]


class Answer(NamedTuple):
    code: str | int | None
    out: str
    err: str

    @property
    def said(self) -> str:
        """Standard error in one line, without frames."""
        return " ".join(self.err.replace("│", " ").split())


Ask = Callable[..., Answer]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Return ask(*argv), which runs the command line in this process."""

    def ask(*argv: str) -> Answer:
        capsys.readouterr()
        code: str | int | None
        try:
            code = main(argv)
        except SystemExit as stop:  # from tyro
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Answer(code, out, err)

    return ask


def run(*arguments: str, **options: Any) -> Answer:
    """Run the command line as a user's shell does."""
    environment = os.environ | {"COLUMNS": "100"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment, **options)
    assert "Traceback" not in done.stdout + done.stderr
    return Answer(done.returncode, done.stdout, done.stderr)


# --- help and names ---


def test_help_and_version(ask: Ask) -> None:
    for argv in ([], ["--help"], ["-h"], ["help"]):
        answer = ask(*argv)
        assert (answer.code, answer.err) == (0, "")
        assert "raycontrolnet train" in answer.out
        assert "raycontrolnet demo" in answer.out
    assert ask("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_commands(command: str, ask: Ask) -> None:
    """It names every setting."""
    answer = ask(command, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"usage: raycontrolnet {command} ")
    names = [name for group in cli.COMMANDS[command].groups for name in setting_types(group)]
    assert len(names) >= 10
    assert [name for name in names if f"--{name}" not in answer.out] == []
    trains = command not in ("condition", "generate")
    assert ("--learning_rate" in answer.out) == ("--config FILE.yaml" in answer.out) == trains


def test_the_console_script_is_the_command() -> None:
    script = Path(sys.executable).with_name("raycontrolnet")
    if not script.exists():
        pytest.skip("raycontrolnet is not installed as a package here")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{__version__}\n"


@pytest.mark.parametrize("arguments", [("--help",), ("tune", "--help")])
def test_nobody_reads_the_output(arguments: tuple[str, ...]) -> None:
    """As in `raycontrolnet --help | true`."""
    command = [sys.executable, "-m", "raycontrolnet", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, "")


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}], ids=str)
def test_threads_that_wait_soon_sleep_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]
) -> None:
    """Before torch is imported; in a user's Python, nothing is changed."""
    monkeypatch.setattr(os, "environ", chosen.copy())
    monkeypatch.setattr(sys, "argv", ["raycontrolnet", "--version"])
    assert main(["--version"]) == 0
    assert os.environ == chosen
    assert main() == 0
    assert os.environ == (chosen or SPINS)


@pytest.mark.parametrize("arguments", [(), ("train",), ("condition",), ("generate",)])
def test_help_answers_at_once(arguments: tuple[str, ...]) -> None:
    """The limit is 1 s on a free machine (the median of three); here there is room for a busy one."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        answer = run("raycontrolnet", *arguments, "--help")
        seconds.append(time.perf_counter() - start)
        assert answer.code == 0
    print(f"raycontrolnet {' '.join(arguments)} --help: {statistics.median(seconds):.2f} s")
    assert statistics.median(seconds) < 2.5
    if arguments == ("train",):
        assert answer == run("raycontrolnet.train", "--help")
        assert len(answer.out.splitlines()) > 100


# --- bad input: exit code 2 ---


def test_an_unknown_command(ask: Ask) -> None:
    answer = ask("trian")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("trian: no such command; perhaps you meant train\n")
    assert "raycontrolnet train" in answer.err
    assert ask("--learning_rate", "1").code == 2


def test_an_unknown_flag(ask: Ask) -> None:
    answer = ask("train", "--lerning_rate", "3")
    assert answer.code == 2
    assert "Unrecognized options: --lerning_rate" in answer.said
    assert "Perhaps you meant: " in answer.said
    assert "--learning_rate FLOAT" in answer.said
    answer = ask("generate", "--promt", "a")
    assert answer.code == 2
    assert "--promt" in answer.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate", "fast"], "Error parsing --learning_rate: fast is not a number"),
        (["--resolution", "64.5"], "Error parsing --resolution: 64.5 is not a whole number"),
        (["--resolution"], "Missing value for argument '--resolution"),
        (["--config"], "argument --config: expected one argument"),
        *(
            ([f"--{name}", "--seed", "3"], f"Error parsing --{name}: expected at least one value")
            for name in ("data_weights", "train_data_dir", "image_column", "validation_prompt", "optimizer_args")
        ),
    ],
)
def test_values_that_do_not_parse(argv: list[str], message: str, ask: Ask) -> None:
    answer = ask("train", *argv)
    assert answer.code == 2
    assert message in answer.said


@pytest.mark.parametrize("rest", [[], ["--push_to_hub"]])
def test_a_token_that_is_missing(
    rest: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program looks for the token before flags are parsed, to hide it: it must not take the next flag for one."""
    monkeypatch.setattr(sys, "argv", ["raycontrolnet", "train", "--hub_token", *rest])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "Missing value for argument '--hub_token" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not signals._ends_process, "the command is over; this process goes on"


def test_several_problems_at_once(ask: Ask) -> None:
    argv = ["--resolution", "500", "--proportion_empty_prompts", "2", "--lr_scheduler", "cosin", "--num_workers", "x"]
    answer = ask("train", *argv)
    assert (answer.code, answer.out) == (2, "")
    lines = answer.err.splitlines()
    assert lines[0].startswith("error: --")
    assert len(lines) == 6
    for message in (
        "--pretrained_model_name_or_path: required",
        "--train_data_dir, --dataset_name: give one of them (neither is given)",
        "--resolution=500: must be divisible by 8; use 496 or 504",
        "--proportion_empty_prompts=2.0: must be in [0, 1]",
        "perhaps you meant cosine",
        "--num_workers=x: must be a number, or MIN:MAX",
    ):
        assert message in answer.err


def test_problems_of_a_file(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lerning_rate: 1\n")
    answer = ask("train", "--config", str(path))
    assert answer == (2, "", f"error: --config={path}: unknown setting lerning_rate; perhaps you meant learning_rate\n")


def test_problems_of_the_surroundings(tiny_settings: Settings, tiny_base: Path, tmp_path: Path, ask: Ask) -> None:
    """Folders that are missing or wrong, as far as can be checked without reading a model."""
    part = shutil.copytree(tiny_base, tmp_path / "part")
    shutil.rmtree(part / "vae")
    shutil.rmtree(part / "scheduler")
    file, gone = tmp_path / "file", tmp_path / "gone"
    file.write_text("")
    gone_file = f"{file}/below"
    for changed, message in (
        ({"train_data_dir": gone}, f"--train_data_dir={gone}: no such folder"),
        ({"train_data_dir": file}, f"--train_data_dir={file}: is a file; name the folder that it is in"),
        ({"train_data_dir": part}, f"--train_data_dir={part}: has no metadata.jsonl"),
        (
            {"pretrained_model_name_or_path": gone},
            f"--pretrained_model_name_or_path={gone}: no such folder, and not the form of a Hub id (owner/name)",
        ),
        (
            {"pretrained_model_name_or_path": part},
            f"--pretrained_model_name_or_path={part}: no vae, scheduler in that folder; it must be in diffusers' ",
        ),
        ({"controlnet_model_name_or_path": gone}, f"--controlnet_model_name_or_path={gone}: no such folder"),
        ({"tokenizer_name": gone}, f"--tokenizer_name={gone}: no such folder"),
        ({"output_dir": file}, f"--output_dir={file}: is a file; name a folder"),
        # not even root can write below a file or there
        ({"output_dir": "/proc/nothing/out"}, "--output_dir=/proc/nothing/out: cannot be written ("),
        ({"output_dir": "/proc/sys"}, "--output_dir=/proc/sys: cannot be written ("),
        ({"output_dir": gone_file}, f"--output_dir={gone_file}: cannot be written (Not a directory); name another"),
        ({"image_column": "photo"}, "--image_column=photo: no such column in "),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint=checkpoint-7: no such folder; complete"),
        ({"mixed_precision": "fp16"}, "--mixed_precision=fp16: needs a GPU; use bf16 or no on the CPU"),
    ):
        answer = ask("train", *flags(tiny_settings, **changed))
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith(f"error: {message}"), answer.err
        assert not list(tmp_path.glob("out/checkpoint-*"))


def test_beginnings_of_flags(tiny_settings: Settings) -> None:
    """As argparse takes them, and so the script of diffusers: if they can mean one flag alone."""
    settings = {name: value for name, value in tiny_settings.items() if name not in ("seed", "resolution")}
    given = ["--num_train", "7", "--caption=words", "--resol", "64", "--gradient-acc=2", "--scale"]
    config = cli.parse("train", [*flags(settings), *given])
    assert (config.num_train_epochs, config.caption_column, config.resolution) == (7, "words", 64)
    assert (config.gradient_accumulation_steps, config.scale_lr) == (2, True)


@pytest.mark.parametrize("given", [["--hub_tok", "hf_secret"], ["--hub-t=hf_secret"], ["--hub_token", "hf_secret"]])
def test_beginnings_of_the_tokens_flag_are_hidden_too(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["raycontrolnet", "train", *given, "--seed", "1"])
    monkeypatch.setenv("HF_TOKEN", "")
    cli._hide_token()
    assert commands == [[sys.executable, "-m", "raycontrolnet", "train", "--seed", "1"]]
    assert os.environ["HF_TOKEN"] == "hf_secret"


@pytest.mark.parametrize("flag", ["--train", "--nothing", "--", "--validation"])
def test_beginnings_that_mean_none_or_several(tiny_settings: Settings, ask: Ask, flag: str) -> None:
    answer = ask("train", *flags(tiny_settings), flag, "7")
    assert answer.code == 2
    if flag == "--train":
        assert answer.err == "error: --train: can mean --train_batch_size, --train_data_dir; write more of it\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--multi_gpu", "--num-processes=4", "train_controlnet.py"],
            "train_controlnet.py: leave it out; flags alone follow raycontrolnet train\n--multi_gpu: write ",
        ),
        (["--lr", "1e-5", "--upcast_vae"], "--lr: write --learning_rate\n--upcast_vae: leave it out: "),
        (["--seed", "1", " "], '" ": is the last argument; delete the blank behind the backslash of its line\n'),
    ],
)
def test_flags_of_other_programs(tiny_settings: Settings, ask: Ask, given: list[str], message: str) -> None:
    """Their refusal names what takes their place."""
    answer = ask("train", *flags(tiny_settings), *given)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"error: {message}"), answer.err


def test_a_whole_command_of_accelerate(tiny_settings: Settings, ask: Ask) -> None:
    answer = ask("train", "accelerate", "launch", "train_controlnet_sdxl.py", *flags(tiny_settings))
    message = "accelerate launch train_controlnet_sdxl.py: leave it out; flags alone follow raycontrolnet train"
    assert (answer.code, answer.err) == (2, f"error: {message}\n")


def test_settings_are_not_refused_as_those_of_other_programs() -> None:
    for command in cli.COMMANDS.values():
        names = {name for group in command.groups for name in setting_types(group)}
        assert "max_train_steps" not in names or not names & set(ADVICE)
    with pytest.raises(ConfigError, match=r"^--image=i: no such file$"):
        parse("generate", ["--controlnet", "c", "--prompt", "p", "--image", "i", "--batch_size", "2"])


@pytest.mark.parametrize("name", ["output_dir", "train_data_dir", "pretrained_model_name_or_path"])
def test_paths_that_are_none(tiny_settings: Settings, tmp_path: Path, ask: Ask, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (str(tmp_path / "loop"), "x" * 5000, "~nobody-of-this-name/x", "a/" * 3000):
        answer = ask("train", *flags(tiny_settings | {name: path}))
        assert answer.code == 2
        assert answer.err.startswith(f"error: --{name}={path[:50]}"), answer.err
        assert answer.err.count("\n") == 1
        assert len(answer.err) < 250


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; see the place below a file above")
def test_an_output_folder_that_cannot_be_written(tiny_settings: Settings, tmp_path: Path, ask: Ask) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    answer = ask("train", *flags(tiny_settings, output_dir=folder))
    assert answer.code == 2
    assert f"--output_dir={folder}: cannot be written (Permission denied); name another folder" in answer.err


def test_validation_images_that_cannot_be_used(
    tiny_settings: Settings, circles: Path, tmp_path: Path, ask: Ask
) -> None:
    whole = circles / "conditioning" / "00000.png"
    half, empty, text = bad = [tmp_path / name for name in ("half", "empty", "text")]
    half.write_bytes(whole.read_bytes()[:60])
    empty.touch()
    text.write_text("no picture")
    answer = ask("train", *flags(tiny_settings, validation_prompt="red circle", validation_image=[whole, *bad]))
    assert (answer.code, answer.out) == (2, "")
    lines = answer.err.removeprefix("error: ").splitlines()
    assert len(lines) == 3, answer.err
    for line, path in zip(lines, bad, strict=True):
        assert line.startswith(f"--validation_image: {path}")
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_validation_image_that_cannot_be_read(
    tiny_settings: Settings, circles: Path, tmp_path: Path, ask: Ask
) -> None:
    locked = tmp_path / "locked.png"
    shutil.copy(circles / "conditioning" / "00000.png", locked)
    locked.chmod(0)
    answer = ask("train", *flags(tiny_settings, validation_prompt="a", validation_image=locked))
    assert answer.code == 2
    assert answer.err.startswith(f"error: --validation_image: {locked}")
    assert "Permission denied" in answer.err


def test_a_model_that_cannot_be_read(tiny_settings: Settings, tiny_base: Path, tmp_path: Path, ask: Ask) -> None:
    """It is noticed late, but is bad input: code 2."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    answer = ask("train", *flags(tiny_settings, pretrained_model_name_or_path=base))
    assert answer.code == 2
    assert f"error: --pretrained_model_name_or_path={base}: cannot be loaded (unet): " in answer.err
    assert "There was no checkpoint yet. Details: " in answer.err


def test_a_run_and_the_ways_on(tiny_settings: Settings, ask: Ask) -> None:
    """The exit code is 0; a second run is refused with both ways forward; resumed, the code is 0 again."""
    out = tiny_settings["output_dir"]
    answer = ask("train", *flags(tiny_settings, max_train_steps=2))
    assert (answer.code, answer.out) == (0, "")
    assert f"2 updates; weights in {out}" in answer.err
    answer = ask("train", *flags(tiny_settings))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        f"error: --output_dir={out}: holds checkpoint-2 of an earlier run. Go on with it: add --resume_from_checkpoint "
        "latest. Start anew: name another --output_dir, or delete that folder\n"
    )
    answer = ask("train", *flags(tiny_settings, resume_from_checkpoint="latest"))
    assert answer.code == 0
    assert "updates 2 to 4" in answer.err


def test_settings_of_a_file_train(tiny_settings: Settings, tmp_path: Path, ask: Ask) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny_settings))
    answer = ask("train", "--config", str(path), "--max_train_steps", "1")
    assert answer.code == 0
    assert "updates 0 to 1, seed 0" in answer.err


# --- failed and interrupted runs ---


def test_a_failed_run_is_1(tiny_settings: Settings, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("something")

    monkeypatch.setattr(train_controlnet, "train_step", fail)
    answer = ask("train", *flags(tiny_settings))
    assert (answer.code, answer.out) == (1, "")
    assert "error: The run failed: LookupError: something.\nThere was no checkpoint yet. Details: " in answer.err


def test_an_interrupted_run_is_130(tiny_settings: Settings, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_controlnet, "train_step", interrupt)
    answer = ask("train", *flags(tiny_settings))
    assert (answer.code, answer.out) == (130, "")
    assert answer.err.endswith("Interrupted. There was no checkpoint yet.\n")
    monkeypatch.setattr(cli, "parse", interrupt)
    assert ask("train") == (
        130,
        "",
        "Interrupted before raycontrolnet train began: nothing was changed; run the same command again.\n",
    )
    monkeypatch.undo()
    monkeypatch.setattr(cli, "_load", interrupt)  # Python's modules, which takes seconds
    (said,) = ask("train", *flags(tiny_settings)).err.splitlines()
    out = tiny_settings["output_dir"]
    assert (
        said
        == f"Interrupted before raycontrolnet train began: nothing in {out} was changed; run the same command again."
    )


def test_a_second_interruption_tells_of_the_run(
    tiny_settings: Settings, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its training and after it, and whatever was about to be told at the first."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tiny_settings["output_dir"]
    with monkeypatch.context() as beside:
        beside.setattr(launch_fit, "choose_latents", interrupt)
        again = f"Interrupted. No checkpoint is in {out} yet: run the same command again.\n"
        assert ask("train", *flags(tiny_settings)) == (130, "", again)
    assert ask("train", *flags(tiny_settings)).code == 0
    step = max(int(each.name.partition("-")[2]) for each in Path(out).glob("checkpoint-*"))
    stand = f"Interrupted. The checkpoints in {out} stand, up to that of update {step}: go on with "
    for given in ("latest", f"checkpoint-{step}"):
        resumed = flags(tiny_settings, resume_from_checkpoint=given)
        with monkeypatch.context() as beside:
            beside.setattr(launch_fit, "choose_latents", interrupt)
            assert ask("train", *resumed) == (130, "", f"{stand}--resume_from_checkpoint {given}.\n")
    with monkeypatch.context() as beside:  # the second comes while what was told of the first is on its way
        beside.setattr(launch_fit, "_train", interrupt)
        beside.setattr("raycontrolnet.training.status.read_timings", interrupt)
        answer = ask("train", *resumed)
    told = f"Interrupted. The checkpoint of update {step} stands: go on with --resume_from_checkpoint latest ("
    assert (answer.code, answer.err.splitlines()[-1]) == (130, f"{told}--output_dir {out}).")


# --- as a process ---


def test_bad_input_in_a_shell(tiny_settings: Settings, tmp_path: Path) -> None:
    """The user sees the message alone: no traceback, and no library's warnings."""
    gone = tmp_path / "gone"
    answer = run("raycontrolnet", "train", *flags(tiny_settings, train_data_dir=gone))
    assert answer == (2, "", f"error: --train_data_dir={gone}: no such folder\n")


def test_a_run_in_a_shell(tiny_settings: Settings, tmp_path: Path) -> None:
    """Three lines, and none from libraries; the log is in the folder."""
    settings = tiny_settings | {"output_dir": "out", "max_train_steps": 2}
    answer = run("raycontrolnet.train", *flags(settings), cwd=tmp_path)
    assert (answer.code, answer.out) == (0, "")
    lines = answer.err.splitlines()
    assert lines[0].startswith(f"raycontrolnet {__version__}: 13 samples, 1 worker on CPUs x batch 4 x accumulation 1")
    assert lines[-2].startswith("step 2/2 | loss ")
    assert lines[-1].startswith("done in ")
    assert all(line.startswith("step ") for line in lines[1:-1]), answer.err
    assert (tmp_path / "out" / "run.log").is_file()


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--scale_lr", "true"], "--scale_lr true: is a switch without a value; write --scale_lr, or --no_scale_lr"),
        (["--push_to_hub=yes"], "--push_to_hub yes: is a switch without a value; write --push_to_hub, or --no_push_to"),
        (["--no-scale-lr", "1"], "--no_scale_lr 1: is a switch without a value; write --scale_lr, or --no_scale_lr"),
        (["-seed", "3"], "-seed: flags begin with two hyphens; write --seed"),
        (["\u2013seed=3"], "\u2013seed: flags begin with two hyphens; write --seed"),
        (["\u2014learning-rate", "3"], "\u2014learning-rate: flags begin with two hyphens; write --learning_rate"),
    ],
)
def test_flags_as_they_are_mistyped(argv: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse("train", argv)


def test_values_that_look_like_flags() -> None:
    given = [
        "--pretrained_model_name_or_path",
        "b",
        "--train_data_dir",
        "train-data-dir",
        "--lr_power",
        "-1",
        "--scale_lr",
    ]
    config = parse("train", [*given, "--learning_rate", "1", "--output_dir", "output-dir"])
    assert (config.lr_power, config.output_dir, config.train_data_dir) == (-1, "output-dir", "train-data-dir")
