"""Fine-tune a causal language model on instruction records, on one device or many; prompts carry no loss.

    python train.py --model_name_or_path BASE --data_path data.json --output_dir OUT --bf16 True
    torchrun --standalone --nproc_per_node=8 train.py ... --fsdp "full_shard auto_wrap"
    torchrun --standalone --nproc_per_node=8 train.py ... --deepspeed ds_config.json
    python train.py --model_name_or_path BASE --data_path data.json --dry_run 3     # look first: loads no weights
    python train.py OUT/run.json --output_dir AGAIN                                 # the same run again

Reads a model folder and JSON or JSON Lines records; writes the tuned model, checkpoints, loss.csv and run.json to OUT.
The same command in the same folder resumes. The method and the public names are those of Stanford Alpaca's train.py.
"""

import array
import ast
import collections
import collections.abc
import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import select
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Literal

import utils

# --- What takes no libraries: the options that there are, and --help -------------------------------------------------

# Spellings of 2023 that today's libraries reject, each with today's words for {value}; "" where nothing corresponds.
RENAMED = (
    "evaluation_strategy eval_strategy, warmup_ratio warmup_steps, no_cuda use_cpu, logging_dir tensorboard_dir, "
    "per_gpu_train_batch_size per_device_train_batch_size, per_gpu_eval_batch_size per_device_eval_batch_size, "
    "torch_dtype dtype, push_to_hub_model_id hub_model_id, push_to_hub_token hub_token, "
    # of alpaca-lora and Axolotl
    "base_model model_name_or_path, micro_batch_size per_device_train_batch_size, num_epochs num_train_epochs, "
    "batch_size gradient_accumulation_steps, cutoff_len model_max_length, sequence_len model_max_length, "
    "optimizer optim, lr_scheduler lr_scheduler_type, wandb_run_name run_name"
)  # today a warm-up below 1 is a share of all steps
GONE = (
    "save_safetensors half_precision_backend fp16_backend fp16_opt_level use_mps_device use_ipex xpu_backend "
    "sharded_ddp jit_mode_eval past_index tpu_num_cores tpu_metrics_debug ray_scope include_tokens_per_second "
    "include_inputs_for_metrics mp_parameters dispatch_batches split_batches lazy_preprocess use_fast_tokenizer "
    "overwrite_cache push_to_hub_organization torchdynamo use_legacy_prediction_loop "
    "add_eos_token prompt_template_name wandb_project wandb_watch wandb_log_model "  # of alpaca-lora
    "adapter base_model_config base_model_ignore_patterns dataset_prepared_path eval_sample_packing flash_attention "
    "is_llama_derived_model load_in_8bit lora_fan_in_fan_out lora_model_dir lora_target_linear model_type "  # of Axolotl
    "pad_to_sequence_len sample_packing sdp_attention special_tokens strict tokenizer_type wandb_entity wandb_run_id "
    "xformers_attention"
)
NOT_HERE = {  # values of these that ask for what is not there
    "load_in_8bit": (("true", "1"), "--load_in_4bit True is"),
    "prompt_template_name": (("alpaca_legacy", "alpaca_short", "vigogne"), "leave it out for Alpaca's two templates"),
}
OLD_OPTIONS = {
    **{old: f"--{new} {{value}}" for old, new in map(str.split, RENAMED.split(", "))},
    "fsdp_transformer_layer_cls_to_wrap": '--fsdp_config {{"transformer_layer_cls_to_wrap": "{value}"}}',
    "fsdp_min_num_params": '--fsdp_config {{"min_num_params": "{value}"}}',
    "group_by_length": "--train_sampling_strategy group_by_length",
    "adafactor": "--optim adafactor",
    **dict.fromkeys(GONE.split(), ""),
}
OLD_VALUES = {"--optim adamw_hf": "--optim adamw_torch", "--debug ": ""}  # of options that are still there


@functools.cache  # asked before the libraries load, and again where the words are parsed
def read_options():
    """{option: its help} for our own and transformers', off the sources: to import them takes seconds."""
    library = Path(importlib.util.find_spec("transformers").origin).with_name("training_args.py")
    options = {}
    for path in (Path(__file__), library):
        for part in ast.parse(path.read_text(encoding="utf-8")).body:
            fields = part.body if isinstance(part, ast.ClassDef) and part.name.endswith("Arguments") else []
            for field in (field for field in fields if isinstance(field, ast.AnnAssign)):
                kind, texts = ast.unparse(field.annotation), [""]
                texts += [node.value for node in ast.walk(field.value) if isinstance(node, ast.Constant)]
                text = max((text for text in texts if isinstance(text, str)), key=len)
                options.setdefault(field.target.id, f"({kind}) {' '.join(text.split())}")
    return options


def answer_early(words):
    """Print the help where it is asked for and end. Raises UserError for options that do not exist."""
    options = read_options()
    if {"-h", "--help"} & set(words):
        if utils.rank():
            raise SystemExit(0)
        print(f"{__doc__}\nOptions, ours first; more about the others under transformers.TrainingArguments:\n")
        for name, text in options.items():
            print(f"  --{name}", textwrap.fill(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8), sep="\n")
        raise SystemExit(0)
    known = {*options, *(f"no_{name}" for name in options), *OLD_OPTIONS, "local_rank"}
    names = [word.split("=")[0] for word in words if re.match(r"--[^ =]*(=|$)", word)]  # others are values
    if unknown := [name for name in names if name[2:].replace("-", "_") not in known]:
        raise utils.unknown_options(unknown, [f"--{name}" for name in options])


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of packages that it can do without
if __name__ == "__main__":
    utils.end_by_ctrl_c()
    utils.run_main(lambda: answer_early(sys.argv[1:]), goes_on=True)

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import LengthGroupedSampler

import engines
from utils import COMPLETE, PROMPT_DICT, UserError, find_checkpoints, first_line, say  # noqa: F401

DEFAULT_PAD_TOKEN, DEFAULT_EOS_TOKEN, DEFAULT_BOS_TOKEN, DEFAULT_UNK_TOKEN = "[PAD]", "</s>", "<s>", "<unk>"
IGNORE_INDEX = -100  # PyTorch's cross entropy leaves these labels out
CHUNK = 1000  # rows a tokenizer call; one call for all would hold every Encoding at once (about 1.2 GB for 52k rows)
Dtype = Literal["float32", "bfloat16", "float16"]
LIBRARY_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, AssertionError)  # about options they do not take
HELD_OUT_SEED = 42  # for all runs, whatever --seed: so that their losses can be compared
MAX_SKIPPED_STEPS = 40  # from a loss scale of 2^32 a healthy fp16 run skips 16

# --- Arguments -------------------------------------------------------------------------------------------------------


def translate_old_options(words):
    """Turn a 2023 command line into today's. `words` is argv without the script's name.

    Returns (words, notices): ["--evaluation-strategy=no"] gives (["--eval_strategy", "no"], ["--evaluation-strategy is
    now --eval_strategy"]).
    """
    groups, result, late, notices = [], [], [], []
    for word in words:  # an option and the words behind it are a group
        groups += [[]] if word.startswith("--") or not groups else []
        groups[-1].append(word)
    pairs = [group[0].split("=", 1) if "=" in group[0] else (group[0], " ".join(group[1:])) for group in groups]
    options = {name.replace("-", "_").replace("__", "--", 1): value for name, value in pairs}
    steps = options.get("--warmup_steps")
    for group, (name, value) in zip(groups, pairs, strict=True):
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        old = name if key in OLD_OPTIONS else f"{name} {value}"
        values, cure = NOT_HERE.get(key, ((), ""))
        if value.lower() in values:
            raise UserError(f"{name} {value} is not there; {cure}")
        value = accumulation_of(value, options) if key == "batch_size" else value
        if key not in OLD_OPTIONS and old not in OLD_VALUES:
            # torch.distributed.launch and deepspeed pass --local_rank; the environment says it too
            result += group if key != "local_rank" else group[1 if "=" in group[0] else 2 :]
        elif key == "warmup_ratio" and steps not in (None, "0", "0.0"):
            notices.append(f"{name} gives way to --warmup_steps {steps}, as it did")
        else:
            today = OLD_OPTIONS[key] if key in OLD_OPTIONS else OLD_VALUES[old]
            is_switch = key in OLD_OPTIONS and "{value}" not in today
            today = "" if is_switch and value.lower() not in ("", "true", "1", "yes", "y", "t") else today
            new = [word for word in today.format(value=value).split(" ", 1) if word]
            (late if key == "warmup_ratio" and steps else result).extend(new)  # 0 steps counted as not given
            shown = " ".join(word for word in new if word != value)
            notices.append(f"{old} is now {shown}" if new else f"{old.strip()} has no meaning any more; ignored")
    return result + late, notices


ALPACA_LORA = "--lora_r 8, --lora_alpha 16, --lora_dropout 0.05, --lora_target_modules q_proj,v_proj"  # its defaults


def accumulation_of(batch_size, options):
    """alpaca-lora's global --batch_size in micro-batches a process; `options` are {"--name": its value}."""
    names = ("--micro_batch_size", "--per_device_train_batch_size")
    micro = next((options[name] for name in names if name in options), "8")
    for name, value in (("--batch_size", batch_size), ("--micro_batch_size", micro)):
        if not value.isdecimal() or not int(value):
            raise UserError(f"{name} {value}: it must be a number of at least 1")
    at_once = int(micro) * int(os.environ.get("WORLD_SIZE", 1))
    if int(batch_size) % at_once:
        raise UserError(f"--batch_size {batch_size}: it is no multiple of micro-batch x processes, {at_once}")
    return str(int(batch_size) // at_once)


def words_of_file(path):
    """The command line that a YAML or JSON file {option: value} stands for, with Axolotl's `datasets`; null is unset."""
    if path.suffix == ".json":
        options = utils.read_json(path)
    else:
        import yaml

        try:
            options = yaml.safe_load(utils.read_text(path))
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(options, dict):
        raise UserError(f"{path}: it should hold options, as learning_rate: 2e-5")
    words, ignored = [], []
    for key, value in options.items():
        if key == "datasets":
            for one in value if isinstance(value, list) else [value]:
                if not isinstance(one, dict) or "path" not in one or str(one.get("type", "alpaca")) != "alpaca":
                    raise UserError(f"{path}: datasets: {json.dumps(one)[:80]}: expected {{path, type: alpaca}}")
                words += ["--data_path", str(one["path"])]
                ignored += [f"datasets.{key}" for key in one if key not in ("path", "type")]
        elif OLD_OPTIONS.get(key) == "" and key not in NOT_HERE and value is not None:
            ignored.append(key)
        elif value is not None:
            key = {"base_model": "model_name_or_path"}.get(key, key)
            items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{key}", *map(str, items)]
    if ignored:
        say(f"{path}: without meaning here, ignored: {', '.join(ignored)}")
    return words


# LLaMAs to be trained from random weights; baby_llama2 is the first model of baby-llama2-chinese, 135m is SmolLM2's shape.
PRESETS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    "baby_llama2": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
                    "max_position_embeddings": 256},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "tie_word_embeddings": True},
}  # fmt: skip


