"""CPU time to turn records into ids and labels: the original recipe's calls, batched ones, and train.py's `encode`.

    python benchmarks/preprocessing.py --data_path alpaca_data.json --tokenizer tokenizer.model

One thread, process CPU seconds scaled to Alpaca's 52,002 rows, all ways in turn. The original calls the tokenizer once
a text; "batched" is the same rule with one call for all joined texts and one for all prompts. Every id and label must
be equal, and the original must take at least BOUND times as long as ours; the exit code is 1 otherwise. Where there is
a SentencePiece model, ours also compares a sample of the rows with its ids, as every run of train.py does.
"""

import argparse
import functools
import os
import sys
import time

import common

BOUND = 1.7
ALPACA_ROWS = 52002
THREADS = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def batched(sources, targets, tokenizer):
    """The original's rule in two tokenizer calls: {input_ids, labels}, lists of LongTensor (length,)."""
    import torch

    limits = {"max_length": tokenizer.model_max_length, "truncation": True, "return_attention_mask": False}
    texts = [source + target for source, target in zip(sources, targets, strict=True)]
    input_ids = [torch.tensor(ids) for ids in tokenizer(texts, **limits).input_ids]
    labels = [ids.clone() for ids in input_ids]
    for row, prompt in zip(labels, tokenizer(sources, **limits).input_ids, strict=True):
        row[: len(prompt)] = -100
    return {"input_ids": input_ids, "labels": labels}


def ours(sources, targets, tokenizer, model_path):
    """train.py's rows in the same form; compared with the SentencePiece model at `model_path`, where there is one."""
    import train

    pairs = [[(source, False), (target, True)] for source, target in zip(sources, targets, strict=True)]
    rows = train.encode(pairs, tokenizer)
    if model_path:
        train.compare_ids(range(len(pairs)), pairs, rows, tokenizer, model_path)
    rows, _ = train.cut(rows, tokenizer.model_max_length)
    return {key: [row[key] for row in rows] for key in ("input_ids", "labels")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="records as JSON or JSON Lines")
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece .model file or a model folder")
    parser.add_argument("--rows", type=int, help="use the first so many records (default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each way (default: 3)")
    common.add_tiny(parser)
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
    is_file = os.path.isfile(args.tokenizer)
    model_path = args.tokenizer if is_file else common.utils.find_sentencepiece(args.tokenizer)

    ways = {"original": original_recipe.preprocess, "batched": batched}
    ways["ours"] = functools.partial(ours, model_path=model_path)
    made, different = {}, {way: set() for way in ways if way != "original"}

    def measure(way):
        start = time.process_time()
        rows = ways[way](sources, targets, tokenizer)
        seconds = (time.process_time() - start) * ALPACA_ROWS / len(sources)
        made.setdefault("original", rows)  # the first way
        for i in range(len(sources)) if way != "original" else ():
            if not all(torch.equal(made["original"][key][i], rows[key][i]) for key in ("input_ids", "labels")):
                different[way].add(i)
        return seconds

    seconds = common.alternate(ways, args.repeat, measure)
    ratios = {way: common.ratio(seconds[way], seconds["ours"]) for way in ("original", "batched")}
    spreads = {way: common.spread(values) for way, values in seconds.items()}
    is_fast = ratios["original"]["median"] >= BOUND
    result |= {
        "what": "CPU seconds of one thread per 52,002 rows, from prompts and answers to ids and labels",
        "settings": {"rows": len(sources), "repeat": args.repeat, "window": tokenizer.model_max_length},
        "cpu_seconds": seconds,
        "spread": spreads,
        "ratios_to_ours": ratios,
        "bound": BOUND,
        "rows_that_differ": {way: len(rows) for way, rows in different.items()},
        "passed": (is_fast or args.tiny) and not any(different.values()),
    }
    common.write_result(result, args.output)
    for way, found in spreads.items():
        print(f"{way}: {common.in_words(found)} CPU s per {ALPACA_ROWS:,} rows")
    words = {way: common.in_words(found) for way, found in ratios.items()}
    print(f"original / ours: {words['original']}, at least {BOUND}; batched / ours: {words['batched']}")
    print(f"rows of {len(sources):,} that differ from the original's: {result['rows_that_differ']}")
    if args.tiny:
        print(common.NOT_JUDGED)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    common.utils.run_main(main)
