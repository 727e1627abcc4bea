"""Check every row that train.py makes of real records against the original rule, and count the CPU time of both.

    python benchmarks/check_real_data.py --data_path alpaca_data.json --tokenizer tokenizer.model

The original rule reads the file with json and makes each row by two tokenizer calls of its own (original_recipe.py);
ours is `SupervisedDataset`, from the file to the masked tensors. Ids are compared with SentencePiece's own as well.
Stanford Alpaca's 52,002 rows at a window of 512 give 52,001 kept rows and one dropped, whose prompt fills the window
and which the original masks whole. One thread; exit code 1 on any difference.
"""

import argparse
import json
import os
import sys
import time

import common
from common import utils

THREADS = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


def render(record):
    """The prompt of a record, written out apart from utils.py."""
    instruction = f"### Instruction:\n{record['instruction']}\n\n"
    if record.get("input", "") == "":
        return f"{TASK}. {REQUEST}\n\n{instruction}### Response:"
    context = f"{TASK}, paired with an input that provides further context. {REQUEST}\n\n"
    return f"{context}{instruction}### Input:\n{record['input']}\n\n### Response:"


def timed(function, *arguments):
    """Call a function. Returns (its result, the CPU seconds that this process spent on it)."""
    start = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - start


def make_original_rows(data_path, tokenizer):
    """Every record of a JSON list as the original made it. Returns (rows, prompts, outputs)."""
    import original_recipe

    with open(data_path, encoding="utf-8") as file:
        records = json.load(file)
    prompts, outputs = [render(record) for record in records], [record["output"] for record in records]
    rows = original_recipe.preprocess(prompts, [output + tokenizer.eos_token for output in outputs], tokenizer)
    return rows, prompts, outputs


def compare(rows, dataset, name):
    """Which records differ. Returns (names of rows that are not equal, names of rows dropped by one side alone)."""
    import torch

    kept = {source: i for i, source in enumerate(dataset.sources)}
    different, wrongly_dropped = [], []
    for i, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        source = f"{name}[{i}]"
        ours = kept.pop(source, None)
        if (ours is not None) != bool((labels != -100).any()):
            wrongly_dropped.append(source)
        elif ours is not None:
            item = dataset[ours]
            if not (torch.equal(item["input_ids"], ids) and torch.equal(item["labels"], labels)):
                different.append(source)
    return different, wrongly_dropped + list(kept)


def differing_ids(rows, prompts, outputs, tokenizer, model_path):
    """Compare ids with SentencePiece's own, but for texts that hold a special token.

    Returns (number of rows compared, numbers of the rows that differ).
    """
    texts = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    plain = [i for i, text in enumerate(texts) if not any(token in text for token in tokenizer.all_special_tokens)]
    expected = utils.sentencepiece_ids(model_path, [texts[i] for i in plain])
    begin, end, window = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length
    found = [rows["input_ids"][i].tolist() for i in plain]
    pairs = zip(plain, expected, found, strict=True)
    return len(plain), [i for i, a, b in pairs if [begin, *a, end][:window] != b]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="a JSON list of records")
    parser.add_argument("--tokenizer", required=True, help="a SentencePiece model, such as LLaMA's tokenizer.model")
    parser.add_argument("--model_max_length", type=int, default=512, help="window in tokens (default: 512)")
    args = parser.parse_args()
    os.environ.update(THREADS)  # read when the libraries are imported
    import torch

    import train

    common.quiet()
    torch.set_num_threads(1)
    tokenizer = utils.tokenizer_from_sentencepiece(args.tokenizer, model_max_length=args.model_max_length)
    tokenizer.add_special_tokens({"pad_token": train.DEFAULT_PAD_TOKEN})  # the original counts ids that are not padding
    dataset, our_seconds = timed(train.SupervisedDataset, args.data_path, tokenizer)
    (rows, prompts, outputs), their_seconds = timed(make_original_rows, args.data_path, tokenizer)
    different, wrongly_dropped = compare(rows, dataset, os.path.basename(args.data_path))
    num_compared, other_ids = differing_ids(rows, prompts, outputs, tokenizer, args.tokenizer)
    report = dataset.report
    print(f"{report['read']:,} read, {report['kept']:,} kept, {report['read'] - report['kept']:,} dropped")
    print(f"rows whose ids or labels differ from the original's: {len(different):,} {different[:3]}")
    print(f"rows that one side alone drops or masks whole: {len(wrongly_dropped):,} {wrongly_dropped[:3]}")
    print(f"rows whose ids differ from SentencePiece's: {len(other_ids):,} of {num_compared:,} {other_ids[:3]}")
    print(
        f"CPU seconds from file to tensors: original {their_seconds:.1f}, ours {our_seconds:.1f}, "
        f"ratio {their_seconds / our_seconds:.2f}"
    )
    sys.exit(1 if different or wrongly_dropped or other_ids else 0)


if __name__ == "__main__":
    utils.run_main(main)
