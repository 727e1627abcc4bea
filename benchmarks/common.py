"""What the benchmarks share: reading rows, training one arm under the Trainer, medians, and result files.

An arm is a recipe and a micro-batch size, on the same rows in the same order. The recipes: "original", which pads
(original_recipe.py); "ours" (train.py); "masked", ours with `--attn_implementation sdpa`, whose flat rows keep their
examples apart by a mask. Nothing heavy is imported before it is used, so that a script can set thread counts first.
"""

import contextlib
import datetime
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
import utils

WINDOW = 512  # tokens, as in Stanford Alpaca
LAYOUTS = {"original": "padded", "ours": "flat", "masked": "flat, masked"}  # of each recipe's micro-batches
NOT_JUDGED = "tiny: bounds of speed and memory are not judged"

# LLaMA's shape with intermediate_size near 8/3 of hidden_size. Parameters in all: see the names.
VOCAB = {"vocab_size": 32000}
PRESETS = {
    "tiny": {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
             "num_attention_heads": 4},
    "20m": {**VOCAB, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "num_attention_heads": 4},
    "106m": {**VOCAB, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "7b": {**VOCAB, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32},
}  # fmt: skip


def build_model(preset, device="cpu", dtype="float32", **changes):
    """A LLaMA with random weights of `dtype`, made on `device`; the same ones every time on the same kind of device.

    `changes` are of its LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    common = {"max_position_embeddings": 2048, "tie_word_embeddings": False}
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**PRESETS[preset] | special | common | changes))
    finally:
        torch.set_default_dtype(torch.float32)


def load_tokenizer(path, window=WINDOW):
    """The tokenizer of a model folder, or one built from a SentencePiece `.model` file; pads on the right."""
    if Path(path).is_file():
        options = {"model_max_length": window, "padding_side": "right"}
        tokenizer = utils.tokenizer_from_sentencepiece(path, **options)
        tokenizer.pad_token = tokenizer.unk_token
        return tokenizer
    return utils.load_tokenizer(path, window)


def made_up_lengths(count):
    """Lengths of (prompt, answer) in tokens, by three numbers read off Alpaca; the same every time.

    Alpaca's prompts have a median of 54 tokens and 90 % of them 86 at most, its answers 43 and 140; all 126 on average.
    """
    import torch

    normal = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    prompts = (41 + 14 * (0.85 * normal[:, 0]).exp()).long().clamp(max=300)
    answers = (43 * (0.95 * normal[:, 1]).exp()).long().clamp(min=2)
    return [(prompt, min(answer, WINDOW - prompt)) for prompt, answer in zip(prompts.tolist(), answers.tolist())]


def make_records(count, path):
    """Write made-up records as JSON."""
    words = ["river", "lamp", "stone", "cloud", "pencil", "house", "garden", "letter"]
    records = [
        {
            "instruction": f"Write {words[i % 8]} {answer % 20 + 1} times.",
            "input": "",
            "output": " ".join(words[i % 8] for _ in range(answer % 20 + 1)),
        }
        for i, (_, answer) in enumerate(made_up_lengths(count))
    ]
    utils.write_json(records, path)


def read_plain(data_path):
    """The records of a file as {instruction, input, output}."""
    records = utils.read_records([data_path])[0]
    return [{key: record[key] for key in ("instruction", "input", "output")} for record in records]


def read_texts(data_path, eos_token, count):
    """The prompts and the answers, end token included, of the first `count` records; all of them for None."""
    records = utils.read_records([data_path])[0][:count]
    if count and len(records) < count:
        raise utils.UserError(f"{data_path}: {count:,} records are asked for, it holds {len(records):,}")
    prompts = [utils.spans("alpaca", record["messages"][:1])[0][0] for record in records]
    return prompts, [record["output"] + eos_token for record in records]


def computes_bf16():
    """Whether this CPU multiplies in bf16: with AVX512-BF16 or AMX-BF16."""
    flags = Path("/proc/cpuinfo").read_text() if os.path.isfile("/proc/cpuinfo") else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_rows(data_path, tokenizer, count):
    """The first `count` records that have something to learn, as a dataset of tensors."""
    from original_recipe import RowDataset

    import train

    prompts, targets = read_texts(data_path, tokenizer.eos_token, None)
    spare = count + 10  # one row of Alpaca's 52,002 has a prompt that fills the window
    data = train.preprocess(prompts[:spare], targets[:spare], tokenizer)
    keep = [i for i, labels in enumerate(data["labels"]) if (labels != train.IGNORE_INDEX).any()][:count]
    if len(keep) < count:
        raise utils.UserError(f"{data_path}: {count:,} records are asked for, {len(keep):,} can be used")
    return RowDataset([data["input_ids"][i] for i in keep], [data["labels"][i] for i in keep])


def make_our_trainer(model, options, rows, tokenizer, attn_implementation):
    """train.py's Trainer over `rows`, as train.py makes it, without its line of progress and its save rehearsal."""
    import train

    args = train.TrainingArguments(save_rehearsal=False, attn_implementation=attn_implementation, **options)
    rows = [{**rows[i], "source": f"row {i}", "row": i} for i in range(len(rows))]
    progress = {"longest": max(len(row["input_ids"]) for row in rows)}
    if args.lora_r:
        model = train.add_adapters(model, args)
    dataset = types.SimpleNamespace(rows=lambda multiple: rows)
    trainer = train.make_trainer(model, args, dataset, None, tokenizer, None, progress)
    trainer.remove_callback(train.ProgressLine)
    return trainer


def end_watch(watch):
    """Let train.py's thread that hears signals and names slow steps be still: it ends with the process alone."""
    signal.set_wakeup_fd(-1)
    watch.named = math.inf


def train_arm(recipe, model, rows, tokenizer, micro_batch, accumulation, skip=1, **options):
    """Train one epoch of `rows` by a recipe of LAYOUTS under the real Trainer, and time the steps.

    `rows` must fill whole optimizer steps. `tokenizer` needs no more than pad_token_id and eos_token_id; `options` are
    are of TrainingArguments, and `lora_r` for LoRA on the model as it is. Returns {losses, step_seconds};
    the first `skip` steps, with their warming up, have no seconds. Raises RuntimeError where the micro-batches have another layout than the recipe's.
    """
    import original_recipe
    import torch
    import transformers

    batch = micro_batch * accumulation
    assert len(rows) % batch == 0, "the rows must fill whole steps, else the recipes see other orders"
    times, on_gpu = [], torch.cuda.is_available()

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # behind ours: its proofs are no part of a step
            times.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 1,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "constant",  # without warming up, so that every step changes the weights
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
        if recipe == "original":
            lora_r = options.pop("lora_r", 0)
            trainer = original_recipe.make_trainer(model, options, rows, tokenizer, lora_r)
        else:
            trainer = make_our_trainer(model, options, rows, tokenizer, "sdpa" if recipe == "masked" else None)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Clock())
        with getattr(trainer, "signals", contextlib.nullcontext()):
            trainer.train()
    layout = getattr(trainer, "layout", "padded")
    if layout != LAYOUTS[recipe]:
        raise RuntimeError(f"the micro-batches of {recipe} were {layout}, not {LAYOUTS[recipe]}")
    if recipe != "original":
        end_watch(trainer.watch)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [round(end - start, 4) for start, end in zip(times, times[1:])]
    return {"losses": losses, "step_seconds": seconds[skip:]}


