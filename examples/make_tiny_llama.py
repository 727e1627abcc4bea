"""Make a LLaMA of random weights, small enough for tests and first steps, with a tokenizer of LLaMA's kind.

Nothing is downloaded. The tokenizer is a SentencePiece BPE model trained here, on tiny_corpus.txt or on texts of
yours; the folder loads with AutoTokenizer and AutoModelForCausalLM. Same texts, seed and libraries: same bytes.

    python examples/make_tiny_llama.py --output_dir out/tiny-llama
    python examples/make_tiny_llama.py --output_dir out/raw --raw --num_shards 2     # as Meta ships it, to be converted
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from extend_vocab import train_sentencepiece, save_tokenizer

CORPUS = Path(__file__).resolve().with_name("tiny_corpus.txt")
LENGTH = 2048  # tokens: the longest sequence, that of the first LLaMA

# Parameters in all: tiny 234,816, small 3,654,912. intermediate_size is near 8/3 of hidden_size, as in LLaMA.
PRESETS = {
    "tiny": {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4},
    "small": {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4},
}


MULTIPLE_OF = 64  # in Meta's rule for intermediate_size: 8/3 of dim, up to such a multiple; bitsandbytes wants it too

# Along which dimension Meta's model parallel layout splits a tensor; norms and the rotary table are in every shard.
SPLIT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "tok_embeddings": 1, "output": 0}


def make_tiny_llama(output_dir, preset="tiny", seed=0, texts=()):
    """Write a random LLaMA and its tokenizer into `output_dir`; returns the number of parameters.

    `preset` is a key of PRESETS, `seed` decides the weights alone, and `texts` are paths of UTF-8 files to train the
    tokenizer on instead of tiny_corpus.txt; Alpaca's two templates are always added. The caller's random state stays
    as it was. Raises UserError where `output_dir` holds a model already, a text cannot be read or is too short, or the
    tokenizer would not give the ids of its SentencePiece model.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if Path(output_dir, "config.json").exists():
        raise utils.UserError(f"--output_dir {output_dir}: there is a config.json already; choose another folder")
    for path in texts:
        if not Path(path).is_file():
            raise utils.UserError(f"--text {path}: no such file")
    pieces = train_sentencepiece(
        [*(utils.read_text(path) for path in texts or [CORPUS]), *utils.PROMPT_DICT.values()],
        PRESETS[preset]["vocab_size"],
    )
    config = LlamaConfig(
        **PRESETS[preset],
        num_hidden_layers=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with utils.hidden_folder(Path(output_dir, ".saving"), output_dir) as folder:
        save_tokenizer(pieces, folder, LENGTH)
        model.save_pretrained(folder)
    return model.num_parameters()


def raw_weights(sizes, num_layers, num_key_value_heads, seed, std=0.02):
    """Random weights under Meta's names, {name: float32 tensor}; `sizes` is a preset. Norms are 1, matrices normal."""
    import torch

    dim, ffn, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    head_dim = dim // sizes["num_attention_heads"]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * std

    weights = {"tok_embeddings.weight": normal(vocab, dim)}
    for i in range(num_layers):
        rows = {"wq": dim, "wk": num_key_value_heads * head_dim, "wv": num_key_value_heads * head_dim, "wo": dim}
        weights |= {f"layers.{i}.attention.{name}.weight": normal(count, dim) for name, count in rows.items()}
        weights |= {f"layers.{i}.feed_forward.{name}.weight": normal(ffn, dim) for name in ("w1", "w3")}
        weights[f"layers.{i}.feed_forward.w2.weight"] = normal(dim, ffn)
        weights |= {f"layers.{i}.{name}.weight": torch.ones(dim) for name in ("attention_norm", "ffn_norm")}
    weights |= {"norm.weight": torch.ones(dim), "output.weight": normal(vocab, dim)}
    return weights | {"rope.freqs": 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)}


