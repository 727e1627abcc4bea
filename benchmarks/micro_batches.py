"""Speed and memory of train.py's micro-batches beside the padded recipe's, on the same records in the same order.

    python benchmarks/micro_batches.py --data_path alpaca_data.json --tokenizer tokenizer.model
    python benchmarks/micro_batches.py --data_path alpaca_data.json --model FOLDER --part speed
    python benchmarks/micro_batches.py ... --part windows --preset 20m    # 106m would take hours
    python benchmarks/micro_batches.py --preset tiny         # the way through the script, on made-up records

speed: examples a second of forward, backward and step, for the arms of SPEED_ARMS, each whole under the real Trainer.
memory: the highest anonymous memory of a process that trains one arm. lora: both for LORA_ARMS, train.py's LoRA beside
peft's under the plain recipe, and beside full fine-tuning. windows: seconds a token on rows that fill a
window, from the smallest to the largest micro-batch, with gradient checkpointing, so that the largest fits. All
compute on the CPU, in bf16 autocast over float32 masters, or in float32 where the CPU has no bf16. The bounds stand
below; and in float32 no step's loss may differ from the padded recipe's by more than LOSS_BOUND. The exit code is 1
where one is missed. gpu.py is for a GPU.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT / "examples"))

LARGE_OF_SMALL = 0.95  # examples/s, at least: ours at micro-batch 32 of ours at 4
FLAT_OF_MASKED = 1.8  # examples/s, at least: ours at 32 of the same flat row under a mask
OURS_OF_PADDED = 1.3  # examples/s, at least: ours at 4 of the padded recipe at 4
MEMORY_OF_PADDED = 0.6  # anonymous memory, at most: ours at 32 of the padded recipe at 32
GROWTH = 1.2  # time a token, at most: a larger micro-batch of the smallest, in each window
LORA_OF_PADDED = 1.3  # examples/s, at least: our LoRA at 4 of peft under the padded recipe at 4
LORA_OF_FULL = 0.45  # anonymous memory, at most: our LoRA at 4 of our full fine-tuning at 4
LOSS_BOUND = 1e-5

GLOBAL_BATCH = 32
RANK = 16
# name: (recipe, micro-batch size, rank of LoRA or 0)
SPEED_ARMS = {
    "original 4": ("original", 4, 0),
    "ours 4": ("ours", 4, 0),
    "ours 32": ("ours", 32, 0),
    "masked 32": ("masked", 32, 0),
}
MEMORY_ARMS = {"original 32": ("original", 32, 0), "ours 32": ("ours", 32, 0)}
LORA_ARMS = {"peft 4": ("original", 4, RANK), "our LoRA 4": ("ours", 4, RANK)}
LORA_MEMORY_ARMS = {"ours 4": ("ours", 4, 0), "our LoRA 4": ("ours", 4, RANK)}
ALL_ARMS = SPEED_ARMS | MEMORY_ARMS | LORA_ARMS
# (arm, arm): the least ratio of the first's examples/s to the second's
SPEED_BOUNDS = {
    ("ours 32", "ours 4"): LARGE_OF_SMALL,
    ("ours 32", "masked 32"): FLAT_OF_MASKED,
    ("ours 4", "original 4"): OURS_OF_PADDED,
}
LORA_BOUNDS = {("our LoRA 4", "peft 4"): LORA_OF_PADDED}
WINDOWS, MICRO_BATCHES = (512, 2048), (4, 8, 16, 32, 64)
TINY_WINDOWS, TINY_MICRO_BATCHES = (64, 128), (2, 4, 8)
WINDOW_REPEAT = 2  # at most: a cell takes minutes
ANSWER = 64  # tokens that a row of the windows trains: logits of all would need more memory than attention


def make_model(args, dtype="float32"):
    """The model of --model or --preset, with weights of this dtype."""
    import torch

    if args.model:
        return common.utils.load_weights(args.model, common.utils.load_config(args.model), getattr(torch, dtype))
    return common.build_model(args.preset, dtype=dtype)


def run(arm, rows, args, **options):
    """Train the model on `rows` by an arm (recipe, micro-batch size, rank); see `common.train_arm`.

    What LoRA freezes is in bf16 where bf16 is computed in, under both recipes.
    """
    recipe, micro_batch, rank = arm
    model = make_model(args, "bfloat16" if rank and options.get("bf16") else "float32")
    tokenizer, options = common.load_tokenizer(args.tokenizer), options | {"lora_r": rank} if rank else options
    gc.collect()  # the last arm's model
    accumulation = options.pop("rows_a_step", GLOBAL_BATCH) // micro_batch
    return common.train_arm(recipe, model, rows, tokenizer, micro_batch, accumulation, **options)


def load_rows(args, steps, window=common.WINDOW):
    """The records of so many steps as rows, cut at a window in tokens."""
    return common.load_rows(args.data_path, common.load_tokenizer(args.tokenizer, window), steps * GLOBAL_BATCH)


def measure_speed(args, arms=SPEED_ARMS, wanted=SPEED_BOUNDS):
    """Examples a second of all arms in turn, and their losses in float32, which must be the first's."""
    rows = load_rows(args, args.steps)
    runs = common.alternate(arms, args.repeat, lambda arm: run(arms[arm], rows, args, bf16=args.bf16))
    timed = (args.steps - 1) * GLOBAL_BATCH
    rates = {arm: [timed / sum(one["step_seconds"]) for one in runs[arm]] for arm in runs}
    ratios = {f"{one} / {other}": common.ratio(rates[one], rates[other]) for one, other in wanted}
    bounds = {f"{one} / {other}": bound for (one, other), bound in wanted.items()}
    exact_rows = load_rows(args, args.loss_steps)
    exact = common.alternate(arms, 1, lambda arm: run(arms[arm], exact_rows, args, skip=0))
    differences = {arm: common.loss_difference(exact[next(iter(arms))][0], exact[arm][0]) for arm in arms}
    for arm, found in rates.items():
        print(f"{arm}: {common.in_words(common.spread(found))} examples/s")
    for name, found in ratios.items():
        print(f"{name}: {common.in_words(found)}, at least {bounds[name]}")
    print(
        f"float32 losses differ from the padded recipe's by {max(differences.values()):.1e}, at most {LOSS_BOUND:.0e}"
    )
    return {
        "examples_per_s": {arm: common.spread(found) for arm, found in rates.items()},
        "ratios": ratios,
        "bounds": bounds,
        "loss_differences": differences,
        "loss_bound": LOSS_BOUND,
        "runs": runs,
        "float32": exact,
        "equal": max(differences.values()) <= LOSS_BOUND,
        "passed": all(ratios[name]["median"] >= bound for name, bound in bounds.items()),
    }