def option(default, text, **more):
    """A field of a dataclass of arguments, with its help."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass
class ModelArguments:
    model_name_or_path: str | None = option("facebook/opt-125m", "Model folder, or a name on the hub.")
    dtype: Dtype | None = option(None, "Dtype of the weights: float32; of LoRA's frozen ones what the run computes in.")
    config_name: str | None = option(None, "Start from random weights: a config.json, or tiny, baby_llama2 or 135m.")
    tokenizer_name: str | None = option(None, "With --config_name: the folder of the tokenizer.")


@dataclasses.dataclass
class DataArguments:
    data_path: list[str] | None = option(None, "Files of records (.json, .jsonl, .csv, .tsv, .parquet, .gz), folders of "
        "them, data sets of the hub (org/name, or org/name:split); given again, it adds.", action="extend")  # fmt: skip
    eval_data_path: list[str] | None = option(None, "The same for records to evaluate on.", action="extend")
    val_set_size: float = option(0, "Records held out to evaluate on: a number, or a share below 1.")
    columns: str | None = option(None, "Other names of a record's keys, as instruction=question,output=answer.")
    prompt_style: str | None = option(None, "alpaca, vicuna_v0, vicuna_v1.1, llama2 or chat_template; by default alpaca "
        "for Alpaca's records, vicuna_v1.1 for conversations.")  # fmt: skip
    train_on_inputs: bool = option(False, "Train the prompts too, which alpaca-lora did and Stanford Alpaca did not.")
    skip_bad_records: bool = option(False, "Drop and count records that cannot be read instead of refusing the data.")

    def __post_init__(self):
        if self.prompt_style not in (None, *utils.PROMPT_STYLES):
            raise UserError(f"--prompt_style {self.prompt_style}: choose from {', '.join(utils.PROMPT_STYLES)}")
        utils.columns_of(self.columns)


@dataclasses.dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str | None = option(None, "Where the hub's files are cached.")
    model_max_length: int = option(512, "Window in tokens; longer rows are cut on the right and counted.")
    pad_token: Literal["keep", "add"] = option("keep", "add: a row for [PAD] is added, as Stanford Alpaca did.")
    padded: bool = option(False, "Pad micro-batches on the right instead of flattening them.")
    lora_r: int = option(0, "Rank of LoRA adapters, which alone are trained; 0: all weights are.")
    lora_alpha: float = option(16, "What adapters add is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Share of an adapter's inputs that is dropped.")
    lora_target_modules: list[str] | None = option(None, "Names of the layers adapted; by default all linear ones.")
    lora_modules_to_save: list[str] | None = option(None, "Modules trained whole, such as embed_tokens,lm_head.")
    trained_modules: list[str] | None = option(None, "Train these alone, as embed_tokens,lm_head; without LoRA.")
    load_in_4bit: bool = option(False, "QLoRA: the frozen weights in 4 bits (NF4), by bitsandbytes.")
    early_stopping_patience: int = option(0, "Stop after so many evaluations without a better one; 0: never.")
    attn_implementation: str | None = option(None, "One of transformers'; by default each example by itself.")
    save_dtype: Dtype | None = option(None, "Dtype of the final model's files; by default what the run computes in.")
    save_rehearsal: bool = option(True, "Save, check and remove the model before step 1.")
    memory_check: bool = option(True, "Compare what the run needs with what there is.")
    overwrite_output_dir: bool = option(False, "Start afresh in a folder of ours; deletes only what a run wrote.")
    resume_anyway: bool = option(False, "Resume although settings of the run have changed.")
    dry_run: int = option(0, "Check the data, show this many examples and stop; no weights.")
    tensorboard_dir: str | None = option(None, "Where --report_to tensorboard writes.")
    logging_steps: float = option(1, "Print a line every so many steps (off a terminal).")
    ddp_timeout: int = option(900, "Seconds after which a process that does not answer counts as lost.")

    def __post_init__(self):
        """Check the numbers, then fit everything to this machine: here, and in what is called here of engines.py."""
        if self.fp16 and self.bf16:
            raise UserError("--fp16 and --bf16 are both set; keep one of them")
        least = {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "model_max_length": 1,
            "seed": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {bound}")
        for name in ("lora_target_modules", "lora_modules_to_save", "trained_modules"):
            # q_proj,v_proj or '[q_proj,v_proj]'
            setattr(self, name, re.findall(r"[^\s,'\"\[\]]+", " ".join(getattr(self, name) or [])))
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs:g} trains nothing; it must be more than 0")
        engines.fit_device(self)
        engines.check_launcher(self)
        if self.fsdp:
            engines.configure_fsdp(self)
        if self.deepspeed:
            engines.configure_deepspeed(self)
        if self.gradient_checkpointing and not self.gradient_checkpointing_kwargs:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if str(self.save_strategy).lower().endswith("best"):
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if str(self.eval_strategy).lower().endswith("steps") and not self.eval_steps:
            self.eval_steps = 0.1
            say("--eval_steps 0.1: ten evaluations in all")
        if self.tensorboard_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.tensorboard_dir
        self.disable_tqdm = True  # there is a line of progress
        self.logging_nan_inf_filter = self.remove_unused_columns = False  # no NaN as 0.0; rows carry their number
        super().__post_init__()
        engines.configure_groups(self)


def parse_arguments(words):
    """Parse argv without the script's name. Returns (model_args, data_args, training_args, given).

    `given` is what differs from the defaults, as run.json keeps it. A first word that is a run.json brings its own.
    """
    classes = (ModelArguments, DataArguments, TrainingArguments)
    is_file = words and words[0].endswith((".yml", ".yaml", ".json"))
    if is_file and (words[0].endswith("ml") or "arguments" not in utils.read_json(words[0])):
        words = words_of_file(Path(words[0])) + words[1:]
    answer_early(words)
    names = {word.split("=")[0].replace("-", "_") for word in words}
    if "__base_model" in names:
        absent = [pair for pair in ALPACA_LORA.split(", ") if pair.split()[0].replace("-", "_") not in names]
        say(f"--base_model: as alpaca-lora does {' '.join(absent)}; unlike it, prompts are not trained")
        words = words + " ".join(absent).split()
    parser = transformers.HfArgumentParser(classes, prog="train.py", allow_abbrev=False)
    words, notices = translate_old_options(words)
    for notice in notices:
        say(notice)
    saved = {}
    if words and words[0].endswith(".json"):
        path = Path(words.pop(0))
        run = utils.read_run(path.parent) if path.name == "run.json" else None
        if run is None:
            raise UserError(
                f"{path}: not the run.json of an earlier run; options stand in YAML or JSON as {{name: value}}"
            )
        saved = run["arguments"]
    if sum(word.split("=")[0] == "--fsdp_config" for word in words) > 1:
        raise UserError("--fsdp_config is given twice; put transformer_layer_cls_to_wrap into its JSON")
    parser.set_defaults(**{key: value for key, value in saved.items() if not key.endswith("data_path")})
    namespace = utils.parse_options(parser, words)
    for key in ("data_path", "eval_data_path"):
        setattr(namespace, key, getattr(namespace, key) or saved.get(key))
    blank = transformers.HfArgumentParser(classes).parse_args([])
    given = {name: value for name, value in vars(namespace).items() if value != getattr(blank, name)}
    plan_evaluation(namespace)
    try:
        model_args, data_args, args = parser.parse_dict(vars(namespace))
    except (ValueError, ImportError) as error:  # what transformers refuses, in its own words
        raise UserError(" ".join(str(error).split())) from None
    except torch.distributed.DistError as error:
        hint = f"if port {os.environ.get('MASTER_PORT')} is in use, choose another with --master_port"
        raise UserError(f"the processes cannot meet ({first_line(error)}); {hint}") from None
    if "per_device_eval_batch_size" not in given:
        args.per_device_eval_batch_size = args.per_device_train_batch_size
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    model_args.dtype = model_args.dtype or (compute if args.lora_r else "float32")
    refuse_options(args)
    refuse_start(model_args, args, given)
    if args.lora_r:
        engines.check_adapter_options(args, model_args.dtype)
    elif unused := [f"--{name}" for name in given if name.startswith("lora_")]:
        say(f"{', '.join(unused)}: without --lora_r, which turns LoRA on; ignored")
    return model_args, data_args, args, given


def refuse_start(model_args, args, given):
    """Refuse options about random weights that do not go together."""
    is_new, words = model_args.config_name, "random weights have nothing that LoRA or 4 bits could keep; leave it out"
    utils.refuse_all({
        f"--config_name: {words}": is_new and (args.lora_r or args.load_in_4bit),
        "--config_name: give --tokenizer_name FOLDER too": is_new and not model_args.tokenizer_name,
        "--tokenizer_name: a model brings its own tokenizer; it goes with --config_name": (
            model_args.tokenizer_name and not is_new
        ),
        "--model_name_or_path: --config_name starts from random weights; give one of them": (
            is_new and "model_name_or_path" in given
        ),
    })  # fmt: skip


def plan_evaluation(options):
    """Choose when to evaluate where that is not said; refuse what needs data that is not given. Changes `options`."""
    no_data = "there is no data to evaluate on; give --val_set_size 0.02 or --eval_data_path FILE"
    has_none, metric = not (options.eval_data_path or options.val_set_size), options.metric_for_best_model
    wrong = {
        f"--eval_strategy: {no_data}": has_none and options.eval_strategy != "no",
        f"--save_strategy best: {no_data}": has_none and options.save_strategy == "best",
        f"--load_best_model_at_end: {no_data}": has_none and options.load_best_model_at_end,
        f"--early_stopping_patience: {no_data}": has_none and options.early_stopping_patience,
        "--val_set_size and --eval_data_path: give one of them": options.eval_data_path and options.val_set_size,
        f"--val_set_size {options.val_set_size:g}: it must be at least 0": options.val_set_size < 0,
        f"--metric_for_best_model {metric}: there is the loss only": metric not in (None, "loss", "eval_loss"),
        "--greater_is_better: the lower loss is": options.greater_is_better,
    }
    utils.refuse_all(wrong)
    if not has_none and options.eval_strategy == "no":
        is_by_steps = options.eval_steps or (options.load_best_model_at_end and options.save_strategy == "steps")
        options.eval_strategy = "steps" if is_by_steps else "epoch"
        options.eval_steps = options.eval_steps or (options.save_steps if is_by_steps else None)
        say(f"--eval_strategy {options.eval_strategy}: there is data to evaluate on")


def refuse_options(args):
    """Refuse options of the library that would do nothing here, or something else than the engine line says."""
    accumulation = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None)
    upload = "it would upload checkpoints and not the final model; leave it out, and when the run has ended: hf upload"
    wrong = {
        f"--push_to_hub: {upload} NAME {args.output_dir}": args.push_to_hub,
        "--auto_find_batch_size: it would change the batch in mid-run; give a --per_device_train_batch_size that fits, "
        "and --gradient_accumulation_steps": args.auto_find_batch_size,
        "--torch_compile: several processes train what is compiled without DDP or FSDP around it; leave it out": (
            args.torch_compile and args.world_size > 1
        ),
        "--trained_modules: LoRA has --lora_modules_to_save for that": args.trained_modules and args.lora_r,
        "--load_in_4bit: weights in 4 bits cannot be trained; give --lora_r 16 too": args.load_in_4bit
        and not args.lora_r,
        f"--accelerator_config: gradient_accumulation_kwargs {accumulation} would change what a step is; give "
        "--gradient_accumulation_steps": accumulation,
    }
    utils.refuse_all(wrong)


# --- Records to rows, rows to micro-batches --------------------------------------------------------------------------


def encode_by_offsets(conversations, tokenizer, begin):
    """The rows of `encode` for conversations of many spans, each text tokenized once.

    A token is trained where all its characters are a trained span's. `ends` are the places behind the trained spans.
    """
    texts, rows = ["".join(text for text, _ in spans) for spans in conversations], []
    for spans, encoding in zip(
        conversations, tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ):
        input_ids = torch.tensor(begin + encoding.ids, dtype=torch.long)
        labels, position, straddling, ends = torch.full_like(input_ids, IGNORE_INDEX), 0, 0, []
        for text, trained in spans:
            start, stop = position, position + len(text)
            position = stop
            if trained:
                first, last = encoding.char_to_token(start), len(encoding.ids)
                if first is not None and encoding.token_to_chars(first)[0] < start:
                    first, straddling = first + 1, straddling + 1
                behind = None if stop == len(texts[len(rows)]) else encoding.char_to_token(stop)
                if behind is not None:
                    is_end = (
                        encoding.ids[behind] == tokenizer.eos_token_id and encoding.token_to_chars(behind)[0] < stop
                    )
                    last, straddles = behind + is_end, encoding.token_to_chars(behind)[0] < stop and not is_end
                    straddling += straddles  # an end token may take the line break behind it
                if first is not None:
                    places = slice(len(begin) + first, len(begin) + last)
                    labels[places] = input_ids[places]
                    ends.append(places.stop)
        rows.append({"input_ids": input_ids, "labels": labels, "straddling": bool(straddling), "ends": ends})
    return rows


def encode(conversations, tokenizer, begin=None):
    """Tokenize conversations, each a list of spans (text, trained) that is one text, and mask what is not trained.

    Span i ends behind len(tokenize(text up to its end)) ids of tokenize(the whole text): with two spans the rule of
    Stanford Alpaca. A token that straddles a border, which `straddling` tells, counts as part of the span before it;
    in conversations of more spans, see `encode_by_offsets`, it is masked. Of what the tokenizer adds itself only the
    begin token is in a row, or the ids `begin`. Returns a list of rows {input_ids, labels: LongTensor (length,),
    straddling: bool}, not cut.
    """
    own, library = type(tokenizer), transformers.PreTrainedTokenizerFast
    steps = ("__call__", "_encode_plus", "_convert_encoding")  # a fork may have a step of its own
    is_plain = all(getattr(own, step, None) is getattr(library, step) for step in steps)
    rows, begin = [], utils.begin_ids(tokenizer) if begin is None else begin
    # A processor that trims offsets leaves spaces without a token: then as for other classes.
    trims = (
        is_plain
        and b'"trim_offsets":true' in getattr(tokenizer.backend_tokenizer.post_processor, "__getstate__", bytes)()
    )
    if is_plain and not trims and any(len(spans) > 2 for spans in conversations):
        many = [i for i, spans in enumerate(conversations) if len(spans) > 2]
        few = [i for i, spans in enumerate(conversations) if len(spans) <= 2]
        rows = [None] * len(conversations)
        for start in range(0, len(many), CHUNK):
            some = many[start : start + CHUNK]
            found = encode_by_offsets([conversations[i] for i in some], tokenizer, begin)
            for i, row in zip(some, found, strict=True):
                rows[i] = row
        for i, row in zip(few, encode([conversations[i] for i in few], tokenizer, begin), strict=True):
            rows[i] = row
        return rows
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    for start in range(0, len(conversations), CHUNK):
        # The text up to each border, the whole of it last: [["Below ...:", "Below ...:Hello.</s>"], ...]
        texts = [list(itertools.accumulate(text for text, _ in c)) for c in conversations[start : start + CHUNK]]
        flat = list(itertools.chain.from_iterable(texts))
        if is_plain:  # the Rust half without offsets: half the time. begin_ids' call has ended truncation and padding.
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False)
            ids = iter([begin + encoding.ids for encoding in encodings])
        else:
            ids = iter([begin + one for one in tokenizer(flat, **options).input_ids])
        for spans, upto in zip(conversations[start : start + CHUNK], texts, strict=True):
            *heads, whole = itertools.islice(ids, len(upto))
            input_ids = torch.tensor(whole, dtype=torch.long)
            labels, first, ends = input_ids.clone(), 0, []
            for (_, trained), last in zip(spans, [*map(len, heads), len(whole)], strict=True):
                if not trained:
                    labels[first:last] = IGNORE_INDEX
                else:
                    ends.append(last)
                first = last
            straddling = any(whole[: len(head)] != head for head in heads)
            rows.append({"input_ids": input_ids, "labels": labels, "straddling": straddling})
            if len(spans) > 2:
                rows[-1]["ends"] = ends
    return rows


def compare_ids(names, conversations, rows, tokenizer, model_path, begin=None):
    """Raise UserError where a row of `encode` has other ids than the SentencePiece model at `model_path` gives it.

    Looks at 1,000 rows or more, evenly spread, of those without special tokens: SentencePiece knows none inside a text.
    """
    added, size = tokenizer.added_tokens_decoder.items(), tokenizer.vocab_size
    special = [str(token) for i, token in added if token.special or i >= size]
    texts = ["".join(text for text, _ in spans).removesuffix(tokenizer.eos_token) for spans in conversations]
    plain = [i for i, text in enumerate(texts) if not any(token in text for token in special)]
    sample, head = plain[:: max(len(plain) // 1000, 1)], len(utils.begin_ids(tokenizer) if begin is None else begin)
    for i, ids in zip(sample, utils.sentencepiece_ids(model_path, [texts[i] for i in sample]), strict=True):
        if ids != (found := rows[i]["input_ids"].tolist()[head:-1]):
            at = max(len(os.path.commonprefix([ids, found])) - 2, 0)
            where = f"{names[i]}: {tokenizer.decode(ids[at : at + 6])!r} has other ids than {model_path} gives it"
            raise UserError(f"{where}; move tokenizer.json away from there, or leave the record out")


def cut(rows, window):
    """Cut rows of `encode` at `window` tokens, on the right. Returns (rows, what became of each).

    A row is "kept" whole, "truncated", or "dropped" where nothing of it is trained: [1, 5, 6, 2] with the labels
    [-100, -100, 6, 2] is truncated by a window of 3 and dropped by one of 2. A conversation of several turns is cut
    behind its last turn that fits whole.
    """
    results, outcomes = [], []
    for row in rows:
        is_long = len(row["input_ids"]) > window
        last = max([end for end in row["ends"] if end <= window], default=0) if "ends" in row else window
        results.append(row | {key: row[key][:last].clone() for key in ("input_ids", "labels")} if is_long else row)
        is_trained = bool((results[-1]["labels"] != IGNORE_INDEX).any())
        outcomes.append(("truncated" if is_long else "kept") if is_trained else "dropped")
    return results, outcomes


def windows(row, window):
    """A text's row of `encode` as rows of up to `window` tokens; each begins with the last token of the one before it."""
    starts = range(0, max(len(row["input_ids"]) - 1, 1), max(window - 1, 1))
    keys = ("input_ids", "labels")
    return [row | {key: row[key][start : start + window].clone() for key in keys} for start in starts]


