"""Held-out records, best weights, stopping early, loss.png, and options from a file or in another project's words.

That the loss is the exact mean of all targets, on every engine, is shown in test_lora.py.
"""

import json
import struct
import sys

import pytest
import torch
from conftest import FSDP, basic_options, make_records, refusal, train
from safetensors.torch import load_file

import train as trainer
from utils import UserError


def write_records(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


# --- Which records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(14, 14), (0.2, 14), (0.001, 1), (69, 69)])
def test_records_are_held_out_at_random_and_always_the_same(size, count, data, tokenizer):
    dataset = trainer.SupervisedDataset(data, tokenizer)
    (rest, out), again = trainer.hold_out(dataset, size), trainer.hold_out(dataset, size)
    assert (len(rest), len(out)) == (70 - count, count) and again[1].sources == out.sources
    assert sorted(rest.sources + out.sources) == sorted(dataset.sources) and len(dataset) == 70
    for part in (rest, out):
        for i, name in enumerate(part.sources):
            assert torch.equal(part.input_ids[i], dataset.input_ids[dataset.sources.index(name)])
    assert 2 < sum(int(name[13:-1]) < 35 for name in out.sources) < 12 or count != 14  # not the first, nor the last


@pytest.mark.parametrize("size", [70, 1000])
def test_not_all_records_can_be_held_out(size, data, tokenizer):
    with pytest.raises(UserError, match=f"--val_set_size {size}: of 70 records"):
        trainer.hold_out(trainer.SupervisedDataset(data, tokenizer), size)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--eval_strategy epoch", "--eval_strategy: there is no data to evaluate on; give --val_set_size 0.02 or"),
        ("--save_strategy best", "--save_strategy best: there is no data to evaluate on; give --val_set_size 0.02 or"),
        ("--early_stopping_patience 2", "--early_stopping_patience: there is no data to evaluate on; give"),
        ("--val_set_size 9 --eval_data_path x.json", "--val_set_size and --eval_data_path: give one of them"),
        ("--val_set_size -1", "--val_set_size -1: it must be at least 0"),
        (
            "--load_best_model_at_end True",
            "--load_best_model_at_end: there is no data to evaluate on; give --val_set_size",
        ),
        (
            "--val_set_size 9 --metric_for_best_model accuracy",
            "--metric_for_best_model accuracy: there is the loss only",
        ),
        ("--val_set_size 9 --greater_is_better True", "--greater_is_better: the lower loss is"),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0: it must be at least 1"),
    ],
)
def test_evaluation_without_data_is_refused_with_the_way_to_give_some(words, said, tmp_path):
    assert said in refusal(words, tmp_path)


def parse(*words):
    model_args, data_args, args, _ = trainer.parse_arguments(
        ["--use_cpu", "True", "--output_dir", "x", *map(str, words)]
    )
    return model_args, data_args, args


@pytest.mark.parametrize(
    ("words", "strategy", "steps"),
    [
        ([], "epoch", None),
        (["--eval_steps", 0.01], "steps", 0.01),
        (["--eval_strategy", "steps"], "steps", 0.1),
        (["--eval_strategy", "steps", "--eval_steps", 7], "steps", 7),
        (["--load_best_model_at_end", True, "--save_steps", 9], "steps", 9),
    ],
)
def test_data_to_evaluate_on_is_evaluated_on(words, strategy, steps):
    args = parse("--val_set_size", 0.1, "--per_device_train_batch_size", 3, *words)[2]
    assert (args.eval_strategy, args.eval_steps, args.per_device_eval_batch_size) == (strategy, steps, 3)


