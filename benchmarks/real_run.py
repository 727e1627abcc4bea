"""Train a small LLaMA on real records through train.py on two processes, under FSDP and under ZeRO-3, and compare.

    python benchmarks/real_run.py --data_path alpaca_data.json --tokenizer tokenizer.model --work_dir out/real_run

Makes a LLaMA of 20 million random parameters with the given tokenizer and a file of the first records, trains one
epoch on each engine with torchrun (ZeRO-3 with ds_config.json, weights and optimizer offloaded), and prints every
tenth step of both loss.csv side by side. Each curve must fall, and they may differ by BOUND at most; the exit code is
1 otherwise. A second call with the same --work_dir trains only what has not been trained yet.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import common

ENGINES = {
    "FSDP": ("--fsdp", "full_shard auto_wrap"),
    "ZeRO-3 with offload": ("--deepspeed", common.ROOT / "ds_config.json"),
}
BOUND = {"float32": 0.01, "bf16": 0.1}  # of the loss of a step


def make_base(folder, tokenizer_path):
    """Write a model of random weights and its tokenizer as a model folder."""
    tokenizer, model = common.load_tokenizer(tokenizer_path), common.build_model("20m")
    if len(tokenizer) > model.config.vocab_size:
        raise common.utils.UserError(f"{tokenizer_path}: {len(tokenizer):,} tokens, the model has rows for 32,000")
    with common.utils.hidden_folder(Path(folder, ".saving"), folder) as staging:
        tokenizer.save_pretrained(staging)
        if Path(tokenizer_path).is_file():
            shutil.copy(tokenizer_path, staging / "tokenizer.model")
        model.save_pretrained(staging)


def run_engine(name, folder, args):
    """Run train.py under torchrun; returns (losses by step, run.json's results, seconds)."""
    output = folder / name.lower().replace(" ", "_")
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"),
        *(common.ROOT / "train.py", "--model_name_or_path", folder / "base", "--data_path", folder / "records.json"),
        *("--output_dir", output, "--num_train_epochs", 1, "--per_device_train_batch_size", args.micro_batch),
        *("--gradient_accumulation_steps", args.accumulation, "--learning_rate", args.learning_rate),
        *("--lr_scheduler_type", "cosine", "--warmup_steps", 0.03, "--weight_decay", 0, "--save_strategy", "no"),
        *("--logging_steps", 10, "--bf16", args.precision == "bf16", *ENGINES[name]),
    ]
    bin_dir = str(Path(sys.executable).parent)  # DeepSpeed builds its CPU Adam with the ninja of this environment
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PATH": bin_dir + os.pathsep + os.environ["PATH"]}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))
    start = time.perf_counter()
    subprocess.run(list(map(str, words)), env=environment, check=False)  # judged by run.json, written last
    seconds = time.perf_counter() - start
    run = common.utils.read_run(output)
    if run is None or run["status"] != "finished":
        raise RuntimeError(f"{output}: the run did not finish; see its messages above")
    with open(output / "loss.csv", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)], run["results"], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="records as JSON or JSON Lines")
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece .model file or a model folder")
    parser.add_argument("--work_dir", required=True, help="where model, records and runs are written")
    parser.add_argument("--rows", type=int, default=2000, help="records to train on (default: 2000)")
    parser.add_argument("--precision", choices=list(BOUND), default="float32", help="compute (default: float32)")
    parser.add_argument("--learning_rate", default="1e-3", help="at its highest (default: 1e-3)")
    parser.add_argument("--processes", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--micro_batch", type=int, default=4, help="examples a process and micro-batch (default: 4)")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches a step (default: 4)")
    common.add_output(parser, "real_run")
    args = parser.parse_args()
    common.quiet()
    result = common.surroundings()
    folder = Path(args.work_dir)
    records = common.read_plain(args.data_path)[: args.rows]
    if not (folder / "base" / "config.json").is_file():
        make_base(folder / "base", args.tokenizer)
    common.utils.write_json(records, folder / "records.json")
    curves, engines = {}, {}
    for name in ENGINES:
        curves[name], results, seconds = common.run_arm(name, run_engine, name, folder, args)
        engines[name] = {"losses": curves[name], "seconds": round(seconds, 1), "results": results}
    columns = list(zip(*curves.values(), strict=True))
    difference = max(max(losses) - min(losses) for losses in columns)
    fell = all(sum(losses[-5:]) / 5 < losses[0] - 1 for losses in curves.values())
    print(f"{'step':>6}  " + "  ".join(f"{name:>20}" for name in curves))
    for step in sorted({*range(1, len(columns) + 1, 10), len(columns)}):
        print(f"{step:>6}  " + "  ".join(f"{loss:>20.4f}" for loss in columns[step - 1]))
    bound = BOUND[args.precision]
    result |= {
        "what": "one epoch on real records through train.py under two engines",
        "settings": {
            "rows": len(records),
            "processes": args.processes,
            "global_batch": args.processes * args.micro_batch * args.accumulation,
            "precision": args.precision,
            "learning_rate": float(args.learning_rate),
            "parameters": common.build_model("20m", "meta").num_parameters(),
        },
        "steps": len(columns),
        "largest_difference": difference,
        "bound": bound,
        "engines": engines,
        "passed": fell and difference <= bound,
    }
    common.write_result(result, args.output)
    print(f"{len(columns)} steps, largest difference of the losses of a step {difference:.2e} (at most {bound})")
    if not fell:
        print("a curve did not fall by 1 between its first step and the mean of its last five")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    common.utils.run_main(main)
