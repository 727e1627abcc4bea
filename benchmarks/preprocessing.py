"""CPU time to turn records into ids and labels: the original recipe's own calls against train.py's `encode` and `cut`.

    python benchmarks/preprocessing.py --data_path alpaca_data.json --tokenizer tokenizer.model

One thread, process CPU seconds scaled to Alpaca's 52,002 rows, both ways in turn. Every id and label must be equal,
and the original must take at least BOUND times as long; the exit code is 1 otherwise. Where there is a SentencePiece
model, ours also compares a sample of the rows with its ids, as every run of train.py does.
"""

import argparse
import os
import statistics
import sys
import time

import common

BOUND = 1.7
ALPACA_ROWS = 52002
THREADS = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="records as JSON or JSON Lines")
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece .model file or a model folder")
    parser.add_argument("--rows", type=int, help="use the first so many records (default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each way (default: 3)")
    common.add_output(parser, "preprocessing")
    args = parser.parse_args()
    os.environ.update(THREADS)  # read when the libraries are imported
    import original_recipe
    import torch

    import train

    common.quiet()
    torch.set_num_threads(1)
    result = common.surroundings()
    tokenizer = common.load_tokenizer(args.tokenizer)
    tokenizer.add_special_tokens({"pad_token": train.DEFAULT_PAD_TOKEN})  # as the original has it: never inside a row
    sources, targets = common.read_texts(args.data_path, tokenizer.eos_token, args.rows)
    is_model = os.path.isfile(args.tokenizer)
    model_path = args.tokenizer if is_model else common.utils.find_sentencepiece(args.tokenizer)

    def ours(sources, targets, tokenizer):
        pairs = [[(source, False), (target, True)] for source, target in zip(sources, targets, strict=True)]
        rows = train.encode(pairs, tokenizer)
        if model_path:
            train.compare_ids(range(len(pairs)), pairs, rows, tokenizer, model_path)
        rows, _ = train.cut(rows, tokenizer.model_max_length)
        return {key: [row[key] for row in rows] for key in ("input_ids", "labels")}

    ways = {"original": original_recipe.preprocess, "ours": ours}
    made = {}

    def measure(way):
        made.pop(way, None)
        start = time.process_time()
        made[way] = ways[way](sources, targets, tokenizer)
        return (time.process_time() - start) * ALPACA_ROWS / len(sources)

    seconds = common.alternate(ways, args.repeat, measure)
    different = [
        i
        for i in range(len(sources))
        if not all(torch.equal(made["original"][key][i], made["ours"][key][i]) for key in ("input_ids", "labels"))
    ]
    ratio = common.median_ratio(seconds["original"], seconds["ours"])
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    result |= {
        "what": "CPU seconds of one thread per 52,002 rows, from prompts and answers to ids and labels",
        "settings": {"rows": len(sources), "repeat": args.repeat, "window": tokenizer.model_max_length},
        "cpu_seconds": seconds,
        "median_cpu_seconds": medians,
        "median_ratio": ratio,
        "bound": BOUND,
        "rows_that_differ": len(different),
        "passed": ratio >= BOUND and not different,
    }
    common.write_result(result, args.output)
    print(
        f"{len(sources):,} rows: original {medians['original']:.1f} CPU s, ours {medians['ours']:.1f} CPU s "
        f"per {ALPACA_ROWS:,} rows, ratio {ratio:.2f} (at least {BOUND}); rows that differ: {len(different)}"
    )
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    common.utils.run_main(main)