def alternate(arms, repeat, measure):
    """Call `measure(arm)` for every arm, `repeat` times, every other time in reverse order; {arm: list of results}.

    An arm that fails ends the script with 1: see `run_arm`.
    """
    results = {arm: [] for arm in arms}
    for i in range(repeat):
        for arm in list(arms)[:: -1 if i % 2 else 1]:
            utils.say(f"  {arm}, repetition {i + 1} of {repeat}")
            results[arm].append(run_arm(arm, measure, arm))
    return results


def run_arm(name, measure, *arguments):
    """`measure(*arguments)`; where it fails, whatever the reason, the script ends with 1 and names the arm."""
    try:
        return measure(*arguments)
    except Exception as error:
        traceback.print_exc()
        raise utils.UserError(f"error: {name} failed: {utils.first_line(error)}", 1) from None


def spread(values):
    """{median, min, max} of numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(above, below):
    """The `spread` of the ratios of neighbouring measurements: what slows the machine down slows both down."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def in_words(found):
    """A `spread` in two digits behind the point: 1.64 (1.39 to 2.05); without any from 100 on."""
    median, least, most = (f"{found[key]:,.{0 if found['median'] >= 100 else 2}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def all_steps(runs):
    """The step seconds of several runs of one arm, end to end; step i of every arm holds the same records."""
    return [seconds for run in runs for seconds in run["step_seconds"]]


def loss_difference(one, two):
    """The largest difference between the losses of two runs at a step."""
    return max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))


def quiet():
    """Let the libraries speak of errors only."""
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def surroundings():
    """What a figure depends on beside the code: day, machine, load by others, versions and commit."""
    import psutil
    import torch

    cpu = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    machine = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / utils.GIB, 1),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        machine |= {"gpu": torch.cuda.get_device_name(), "gpu_gib": round(total / utils.GIB, 1)}
        machine |= {"gpu_free_gib_at_start": round(free / utils.GIB, 1), "cuda": torch.version.cuda}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "versions": utils.versions("torch", "transformers", "accelerate", "tokenizers", "deepspeed"),
        "git_commit": utils.git_commit(),
    }


def write_result(result, path):
    """Write a result as JSON and say where."""
    utils.write_json(result, path)
    utils.say(f"written: {path}")


def add_output(parser, name):
    """The option every benchmark has: where its result goes."""
    parser.add_argument("--output", default=RESULTS / f"{name}.json", help="the result, as JSON (default: %(default)s)")


def add_tiny(parser):
    """The option of benchmarks that take any data: a few records show that it works, not what it costs."""
    parser.add_argument("--tiny", action="store_true", help="for few records: do not judge bounds of speed and memory")
