"""A table of runs of train.py: the held-out loss before and after each, a token and a character.

    python examples/stages.py out/pretrained out/tuned

Losses of different tokenizers can be compared by the character alone. Tokens a character are those of the run's own
tokenizer on the first 500 texts or answers of its data.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from extend_vocab import texts_in

COUNT = 500  # texts


def answers_in(path):
    """The texts of a source, or the answers of its records."""
    if utils.is_text(path):
        return texts_in([path])
    return (m["content"] for r in utils.read_records([path])[0] for m in r["messages"] if m["role"] == "assistant")


def tokens_a_character(tokenizer, paths):
    texts = [text for path in paths for _, text in zip(range(COUNT), answers_in(path))]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    return sum(map(len, ids)) / max(sum(map(len, texts)), 1)


def row(folder):
    """The cells of a run. Raises UserError for a folder without one, or without held-out losses."""
    run = utils.read_run(folder)
    losses = (run or {}).get("results", {}).get("eval_losses")
    if not losses:
        raise utils.UserError(f"{folder}: no finished run with held-out losses; give --val_set_size to train.py")
    tokenizer = utils.load_tokenizer(folder)
    ratio = tokens_a_character(tokenizer, run["arguments"]["data_path"])
    before, after = (list(losses.values())[i] for i in (0, -1))
    return [Path(folder).name, *(f"{x:.3f}" for x in (before, after, ratio, before * ratio, after * ratio))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="output folders of train.py")
    rows = [row(folder) for folder in parser.parse_args().folders]
    print("| run | loss a token, before | after | tokens a character | loss a character, before | after |")
    print("|---|---|---|---|---|---|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    utils.run_main(main)