def preprocess(sources, targets, tokenizer):
    """`encode` and `cut` by Stanford Alpaca's name: {input_ids, labels: [LongTensor (length,)], straddling: [bool]}."""
    pairs = [[(source, False), (target, True)] for source, target in zip(sources, targets, strict=True)]
    rows, _ = cut(encode(pairs, tokenizer), tokenizer.model_max_length)
    return {key: [row[key] for row in rows] for key in ("input_ids", "labels", "straddling")}


class SupervisedDataset(torch.utils.data.Dataset):
    """The records of one or more files as masked tensors; every record is kept, or dropped and counted in `report`.

    Items are {input_ids, labels}, LongTensors (length,); `sources[i]` names the record of item i. Raises UserError for
    data that cannot be read or holds nothing to train on.
    """

    def __init__(
        self, data_path, tokenizer, skip_bad_records=False, sentencepiece_path=None, train_all=False, style=None,
        columns=None,
    ):  # fmt: skip
        super().__init__()
        if not data_path:
            raise UserError("--data_path is missing: name one or more files of records")
        paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
        records, problems, unused = [], [], {}
        for path in paths:
            found, wrong = utils.read_records([path], columns=columns)
            if not found:
                why = f"no record of {len(wrong)} can be used: {wrong[0]}" if wrong else "the list is empty"
                raise UserError(f"{path}: {why}; it should hold records {{instruction, input (optional), output}}")
            records += found
            problems += wrong
            if keys := utils.unused_keys(found):
                unused[str(path)] = keys
        count = len(records) + len(problems)
        records, conversations, styles, wrong = render(records, tokenizer, style)
        problems += wrong
        if problems and not skip_bad_records:
            shown = "; ".join(problems[:3] + ["..."] * (len(problems) > 3))
            cure = "mend them, or drop and count them with --skip_bad_records True"
            raise UserError(f"{len(problems)} of {count} records cannot be used: {shown}; {cure}")
        if not records:
            raise UserError(f"{', '.join(map(str, paths))}: no record can be used: {problems[0]}")
        self.style = collections.Counter(styles).most_common(1)[0][0]  # which chat.py is to talk in
        asked = sum(sum(m["role"] in ("assistant", "text") for m in record["messages"]) for record in records)
        written = sum(trained for spans in conversations for _, trained in spans)
        begin = [] if style == "chat_template" else None  # a template has its own
        rows, name = encode(conversations, tokenizer, begin), [record["source"] for record in records]
        if sentencepiece_path:
            compare_ids(name, conversations, rows, tokenizer, sentencepiece_path, begin)
        for row, record in zip(rows, records, strict=True):
            kind = utils.kind_of(record["messages"])
            if kind == "conversation":  # is cut at a turn, be it the only one
                row.setdefault("ends", [len(row["input_ids"])])
            elif kind == "text" and begin == []:
                head = torch.tensor(utils.begin_ids(tokenizer), dtype=torch.long)
                row |= {key: torch.cat([head, row[key]]) for key in ("input_ids", "labels")}
            if train_all:
                row |= {"labels": row["input_ids"].clone(), "straddling": False}
        window = tokenizer.model_max_length
        parts = {i: windows(rows[i], window) for i, r in enumerate(records) if utils.kind_of(r["messages"]) == "text"}
        rows, outcomes = cut([parts[i][-1] if i in parts else row for i, row in enumerate(rows)], window)
        kept = [i for i, outcome in enumerate(outcomes) if outcome != "dropped"]
        self.report = {"read": count, "kept": len(kept), "unreadable": problems, "unused": unused}
        self.report |= report_of(records, rows, outcomes, kept, tokenizer, styles)
        trained = turns_of(rows, kept)
        self.report["turns"] = {"in all": asked, "trained": trained, "left out by the template": asked - written}
        self.report["turns"]["cut off"] = written - trained
        for line in account(self.report, window):
            say(line)
        if not kept:
            what = f"{', '.join(map(str, paths))}: nothing to train on, none of {count} records is left"
            raise UserError(f"{what}; see the counts above, or raise --model_max_length")
        items = [(row, name[i]) for i in kept for row in parts.get(i, [rows[i]])]
        self.input_ids, self.labels = ([row[key] for row, _ in items] for key in ("input_ids", "labels"))
        self.sources, self.end_id = [source for _, source in items], tokenizer.eos_token_id

    def rows(self, multiple):
        """The items with `source` and their number `row`, filled to a multiple with rows of one token and no target.

        So each record is met once an epoch on every engine.
        """
        filler = (torch.tensor([self.end_id]), torch.tensor([IGNORE_INDEX]), "")
        rows = [*zip(self.input_ids, self.labels, self.sources, strict=True), *[filler] * (-len(self) % multiple)]
        return [{"input_ids": i, "labels": j, "source": name, "row": n} for n, (i, j, name) in enumerate(rows)]

    def longest(self):
        """Tokens of the longest item."""
        return max(map(len, self.input_ids))

    def part(self, chosen):
        """The same with the items of these numbers alone."""
        part = copy.copy(self)
        for name in ("input_ids", "labels", "sources"):
            setattr(part, name, [getattr(self, name)[i] for i in chosen])
        return part

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return {"input_ids": self.input_ids[i], "labels": self.labels[i]}


def report_of(records, rows, outcomes, kept, tokenizer, styles):
    """What a `SupervisedDataset.report` says of rows that were read and cut; `kept` are the numbers of those kept."""
    name, special = [record["source"] for record in records], [token for token in tokenizer.all_special_tokens if token]
    said = [[text for m in records[i]["messages"] for text in (m["content"], m.get("input") or "")] for i in kept]
    return {
        "prompt_fills_window": [name[i] for i, o in enumerate(outcomes) if o == "dropped" and "ends" not in rows[i]],
        "no_turn_fits": [name[i] for i, o in enumerate(outcomes) if o == "dropped" and "ends" in rows[i]],
        "truncated": [name[i] for i, outcome in enumerate(outcomes) if outcome == "truncated"],
        "straddling": [name[i] for i in kept if rows[i]["straddling"]],
        "empty_output": [
            name[i]
            for i in kept
            if not (records[i]["messages"][-1]["content"] or "tool_calls" in records[i]["messages"][-1])
        ],
        "special_tokens": [
            name[i] for i, texts in zip(kept, said, strict=True) if any(token in t for t in texts for token in special)
        ],
        "end_token_trained": sum(
            int(rows[i]["labels"][-1]) == tokenizer.eos_token_id
            or (styles[i] == "vicuna_v0" and ("ends" in rows[i] or outcomes[i] == "kept"))  # whose turns end with ###
            for i in kept
        ),
        "kinds": dict(collections.Counter(utils.kind_of(record["messages"]) for record in records)),
    }


def turns_of(rows, kept):
    """How many turns of the rows that are kept are trained: a row without `ends` has one."""
    return sum(end <= len(rows[i]["labels"]) for i in kept for end in rows[i].get("ends", [1]))


def render(records, tokenizer, style=None):
    """The conversations of records as spans: (records, their spans, their styles, problems of others as text).

    `style` is for all; without it Alpaca's records are in Alpaca's, conversations in Vicuna v1.1's.
    """
    kept, conversations, styles, problems = [], [], [], []
    for record in records:
        is_conversation = utils.kind_of(record["messages"]) == "conversation"
        chosen = style or ("vicuna_v1.1" if is_conversation else "alpaca")
        try:
            if (
                chosen == "alpaca"
                and is_conversation
                and [m["role"] for m in record["messages"]] != ["user", "assistant"]
            ):
                raise ValueError(utils.NO_PLACE)
            conversations.append(utils.spans(chosen, record["messages"], tokenizer))
            kept.append(record)
            styles.append(chosen)
        except ValueError as error:
            problems.append(f"{record['source']}: {error}")
    return kept, conversations, styles, problems


# --- Plain text: files of tokens, of which rows are parts ------------------------------------------------------------

TEXT_BATCH = 4_000_000  # characters tokenized at once: 150 MB of Encodings
TOKENS = "tokens.bin"


def write_tokens(paths, tokenizer, dtype, folder, skip_bad_records):
    """Write the ids of all texts, each with the end id behind it, as one flat file, and where each text ends beside it.

    Raises UserError for what is no text.
    """
    ends, problems, counts, own = array.array("q"), [], [], tokenizer.all_special_ids
    odd, total = 0, 0
    with open(folder / TOKENS, "wb") as file:
        for path in paths:
            texts = (text for _, text in utils.texts_of(path, problems))
            before, size = len(ends), 0
            for batch in batched(texts, TEXT_BATCH):
                size += sum(map(len, batch))
                for row in encode([[(text, True)] for text in batch], tokenizer, []):
                    ids = np.append(row["input_ids"].numpy(), tokenizer.eos_token_id)
                    odd += int(np.isin(ids[:-1], own).any())
                    if ids.max() > np.iinfo(dtype).max:
                        raise UserError(
                            f"{path}: id {ids.max()} is no row of the model; give the model's own tokenizer"
                        )
                    ids.astype(dtype).tofile(file)
                    total += len(ids)
                    ends.append(total)
            counts.append([os.path.basename(path), len(ends) - before, size])
    if problems and not skip_bad_records:
        what = f"{len(problems)} of {len(problems) + len(ends)} records are no texts: {'; '.join(problems[:3])}"
        raise UserError(f"{what}; mend them, or drop and count them with --skip_bad_records True")
    if not ends:
        raise UserError(f"{', '.join(map(str, paths))}: no text in it")
    np.save(folder / "ends.npy", np.frombuffer(ends, np.int64))
    about = {"made_by": "cria", "files": counts, "tokens": total, "dropped": problems, "special": odd}
    utils.write_json(about | {"dtype": np.dtype(dtype).name}, folder / "about.json")


