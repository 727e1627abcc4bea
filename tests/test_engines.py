"""Every engine trains the same model: real runs of train.py, on CPU, against each other and a plain PyTorch loop.

70 records in global batches of 8: nine steps an epoch, the last of them filled with two rows without targets.
"""

import csv
import json
import re
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FSDP,
    ROOT,
    RUN_FILES,
    ZERO2,
    ZERO3,
    basic_options,
    field,
    finish,
    make_records,
    read_targets,
    render_prompt,
    start,
    train,
)

import utils

COUNT, BATCH, STEPS, SEED, RATE = 70, 8, 18, 42, 1e-3
ALL, HALF = "234,816", "117,408"  # the tiny model's parameters, and what one of two processes holds of them
HALF_PRECISION = {"bf16": True}
TORN = {"save_rehearsal": False}

# The runs: name -> (base model, processes, options beside those of basic_options).
RUNS = {
    "single": ("tiny", 1, {}),
    "padded": ("tiny", 1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padded": True}),
    "bf16": ("tiny", 1, HALF_PRECISION),
    "bf16 saved in float32": ("tiny", 1, HALF_PRECISION | {"save_dtype": "float32"}),
    "bloom": ("bloom", 1, {}),
    "torn": ("torn", 1, {}),
    "torn, not rehearsed": ("torn", 1, TORN),
    "learning rate 1e30": ("tiny", 1, {"learning_rate": "1e30", "save_strategy": "steps", "save_steps": 1}),
    "fsdp without launcher": ("tiny", 1, {"fsdp": FSDP[1]}),
    "deepspeed without launcher": ("tiny", 1, {"deepspeed": ZERO3[1]}),
    "ddp": ("tiny", 2, {}),
    "fsdp": ("tiny", 2, {"fsdp": FSDP[1]}),
    "fsdp accumulated": ("tiny", 2, {"fsdp": FSDP[1], "gradient_accumulation_steps": 2}),
    "fsdp offload": (
        "tiny",
        2,
        {
            "fsdp": "full_shard auto_wrap offload",
            "fsdp_transformer_layer_cls_to_wrap": "LLaMADecoderLayer",  # the name of early 2023
            "gradient_checkpointing": True,
        },
    ),
    "zero2": ("tiny", 2, {"deepspeed": ZERO2[1]}),
    "zero3 accumulated": ("tiny", 2, {"deepspeed": ZERO3[1], "gradient_accumulation_steps": 2}),
    "bf16 fsdp": ("tiny", 2, {"fsdp": FSDP[1]} | HALF_PRECISION),
    "bf16 zero3": ("tiny", 2, {"deepspeed": ZERO3[1]} | HALF_PRECISION),
    "bf16 zero3 saved in float32": ("tiny", 2, {"deepspeed": ZERO3[1], "save_dtype": "float32"} | HALF_PRECISION),
    "bloom fsdp": ("bloom", 2, {"fsdp": FSDP[1]}),
    "bloom zero3": ("bloom", 2, {"deepspeed": ZERO3[1]}),
    "opt": ("opt", 1, {}),
    "opt fsdp": ("opt", 2, {"fsdp": FSDP[1]}),
    "opt zero3": ("opt", 2, {"deepspeed": ZERO3[1]}),
    "opt layer class": ("tiny", 2, {"fsdp": FSDP[1], "fsdp_transformer_layer_cls_to_wrap": "OPTDecoderLayer"}),
}
# Those that must equal "single": name -> (engine, parameters here, micro-batch and accumulation).
EQUAL = {
    "single": ("single process", ALL, "8 flat x accumulation 1"),
    "padded": ("single process", ALL, "4 padded x accumulation 2"),
    "ddp": ("DDP", ALL, "4 flat x accumulation 1"),
    "fsdp": ("FSDP", HALF, "4 flat x accumulation 1"),
    "fsdp accumulated": ("FSDP", HALF, "2 flat x accumulation 2"),
    "fsdp offload": ("FSDP with offload", HALF, "4 flat x accumulation 1"),
    "zero2": ("ZeRO-2 with offload", ALL, "4 flat x accumulation 1"),
    "zero3 accumulated": ("ZeRO-3 with offload", HALF, "2 flat x accumulation 2"),
}
QUICK_SINGLES = ("single", "padded", "bloom", "torn", "learning rate 1e30")
QUICK = ("single", "padded", "fsdp", "zero3 accumulated")  # of EQUAL
slow = pytest.mark.slow


def every_engine(test):
    """Run a test with each of EQUAL, and with DeepSpeed's operators built where they are needed."""
    names = [pytest.param(name, marks=[] if name in QUICK else slow) for name in EQUAL]
    return pytest.mark.usefixtures("deepspeed_ready")(pytest.mark.parametrize("name", names)(test))


@pytest.fixture
def deepspeed_ready(request):
    """Ask for the fixture of the same name in conftest.py, except in a test of a run without DeepSpeed."""
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else None
    if name is None or "deepspeed" in RUNS[name][2]:
        request.getfixturevalue("deepspeed_ready")


def run_options(base, data, folder, processes, changes):
    """The options of a run of 18 steps of 8 examples."""
    share = BATCH // processes // changes.get("gradient_accumulation_steps", 1)
    return basic_options(base, data, folder, **{"num_train_epochs": 2, "per_device_train_batch_size": share} | changes)


@pytest.fixture(scope="session")
def bases(base, tmp_path_factory):
    """Base models: the tiny LLaMA, the same with one weight that is not a number, a tiny OPT and Bloom."""
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    folders = {"tiny": base} | {name: tmp_path_factory.mktemp("models") / name for name in ("torn", "opt", "bloom")}
    torn = LlamaForCausalLM.from_pretrained(base)
    torn.lm_head.weight.data[5, 5] = float("nan")
    config = OPTConfig(
        vocab_size=1000,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        opt = OPTForCausalLM(config)
        bloom = BloomForCausalLM(BloomConfig(vocab_size=1000, hidden_size=64, n_layer=2, n_head=4))
    for name, model in (("torn", torn), ("opt", opt), ("bloom", bloom)):
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(base).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def runs(bases, data, tmp_path_factory):
    """A function from the name of a run to what it left; each is made once, when it is first asked for."""
    made, folder = {}, tmp_path_factory.mktemp("engines")

    def options_of(name):
        base, processes, changes = RUNS[name]
        return run_options(bases[base], data, folder / name.replace(" ", "_").replace(",", ""), processes, changes)

    def get(name):
        processes = RUNS[name][1]
        if processes == 1 and name not in made:  # together: alone, each would leave all but one core idle
            group = [other for other, run in RUNS.items() if run[1] == 1]
            singles = [other for other in group if (other in QUICK_SINGLES) == (name in QUICK_SINGLES)]
            started = [start(options_of(other)) for other in singles]
            for other, process in zip(singles, started, strict=True):
                made[other] = finish(process, options_of(other))
        elif name not in made:
            made[name] = train(options_of(name), processes)
        return made[name]

    return get


def rows_of(run):
    """The rows of loss.csv, as numbers; an empty cell is None."""
    with open(run.folder / "loss.csv", encoding="utf-8", newline="") as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]


def column(run, key):
    return [row[key] for row in rows_of(run)]


def largest_difference(first, second):
    """The largest difference of two models' weights, which must have the same names."""
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


def seeded_order(epoch):
    """The order of an epoch's 72 rows: accelerate seeds a permutation with the run's seed plus the epoch."""
    return torch.randperm(72, generator=torch.Generator().manual_seed(SEED + epoch)).tolist()


@pytest.fixture(scope="session")
def reference(base, tokenizer):
    """A plain PyTorch loop over padded batches: its losses, gradient norms, learning rates, targets and weights."""
    from transformers import AutoModelForCausalLM

    rows = read_targets(tokenizer) + [([tokenizer.eos_token_id], [-100])] * 2
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    result = {"loss": [], "grad_norm": [], "learning_rate": [], "num_targets": []}
    for step in range(STEPS):
        first = step % 9 * BATCH
        batch = [rows[i] for i in seeded_order(step // 9)[first : first + BATCH]]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])  # (8, longest)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
        rate = RATE * (1 - step / STEPS)
        optimizer.param_groups[0]["lr"] = rate
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]  # (8, longest - 1, 1000)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for key, value in zip(result, (loss, norm, rate, (labels[:, 1:] != -100).sum()), strict=True):
            result[key].append(float(value.detach() if isinstance(value, torch.Tensor) else value))
    return result | {"weights": {name: tensor.detach() for name, tensor in model.state_dict().items()}}


# ---------------------------------------------------------------------------------------------------------------------
# In float32 all engines are one
# ---------------------------------------------------------------------------------------------------------------------


def test_a_single_process_equals_a_plain_pytorch_loop(runs, reference):
    run = runs("single").finished()
    assert column(run, "step") == list(range(1, STEPS + 1))
    assert column(run, "epoch") == pytest.approx([step / 9 for step in range(1, STEPS + 1)])
    assert column(run, "loss") == pytest.approx(reference["loss"], abs=1e-5)
    assert column(run, "grad_norm") == pytest.approx(reference["grad_norm"], abs=1e-4)
    assert column(run, "learning_rate") == pytest.approx(reference["learning_rate"], rel=1e-12)
    assert column(run, "num_targets") == reference["num_targets"]
    assert largest_difference(run.weights(), reference["weights"]) < 1e-5


@every_engine
def test_the_engine_that_was_asked_for_runs_and_says_how(runs, name):
    engine, here, batch = EQUAL[name]
    processes = RUNS[name][1]
    count = "1 process" if processes == 1 else "2 processes"
    dtypes = "weights float32, masters float32, compute float32"
    line = (
        f"engine: {engine}, {count} on cpu, {here} of {ALL} parameters here, {dtypes}, "
        f"micro-batch {batch} x processes {processes} = global batch 8, 18 steps"
    )
    line += "; a process that is lost is noticed within 15 min (--ddp_timeout)" * (processes > 1)
    line += f"; attention: {'sdpa, masked' if 'padded' in batch else 'each example by itself'}"
    assert [found for found in runs(name).finished().err.splitlines() if found.startswith("engine: ")] == [line]


@every_engine
def test_every_engine_takes_the_same_steps(runs, name):
    single, run = runs("single").finished(), runs(name).finished()
    assert column(run, "loss") == pytest.approx(column(single, "loss"), abs=1e-5)
    assert column(run, "grad_norm") == pytest.approx(column(single, "grad_norm"), abs=1e-4)
    assert column(run, "learning_rate") == column(single, "learning_rate")
    assert column(run, "skipped_steps") == [None] * STEPS


@every_engine
def test_every_record_is_trained_once_per_epoch(runs, name, tokenizer):
    rows, found = read_targets(tokenizer), column(runs(name).finished(), "num_targets")
    targets = [sum(label != -100 for label in labels) for _, labels in rows] + [0, 0]
    steps = [seeded_order(epoch)[first : first + BATCH] for epoch in (0, 1) for first in range(0, 72, BATCH)]
    assert found == [sum(targets[i] for i in step) for step in steps]
    assert sum(found[:9]) == sum(found[9:]) == sum(targets)
    assert "data: rows without targets, to fill the last global batch of 8: 2\n" in runs(name).err


@every_engine
def test_every_engine_saves_the_same_model(runs, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    single, run = runs("single").finished(), runs(name).finished()
    assert {path.name for path in run.folder.iterdir()} == RUN_FILES | {".lock", "run.json"}
    weights = run.weights()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert largest_difference(weights, single.weights()) < 5e-5  # of Adam's steps of 1e-3
    model, info = AutoModelForCausalLM.from_pretrained(run.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(run.folder)) == 1000
    assert run.out.splitlines()[-1] == (
        f"{run.folder}: model saved (0.9 MiB float32), last loss {run.losses()[-1]:.4f}"
    )


@every_engine
def test_run_json_tells_what_the_run_was(runs, name, bases, data):
    base, processes, changes = RUNS[name]
    run, engine = runs(name).finished(), EQUAL[name][0]
    info, losses = run.info(), run.losses()
    assert info["results"] == {
        "steps": STEPS,
        "skipped_steps": 0,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_loss": pytest.approx(sum(losses) / STEPS),
        "dtypes": "weights float32, masters float32, compute float32",
        "engine": engine,
        "processes": processes,
        "padded": name == "padded",
    }
    assert (info["made_by"], info["prompt_style"], info["seed"], info["filled"]) == ("cria", "alpaca", SEED, 2)
    assert info["data"] == {str(data): utils.sha256_of(data)}
    assert (info["counts"]["read"], info["counts"]["kept"], info["counts"]["end_token_trained"]) == (70, 70, 70)
    assert info["settings"]["engine"] == engine.removesuffix(" with offload")
    assert info["settings"]["global_batch"] == BATCH
    assert info["settings"].get("processes") == (2 if {"fsdp", "deepspeed"} & set(changes) else None)
    assert sorted(info["files"]) == sorted(RUN_FILES)
    assert info["versions"].keys() >= {"python", "torch", "transformers", "accelerate", "tokenizers"}
    assert info["arguments"]["model_name_or_path"] == str(bases[base])
    assert info["arguments"]["data_path"] == [str(data)]
    if "deepspeed" in changes:  # by its content: the file may change or go
        assert info["arguments"]["deepspeed"] == json.loads((ROOT / changes["deepspeed"]).read_text(encoding="utf-8"))


@every_engine
def test_only_the_first_process_speaks(runs, name):
    run = runs(name).finished()
    lines = [line for line in run.err.splitlines() if line and not line.startswith(("W", "*"))]  # torchrun's own
    assert len(lines) == len(set(lines)), run.err
    warnings = [line for line in lines if line.startswith("[rank")]  # torch warns in each process's name
    assert not [line for line in warnings if "No CUDA runtime" not in line], run.err  # of a torch for CUDA
    assert run.out.count("model saved") == 1


def test_loss_csv_and_trainer_state_hold_the_same_steps(runs):
    run = runs("single").finished()
    header = (run.folder / "loss.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "step,epoch,loss,learning_rate,grad_norm,num_targets,skipped_steps"
    state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["loss"] for entry in steps] == run.losses()
    printed = [float(loss) for loss in re.findall(r"^step \d+/18  loss (\S+)", run.err, re.MULTILINE)]
    assert printed == [round(loss, 4) for loss in run.losses()]


@slow
def test_the_layer_class_of_early_2023_is_corrected_with_a_notice(runs):
    run = runs("fsdp offload").finished()
    assert "FSDP layer class LLaMADecoderLayer is LlamaDecoderLayer in this model\n" in run.err


# ---------------------------------------------------------------------------------------------------------------------
# In 16 bits they are close
# ---------------------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(
    ("name", "weights"), [("bf16", "float32"), ("bf16 fsdp", "float32"), ("bf16 zero3", "bfloat16")]
)
@pytest.mark.usefixtures("deepspeed_ready")
def test_bf16_computes_in_16_bits_over_masters_of_32(runs, name, weights):
    run = runs(name).finished()
    assert f"parameters here, weights {weights}, masters float32, compute bfloat16, micro-batch " in run.err
    assert column(run, "loss") == pytest.approx(column(runs("single"), "loss"), abs=2e-2)
    assert {tensor.dtype for tensor in run.weights().values()} == {torch.bfloat16}
    assert json.loads((run.folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert "model saved (0.4 MiB bfloat16)" in run.out


@slow
@pytest.mark.parametrize("name", ["bf16", "bf16 zero3"])
@pytest.mark.usefixtures("deepspeed_ready")
def test_save_dtype_keeps_the_bits_that_bf16_drops(runs, name):
    weights = runs(f"{name} saved in float32").finished().weights()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    rounded = {key: tensor.bfloat16() for key, tensor in weights.items()}
    assert largest_difference(rounded, runs(name).finished().weights()) < 1e-2
    if name == "bf16":  # one process repeats itself to the bit
        assert largest_difference(rounded, runs(name).weights()) == 0


def old_config(folder):
    """A DeepSpeed JSON of 2023: no accumulation, no clipping, no bf16, and a loss scale that begins at 2^32."""
    config = json.loads((ROOT / "ds_config.json").read_text(encoding="utf-8"))
    for key in ("gradient_accumulation_steps", "gradient_clipping", "bf16"):
        del config[key]
    config["fp16"]["initial_scale_power"] = 32
    path = folder / "ds_2023.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def train_fp16(base, data, folder, config, epochs, **more):
    options = {"deepspeed": config, "fp16": True, "num_train_epochs": epochs, **more}
    return train(run_options(base, data, folder, 2, options), 2)


@slow
def test_fp16_under_zero3_trains(base, data, tmp_path, runs, needs_fp16):
    run = train_fp16(base, data, tmp_path / "out", ROOT / "ds_config.json", 2).finished()
    assert "weights float16, masters float32, compute float16, micro-batch 4 flat" in run.err
    applied = [skipped is None for skipped in column(run, "skipped_steps")]
    assert applied.count(True) >= 14 and run.info()["results"]["skipped_steps"] == applied.count(False)
    assert run.losses()[-1] == pytest.approx(runs("single").losses()[-1], abs=0.1)
    assert {tensor.dtype for tensor in run.weights().values()} == {torch.float16}


@slow
def test_the_steps_that_a_loss_scale_of_2023_skips_are_counted(base, data, tmp_path, needs_fp16):
    run = train_fp16(base, data, tmp_path / "out", old_config(tmp_path), 3).finished()
    assert 'added gradient_accumulation_steps, gradient_clipping, bf16 as "auto"\n' in run.err
    rows = rows_of(run)
    skipped = [row["skipped_steps"] for row in rows if row["skipped_steps"]]
    assert skipped == list(range(1, len(skipped) + 1)) and len(skipped) == run.info()["results"]["skipped_steps"]
    first = next(i for i, row in enumerate(rows) if not row["skipped_steps"])
    assert 15 <= first <= 18  # 2^32 is halved until the gradients fit, the first overflow being forgiven
    assert {row["learning_rate"] for row in rows[: first + 1]} == {RATE}  # the schedule waited
    assert "  overflow: step skipped (1 so far)  grad " in run.err
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


@slow
def test_a_run_of_skipped_steps_alone_leaves_no_model(base, data, tmp_path, needs_fp16):
    saves = {"save_strategy": "steps", "save_steps": 4}
    for resumed in (False, True):  # a resumed run has not forgotten what was skipped before
        run = train_fp16(base, data, tmp_path / "out", old_config(tmp_path), 1, **saves)
        assert (f"resuming from {tmp_path}/out/checkpoint-9\n" in run.err) == resumed
        assert run.error() == "error: none of 9 steps was applied, all overflowed in fp16; use --bf16 True"
        names = {".lock", "run.json", "checkpoint-4", "checkpoint-8", "checkpoint-9"}
        assert {path.name for path in run.folder.iterdir()} == names
        assert run.info()["status"] == "started"


@pytest.mark.parametrize(("skips", "counts"), [([], (0, 0)), ([1, 2, 0, 3, 4], (4, 2)), ([1, 0], (1, 0))])
def test_skipped_steps_are_counted_by_the_log_that_a_checkpoint_brings(skips, counts):
    from train import skips_of

    history = [{"loss": 1.0} | ({"skipped_steps": count} if count else {}) for count in skips]
    assert skips_of(SimpleNamespace(log_history=[{"eval_loss": 1.0}, *history])) == counts


# ---------------------------------------------------------------------------------------------------------------------
# Models that cannot take flat rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bloom", pytest.param("bloom fsdp", marks=slow), pytest.param("bloom zero3", marks=slow)]
)
@pytest.mark.usefixtures("deepspeed_ready")
def test_a_model_that_mixes_the_examples_of_a_flat_row_is_padded(runs, name):
    run = runs(name).finished()
    assert "micro-batches are padded on the right: in a flat row its examples see each other\n" in run.err
    assert " padded x accumulation 1 x processes " in field("(engine: .*)", run.err)
    assert run.info()["results"]["padded"] is True
    assert column(run, "loss") == pytest.approx(column(runs("bloom"), "loss"), abs=1e-4)


@slow
@pytest.mark.parametrize("name", ["opt fsdp", "opt zero3"])
@pytest.mark.usefixtures("deepspeed_ready")
def test_a_model_with_tied_embeddings_is_proven_on_its_engine(runs, name):
    run = runs(name).finished()
    assert "attention: each example by itself" in run.err and run.info()["results"]["padded"] is False
    assert column(run, "loss") == pytest.approx(column(runs("opt"), "loss"), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Never another engine than was asked for
# ---------------------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_an_engine_of_several_processes_is_refused_without_a_launcher(runs, engine):
    run = runs(f"{engine} without launcher")
    assert run.code == 2
    command = "torchrun --standalone --nproc_per_node=2 train.py ..."
    assert run.err == f"error: --{engine} needs a launcher: {command}\n"
    assert not run.folder.exists()


@slow
def test_a_layer_class_of_another_model_is_refused_with_this_models_own(runs):
    run = runs("opt layer class")
    assert run.error() == (
        "error: FSDP layer class OPTDecoderLayer is not in this model; it has LlamaDecoderLayer; "
        "or leave the option out"
    )


@slow
def test_accelerate_still_has_to_be_told_to_run_fsdp_on_cpu(base, data, tmp_path):
    script = tmp_path / "as_the_trainer_does.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport engines, train, utils\n"
        "engines.enable_fsdp2_on_cpu = lambda trainer: None\nutils.run_main(train.train)\n",
        encoding="utf-8",
    )
    options = run_options(base, data, tmp_path / "out", 2, {"fsdp": FSDP[1]})
    run = finish(start(options, 2, script=script), options)
    assert run.code != 0, (
        "accelerate runs FSDP on several CPU processes by itself now: enable_fsdp2_on_cpu of train.py, with its call "
        "in SFTTrainer, can be deleted, and so can this test"
    )
    assert run.error() == "error: FSDP was asked for and DDP would run; check the versions against requirements.txt"
    assert {path.name for path in run.folder.iterdir()} == {".lock", "run.json"}


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launched(command, base, data, folder, **changes):
    options = run_options(base, data, folder, 2, changes)
    return finish(start(options, command=command), options).finished()


@slow
def test_the_deepspeed_launcher_runs_it(base, data, tmp_path, runs, deepspeed_ready):
    command = ["deepspeed", "--num_gpus", "2", "--master_port", free_port()]
    run = launched(command, base, data, tmp_path / "out", deepspeed=ZERO3[1])
    assert "engine: ZeRO-3 with offload, 2 processes on cpu, 117,408 of 234,816 parameters here" in run.err
    assert column(run, "loss") == pytest.approx(column(runs("single"), "loss"), abs=1e-5)


@slow
def test_torch_distributed_launch_runs_it(base, data, tmp_path, runs):
    command = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", free_port()]
    run = launched(command, base, data, tmp_path / "out")
    assert "engine: DDP, 2 processes on cpu, 234,816 of 234,816 parameters here" in run.err
    assert column(run, "loss") == pytest.approx(column(runs("single"), "loss"), abs=1e-5)


@slow
def test_accelerate_launch_runs_it(base, data, tmp_path, runs):
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    run = launched(command, base, data, tmp_path / "out")
    assert "engine: DDP, 2 processes on cpu, 234,816 of 234,816 parameters here" in run.err
    assert column(run, "loss") == pytest.approx(column(runs("single"), "loss"), abs=1e-5)


@slow
def test_accelerate_launch_on_cpu_does_not_quietly_run_one_process_for_two(base, data, tmp_path):
    options = run_options(base, data, tmp_path / "out", 2, {})
    run = train(options, command=["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"])
    assert "engine: " not in run.err or "2 processes on cpu" in run.err  # accelerate starts one, and says nothing
    assert "torchrun --standalone --nproc_per_node=2 train.py ..." in run.err


# ---------------------------------------------------------------------------------------------------------------------
# Runs that go wrong
# ---------------------------------------------------------------------------------------------------------------------


def assert_nothing_was_saved(run):
    assert run.code == 2
    assert {path.name for path in run.folder.iterdir() if not path.name.startswith("checkpoint-")} == {
        ".lock",
        "run.json",
    }
    assert run.info()["status"] == "started"
    assert "loss 0.0" not in run.err and "loss nan" not in run.err


def test_a_run_that_diverges_stops_with_step_records_dtypes_and_checkpoint(runs):
    run = runs("learning rate 1e30")
    names = ", ".join(f"records.json[{row}]" for row in seeded_order(0)[8:16])
    assert run.error() == (
        f"error: step 2: the loss is nan and the gradient norm nan; records of process 0: {names}; "
        "weights float32, masters float32, compute float32; "
        f"last good checkpoint: {run.folder / 'checkpoint-1'}; "
        "look at these records with --dry_run, or lower --learning_rate"
    )
    assert_nothing_was_saved(run)
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-1"]


@slow
def test_a_base_model_that_is_not_finite_stops_at_the_first_step(runs):
    run = runs("torn, not rehearsed")
    assert run.error().startswith("error: step 1: the loss is nan and the gradient norm nan; records of process 0: ")
    assert "; no checkpoint was written yet; " in run.error()
    assert_nothing_was_saved(run)


def test_the_rehearsal_names_the_weight_that_is_not_finite(runs):
    run = runs("torn")
    assert "lm_head.weight" in run.error()
    assert "--save_dtype" not in run.error()  # float32 holds every number that there is: this one is none
    assert_nothing_was_saved(run)


def test_a_base_model_that_is_not_finite_is_not_said_to_mix_examples(runs):
    assert "its examples see each other" not in runs("torn").err


@slow
def test_the_process_whose_records_went_wrong_speaks(base, tokenizer, tmp_path):
    """One embedding is no number; its token stands in one record, which one process of two has."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    records = make_records(COUNT)
    records[46]["instruction"] += " Quiz!"
    texts = [render_prompt(record) + record["output"] for record in records]
    found = [set(tokenizer(text).input_ids) for text in texts]
    odd = min(token for token in found[46] if token > 300 and not any(token in found[i] for i in range(70) if i != 46))
    model = LlamaForCausalLM.from_pretrained(base)
    model.model.embed_tokens.weight.data[odd] = float("nan")
    model.save_pretrained(tmp_path / "torn")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "torn")
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    run = train(run_options(tmp_path / "torn", tmp_path / "records.json", tmp_path / "out", 2, TORN), 2)
    place = seeded_order(0).index(46)
    step, process = place // BATCH + 1, place % BATCH // 4
    mine = seeded_order(0)[place // 4 * 4 :][:4]
    names = ", ".join(f"records.json[{row}]" for row in mine)
    assert f"error: step {step}: the loss is nan" in run.error()
    assert f"; records of process {process}: {names}; " in run.error()
    assert not (run.folder / "config.json").exists()
