"""Train a tokenizer of LLaMA's kind on plain texts: a SentencePiece BPE model, and a tokenizer.json with the same ids.

    python examples/train_tokenizer.py --data_path wiki.txt --vocab_size 8000 --output_dir out/tokenizer

Texts are .txt files, records {"text"} and folders of them, as train.py reads them. Nothing is
downloaded. The folder goes into `train.py --config_name 135m --tokenizer_name out/tokenizer`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from extend_vocab import train_sentencepiece, save_tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", nargs="+", required=True, help="texts: .txt, records {text}, folders of them")
    parser.add_argument("--output_dir", required=True, help="the folder to write; must not hold a tokenizer")
    parser.add_argument(
        "--vocab_size", type=int, default=8000, help="pieces, 259 of them bytes and marks (default: 8000)"
    )
    parser.add_argument("--model_max_length", type=int, default=2048, help="tokens, for those who ask the tokenizer")
    parser.add_argument("--coverage", type=float, default=0.9995, help="share of the characters that get a piece")
    args = parser.parse_args()
    if Path(args.output_dir, "tokenizer.model").exists():
        raise utils.UserError(f"--output_dir {args.output_dir}: there is a tokenizer already; choose another folder")
    problems, characters = [], 0

    def texts():
        nonlocal characters
        for path in args.data_path:
            if not utils.is_text(path):
                raise utils.UserError(f"{path}: no plain texts; give .txt files or records {{text}}")
            for _, text in utils.texts_of(path, problems):
                characters += len(text)
                yield text

    with utils.say_if_slow("training the tokenizer"):
        pieces = train_sentencepiece(texts(), args.vocab_size, args.coverage)
    for problem in problems:
        utils.say(f"left out: {problem}")
    with utils.hidden_folder(Path(args.output_dir, ".saving"), args.output_dir) as folder:
        save_tokenizer(pieces, folder, args.model_max_length)
    from sentencepiece import SentencePieceProcessor

    made, tokens = SentencePieceProcessor(model_proto=pieces), 0
    tokens = sum(len(made.encode(text)) for path in args.data_path for _, text in utils.texts_of(path, []))
    utils.say(f"{args.output_dir}: {args.vocab_size:,} pieces, {tokens / max(characters, 1):.3f} tokens a character")


if __name__ == "__main__":
    utils.run_main(main)
