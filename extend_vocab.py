"""Teach a LLaMA's tokenizer another language: more pieces, and for each a row of the embedding and the output layer.

    python extend_vocab.py --base llama-7b --corpus wiki_zh.txt --vocab_size 20000 --target llama-7b-zh
    python extend_vocab.py --base llama-7b --pieces chinese_sp.model --target llama-7b-zh
    python extend_vocab.py --base merged-elsewhere --repair --target repaired

As Chinese-LLaMA-Alpaca does, with two differences. The new pieces' scores are distinct and below all old ones: equal
ones cannot be read alike by a fast tokenizer, and higher ones change how English is read. A new row is the mean of the
rows of the old pieces that spelled it. --repair gives distinct scores to a model that was merged with equal ones.
Byte-level BPE (Llama 3, SmolLM2, Qwen) grows by merges behind the old ones, which is the same.
"""

import argparse
import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

import utils
import weights
from utils import UserError, say

ROW_MULTIPLE = 64  # embedding and output layer have a multiple of it: matrix units like that
HELD_OUT = 20  # every so many texts of the corpus, one is not trained on
COVERAGE = 0.9995  # of the corpus's characters
MARK = "▁"  # SentencePiece's space
VOCABULARY = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "output.weight")


def parse_arguments(words):
    parser = argparse.ArgumentParser(
        prog="extend_vocab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, help="Folder of the model with its tokenizer.model.")
    add("--target", required=True, help="The folder to write.")
    add("--corpus", nargs="+", default=[], help="Texts, or records, of the new language; every 20th is held out.")
    add("--pieces", help="A SentencePiece model whose pieces are added, in place of training one on the corpus.")
    add("--vocab_size", type=int, default=20000, help="Pieces of the model trained on the corpus (default: 20000).")
    add("--repair", **utils.TRUTH, default=False, help="Add nothing; give pieces of equal score distinct ones.")
    add("--overwrite", **utils.TRUTH, default=False, help="Write into a folder that holds something.")
    args = utils.parse_options(parser, words)
    utils.refuse_all({
        "give --corpus FILES, or --pieces MODEL": not (args.corpus or args.pieces or args.repair),
        "--repair adds nothing; leave --pieces out": args.repair and args.pieces,
        f"--vocab_size {args.vocab_size}: it must be at least 300, which 259 bytes and marks are part of": args.vocab_size < 300,
    })  # fmt: skip
    return args


# --- Pieces ----------------------------------------------------------------------------------------------------------


def texts_in(paths):
    """The texts of plain files, and of records all that is said in them, in order. Raises UserError for bad ones."""
    for path in paths:
        problems = []
        if utils.is_text(path):
            yield from (text for _, text in utils.texts_of(path, problems))
        else:
            records, problems = utils.read_records([path])
            for record in records:
                yield "\n".join(text for m in record["messages"] for text in (m["content"], m.get("input")) if text)
        if problems:
            raise UserError(f"{len(problems)} records cannot be used: {'; '.join(problems[:3])}; mend them")


def train_sentencepiece(texts, vocab_size, coverage=0.998):
    """Train a BPE model with LLaMA's settings on texts, taken one at a time; returns the bytes of a tokenizer.model.

    Every line is one sentence, so no piece holds a line break: those are bytes, as in LLaMA. Raises UserError where
    the texts do not make that many pieces.
    """
    from sentencepiece import SentencePieceTrainer

    size, written = 0, io.BytesIO()

    def lines():
        nonlocal size
        for line in (line for text in texts for line in text.split("\n") if line.strip()):
            size += len(line)
            yield line

    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,  # the rarest characters get no piece: they are spelled in bytes
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # indents of code
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 24,  # bytes; longer lines would be left out without a word
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:  # too few pairs, or more different characters than pieces
        raise UserError(
            f"{size:,} characters of text do not make a vocabulary of {vocab_size:,}; "
            f"give more text, or fewer pieces ({utils.first_line(error)})"
        ) from None
    return written.getvalue()


def new_pieces(old, other):
    """The ordinary pieces of the SentencePiece model `other` that `old` lacks, in the order of their scores."""
    known = {piece.piece for piece in old.pieces}
    found = [piece for piece in other.pieces if piece.type == piece.NORMAL and piece.piece not in known]
    return [piece.piece for piece in sorted(found, key=lambda piece: -piece.score)]


def extended(old, names):
    """A copy of a SentencePiece model with pieces behind the old ones, of distinct scores below all of theirs.

    LLaMA's runs of spaces share -1e9 and stay the last. Raises UserError where float32 has no room for the scores.
    """
    new = type(old).FromString(old.SerializeToString())
    lowest = int(min(piece.score for piece in old.pieces if piece.type == piece.NORMAL and set(piece.piece) != {MARK}))
    scores = np.float32(lowest - 1) - np.arange(len(names), dtype=np.float64)
    if len(np.unique(scores.astype(np.float32))) < len(names):
        raise UserError(
            f"scores below {lowest} are not distinct in float32; --repair the base first, which ranks its own"
        )
    for name, score in zip(names, scores, strict=True):
        new.pieces.add(piece=name, score=float(score), type=new.pieces[0].NORMAL)
    new.trainer_spec.vocab_size = len(new.pieces)
    return new


def ranked(old):
    """(a copy of a SentencePiece model whose scores are ranks, so all distinct; how many pieces shared a score).

    Among equals the lower id goes first. Runs of spaces keep their score.
    """
    new = type(old).FromString(old.SerializeToString())
    normal = [p for p in new.pieces if p.type == p.NORMAL and set(p.piece) != {MARK}]
    shared = len(normal) - len({piece.score for piece in normal})
    for rank, piece in enumerate(sorted(normal, key=lambda piece: -piece.score)):  # sorted keeps the order of equals
        piece.score = -float(rank)
    return new, shared


def processor(proto):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def spelling(reader, piece):
    """The ids with which the old model spells a piece where it stands, without the space that begins a text."""
    head = reader.encode("\n")
    ids = reader.encode("\n" + piece.replace(MARK, " "))
    if ids[: len(head)] != head or len(ids) == len(head):
        raise UserError(f"the base does not spell {piece!r} by itself; it is not of LLaMA's kind")
    return ids[len(head) :]


# --- The tokenizer and the weights -----------------------------------------------------------------------------------


def save_tokenizer(pieces, folder, window, **more):
    """Write tokenizer.model, the bytes `pieces`, and a tokenizer.json beside it. Raises UserError where their ids differ."""
    path = Path(folder, "tokenizer.model")
    path.write_bytes(pieces)
    tokenizer = utils.tokenizer_from_sentencepiece(path, model_max_length=window, **more)
    if (text := utils.differs_from_sentencepiece(tokenizer, path)) is not None:
        what = f"the tokenizer built from {path.name} reads {text!r} otherwise than it"
        raise UserError(f"{what}; --repair gives pieces of equal score distinct ones")
    tokenizer.save_pretrained(folder)
    return tokenizer


def checked_rows(tensor, count):
    """Yield the first `count` rows of a tensor in blocks. Raises UserError for values that are not finite."""
    for start, stop in weights.row_blocks((count, *tensor.shape[1:]), tensor.dtype):
        block = tensor.read(start, stop)
        weights.check_finite(block, tensor.dtype, f"{tensor.name}, rows {start} to {stop}")
        yield block


def grown_rows(tensor, spellings, first, count):
    """Yield a tensor with `count` rows in blocks: the old ones, new ones from `first` on, the mean behind.

    A new row is the mean, in float32, of the old rows of its spelling; rows behind the last piece are the mean of all.
    """
    import torch

    dtype, total = getattr(torch, tensor.dtype), torch.zeros(tensor.shape[1], dtype=torch.float64)
    for block in checked_rows(tensor, first):
        total += torch.from_numpy(block).view(dtype).double().sum(0)
        yield block
    for start in range(0, count - first, 256):
        rows = []
        for ids in spellings[start : start + 256]:
            old = np.concatenate([tensor.read(i, i + 1) for i in ids])
            rows.append(torch.from_numpy(old).view(dtype).float().mean(0))
        spare = min(count - first - start, 256) - len(rows)
        yield torch.stack(rows + [(total / first).float()] * spare).to(dtype).view(torch.uint8).numpy()


def write_grown(base, folder, plan, stored, spellings, first, count):
    """Write all tensors of `base`, embedding and output layer grown to `count` rows, and its config."""
    with weights.checksums(stored.values()), weights.WeightWriter(folder, plan) as writer:
        with weights.meter("writing", weights.plan_size(plan)) as meter:
            for name, tensor in stored.items():
                is_kept = plan[name][1] == tensor.shape
                for block in (
                    checked_rows(tensor, len(tensor)) if is_kept else grown_rows(tensor, spellings, first, count)
                ):
                    writer.append(name, block)
                    meter.update(block.nbytes)
    config = utils.config_of(base)
    utils.write_json(config | {"vocab_size": count}, folder / "config.json")
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


def report(old, new, texts):
    """Tokens a character of texts, (before, after, texts whose ids differ, texts of more tokens)."""
    size = before = after = differ = longer = 0
    for text in texts:
        ids = old(text), new(text)
        size, before, after = size + len(text), before + len(ids[0]), after + len(ids[1])
        differ, longer = differ + (ids[0] != ids[1]), longer + (len(ids[1]) > len(ids[0]))
    return before / max(size, 1), after / max(size, 1), differ, longer


# --- Byte-level BPE --------------------------------------------------------------------------------------------------


def trained_bpe(texts, state, vocab_size):
    """The merges of a byte-level BPE model trained on texts, which are split as the tokenizer.json `state` does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    plain = dict.fromkeys(("post_processor", "decoder", "truncation", "padding"))
    plain |= {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    made = Tokenizer.from_str(json.dumps(state | plain))
    made.model = models.BPE()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return json.loads(made.to_str())["model"]["merges"]


def grow_bpe(args, tokenizer):
    """The `Growth` of a tokenizer of byte-level BPE. Raises UserError for one whose ids have no room behind them."""
    from tokenizers import Tokenizer, models

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], [tuple(merge) for merge in state["model"]["merges"]]
    first = max(vocab.values()) + 1
    if behind := [token["content"] for token in state["added_tokens"] if token["id"] >= first]:
        raise UserError(f"{args.base}: {', '.join(behind[:3])} stand behind its vocabulary, where new tokens would")
    if args.pieces:
        other = [tuple(merge) for merge in utils.read_json(args.pieces)["model"]["merges"]]
    else:
        with utils.say_if_slow(f"training {args.vocab_size:,} pieces"):
            other = trained_bpe(trained_texts(args.corpus), state, args.vocab_size)
    grown, known, names = dict(vocab), set(merges), []
    for left, right in map(tuple, other):
        if left in grown and right in grown and (left, right) not in known:
            merges.append((left, right))
            if left + right not in grown:
                grown[left + right] = first + len(names)
                names.append(left + right)
    old = Tokenizer(models.BPE(vocab, [tuple(merge) for merge in state["model"]["merges"]]))
    spellings = [old.encode(name).ids for name in names]
    state["model"] |= {"vocab": grown, "merges": [list(merge) for merge in merges]}
    new = Tokenizer.from_str(json.dumps(state))
    readers = [
        lambda text, one=one: one.encode(text, add_special_tokens=False).ids
        for one in (tokenizer.backend_tokenizer, new)
    ]

    def write(folder):
        tokenizer._tokenizer = new
        tokenizer.save_pretrained(folder)

    return Growth(first, names, spellings, readers, write)


# --- The story -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Growth:
    """What becomes of a tokenizer: new ids from `first` on, each with its name and the old ids that spell it.

    `readers` give the ids of a text, before and after; `write` writes the new tokenizer into a folder.
    """

    first: int
    names: list
    spellings: list
    readers: list
    write: object


def trained_texts(paths):
    """The texts of a corpus that are trained on."""
    return (text for i, text in enumerate(texts_in(paths)) if i % HELD_OUT)


def grow_sentencepiece(args, path, tokenizer):
    """The `Growth` of a tokenizer by its SentencePiece model. Raises UserError where there is nothing to add or repair."""
    old = utils.sentencepiece_proto(path)
    normal = [p for p in old.pieces if p.type == p.NORMAL and set(p.piece) != {MARK}]
    has_equals = len({piece.score for piece in normal}) < len(normal)
    behind = [str(token) for i, token in tokenizer.added_tokens_decoder.items() if i >= len(old.pieces)]
    utils.refuse_all({
        f"{args.base}: no two of its pieces share a score; there is nothing to repair": args.repair and not has_equals,
        f"{args.base}: pieces share scores, as merged ones do; extend_vocab.py --repair goes first": (
            has_equals and not args.repair
        ),
        f"{args.base}: {', '.join(behind[:3])} stand behind the {len(old.pieces):,} pieces of its tokenizer.model, where "
        "new ones would; extend the model that they were added to": behind and not args.repair,
    })  # fmt: skip
    if args.repair:
        (new, shared), names = ranked(old), []
        say(f"repaired: {shared:,} pieces shared a score with another")
    else:
        if args.pieces:
            other = utils.sentencepiece_proto(args.pieces)
        else:
            with utils.say_if_slow(f"training {args.vocab_size:,} pieces"):
                other = type(old).FromString(train_sentencepiece(trained_texts(args.corpus), args.vocab_size, COVERAGE))
        names = new_pieces(old, other)
        new = extended(old, names)
    before, after = (processor(proto) for proto in (old, new))
    more = {"pad_token": tokenizer.pad_token} | (
        {"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    )

    def write(folder):
        save_tokenizer(new.SerializeToString(), folder, tokenizer.model_max_length, **more)

    spellings = [spelling(before, name) for name in names]
    return Growth(len(old.pieces), names, spellings, [before.encode, after.encode], write)


def extend_vocab(args):
    """Write the model with its grown tokenizer. Raises UserError where base, pieces and target do not fit together."""
    base = weights.find_model(args.base, option="--base")
    utils.check_model(base, "--base")
    path, stored = utils.find_sentencepiece(base), weights.open_weights(base)
    weights.check_output(args.target, [base], args.overwrite, option="--target")
    tokenizer = utils.load_tokenizer(base)
    if path is None and ("ByteLevel" not in str(tokenizer.backend_tokenizer.pre_tokenizer) or args.repair):
        raise UserError(f"--base {args.base}: its tokenizer is neither SentencePiece's nor byte-level BPE")
    growth = grow_bpe(args, tokenizer) if path is None else grow_sentencepiece(args, path, tokenizer)
    if not (growth.names or args.repair):
        raise UserError(f"{args.pieces or ', '.join(args.corpus)}: the base has all of these pieces; nothing to add")
    last = growth.first + len(growth.names)
    count = -(-last // ROW_MULTIPLE) * ROW_MULTIPLE if growth.names else utils.config_of(base)["vocab_size"]
    grown = [name for name in stored if name.endswith(VOCABULARY)] if growth.names else []
    for name in grown:
        if len(stored[name]) < growth.first:
            raise UserError(
                f"{base}: {name} has {len(stored[name]):,} rows, fewer than the tokenizer's {growth.first:,} ids"
            )
    size = utils.config_of(base).get("vocab_size") if growth.names else None
    tops = [name for name in stored if name not in grown and not re.search(r"\.\d+\.", name)]
    if other := next((name for name in tops if stored[name].shape[:1] == (size,)), None):
        raise UserError(f"{base}: {other} has a row a token too, which is not LLaMA's; nothing was written")
    plan = {name: (t.dtype, (count, *t.shape[1:]) if name in grown else t.shape) for name, t in stored.items()}
    size, files = weights.plan_size(plan), weights.weight_file_names(plan)
    with weights.new_folder(args.target, size, [base], args.overwrite, files, "--target") as folder:
        growth.write(folder)
        write_grown(base, folder, plan, stored, growth.spellings, growth.first, count)
        about = {"made_by": "cria", "script": "extend_vocab.py", "status": "finished", "arguments": vars(args)}
        about |= {"pieces": {"old": growth.first, "new": len(growth.names), "rows": count}}
        about |= {"files": sorted(path.name for path in folder.iterdir() if path.name != utils.LOCK)}
        utils.write_json(about, folder / "run.json")
    for part, keep in (("corpus", True), ("held out", False)) if args.corpus else ():
        texts = (text for i, text in enumerate(texts_in(args.corpus)) if bool(i % HELD_OUT) == keep)
        before, after, differ, longer = report(*growth.readers, texts)
        ratio = after / before if before else 1
        changed = f"ids of {differ:,} texts changed, {longer:,} got longer"
        say(f"{part}: {before:.3f} -> {after:.3f} tokens a character ({ratio:.3f}); {changed}")
    if growth.names:
        mean = sum(map(len, growth.spellings)) / len(growth.names)
        say(
            f"{len(growth.names):,} new pieces, their rows means of {mean:.1f} old ones; {', '.join(grown)}: {count:,} rows"
        )
    print(f"{args.target}: {last:,} pieces, {size / 1e9:.2f} GB", flush=True)


def main():
    extend_vocab(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    utils.run_main(main)
