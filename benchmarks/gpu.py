"""On one GPU: is train.py right there, and how fast is full fine-tuning of a LLaMA of 7 billion parameters?

    python benchmarks/gpu.py                         # nine minutes at most; no network
    python benchmarks/gpu.py --part checks           # any GPU
    python benchmarks/gpu.py --tiny                  # the way through the script on a CPU; no figures

checks: losses of flat and of masked against padded micro-batches, and attention example by example against SDPA's one
example at a time, in float32 and bf16. engines: train.py on one process, under FSDP2 and, where DeepSpeed is installed,
ZeRO-3 with offload: the same losses, a save that transformers reads, a resumed run that ends as one that was not
interrupted; and fp16 that skips and counts steps that overflow. speed: bf16 over float32 masters with AdamW, random
weights, the same rows for the original recipe and ours, each at several micro-batches, for our LoRA over bf16 weights
and, where bitsandbytes is installed, over weights in 4 bits; each arm in a process of its own; a card that is too small for 7 billion gets as many layers as fit, and an arm that does not fit starts again with
gradient checkpointing: the result says both. Rows are made up with the lengths of Alpaca's unless --data_path and
--tokenizer are given. The result is written after each check and arm; what --minutes leaves no time for is named.
Exit code 1 where a check or an arm fails, 2 without a GPU.
"""

import argparse
import csv
import gc
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT / "examples"))
LOSS_BOUNDS = {"float32": 1e-4, "bf16": 1e-2}
EXACT = 1e-4  # of the norm of logits or gradients, in float32
ROUNDING = 2.0  # in bf16: times as far from float32 as SDPA's one example at a time may be
RESUMED = 1e-3  # of the loss of a step: resumed from uninterrupted, under ZeRO-3, which is not exact to the bit in bf16
LENGTHS = (150, 17, 1, 300, 64)  # of the examples in the flat row that is checked
GLOBAL_BATCH = 32
# name: (recipe, micro-batch size), the most telling first: time may not suffice for all
ARMS = {
    "original 4 x 8": ("original", 4),
    "ours 32 x 1": ("ours", 32),
    "original 8 x 4": ("original", 8),
    "ours 4 x 8": ("ours", 4),
    "LoRA 16 x 2": ("lora", 16),
    "QLoRA 16 x 2": ("qlora", 16),
    "original 16 x 2": ("original", 16),
    "ours 16 x 2": ("ours", 16),
}
RANK = 16  # of LoRA
WORK = {"lora": 4, "qlora": 4}  # operations a parameter and token; 6 where the weights get a gradient
SKIP = 3  # steps without a time: warming up
ENGINES_SHARE = 0.5  # of the time, at which the engines leave the rest to speed
STATE_BYTES = 18  # a parameter: float32 master, gradient, AdamW's two moments, and autocast's copy in bf16
SPARE_GIB = 16  # for activations and logits
DENSE_TFLOPS = {"H100": 989, "H200": 989}  # in bf16, of the SXM cards, by NVIDIA's data sheets
NO_GPU = "error: no GPU here; the way through the script needs none: give --tiny"
NOT_MEASURED = "a rehearsal on a CPU: nothing here was measured on a GPU"
# train.py with a loss scale at which the first steps must overflow
OVERFLOW = """
import sys
import torch
sys.path.insert(0, sys.argv.pop(1))
import train, utils
class Scaler(torch.amp.GradScaler):
    def __init__(self, device, **options):
        super().__init__(device, **{**options, "init_scale": 2.0**32})
torch.amp.GradScaler = Scaler
utils.run_main(train.train)
"""


def make_rows(count, vocab_size, data_path=None, tokenizer=None):
    """`count` rows of a file, or made up: random ids, of which those of the prompt carry no loss."""
    import torch
    from original_recipe import RowDataset

    if data_path:
        return common.load_rows(data_path, common.load_tokenizer(tokenizer), count)
    generator, rows = torch.Generator().manual_seed(1), RowDataset([], [])
    for prompt, answer in common.made_up_lengths(count):
        ids = torch.randint(3, vocab_size, (prompt + answer,), generator=generator)
        rows.input_ids.append(ids)
        rows.labels.append(ids.masked_fill(torch.arange(len(ids)) < prompt, -100))
    return rows


