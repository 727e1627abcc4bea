"""What the benchmarks share: reading rows, training one arm under the Trainer, medians, and result files.

An arm is one of the two recipes, "original" (original_recipe.py) or "ours" (train.py), on the same rows in the same
order. Nothing heavy is imported before it is used, so that a script can set thread counts first.
"""

import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
import utils

WINDOW = 512  # tokens, as in Stanford Alpaca

# LLaMA's shape with intermediate_size near 8/3 of hidden_size. Parameters in all: see the names.
VOCAB = {"vocab_size": 32000}
PRESETS = {
    "tiny": {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
             "num_attention_heads": 4},
    "20m": {**VOCAB, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "num_attention_heads": 4},
    "106m": {**VOCAB, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "7b": {**VOCAB, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32},
}  # fmt: skip


def llama_config(preset):
    """The configuration of a preset."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **PRESETS[preset],
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def build_model(preset, device="cpu"):
    """A LLaMA with random float32 weights, made on `device`; the same ones every time on the same kind of device."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(llama_config(preset))


def load_tokenizer(path):
    """The tokenizer of a model folder, or one built from a SentencePiece `.model` file; pads on the right."""
    if Path(path).is_file():
        options = {"model_max_length": WINDOW, "padding_side": "right"}
        tokenizer = utils.tokenizer_from_sentencepiece(path, **options)
        tokenizer.pad_token = tokenizer.unk_token
        return tokenizer
    return utils.load_tokenizer(path, WINDOW)


def read_texts(data_path, eos_token, count):
    """The prompts and the answers, end token included, of the first `count` records; all of them for None."""
    records = utils.read_records([data_path])[0][:count]
    if count and len(records) < count:
        raise utils.UserError(f"{data_path}: {count:,} records are asked for, it holds {len(records):,}")
    prompts = [utils.spans("alpaca", record["messages"][:1])[0][0] for record in records]
    return prompts, [record["output"] + eos_token for record in records]


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


def train_arm(recipe, model, rows, tokenizer, micro_batch, accumulation, skip=1, **options):
    """Train one epoch of `rows` with the "original" recipe or "ours" under the real Trainer, and time the steps.

    `rows` must fill whole optimizer steps. `tokenizer` needs no more than pad_token_id and eos_token_id; `options` are
    of TrainingArguments. Returns {losses, step_seconds, padded}; the first `skip` steps, with their warming up, have
    no seconds.
    """
    import original_recipe
    import torch
    import transformers

    import train

    batch = micro_batch * accumulation
    assert len(rows) % batch == 0, "the rows must fill whole steps, else the two recipes see other orders"
    ends, on_gpu = [], torch.cuda.is_available()

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

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
            trainer = original_recipe.make_trainer(model, options, rows, tokenizer)
        else:
            trainer = train.SFTTrainer(
                model=model,
                args=train.TrainingArguments(save_rehearsal=False, **options),
                train_dataset=[{**rows[i], "source": f"row {i}", "row": i} for i in range(len(rows))],
                data_collator=train.flatten,
            )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Clock())
        started = time.perf_counter()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [end - start for start, end in zip([started, *ends], ends)]
    return {
        "losses": losses,
        "step_seconds": [round(value, 4) for value in seconds[skip:]],
        "padded": recipe == "original" or trainer.layout == "padded",
    }


def alternate(arms, repeat, measure):
    """Call `measure(arm)` for every arm, `repeat` times, every other time in reverse order; {arm: list of results}."""
    results = {arm: [] for arm in arms}
    for i in range(repeat):
        for arm in list(arms)[:: -1 if i % 2 else 1]:
            utils.say(f"  {arm}, repetition {i + 1} of {repeat}")
            results[arm].append(measure(arm))
    return results


def median_ratio(above, below):
    """The median of the ratios of neighbouring measurements: what slows the machine down slows both down."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


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