def batched(texts, size):
    """Lists of texts of about so many characters."""
    batch, count = [], 0
    for text in texts:
        batch.append(text)
        if (count := count + len(text)) >= size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def tokens_of_texts(paths, tokenizer, dtype, cache_dir, skip_bad_records):
    """The token file of texts, made once for the same texts and tokenizer: (its tokens as a map, ends, about).

    One process of a machine makes it; the others wait for its name.
    """
    tokens = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    facts = [
        *map(hash_of, paths),
        *map(os.path.basename, paths),
        tokens,
        tokenizer.eos_token_id,
        np.dtype(dtype).name,
        skip_bad_records,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    cache = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cria", "tokens")
    folder, hidden = cache / key, cache / f".{key}.{socket.gethostname()}"
    while not folder.exists():  # no collective: its patience would end before a large corpus does
        lock = None
        with contextlib.suppress(UserError):  # another run makes it
            lock = utils.claim_folder(hidden) if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None
        if lock and not folder.exists():
            with lock, utils.hidden_folder(hidden, folder):
                write_tokens(paths, tokenizer, dtype, hidden, skip_bad_records)
        time.sleep(0 if folder.exists() else 0.2)
    say(f"data: tokens of the texts: {folder}")
    ends, about = np.load(folder / "ends.npy"), utils.read_json(folder / "about.json")
    tokens = np.memmap(folder / TOKENS, dtype, "r")
    if len(tokens) != about["tokens"] or ends[-1] != len(tokens):
        what = f"{len(tokens):,} tokens, where its index has {int(ends[-1]):,}"
        raise UserError(f"{folder}: {what}; remove the folder, it is made anew")
    return tokens, ends, about


def tokens_of_bin(path, dtype, tokenizer):
    """A flat token file made elsewhere, as baby-llama2's: (its tokens as a map, ends); see `tokens_of_texts`.

    Raises UserError where it cannot be of this tokenizer.
    """
    if not (size := os.path.getsize(path)) or size % np.dtype(dtype).itemsize:
        raise UserError(f"{path}: {size} bytes are no whole number of {np.dtype(dtype).name} ids")
    tokens = np.memmap(path, dtype, "r")
    parts = range(0, len(tokens), 2**24)
    found = [np.flatnonzero(tokens[start : start + 2**24] == tokenizer.eos_token_id) + start + 1 for start in parts]
    if not len(ends := np.concatenate(found)):
        what = f"the end id {tokenizer.eos_token_id} of the tokenizer does not occur in it"
        raise UserError(f"{path}: {what}; give the model whose tokenizer wrote it")
    return tokens, ends if ends[-1] == len(tokens) else np.append(ends, len(tokens))


def row_bounds(ends, window):
    """[(start, stop), ...]: the rows of a token file, given where its texts end.

    A row has up to `window` tokens. Where it breaks a text off, the next begins with the row's last token, so that each
    token but the first of a text is a target once.
    """
    total, start, bounds = int(ends[-1]), 0, array.array("q")
    while start < total:
        stop = min(start + window, total)
        bounds.extend((start, stop))
        start = stop if ends[np.searchsorted(ends, stop)] == stop else stop - 1
    return np.frombuffer(bounds, np.int64).reshape(-1, 2)


class Parts(collections.abc.Sequence):
    """Rows of token files as LongTensors (length,), read when they are asked for; with `masked` as labels.

    `files` are (tokens, ends), `bounds` (rows, 3) the file, the start and the stop of each row.
    """

    def __init__(self, files, bounds, masked=False):
        self.files, self.bounds, self.masked = files, bounds, masked

    def __len__(self):
        return len(self.bounds)

    def lengths(self, i):
        """Of the parts of texts in row i, in tokens."""
        number, start, stop = self.bounds[i].tolist()
        ends = self.files[number][1]
        inner = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop)]
        return np.diff([start, *inner, stop]).tolist()

    def __getitem__(self, i):
        number, start, stop = self.bounds[i].tolist()
        row = torch.from_numpy(self.files[number][0][start:stop].astype(np.int64))
        if self.masked:  # the first token of each text has nothing before it
            row[[0, *itertools.accumulate(self.lengths(i)[:-1])]] = IGNORE_INDEX
        return row


class TextDataset(torch.utils.data.Dataset):
    """Plain texts as rows of whole windows, in the attributes of a `SupervisedDataset`: `input_ids` and `labels` are `Parts`.

    All tokens but the first of a text are targets, each once; texts in a row do not see each other. Raises UserError for
    data that cannot be read.
    """

    def __init__(self, paths, tokenizer, vocab_size, cache_dir=None, skip_bad_records=False):
        window, dtype = tokenizer.model_max_length, np.uint16 if vocab_size <= 2**16 else np.uint32
        if window < 2:
            raise UserError(f"--model_max_length {window}: a row of text needs two tokens")
        texts, self.end_id, self.style = (
            [p for p in paths if not str(p).endswith(".bin")],
            tokenizer.eos_token_id,
            "alpaca",
        )
        files, names, dropped = [], [], []
        if texts:
            tokens, ends, about = tokens_of_texts(texts, tokenizer, dtype, cache_dir, skip_bad_records)
            files, dropped = [(tokens, ends)], about["dropped"]
            names = [[name, count] for name, count, _ in about["files"]]
            for name, count, size in about["files"]:
                say(f"data: {name}: {count:,} texts, {size:,} characters")
            if about["special"]:
                say(f"warning: special tokens such as {tokenizer.eos_token} stand in {about['special']:,} texts")
        for path in (p for p in paths if str(p).endswith(".bin")):
            files.append(tokens_of_bin(path, dtype, tokenizer))
            names.append([os.path.basename(path), len(files[-1][1])])
        for tokens, _ in files:
            largest = max(int(tokens[start : start + 2**24].max()) for start in range(0, len(tokens), 2**24))
            if largest >= vocab_size:
                what = f"id {largest}, where the model's vocabulary has {vocab_size}"
                raise UserError(f"{', '.join(map(str, paths))}: {what}; give the model whose tokenizer wrote it")
        bounds = [row_bounds(ends, window) for _, ends in files]
        bounds = np.concatenate([np.insert(rows, 0, number, 1) for number, rows in enumerate(bounds)])
        self.names, self.input_ids, self.labels = names, Parts(files, bounds), Parts(files, bounds, masked=True)
        total, count = sum(len(tokens) for tokens, _ in files), sum(len(ends) for _, ends in files)
        self.report = {"read": count + len(dropped), "kept": count, "unreadable": dropped, "tokens": total}
        self.report |= {"rows": len(bounds), "targets": total - count}
        say(f"data: {count:,} texts kept + {len(dropped):,} dropped = {count + len(dropped):,} read")
        say(f"data: {total:,} tokens in {len(bounds):,} rows of up to {window}; all but each text's first are trained")

    @property
    def sources(self):
        """The text in which each row begins, by file and number."""
        return [self.source(i) for i in range(len(self))]

    def source(self, i):
        number, start, _ = self.input_ids.bounds[i].tolist()
        text = sum(len(ends) for _, ends in self.input_ids.files[:number])
        text += int(np.searchsorted(self.input_ids.files[number][1], start, "right"))
        for name, count in self.names:
            if text < count:
                return f"{name}, text {text + 1}"
            text -= count
        raise IndexError(i)

    def longest(self):
        """Tokens of the longest row."""
        return int((self.input_ids.bounds[:, 2] - self.input_ids.bounds[:, 1]).max())

    def part(self, chosen):
        """The same with the rows of these numbers alone."""
        part, bounds = copy.copy(self), self.input_ids.bounds[chosen]
        part.input_ids, part.labels = (Parts(one.files, bounds, one.masked) for one in (self.input_ids, self.labels))
        return part

    def rows(self, multiple):
        return TextRows(self, multiple)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return {"input_ids": self.input_ids[i], "labels": self.labels[i], "lengths": self.input_ids.lengths(i)}


class TextRows(torch.utils.data.Dataset):
    """As the list of `SupervisedDataset.rows`, for a `TextDataset`."""

    def __init__(self, dataset, multiple):
        self.dataset, self.num_rows = dataset, -(-len(dataset) // multiple) * multiple

    def __len__(self):
        return self.num_rows

    def __getitem__(self, i):
        if not 0 <= i < self.num_rows:
            raise IndexError(i)
        if i < len(self.dataset):
            return {**self.dataset[i], "source": self.dataset.source(i), "row": i}
        filler = {"input_ids": torch.tensor([self.dataset.end_id]), "labels": torch.tensor([IGNORE_INDEX])}
        return filler | {"source": "", "row": i}


def hash_of(path):
    """The SHA-256 of a file, of the files in a folder with their paths, or of the rows of a data set."""
    if os.path.isfile(path):
        return utils.sha256_of(path)
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        found = [(str(file.relative_to(path)), utils.sha256_of(file)) for file in files]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return hashlib.sha256(json.dumps(utils.rows_of(path), default=str).encode()).hexdigest()


def hold_out(dataset, size):
    """Take records out of a dataset at random, always the same ones: (the rest, these). `size` is a number or a share.

    Raises UserError where nothing would be left.
    """
    count = max(round(size * len(dataset)), 1) if size < 1 else int(size)
    if not 0 < count < len(dataset):
        raise UserError(f"--val_set_size {size:g}: of {len(dataset)} records; give a share below 1, or fewer records")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(HELD_OUT_SEED)).tolist()
    return [dataset.part(chosen) for chosen in (sorted(order[count:]), sorted(order[:count]))]


def account(report, window):
    """The lines that account for every record of a `SupervisedDataset.report`."""
    kinds = {
        "unreadable": "data: dropped, unreadable",
        "prompt_fills_window": f"data: dropped, the prompt fills the window of {window} tokens",
        "no_turn_fits": f"data: dropped, no whole turn fits the window of {window} tokens",
        "truncated": f"data: truncated at {window} tokens",
        "straddling": "data: a token straddles the border of prompt and answer and is masked",
        "empty_output": "data: empty output, only the end token is trained",
        "special_tokens": "warning: special tokens such as </s> stand in the text of records",
    }
    kept, ends, lines = report["kept"], report["end_token_trained"], []
    if report["kinds"].keys() - {"alpaca"}:
        words = ", ".join(f"{count:,} {kind}" for kind, count in report["kinds"].items())
        turns = report["turns"]
        more = ", ".join(f"{turns[key]:,} {key}" for key in ("left out by the template", "cut off") if turns[key])
        trained = f"turns trained: {turns['trained']:,} of {turns['in all']:,}{f' ({more})' * bool(more)}"
        lines.append(f"data: records: {words}; {trained}")
    for key, what in kinds.items():
        if names := report.get(key):
            lines.append(f"{what}: {len(names):,} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})")
    for path, keys in report["unused"].items():
        lines.append(f"data: {path}: not used: {', '.join(f'{key} ({count:,})' for key, count in keys.items())}")
    lines.append(f"data: the end token is trained in {ends:,} of {kept:,} rows ({ends / max(kept, 1):.1%})")
    rare = "warning: models that seldom see the end token do not stop; raise --model_max_length"
    lines += [rare] if ends < 0.99 * kept or not kept else []
    return [f"data: {kept:,} kept + {report['read'] - kept:,} dropped = {report['read']:,} read", *lines]


def dry_run(dataset, tokenizer, args, count, colour):
    """What --dry_run prints: the first `count` rows as text, what is trained in green or between >>> <<<; a summary."""
    shown = []
    for ids, labels, source in itertools.islice(zip(dataset.input_ids, dataset.labels, dataset.sources), count):
        trained = (labels != IGNORE_INDEX).tolist()
        borders = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
        line, before = "", ""
        for start, stop in itertools.pairwise(borders):
            text = tokenizer.decode(ids[:stop])
            part = utils.printable(
                text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[start:stop])
            )
            line += (f"\x1b[32m{part}\x1b[0m" if colour else f">>>{part}<<<") if trained[start] else part
            before = text
        shown.append(f"--- {utils.printable(source)}: {len(ids)} tokens, {sum(trained)} trained\n{line}")
    lengths, batch = sorted(map(len, dataset.input_ids)), engines.global_batch(args)
    targets = sum(int((labels != IGNORE_INDEX).sum()) for labels in dataset.labels)
    at = [lengths[min(int(share * len(lengths)), len(lengths) - 1)] for share in (0.5, 0.9, 0.99)]
    steps = engines.num_steps(len(dataset), args)
    epochs = round(steps / -(-len(dataset) // batch), 2) if args.max_steps > 0 else args.num_train_epochs
    shown.append(
        f"lengths in tokens: median {at[0]}, 90 % {at[1]}, 99 % {at[2]}, longest {lengths[-1]}\n"
        f"tokens per epoch: {sum(lengths):,}, of which trained {targets:,} ({targets / sum(lengths):.1%})\n"
        f"steps: {steps:,} of {batch:,} examples ({epochs:g} epochs)"
    )
    return "\n".join(shown)


@dataclasses.dataclass
class DataCollatorForSupervisedDataset:
    """Pad a micro-batch on the right: {input_ids, labels, attention_mask}, LongTensors (batch, longest), and `rows`."""

    tokenizer: transformers.PreTrainedTokenizerBase

    def __call__(self, instances):
        pad_id = self.tokenizer.pad_token_id  # it may stand inside a row: the mask goes by length
        if pad_id is None:
            pad_id = int(self.tokenizer.eos_token_id == 0)  # any id but the end token's: it is masked
        ids, labels = (
            [part for one in instances for part in one[key].split(one.get("lengths", len(one[key])))]
            for key in ("input_ids", "labels")
        )
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=pad_id),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
            **({"rows": torch.tensor([row["row"] for row in instances])} if "row" in instances[0] else {}),
        }


def flatten(instances, multiple=1):
    """Join a micro-batch into one row without padding; logits are asked for only where there is a target.

    The borders keep the examples apart in attention that knows them, the position ids, which restart with every
    example, in transformers' masks: an attention_mask, even of ones, would undo it. Position i predicts token i + 1,
    so lengths 3 and 2 with the labels [-100, 5, 6] and [-100, 7] give cu_seq_lens [0, 3, 5], position_ids
    [[0, 1, 2, 0, 1]], logits_to_keep [0, 1, 3], targets [[5, 6, 7]]. What fills the row to a `multiple` is one more
    example, without a target. An instance with `lengths` is several examples.
    """
    ids = [instance["input_ids"] for instance in instances]
    lengths = [length for one in instances for length in one.get("lengths", [len(one["input_ids"])])]
    if short := -sum(lengths) % multiple:
        ids.append(torch.zeros_like(ids[0][:1]).expand(short))
        lengths.append(short)
    labels = torch.nn.functional.pad(torch.cat([row["labels"] for row in instances]), (0, short), value=IGNORE_INDEX)
    labels[[0, *itertools.accumulate(lengths[:-1])]] = IGNORE_INDEX  # an example's first token has nothing before it
    labels = torch.cat([labels[1:], labels[:1]])
    keep = torch.nonzero(labels != IGNORE_INDEX)[:, 0]  # (targets,), long also when empty
    targets = labels[keep][None]  # (1, targets)
    return {
        "input_ids": torch.cat(ids)[None],  # (1, tokens)
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],  # (1, tokens)
        "logits_to_keep": keep,
        "shift_labels": targets,  # already shifted; the Trainer counts the step's targets here
        "labels": targets,  # the model computes a loss only when labels are given
        **engines.borders(lengths),
        **({"rows": torch.tensor([row["row"] for row in instances])} if "row" in instances[0] else {}),
    }