def padded_bytes(num_params, tokens, vocab_size, layers, hidden_size, ffn_size):
    """About how many bytes a padded micro-batch of `tokens` needs in bf16 autocast, without gradient checkpointing.

    Masters, gradients, AdamW's two moments and the casts of the weights: 18 a parameter. Logits in bf16, in float32,
    their logarithms and gradient: 14 each. What a layer keeps: 44 a hidden and 10 an inner number.
    """
    return 18 * num_params + tokens * (14 * vocab_size + layers * (44 * hidden_size + 10 * ffn_size))


def check_memory(args, rows):
    """Refuse the memory part where the padded arm would not fit into the memory of this machine."""
    model = make_model(args)
    config, longest = model.config.get_text_config(), max(map(len, rows.input_ids))
    sizes = (config.vocab_size, config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    need = padded_bytes(model.num_parameters(), GLOBAL_BATCH * longest, *sizes)
    if need > (free := common.utils.free_host_memory()):
        size_of = common.utils.size_of
        what = f"32 padded rows of {longest} tokens need about {size_of(need)}, {size_of(free)} are free"
        raise common.utils.UserError(f"{what}; give a lower --memory_window than {longest}")
    return need


def watch_memory(peak, ended):
    """Keep in peak[0] the most anonymous memory that this process has had, in kB; looks 50 times a second."""
    while not ended.wait(0.02):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak[0] = max(peak[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))


def run_memory_arm(args):
    """In a process of its own: train one arm, and write its highest memory."""
    rows, peak, ended = load_rows(args, args.steps, args.memory_window), [0], threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(peak, ended))
    watcher.start()
    try:
        found = run(ALL_ARMS[args.arm], rows, args, bf16=args.bf16)
    finally:
        ended.set()
        watcher.join()
    common.utils.write_json(found | {"peak_anon_gb": peak[0] * 1024 / 1e9}, args.output)