def run_process(words, until):
    """Run a command to its end, or end it and all that it started at the time `until`.

    Returns (exit code, None where it was ended; what it said on stderr).
    """
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, words)), start_new_session=True, **pipes)
    try:
        said = process.communicate(timeout=max(until - time.perf_counter(), 1))[1]
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[1]


# --- Checks, in this process -----------------------------------------------------------------------------------------


def check_losses(precision, device):
    """Losses of ten steps of a tiny model: ours flat and masked, the original's padded under the stock Trainer."""
    rows, tokens = make_rows(80, 1000), types.SimpleNamespace(pad_token_id=0, eos_token_id=2)
    options, losses = {"bf16": precision == "bf16", "learning_rate": 1e-3}, {}
    for recipe in common.LAYOUTS:
        model = common.build_model("tiny", device)
        losses[recipe] = common.train_arm(recipe, model, rows, tokens, 4, 2, **options)
    difference = max(common.loss_difference(losses["original"], found) for found in losses.values())
    return {
        "passed": difference <= LOSS_BOUNDS[precision],
        "largest_difference": difference,
        "bound": LOSS_BOUNDS[precision],
        "losses": {recipe: found["losses"] for recipe, found in losses.items()},
    }


def logits_and_gradients(model, batches, precision):
    """(logits (targets, vocabulary), gradients of the summed loss by name), both in float32, over some batches."""
    import torch

    model.zero_grad()
    logits = []
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = model(**batch, use_cache=False)
        (out.loss * batch["labels"].numel()).backward()
        logits.append(out.logits[0].detach().float())
    return torch.cat(logits), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def distance(found, wanted):
    """The largest relative distance, by norm, of logits and gradients; those with no norm are left out."""
    pairs = [(found[0], wanted[0]), *((found[1][name], wanted[1][name]) for name in wanted[1])]
    return max(((new - old).norm() / old.norm()).item() for new, old in pairs if old.norm() > 0)


def check_attention(precision, device):
    """Flat rows by attention example by example: logits and gradients of SDPA's one example at a time.

    In float32 they are equal but for rounding; in bf16 they are at most ROUNDING times as far from float32's. When the
    other examples change, no bit of the last one's logits moves. On a GPU bf16 must take torch's varlen kernel.
    """
    import torch

    import engines
    import train

    engines.register_attention()
    model = common.build_model("tiny", device, hidden_size=256, num_attention_heads=2, num_key_value_heads=1)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 1000, (length,), generator=generator) for length in LENGTHS]

    def batch(rows):
        instances = [{"input_ids": row, "labels": row} for row in rows]
        items = train.flatten(instances).items()
        return {key: value.to(device) if torch.is_tensor(value) else value for key, value in items}

    alone = [{k: v for k, v in batch([row]).items() if k not in engines.BORDERS} for row in rows if len(row) > 1]
    exact, usual = (logits_and_gradients(model, alone, name) for name in ("float32", precision))
    model.set_attn_implementation(engines.BY_EXAMPLE)
    takes_varlen, used = engines.takes_varlen, []

    def watched(query, dropout):
        used.append((takes_varlen(query, dropout), str(query.dtype)[6:]))
        return used[-1][0]

    engines.takes_varlen = watched
    try:
        flat = logits_and_gradients(model, [batch(rows)], precision)
        moved = logits_and_gradients(model, [batch([(row + 5) % 1000 for row in rows[:-1]] + rows[-1:])], precision)
    finally:
        engines.takes_varlen = takes_varlen
    last = slice(-(LENGTHS[-1] - 1), None)
    is_apart = torch.equal(flat[0][last], moved[0][last]) and not torch.equal(flat[0], moved[0])
    far, usually = distance(flat, exact), distance(usual, exact)
    bound = EXACT if precision == "float32" else ROUNDING * usually
    kernels = {"varlen" if taken else "sdpa" for taken, _ in used}
    wanted = {"varlen" if precision == "bf16" and device == "cuda" else "sdpa"}
    return {
        "passed": far <= bound and is_apart and kernels == wanted,
        "kernel": "/".join(sorted(kernels)),
        "queries": "/".join(sorted({dtype for _, dtype in used})),
        "distance_from_float32": far,
        "bound": bound,
        "others_move_no_bit": is_apart,
    }


# --- Engines: train.py in processes of its own -----------------------------------------------------------------------