def make_supervised_data_module(tokenizer, data_args):
    """The data arguments of a Trainer, by Stanford Alpaca's name: {train_dataset, eval_dataset, data_collator}."""
    dataset = SupervisedDataset(data_args.data_path, tokenizer, getattr(data_args, "skip_bad_records", False))
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}


# --- What makes a run wait, and what ends it from outside ------------------------------------------------------------


def watch_compiler():
    """Say what DeepSpeed compiles at its first use, and what lock of another process, perhaps killed, it awaits."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    began, told = time.time(), set()

    def look():
        while True:
            for lock in {*root.glob("*/lock"), *root.glob("*/*/lock")} - told:
                with contextlib.suppress(OSError):  # it has just gone
                    age, name = time.time() - lock.stat().st_mtime, lock.parent.name
                    if time.time() - age < began - 2:
                        told.add(lock)
                        what = f"another process compiles {name} there, or was killed; if no compiler runs, remove it"
                        say(f"DeepSpeed waits for {lock}, which is {age / 60:.0f} min old: {what}: rm {lock}")
                    elif age > 2:  # else it is there already, and only looked at
                        told.add(lock)
                        say(f"DeepSpeed compiles {name} once, which takes a minute or more ({lock.parent})")
            time.sleep(1)

    threading.Thread(target=look, daemon=True).start()


class Watch(threading.Thread):
    """Hears signals and times steps, also while the main thread waits for a process that is lost.

    Python runs its handlers between two steps of the main thread, which gloo or NCCL may hold for ever. So signals are
    read from a pipe too: the first is to be answered by a checkpoint at the end of a step, the second ends the run at
    once, and so does the first where no step ends in time. torchrun sends on what the terminal has sent to all: under
    a launcher a signal within two seconds is the first again.
    """

    def __init__(self, args, step):
        super().__init__(daemon=True)
        self.arguments, self.longest, self.heard_at, self.number = args, 0.0, 0.0, 0  # heard_at: 0 is not yet
        self.begin(f"step {step + 1}")
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.start()

    def begin(self, doing):
        self.doing, self.since = doing, time.monotonic()
        self.alive = self.since  # when the main thread was last seen: here, or at the end of a micro-batch
        self.named = max(SLOW_STEP, 10 * self.longest)

    def step_ended(self):
        self.longest = max(self.longest, time.monotonic() - self.since)

    def run(self):
        while True:
            if select.select([self.reader], [], [], 1.0)[0]:
                self.hear([number for number in os.read(self.reader, 64) if number in STOPPING])
            now, is_shared = time.monotonic(), self.arguments.world_size > 1
            patience = shutdown_patience(self.longest, self.doing.startswith("step"))
            if self.heard_at and min(now - self.heard_at, now - self.since) > patience:
                self.end_by_signal(f"{self.doing} has not ended within {patience:.0f} s")
            if is_shared and now - self.alive > self.arguments.ddp_timeout:
                why = f"another process has not answered for {self.arguments.ddp_timeout} s (--ddp_timeout)"
                self.end(f"error: {self.doing}: {why}", 2)
            if now - (self.alive if self.doing == "evaluating" else self.since) > self.named:
                self.named *= 2
                peers = "waiting for another process, which may be lost; " * is_shared
                before = f", the longest step before {self.longest:.1f} s" * bool(self.longest)
                bound = f"--ddp_timeout ends that after {self.arguments.ddp_timeout} s; " * is_shared
                self.tell(f"{self.doing} has taken {now - self.since:.0f} s{before}; {peers}{bound}")

    def tell(self, text):
        """Print on every machine, not on the first process's alone: it may be the lost one."""
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            utils.put(f"{text}{last_checkpoint(self.arguments)}")

    def hear(self, numbers):
        for self.number in numbers:
            now, is_launched = time.monotonic(), "LOCAL_RANK" in os.environ
            if self.heard_at and not (is_launched and now - self.heard_at < 2):
                self.end_by_signal("asked twice")
            if not self.heard_at:
                text = f"saving a checkpoint after this step, then exit {128 + self.number}; once more ends it at once"
                if self.doing == "writing the model":
                    text = "the model is being written, which ends the run; once more ends it at once"
                say(f"{signal.Signals(self.number).name}: {text}")
            self.heard_at = now

    def end_by_signal(self, why):
        self.end(f"{signal.Signals(self.number).name}: ended at once, {why}", 128 + self.number)

    def end(self, what, code):
        """Leave at once; nothing that takes part in a step may be waited for."""
        utils.leave(f"{what}; {last_checkpoint(self.arguments)}; {GO_ON}", code)


def shutdown_patience(longest, is_step):
    """Seconds that a signal waits for a step's end, or a save's; `longest` is that of a step. torchrun kills at 30."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return max(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) - 3, 1)
    return max(30, 3 * longest) if is_step else math.inf  # a whole checkpoint is worth more than a quick end


def relief(args, dtype, counts):
    """What to do about a run that has run out of memory: options that lower it, then engines that need less."""
    batch, needs = args.per_device_train_batch_size, engines.needs_here(args, dtype, counts)[0]
    more = f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps"
    cures = [f"{more} {args.gradient_accumulation_steps * batch // (batch // 2)}"] if batch > 1 else []
    is_saving = args.gradient_checkpointing or (args.fsdp_config or {}).get("activation_checkpointing")
    cures += [] if is_saving else ["--gradient_checkpointing True"]
    used = needs.get(engines.engine_name(args), (0, 0))[0]
    others = [
        option for name, option in engines.ENGINE_OPTIONS.items() if needs[name][0] < used / 2 and not args.use_cpu
    ]
    return ", or ".join([*cures, *others, "a lower --model_max_length"])


SLOW_STEP = 60.0  # seconds from which a step that takes ten times as long as any before it is named
GO_ON = "the same command goes on"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FP16_CURE = "use --bf16 True, a lower initial_scale_power in DeepSpeed's fp16 block,"
LOST = re.compile(
    "connection (was )?(closed|reset)|timed out|timeout|broken pipe|remote process|NCCL|gloo", re.IGNORECASE
)


@contextlib.contextmanager
def told_in_a_line(args, model_args, counts, progress):
    """Within the block, what ends a run from outside becomes a UserError: no memory, no disk, a lost process.

    So does what libraries say of options that they do not take, before `progress` has a "step"; its "longest" is that
    of the rows, in tokens.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said, step = first_line(error), progress.get("step")
        where = f"step {step + 1}" if step is not None else "before the first step"
        kept = f"{last_checkpoint(args)}; {GO_ON}"
        if utils.is_memory_full(error):
            what = f"{where}: the memory is full ({said}); micro-batch {args.per_device_train_batch_size}, "
            what += f"rows of up to {progress['longest']} tokens; give {relief(args, model_args.dtype, counts)}"
        elif utils.is_disk_full(error):
            what, kept = f"{args.output_dir}: cannot be written ({said}); make room", last_checkpoint(args)
        elif args.world_size > 1 and isinstance(error, RuntimeError) and LOST.search(str(error)):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which torchrun ends those that are left
            time.sleep(2)  # a process that knows more speaks first
            what = f"{where}: another process is lost or stuck ({said}); see what it has said, or its node's log"
        elif isinstance(error, LIBRARY_ERRORS) and step is None:
            what, kept = " ".join(str(error).split()), ""
            what += "; an operator is half built: give the same command again" * ("shared object file" in what)
        else:
            raise
        raise UserError(f"{what}; {kept}" if kept else what) from None


# --- The model, and its Trainer: every step looked at, every checkpoint whole, signals heard -------------------------


def smart_tokenizer_and_embedding_resize(special_tokens_dict, tokenizer, model):
    """Add special tokens and give each a row, the mean of the old ones; those of a model with spare rows take these."""
    num_new = tokenizer.add_special_tokens(special_tokens_dict)
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    first = len(tokenizer) - num_new
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if num_new and embedding is not None:
            with engines.gathered([embedding.weight]), torch.no_grad():
                embedding.weight[first : len(tokenizer)] = embedding.weight[:first].mean(dim=0, keepdim=True)


def repair_ids(model, tokenizer):
    """Give both configs the tokenizer's special ids, make the generation config one that saves, say what changed."""
    changed = []
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value, old = getattr(tokenizer, key), getattr(model.config, key, None)
        if old != value and not (isinstance(old, list) and value in old):
            changed += [f"{key} {old} -> {value}, as the tokenizer has it"] if old is not None else []
            setattr(model.config, key, value)
            setattr(model.generation_config, key, value)
    try:
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # a temperature or top_p without sampling, as Llama 2 and Vicuna ship it
            model.generation_config.do_sample = True
            changed.append("generation config: do_sample -> True")
            model.generation_config.validate(strict=True)
    except ValueError as error:
        model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
        changed.append(f"generation config replaced ({first_line(error)})")
    if changed:
        say(f"config: {', '.join(changed)}")


def keep_unpacked(model):
    """Let no forward without gradients pack 4-bit weights anew, for good, on a CPU: no gradient would pass from then on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def new_config(name, tokenizer, window):
    """The config of a model to start from random weights: of PRESETS, or a config.json whose vocabulary holds all ids."""
    size = -(-len(tokenizer) // 64) * 64  # rows that matrix units like; those behind the last id are never met
    if name in PRESETS:
        length = max(window, PRESETS[name].get("max_position_embeddings", 2048))
        return transformers.LlamaConfig(**PRESETS[name] | {"vocab_size": size, "max_position_embeddings": length})
    if not os.path.isfile(name):
        raise UserError(f"--config_name {name}: no such file, and none of {', '.join(PRESETS)}")
    try:
        config = transformers.AutoConfig.for_model(**utils.read_json(name))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{name}: not the config of a model ({first_line(error)})") from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name}: model type {config.model_type} is no causal language model")
    if (rows := config.get_text_config().vocab_size) < len(tokenizer):
        raise UserError(f"{name}: vocab_size {rows}, where the tokenizer has {len(tokenizer)} ids; write {size} there")
    return config


def make_start(args, config, tokenizer_folder):
    """Write the random model that a run starts from, hidden in its folder, for every engine to load; returns its path."""
    folder = Path(args.output_dir, START)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: the seed makes the same
    with utils.say_if_slow(f"{folder}: writing random weights"):
        transformers.set_seed(args.seed)
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        with utils.hidden_folder(Path(args.output_dir, ".making"), folder) as hidden:
            model.save_pretrained(hidden)
            if source := utils.find_sentencepiece(tokenizer_folder, args.cache_dir):
                shutil.copyfile(source, hidden / source.name)
    say(f"random weights, seed {args.seed}: {model.num_parameters():,} parameters")
    return str(folder)


def load_model(model_args, args, config, tokenizer):
    """The base model with fp32 master weights and with special ids that are the tokenizer's."""
    dtype = getattr(torch, model_args.dtype or "float32")  # transformers 5 would take the files' fp16 and train in it
    if args.fsdp and args.fsdp_config["cpu_ram_efficient_loading"] and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        model = engines.empty_model(config, dtype)  # accelerate sends its shards from the first process
    else:
        more = engines.in_4bit(args) if args.load_in_4bit else {}
        model = utils.load_weights(model_args.model_name_or_path, config, dtype, args.cache_dir, **more)
        keep_unpacked(model)
    repair_ids(model, tokenizer)
    if args.pad_token == "add" and tokenizer.pad_token in (None, tokenizer.unk_token):
        smart_tokenizer_and_embedding_resize({"pad_token": DEFAULT_PAD_TOKEN}, tokenizer, model)
    return choose_trained(model, args)


def choose_trained(model, args, **more):
    """Freeze what is not trained: all but LoRA's adapters, or but `args.trained_modules`; returns the model.

    `more` are of `add_adapters`. Raises UserError for a name that no module has.
    """
    if args.lora_r:
        return add_adapters(model, args, **more)
    if args.trained_modules:
        model.requires_grad_(False)
    for name in args.trained_modules:
        modules = [m for path, m in model.named_modules() if path == name or path.endswith(f".{name}")]
        if not modules:
            raise UserError(f"--trained_modules {name}: no module of this model has that name")
        for module in modules:
            module.requires_grad_(True)
    return model


def add_adapters(model, args, **more):
    """Freeze `model` and give it LoRA adapters in float32, equal on all processes; raises UserError for unknown names."""
    import peft

    base, modules, kept = model.name_or_path, dict(model.named_modules()), args.lora_modules_to_save
    linear = [path for path, module in modules.items() if isinstance(module, (torch.nn.Linear, Conv1D))]
    head = model.get_output_embeddings()
    names = sorted({path.rpartition(".")[2] for path in linear if modules[path] is not head})
    for name in [*args.lora_target_modules, *kept]:
        if not any(path == name or path.endswith(f".{name}") for path in modules):
            raise UserError(f"LoRA: no module of this model is named {name}; its linear layers are {', '.join(names)}")
    tied = model.config.get_text_config().tie_word_embeddings and bool({"embed_tokens", "lm_head"} & set(kept))
    transformers.set_seed(args.seed)
    adapters = peft.LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, task_type="CAUSAL_LM",
        target_modules=args.lora_target_modules or names, modules_to_save=kept or None, ensure_weight_tying=tied,
        base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
    )  # fmt: skip
    try:
        model = peft.get_peft_model(model, adapters, **more)
    except (ValueError, TypeError) as error:  # such as for a module that is no layer
        raise UserError(f"LoRA: {first_line(error)}; linear layers are {', '.join(names)}") from None
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast does it, without a copy of the input for each adapter
    dtype = model.dtype if args.deepspeed else torch.float32  # ZeRO has masters of its own, and wants one dtype
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)
    return model


