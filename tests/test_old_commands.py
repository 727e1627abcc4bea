"""Commands of the 2023 tutorials with only paths and process count changed: they run, and the model learns."""

import json
import shlex

import pytest
import torch
from conftest import ROOT, computes_fp16, launcher, make_records, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train as trainer

SHARED = (
    "--num_train_epochs 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
    '--evaluation_strategy "no" --save_strategy "steps" --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 '
    '--lr_scheduler_type "cosine" --logging_steps 1'
)
# The DeepSpeed JSON of the tutorials, which leaves out accumulation and clipping and starts fp16 at a scale of 2^32.
TUTORIAL_JSON = {
    "zero_optimization": {
        "stage": 3,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 1e2,
        "reduce_bucket_size": 1e2,
        "sub_group_size": 1e8,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "fp16": {
        "enabled": True,
        "auto_cast": False,
        "loss_scale": 0,
        "initial_scale_power": 32,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.fixture(scope="module")
def many_records(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "alpaca_data.json"
    path.write_text(json.dumps(make_records(320)), encoding="utf-8")
    return path


def loss_of(folder, data, tokenizer):
    """The mean loss of a saved model over the targets of the first 200 records, in fp32."""
    dataset = trainer.SupervisedDataset(data, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = count = 0
    with torch.no_grad():
        for start in range(0, 200, 10):
            batch = trainer.flatten([dataset[i] for i in range(start, start + 10)])
            targets = batch["shift_labels"].numel()
            total += model(**batch).loss.item() * targets
            count += targets
    return total / count


def check_learned(run, base, data, tokenizer):
    run.finished()
    before, after = load_file(base / "model.safetensors"), run.weights()
    assert before.keys() == after.keys()
    assert all((before[name] != after[name].float()).any() for name in before if "norm" not in name)
    assert loss_of(run.folder, data, tokenizer) < loss_of(base, data, tokenizer) - 0.005


def torchrun(options, **places):
    return train(shlex.split(options.format(**places)), command=launcher(2))


@pytest.fixture(scope="module")
def fsdp_run(base, many_records, tmp_path_factory):
    """The command of Stanford Alpaca's README."""
    return torchrun(
        "--model_name_or_path {m} --data_path {d} --bf16 True --output_dir {o} --gradient_accumulation_steps 8 "
        f"{SHARED} --save_steps 2000 --save_total_limit 1 --report_to tensorboard --fsdp 'full_shard auto_wrap' "
        "--fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --tf32 True",
        m=base,
        d=many_records,
        o=tmp_path_factory.mktemp("fsdp") / "out",
    )


def test_readme_command_trains_under_fsdp(fsdp_run, base, many_records, tokenizer):
    check_learned(fsdp_run, base, many_records, tokenizer)
    assert fsdp_run.code == 0
    assert "engine: FSDP, 2 processes on cpu, 117,408 of 234,816 parameters here" in fsdp_run.err
    assert "= global batch 64, 5 steps" in fsdp_run.err
    assert "weights float32, masters float32, compute bfloat16" in fsdp_run.err


def test_every_old_option_is_said_in_one_line(fsdp_run):
    for line in (
        "--evaluation_strategy is now --eval_strategy",
        "--warmup_ratio is now --warmup_steps",
        '--fsdp_transformer_layer_cls_to_wrap is now --fsdp_config {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}',
        "--tf32 needs a GPU of the Ampere generation or newer; ignored here",
    ):
        assert fsdp_run.err.splitlines().count(line) == 1


def test_warmup_ratio_and_cosine_give_the_old_schedule(fsdp_run):
    """5 steps, 3 % of which round up to 1 step of warm-up; then half a cosine to 0 over 4 steps."""
    import csv
    import math

    rates = [float(row["learning_rate"]) for row in csv.DictReader(open(fsdp_run.folder / "loss.csv"))]
    expected = [0.0] + [2e-5 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_tensorboard_gets_its_file_and_one_checkpoint_is_kept(fsdp_run):
    assert len(list(fsdp_run.folder.glob("runs/*/events.out.tfevents.*"))) == 1
    assert [path.name for path in fsdp_run.folder.glob("checkpoint-*")] == ["checkpoint-5"]


@pytest.mark.slow
def test_readme_command_with_offload(base, many_records, tokenizer, tmp_path):
    run = torchrun(
        "--model_name_or_path {m} --data_path {d} --bf16 True --output_dir {o} --gradient_accumulation_steps 8 "
        f"{SHARED} --save_steps 2000 --save_total_limit 1 --fsdp 'full_shard auto_wrap offload' "
        "--fsdp_transformer_layer_cls_to_wrap 'LLaMADecoderLayer' --tf32 True",
        m=base,
        d=many_records,
        o=tmp_path / "out",
    )
    check_learned(run, base, many_records, tokenizer)
    assert "engine: FSDP with offload, 2 processes on cpu" in run.err
    assert "FSDP layer class LLaMADecoderLayer is LlamaDecoderLayer in this model" in run.err


@pytest.mark.slow
def test_deepspeed_command_with_our_json(deepspeed_ready, base, many_records, tokenizer, tmp_path):
    run = torchrun(
        "--model_name_or_path {m} --data_path {d} --output_dir {o} --gradient_accumulation_steps 4 "
        f"{SHARED} --save_steps 1000 --save_total_limit 1 --report_to tensorboard --gradient_checkpointing True "
        "--fp16 True --deepspeed {root}/ds_config.json",
        m=base,
        d=many_records,
        o=tmp_path / "out",
        root=ROOT,
    )
    check_learned(run, base, many_records, tokenizer)
    assert "engine: ZeRO-3 with offload, 2 processes on cpu, 117,408 of 234,816 parameters here" in run.err
    if computes_fp16():
        assert "weights float16, masters float32, compute float16" in run.err
    else:
        assert "fp16 under DeepSpeed needs a GPU, or a CPU that computes in fp16; computing in float32 here" in run.err
        assert "weights float32, masters float32, compute float32" in run.err
    assert run.info()["results"]["skipped_steps"] == 0


@pytest.mark.slow
def test_tutorials_json_trains_after_its_scale_has_come_down(deepspeed_ready, base, many_records, tokenizer, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(TUTORIAL_JSON))
    run = torchrun(
        "--model_name_or_path {m} --data_path {d} --output_dir {o} --gradient_accumulation_steps 3 "
        f"{SHARED} --save_steps 1000 --save_total_limit 1 --gradient_checkpointing True --fp16 True --deepspeed {{c}}",
        m=base,
        d=many_records,
        o=tmp_path / "out",
        c=config,
    )
    check_learned(run, base, many_records, tokenizer)
    assert f'{config}: added gradient_accumulation_steps, gradient_clipping, bf16 as "auto"' in run.err
    skipped = run.info()["results"]["skipped_steps"]
    if computes_fp16():
        assert 10 <= skipped <= 20  # from 2^32 down to where fp16 holds the gradients
        assert f"overflow: step skipped ({skipped} so far)" in run.err
    else:
        assert skipped == 0


@pytest.mark.slow
def test_vicuna_era_command_under_the_deepspeed_launcher(deepspeed_ready, base, many_records, tokenizer, tmp_path):
    lines = [json.dumps(record) for record in json.loads(many_records.read_text())]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    options = shlex.split(
        f"--deepspeed {ROOT}/ds_config.json --model_name_or_path {base} --data_path {data} --bf16 True "
        f"--output_dir {tmp_path}/out --gradient_accumulation_steps 4 {SHARED} --save_steps 1200 --save_total_limit 5 "
        "--tf32 True --model_max_length 512 --gradient_checkpointing True"
    )
    run = train(options, command=["deepspeed", "--num_gpus", "2", "--master_port", "25013"])
    check_learned(run, base, data, tokenizer)
    assert "weights bfloat16, masters float32, compute bfloat16" in run.err
