"""The README is true: its commands run, the files that it names exist, its transcript is what the demo prints."""

import json
import os
import re
import shutil
import subprocess
import sys

import demo
import pytest
import transformers
from conftest import HAS_DEEPSPEED, ROOT, environment, launcher

import chat
import train as trainer
import utils

README = (ROOT / "README.md").read_text(encoding="utf-8")
STUB = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["README_LOG"], "a", encoding="utf-8") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Every command of the README's bash blocks as a list of words, as bash itself passes them on."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("python", "python3", "pip", "torchrun", "deepspeed", "make"):
        (folder / name).write_text(STUB, encoding="utf-8")
        (folder / name).chmod(0o755)
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "activate").touch()
    script = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)) + "\nwait\n"
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "README_LOG": str(folder / "log"), "HOME": str(folder)}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "log").read_text(encoding="utf-8").splitlines()]


def split(command):
    """(launcher's words, script, its options) of a command that runs one of the scripts; None for another."""
    place = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
    return None if place is None else (command[:place], command[place], command[place + 1 :])


def runs_of(commands, script):
    return [parts for parts in map(split, commands) if parts and parts[1] == script]


def test_every_file_that_the_readme_names_exists():
    table = README[README.index("## Files") :]
    names = re.findall(r"`([^`]+)`", table)
    assert {"train.py", "utils.py", "ds_config.json", "seed_tasks.jsonl"} <= set(names) - {"make demo"}
    assert [name for name in names if not (ROOT / name).exists() and name != "make demo"] == []


def test_the_readme_names_every_file_that_a_user_may_run_or_edit():
    files = {path.name for path in ROOT.glob("*.py")} | {
        "ds_config.json",
        "seed_tasks.jsonl",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "requirements.txt",
    }
    files |= {
        f"{path.parent.name}/{path.name}" for folder in ("docs", "examples") for path in ROOT.glob(f"{folder}/*.*")
    }
    table = README[README.index("## Files") :]
    assert [name for name in sorted(files) if f"`{name}`" not in table] == []


def test_make_has_the_targets_that_the_readme_names(commands):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    asked = [command[1] for command in commands if command[0] == "make"]
    assert asked == ["demo", "test"] and set(asked) <= set(targets)


def test_the_workflow_runs_the_tests():
    assert "- run: make test\n" in (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")


def test_the_training_commands_parse_and_make_stanfords_batch(commands, monkeypatch):
    classes = (trainer.ModelArguments, trainer.DataArguments, trainer.TrainingArguments)
    parser = transformers.HfArgumentParser(classes, allow_abbrev=False)
    seen = []
    for words, _, options in runs_of(commands, "train.py"):
        translated, notices = trainer.translate_old_options(options)
        if options[0] == "out/run.json":
            continue
        args, rest = parser.parse_known_args(translated)
        assert (rest, notices) == ([], [])
        assert args.fsdp in (None, "full_shard auto_wrap") and args.warmup_steps in (0, 0.03)
        assert args.deepspeed is None or (ROOT / args.deepspeed).is_file()
        values = dict(word.lstrip("-").split("=") for word in words if "=" in word)
        processes = int(values.get("nproc_per_node", 8 if words[0] == "deepspeed" else 1))
        processes *= int(values.get("nnodes", 2 if words[0] == "deepspeed" else 1))
        if not args.dry_run:
            seen.append(processes * args.per_device_train_batch_size * args.gradient_accumulation_steps)
    assert seen == [16, 128, 128, 128, 126, 128, 128, 128]


def test_torchrun_takes_its_own_options(commands):
    from torch.distributed.run import get_args_parser

    runs = [command for command in commands if command[0] == "torchrun"]
    parsed = [get_args_parser().parse_args(command[1:]) for command in runs]
    assert [args.training_script for args in parsed] == ["train.py"] * 5
    assert all(args.standalone or args.rdzv_endpoint == "node1:29500" for args in parsed)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="the optional package deepspeed is not installed")
def test_deepspeed_takes_its_own_options(commands):
    from deepspeed.launcher.runner import parse_args

    (args,) = [parse_args(command[1:]) for command in commands if command[0] == "deepspeed"]
    assert (args.hostfile, args.master_port, args.user_script) == ("hostfile", 29500, "train.py")