class SFTTrainer(transformers.Trainer, transformers.TrainerCallback):
    """The Trainer with FSDP on CPU, proofs before the first step, and a look at every step before anything is saved.

    It is its own callback. train_dataset is a list of rows, of which `source` names the record. A step is made in
    `get_batch_samples` and ends in `end_step`. The Trainer would delete an old checkpoint before the new one is whole.
    """

    def __init__(self, *arguments, run=None, num_kept=None, progress=None, **keywords):
        self.run, self.num_kept, self.progress, self.signals = run, num_kept, progress, contextlib.ExitStack()
        self.step_rows, self.step_targets, self.step_skipped, self.dtypes = [], 0, False, ""
        self.signal = self.stopped_by = 0  # a number: what this process heard, what any of them had heard at a step
        self.saved_at = -1  # the step of the last checkpoint
        super().__init__(*arguments, **keywords)
        self.layout, self.unwanted = "", ()  # of micro-batches, see engines.choose_layout; what no forward takes
        named = self.model.named_parameters(remove_duplicate=False)  # before wrapping
        self.num_adapted = sum(parameter.requires_grad for _, parameter in named) if self.args.lora_r else 0
        self.add_callback(self)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled and self.args.use_cpu and self.args.world_size > 1:
            engines.enable_fsdp2_on_cpu(self)

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.progress["step"] = state.global_step
        args.eval_on_start = self.eval_dataset is not None and not state.global_step  # what training has to better
        self.layout, attention, compute = engines.choose_layout(self, self.progress["longest"])
        self.unwanted = engines.BORDERS if self.layout == "flat, masked" else ()
        if self.layout == "padded" and not args.padded:
            self.data_collator = DataCollatorForSupervisedDataset(self.processing_class)
            getattr(train_dataloader, "base_dataloader", train_dataloader).collate_fn = self.data_collator
        self.dtypes, line = engines.check_engine(args, self.model_wrapped, compute, self.layout, state.max_steps)
        say(f"{line}; attention: {attention}{self.adapters_in_words()}")
        engines.replay_cpu_adam(self)
        if args.save_rehearsal:
            rehearse_save(self)
        if args.should_save and args.overwrite_output_dir:  # not before: what there was is kept until this run works
            delete_run(args.output_dir)
            utils.write_json(self.run, Path(args.output_dir, "run.json"))
        if args.should_save:  # not before: where the rehearsal fails, no step is trained anew
            unmark_checkpoints_after(state.global_step, args.output_dir)
        self.signals.enter_context(utils.on_signals(self.note_signal, *STOPPING))
        self.watch = Watch(args, state.global_step)
        if state.global_step and args.resume_anyway:  # the checkpoint brings the schedule of its own learning rate
            use_learning_rate(self)

    def adapters_in_words(self):
        """What is trained, by name; "" where all weights are."""
        if not self.num_adapted:
            return f"; trained: {', '.join(self.args.trained_modules)}" * bool(self.args.trained_modules)
        config, args = self.accelerator.unwrap_model(self.model_wrapped).peft_config["default"], self.args
        kept = f", and {', '.join(config.modules_to_save)} whole" if config.modules_to_save else ""
        in_4bit = ", the rest in 4 bits" if args.load_in_4bit else ""
        return f"; LoRA of rank {args.lora_r} on {', '.join(sorted(config.target_modules))}{kept}{in_4bit}"

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        has_stopped = 0 < args.early_stopping_patience <= self.evaluations()[1]  # before it was resumed
        if state.global_step >= state.max_steps or has_stopped:  # the Trainer would train one step more
            raise AlreadyTrained
        # group_by_length draws from the global generator, which differs between processes and after resuming.
        batches = train_dataloader.batch_sampler
        sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
        if isinstance(sampler, LengthGroupedSampler):
            epoch = state.global_step // self.steps_in_an_epoch()
            sampler.generator = torch.Generator().manual_seed(args.seed + epoch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and the number of its targets on all processes."""
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_rows = [row for batch in batches for row in batch.pop("rows").tolist()]
        if self.unwanted:
            batches = [{key: value for key, value in batch.items() if key not in self.unwanted} for batch in batches]
        # FSDP would round a float to 16 bits: 1986 targets to 1984.
        self.step_targets = targets.long() if torch.is_tensor(targets) else targets
        return batches, self.step_targets

    def steps_in_an_epoch(self):
        return len(self.train_dataset) // engines.global_batch(self.args)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add the loss of a micro-batch and its targets to the sums of the evaluation; all processes take part."""
        unwanted = ("rows", *self.unwanted)
        inputs = {key: value for key, value in self._prepare_inputs(inputs).items() if key not in unwanted}
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, use_cache=False).loss
        if targets := (labels != IGNORE_INDEX).sum():
            self.eval_sums += torch.stack([loss.double() * targets, targets.double()])
        return None, None, None

    def evaluation_loop(self, *arguments, metric_key_prefix="eval", **keywords):
        """The Trainer's, with the exact mean loss of all targets: its own weighs micro-batches alike, and the filler."""
        doing = self.watch.doing
        self.watch.begin("evaluating")
        self.eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with utils.say_if_slow(f"evaluating on {len(self.eval_dataset):,} records"):
            output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **keywords)
        engines.reshard(self.model_wrapped)
        loss, targets = self.accelerator.reduce(self.eval_sums, "sum").tolist()
        output.metrics.update(
            {f"{metric_key_prefix}_loss": loss / targets, f"{metric_key_prefix}_targets": int(targets)}
        )
        self.watch.begin(doing)
        return output

    def _determine_best_metric(self, metrics, trial):
        """The Trainer's; the best weights are saved when they are found, and a signal's checkpoint in any case."""
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best or bool(self.stopped_by)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.watch.alive = time.monotonic()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        losses, worse = self.evaluations()
        words = f"; the best was {min(losses):.4f}" if worse else ""
        say(f"step {state.global_step}: loss {losses[-1]:.4f} on the held-out records{words}")
        if 0 < args.early_stopping_patience <= worse:
            control.should_training_stop = True
            say(f"stopping early: no better loss in {worse} evaluations (--early_stopping_patience)")

    def evaluations(self):
        """(the losses on the held-out records so far, how many evaluations ago the best was)"""
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        return losses, len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def on_epoch_end(self, args, state, control, **kwargs):
        """An evaluation that the step's end has had, or a checkpoint that a signal has had, is not made again."""
        if self.stopped_by or self.saved_at == state.global_step:
            control.should_save = False
        if self.stopped_by:
            control.should_evaluate = False
        if any(entry.get("step") == state.global_step and "eval_loss" in entry for entry in state.log_history):
            control.should_evaluate = False

    def on_substep_end(self, args, state, control, **kwargs):  # after each micro-batch but a step's last
        self.watch.alive = time.monotonic()

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *arguments, **keywords):
        if self.state.global_step > self._globalstep_last_logged:  # it is called at the end of an epoch as well
            self.watch.step_ended()
            self.progress["step"] = self.state.global_step
            self.end_step(tr_loss, None if grad_norm is None else float(grad_norm))
        self.watch.begin("saving a checkpoint")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *arguments, **keywords)
        self.watch.begin(f"step {self.state.global_step + 1}")

    def end_step(self, own_loss, norm):
        """Look at a step before it is logged or saved: is it sound, and has any process heard a signal?

        `norm` is the gradient's, or None. A step that fp16's loss scaling skipped is sound, but not too many in a row.
        """
        heard = self.accelerator.gather(torch.stack([own_loss.float(), own_loss.new_tensor(float(self.signal))])[None])
        loss, self.stopped_by = heard[:, 0].mean().item(), int(heard[:, 1].max())
        self.control.should_log = True  # loss.csv has a row for every step
        if self.args.eval_strategy != "no":  # an epoch's end too: before the checkpoint, which then knows of it
            is_end = self.args.eval_strategy == "epoch" and self.state.global_step % self.steps_in_an_epoch() == 0
            is_last = self.state.global_step == self.state.max_steps
            self.control.should_evaluate |= is_last or (is_end and self.state.epoch >= (self.args.eval_delay or 0))
            self.control.should_evaluate &= not self.stopped_by
        if self.stopped_by:
            self.control.should_save = self.control.should_training_stop = True
            self.args.save_only_model = False  # the same command is to go on from this checkpoint
        self.step_skipped = self.accelerator.optimizer_step_was_skipped
        in_a_row = 1 + skips_of(self.state)[1] if self.step_skipped else 0
        if in_a_row >= MAX_SKIPPED_STEPS:
            what = f"step {self.state.global_step}: {in_a_row} steps in a row overflowed in fp16 and were skipped"
            raise UserError(f"{what}; {FP16_CURE} or a lower --learning_rate; {last_checkpoint(self.args)}")
        has_bad_norm = norm is not None and not math.isfinite(norm)  # by which fp16 knows that it must skip
        is_dead = loss == 0 and (norm == 0 or has_bad_norm)
        if math.isfinite(loss) and (self.step_skipped or not has_bad_norm) and not is_dead:
            return
        if torch.isfinite(own_loss):
            time.sleep(1)  # let the process whose records did it speak
        names = [self.train_dataset[row]["source"] for row in self.step_rows]
        raise UserError(
            f"step {self.state.global_step}: the loss is {loss} and the gradient norm {norm}; "
            f"records of process {self.args.process_index}: {', '.join(filter(None, names)) or 'none'}; {self.dtypes}; "
            f"{last_checkpoint(self.args)}; look at these records with --dry_run, or lower --learning_rate"
        )

    def save_model(self, output_dir=None, _internal_call=False):
        """Of a checkpoint: with LoRA the adapters alone, which peft would select by names that an engine changes."""
        if not self.num_adapted:
            return super().save_model(output_dir, _internal_call)
        adapters = engines.gather_adapters(self, torch.float32)
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            write_adapters(self, adapters, Path(output_dir))

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["num_targets"] = int(self.step_targets or 0)
            logs |= {"skipped_steps": 1 + skips_of(self.state)[0]} if self.step_skipped else {}
        super().log(logs, start_time)

    def on_save(self, args, state, control, **kwargs):
        self.saved_at = state.global_step
        self.accelerator.wait_for_everyone()
        if args.should_save:
            mark_checkpoint(Path(args.output_dir, f"checkpoint-{state.global_step}"), state.global_step, args)
            for old in list(find_checkpoints(args.output_dir)[0])[: -self.num_kept] if self.num_kept else []:
                if old.name != Path(str(state.best_model_checkpoint)).name:
                    delete_checkpoint(old)
        self.accelerator.wait_for_everyone()

    def note_signal(self, number, frame):
        self.signal = number