def write_raw(folder, weights, params, num_shards=1, **split):
    """Write Meta's layout: consolidated.NN.pth and params.json; `split` changes entries of SPLIT."""
    import torch

    split = SPLIT | split
    for shard in range(num_shards):
        axes = {name: split.get(name.split(".")[-2]) for name in weights}
        parts = {
            name: weights[name] if axis is None else weights[name].chunk(num_shards, axis)[shard].clone()
            for name, axis in axes.items()
        }
        torch.save(parts, folder / f"consolidated.{shard:02}.pth")
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")


def make_tiny_raw(output_dir, preset="tiny", seed=0, texts=(), num_shards=1, num_key_value_heads=None):
    """Write a random LLaMA as Meta ships it, in float16: `output_dir`/`preset` with the shards, and tokenizer.model.

    Returns the number of parameters; see `make_tiny_llama` for the rest. Raises UserError where the folder exists, or
    where heads do not divide by the shards.
    """
    folder, sizes = Path(output_dir, preset), PRESETS[preset]
    if folder.exists():
        raise utils.UserError(f"--output_dir {output_dir}: there is a {preset} already; choose another folder")
    heads = num_key_value_heads or sizes["num_attention_heads"]
    if sizes["num_attention_heads"] % heads or heads % num_shards:
        raise utils.UserError(f"{heads} key-value heads must divide the {sizes['num_attention_heads']} heads, and "
                              f"--num_shards {num_shards} must divide them; choose other numbers")  # fmt: skip
    texts = [*(utils.read_text(path) for path in texts or [CORPUS]), *utils.PROMPT_DICT.values()]
    pieces = train_sentencepiece(texts, sizes["vocab_size"])
    weights = raw_weights(sizes, 2, heads, seed)
    count = sum(tensor.numel() for name, tensor in weights.items() if name != "rope.freqs")
    params = {"dim": sizes["hidden_size"], "multiple_of": MULTIPLE_OF, "n_heads": sizes["num_attention_heads"],
              "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}  # fmt: skip
    if num_key_value_heads:
        params["n_kv_heads"] = heads
    with utils.hidden_folder(Path(output_dir, ".saving"), output_dir) as staging:
        (staging / preset).mkdir()
        write_raw(staging / preset, {name: tensor.half() for name, tensor in weights.items()}, params, num_shards)
        (staging / "tokenizer.model").write_bytes(pieces)
    return count


def main():
    parser = argparse.ArgumentParser(
        description="Make a small LLaMA of random weights, with its tokenizer; nothing is downloaded.",
        epilog="example: python examples/make_tiny_llama.py --output_dir out/tiny-llama",
    )
    parser.add_argument("--output_dir", required=True, help="the folder to write; must not hold a config.json")
    parser.add_argument(
        "--preset", choices=PRESETS, default="tiny", help="0.2 or 3.6 million parameters (default: tiny)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the weights (default: 0)")
    parser.add_argument(
        "--text", nargs="+", default=(), metavar="FILE", help="train the tokenizer on these, not on tiny_corpus.txt"
    )
    parser.add_argument("--raw", action="store_true", help="as Meta ships it: input of convert_llama_weights.py")
    parser.add_argument("--num_shards", type=int, default=1, choices=(1, 2, 4), help="shards of --raw (default: 1)")
    parser.add_argument("--num_key_value_heads", type=int, choices=(1, 2, 4), help="of --raw (default: 4, as heads)")
    args = parser.parse_args()
    if args.raw:
        options = (args.num_shards, args.num_key_value_heads)
        count = make_tiny_raw(args.output_dir, args.preset, args.seed, args.text, *options)
    elif args.num_shards > 1 or args.num_key_value_heads:
        raise utils.UserError("--num_shards and --num_key_value_heads belong to --raw; add it")
    else:
        count = make_tiny_llama(args.output_dir, args.preset, args.seed, args.text)
    utils.say(
        f"{args.output_dir}: LLaMA with {count:,} random parameters, vocabulary {PRESETS[args.preset]['vocab_size']:,}"
    )


if __name__ == "__main__":
    utils.run_main(main)
