"""LoRA and QLoRA on every engine: real runs against each other, against peft in a plain loop, and resumed ones.

70 records, of which 14 are held out: 14 steps of 8 in two epochs, a checkpoint and an evaluation every 4.
"""

import io
import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import FSDP, ROOT, ZERO2, ZERO3, basic_options, finish, read_targets, refusal, start, train
from safetensors.torch import load_file

import apply_delta
import chat
import engines
import train as trainer
import utils
from utils import UserError

STEPS, RATE, SEED, HELD_OUT = 14, 1e-2, 42, 14
# name -> (processes, options beside those of OPTIONS)
RUNS = {
    "single": (1, {"per_device_eval_batch_size": 1}),
    "checkpointing": (1, {"gradient_checkpointing": True, "padded": True, "per_device_eval_batch_size": 5}),
    "fsdp checkpointing": (2, {"fsdp": FSDP[1], "gradient_checkpointing": True, "per_device_eval_batch_size": 3}),
    "zero3": (2, {"deepspeed": ZERO3[1], "per_device_eval_batch_size": 2}),
    "ddp": (2, {"per_device_eval_batch_size": 4}),
    "zero2": (2, {"deepspeed": ZERO2[1]}),
    "fsdp": (2, {"fsdp": FSDP[1]}),
}
QUICK = ("single", "fsdp checkpointing")
OPTIONS = {
    "num_train_epochs": 2,
    "learning_rate": RATE,
    "lora_r": 8,
    "val_set_size": HELD_OUT,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "load_best_model_at_end": True,
}


def every_engine(test):
    """Run a test with each of RUNS, and with DeepSpeed's operators built where they are needed."""
    names = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RUNS]
    return pytest.mark.usefixtures("deepspeed_ready")(pytest.mark.parametrize("name", names)(test))