def engines_here(is_tiny):
    """{engine, as run.json names it: (words of the launcher, options)} of those that can run here."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={1 + is_tiny}")  # FSDP on CPUs: two
    found = {"single process": ((), ()), "FSDP": (launcher, ("--fsdp", "full_shard auto_wrap"))}
    if importlib.util.find_spec("deepspeed"):
        found["ZeRO-3 with offload"] = (launcher, ("--deepspeed", common.ROOT / "ds_config.json"))
    return found


def run_train(folder, name, until, *options, before=(), command=(common.ROOT / "train.py",), micro_batch=8):
    """Run train.py for 8 steps of 8 of the records in `folder`; returns (loss.csv, run.json's results, weights)."""
    from safetensors.torch import load_file

    output = folder / name
    words = [
        *(sys.executable, *before, *command, "--model_name_or_path", folder / "base"),
        *("--data_path", folder / "records.json", "--output_dir", output, "--per_device_train_batch_size", micro_batch),
        *("--num_train_epochs", 1, "--learning_rate", "1e-3", "--save_dtype", "float32", *options),
    ]
    code, said = run_process(words, until)
    run = common.utils.read_run(output)  # DeepSpeed may abort behind it
    if run is None or run["status"] != "finished":
        raise RuntimeError(f"train.py ended with {code} (None: no time left): {said[-1500:]}")
    with open(output / "loss.csv", encoding="utf-8") as file:
        losses = list(csv.DictReader(file))
    return losses, run["results"], {k: v for path in output.glob("*.safetensors") for k, v in load_file(path).items()}


def check_engine(engine, folder, precision, is_tiny, until):
    """8 steps of train.py under an engine, and again from the checkpoint of step 4; and is the saved model readable?

    The losses must be those of a single process, which is checked first, and the resumed run's those of the straight
    one: to the bit, weights too, but for ZeRO-3.
    """
    import torch
    import transformers

    before, options = engines_here(is_tiny)[engine]
    name, micro_batch = engine.split()[0], 4 if before and is_tiny else 8
    options = (*options, "--bf16", precision == "bf16", "--save_strategy", "steps", "--save_steps", 4)
    options = (*options, "--full_determinism", True)
    words = {"before": before, "micro_batch": micro_batch}
    straight, results, weights = run_train(folder, name, until, *options, **words)
    again = ("--resume_from_checkpoint", folder / name / "checkpoint-4")
    resumed, _, weights_again = run_train(folder, f"{name} resumed", until, *options, *again, **words)
    with open(folder / "single" / "loss.csv", encoding="utf-8") as file:
        single = list(csv.DictReader(file))

    def difference(one, other):
        return max(abs(float(a["loss"]) - float(b["loss"])) for a, b in zip(one, other, strict=True))

    unequal = [key for key in weights if not torch.equal(weights[key], weights_again[key])]
    from_single, from_straight = difference(straight, single), difference(resumed, straight)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32")
    is_saved = all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    is_exact = not unequal and from_straight == 0
    resumes = from_straight <= RESUMED if engine.startswith("ZeRO") else is_exact
    return {
        "passed": results["engine"] == engine and resumes and is_saved and from_single <= LOSS_BOUNDS[precision],
        "from_a_single_process": from_single,
        "resumed_from_straight": from_straight,
        "resumed_to_the_bit": is_exact,
        "transformers_reads_the_save": is_saved,
        "dtypes": results["dtypes"],
    }


def check_overflow(folder, until):
    """train.py --fp16 from a loss scale of 2^32: the first steps overflow, are skipped, counted and marked."""
    options = ("--fp16", True, "--save_strategy", "no", "--num_train_epochs", 4)
    losses, results, _ = run_train(folder, "fp16", until, *options, command=("-c", OVERFLOW, common.ROOT))
    skipped = results["skipped_steps"]
    marked = [int(row["step"]) for row in losses if row["skipped_steps"]]
    return {
        "passed": 0 < skipped < results["steps"] and marked[0] == 1 and len(marked) == skipped,
        "skipped_steps": skipped,
        "steps": results["steps"],
        "losses": [float(row["loss"]) for row in losses],
    }


# --- Speed: each arm in a process of its own -------------------------------------------------------------------------


def layers_that_fit(preset, free_bytes):
    """How many of the preset's layers can be trained in so much memory of a GPU; raises UserError for none."""
    shape = common.PRESETS[preset]
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    ends, layer = 2 * shape["vocab_size"] * hidden, 4 * hidden**2 + 3 * hidden * ffn
    count = int(((free_bytes - SPARE_GIB * common.utils.GIB) / STATE_BYTES - ends) / layer)
    if count < 1:
        raise common.utils.UserError(f"{free_bytes / 1e9:.0f} GB are free: no layer fits; give a smaller --preset")
    return min(count, shape["num_hidden_layers"])


def watch_utilisation(samples):
    """Append (time, per cent of it that the GPU was busy) to `samples`, ten times a second; returns the process."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    visible = os.environ["CUDA_VISIBLE_DEVICES"]
    process = subprocess.Popen([*command, "-i", visible], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def read():
        for line in process.stdout:
            if line.strip().isdigit():
                samples.append((time.perf_counter(), int(line)))

    threading.Thread(target=read, daemon=True).start()
    return process


def in_4bit(model):
    """The model with its linear layers but the last in NF4 with double quantisation, as --load_in_4bit has them."""
    import bitsandbytes
    import torch

    import train

    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                sizes = (module.in_features, module.out_features)
                kind = {"compress_statistics": True, "quant_type": "nf4"}
                new = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, **kind)
                new.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, **kind)
                setattr(parent, name, new.to(module.weight.device))
    train.keep_unpacked(model)
    return model


def train_or_none(args, rows, checkpointing):
    """Train the arm of `args`; returns what was measured, or None where the GPU's memory does not suffice."""
    import torch

    recipe, micro_batch = ARMS[args.arm]
    tokens = types.SimpleNamespace(pad_token_id=0, eos_token_id=2)
    options = {"bf16": True, "gradient_checkpointing": checkpointing, "skip": args.skip}
    if checkpointing:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        model = common.build_model(args.preset, "cpu" if args.tiny else "cuda", num_hidden_layers=args.layers)
        num_params = model.num_parameters()
        if recipe in WORK:
            model, options["lora_r"] = model.to(torch.bfloat16), RANK
        model, recipe = in_4bit(model) if recipe == "qlora" else model, "ours" if recipe in WORK else recipe
        found = common.train_arm(recipe, model, rows, tokens, micro_batch, GLOBAL_BATCH // micro_batch, **options)
    except torch.OutOfMemoryError:
        return None
    return found | {"parameters": num_params, "gradient_checkpointing": checkpointing}


def train_in_process(args):
    """In a process of its own: train one arm, with gradient checkpointing where it does not fit without; write it."""
    import torch

    rows = make_rows(
        args.steps * GLOBAL_BATCH, common.PRESETS[args.preset]["vocab_size"], args.data_path, args.tokenizer
    )
    samples = []
    watcher = watch_utilisation(samples) if shutil.which("nvidia-smi") and not args.tiny else None
    result = train_or_none(args, rows, args.checkpointing)
    if result is None and not args.checkpointing:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        result = train_or_none(args, rows, True)
    ended = time.perf_counter()
    if watcher:
        watcher.kill()
    if result is None:
        raise RuntimeError("it does not fit into the GPU's memory, with gradient checkpointing neither")
    busy = [share for at, share in samples if ended - sum(result["step_seconds"]) <= at <= ended]
    result |= {"tokens": sum(map(len, rows.input_ids)), "gpu_busy_percent": statistics.mean(busy) if busy else None}
    if not args.tiny:
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / common.utils.GIB, 1)
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / common.utils.GIB, 1)
    common.utils.write_json(result, args.output)


