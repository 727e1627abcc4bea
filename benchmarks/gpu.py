"""On one GPU: is train.py right there, and how fast is it on a LLaMA of 7 billion parameters? Ten minutes.

    python benchmarks/gpu.py                         # needs about 130 GiB on the GPU, such as an H200
    python benchmarks/gpu.py --part checks           # any GPU
    python benchmarks/gpu.py --tiny                  # the way through the script on a CPU, in a minute; no figures

Checks: losses of flat against padded micro-batches in float32 and bf16; that examples in a flat row do not see each
other; that fp16 skips and counts steps that overflow; that a resumed run ends with the weights of one that was not
interrupted. Speed: full fine-tuning in bf16 with float32 masters and AdamW, 16 bytes a parameter, random weights, the
same rows for the original recipe and ours. An arm that does not fit is run again with gradient checkpointing, and the
result says so. Rows are made up with the lengths of Alpaca's unless --data_path and --tokenizer are given. Arms run in
processes of their own, and the result is written after each. Exit code 1 where a check fails, 2 without a GPU.
"""

import argparse
import csv
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT / "examples"))
LOSS_BOUNDS = {"float32": 1e-4, "bf16": 1e-2}
ISOLATION_BOUNDS = {"float32": 1e-4, "bf16": 5e-2}  # of logits, against each example alone
GLOBAL_BATCH = 32
# name: (recipe, micro-batch size); the first is what the others are compared with
ARMS = {"original 4 x 8": ("original", 4), "ours 4 x 8": ("ours", 4), "ours 32 x 1": ("ours", 32)}
SKIP = 3  # steps without a time: warming up
NO_GPU = "error: no GPU here: the speed part needs one of about 130 GiB, --part checks any; --tiny needs none"
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


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def made_up_lengths(count):
    """Lengths of (prompt, answer) in tokens, by three numbers read off Alpaca; the same every time.

    Alpaca's prompts have a median of 54 tokens and 90 % of them 86 at most, its answers 43 and 140; all 126 on average.
    """
    import torch

    normal = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    prompts = (41 + 14 * (0.85 * normal[:, 0]).exp()).long().clamp(max=300)
    answers = (43 * (0.95 * normal[:, 1]).exp()).long().clamp(min=2)
    return [(prompt, min(answer, common.WINDOW - prompt)) for prompt, answer in zip(prompts.tolist(), answers.tolist())]


def make_rows(count, vocab_size, data_path=None, tokenizer=None):
    """`count` rows of a file, or made up: random ids, of which those of the prompt carry no loss."""
    import torch
    from original_recipe import RowDataset

    if data_path:
        return common.load_rows(data_path, common.load_tokenizer(tokenizer), count)
    generator, rows = torch.Generator().manual_seed(1), RowDataset([], [])
    for prompt, answer in made_up_lengths(count):
        ids = torch.randint(3, vocab_size, (prompt + answer,), generator=generator)
        rows.input_ids.append(ids)
        rows.labels.append(ids.masked_fill(torch.arange(len(ids)) < prompt, -100))
    return rows


def make_records(count, path):
    """Write made-up records as JSON for runs of train.py."""
    words = ["river", "lamp", "stone", "cloud", "pencil", "house", "garden", "letter"]
    records = [
        {
            "instruction": f"Write {words[i % 8]} {answer % 20 + 1} times.",
            "input": "",
            "output": " ".join(words[i % 8] for _ in range(answer % 20 + 1)),
        }
        for i, (_, answer) in enumerate(made_up_lengths(count))
    ]
    common.utils.write_json(records, path)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check_losses(precision, device):
    """Losses of ten steps of a tiny model, flat under train.py's Trainer and padded under the stock one."""
    rows, tokens = make_rows(80, 1000), types.SimpleNamespace(pad_token_id=0, eos_token_id=2)
    options = {"bf16": precision == "bf16", "learning_rate": 1e-3}
    runs = {}
    for recipe in ("original", "ours"):
        model = common.build_model("tiny", device)
        runs[recipe] = common.train_arm(recipe, model, rows, tokens, 4, 2, **options)
    difference, bound = common.loss_difference(runs["original"], runs["ours"]), LOSS_BOUNDS[precision]
    return {
        "passed": difference <= bound and not runs["ours"]["padded"],
        "largest_difference": difference,
        "bound": bound,
        "losses": {recipe: run["losses"] for recipe, run in runs.items()},
    }


