"""The command line of train.py: what is parsed, said, translated and refused, each refusal with its way round."""

import dataclasses
import fcntl
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
import transformers
from conftest import (
    ROOT,
    basic_options,
    environment,
    field,
    finish,
    make_records,
    needs_deepspeed,
    render_prompt,
    start,
    train,
)

import engines
import train as trainer
import utils
from utils import UserError

DEFAULTS = ["--model_name_or_path", "m", "--output_dir", "o"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Parsing sets variables for the libraries; each test starts and ends without them."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "FSDP_STATE_DICT_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")


def parse(*words):
    return trainer.parse_arguments([*DEFAULTS, *map(str, words)])


def refusal(*words):
    with pytest.raises(UserError) as caught:
        parse(*words)
    return str(caught.value)


def test_data_path_takes_several_files_and_a_repeated_option_adds():
    assert parse("--data_path", "a.json", "b.json", "--data_path", "c d.jsonl")[1].data_path == [
        "a.json", "b.json", "c d.jsonl",
    ]  # fmt: skip
    assert parse()[1].data_path is None


def test_hyphens_are_understood_in_option_names():
    assert parse("--data-path", "a.json", "--model-max-length", "77")[2].model_max_length == 77


def test_options_are_never_abbreviated():
    assert refusal("--learning_rat", "1") == (
        "unknown option: --learning_rat (did you mean --learning_rate?); --help lists those that exist"
    )


def test_unknown_options_are_all_named_with_the_nearest():
    assert refusal("--xyzzy", "8", "--data_pat", "x", "--zzzzzz") == (
        "unknown option: --xyzzy, --data_pat (did you mean --data_path?), --zzzzzz; --help lists those that exist"
    )


def test_value_of_the_wrong_type_is_one_line():
    assert refusal("--learning_rate", "fast") == "argument --learning_rate/--learning-rate: invalid float value: 'fast'"


def test_stray_word_is_named():
    assert "unexpected word 'stray'" in refusal("--bf16", "True", "stray")


def test_own_defaults():
    model, data, args, given = trainer.parse_arguments([])
    assert model.model_name_or_path == "facebook/opt-125m" and model.dtype == "float32"
    assert (args.model_max_length, args.cache_dir, args.optim.value) == (512, None, "adamw_torch_fused")
    assert (args.pad_token, args.padded, args.save_rehearsal, args.memory_check) == ("keep", False, True, True)
    assert not args.logging_nan_inf_filter and not args.remove_unused_columns and given == {}


def test_only_these_options_are_our_own():
    """A new option is a deliberate change of this list."""
    own = {f.name for f in dataclasses.fields(trainer.TrainingArguments)} - {
        f.name for f in dataclasses.fields(trainer.transformers.TrainingArguments)
    }
    assert own == {
        "cache_dir", "model_max_length", "pad_token", "padded", "attn_implementation", "save_dtype", "save_rehearsal", "memory_check",
        "overwrite_output_dir", "resume_anyway", "dry_run", "tensorboard_dir", "early_stopping_patience",
        "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "load_in_4bit",
        "trained_modules",
    }  # fmt: skip
    assert [f.name for f in dataclasses.fields(trainer.ModelArguments)] == [
        "model_name_or_path", "dtype", "config_name", "tokenizer_name",
    ]  # fmt: skip
    assert [f.name for f in dataclasses.fields(trainer.DataArguments)] == [
        "data_path", "eval_data_path", "val_set_size", "columns", "prompt_style", "train_on_inputs", "skip_bad_records",
    ]  # fmt: skip
    assert all(
        f.metadata["help"]
        for cls in (trainer.ModelArguments, trainer.DataArguments, trainer.TrainingArguments)
        for f in dataclasses.fields(cls)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fp16", "True", "--bf16", "True"], "--fp16 and --bf16 are both set; keep one of them"),
        (["--pad_token", "eos"], "argument --pad_token/--pad-token: invalid choice: 'eos' (choose from"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from"),
        (["--save_dtype", "int8"], "argument --save_dtype/--save-dtype: invalid choice: 'int8' (choose from"),
        (
            ["--fsdp", "full_shard auto_wrap"],
            "--fsdp needs a launcher: torchrun --standalone --nproc_per_node=2 train.py ...",
        ),
        (
            ["--deepspeed", str(ROOT / "ds_config.json")],
            "--deepspeed needs a launcher: torchrun --standalone --nproc_per_node=2 train.py ...",
        ),
        (["--eval_strategy", "sometimes"], "argument --eval_strategy/--eval-strategy: invalid choice: 'sometimes'"),
        (
            ["--fsdp_transformer_layer_cls_to_wrap", "X", "--fsdp_config", "{}"],
            "--fsdp_config is given twice; put transformer_layer_cls_to_wrap into its JSON",
        ),
    ],
)
def test_refusals_of_the_command_line(words, message):
    assert refusal(*words).startswith(message)


def test_unknown_word_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal("--fsdp", "hybrid_shard auto_wrap") == (
        "--fsdp hybrid_shard auto_wrap: choose from full_shard, shard_grad_op, auto_wrap, offload"
    )


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engine_that_only_the_launcher_asks_for_is_refused(engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    expected = f"the launcher asks for {engine} and the options do not; give --{engine.lower()} here"
    assert refusal() == expected


def test_deepspeed_json_with_an_error_is_named_by_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = tmp_path / "ds.json"
    path.write_text('{\n  "fp16": {"enabled": }\n}')
    assert refusal("--deepspeed", path) == f"{path}:2: not valid JSON, Expecting value at column 23"
    assert refusal("--deepspeed", tmp_path / "none.json").startswith(f"{tmp_path}/none.json: No such file or directory")


def test_options_that_a_cpu_cannot_honour_are_dropped_with_a_line(capsys):
    args = parse("--tf32", "True", "--fp16", "True")[2]
    assert args.tf32 is None and args.fp16 is False and args.use_cpu
    assert capsys.readouterr().err.splitlines() == [
        "--tf32 needs a GPU of the Ampere generation or newer; ignored here",
        "--fp16 needs a GPU, or --deepspeed; computing in float32 here",
    ]


@needs_deepspeed
@pytest.mark.parametrize("supported", [True, False, None])
@pytest.mark.parametrize("enabled", ["auto", True])
def test_fp16_under_deepspeed_is_for_cpus_that_compute_in_it(supported, enabled, monkeypatch, tmp_path, capsys):
    from deepspeed.accelerator import cpu_accelerator

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cpu_accelerator.CPU_Accelerator, "is_fp16_supported", lambda self: supported)
    monkeypatch.setattr("deepspeed.init_distributed", lambda **options: None)
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)
    config = json.loads((ROOT / "ds_config.json").read_text())
    config["fp16"]["enabled"] = enabled
    (tmp_path / "ds.json").write_text(json.dumps(config))
    args = parse("--deepspeed", tmp_path / "ds.json", "--fp16", "True")[2]
    assert (args.fp16, args.deepspeed["fp16"]["enabled"]) == ((True, enabled) if supported else (False, "auto"))
    line = "fp16 under DeepSpeed needs a GPU, or a CPU that computes in fp16; computing in float32 here\n"
    assert capsys.readouterr().err == ("" if supported else line)