# --- Real runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine", [pytest.param([], id="single"), pytest.param(list(FSDP), id="fsdp", marks=pytest.mark.slow)]
)
def test_a_run_stops_early_and_writes_the_best_weights(engine, base, data, tmp_path):
    """Trained on other records than it is evaluated on, at a rate that soon makes these worse."""
    other = write_records(
        tmp_path / "other.json", [{"instruction": f"Say {i}.", "output": "ab" * i} for i in range(1, 9)]
    )
    options = {"eval_data_path": other, "eval_strategy": "steps", "eval_steps": 3, "early_stopping_patience": 2}
    options |= {"save_strategy": "steps", "save_steps": 6, "load_best_model_at_end": True, "save_total_limit": 1}
    options |= {"learning_rate": "2e-2", "num_train_epochs": 4, "per_device_train_batch_size": 4 if engine else 8}
    words = basic_options(base, data, "./run", **options) + engine  # a path that is written in another way than read
    run = train(words, 2 if engine else 1, cwd=tmp_path)
    run.folder = tmp_path / "run"
    losses = run.finished().column("eval_loss")
    best, last = min(losses, key=losses.get), max(losses)
    assert last == best + 6 < 36 and losses[best] < losses[0]
    assert "stopping early: no better loss in 2 evaluations (--early_stopping_patience)\n" in run.err
    assert run.info()["results"] | {"eval_losses": 0} == run.info()["results"] | {
        "eval_losses": 0, "steps": last, "best_step": best, "weights_of_step": best}  # fmt: skip
    kept = run.folder / f"checkpoint-{best}" / "model.safetensors"  # the best one stays, beside the newest
    assert {path.name for path in run.folder.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-6"}
    old, new = load_file(kept), run.weights()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert run.info()["data"].keys() == {str(data), str(other)}


def test_what_is_held_out_is_a_setting_of_the_run(tmp_path):
    def settings(*words):
        model_args, data_args, args = parse(*words, "--data_path", "a.json")
        return trainer.settings_of(args, model_args, data_args, {"a.json": "1", "b.json": "2"})

    plain = settings()
    for words in (("--val_set_size", 5), ("--eval_data_path", "b.json"), ("--train_on_inputs", "True")):
        for old, new in ((settings(*words), plain), (plain, settings(*words))):
            with pytest.raises(UserError, match="its run had other settings"):
                trainer.check_settings("out", [{"settings": old}], new, False)
    assert (
        trainer.check_settings(
            "out", [{"settings": settings("--val_set_size", 5)}], settings("--val_set_size", 5), False
        )
        == []
    )


@pytest.mark.slow
def test_the_best_is_saved_where_the_best_is_asked_for_and_copies_are_told(base, data, tmp_path):
    records = write_records(tmp_path / "held.json", make_records(3) + [{"instruction": "Say a.", "output": "b"}])
    options = {"eval_data_path": records, "save_strategy": "best", "eval_strategy": "epoch", "num_train_epochs": 2}
    run = train(basic_options(base, data, tmp_path / "run", **options)).finished()
    assert "warning: 3 of 4 held-out records are among the trained ones word by word\n" in run.err
    assert run.column("eval_loss").keys() == {0, 9, 18}
    assert {path.name for path in run.folder.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-18"}
    assert "of the last weights, those of step 18" in run.out
    results = run.info()["results"]
    assert results["weights_of_step"] == 18 and results["eval_losses"].keys() == {"0", "9", "18"}
    png = (run.folder / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24]) == (800, 450)


def test_a_plot_that_fails_is_told_and_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer.write_loss_png([{"step": 1, "loss": 2.0, "learning_rate": 1.0}], tmp_path / "loss.png")
    assert "loss.png: not drawn (" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- Options from files, and other projects' words ---------------------------------------------------------------------

AXOLOTL = """
base_model: ./base
base_model_config: ./base
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: a.json
    type: alpaca
  - path: b.json
val_set_size: 0.02
output_dir: ./out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
micro_batch_size: 10
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: true
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 100
eval_steps: 0.01
save_strategy: epoch
save_steps:
special_tokens:
  pad_token: "<unk>"
"""


@pytest.mark.parametrize("kind", ["yml", "json"])
def test_axolotls_file_of_options_is_a_command_line(kind, tmp_path, capsys):
    import yaml

    path = tmp_path / f"qlora.{kind}"
    path.write_text(AXOLOTL if kind == "yml" else json.dumps(yaml.safe_load(AXOLOTL)), encoding="utf-8")
    model_args, data_args, args, given = trainer.parse_arguments([str(path), "--use_cpu", "True", "--lora_r", "16"])
    wanted = {
        "output_dir": "./out", "load_in_4bit": True, "model_max_length": 2048, "lora_r": 16, "lora_alpha": 16,
        "lora_dropout": 0.05, "per_device_train_batch_size": 10, "num_train_epochs": 3, "optim": "paged_adamw_32bit",
        "lr_scheduler_type": "cosine", "learning_rate": 2e-4, "bf16": True, "warmup_steps": 100, "eval_steps": 0.01,
        "eval_strategy": "steps", "save_strategy": "epoch", "lora_target_modules": [], "gradient_checkpointing": True,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert (data_args.data_path, data_args.val_set_size) == (["a.json", "b.json"], 0.02)
    assert (model_args.model_name_or_path, model_args.dtype, data_args.train_on_inputs) == ("./base", "bfloat16", False)
    err = capsys.readouterr().err
    ignored = (
        "base_model_config, model_type, adapter, sample_packing, lora_target_linear, flash_attention, special_tokens"
    )
    assert f"{path}: without meaning here, ignored: {ignored}\n" in err
    assert "--sequence_len is now --model_max_length\n" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not YAML"),
        ("- a\n", "it should hold options, as learning_rate: 2e-5"),
        ("learning_rat: 1", "unknown option: --learning_rat (did you mean --learning_rate?)"),
        ("load_in_8bit: true", "--load_in_8bit True is not there; --load_in_4bit True is"),
        ("datasets: [{path: a, type: sharegpt}]", 'datasets: {"path": "a", "type": "sharegpt"}: expected {path, type'),
        ("datasets: a.json", 'datasets: "a.json": expected {path, type: alpaca}'),
    ],
)
def test_a_file_of_options_that_cannot_be_meant(text, said, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        trainer.parse_arguments([str(path), "--output_dir", "x", "--use_cpu", "True"])
    assert said in str(caught.value)


ALPACA_LORA = (
    "--base_model llama-7b --data_path data.json --output_dir lora-alpaca --batch_size 128 --micro_batch_size 4 "
    "--num_epochs 3 --learning_rate 1e-4 --cutoff_len 512 --val_set_size 2000 --lora_r 4 --lora_alpha 32 "
    "--lora_dropout 0.1 --train_on_inputs --group_by_length --prompt_template_name alpaca --add_eos_token "
    "--resume_from_checkpoint checkpoint-8 --wandb_project p --use_cpu True"
).split() + ["--lora_target_modules", "[q_proj,v_proj]"]


def test_alpaca_loras_command_line_is_taken(capsys):
    model_args, data_args, args, _ = trainer.parse_arguments(ALPACA_LORA)
    wanted = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 32, "num_train_epochs": 3, "lora_alpha": 32,
        "learning_rate": 1e-4, "model_max_length": 512, "lora_r": 4, "lora_dropout": 0.1, "eval_strategy": "epoch",
        "lora_target_modules": ["q_proj", "v_proj"], "train_sampling_strategy": "group_by_length",
        "resume_from_checkpoint": "checkpoint-8",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert (model_args.model_name_or_path, data_args.val_set_size, data_args.train_on_inputs) == (
        "llama-7b",
        2000,
        True,
    )
    err = capsys.readouterr().err
    for name in ("prompt_template_name", "add_eos_token", "wandb_project"):
        assert f"--{name} has no meaning any more; ignored\n" in err


def test_alpaca_lora_trains_adapters_without_being_asked(capsys, monkeypatch):
    args = parse("--base_model", "llama-7b")[2]
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules) == (
        8,
        16,
        0.05,
        ["q_proj", "v_proj"],
    )
    assert "--base_model: as alpaca-lora does --lora_r 8 --lora_alpha 16 " in capsys.readouterr().err
    args = parse("--base-model", "llama-7b", "--lora-r", 16)[2]
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules) == (
        16,
        16,
        0.05,
        ["q_proj", "v_proj"],
    )
    words, _ = trainer.translate_old_options("--batch-size 128 --micro-batch-size 4".split())
    assert words == "--gradient_accumulation_steps 32 --per_device_train_batch_size 4".split()
    for wrong in ("--batch_size abc", "--batch_size 8 --micro_batch_size 0"):
        with pytest.raises(UserError, match="it must be a number of at least 1"):
            trainer.translate_old_options(wrong.split())
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--batch_size 128: it is no multiple of micro-batch x processes, 12"):
        trainer.translate_old_options("--batch_size 128 --micro_batch_size 4".split())
    with pytest.raises(UserError, match="--prompt_template_name vigogne is not there"):
        trainer.translate_old_options("--prompt_template_name vigogne".split())


def test_all_tokens_are_trained_where_that_is_asked_for(data, tokenizer):
    masked, whole = (trainer.SupervisedDataset(data, tokenizer, train_all=flag) for flag in (False, True))
    for ids, labels, all_labels in zip(whole.input_ids, masked.labels, whole.labels, strict=True):
        assert torch.equal(all_labels, ids)
        assert torch.equal(labels[labels != -100], ids[labels != -100]) and (labels == -100).any()