def check_isolation(precision, device):
    """Two examples in a flat row under sdpa: changing the first must not move the second's logits by a bit.

    They must also be near those of the second alone, and must move when position ids do not restart.
    """
    import torch

    model = common.build_model("tiny", device).eval()
    assert model.config._attn_implementation == "sdpa"
    ids = torch.randint(3, 1000, (1, 300), generator=torch.Generator().manual_seed(0)).to(device)
    other = ids.clone()
    other[:, :100] = (other[:, :100] + 5) % 1000
    whole = torch.arange(300, device=device)[None]
    restarted = torch.cat([torch.arange(100), torch.arange(200)])[None].to(device)

    def logits(ids, position_ids):
        return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[:, -200:].float()

    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        flat = logits(ids, restarted)
        moved = (flat - logits(other, restarted)).abs().max().item()
        moved_without_restart = (logits(ids, whole) - logits(other, whole)).abs().max().item()
        alone = (flat - logits(ids[:, 100:], whole[:, :200])).abs().max().item()
    bound = ISOLATION_BOUNDS[precision]
    return {
        "passed": moved == 0 and alone <= bound and moved_without_restart > 0,
        "moved": moved,
        "moved_without_restart": moved_without_restart,
        "difference_from_alone": alone,
        "bound": bound,
    }