def test_run_json_brings_its_arguments_and_later_options_win(tmp_path):
    arguments = {"model_name_or_path": "/m", "data_path": ["/d.json"], "learning_rate": 0.5, "output_dir": "/old"}
    run = {"made_by": "cria", "status": "finished", "arguments": arguments}
    (tmp_path / "run.json").write_text(json.dumps(run))
    words = [str(tmp_path / "run.json"), "--output_dir", "/new"]
    model, data, args, given = trainer.parse_arguments(words)
    assert (model.model_name_or_path, data.data_path, args.learning_rate) == ("/m", ["/d.json"], 0.5)
    assert args.output_dir == "/new"
    assert given == arguments | {"output_dir": "/new"}
    assert trainer.parse_arguments([*words, "--data_path", "other.json"])[1].data_path == ["other.json"]


def test_other_json_before_the_options_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"some": "file"}')
    with pytest.raises(UserError, match="unknown option: --some"):
        trainer.parse_arguments([str(tmp_path / "run.json")])
    with pytest.raises(UserError, match="data.json: No such file"):
        trainer.parse_arguments([str(tmp_path / "data.json")])
    (tmp_path / "run.json").write_text('{"arguments": {}}')
    with pytest.raises(UserError, match="not a run.json of these scripts"):
        trainer.parse_arguments([str(tmp_path / "run.json")])


