"""Under FSDP one full copy of the weights is loaded per node: the other processes' memory hardly grows."""

import subprocess

import pytest
from conftest import FSDP, ROOT, environment, field, launcher
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LOAD = """
import sys
sys.path.insert(0, {root!r})
import psutil
import train
import utils

model_args, _, args, _ = train.parse_arguments(sys.argv[1:])
config, tokenizer = utils.load_config(model_args.model_name_or_path), utils.load_tokenizer(model_args.model_name_or_path)
before = psutil.Process().memory_info().rss
model = train.load_model(model_args, args, config, tokenizer)
grown = psutil.Process().memory_info().rss - before
print(f"process {{args.process_index}} grew by {{grown / 2**20:.0f}} MiB\\n", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("options", "copies"), [(FSDP, 1), ((), 2)], ids=["fsdp", "ddp"])
def test_full_copies_of_the_weights_on_one_node(options, copies, base, tmp_path):
    config = LlamaConfig(
        vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12
    )
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**20
    assert 430 < size < 450  # MiB in fp32
    model.half().save_pretrained(tmp_path / "model")  # as LLaMA is; fp32 files would be mapped, not read
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "model")
    (tmp_path / "load.py").write_text(LOAD.format(root=str(ROOT)))
    words = [*launcher(2), tmp_path / "load.py", "--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path]
    done = subprocess.run([*words, *options], capture_output=True, text=True, env=environment(), timeout=400)
    grown = [int(field(rf"process {rank} grew by (-?\d+) MiB", done.stdout)) for rank in (0, 1)]
    assert grown[0] > 0.8 * size, grown
    assert (grown[1] > 0.8 * size) == (copies == 2) and (copies == 2 or grown[1] < 0.2 * size), grown