def run_train(folder, name, *options, command=(str(common.ROOT / "train.py"),)):
    """Run train.py for 8 steps of 8 of the records in `folder`; returns (loss.csv, run.json's results, weights)."""
    from safetensors.torch import load_file

    output = folder / name
    words = [
        *("--model_name_or_path", folder / "base", "--data_path", folder / "records.json", "--output_dir", output),
        *("--per_device_train_batch_size", 8, "--num_train_epochs", 1, "--learning_rate", "1e-3"),
        *("--save_dtype", "float32", *options),
    ]
    done = subprocess.run([sys.executable, *command, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"train.py ended with {done.returncode}: {done.stderr[-1500:]}")
    with open(output / "loss.csv", encoding="utf-8") as file:
        losses = list(csv.DictReader(file))
    results = json.loads((output / "run.json").read_text(encoding="utf-8"))["results"]
    return losses, results, {k: v for path in output.glob("*.safetensors") for k, v in load_file(path).items()}


def check_overflow(folder):
    """train.py --fp16 from a loss scale of 2^32: the first steps overflow, are skipped, counted and marked."""
    command = ("-c", OVERFLOW, str(common.ROOT))
    options = ("--fp16", True, "--save_strategy", "no", "--num_train_epochs", 4)
    losses, results, _ = run_train(folder, "fp16", *options, command=command)
    skipped = results["skipped_steps"]
    marked = [int(row["step"]) for row in losses if row["skipped_steps"]]
    return {
        "passed": 0 < skipped < results["steps"] and marked[0] == 1 and len(marked) == skipped,
        "skipped_steps": skipped,
        "steps": results["steps"],
        "losses": [float(row["loss"]) for row in losses],
    }


def check_resume(folder, bf16):
    """train.py for 8 steps, and again from its checkpoint of step 4: equal to the bit in losses and weights."""
    import torch

    options = ("--bf16", bf16, "--save_strategy", "steps", "--save_steps", 4, "--full_determinism", True)
    losses, results, weights = run_train(folder, "straight", *options)
    again = ("--resume_from_checkpoint", folder / "straight" / "checkpoint-4")
    losses_again, _, weights_again = run_train(folder, "resumed", *options, *again)
    unequal = [name for name in weights if not torch.equal(weights[name], weights_again[name])]
    return {
        "passed": not unequal and [row["loss"] for row in losses] == [row["loss"] for row in losses_again],
        "tensors": len(weights),
        "tensors_that_differ": len(unequal),
        "steps": results["steps"],
        "dtypes": results["dtypes"],
    }


def run_checks(device):
    """All checks: {name: {passed, ...}}; one that breaks is reported and does not keep the others from running."""
    from make_tiny_llama import make_tiny_llama

    found = {}

    def attempt(name, check, *arguments):
        try:
            found[name] = check(*arguments)
        except Exception as error:  # noqa: BLE001 (whatever it is, the other checks must run)
            found[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        print(f"{'passed' if found[name]['passed'] else 'FAILED'}: {name} {brief(found[name])}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for precision in ("float32", "bf16"):
            attempt(f"losses, {precision}", check_losses, precision, device)
            attempt(f"isolation, {precision}", check_isolation, precision, device)
        make_tiny_llama(folder / "base")
        make_records(64, folder / "records.json")
        attempt("resume", check_resume, folder, device == "cuda")
        if device == "cuda":
            attempt("overflow", check_overflow, folder)
        else:
            print("not run: overflow (fp16 needs a GPU)")
    return found


def brief(check):
    """The short values of a check, as words."""
    return ", ".join(f"{k} {v}" for k, v in check.items() if k != "passed" and not isinstance(v, (list, dict)))


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


def run_arm(args):
    """In a process of its own: train one arm and write what was measured, or that memory did not suffice."""
    import torch

    recipe, micro_batch = ARMS[args.arm]
    device = "cpu" if args.tiny else "cuda"
    vocab_size = common.PRESETS[args.preset]["vocab_size"]
    rows = make_rows(args.steps * GLOBAL_BATCH, vocab_size, args.data_path, args.tokenizer)
    tokens = types.SimpleNamespace(pad_token_id=0, eos_token_id=2)
    options = {"bf16": True, "gradient_checkpointing": args.checkpointing}
    if args.checkpointing:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        model = common.build_model(args.preset, device)
        accumulation = GLOBAL_BATCH // micro_batch
        result = common.train_arm(recipe, model, rows, tokens, micro_batch, accumulation, skip=args.skip, **options)
        result["parameters"] = model.num_parameters()
    except torch.OutOfMemoryError as error:
        result = {"out_of_memory": common.utils.first_line(error)}
    if device == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / common.utils.GIB, 1)
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / common.utils.GIB, 1)
    result["gradient_checkpointing"] = args.checkpointing
    result["tokens"] = sum(map(len, rows.input_ids))
    common.utils.write_json(result, args.output)


def measure_arm(name, checkpointing, args):
    """Run one arm in a process; with gradient checkpointing where it does not fit without."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "arm.json")
        words = ["--arm", name, "--output", output, "--steps", args.steps, "--skip", args.skip, "--preset", args.preset]
        words += [
            word
            for key in ("data_path", "tokenizer")
            if getattr(args, key)
            for word in (f"--{key}", getattr(args, key))
        ]
        words += ["--tiny"] * args.tiny + ["--checkpointing"] * checkpointing
        start = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=False)
        if not output.is_file():
            return {"error": done.stderr[-1500:], "wall_s": round(time.perf_counter() - start, 1)}
        result = json.loads(output.read_text(encoding="utf-8"))
    result["wall_s"] = round(time.perf_counter() - start, 1)
    if "out_of_memory" in result and not checkpointing:
        print(f"{name}: does not fit ({result['out_of_memory'][:120]}); again with gradient checkpointing", flush=True)
        return measure_arm(name, True, args)
    return result


def summarize(runs):
    """Medians of all arms, and what each is against the first; runs that failed are left out of them."""
    good = {name: [run for run in done if "losses" in run] for name, done in runs.items()}
    seconds = {name: common.all_steps(done) for name, done in good.items() if done}
    first = next(iter(ARMS))
    summary = {name: {"median_examples_per_s": GLOBAL_BATCH / statistics.median(s)} for name, s in seconds.items()}
    for name in summary:
        run = good[name][0]
        summary[name] |= {key: run.get(key) for key in ("peak_gib", "gradient_checkpointing")}
        if first in seconds:
            together = min(len(seconds[name]), len(seconds[first]))
            ratio = common.median_ratio(seconds[first][:together], seconds[name][:together])
            summary[name] |= {"ratio": ratio, "loss_difference": common.loss_difference(good[first][0], run)}
    return summary


def run_speed(args, save):
    """All arms in turn; `save(speed)` is called after each. Stops in time for --minutes."""
    runs, deadline, longest = {name: [] for name in ARMS}, args.started + 60 * args.minutes, 0
    for i in range(args.repeat):
        for name in list(ARMS)[:: -1 if i % 2 else 1]:
            if time.perf_counter() + longest > deadline:
                print(f"not run: {name}, repetition {i + 1}: no time left of {args.minutes:g} minutes", flush=True)
                continue
            known = any(run.get("gradient_checkpointing") for run in runs[name])
            run = measure_arm(name, known or args.checkpointing, args)
            runs[name].append(run)
            longest = max(longest, run["wall_s"])
            save({"summary": summarize(runs), "runs": runs})
            rate = GLOBAL_BATCH / statistics.median(run["step_seconds"]) if "losses" in run else 0
            words = f"{rate:.2f} examples/s, peak {run.get('peak_gib', '?')} GiB" if rate else str(run)[:800]
            print(f"{name}: {words}, checkpointing {run.get('gradient_checkpointing')}, {run['wall_s']} s", flush=True)


def main():
    args = parse()
    args.started = time.perf_counter()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one GPU: the stock Trainer would take all
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if args.tiny else visible
    if args.tiny:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way at this size
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not args.tiny and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        sys.exit(2)
    common.quiet()
    if args.arm:
        run_arm(args)
        return
    result = common.surroundings()
    name = "tiny" if args.tiny else torch.cuda.get_device_name().lower().replace(" ", "_")
    path = Path(args.output or common.RESULTS / f"gpu_{name}.json")
    result["settings"] = {key: getattr(args, key) for key in ("preset", "steps", "skip", "repeat", "data_path")}
    if args.tiny:
        result["note"] = NOT_MEASURED
    if args.part != "speed":
        result["checks"] = run_checks("cpu" if args.tiny else "cuda")
        common.utils.write_json(result, path)
        gc.collect()
        if not args.tiny:
            torch.cuda.empty_cache()  # the arms need it all
    if args.part != "checks":
        run_speed(args, lambda speed: common.utils.write_json(result | {"speed": speed}, path))
        for arm, figures in json.loads(path.read_text(encoding="utf-8"))["speed"]["summary"].items():
            print(f"{arm}: {', '.join(f'{k} {v:.3g}' for k, v in figures.items() if v is not None)}")
    print(f"written: {path}{' (' + NOT_MEASURED + ')' if args.tiny else ''}")
    sys.exit(0 if all(check["passed"] for check in result.get("checks", {}).values()) else 1)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "checks", "speed"], default="all", help="what to run (default: all)")
    parser.add_argument("--data_path", help="records as JSON or JSON Lines (default: rows are made up)")
    parser.add_argument("--tokenizer", help="a SentencePiece .model file or a model folder; goes with --data_path")
    parser.add_argument("--preset", choices=common.PRESETS, help="the model (default: 7b; tiny with --tiny)")
    parser.add_argument("--steps", type=int, help="steps of an arm, of 32 examples each (default: 20; 3 with --tiny)")
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of every arm (default: 1)")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing in all arms from the start"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="start nothing that would end later (default: 9.5)")
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny model on the CPU")
    parser.add_argument("--output", help="the result (default: benchmarks/results/gpu_<name>.json)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, help="steps without a time (default: 3; 1 with --tiny)")
    args = parser.parse_args()
    if bool(args.data_path) != bool(args.tokenizer):
        parser.error("--data_path and --tokenizer go together")
    args.preset = args.preset or ("tiny" if args.tiny else "7b")
    args.steps = args.steps or (3 if args.tiny else 20)
    args.skip = (1 if args.tiny else SKIP) if args.skip is None else args.skip
    if args.steps <= args.skip:
        parser.error(f"--steps must be more than {args.skip}")
    return args


if __name__ == "__main__":
    common.utils.run_main(main)
