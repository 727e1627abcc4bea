"""What the tests share: a tiny model, records, and real runs of train.py under real launchers, on CPU."""

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background: the scripts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
FSDP = ("--fsdp", "full_shard auto_wrap")
ZERO3 = ("--deepspeed", str(ROOT / "ds_config.json"))
ZERO2 = ("--deepspeed", str(ROOT / "examples" / "ds_zero2.json"))
# What a finished run leaves of the tiny model, beside run.json, which names these files.
MODEL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
)
RUN_FILES = MODEL_FILES | {"loss.csv", "loss.png", "trainer_state.json"}
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="the optional package deepspeed is not installed")


def environment():
    """The environment of a run: one thread a process, no network, no launcher's variables of an outer run."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC", "ACCELERATE_", "FSDP_", "CRIA_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    bin_dir = str(Path(sys.executable).parent)  # not resolved: the environment's own torchrun and deepspeed
    if os.access(sys.prefix, os.W_OK):  # each environment's operators beside it: one cache for two builds them in turn
        kept.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    return kept | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": bin_dir + os.pathsep + os.environ["PATH"],
    }


class Run:
    """A finished run of train.py: `code`, `out`, `err` and what it left in `folder`."""

    def __init__(self, code, out, err, folder):
        self.code, self.out, self.err, self.folder = code, out, err, Path(folder)

    def losses(self):
        return [float(row["loss"]) for row in csv.DictReader(open(self.folder / "loss.csv", encoding="utf-8"))]

    def column(self, key):
        """{step: value} of a column of loss.csv, without its empty cells."""
        rows = csv.DictReader(open(self.folder / "loss.csv", encoding="utf-8"))
        return {int(row["step"]): float(row[key]) for row in rows if row[key]}

    def info(self):
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))

    def weights(self):
        from safetensors.torch import load_file

        return {k: v for path in sorted(self.folder.glob("*.safetensors")) for k, v in load_file(path).items()}

    def finished(self):
        """Whether the run reached its end. Judged by run.json, written after the save: DeepSpeed may abort later."""
        assert (self.folder / "run.json").is_file(), self.err[-3000:]
        assert self.info()["status"] == "finished", self.err[-3000:]
        return self

    def error(self):
        """The one line of a refusal; fails the test where there is not exactly one, or where there is a traceback.

        Under a launcher it is said twice, the second time behind the launcher's own report.
        """
        lines = list(dict.fromkeys(line for line in self.err.splitlines() if line.startswith("error: ")))
        assert self.code != 0 and len(lines) == 1, self.err[-3000:]
        assert not any(f'File "{ROOT / script}"' in self.err for script in ("train.py", "engines.py", "utils.py")), (
            self.err[-3000:]
        )
        return lines[0]


def launcher(processes):
    """The words before `train.py`: plain python for one process, torchrun on a free port for more."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def start(options, processes=1, cwd=None, command=None, script="train.py", **keywords):
    """Start train.py with `options` and return the process; `command` replaces the launcher's words."""
    words = [*(command or launcher(processes)), str(ROOT / script), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(words, cwd=cwd, env=environment(), **(pipes | keywords))


def finish(process, options, timeout=400):
    """Wait for a process of `start` and return its `Run`."""
    out, err = process.communicate(timeout=timeout)
    words = list(map(str, options))
    folder = words[words.index("--output_dir") + 1] if "--output_dir" in words else "."
    return Run(process.returncode, out, err, folder)


def train(options, processes=1, cwd=None, command=None, timeout=400):
    """Run train.py to its end; see `start`."""
    return finish(start(options, processes, cwd, command), options, timeout)


def basic_options(base, data, output, **changes):
    """A small, quick run: 70 records, global batch 8, one epoch of 9 steps; `changes` replace or add options."""
    options = {
        "model_name_or_path": base,
        "data_path": data,
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": "1e-3",
        "save_strategy": "no",
    }
    return [word for key, value in (options | changes).items() for word in (f"--{key}", str(value))]


BUILD_OPERATORS = """
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
CPUAdamBuilder().load(verbose=False)
ShareMemCommBuilder().load(verbose=False)
"""


def pytest_collection_finish(session):
    """Build DeepSpeed's CPU operators beside the first tests: a minute the first time, cached afterwards.

    The build is never killed, not even when the tests are: it would leave a lock file that later builds wait for.
    """
    wanted = any("deepspeed_ready" in getattr(item, "fixturenames", ()) for item in session.items)
    if HAS_DEEPSPEED and wanted and not session.config.option.collectonly:
        log = open(Path(tempfile.mkdtemp()) / "build.log", "w+")
        command = [sys.executable, "-c", BUILD_OPERATORS]
        # In the runs' own environment: another ninja on the PATH would build everything again, and again.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment())
        session.config.operators = process, log


@pytest.fixture(scope="session")
def deepspeed_ready(request):
    """Ask for this fixture in a test that runs DeepSpeed: it skips or waits as needed."""
    if not HAS_DEEPSPEED:
        pytest.skip("the optional package deepspeed is not installed")
    process, log = request.config.operators
    code = process.wait(timeout=600)
    log.seek(0)
    assert code == 0, f"DeepSpeed's CPU operators do not build here: {log.read()[-2000:]}"


def computes_fp16():
    """Whether DeepSpeed trains in fp16 on this CPU (one with AVX512-FP16 or AMX-FP16); else train.py takes float32."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return bool(CPU_Accelerator().is_fp16_supported())


@pytest.fixture
def needs_fp16(deepspeed_ready):
    if not computes_fp16():
        pytest.skip("DeepSpeed has no fp16 on this CPU")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny random LLaMA with its tokenizer: 234,816 parameters, vocabulary 1,000."""
    from make_tiny_llama import make_tiny_llama

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base):
    import utils

    return utils.load_tokenizer(base, 512)


def render_prompt(record):
    """Alpaca's prompt for a record {instruction, input (optional)}."""
    import utils

    question = {"role": "user", "content": record["instruction"], "input": record.get("input")}
    return utils.spans("alpaca", [question])[0][0]


def make_records(count):
    """Plain records of different lengths, half of them with an input; the same every time."""
    words = ["river", "lamp", "stone", "cloud", "pencil"]
    return [
        {
            "instruction": f"Write {words[i % 5]} {i % 7 + 1} times.",
            "input": f"Number the words from {i}." if i % 2 else "",
            "output": " ".join(f"{words[i % 5]}" for _ in range(i % 7 + 1)) + ".",
        }
        for i in range(count)
    ]


def read_targets(tokenizer, count=70):
    """So many records as (ids, labels), made one by one: the ids of the prompt carry no loss."""
    rows = []
    for record in make_records(count):
        prompt = render_prompt(record)
        ids = tokenizer(prompt + record["output"] + tokenizer.eos_token).input_ids
        head = len(tokenizer(prompt).input_ids)
        rows.append((ids, [-100] * head + ids[head:]))
    return rows


def refusal(words, folder):
    """The words with which train.py refuses options, which are text; fails where it takes them."""
    import train
    from utils import UserError

    with pytest.raises(UserError) as caught:
        train.parse_arguments(["--output_dir", str(folder), "--use_cpu", "True", *words.split()])
    return str(caught.value)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """70 records in a JSON list: they do not divide by the global batch of 8."""
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(make_records(70)), encoding="utf-8")
    return path


def field(pattern, text):
    """The first group of `pattern` in `text`; fails with the text where it is absent."""
    match = re.search(pattern, text)
    assert match, f"{pattern!r} not in:\n{text[-3000:]}"
    return match.group(1)
