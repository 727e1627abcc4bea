"""Examples per second of flat micro-batches against padded ones, at the same micro-batch size and global batch.

    python benchmarks/micro_batches.py --data_path alpaca_data.json --tokenizer tokenizer.model

Both arms run whole, under the real Trainer, so that what each does around a step is in its time: the original recipe
under the stock Trainer, ours under train.py's with its check of every step. Optimizer, schedule, weights, records and
their order are the same; a run's first step is left out, and every other one is compared with the same step of the
other arm. Computes in bf16 autocast, on a GPU where there is one. The median of these ratios must be BOUND at least,
and in float32 no step's loss may differ by more than LOSS_BOUND; the exit code is 1 otherwise.
"""

import argparse
import gc
import os
import statistics
import sys

import common

BOUND = 1.3
LOSS_BOUND = 1e-5
MICRO_BATCH = 4  # the original's


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="records as JSON or JSON Lines")
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece .model file or a model folder")
    parser.add_argument("--preset", choices=["106m", "20m"], default="106m", help="the model (default: 106m)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, one of them not timed")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of 4 in a step (default: 8)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each arm (default: 5)")
    parser.add_argument("--loss_steps", type=int, default=4, help="steps compared in float32; 0: none (default: 4)")
    parser.add_argument("--threads", type=int, help="threads of both arms (default: as many as torch takes)")
    common.add_output(parser, "micro_batches")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU: the stock Trainer would take all
    import torch

    common.quiet()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = common.surroundings()
    tokenizer = common.load_tokenizer(args.tokenizer)
    batch = MICRO_BATCH * args.accumulation

    def run(arm, steps, **options):
        rows = common.load_rows(args.data_path, tokenizer, steps * batch)
        model = common.build_model(args.preset, device)
        gc.collect()  # the last arm's model
        return common.train_arm(arm, model, rows, tokenizer, MICRO_BATCH, args.accumulation, **options)

    arms = ("original", "ours")
    runs = common.alternate(arms, args.repeat, lambda arm: run(arm, args.steps, bf16=True))
    seconds = {arm: common.all_steps(runs[arm]) for arm in arms}
    ratio = common.median_ratio(seconds["original"], seconds["ours"])
    exact = {arm: run(arm, args.loss_steps, skip=0) for arm in arms} if args.loss_steps else None
    difference = common.loss_difference(exact["original"], exact["ours"]) if exact else None
    flat = not any(one["padded"] for one in runs["ours"])
    result |= {
        "what": f"examples per second, micro-batches of {MICRO_BATCH}: ours flat, the original's padded",
        "settings": {
            "device": device,
            "preset": args.preset,
            "parameters": common.build_model(args.preset, "meta").num_parameters(),
            "threads": torch.get_num_threads(),
            "micro_batch": MICRO_BATCH,
            "accumulation": args.accumulation,
            "steps": args.steps,
            "repeat": args.repeat,
            "precision": "bf16 autocast, float32 masters",
        },
        "median_examples_per_s": {arm: batch / statistics.median(seconds[arm]) for arm in arms},
        "median_ratio": ratio,
        "bound": BOUND,
        "ours_was_flat": flat,
        "bf16_loss_difference": max(map(common.loss_difference, runs["original"], runs["ours"])),
        "float32_loss_difference": difference,
        "float32_loss_bound": LOSS_BOUND,
        "float32": exact,
        "runs": runs,
        "passed": flat and ratio >= BOUND and (exact is None or difference <= LOSS_BOUND),
    }
    common.write_result(result, args.output)
    medians = result["median_examples_per_s"]
    print(
        f"{args.preset} on {device}: original {medians['original']:.2f} examples/s, ours {medians['ours']:.2f}, "
        f"ratio {ratio:.2f} (at least {BOUND}); largest difference of a step's loss: bf16 "
        f"{result['bf16_loss_difference']:.1e}"
        + (f", float32 {difference:.1e} (at most {LOSS_BOUND:.0e})" if exact else "")
    )
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    common.utils.run_main(main)
