"""Does tuning help a real model? Held-out loss before and after full fine-tuning and LoRA, on real records.

    python benchmarks/real_model.py --data_path alpaca_data.json --work_dir out/real_model      # pip install gguf

Trains SmolLM2-135M-Instruct (examples/fetch_smollm2.py fetches it; --model takes another) through train.py, once with
all weights and once with LoRA, one epoch over the same --rows records, drawn at random and always the same, and takes
the exact mean loss of a target token on --held_out others before the first step and after the last. Both must fall by
FALL; the exit code is 1 otherwise. In bf16 where the CPU computes in it, over float32 masters.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT / "examples"))

RANK = 16
METHODS = {"all weights": ("--learning_rate", "2e-5"), "LoRA": ("--learning_rate", "2e-4", "--lora_r", RANK)}
FALL = 0.1  # of the held-out loss, at least


def write_records(args, folder):
    """Draw the records, write those to train on and those held out; returns the two paths."""
    records = common.read_plain(args.data_path)
    if len(records) < args.rows + args.held_out:
        raise common.utils.UserError(f"{args.data_path}: {len(records):,} records, fewer than --rows and --held_out")
    rows = random.Random(0).sample(records, args.rows + args.held_out)
    paths = folder / "records.json", folder / "held_out.json"
    common.utils.write_json(rows[: args.rows], paths[0])
    common.utils.write_json(rows[args.rows :], paths[1])
    return paths


def train(method, args, base, folder, paths):
    """Run train.py by a method; returns {before, after, seconds, ...} of its run.json."""
    output = folder / method.replace(" ", "_")
    words = [
        *(sys.executable, common.ROOT / "train.py", "--model_name_or_path", base, "--output_dir", output),
        *("--data_path", paths[0], "--eval_data_path", paths[1], "--num_train_epochs", 1, "--save_strategy", "no"),
        *("--per_device_train_batch_size", 8, "--gradient_accumulation_steps", args.accumulation, "--save_rehearsal"),
        *("False", "--lr_scheduler_type", "cosine", "--warmup_steps", 0.03, "--bf16", common.computes_bf16()),
        *METHODS[method],
    ]
    start = time.perf_counter()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(list(map(str, words)), env=environment, check=True)
    results = json.loads((output / "run.json").read_text(encoding="utf-8"))["results"]
    losses = list(results["eval_losses"].values())
    return {"before": losses[0], "after": losses[-1], "steps": results["steps"],
            "seconds": round(time.perf_counter() - start, 1), "dtypes": results["dtypes"]}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="records as JSON or JSON Lines")
    parser.add_argument("--work_dir", required=True, help="where model, records and runs are written")
    parser.add_argument("--model", help="a model folder in place of SmolLM2")
    parser.add_argument("--rows", type=int, default=640, help="records to train on (default: 640)")
    parser.add_argument("--held_out", type=int, default=200, help="records held out (default: 200)")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of 8 a step (default: 4)")
    common.add_tiny(parser)
    common.add_output(parser, "real_model")
    args = parser.parse_args()
    common.quiet()
    result, folder = common.surroundings(), Path(args.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(args.model or folder / "base")
    if not args.model and not base.is_dir():
        from fetch_smollm2 import fetch_smollm2

        fetch_smollm2(base)
    paths = write_records(args, folder)
    found = {method: common.run_arm(method, train, method, args, base, folder, paths) for method in METHODS}
    print("| | held-out loss before | after | steps | minutes |\n|---|---|---|---|---|")
    for method, one in found.items():
        print(f"| {method} | {one['before']:.3f} | {one['after']:.3f} | {one['steps']} | {one['seconds'] / 60:.1f} |")
    result |= {
        "settings": {"rows": args.rows, "held_out": args.held_out, "rank": RANK, "model": args.model or "SmolLM2-135M"},
        "methods": found,
        "bound": FALL,
        "passed": all(one["before"] - one["after"] >= FALL for one in found.values()),
    }
    common.write_result(result, args.output)
    if args.tiny:
        print(common.NOT_JUDGED)
    sys.exit(0 if result["passed"] or args.tiny else 1)


if __name__ == "__main__":
    common.utils.run_main(main)