@pytest.fixture
def deepspeed_ready(request):
    """Ask for the fixture of the same name in conftest.py, except in a test of a run without DeepSpeed."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name is None or "deepspeed" in RUNS[name][1]:
        request.getfixturevalue("deepspeed_ready")


def options_of(name, base, data, folder, **changes):
    processes, more = RUNS[name]
    options = OPTIONS | {"per_device_train_batch_size": 8 // processes} | more | changes
    return basic_options(base, data, folder, **options)


@pytest.fixture(scope="session")
def runs(base, data, tmp_path_factory):
    """A function from the name of a run to what it left; each is made once."""
    made, folder = {}, tmp_path_factory.mktemp("lora")

    def get(name):
        if name not in made:
            made[name] = train(options_of(name, base, data, folder / name.replace(" ", "_")), RUNS[name][0]).finished()
        return made[name]

    return get


def adapters(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def difference(first, second):
    """The largest difference of two sets of tensors, which must have the same names, and more than none."""
    assert first.keys() == second.keys() and len(first) == 28  # A and B of seven layers in two blocks
    return max((first[name] - second[name]).abs().max().item() for name in first)


def read_rows(tokenizer):
    """The 70 records as (ids, labels), made one by one: those trained, and those held out."""
    rows = read_targets(tokenizer)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(42)).tolist()
    return [rows[i] for i in sorted(order[HELD_OUT:])], [rows[i] for i in sorted(order[:HELD_OUT])]


def losses_of(model, rows):
    """(the sum of the losses of rows, each alone, the number of their targets)"""
    total, count = 0.0, 0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        count += sum(label != -100 for label in labels[1:])
    return total, count


@pytest.fixture(scope="session")
def reference(base, tokenizer):
    """peft in a plain PyTorch loop, example by example: losses, losses on the held-out rows by step, adapters."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    transformers.set_seed(SEED)
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    trained, held_out = read_rows(tokenizer)
    losses, evaluated, saved = {}, {}, {}

    def evaluate(step):
        with torch.no_grad():
            total, count = losses_of(model, held_out)
        evaluated[step] = float(total / count)
        saved[step] = {k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()}

    evaluate(0)
    for step in range(STEPS):
        order = torch.randperm(56, generator=torch.Generator().manual_seed(SEED + step // 7)).tolist()
        total, count = losses_of(model, [trained[i] for i in order[step % 7 * 8 : step % 7 * 8 + 8]])
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[step + 1] = float((total / count).detach())
        if (step + 1) % 4 == 0 or step + 1 == STEPS:
            evaluate(step + 1)
    return losses, evaluated, saved


# --- Every engine is peft in a plain loop ----------------------------------------------------------------------------


@every_engine
def test_every_engine_takes_the_steps_of_peft_in_a_plain_loop(runs, name, reference):
    run = runs(name)
    assert run.column("loss") == pytest.approx(reference[0], abs=1e-5)
    assert "; LoRA of rank 8 on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\n" in run.err
    assert "of 255,296 parameters here, 20,480 trained, weights float32, masters float32" in run.err


@every_engine
def test_the_loss_on_held_out_records_is_the_mean_of_all_their_targets(runs, name, reference):
    """In micro-batches of 1 to 5, filled or not, on one process or two: weights that are equal give 1e-6."""
    found = runs(name).column("eval_loss")
    assert found.keys() == {0, 4, 8, 12, 14}
    assert found[0] == pytest.approx(reference[1][0], abs=1e-6)
    assert found == pytest.approx(reference[1], abs=1e-5)


@every_engine
def test_the_adapters_are_pefts_by_name_and_value_in_every_checkpoint(runs, name, reference):
    run, saved = runs(name), reference[2]
    for step in (4, 8, 12, 14):
        assert difference(adapters(run.folder / f"checkpoint-{step}"), saved[step]) < 1e-4  # of Adam's steps of 1e-2
    best = min(run.column("eval_loss").items(), key=lambda pair: pair[1])[0]
    results = run.info()["results"]
    assert (results["best_step"], results["weights_of_step"]) == (best, best)
    assert difference(adapters(run.folder), adapters(run.folder / f"checkpoint-{best}")) == 0


@pytest.mark.usefixtures("deepspeed_ready")
@pytest.mark.parametrize("name", ["fsdp checkpointing", pytest.param("zero3", marks=pytest.mark.slow)])
def test_the_adapters_are_what_the_engine_itself_has_saved(runs, name):
    """Gathered by accelerate from FSDP's shards, by DeepSpeed's own tool from those of ZeRO."""
    folder = runs(name).folder / "checkpoint-12"
    if name == "zero3":
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        states = get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        states = torch.load(folder / "pytorch_model_fsdp.bin", weights_only=True)
    states = {key.replace(".default", ""): tensor for key, tensor in states.items() if "lora_" in key}
    assert difference(adapters(folder), states) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_ready")
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_in_the_same_bits(runs, name, base, data, tmp_path):
    unbroken = runs(name)
    folder = tmp_path / "again"
    shutil.copytree(unbroken.folder / "checkpoint-4", folder / "checkpoint-4")
    run = unbroken.info() | {"status": "started", "files": []}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    again = train(options_of(name, base, data, folder), RUNS[name][0]).finished()
    assert f"resuming from {folder / 'checkpoint-4'}\n" in again.err and "step 4/" not in again.err
    for step in (8, 14):
        old, new = (adapters(one.folder / f"checkpoint-{step}") for one in (unbroken, again))
        assert difference(old, new) == 0
    assert difference(adapters(unbroken.folder), adapters(folder)) == 0
    assert again.column("eval_loss") == unbroken.column("eval_loss")


def test_what_a_run_leaves_is_an_adapter_folder_of_peft(runs, base):
    run = runs("single")
    names = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.csv",
        "loss.png",
        "run.json",
        "trainer_state.json",
    }
    names |= {"tokenizer.json", "tokenizer_config.json", ".lock"}
    assert {path.name for path in run.folder.iterdir() if not path.name.startswith("checkpoint-")} == names
    assert set(run.info()["files"]) == names - {"run.json", ".lock"}
    config = json.loads((run.folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(base) and config["target_modules"] == sorted(
        config["target_modules"]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, run.folder)
    loaded = peft.get_peft_model_state_dict(model)
    assert difference({k: v for k, v in loaded.items()}, adapters(run.folder)) == 0


def test_the_folder_says_which_weights_it_holds_and_which_records_were_held_out(runs, tokenizer):
    run = runs("single")
    best, loss = min(run.column("eval_loss").items(), key=lambda pair: pair[1])
    said = f"held-out loss {loss:.4f} of the best weights, those of step {best}"
    assert run.out.splitlines()[-1].endswith(said)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(42)).tolist()
    assert run.info()["held_out"] == [f"records.json[{i}]" for i in sorted(order[:HELD_OUT])]
    assert f"data: {HELD_OUT} of the records are held out to evaluate on, 56 are trained\n" in run.err


# --- The same run again, other settings, other shapes ----------------------------------------------------------------


@pytest.mark.slow
def test_the_same_run_again_from_its_run_json_and_a_refusal_of_others(runs, base, data, tmp_path):
    run = runs("single")
    again = train([run.folder / "run.json", "--output_dir", tmp_path / "again"]).finished()
    assert difference(adapters(run.folder), adapters(again.folder)) == 0
    settings = again.info()["settings"]
    for changes, said in (({"lora_r": 4}, "lora_r was 8 and is 4"), ({"lora_r": None}, "lora_r was 8 and is None")):
        with pytest.raises(UserError, match=said):
            trainer.resume_point(again.folder, settings | changes)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("engine", [pytest.param({}, id="single"), pytest.param({"fsdp": FSDP[1]}, id="fsdp", marks=pytest.mark.slow), 
                                    pytest.param({"deepspeed": ZERO3[1]}, id="zero3", marks=pytest.mark.slow)])  # fmt: skip
def test_modules_trained_whole_are_saved_in_float32(engine, precision, base, data, tmp_path, request):
    if "deepspeed" in engine:
        request.getfixturevalue("deepspeed_ready")
    changes = {"lora_modules_to_save": "embed_tokens,lm_head", "lora_target_modules": "[q_proj,v_proj]"} | engine
    changes |= {"bf16": True} if precision == "bf16" else {}
    processes, share = (2, 4) if engine else (1, 8)
    words = basic_options(
        base, data, tmp_path / "run", lora_r=8, learning_rate=RATE, per_device_train_batch_size=share, **changes
    )
    run = train(words, processes).finished()
    found = adapters(run.folder)
    old = load_file(base / "model.safetensors")
    whole = {
        "model.embed_tokens": "base_model.model.model.embed_tokens.weight",
        "lm_head": "base_model.model.lm_head.weight",
    }
    assert len(found) == 10 and {tensor.dtype for tensor in found.values()} == {torch.float32}
    for module, key in whole.items():
        assert found[key].shape == (1000, 64) and not torch.equal(found[key], old[f"{module}.weight"])
    assert "q_proj, v_proj, and embed_tokens, lm_head whole" in run.err
    assert run.losses()[-1] < 4 < 6 < run.losses()[0]


@pytest.mark.slow
def test_tied_embeddings_trained_whole_stay_tied(base, data, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    for path in base.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "tied")
    words = basic_options(tmp_path / "tied", data, tmp_path / "run", lora_r=8, learning_rate=RATE)
    run = train([*words, "--lora_modules_to_save", "embed_tokens,lm_head"]).finished()
    assert run.losses()[-1] < run.losses()[0] - 1
    apply_delta.apply_delta(tmp_path / "tied", tmp_path / "merged", run.folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tied", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base_model, run.folder)
    ids = torch.arange(5, 40)[None]
    assert (merged(ids).logits - adapted(ids).logits).abs().max() < 1e-5
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


# --- QLoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def dequantised(base, tmp_path_factory):
    """The tiny model with the values that its 4-bit form stands for."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the optional package bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("models") / "dequantised"
    args = trainer.TrainingArguments("x", use_cpu=True, lora_r=8, load_in_4bit=True)
    four = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **engines.in_4bit(args))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in four.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_submodule(name).weight.data = weight.contiguous()
    model.save_pretrained(folder)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, folder)
    old, new = (load_file(path / "model.safetensors") for path in (base, folder))
    key = "model.layers.0.mlp.down_proj.weight"
    assert 0.05 < ((old[key] - new[key]).norm() / old[key].norm()) < 0.15  # NF4's error on normal weights: 9 %
    assert torch.equal(old["lm_head.weight"], new["lm_head.weight"])
    return folder


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_qlora_is_lora_on_the_dequantised_base(processes, base, dequantised, data, tmp_path):
    options = {"val_set_size": 8, "eval_strategy": "steps", "eval_steps": 3}  # evaluated in between
    options |= {"lora_r": 8, "learning_rate": RATE, "per_device_train_batch_size": 8 // processes}
    runs = {}
    for name, model, more in (("4 bits", base, ["--load_in_4bit", "True"]), ("whole", dequantised, [])):
        words = basic_options(model, data, tmp_path / name.replace(" ", ""), **options) + more
        runs[name] = start(words, processes), words
    four, whole = (finish(*pair).finished() for pair in runs.values())
    assert four.column("loss") == whole.column("loss") and four.column("eval_loss") == whole.column("eval_loss")
    assert difference(adapters(four.folder), adapters(whole.folder)) == 0
    assert "of 255,296 parameters here, 20,480 trained, weights float32/uint8, masters float32" in four.err
    assert "the rest in 4 bits\n" in four.err


def test_widths_that_a_cpu_gets_wrong_are_refused(base, data, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the optional package bitsandbytes is not installed")
    config = transformers.LlamaConfig.from_pretrained(base, intermediate_size=172)
    with pytest.raises(UserError, match=r"down_proj is \[64, 172\], whose width is no multiple of 64"):
        engines.check_4bit(utils.skeleton(config))
    assert engines.check_4bit(utils.skeleton(utils.load_config(base))) is None


# --- What does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--load_in_4bit True", "--load_in_4bit: weights in 4 bits cannot be trained; give --lora_r 16 too"),
        ("--lora_r 8 --pad_token add", "--pad_token add: gives the model a row that adapters do not hold"),
        ("--lora_r 8 --dtype bfloat16", "--dtype bfloat16: adapters in float32 need --bf16 True or --fp16 True"),
        ("--lora_r -1", "--lora_r -1: it must be at least 1"),
        ("--lora_r 8 --lora_alpha 0", "--lora_alpha 0: it must be more than 0"),
        ("--lora_r 8 --lora_dropout 1", "--lora_dropout 1: it must be at least 0 and below 1"),
    ],
)
def test_what_does_not_go_with_lora_is_refused(words, said, tmp_path):
    assert said in refusal(words, tmp_path)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_four_bits_are_refused_where_an_engine_would_compute_with_wrong_weights(name, tmp_path):
    args = trainer.TrainingArguments("x", use_cpu=True, lora_r=8, load_in_4bit=True)
    args.fsdp_config, args.deepspeed = {"cpu_offload": False}, None
    setattr(args, name, {"zero_optimization": {"stage": 2}} if name == "deepspeed" else True)
    with pytest.raises(UserError, match="--load_in_4bit: .* give --lora_r with --fsdp and without --load_in_4bit"):
        engines.check_adapter_options(args, "float32")


def test_a_module_that_is_not_there_is_named_with_those_that_are(base, tmp_path):
    bones = utils.skeleton(utils.load_config(base))
    args = trainer.TrainingArguments("x", use_cpu=True, lora_r=8, lora_target_modules=["q_proj,v_prj"])
    with pytest.raises(
        UserError, match="no module of this model is named v_prj; its linear layers are down_proj, gate"
    ):
        trainer.add_adapters(bones, args)


@pytest.mark.parametrize("options", [{"lora_target_modules": ["self_attn"]}, {"lora_modules_to_save": ["layers"]}])
def test_a_module_that_cannot_be_adapted_is_one_line(options, base):
    args = trainer.TrainingArguments("x", use_cpu=True, lora_r=8, **options)
    with pytest.raises(UserError, match="LoRA: .*; linear layers are down_proj, gate"):
        trainer.add_adapters(utils.skeleton(utils.load_config(base)), args)


@pytest.mark.parametrize("words", ["'[q_proj,v_proj]'", "q_proj,v_proj", "['q_proj', \"v_proj\"]", "[q_proj, v_proj]"])
def test_names_of_modules_are_read_in_every_way_that_people_write_them(words):
    assert trainer.TrainingArguments("x", use_cpu=True, lora_target_modules=[words]).lora_target_modules == [
        "q_proj",
        "v_proj",
    ]


def test_options_of_lora_without_lora_are_named(tmp_path, capsys):
    trainer.parse_arguments(["--output_dir", str(tmp_path), "--use_cpu", "True", "--lora_alpha", "32"])
    assert "--lora_alpha: without --lora_r, which turns LoRA on; ignored\n" in capsys.readouterr().err


GIB = 2**30


def test_lora_needs_the_memory_of_what_it_trains_and_its_base_once():
    """7B in bf16, 40 million parameters trained: 13 GiB; full fine-tuning 100 GiB; in 4 bits 4 GiB."""
    full = engines.memory_needs(6_738_415_616, 4, True, True, 1, 1)["single process"][0] / GIB
    lora = engines.memory_needs(39_976_960, 4, True, True, 1, 1, 2 * 6_738_415_616)["single process"][0] / GIB
    assert (round(full), round(lora)) == (100, 13)
    needs = engines.memory_needs(40, 4, True, True, 8, 8, 800)
    assert needs["FSDP"] == (40 * 16 / 8 + 100, 40 * 4 + 800) and needs["ZeRO-2"][0] == 40 * (2 + 14 / 8) + 800
    assert needs["FSDP with offload"][1] == 40 * 16 + 800


LLAMA = {  # of Meta's papers: width, inner width, layers, heads, key-value heads; vocabulary 32,000
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "33B": (6656, 17920, 60, 52, 52),
    "70B": (8192, 28672, 80, 64, 8),
}


def card_table():
    """README's table: what fits on one card, by engines.memory_needs and 2 GiB for the activations of a short row."""
    needs = {}
    for name, (width, inner, layers, heads, kv_heads) in LLAMA.items():
        shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        config = transformers.LlamaConfig(vocab_size=32000, **shape)
        for method, options in (("QLoRA", {"load_in_4bit": True}), ("LoRA", {}), ("full", {"lora_r": 0})):
            args = trainer.TrainingArguments("x", use_cpu=True, bf16=True, **{"lora_r": 16} | options)
            bones, dtype = utils.skeleton(config), "bfloat16" if args.lora_r else "float32"
            bones = trainer.add_adapters(bones, args, low_cpu_mem_usage=True) if args.lora_r else bones
            counts = engines.count_run(args, dtype, bones)
            needs[name, method] = engines.needs_here(args, dtype, counts)[0]["single process"][0] / GIB + 2
    lines = [f"| card | {' | '.join(LLAMA)} |", "|---" * (len(LLAMA) + 1) + "|"]
    for card in (8, 12, 16, 24, 48, 80, 141):
        fits = [[method for method in ("full", "LoRA", "QLoRA") if needs[name, method] <= card] for name in LLAMA]
        lines.append(f"| {card} GiB | {' | '.join(', '.join(cell) or 'no' for cell in fits)} |")
    return "\n".join(lines)


def test_readme_says_what_fits_on_which_card():
    assert card_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_size_on_disk_is_that_of_the_adapters(monkeypatch, tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--lora_r", "8", "--save_strategy", "no"]
    args = trainer.parse_arguments(words)[2]
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100))
    assert trainer.check_disk(args, 25, 10) is None
    with pytest.raises(UserError):
        trainer.check_disk(args, 26, 10)


# --- Adapters elsewhere ----------------------------------------------------------------------------------------------


def answer(capsys, *words):
    capsys.readouterr()
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    sys.argv = ["chat.py", *map(str, words), "--instruction", "Write lamp 3 times.", "--max_new_tokens", "16"]
    chat.main()
    return capsys.readouterr()


def test_chat_answers_with_adapters_as_with_the_merged_model(runs, base, tmp_path, capsys, monkeypatch):
    run = runs("single")
    apply_delta.apply_delta(base, tmp_path / "merged", run.folder)
    wanted = answer(capsys, "--model_name_or_path", tmp_path / "merged").out
    found = answer(capsys, "--model_name_or_path", run.folder)
    assert wanted.strip() and found.out == wanted
    assert f"adapters: {run.folder}, merged into their base, {base}\n" in found.err
    # a checkpoint with adapters, and adapters whose base has moved with them
    shutil.copytree(run.folder / "checkpoint-14", tmp_path / "moved" / "checkpoint-14")
    shutil.copytree(base, tmp_path / "moved" / "base")
    path = tmp_path / "moved" / "checkpoint-14" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for named in ("../base", "base", "/nowhere/base"):
        path.write_text(json.dumps(config | {"base_model_name_or_path": named}), encoding="utf-8")
        assert answer(capsys, "--model_name_or_path", path.parent).out.strip()
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/else"}), encoding="utf-8")
    with pytest.raises(UserError, match="its base /nowhere/else is not there; give it with --base"):
        answer(capsys, "--model_name_or_path", path.parent)
    assert answer(capsys, "--model_name_or_path", path.parent, "--base", base).out.strip()


def test_adapters_that_do_not_fit_are_named(runs, tmp_path, capsys):
    from make_tiny_llama import make_tiny_llama

    make_tiny_llama(tmp_path / "small", preset="small")
    with pytest.raises(UserError, match="its adapters do not fit .*; give the right one with --base"):
        answer(capsys, "--model_name_or_path", runs("single").folder, "--base", tmp_path / "small")


def test_the_words_of_alpaca_lora_and_merge_peft_are_taken(tmp_path):
    args = apply_delta.parse_args(["--base_model", "a", "--peft_model", "b", "--output_dir", "c"])
    assert (args.base, args.delta, args.target) == ("a", "b", "c")
    args = chat.parse_arguments(["--base_model", "a", "--lora_weights", "b"])
    assert (args.base, args.model_name_or_path) == ("a", "b")