def test_the_chat_commands_parse(commands):
    parsed = [chat.parse_arguments(options) for _, _, options in runs_of(commands, "chat.py")]
    assert [(args.instruction, args.data_path) for args in parsed] == [
        (None, None), (None, None), ("Sort these words.", None), (None, "questions.jsonl"),
    ]  # fmt: skip


def test_the_table_of_differences_names_options_that_exist():
    table = README[README.index("## What differs") : README.index("## What has been run")]
    names = set(re.findall(r"`--([a-z_0-9]+)", table))
    known = {field for cls in (trainer.ModelArguments, trainer.TrainingArguments) for field in cls.__dataclass_fields__}
    assert names >= {"padded", "pad_token", "dtype", "optim"} and names <= known


@pytest.mark.slow
def test_the_training_commands_run_on_a_laptop(commands, base, data, tmp_path):
    """Each on two processes at most, with a tiny model, as far as --dry_run goes; only the paths are others."""
    places = {"llama-7b": str(base), "alpaca_data.json": str(data), "out": str(tmp_path / "out")}
    for words, script, options in runs_of(commands, "train.py"):
        if options[0] == "out/run.json" or (not HAS_DEEPSPEED and "--deepspeed" in options):
            continue
        options = [places.get(word, word) for word in options]
        several = words[0] != "python"
        command = [*launcher(2 if several else 1), str(ROOT / script), *options, "--dry_run", "1"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "70 read" in done.stderr, done.stderr
        assert "examples (3 epochs)" in done.stdout


def test_the_transcript_is_what_the_demo_prints():
    """Expected and given are those of the seed tasks; the demo's own words stand in the demo; figures are of one run."""
    start = README.index("```text\n") + 8
    transcript = README[start : README.index("```", start)]
    tasks = {task["instruction"]: task for task in utils.read_records([ROOT / "seed_tasks.jsonl"])[0]}
    *shown, end = re.split(r"\n\n", transcript.strip())
    assert len(shown) == 2
    for text in shown:
        instruction = text.split("\n")[0].removeprefix("Instruction: ")
        output = demo.indent(tasks[instruction]["output"])
        given = f"Input: {tasks[instruction]['input']}\n" if tasks[instruction]["input"] else ""
        given = f"Instruction: {instruction}\n{given}Expected:\n{output}\nGiven (the same):\n{output}"
        assert text == given
    pattern = r"--- 6\. What this shows -+\n17\d of 175 answers are reproduced exactly, 17\d stopped by themselves"
    assert re.fullmatch(pattern, end)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_git_ignores_what_the_commands_make_and_nothing_that_is_ours(commands):
    options = ("--output_dir", "--target", "--delta", "--base", "--work_dir")
    made = {words[i + 1] for words in commands for i, word in enumerate(words[:-1]) if word in options}
    assert {"llama-7b", "vicuna-7b", "data", "out", "out-delta"} <= made
    paths = sorted(f"{name}/x" for name in made | {"venv", "LLaMA", "again", "zh", ".out.unfinished"})
    paths += [".venv", "alpaca_data.json", "questions.jsonl", "answers.jsonl", "train.log", "hostfile"]
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    assert subprocess.run(["git", "check-ignore", *paths], **run).stdout.split("\n")[:-1] == paths
    assert subprocess.run(["git", "ls-files", "-i", "-c", "--exclude-standard"], **run).stdout == ""


@pytest.mark.slow
def test_a_trial_runs_where_only_the_scripts_are(tmp_path):
    """A copy of the scripts alone makes a model, trains it and repeats the run, as the README says."""
    for name in ("train.py", "engines.py", "chat.py", "utils.py", "examples"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for command in (
        "python examples/make_tiny_llama.py --output_dir tiny",
        "python train.py --model_name_or_path tiny --data_path examples/records.json --output_dir out",
        "python train.py out/run.json --output_dir again",
        "python chat.py --model_name_or_path again --instruction Hello --max_new_tokens 3",
    ):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