def measure_memory(args, arms=MEMORY_ARMS, bound=MEMORY_OF_PADDED):
    """The highest anonymous memory of both arms, each in processes of its own; the bound is of the second's share."""
    estimate = check_memory(args, load_rows(args, args.steps, args.memory_window))
    records = common.read_plain(args.data_path)[: args.steps * GLOBAL_BATCH + 50]

    def measure(arm):
        with tempfile.TemporaryDirectory() as folder:
            output, few = Path(folder, "arm.json"), Path(folder, "few.json")
            common.utils.write_json(records, few)  # what the whole file needs would hide what training needs
            names = ("data_path", "tokenizer", "model", "preset", "steps", "threads", "memory_window")
            given = [(name, getattr(args, name)) for name in names if getattr(args, name) is not None]
            words = [
                word for name, value in given for word in (f"--{name}", str(few if name == "data_path" else value))
            ]
            command = [sys.executable, __file__, *words, "--arm", arm, "--output", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"its process ended with {done.returncode}: {done.stderr[-1500:]}")
            return json.loads(output.read_text(encoding="utf-8"))

    runs = common.alternate(arms, args.repeat, measure)
    peaks = {arm: [one["peak_anon_gb"] for one in runs[arm]] for arm in runs}
    first, second = arms
    ratio = common.ratio(peaks[second], peaks[first])
    for arm, found in peaks.items():
        print(f"{arm}: {common.in_words(common.spread(found))} GB of anonymous memory")
    print(f"memory, {second} / {first}: {common.in_words(ratio)}, at most {bound}")
    return {
        "window": args.memory_window,
        "estimated_gb": round(estimate / 1e9, 1),
        "peak_anon_gb": {arm: common.spread(found) for arm, found in peaks.items()},
        "ratio": ratio,
        "bound": bound,
        "runs": runs,
        "passed": ratio["median"] <= bound,
    }


def measure_lora(args):
    """Speed of our LoRA beside peft's, memory beside that of full fine-tuning."""
    speed = measure_speed(args, LORA_ARMS, LORA_BOUNDS)
    memory = measure_memory(args, LORA_MEMORY_ARMS, LORA_OF_FULL)
    parts = {"rank": RANK, "speed": speed, "memory": memory, "equal": speed["equal"]}
    return parts | {"passed": speed["passed"] and memory["passed"]}