@pytest.mark.slow
def test_group_by_length_runs_to_the_end(base, data, tmp_path):
    options = [*basic_options(base, data, tmp_path / "out", group_by_length=True, logging_dir=tmp_path / "tb")]
    run = train([*options, "--report_to", "tensorboard"]).finished()
    assert "--group_by_length is now --train_sampling_strategy group_by_length" in run.err
    assert len(run.losses()) == 9 and len(list((tmp_path / "tb").rglob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["sequential", "batch_rebalance"])
def test_every_other_sampling_strategy_runs_to_the_end(strategy, base, data, tmp_path):
    run = train(basic_options(base, data, tmp_path / "out", train_sampling_strategy=strategy)).finished()
    assert len(run.losses()) == 9


def test_missing_data_path_is_refused(tokenizer):
    with pytest.raises(UserError, match="^--data_path is missing: name one or more files of records$"):
        trainer.make_supervised_data_module(tokenizer, parse()[1])


@pytest.mark.slow
def test_evaluation_without_data_is_refused_in_one_line(base, data, tmp_path):
    run = train(basic_options(base, data, tmp_path / "out", evaluation_strategy="steps"))
    assert run.code == 2
    assert run.error().startswith("error: --eval_strategy: there is no data to evaluate on; give --val_set_size 0.02")


def test_dry_run_shows_examples_and_counts_and_loads_no_weights(base, data, tokenizer, tmp_path):
    (tmp_path / "model").mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    run = train(basic_options(tmp_path / "model", data, tmp_path / "out", dry_run=2))
    assert run.code == 0 and not (tmp_path / "out").exists()
    lines = run.out.splitlines()
    assert lines[0] == "--- records.json[0]: 69 tokens, 4 trained"
    assert lines[-1] == "steps: 9 of 8 examples (1 epochs)"
    assert run.out.count(">>>") == run.out.count("<<<") == 2
    assert ">>>river.</s><<<" in run.out and ">>>lamp lamp.</s><<<" in run.out
    records = make_records(70)  # by the original's rule: what tokenizing the whole adds to tokenizing the prompt
    prompts = [render_prompt(record) for record in records]
    whole = [prompt + record["output"] + "</s>" for prompt, record in zip(prompts, records, strict=True)]
    targets = sum(
        len(tokenizer(a).input_ids) - len(tokenizer(b).input_ids) for a, b in zip(whole, prompts, strict=True)
    )
    assert field(r"tokens per epoch: [\d,]+, of which trained ([\d,]+)", run.out) == f"{targets:,}"


@pytest.mark.slow
def test_error_is_said_once_by_two_processes(base, tmp_path):
    (tmp_path / "data.json").write_text('[{"instruction": "x"}]')
    run = train(basic_options(base, tmp_path / "data.json", tmp_path / "out"), processes=2)
    assert run.error() == (
        f"error: {tmp_path}/data.json: no record of 1 can be used: data.json[0]: no output; keys found: instruction; "
        "keys expected: instruction, input (optional), output; "
        "it should hold records {instruction, input (optional), output}"
    )


@pytest.mark.slow
def test_busy_port_is_one_line(base, data, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        places = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        options = basic_options(base, data, tmp_path / "out")
        words = [sys.executable, str(ROOT / "train.py"), *map(str, options)]
        done = subprocess.run(words, env=environment() | places, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the processes cannot meet (")
    assert done.stderr.splitlines()[-1].endswith(f"if port {port} is in use, choose another with --master_port")


@pytest.mark.slow
def test_on_a_terminal_the_progress_line_is_rewritten(base, data, tmp_path, monkeypatch):
    """On a pseudo-terminal every step rewrites one line; the rates appear from the second step."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))  # wide enough for all of it
    options = basic_options(base, data, tmp_path / "out", max_steps=3)
    process = start(options, stderr=slave)
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 65536):
            text += chunk
    except OSError:  # Linux reports the closed terminal so
        pass
    finish(process, options)
    steps = [part for part in text.decode().split("\r") if part.startswith("step ")]
    assert [field(r"step (\d+)/3", part) for part in steps] == ["1", "2", "3"]
    assert all(part.split("\x1b[K")[0].startswith("step ") and "\x1b[K" in part for part in steps)
    shape = (
        r"step 2/3  loss \d\.\d{4}  ETA 0:00:\d\d  grad \d\.\d{3}  [\d.]+ examples/s  [\d,]+ target tokens/s  "
        r"lr 6\.67e-04  epoch 0\.22"
    )
    assert field(f"({shape})", steps[1])


@pytest.mark.slow
def test_off_a_terminal_lines_come_every_logging_steps(base, data, tmp_path):
    run = train(basic_options(base, data, tmp_path / "out", logging_steps=4)).finished()
    steps = [line for line in run.err.splitlines() if line.startswith("step ")]
    assert [field(r"step (\d+)/9", line) for line in steps] == ["4", "8", "9"]
    assert len(run.losses()) == 9 and "\r" not in run.err and "\x1b" not in run.err


def test_too_big_a_model_is_refused_before_loading_with_what_fits(monkeypatch, tmp_path):
    args = parse("--output_dir", tmp_path)[2]
    monkeypatch.setattr(trainer.engines, "free_host_memory", lambda: 64 * 2**30)
    with pytest.raises(UserError) as caught:
        engines.check_memory(args, "float32", (6_738_415_616, 6_738_415_616, 0))
    assert str(caught.value) == (
        "6.74 billion parameters: single process needs 100.4 GiB of host memory, where 64.0 GiB are free, for weights, "
        "gradients and optimizer; no engine fits here: more devices, or a smaller model, or --lora_r 16, which trains "
        "adapters alone; "
        "to try all the same: --memory_check False"
    )


@pytest.mark.parametrize(("limit", "kept"), [(1, 2), (3, 4), (9, 5)])
def test_the_new_checkpoint_is_written_before_the_oldest_goes(limit, kept, monkeypatch, tmp_path):
    """Five checkpoints in ten steps: of a limit of 1 two are on the disk at a time."""
    args = parse("--output_dir", tmp_path, "--save_steps", 2, "--save_total_limit", limit)[2]
    usage = trainer.shutil._ntuple_diskusage(0, 0, 2**30)
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=f"the model and {kept} checkpoints need {(4 + 12 * kept) / 10.73741824:.1f} GiB"
    ):
        trainer.check_disk(args, 100_000_000, 10)


def test_full_disk_is_refused_before_loading(monkeypatch, tmp_path):
    args = parse("--output_dir", tmp_path, "--save_steps", 5)[2]
    usage = trainer.shutil._ntuple_diskusage(0, 0, 2**30)
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError) as caught:
        trainer.check_disk(args, 100_000_000, 10)
    assert str(caught.value) == (
        f"{tmp_path}: the model and 2 checkpoints need 2.6 GiB, 1.0 GiB are free; use --save_total_limit 1, "
        "--save_only_model True or --save_strategy no; to try all the same: --memory_check False"
    )
    args = parse("--output_dir", tmp_path, "--save_strategy", "no")[2]
    assert trainer.check_disk(args, 100_000_000, 10) is None


def test_help_lists_the_commands_and_every_own_option(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and err == ""
    assert 'torchrun --standalone --nproc_per_node=8 train.py ... --fsdp "full_shard auto_wrap"' in out
    for name in ("data_path", "model_max_length", "pad_token", "resume_anyway", "dry_run"):
        assert f"--{name}" in out


def test_the_options_read_off_the_sources_are_the_parsers():
    """So that --help and a mistyped option are answered before torch is loaded, and no option is refused."""
    classes = (trainer.ModelArguments, trainer.DataArguments, trainer.TrainingArguments)
    actions = trainer.transformers.HfArgumentParser(classes)._actions
    names = {action.dest: action.help for action in actions if action.dest not in ("help", "local_rank")}
    options = trainer.read_options()
    assert {name for name in options if not name.startswith("_")} - {"local_rank"} == {
        name for name in names if not name.startswith("no_")
    }
    assert all(options[name].endswith(names[name]) for name in ("data_path", "padded", "dry_run"))
    for words in (["--help"], ["--learning_rat", "1"]):
        run = subprocess.run(
            [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *words], capture_output=True, text=True
        )
        loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "import time:" in line}
        assert run.returncode == (2 if len(words) > 1 else 0) and "utils" in loaded
        assert not loaded & {"torch", "transformers", "numpy"}


def test_values_that_look_like_options_and_the_launchers_rank_are_no_unknown_options():
    trainer.answer_early(["--run_name", "--my run", "--run_name=--my", "--local_rank=0", "--no_save_rehearsal"])
    for words in (["--local_rank=0", "out/run.json"], ["--local_rank", "0", "out/run.json"]):
        assert trainer.translate_old_options(words) == (["out/run.json"], [])


@pytest.mark.slow
def test_read_only_output_is_one_line(base, data):
    run = train(basic_options(base, data, "/proc/nowhere"))
    assert run.code == 2 and run.error().startswith("error: /proc/nowhere: ")


def test_what_changes_the_mathematics_is_a_setting_of_the_run(tmp_path):
    def settings(*words, sha256="1", more=()):
        model_args, data_args, args, _ = parse("--output_dir", tmp_path, *words)
        data_args.data_path = ["a", *map(str, range(len(more)))]
        return trainer.settings_of(args, model_args, data_args, dict(zip(data_args.data_path, [sha256, *more])))

    plain = settings()
    for words, key in {
        "model_max_length 256": "model_max_length", "pad_token add": "pad_token", "seed 1": "seed",
        "data_seed 1": "data_seed", "learning_rate 1": "learning_rate", "lr_scheduler_type cosine": "lr_scheduler_type",
        'lr_scheduler_kwargs {"a":1}': "lr_scheduler_kwargs", "warmup_steps 5": "warmup_steps",
        "num_train_epochs 9": "num_train_epochs", "max_steps 9": "max_steps", "optim sgd": "optim",
        "optim_args a=1": "optim_args", "adam_beta1 0.5": "adam_beta1", "adam_beta2 0.5": "adam_beta2",
        "adam_epsilon 1": "adam_epsilon", "weight_decay 1": "weight_decay", "max_grad_norm 9": "max_grad_norm",
        "bf16 True": "bf16", "label_smoothing_factor 0.5": "label_smoothing_factor",
        "neftune_noise_alpha 1": "neftune_noise_alpha",
        "train_sampling_strategy sequential": "train_sampling_strategy",
        "average_tokens_across_devices False": "average_tokens_across_devices",
        "model_name_or_path gpt2": "model", "dtype bfloat16": "dtype", "per_device_train_batch_size 3": "global_batch",
        "gradient_accumulation_steps 3": "global_batch",
    }.items():  # fmt: skip
        other = settings(*f"--{words}".split(maxsplit=1))
        assert [name for name in plain if other[name] != plain[name]] == [key], words
    assert [name for name in plain if settings(sha256="2")[name] != plain[name]] == ["data"]
    assert [name for name in plain if settings(more=["1"])[name] != plain[name]] == ["data"]  # the same file twice
    for words in ("logging_steps 7", "save_steps 7", "padded True", "save_dtype float16"):
        assert settings(*f"--{words}".split()) == plain, words


@pytest.mark.parametrize("flag", ["overwrite_output_dir", "resume_anyway"])
def test_what_may_be_done_with_the_output_folder_is_passed_on(flag, monkeypatch, tmp_path):
    args = parse("--output_dir", tmp_path, "--resume_from_checkpoint", "c", f"--{flag}", "True")[2]
    monkeypatch.setattr(utils, "claim_folder", lambda folder: None)
    monkeypatch.setattr(trainer, "resume_point", lambda *words: words)
    wanted = (str(tmp_path), {}, "c", flag == "overwrite_output_dir", flag == "resume_anyway")
    assert trainer.open_output(args, {}, "some/model") == wanted


@pytest.mark.parametrize("reads", ["out", "out/checkpoint-5", "named out/checkpoint-5"])
def test_overwriting_what_the_run_reads_is_refused(reads, tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    path = tmp_path / reads.removeprefix("named ")
    named = ["--resume_from_checkpoint", path] if reads.startswith("named") else []
    args = parse("--output_dir", tmp_path / "out", "--overwrite_output_dir", "True", *named)[2]
    message = f"--overwrite_output_dir would delete {path}, which it reads; choose another --output_dir"
    with pytest.raises(UserError) as caught:
        trainer.open_output(args, {}, tmp_path if named else path)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: it must be at least 1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: it must be at least 1"),
        ("--model_max_length -5", "--model_max_length -5: it must be at least 1"),
        ("--num_train_epochs 0", "--num_train_epochs 0 trains nothing; it must be more than 0"),
        ("--seed -1", "--seed -1: it must be at least 0"),
    ],
)
def test_a_number_without_sense_is_refused(words, message):
    with pytest.raises(UserError) as caught:
        parse(*words.split())
    assert str(caught.value) == message
    assert parse("--num_train_epochs", "0", "--max_steps", "3")[2].max_steps == 3


def fsdp_config(text, **more):
    args = SimpleNamespace(fsdp="full_shard auto_wrap", fsdp_config=text, gradient_checkpointing=False, **more)
    engines.configure_fsdp(args)
    return args.fsdp_config


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ('{"fsdp_offload_params": true}', "cpu_offload", True),
        ('{"fsdp_sharding_strategy": "FULL_SHARD"}', "reshard_after_forward", True),
        ('{"fsdp_sharding_strategy": "SHARD_GRAD_OP"}', "reshard_after_forward", False),
        ('{"sharding_strategy": 2}', "reshard_after_forward", False),
        ('{"fsdp_reshard_after_forward": false}', "reshard_after_forward", False),
        ('{"version": 2}', "reshard_after_forward", True),
    ],
)
def test_the_keys_of_an_fsdp_config_have_accelerates_names_too(text, key, value, fsdp_environment):
    assert fsdp_config(text)[key] is value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"fsdp_sharding_strategy": "NO_SHARD"}', "NO_SHARD is not there in FSDP2; choose FULL_SHARD, SHARD_GRAD_OP or "
         "no --fsdp"),
        ('{"version": 1}', "there is FSDP2 only; leave version out"),
        ('{"cpu_ofload": true}', "unknown key cpu_ofload; those that exist: activation_checkpointing, auto_wrap_policy, "
         "cpu_offload, cpu_ram_efficient_loading, min_num_params, reshard_after_forward, state_dict_type, "
         "transformer_layer_cls_to_wrap, version"),
    ],
)  # fmt: skip
def test_an_fsdp_config_that_would_not_be_heeded_is_refused(text, message, fsdp_environment):
    with pytest.raises(UserError) as caught:
        fsdp_config(text)
    assert str(caught.value) == f"--fsdp_config: {message}"


def test_an_fsdp_config_that_is_no_json_is_refused_with_its_place(fsdp_environment):
    with pytest.raises(UserError) as caught:
        fsdp_config('{"a": ')
    assert str(caught.value) == "--fsdp_config:1: not valid JSON, Expecting value at column 7"


def test_keys_of_fsdp1_are_named_and_ignored(fsdp_environment, capsys):
    config = fsdp_config('{"fsdp_backward_prefetch": "BACKWARD_PRE", "fsdp_use_orig_params": "false"}')
    assert not {"backward_prefetch", "use_orig_params"} & config.keys()
    assert capsys.readouterr().err == (
        "--fsdp_config: backward_prefetch, use_orig_params: of FSDP1, without meaning in FSDP2; ignored\n"
    )


@pytest.fixture
def fsdp_environment(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_STATE_DICT_TYPE"):  # which configure_fsdp sets
        monkeypatch.setenv(name, "")


@needs_deepspeed
def test_a_deepspeed_json_may_ask_for_bf16(capsys):
    args = SimpleNamespace(
        deepspeed={"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, fp16=False, bf16=False
    )
    args.use_cpu = True
    engines.configure_deepspeed(args)
    assert (args.fp16, args.bf16) == (False, True)
    assert "DeepSpeed configuration: it asks for bf16, as --bf16 True does\n" in capsys.readouterr().err
    args.fp16 = True
    with pytest.raises(
        UserError, match="^DeepSpeed configuration: fp16 and bf16 are both asked for; keep one of them$"
    ):
        engines.configure_deepspeed(args)


@needs_deepspeed
@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {"stage": 0}}])
def test_deepspeed_without_zero_is_refused(zero):
    args = SimpleNamespace(deepspeed=zero, fp16=False, bf16=False, use_cpu=True)
    message = "its zero_optimization has no stage 1, 2 or 3; ds_config.json is a whole one"
    with pytest.raises(UserError, match=f"^DeepSpeed configuration: {message}$"):
        engines.configure_deepspeed(args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--report_to wandb", "wandb"),
        ("--learning_rate -1", "Invalid learning rate: -1.0"),
        ("--optim adamw_bnb_8bit", "bitsandbytes"),
    ],
)
def test_what_a_library_refuses_is_said_in_a_line(words, message, base, data, tmp_path):
    run = train([*basic_options(base, data, tmp_path / "out"), *words.split()])
    assert run.code == 2 and message in run.error()


def test_rows_longer_than_the_table_of_positions_are_refused():
    small = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8}
    opt = transformers.OPTConfig(max_position_embeddings=64, ffn_dim=8, word_embed_proj_dim=8, **small)
    gpt2 = transformers.GPT2Config(n_positions=64, **small)
    for config in (opt, gpt2):
        model = utils.skeleton(config)
        engines.check_layers(SimpleNamespace(fsdp_config=None), model, 64)
        with pytest.raises(UserError) as caught:
            engines.check_layers(SimpleNamespace(fsdp_config=None), model, 65)
        assert str(caught.value) == (
            "rows of up to 65 tokens, but this model has 64 positions; give --model_max_length 64"
        )
    llama = utils.skeleton(transformers.LlamaConfig(max_position_embeddings=64, **small))
    engines.check_layers(SimpleNamespace(fsdp_config=None), llama, 65)


@pytest.mark.parametrize("script", ["train.py", "chat.py"])
def test_code_out_of_model_folders_is_refused_with_the_reason(script):
    words = ["--model_name_or_path", "x", "--trust_remote_code", "True"]
    done = subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "code out of model folders is never run" in done.stderr


def test_a_word_too_many_is_named_with_the_option_before_it():
    with pytest.raises(UserError) as caught:
        parse("--optim_target_modules", "attn", "mlp")
    assert "'mlp'" in str(caught.value) and "--optim_target_modules takes one value" in str(caught.value)
    assert ".*(one|other).*" in str(caught.value)