def use_learning_rate(trainer):
    """Let schedule and optimizer, which come from a checkpoint, go on from the learning rate of the arguments."""
    schedule = trainer.lr_scheduler
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        rates = [trainer.args.learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        base = {"base_lrs": [trainer.args.learning_rate] * len(rates), "_last_lr": rates}
        schedule.load_state_dict(schedule.state_dict() | base)
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def skips_of(state):
    """(steps that fp16's loss scaling has skipped, how many of them at the end in a row), by the Trainer's log."""
    skipped = ["skipped_steps" in entry for entry in state.log_history if "loss" in entry]
    return sum(skipped), len(list(itertools.takewhile(bool, reversed(skipped))))


def last_checkpoint(args):
    """Words for the newest whole checkpoint."""
    whole = list(find_checkpoints(args.output_dir)[0])
    return f"last good checkpoint: {whole[-1]}" if whole else "no checkpoint was written yet"


class AlreadyTrained(Exception):
    """Leaves the Trainer's loop when the checkpoint resumed from is that of the last step."""


class ProgressLine(transformers.TrainerCallback):
    """A line of progress on stderr, from the first process: rewritten on a terminal, every logging_steps elsewhere."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step, self.targets = None, state.global_step, 0
        every = args.logging_steps if args.logging_steps >= 1 else args.logging_steps * state.max_steps
        self.every = max(int(every), 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        step, now, norm, left, rates = state.global_step, time.perf_counter(), logs.get("grad_norm"), "", ""
        if self.started is None:  # the first step, with its warming up, is no part of the rates
            self.started, self.first_step = now, step
        else:
            self.targets += logs["num_targets"]
            seconds, done = now - self.started, step - self.first_step
            left, speed = int((state.max_steps - step) * seconds / done), done * engines.global_batch(args) / seconds
            left = f"  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            rates = f"  {speed:.1f} examples/s  {self.targets / seconds:,.0f} target tokens/s"
        skipped = logs.get("skipped_steps")
        utils.show_progress(  # a narrow terminal cuts the end
            f"step {step}/{state.max_steps}  loss {logs['loss']:.4f}{left}"
            + (f"  overflow: step skipped ({skipped} so far)" if skipped else "")
            + f"  grad {'?' if norm is None else format(norm, '.3f')}{rates}"
            f"  lr {logs['learning_rate']:.2e}  epoch {logs['epoch']:.2f}",
            is_due=step % self.every == 0 or bool(skipped),
            is_last=step == state.max_steps,
        )


# --- The run's folder: whose it is, what of it is whole, and saving into it ------------------------------------------

CURVES = ("loss.csv", "loss.png")
START = ".start"  # the random model that a run starts from, until it is finished
RUN_FILES = (
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "tokenizer*",
    "checkpoint-*",
    "trainer_state.json",
)


def check_disk(args, num_trained, steps, num_saved=None):
    """Refuse a run whose checkpoints and model, or adapters, do not fit on the disk."""
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    by_steps = math.ceil(steps / max(every, 1))  # the last step is saved too
    planned = {"no": 0, "epoch": math.ceil(args.num_train_epochs), "best": 1}.get(args.save_strategy.value, by_steps)
    kept = min(planned, args.save_total_limit + 1) if args.save_total_limit else planned  # the new before the old goes
    kept += bool(args.load_best_model_at_end and kept)  # the best stays
    disk = (num_saved or num_trained) * (engines.save_dtype(args).itemsize + 4 * kept)  # masters
    disk += num_trained * 8 * kept * (not args.save_only_model)  # AdamW's moments
    os.makedirs(args.output_dir, exist_ok=True)
    free = shutil.disk_usage(args.output_dir).free
    if args.overwrite_output_dir:  # what there is goes before the first step
        free += sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    if disk > free:
        what = f"the model and {kept} checkpoint{'s' * (kept != 1)} need {utils.size_of(disk)}"
        what += f", {utils.size_of(free)} are free"
        cure = "use --save_total_limit 1, --save_only_model True or --save_strategy no"
        raise UserError(f"{args.output_dir}: {what}; {cure}; to try all the same: --memory_check False")


def settings_of(args, model_args, data_args, hashes):
    """The settings that decide what a run computes, which a resumed run must share; `hashes` are {data file: its}."""
    names = (
        "model_max_length pad_token seed data_seed learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
        "num_train_epochs max_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm "
        "fp16 bf16 label_smoothing_factor neftune_noise_alpha train_sampling_strategy average_tokens_across_devices"
    )
    model, new = model_args.tokenizer_name or model_args.model_name_or_path, model_args.config_name
    settings = {name: getattr(args, name) for name in names.split()} | {
        "model": os.path.abspath(model) if os.path.isdir(model) else model,
        **({"random": new if new in PRESETS else utils.sha256_of(new)} if new else {}),
        "dtype": model_args.dtype,
        "data": [hashes[path] for path in data_args.data_path],
        **({"train_on_inputs": True} if data_args.train_on_inputs else {}),
        **{key: getattr(data_args, key) for key in ("prompt_style", "columns") if getattr(data_args, key)},
        "global_batch": engines.global_batch(args),
        "engine": engines.engine_name(args).removesuffix(" with offload"),
    }
    if data_args.eval_data_path or data_args.val_set_size:
        held_out = [hashes[path] for path in data_args.eval_data_path or []] or data_args.val_set_size
        names = (
            "eval_strategy eval_steps eval_delay early_stopping_patience load_best_model_at_end metric_for_best_model"
        )
        settings |= {"held out": held_out} | {name: getattr(args, name) for name in names.split()}
    if args.lora_r:
        names = "lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save load_in_4bit"
        settings |= {name: getattr(args, name) for name in names.split()}
    settings |= {"trained_modules": args.trained_modules} if args.trained_modules else {}
    blocks = {"optimizer", "scheduler"} & set(args.deepspeed or {})  # set by DeepSpeed's JSON in place of the options
    settings |= {f"DeepSpeed's {name}": args.deepspeed[name] for name in sorted(blocks)}
    settings |= {"processes": args.world_size} if args.deepspeed or args.fsdp else {}  # parts of its checkpoints
    return json.loads(json.dumps(settings, default=str))


def started_run(args, given, settings, hashes, dataset, held_out):
    """What run.json says of a run before its first step: paths absolute, a DeepSpeed JSON by its content."""
    momentary = ("resume_from_checkpoint", "resume_anyway", "overwrite_output_dir")
    arguments = {key: given[key] for key in given if key not in momentary}
    for key in ("data_path", "eval_data_path"):
        paths = [os.path.abspath(path) if os.path.exists(path) else path for path in given.get(key) or []]
        arguments |= {key: paths} if paths else {}
    arguments |= {"deepspeed": args.deepspeed} if given.get("deepspeed") else {}
    for key in ("model_name_or_path", "config_name", "tokenizer_name"):
        if os.path.exists(given.get(key) or "") and given[key] not in PRESETS:
            arguments[key] = os.path.abspath(given[key])
    counts = {key: value if isinstance(value, (int, dict)) else len(value) for key, value in dataset.report.items()}
    about = {"made_by": "cria", "status": "started", "arguments": arguments, "settings": settings, "seed": args.seed}
    about |= {
        "prompt_style": dataset.style,
        "data": hashes,
        "counts": counts,
        "held_out": held_out and held_out.sources,
    }
    about["filled"] = -len(dataset) % engines.global_batch(args)
    versions = utils.versions("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "tokenizers")
    files = (utils.read_run(args.output_dir) or {}).get("files", [])  # of the model that this run will replace
    return about | {"versions": versions, "git_commit": utils.git_commit(), "files": files}


def mark_checkpoint(folder, step, args):
    """Write the marker that makes a checkpoint count: its files with their sizes, and whether it can be resumed."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE]
    os.umask(umask := os.umask(0))
    for path in paths:
        path.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    utils.write_json({"step": step, "resumable": not args.save_only_model, "files": files}, folder / COMPLETE)


def unmark_checkpoints_after(step, folder):
    """Let the checkpoints behind `step` count no more: these steps are trained anew and will write over them."""
    for path in find_checkpoints(folder)[0]:
        if int(path.name[11:]) > step:
            (path / COMPLETE).unlink()
            say(f"{path}: of steps that are trained anew, no longer used")


def delete_checkpoint(path):
    """Remove a checkpoint; the marker goes first, so that a kill in between leaves nothing that counts."""
    if path.is_symlink():  # what it leads to was put there by the user
        path.unlink()
    else:
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)


def delete_run(folder):
    """Remove what a run of ours wrote into `folder`, and nothing else."""
    whole, unfinished = find_checkpoints(folder)
    for path in [*whole, *unfinished]:
        if any(any(path.glob(pattern)) for pattern in (COMPLETE, *RUN_FILES)):
            delete_checkpoint(path)
        else:
            say(f"{path}: holds nothing of a run; left")
    for name in [*(utils.read_run(folder) or {}).get("files", []), *CURVES, "run.json"]:
        path = Path(folder, Path(name).name)  # never outside, whatever run.json says
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_named(path):
    """Refuse a --resume_from_checkpoint that is none, or one of ours that is not whole; returns the run behind it."""
    run, whole = utils.read_run(path.resolve().parent), find_checkpoints(path.resolve().parent)[0]
    usable = {one: one.name for one in whole if whole[one]["resumable"]}
    if not (path / "trainer_state.json").is_file() or (run and path.resolve() not in usable):
        what = "no checkpoint there, or it is unfinished or holds no optimizer; whole ones there"
        raise UserError(f"--resume_from_checkpoint {path}: {what}: {', '.join(usable.values()) or 'none'}")
    return run


def own_run(folder):
    """The run.json of a run of ours in `folder`, None where there is nothing. Raises UserError for anything else."""
    run = utils.read_run(folder)
    foreign = sorted(path.name for pattern in RUN_FILES for path in folder.glob(pattern))
    if (run and "settings" in run) or (run is None and not foreign):
        return run
    what = f"what {run.get('script')} wrote" if run else f"{foreign[0]}, which is not of a run of ours"
    raise UserError(f"{folder}: holds {what}; choose another --output_dir")


def resume_point(folder, settings, wanted="", overwrite=False, anyway=False):
    """Decide what a run does with its output folder. Returns (finished, checkpoint to resume from or None).

    | --resume_from_checkpoint is        | none          | True          | False   | PATH             |
    |------------------------------------|---------------|---------------|---------|------------------|
    | nothing, or --overwrite_output_dir | start         | refused       | start   | resume from PATH |
    | a run without a whole checkpoint   | start         | refused       | refused | resume from PATH |
    | a run with whole checkpoints       | resume newest | resume newest | refused | resume from PATH |
    | a finished run with its weights    | nothing to do | nothing to do | refused | resume from PATH |

    A run that had other `settings`, here or where PATH lies, is refused unless `anyway`.
    """
    folder, wanted = Path(folder), str(wanted or "").strip()
    run, word = own_run(folder), wanted.lower() if wanted.lower() in ("true", "false") else ""
    run, path = None if overwrite else run, Path(wanted) if wanted and not word else None
    changed = check_settings(folder if run else path, [run, path and check_named(path)], settings, anyway)
    if path or not run:
        if word == "true":
            raise UserError(f"--resume_from_checkpoint: {folder} holds no run; leave the option out to start one")
        return False, str(path) if path else None
    if word == "false":
        raise UserError(f"{folder}: holds a run already; to start it afresh use --overwrite_output_dir")
    weights = [name for name in run.get("files", []) if name.endswith(".safetensors")]
    is_finished, gone = run["status"] == "finished", [name for name in weights if not (folder / name).exists()]
    if is_finished and not changed and not gone:
        say(f"{folder}: this run is finished ({run['results']['steps']} steps); nothing to do")
        return True, None
    if is_finished and gone:
        say(f"{folder}: this run was finished, but {gone[0]} is gone")
    whole, unfinished = find_checkpoints(folder)
    found = [checkpoint for checkpoint in whole if whole[checkpoint]["resumable"]]
    if not found and word == "true":
        raise UserError(f"--resume_from_checkpoint: {folder} holds no whole checkpoint; leave the option out")
    for checkpoint in unfinished:
        say(f"{checkpoint}: unfinished checkpoint, not used")
    none = f"{folder}: its run has no whole checkpoint yet; starting from the first step"
    say(f"resuming from {found[-1]}" if found else none)
    return False, str(found[-1]) if found else None


# Settings that are there only where they are used.
ABSENT = ("lora_r", "held out", "train_on_inputs", "trained_modules", "random", "prompt_style", "columns")


def check_settings(place, runs, settings, anyway):
    """What of `settings` any of `runs` had otherwise, as words; raises UserError for it unless `anyway`."""
    olds = [run["settings"] for run in runs if run and "settings" in run]
    now = [
        (old, k, settings.get(k))
        for old in olds
        for k in dict.fromkeys([*settings, *ABSENT])
        if old.get(k) != settings.get(k)
    ]
    changed = [f"{k} was {old[k]} and is {v}" if k in old else f"{k} is {v}" for old, k, v in now]
    if changed and not anyway:
        cure = "start afresh with --overwrite_output_dir, or go on all the same with --resume_anyway True"
        what = f"its run had other settings: {'; '.join(dict.fromkeys(changed))}"
        raise UserError(f"{place}: {what}; choose another --output_dir, {cure}")
    return changed


def open_output(args, settings, model):
    """Take the output folder for this process, and decide what to do with it; `model` is the base's path or name."""
    utils.claim_folder(args.output_dir)
    wanted, overwrite, anyway = args.resume_from_checkpoint, args.overwrite_output_dir, args.resume_anyway
    folder = Path(args.output_dir).resolve()
    for path in (Path(name).resolve() for name in (model, wanted) if overwrite and os.path.isdir(str(name))):
        if path == folder or (path.parent == folder and path.name.startswith("checkpoint-")):
            raise UserError(f"--overwrite_output_dir would delete {path}, which it reads; choose another --output_dir")
    decision = resume_point(args.output_dir, settings, wanted, overwrite, anyway)
    for hidden in (".saving", ".rehearsal"):  # of a run that was killed
        shutil.rmtree(folder / hidden, ignore_errors=True)
    return decision


def from_first_process(function, *arguments):
    """Call `function` on the first process; all wait for its result, or raise what the user can mend."""
    shared = [None, ""]  # the result, the problem
    if utils.rank() == 0:
        try:
            shared[0] = function(*arguments)
        except UserError as error:
            shared[1] = str(error)
        except Exception as error:
            if not utils.is_disk_full(error):
                raise
            shared[1] = f"cannot write ({first_line(error)}); make room, then give the same command again"
    if utils.process_group():
        utils.process_group().broadcast_object_list(shared)
    if shared[1]:
        raise UserError(shared[1])
    return shared[0]


def check_weights(folder, expected):
    """Read the weights of `folder` back; raise UserError for a tensor that is not bit for bit that of `expected`."""
    missing = set(expected)
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                found, wanted = file.get_tensor(name), expected.get(name)
                if wanted is None or found.dtype != wanted.dtype or not torch.equal(found, wanted):
                    raise UserError(f"{path.name}: tensor {name} read back differs from what was written")
                missing.remove(name)
    if missing:
        raise UserError(f"{folder}: saved weights lack {len(missing)} of {len(expected)} tensors, first {min(missing)}")


def write_adapters(trainer, adapters, folder):
    """Write LoRA's weights, {name: tensor}, its config and the tokenizer into `folder`; check that all are there."""
    if len(adapters) != trainer.num_adapted:
        raise RuntimeError(f"{len(adapters)} tensors gathered of {trainer.num_adapted} trained")
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(trainer.accelerator.unwrap_model(trainer.model_wrapped).peft_config["default"])
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)  # peft has a set
    config.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    check_weights(folder, adapters)


def write_whole(trainer, model, weights, folder):
    """Write a whole model, its config and the tokenizer into `folder`; check that all weights are there."""
    model.save_pretrained(folder, state_dict=dict(weights), max_shard_size="5GB", save_original_format=False)
    changes = {"dtype": str(engines.save_dtype(trainer.args))[6:], "use_cache": getattr(trainer, "use_cache", True)}
    config = utils.read_json(folder / "config.json") | changes
    utils.jdump(config, folder / "config.json", indent=2)  # of the masters, and of training, the library's are
    trainer.processing_class.save_pretrained(folder)
    base = model.name_or_path
    if base and (source := utils.find_sentencepiece(base, trainer.args.cache_dir)):  # llama.cpp wants it
        shutil.copyfile(source, folder / source.name)
    check_weights(folder, weights)