def fill_windows(rows, window, count):
    """`count` rows of exactly `window` tokens: real ids end to end, cut; the last ANSWER of each carry a loss."""
    import torch
    from original_recipe import RowDataset

    ids = itertools.cycle(itertools.chain.from_iterable(row.tolist() for row in rows.input_ids))
    filled = [torch.tensor(list(itertools.islice(ids, window))) for _ in range(count)]
    is_prompt = torch.arange(window) < window - min(ANSWER, window // 2)
    return RowDataset(filled, [row.masked_fill(is_prompt, -100) for row in filled])


def measure_windows(args):
    """Milliseconds a token of ours, for each window and micro-batch size; steps are of as many rows as the largest."""
    windows, sizes = (TINY_WINDOWS, TINY_MICRO_BATCHES) if args.tiny else (WINDOWS, MICRO_BATCHES)
    rows, count = load_rows(args, args.steps), max(sizes)
    filled = {window: fill_windows(rows, window, count) for window in windows}
    options = {"bf16": args.bf16, "gradient_checkpointing": True, "skip": 0, "rows_a_step": count}

    def measure(cell):
        window, size = map(int, cell.split(" x "))
        (seconds,) = run(("ours", size, 0), filled[window], args, **options)["step_seconds"]
        return 1000 * seconds / (count * window)

    cells = [f"{window} x {size}" for window in windows for size in sizes]
    found = common.alternate(cells, min(args.repeat, WINDOW_REPEAT), measure)
    growth = {cell: common.ratio(found[cell], found[f"{cell.split(' x ')[0]} x {sizes[0]}"]) for cell in cells}
    largest = {
        window: max((growth[f"{window} x {size}"] for size in sizes[1:]), key=lambda one: one["median"])
        for window in windows
    }
    print(f"| ms a token, window | {' | '.join(f'micro-batch {size}' for size in sizes)} | largest growth |")
    print("|---" * (len(sizes) + 2) + "|")
    for window in windows:
        medians = (common.spread(found[f"{window} x {size}"])["median"] for size in sizes)
        words = " | ".join(f"{value:.2g}" for value in medians)
        print(f"| {window:,} | {words} | {common.in_words(largest[window])}, at most {GROWTH} |")
    return {
        "rows_a_step": count,
        "trained_tokens_a_row": ANSWER,
        "ms_a_token": found,
        "growth": growth,
        "bound": GROWTH,
        "passed": all(one["median"] <= GROWTH for one in largest.values()),
    }


PARTS = {"speed": measure_speed, "memory": measure_memory, "lora": measure_lora, "windows": measure_windows}


def main():
    args = parse()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    common.quiet()
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    args.bf16 = common.computes_bf16()
    if args.arm:
        run_memory_arm(args)
        return
    result = common.surroundings()
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny and not args.data_path:
            from make_tiny_llama import make_tiny_llama

            make_tiny_llama(Path(folder, "base"))
            args.tokenizer, args.data_path = f"{folder}/base/tokenizer.model", f"{folder}/records.json"
            common.make_records(300, args.data_path)
        names = ("data_path", "model", "preset", "threads", "steps", "repeat")
        result["settings"] = {name: getattr(args, name) for name in names} | {
            "precision": "bf16 autocast, float32 masters" if args.bf16 else "float32",
            "parameters": make_model(args).num_parameters(),
        }
        for part in PARTS if args.part == "all" else [args.part]:
            result[part] = PARTS[part](args)
            common.write_result(result, args.output)
    found = [result[part] for part in PARTS if part in result]
    if args.tiny:
        print(common.NOT_JUDGED)
    is_good = all((part["passed"] or args.tiny) and part.get("equal", True) for part in found)
    sys.exit(0 if is_good else 1)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", help="records as JSON or JSON Lines (--preset tiny: made up)")
    parser.add_argument("--tokenizer", help="a SentencePiece .model file or a model folder (default: --model)")
    parser.add_argument("--model", help="a model folder; without it, random weights of --preset")
    parser.add_argument("--preset", choices=["106m", "20m", "tiny"], default="106m", help="default: 106m")
    parser.add_argument("--part", choices=["all", *PARTS], default="all", help="what to measure (default: all)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a run; the first is not timed")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each arm (default: 5; of windows, 2)")
    parser.add_argument("--loss_steps", type=int, default=3, help="steps compared in float32 (default: 3)")
    parser.add_argument("--memory_window", type=int, default=common.WINDOW, help="window of memory's rows, in tokens")
    parser.add_argument("--threads", type=int, help="threads of all arms (default: as many as torch takes)")
    parser.add_argument("--arm", choices=ALL_ARMS, help=argparse.SUPPRESS)
    common.add_output(parser, "micro_batches")
    args = parser.parse_args()
    args.tokenizer, args.tiny = args.tokenizer or args.model, args.preset == "tiny" and not args.model
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed")
    if not args.tiny and not (args.data_path and args.tokenizer):
        parser.error("--data_path and --tokenizer or --model are needed, but for --preset tiny")
    return args


if __name__ == "__main__":
    common.utils.run_main(main)