def measure_arm(name, args, checkpointing):
    """Run one arm in a process: what it wrote, or {error} or {not_run}, and its wall_s."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "arm.json")
        names = ("data_path", "tokenizer", "preset", "steps", "skip", "layers")
        given = [(key, getattr(args, key)) for key in names if getattr(args, key) is not None]
        words = [sys.executable, __file__, "--arm", name, "--output", output]
        words += [word for key, value in given for word in (f"--{key}", value)]
        words += ["--tiny"] * args.tiny + ["--checkpointing"] * checkpointing
        code, said = run_process(words, args.until)
        if output.is_file():
            result = json.loads(output.read_text(encoding="utf-8"))
        else:
            result = {"not_run": "no time left to end it"} if code is None else {"error": said[-1500:]}
    return result | {"wall_s": round(time.perf_counter() - start, 1)}


def needs_checkpointing(name, runs):
    """Whether an arm of the same recipe and no larger micro-batches had to start again with gradient checkpointing."""
    recipe, size = ARMS[name]
    smaller = [run for other, run in runs.items() if ARMS[other][0] == recipe and ARMS[other][1] <= size]
    return any(run.get("gradient_checkpointing") for run in smaller)


def summarize(runs, skip, tflops):
    """Figures of all arms that were measured, and the best of ours against the best of the original's.

    `tflops` is what the card can do, in 10^12 operations a second, or None; what counts as work stands in WORK.
    """
    arms, seconds = {}, {name: run["step_seconds"] for name, run in runs.items() if "step_seconds" in run}
    for name in seconds:
        rates, run = common.spread([GLOBAL_BATCH / one for one in seconds[name]]), runs[name]
        steps = skip + len(seconds[name])
        work = (
            WORK.get(ARMS[name][0], 6)
            * run["parameters"]
            * run["tokens"]
            / steps
            / statistics.median(seconds[name])
            / 1e12
        )
        arms[name] = {"examples_per_s": rates, "tflops": work, "of_the_card": tflops and work / tflops}
        arms[name] |= {key: run.get(key) for key in ("peak_gib", "gpu_busy_percent", "gradient_checkpointing")}
    best = {}
    for recipe in ("original", "ours"):
        names = [name for name in arms if ARMS[name][0] == recipe]
        if names:
            best[recipe] = max(names, key=lambda name: arms[name]["examples_per_s"]["median"])
    summary = {"arms": arms, "best": best}
    if len(best) == 2:
        summary["ratio_of_the_best"] = common.ratio(seconds[best["original"]], seconds[best["ours"]])
        summary["loss_difference"] = common.loss_difference(*(runs[name] for name in best.values()))
    return summary


# --- The story -------------------------------------------------------------------------------------------------------


def run_checks(args, result, save):
    """The checks of `args.part`: {name: {passed, ...}} in result["checks"]; one that breaks stops no other."""
    from make_tiny_llama import make_tiny_llama

    device, found = "cpu" if args.tiny else "cuda", result.setdefault("checks", {})

    def attempt(name, until, check, *arguments):
        if time.perf_counter() > until:
            skip_part(result, f"check: {name}", "no time left")
            return
        try:
            found[name] = check(*arguments)
        except Exception as error:  # noqa: BLE001 (whatever it is, the other checks must run)
            found[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        shown = {k: v for k, v in found[name].items() if k != "passed" and not isinstance(v, (list, dict))}
        words = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        print(f"{'passed' if found[name]['passed'] else 'FAILED'}: {name}: {words}", flush=True)
        save()

    for precision in ("float32", "bf16") if args.part in ("all", "checks") else ():
        attempt(f"losses, {precision}", args.until, check_losses, precision, device)
        attempt(f"attention, {precision}", args.until, check_attention, precision, device)
    if args.part not in ("all", "engines"):
        return
    until, precision = args.started + ENGINES_SHARE * 60 * args.minutes, "float32" if args.tiny else "bf16"
    until = args.until if args.part == "engines" else until
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_llama(folder / "base")
        common.make_records(64, folder / "records.json")
        for engine in engines_here(args.tiny):
            attempt(f"engine {engine}", until, check_engine, engine, folder, precision, args.tiny, until)
        if "ZeRO-3 with offload" not in engines_here(args.tiny):
            skip_part(result, "check: engine ZeRO-3 with offload", "DeepSpeed is not installed")
        if args.tiny:
            skip_part(result, "check: overflow", "fp16 needs a GPU")
        else:
            attempt("overflow", until, check_overflow, folder, until)


def skip_part(result, name, why):
    """Note and say what was not run."""
    result.setdefault("not_run", {})[name] = why
    print(f"not run: {name}: {why}", flush=True)


def run_speed(args, result, save):
    """All arms in turn, with result["speed"] saved after each; starts none that would probably not end in time."""
    import torch

    gc.collect()
    tflops, all_layers = None, common.PRESETS[args.preset]["num_hidden_layers"]
    args.layers = all_layers
    if not args.tiny:
        torch.cuda.empty_cache()  # the arms need it all
        args.layers = layers_that_fit(args.preset, torch.cuda.mem_get_info()[0])
        tflops = next((value for card, value in DENSE_TFLOPS.items() if card in torch.cuda.get_device_name()), None)
    model = f"{args.preset}, {args.layers} of {all_layers} layers"
    print(f"speed: {model}", flush=True)
    runs, longest = {}, 0
    for name in ARMS:
        if ARMS[name][0] == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
            skip_part(result, f"arm: {name}", "bitsandbytes is not installed")
            continue
        if time.perf_counter() + longest > args.until:
            skip_part(result, f"arm: {name}", "no time left")
            continue
        runs[name] = run = measure_arm(name, args, needs_checkpointing(name, runs))
        longest = max(longest, run["wall_s"])
        result["speed"] = {"model": model, "runs": runs, **summarize(runs, args.skip, tflops)}
        save()
        if "not_run" in run:
            skip_part(result, f"arm: {name}", run["not_run"])
        elif "error" in run:
            print(f"FAILED: {name}: {run['error']}", flush=True)
        else:
            found = result["speed"]["arms"][name]
            words = [f"{key} {found[key]:.2g}" for key in found if isinstance(found[key], (int, float))]
            rates = common.in_words(found["examples_per_s"])
            print(f"{name}: {rates} examples/s, {', '.join(words)}, {run['wall_s']:.0f} s in all", flush=True)
    if ratio := result.get("speed", {}).get("ratio_of_the_best"):
        best = result["speed"]["best"]
        print(f"{best['ours']} / {best['original']}: {common.in_words(ratio)} in examples/s, losses within "
              f"{result['speed']['loss_difference']:.1e}")  # fmt: skip


def main():
    args = parse()
    args.started = time.perf_counter()
    args.until = args.started + 60 * args.minutes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one GPU: the stock Trainer would take all
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if args.tiny else visible
    if args.tiny:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way at this size
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if not args.tiny and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        sys.exit(2)
    common.quiet()
    if args.arm:
        train_in_process(args)
        return
    result = common.surroundings()
    name = "tiny" if args.tiny else torch.cuda.get_device_name().lower().replace(" ", "_")
    path = Path(args.output or common.RESULTS / f"gpu_{name}.json")
    result["settings"] = {key: getattr(args, key) for key in ("preset", "steps", "skip", "data_path", "minutes")}
    if args.tiny:
        result["note"] = NOT_MEASURED

    def save():
        result["wall_s"] = round(time.perf_counter() - args.started, 1)
        common.utils.write_json(result, path)

    run_checks(args, result, save)
    if args.part in ("all", "speed"):
        run_speed(args, result, save)
    save()
    print(f"written: {path}{' (' + NOT_MEASURED + ')' if args.tiny else ''}; {result['wall_s']:.0f} s in all")
    has_failed = any("error" in run for run in result.get("speed", {}).get("runs", {}).values())
    has_failed = has_failed or not all(check["passed"] for check in result["checks"].values())
    sys.exit(1 if has_failed else 0)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["all", "checks", "engines", "speed"]
    parser.add_argument("--part", choices=parts, default="all", help="what to run (default: all)")
    parser.add_argument("--data_path", help="records as JSON or JSON Lines (default: rows are made up)")
    parser.add_argument("--tokenizer", help="a SentencePiece .model file or a model folder; goes with --data_path")
    parser.add_argument("--preset", choices=common.PRESETS, help="the model (default: 7b; tiny with --tiny)")
    parser.add_argument("--steps", type=int, help="steps of an arm, of 32 examples each (default: 12; 2 with --tiny)")
    parser.add_argument("--minutes", type=float, default=9, help="end everything by then (default: 9)")
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny model on the CPU")
    parser.add_argument("--output", help="the result (default: benchmarks/results/gpu_<name>.json)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if bool(args.data_path) != bool(args.tokenizer):
        parser.error("--data_path and --tokenizer go together")
    args.preset = args.preset or ("tiny" if args.tiny else "7b")
    args.steps = args.steps or (2 if args.tiny else 12)
    args.skip = (1 if args.tiny else SKIP) if args.skip is None else args.skip
    if args.steps <= args.skip:
        parser.error(f"--steps must be more than {args.skip}")
    return args


if __name__ == "__main__":
    common.utils.run_main(main)