def write_model(trainer, weights, folder):
    """Write weights, config and tokenizer into `folder`, and check them; returns the names of the files.

    Raises UserError for a value that is not finite in the dtype of the weights.
    """
    model, is_adapted = trainer.accelerator.unwrap_model(trainer.model_wrapped), getattr(trainer, "num_adapted", 0)
    if not is_adapted:
        weights = revert_weight_conversion(model, weights)  # the names of published files, where the library's differ
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            advice = "lower --learning_rate" if weight.dtype == torch.float32 else "use --save_dtype float32"
            raise UserError(f"weight {name} has values that are not finite in {str(weight.dtype)[6:]}; {advice}")
    with utils.hidden_folder(Path(folder, ".saving"), folder) as staging:
        if is_adapted:
            write_adapters(trainer, weights, staging)
        else:
            write_whole(trainer, model, weights, staging)
        trainer.state.save_to_json(str(staging / "trainer_state.json"))
        return sorted(path.name for path in staging.iterdir())


def safe_save_model_for_hf_trainer(trainer, output_dir):
    """Gather the trained weights on the first process's CPU and write the model, verified; returns its files."""
    gather = engines.gather_adapters if getattr(trainer, "num_adapted", 0) else engines.gather_weights  # 0: a fork's
    weights = gather(trainer, engines.save_dtype(trainer.args))
    return from_first_process(write_model, trainer, weights, output_dir)


def rehearse_save(trainer):
    """Save the untrained model through the real engine and remove it: a save that fails must fail now."""
    start, folder = time.perf_counter(), Path(trainer.args.output_dir, ".rehearsal")
    with utils.say_if_slow("save rehearsal: writing the untrained model and reading it back; it is removed again"):
        safe_save_model_for_hf_trainer(trainer, folder)
    if trainer.args.should_save:
        size = utils.size_of(sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")))
        shutil.rmtree(folder)
        say(f"save rehearsed: {size} written, read back and removed in {time.perf_counter() - start:.1f} s")


def write_loss_csv(history, path):
    """Write the per-step log of the Trainer as CSV; `eval_loss` stands in the row of the step after which it was."""
    columns = ["step", "epoch", "loss", "learning_rate", "grad_norm", "num_targets", "skipped_steps"]
    columns += ["eval_loss"] * any("eval_loss" in entry for entry in history)
    steps = {entry["step"]: dict(entry) for entry in history if "loss" in entry}
    for entry in history:
        if "eval_loss" in entry:
            step = steps.setdefault(entry["step"], {"step": entry["step"], "epoch": entry["epoch"]})
            step["eval_loss"] = entry["eval_loss"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(steps[step] for step in sorted(steps))


def write_loss_png(history, path):
    """Draw the losses and the learning rate over the steps, 800 pixels wide; a failure is told and ends nothing."""
    hidden = path.with_name(f".{path.name}")
    try:
        from matplotlib.figure import Figure  # not pyplot, which wants a display and keeps what it drew

        figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
        left = figure.subplots()
        right = left.twinx()
        for axes, key, name, style in (
            (right, "learning_rate", "learning rate", {"color": "0.6", "linewidth": 1, "linestyle": "--"}),
            (left, "loss", "loss on the trained records", {"color": "C0", "linewidth": 1.2, "alpha": 0.8}),
            (left, "eval_loss", "loss on the held-out records", {"color": "C3", "linewidth": 2, "marker": "o"}),
        ):
            if points := [(entry["step"], entry[key]) for entry in history if key in entry]:
                axes.plot(*zip(*points, strict=True), label=name, **style)
        left.set(xlabel="step", ylabel="mean loss of a target token")
        right.set_ylabel("learning rate", color="0.5")
        left.set_zorder(right.get_zorder() + 1)
        left.patch.set_visible(False)
        left.grid(alpha=0.3)
        left.legend(loc="upper right")
        figure.savefig(hidden, format="png")
        os.replace(hidden, path)
    except Exception as error:  # whatever a library for drawing may raise
        say(f"{path}: not drawn ({first_line(error)}); loss.csv has the numbers")
        hidden.unlink(missing_ok=True)


def write_curves(trainer):
    """Write loss.csv and loss.png of the steps so far, from the first process."""
    history, folder = trainer.state.log_history, Path(trainer.args.output_dir)
    if trainer.args.should_save and history:
        write_loss_csv(history, folder / "loss.csv")
        write_loss_png(history, folder / "loss.png")


def finish(trainer, run):
    """Write the model and the finished run.json; say where they are."""
    args, state, folder = trainer.args, trainer.state, Path(trainer.args.output_dir)
    names = safe_save_model_for_hf_trainer(trainer, args.output_dir)
    if not args.should_save:
        return
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    results = {"steps": state.global_step, "skipped_steps": skips_of(state)[0], "padded": trainer.layout == "padded"}
    results |= {"first_loss": losses[0], "last_loss": losses[-1], "mean_loss": sum(losses) / len(losses)}
    results |= {"engine": engines.engine_name(args), "processes": args.world_size, "dtypes": trainer.dtypes}
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    held = ""
    if evaluated:
        is_best, best = args.load_best_model_at_end and state.best_model_checkpoint, min(evaluated, key=evaluated.get)
        written = int(state.best_model_checkpoint.rpartition("-")[2]) if is_best else state.global_step
        results |= {"eval_losses": evaluated, "best_step": best, "weights_of_step": written}
        which = f"{'best' if is_best else 'last'} weights, those of step {written}"
        held = f"; held-out loss {evaluated.get(written, math.nan):.4f} of the {which}"
        held += "; the untrained model had less" * (best == 0)
    names += [name for name in CURVES if (folder / name).is_file()]
    run |= {"status": "finished", "results": results, "files": names}
    utils.write_json(run, folder / "run.json")
    shutil.rmtree(folder / START, ignore_errors=True)
    sizes, dtype = [file.stat().st_size for file in folder.glob("*.safetensors")], str(engines.save_dtype(args))[6:]
    what = "adapters" if trainer.num_adapted else "model"
    print(f"{folder}: {what} saved ({utils.size_of(sum(sizes))} {dtype}), last loss {losses[-1]:.4f}{held}", flush=True)


# --- The story -------------------------------------------------------------------------------------------------------


def make_trainer(model, args, dataset, held_out, tokenizer, run, progress):
    """The Trainer of the run, which takes over the deletion of old checkpoints."""
    num_kept, args.save_total_limit = args.save_total_limit, None
    config, words = model.config, {"processing_class": tokenizer}
    words["train_dataset"] = dataset.rows(engines.global_batch(args))
    words["eval_dataset"] = held_out and held_out.rows(args.per_device_eval_batch_size * args.world_size)
    if config.get_text_config() is config and not getattr(config, "layerdrop", 0):  # each step trains all parameters
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)  # None would look for others, and warn
    engines.use_flat_loss(model)
    is_half_on_cpu = args.use_cpu and (args.bf16 or args.fp16)
    flat = functools.partial(flatten, multiple=engines.SHAPE) if is_half_on_cpu else flatten
    collator = DataCollatorForSupervisedDataset(tokenizer) if args.padded else flat
    use_cache = getattr(config, "use_cache", True)  # of the base; training has none
    trainer = SFTTrainer(model, args, collator, run=run, num_kept=num_kept, progress=progress, **words)
    trainer.use_cache = use_cache
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(ProgressLine())
    return trainer


def load_base(model_args, args):
    """(the model or tokenizer that a run starts from, its config, its tokenizer)"""
    base, new = model_args.tokenizer_name or model_args.model_name_or_path, model_args.config_name
    transformers.set_seed(args.seed)  # before the model: new rows must be equal on all processes
    if not new:
        config = utils.load_config(base, args.cache_dir, ("unfinished",) * bool(args.dry_run))  # which needs no weights
    tokenizer = utils.load_tokenizer(base, args.model_max_length, args.cache_dir)
    return base, new_config(new, tokenizer, args.model_max_length) if new else config, tokenizer


def load_data(data_args, args, base, tokenizer, config):
    """(the dataset of the run, that to evaluate on or None); their ids are those of the model's SentencePiece file.

    Raises UserError for an id that is no row of its embedding.
    """
    law, datasets = utils.find_sentencepiece(base, args.cache_dir), []
    options = {"train_all": data_args.train_on_inputs, "style": data_args.prompt_style, "columns": data_args.columns}
    for paths in filter(None, (data_args.data_path, data_args.eval_data_path)):
        say(f"held-out data: {', '.join(paths)}") if datasets else None
        with utils.say_if_slow("data: still reading and tokenizing the records"):
            if not data_args.columns and all(map(utils.is_text, paths)):
                size = config.get_text_config().vocab_size
                datasets.append(TextDataset(paths, tokenizer, size, args.cache_dir, data_args.skip_bad_records))
                continue
            datasets.append(SupervisedDataset(paths, tokenizer, data_args.skip_bad_records, law, **options))
        special = [(name, [getattr(tokenizer, f"{name}_id") or 0]) for name in ("eos_token", "pad_token")]
        rows = ((name, ids.tolist()) for name, ids in zip(datasets[-1].sources, datasets[-1].input_ids, strict=True))
        utils.check_ids(itertools.chain(special, rows), tokenizer, config)  # a row at a time: lists take much memory
    if data_args.val_set_size:
        datasets = hold_out(datasets[0], data_args.val_set_size)
        say(f"data: {len(datasets[1]):,} of the records are held out to evaluate on, {len(datasets[0]):,} are trained")
    if len(datasets) > 1 and all(isinstance(dataset, SupervisedDataset) for dataset in datasets):
        seen = {ids.numpy().tobytes() for ids in datasets[0].input_ids}
        if shared := sum(ids.numpy().tobytes() in seen for ids in datasets[1].input_ids):
            say(f"warning: {shared:,} of {len(datasets[1]):,} held-out records are among the trained ones word by word")
    return datasets[0], datasets[1] if len(datasets) > 1 else None


def check_run(args, model_args, bones, longest, steps):
    """Refuse what cannot run or does not fit; `bones` is the model without weights. Returns its `count_run`."""
    engines.check_layers(args, bones, longest)
    if args.load_in_4bit and args.use_cpu:
        engines.check_4bit(bones)
    bones = choose_trained(bones, args, low_cpu_mem_usage=True)
    counts = engines.count_run(args, model_args.dtype, bones)
    if args.memory_check:
        engines.check_memory(args, model_args.dtype, counts)
        check_disk(args, counts[0], steps, num_saved=counts[0] if args.lora_r else counts[1])
    if args.warmup_steps > steps:
        say(f"warning: --warmup_steps {args.warmup_steps:g} of {steps} steps: {args.learning_rate} is never reached")
    return counts


def run_steps(trainer, checkpoint):
    """Train to the last step, or the first after a signal. Raises UserError for that end, and for fp16's overflow."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except AlreadyTrained:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
    write_curves(trainer)
    step, number = trainer.state.global_step, trainer.stopped_by
    if number:
        what = f"{signal.Signals(number).name}: stopped at step {step}, checkpoint saved"
        raise UserError(f"{what}; the same command goes on from there", 128 + number)
    if (skipped := skips_of(trainer.state)[0]) == step:
        raise UserError(f"none of {skipped} steps was applied, all overflowed in fp16; {FP16_CURE} or more steps")
    trainer.watch.begin("writing the model")


def train():
    """Parse the command line, prepare the data, train, and write the model; see the module's docstring."""
    transformers.utils.logging.set_verbosity_error()  # the libraries speak of errors only
    for name in ("accelerate", "tensorboardX", "matplotlib"):  # the latter speaks at every step that overflows
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if utils.rank() != 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model_args, data_args, args, given = parse_arguments(sys.argv[1:])
    base, config, tokenizer = load_base(model_args, args)
    dataset, held_out = load_data(data_args, args, base, tokenizer, config)
    if args.dry_run:
        if utils.rank() == 0:
            has_colour = utils.terminal_width(sys.stdout) and not os.environ.get("NO_COLOR")
            print(dry_run(dataset, tokenizer, args, args.dry_run, has_colour))
        return

    hashes = {path: hash_of(path) for path in [*data_args.data_path, *(data_args.eval_data_path or [])]}
    settings = settings_of(args, model_args, data_args, hashes)
    finished, checkpoint = from_first_process(open_output, args, settings, base)
    if finished:
        return
    if checkpoint and not os.path.isdir(checkpoint):
        raise UserError(f"{checkpoint} is not on this node; to resume, --output_dir must be where all nodes see it")
    if args.attn_implementation:
        engines.set_attention(config, args.attn_implementation)
    longest = max(one.longest() for one in (dataset, held_out) if one)
    steps = engines.num_steps(len(dataset), args)
    counts = check_run(args, model_args, utils.skeleton(config), longest, steps)
    if filled := -len(dataset) % (batch := engines.global_batch(args)):
        say(f"data: rows without targets, to fill the last global batch of {batch}: {filled}")
    run = started_run(args, given, settings, hashes, dataset, held_out)
    if utils.rank() == 0 and not args.overwrite_output_dir:
        utils.write_json(run, Path(args.output_dir, "run.json"))

    progress = {"longest": longest}
    if model_args.config_name:
        model_args.model_name_or_path = start = from_first_process(make_start, args, config, base)
        if not os.path.isdir(start):
            raise UserError(f"{start} is not on this node; --output_dir must be where all nodes see it")
    if args.deepspeed:
        watch_compiler()
    with told_in_a_line(args, model_args, counts, progress):
        model = load_model(model_args, args, config, tokenizer)
        trainer = make_trainer(model, args, dataset, held_out, tokenizer, run, progress)
        del model  # the engine shards it: a name for the whole would keep its memory
        gc.collect()
        with trainer.signals:  # heard, and noted, from step 1 on until the model is saved
            run_steps(trainer, checkpoint)
            finish(trainer, run)


if __name__ == "__main__":
    utils.run_main(train)
