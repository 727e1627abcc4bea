"""Fine-tune a causal language model on instruction records, on one device or many; prompts carry no loss.

    python train.py --model_name_or_path BASE --data_path data.json --output_dir OUT --bf16 True
    torchrun --standalone --nproc_per_node=8 train.py ... --fsdp "full_shard auto_wrap"
    torchrun --standalone --nproc_per_node=8 train.py ... --deepspeed ds_config.json
    python train.py --model_name_or_path BASE --data_path data.json --dry_run 3     # look first: loads no weights
    python train.py OUT/run.json --output_dir AGAIN                                 # the same run again

Reads a model folder and JSON or JSON Lines records; writes the tuned model, checkpoints, loss.csv and run.json to OUT.
The same command in the same folder resumes. The method and the public names are those of Stanford Alpaca's train.py.
"""

import argparse
import contextlib
import csv
import dataclasses
import gc
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

import engines
import utils
from utils import COMPLETE, GIB, IGNORE_INDEX, PROMPT_DICT, UserError, find_checkpoints, first_line, say  # noqa: F401

DEFAULT_PAD_TOKEN = "[PAD]"
DEFAULT_EOS_TOKEN = "</s>"
DEFAULT_BOS_TOKEN = "<s>"
DEFAULT_UNK_TOKEN = "<unk>"
CHUNK = 1000  # rows a tokenizer call; one call for all would hold every Encoding at once (about 1.2 GB for 52k rows)
Dtype = Literal["float32", "bfloat16", "float16"]
LIBRARY_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, AssertionError)  # about options they do not take
MAX_SKIPPED_STEPS = 40  # from a loss scale of 2^32 a healthy fp16 run skips 16

# --- Options of 2023 -------------------------------------------------------------------------------------------------


def _is_true(value):
    return value.lower() in ("", "true", "1", "yes", "y", "t")


def _renamed(new):
    return lambda value: [f"--{new}", value] if value else [f"--{new}"]


def _fsdp_config(key):
    return lambda value: ["--fsdp_config", json.dumps({key: value})]


# Spellings of 2023 that today's libraries reject. Each maps its value to today's words, [] where it only said the
# default, or to None where nothing corresponds; None options are named and ignored.
OLD_OPTIONS = {
    "evaluation_strategy": _renamed("eval_strategy"),
    "warmup_ratio": _renamed("warmup_steps"),  # today a warm-up below 1 is a share of all steps
    "fsdp_transformer_layer_cls_to_wrap": _fsdp_config("transformer_layer_cls_to_wrap"),
    "fsdp_min_num_params": _fsdp_config("min_num_params"),
    "group_by_length": lambda v: ["--train_sampling_strategy", "group_by_length"] if _is_true(v) else [],
    "no_cuda": lambda v: ["--use_cpu", v or "True"],
    "logging_dir": lambda v: ["--tensorboard_dir", v],
    "adafactor": lambda v: ["--optim", "adafactor"] if _is_true(v) else [],
    "per_gpu_train_batch_size": _renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size"),
    "torch_dtype": _renamed("dtype"),
    "push_to_hub_model_id": _renamed("hub_model_id"),
    "push_to_hub_token": _renamed("hub_token"),
    **dict.fromkeys(
        "save_safetensors half_precision_backend fp16_backend fp16_opt_level use_mps_device use_ipex xpu_backend "
        "sharded_ddp jit_mode_eval past_index tpu_num_cores tpu_metrics_debug ray_scope include_tokens_per_second "
        "include_inputs_for_metrics mp_parameters dispatch_batches split_batches lazy_preprocess use_fast_tokenizer "
        "overwrite_cache push_to_hub_organization torchdynamo use_legacy_prediction_loop".split()
    ),
}
OLD_VALUES = {("optim", "adamw_hf"): ["--optim", "adamw_torch"], ("debug", ""): []}  # of options that are still there


def translate_old_options(words):
    """Turn a 2023 command line into today's. `words` is argv without the script's name.

    Returns (words, notices). `--old value`, `--old=value` and `--old-name` are all understood. For example
    ["--evaluation_strategy", "no"] gives (["--eval_strategy", "no"], ["--evaluation_strategy is now --eval_strategy"]).
    """
    result, notices, position, last = [], [], 0, []
    while position < len(words):
        word, position = words[position], position + 1
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if key == "local_rank":  # torch.distributed.launch and deepspeed pass it; the environment says it too
            position += not equals
            continue
        following = value if equals else "".join(words[position : position + 1])
        if (key, following) in OLD_VALUES:
            position, new = position + (not equals), OLD_VALUES[key, following]
            result += new
            notices.append(
                f"{name} {following} is now {' '.join(new)}" if new else f"{name} '' has no meaning; ignored"
            )
            continue
        if key not in OLD_OPTIONS:
            result.append(word)
            continue
        while not equals and position < len(words) and not words[position].startswith("--"):
            value, position = f"{value} {words[position]}".strip(), position + 1
        new = OLD_OPTIONS[key](value) if OLD_OPTIONS[key] else None
        steps = _last_value("--warmup_steps", words) if key == "warmup_ratio" else ""
        if steps.strip("0."):
            notices.append(f"{name} gives way to --warmup_steps {steps}, as it did")
            continue
        if steps:  # 0, which in 2023 counted as none
            last = new
        else:
            result += new or []
        meaning = f"is now {' '.join(w for w in new if w != value)}" if new else "has no meaning any more; ignored"
        notices.append(f"{name} {meaning}")
    return result + last, notices


def _last_value(name, words):
    """The value that option `name` has in `words`, "" where it is not given."""
    pairs = [word.partition("=")[::2] if "=" in word else (word, after) for word, after in zip(words, [*words[1:], ""])]
    return next((value for word, value in reversed(pairs) if word == name), "")


# --- Arguments -------------------------------------------------------------------------------------------------------


def option(default, text, **more):
    """A field of a dataclass of arguments, with its help."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass
class ModelArguments:
    model_name_or_path: Optional[str] = option("facebook/opt-125m", "Model folder, or a name on the hub.")
    dtype: Dtype = option("float32", "Dtype of the master weights; half ones train worse.")


@dataclass
class DataArguments:
    data_path: Optional[list[str]] = option(
        None, "One or more JSON or JSON Lines files of records; given again, it adds.", action="extend"
    )
    skip_bad_records: bool = option(False, "Drop and count records that cannot be read instead of refusing the data.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: Optional[str] = option(None, "Where the hub's files are cached.")
    model_max_length: int = option(512, "Window in tokens; longer rows are cut on the right and counted.")
    pad_token: Literal["keep", "add"] = option(
        "keep", "keep: the vocabulary stays as it is. add: a [PAD] row is added, as Stanford Alpaca did."
    )
    padded: bool = option(False, "Pad micro-batches on the right instead of flattening them.")
    save_dtype: Optional[Dtype] = option(None, "Dtype of the final model's files; by default what the run computes in.")
    save_rehearsal: bool = option(True, "Save, check and remove the model before step 1.")
    memory_check: bool = option(True, "Compare what the run needs with what there is.")
    overwrite_output_dir: bool = option(
        False, "Start afresh in a folder of ours; only files that a run wrote are deleted."
    )
    resume_anyway: bool = option(False, "Resume although settings of the run have changed.")
    dry_run: int = option(0, "Check the data, show this many examples and stop; no weights.")
    tensorboard_dir: Optional[str] = option(None, "Where --report_to tensorboard writes.")
    # Three defaults of the Trainer that this script needs otherwise.
    remove_unused_columns: bool = option(False, "Leave it False: rows carry their number.")
    logging_nan_inf_filter: bool = option(False, "Leave it False: it logs NaN as 0.0.")
    logging_steps: float = option(1, "Print a line every so many steps (off a terminal).")

    def __post_init__(self):
        """Check the numbers, then fit everything to this machine: here, and in what is called here of engines.py."""
        if self.fp16 and self.bf16:
            raise UserError("--fp16 and --bf16 are both set; keep one of them")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least 1")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs:g} trains nothing; it must be more than 0")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: it must not be negative")
        engines.fit_device(self)
        engines.check_launcher(self)
        if self.fsdp:
            engines.configure_fsdp(self)
        if self.deepspeed:
            engines.configure_deepspeed(self)
        if self.gradient_checkpointing and not self.gradient_checkpointing_kwargs:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.tensorboard_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.tensorboard_dir
        self.disable_tqdm, self.logging_nan_inf_filter, self.remove_unused_columns = True, False, False
        super().__post_init__()
        engines.configure_groups(self)


def parse_arguments(words):
    """Parse argv without the script's name. Returns (model_args, data_args, training_args, given).

    `given` is what differs from the defaults, as run.json keeps it. A first word that is a run.json brings its own.
    """
    classes = (ModelArguments, DataArguments, TrainingArguments)
    parser = transformers.HfArgumentParser(classes, prog="train.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    words, notices = translate_old_options(words)
    saved = {}
    if words and words[0].endswith(".json"):
        path = Path(words.pop(0))
        run = utils.read_run(path.parent) if path.name == "run.json" else None
        if run is None:
            raise UserError(f"{path}: a file before the options must be the run.json of an earlier run")
        saved = run["arguments"]
    if sum(word.split("=")[0] == "--fsdp_config" for word in words) > 1:
        raise UserError("--fsdp_config is given twice; put transformer_layer_cls_to_wrap into its JSON")
    parser.set_defaults(**{key: value for key, value in saved.items() if key != "data_path"})
    namespace = utils.parse_options(parser, words)
    namespace.data_path = namespace.data_path or saved.get("data_path")
    for notice in notices:
        say(notice)
    blank = transformers.HfArgumentParser(classes).parse_args([])
    given = {name: value for name, value in vars(namespace).items() if value != getattr(blank, name)}
    try:
        groups = [[f.name for f in dataclasses.fields(cls) if f.init] for cls in classes]
        built = [cls(**{n: getattr(namespace, n) for n in names}) for cls, names in zip(classes, groups, strict=True)]
    except (ValueError, ImportError) as error:  # what transformers refuses, in its own words
        raise UserError(" ".join(str(error).split())) from None
    except torch.distributed.DistError as error:
        port = os.environ.get("MASTER_PORT")
        hint = f"if port {port} is in use, choose another with --master_port"
        raise UserError(f"the processes cannot meet ({first_line(error)}); {hint}") from None
    if built[2].eval_strategy != "no":
        raise UserError(
            f"--eval_strategy {built[2].eval_strategy.value}: there is no data to evaluate on; leave it out"
        )
    return *built, given


# --- Records to rows -------------------------------------------------------------------------------------------------


def encode(conversations, tokenizer):
    """Tokenize conversations, each a list of spans (text, trained) that is one text, and mask what is not trained.

    Span i ends behind len(tokenize(text up to its end)) ids of tokenize(the whole text). With two spans that is the
    rule of Stanford Alpaca: the first len(tokenize(prompt)) ids carry no loss. So a token that straddles a border
    counts as part of the span before it; `straddling` says that there is one. Returns a list of rows {input_ids,
    labels: LongTensor (length,), straddling: bool}, not cut.
    """
    own, library = type(tokenizer), transformers.PreTrainedTokenizerFast
    steps = ("__call__", "_encode_plus", "_convert_encoding")  # a fork may have a step of its own
    is_plain = all(getattr(own, step, None) is getattr(library, step) for step in steps)
    rows, options = [], {"return_attention_mask": False, "verbose": False}
    for start in range(0, len(conversations), CHUNK):
        # The text up to each border, the whole of it last: [["Below ...:", "Below ...:Hello.</s>"], ...]
        texts = [list(itertools.accumulate(text for text, _ in c)) for c in conversations[start : start + CHUNK]]
        flat = list(itertools.chain.from_iterable(texts))
        if (
            is_plain
        ):  # the Rust half without offsets takes half the time; the call before it ends truncation and padding
            tokenizer("", **options)
            ids = iter([encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(flat)])
        else:
            ids = iter(tokenizer(flat, **options).input_ids)
        for spans, upto in zip(conversations[start : start + CHUNK], texts, strict=True):
            *heads, whole = itertools.islice(ids, len(upto))
            input_ids = torch.tensor(whole, dtype=torch.long)
            labels, first = input_ids.clone(), 0
            for (_, trained), last in zip(spans, [*map(len, heads), len(whole)], strict=True):
                if not trained:
                    labels[first:last] = IGNORE_INDEX
                first = last
            straddling = any(whole[: len(head)] != head for head in heads)
            rows.append({"input_ids": input_ids, "labels": labels, "straddling": straddling})
    return rows


def cut(rows, window):
    """Cut rows of `encode` at `window` tokens, on the right. Returns (rows, what became of each).

    A row is "kept" whole, "truncated", or "dropped" where nothing of it is trained: [1, 5, 6, 2] with the labels
    [-100, -100, 6, 2] is truncated by a window of 3 and dropped by one of 2.
    """
    results, outcomes = [], []
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        is_long = len(ids) > window
        if is_long:
            ids, labels = ids[:window].clone(), labels[:window].clone()
        results.append({**row, "input_ids": ids, "labels": labels})
        is_trained = bool((labels != IGNORE_INDEX).any())
        outcomes.append("dropped" if not is_trained else "truncated" if is_long else "kept")
    return results, outcomes


def preprocess(sources: Sequence[str], targets: Sequence[str], tokenizer) -> dict:
    """Tokenize source + target and mask the source, by Stanford Alpaca's name; see `encode` and `cut`.

    Returns {input_ids, labels: list of LongTensor (length,), straddling: list of bool}.
    """
    pairs = [[(source, False), (target, True)] for source, target in zip(sources, targets, strict=True)]
    rows, _ = cut(encode(pairs, tokenizer), tokenizer.model_max_length)
    return {key: [row[key] for row in rows] for key in ("input_ids", "labels", "straddling")}


class SupervisedDataset(Dataset):
    """The records of one or more files as masked tensors; every record is kept, or dropped and counted.

    Items are {input_ids, labels}, LongTensors (length,); `sources[i]` names the record of item i; `report` holds the
    counts and the records behind them. `rows` are the items with `source` and their number `row`, filled to a
    `multiple` with rows of one token and no target: without them DDP repeats records and engines disagree at the end
    of an epoch; with them every record is trained exactly once per epoch on every engine. Raises UserError for data
    that cannot be read or holds nothing to train on.
    """

    def __init__(self, data_path, tokenizer, skip_bad_records=False, multiple=1):
        super().__init__()
        if not data_path:
            raise UserError("--data_path is missing: name one or more JSON or JSON Lines files")
        paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
        records, problems = utils.read_records(paths)
        if problems and not skip_bad_records:
            shown = "; ".join(problems[:3] + ["..."] * (len(problems) > 3))
            raise UserError(
                f"{len(problems)} of {len(problems) + len(records)} records cannot be used: {shown}; mend them, "
                "or drop and count them with --skip_bad_records True"
            )
        conversations = [utils.spans("alpaca", record["messages"], tokenizer) for record in records]
        rows, outcomes = cut(encode(conversations, tokenizer), tokenizer.model_max_length)
        found = list(zip(records, rows, outcomes, strict=True))
        kept = [(record, row) for record, row, outcome in found if outcome != "dropped"]
        special = [token for token in tokenizer.all_special_tokens if token]
        self.report = {
            "read": len(records) + len(problems),
            "kept": len(kept),
            "unreadable": problems,
            "prompt_fills_window": [record["source"] for record, _, outcome in found if outcome == "dropped"],
            "truncated": [record["source"] for record, _, outcome in found if outcome == "truncated"],
            "straddling": [record["source"] for record, row in kept if row["straddling"]],
            "empty_output": [record["source"] for record, _ in kept if not record["output"]],
            "special_tokens": [
                record["source"]
                for record, _ in kept
                if any(token in record[key] for key in ("instruction", "input", "output") for token in special)
            ],
            "end_token_trained": sum(int(row["labels"][-1]) == tokenizer.eos_token_id for _, row in kept),
        }
        for line in account(self.report, tokenizer.model_max_length):
            say(line)
        if not kept:
            raise UserError(
                f"{', '.join(map(str, paths))}: nothing to train on, none of {self.report['read']} records is left; "
                "see the counts above, or raise --model_max_length"
            )
        self.input_ids, self.labels = ([row[key] for _, row in kept] for key in ("input_ids", "labels"))
        self.sources, self.num_filled = [record["source"] for record, _ in kept], -len(kept) % multiple
        filler = (torch.tensor([tokenizer.eos_token_id]), torch.tensor([IGNORE_INDEX]), "")
        rows = [*zip(self.input_ids, self.labels, self.sources, strict=True), *[filler] * self.num_filled]
        self.rows = [{"input_ids": i, "labels": j, "source": name, "row": n} for n, (i, j, name) in enumerate(rows)]

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return {"input_ids": self.input_ids[i], "labels": self.labels[i]}


def account(report, window):
    """The lines that account for every record of a `SupervisedDataset.report`."""

    def some(key, what):
        names = report[key]
        return [f"{what}: {len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"] if names else []

    kept, ends = report["kept"], report["end_token_trained"]
    share = ends / max(kept, 1)
    advice = "warning: models that seldom see the end token do not stop; raise --model_max_length"
    return [
        f"data: {kept:,} kept + {report['read'] - kept:,} dropped = {report['read']:,} read",
        *some("unreadable", "data: dropped, unreadable"),
        *some("prompt_fills_window", f"data: dropped, the prompt fills the window of {window} tokens"),
        *some("truncated", f"data: truncated at {window} tokens"),
        *some("straddling", "data: a token straddles the border of prompt and answer and is masked"),
        *some("empty_output", "data: empty output, only the end token is trained"),
        *some("special_tokens", "warning: special tokens such as </s> stand in the text of records"),
        f"data: the end token is trained in {ends:,} of {kept:,} rows ({share:.1%})",
        *([advice] if share < 0.99 else []),
    ]


def dry_run(dataset, tokenizer, args, count, colour):
    """What --dry_run prints: the first `count` rows as text, what is trained in green or between >>> <<<; a summary."""
    shown = []
    for ids, labels, source in itertools.islice(zip(dataset.input_ids, dataset.labels, dataset.sources), count):
        border = int((labels == IGNORE_INDEX).sum())
        text, head = tokenizer.decode(ids), tokenizer.decode(ids[:border])
        tail = text[len(head) :] if text.startswith(head) else tokenizer.decode(ids[border:])
        marked = f"\x1b[32m{tail}\x1b[0m" if colour else f">>>{tail}<<<"
        shown.append(f"--- {source}: {len(ids)} tokens, {len(ids) - border} trained\n{head}{marked}")
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


# --- Rows to micro-batches -------------------------------------------------------------------------------------------


@dataclass
class DataCollatorForSupervisedDataset:
    """Pad a micro-batch on the right: {input_ids, labels, attention_mask}, LongTensors (batch, longest).

    The mask goes by length, so a padding id that also stands inside a row does no harm. `rows` are the numbers of the
    rows that have one.
    """

    tokenizer: transformers.PreTrainedTokenizerBase

    def __call__(self, instances):
        pad_id = self.tokenizer.pad_token_id
        if pad_id is None:
            pad_id = int(self.tokenizer.eos_token_id == 0)  # any id but the end token's: it is masked
        ids, labels = ([instance[key] for instance in instances] for key in ("input_ids", "labels"))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=pad_id),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
            **({"rows": torch.tensor([row["row"] for row in instances])} if "row" in instances[0] else {}),
        }


def flatten(instances):
    """Join a micro-batch into one row without padding; logits are asked for only where there is a target.

    Position ids restart with every example, which is what keeps the examples apart in transformers' masks: an
    attention_mask, even of ones, would undo it. Position i predicts token i + 1, so lengths 3 and 2 with the labels
    [-100, 5, 6] and [-100, 7] give position_ids [[0, 1, 2, 0, 1]], logits_to_keep [0, 1, 3], targets [[5, 6, 7]].
    `rows` are the numbers of the rows that have one.
    """
    ids = [instance["input_ids"] for instance in instances]
    labels = torch.cat([torch.cat([row["labels"][1:], row["labels"].new_tensor([IGNORE_INDEX])]) for row in instances])
    keep = torch.nonzero(labels != IGNORE_INDEX)[:, 0]  # (targets,), long also when empty
    targets = labels[keep][None]  # (1, targets)
    return {
        "input_ids": torch.cat(ids)[None],  # (1, tokens)
        "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],  # (1, tokens)
        "logits_to_keep": keep,
        "shift_labels": targets,  # already shifted; the Trainer counts the step's targets here
        "labels": targets,  # the model computes a loss only when labels are given
        **({"rows": torch.tensor([row["row"] for row in instances])} if "row" in instances[0] else {}),
    }


def make_supervised_data_module(tokenizer, data_args) -> dict:
    """The data arguments of a Trainer, by Stanford Alpaca's name: {train_dataset, eval_dataset, data_collator}."""
    dataset = SupervisedDataset(data_args.data_path, tokenizer, getattr(data_args, "skip_bad_records", False))
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}


# --- The model -------------------------------------------------------------------------------------------------------


def smart_tokenizer_and_embedding_resize(special_tokens_dict, tokenizer, model):
    """Add special tokens, give the model a row for each, and set the new rows to the mean of the old ones.

    A model that already has spare rows is not shrunk: the new tokens then take spare rows.
    """
    num_new = tokenizer.add_special_tokens(special_tokens_dict)
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    first = len(tokenizer) - num_new
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if num_new and embedding is not None:
            with engines.gathered([embedding.weight]), torch.no_grad():
                embedding.weight[first : len(tokenizer)] = embedding.weight[:first].mean(dim=0, keepdim=True)


def repair_ids(model, tokenizer):
    """Give config and generation config the tokenizer's special ids, and make the generation config one that saves.

    Returns what was changed, as words.
    """
    import transformers

    changed = []
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value, old = getattr(tokenizer, key), getattr(model.config, key, None)
        if old != value and not (isinstance(old, list) and value in old):
            if old is not None:
                changed.append(f"{key} {old} -> {value}, as the tokenizer has it")
            setattr(model.config, key, value)
            setattr(model.generation_config, key, value)

    def problem():
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            return first_line(error)

    if problem():  # a temperature or top_p without sampling, as Llama 2 and Vicuna ship it
        model.generation_config.do_sample = True
        changed.append("generation config: do_sample -> True")
    if reason := problem():
        model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
        changed.append(f"generation config replaced ({reason})")
    return changed


def load_model(model_args, args, config, tokenizer):
    """The base model with fp32 master weights and with special ids that are the tokenizer's.

    Under FSDP one process of a node reads the weights; the others make room for them, and accelerate sends each its
    shards from the first process while it wraps the model.
    """
    dtype = getattr(torch, model_args.dtype)  # transformers 5 would take the files' fp16 and train in it
    if args.fsdp and args.fsdp_config["cpu_ram_efficient_loading"] and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        model = engines.empty_model(config, dtype)
    else:
        model = utils.load_weights(model_args.model_name_or_path, config, dtype, args.cache_dir)
    changed = repair_ids(model, tokenizer)
    if changed:
        say(f"config: {', '.join(changed)}")
    if args.pad_token == "add" and tokenizer.pad_token in (None, tokenizer.unk_token):
        smart_tokenizer_and_embedding_resize({"pad_token": DEFAULT_PAD_TOKEN}, tokenizer, model)
    return model


# --- The Trainer: every step looked at, every checkpoint whole, signals heard ----------------------------------------


class SFTTrainer(Trainer):
    """The Trainer with FSDP on CPU as well, and with a look at every optimizer step before anything is saved.

    Its train_dataset is a list of rows, of which `source` names the record. A step is made in `get_batch_samples` and
    ends in `_maybe_log_save_evaluate`, which calls `end_step`.
    """

    def __init__(self, *arguments, **keywords):
        self.step_rows, self.step_targets, self.dtypes, self.signal = [], 0, "", 0
        self.num_applied = self.num_skipped = self.skipped_in_a_row = 0
        super().__init__(*arguments, **keywords)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled and self.args.use_cpu and self.args.world_size > 1:
            engines.enable_fsdp2_on_cpu(self)

    def pad_batches(self, dataloader, reason):
        """From here on pad micro-batches on the right, for a model that cannot take flat rows."""
        say(f"micro-batches are padded on the right: {reason}")
        self.data_collator = DataCollatorForSupervisedDataset(self.processing_class)
        getattr(
            dataloader, "base_dataloader", dataloader
        ).collate_fn = self.data_collator  # accelerate's has one inside

    @property
    def layout(self):
        return "flat" if self.data_collator is flatten else "padded"

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and the number of its targets on all processes."""
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_rows = [row for batch in batches for row in batch.pop("rows").tolist()]
        # FSDP would round a float to 16 bits: 1986 targets to 1984.
        self.step_targets = targets.long() if torch.is_tensor(targets) else targets
        return batches, self.step_targets

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *arguments, **keywords):
        if self.state.global_step > self._globalstep_last_logged:  # it is called at the end of an epoch as well
            self.end_step(tr_loss, grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *arguments, **keywords)

    def end_step(self, own_loss, norm):
        """Look at a step before it is logged or saved, and let a signal that any process heard end the run after it."""
        heard = self.accelerator.gather(torch.stack([own_loss.float(), own_loss.new_tensor(self.signal).float()])[None])
        self.signal = int(heard[:, 1].max())  # one process may have heard it before the others
        self.check_step(heard[:, 0].mean().item(), None if norm is None else float(norm), own_loss)
        self.control.should_log = True  # loss.csv has a row for every step
        if self.signal:
            self.control.should_save = self.control.should_training_stop = True
            self.args.save_only_model = False  # the same command is to go on from this checkpoint

    def check_step(self, loss, norm, own_loss):
        """Stop the run at a step that went wrong; a step that fp16's loss scaling skipped is counted instead.

        `loss` is the mean over all processes, `norm` the gradient's or None, `own_loss` that of this process.
        """
        skipped = self.accelerator.optimizer_step_was_skipped
        self.num_skipped, self.num_applied = self.num_skipped + skipped, self.num_applied + (not skipped)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise UserError(
                f"step {self.state.global_step}: {self.skipped_in_a_row} steps in a row overflowed in fp16 and were "
                f"skipped; use --bf16 True or a lower --learning_rate; {self.last_checkpoint()}"
            )
        has_bad_norm = norm is not None and not math.isfinite(norm)  # which is how fp16 knows that it must skip
        is_dead = loss == 0 and (norm == 0 or has_bad_norm)
        if math.isfinite(loss) and (skipped or not has_bad_norm) and not is_dead:
            return
        if torch.isfinite(own_loss):
            time.sleep(1)  # let the process whose records did it speak
        names = [self.train_dataset[row]["source"] for row in self.step_rows]
        raise UserError(
            f"step {self.state.global_step}: the loss is {loss} and the gradient norm {norm}; "
            f"records of process {self.args.process_index}: {', '.join(filter(None, names)) or 'none'}; {self.dtypes}; "
            f"{self.last_checkpoint()}; look at these records with --dry_run, or lower --learning_rate"
        )

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["num_targets"] = int(self.step_targets or 0)
            if self.skipped_in_a_row:
                logs["skipped_steps"] = self.num_skipped
        super().log(logs, start_time)

    def count_steps_of(self, state):
        """Take over the counts of applied and skipped steps from the state of the checkpoint resumed from."""
        skipped = [entry.get("skipped_steps", 0) for entry in state.log_history if "loss" in entry]
        self.num_skipped = max(skipped, default=0)
        self.num_applied = state.global_step - self.num_skipped
        self.skipped_in_a_row = len(list(itertools.takewhile(bool, reversed(skipped))))

    def note_signal(self, number, frame):
        self.signal = number
        if utils.rank() == 0:  # not print(): the signal may have come in the middle of one
            os.write(2, f"{signal.Signals(number).name}: saving a checkpoint after this step, then exit 143\n".encode())

    def last_checkpoint(self):
        whole = find_checkpoints(self.args.output_dir)[0]
        return f"last good checkpoint: {whole[-1]}" if whole else "no checkpoint was written yet"


class AlreadyTrained(Exception):
    """Leaves the Trainer's loop when the checkpoint resumed from is that of the last step."""


class RunCallback(TrainerCallback):
    """What happens around the steps: proofs before the first, markers behind checkpoints.

    `num_kept` checkpoints stay, all of them for None: the Trainer would delete an old one before the new one is known
    to be whole.
    """

    def __init__(self, trainer, run, num_kept=None):
        self.trainer, self.run, self.num_kept, self.began = trainer, run, num_kept, False
        self.signals = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, self.began = self.trainer, True
        engines.check_engine(trainer)
        reason, compute = engines.flat_rows_problem(trainer)
        if args.label_smoothing_factor or args.use_liger_kernel:  # both compute the loss from all logits
            reason = reason or "label smoothing and Liger kernels need all logits"
        if reason and trainer.layout == "flat":
            trainer.pad_batches(kwargs["train_dataloader"], reason)
        trainer.dtypes = engines.measured_dtypes(trainer.model_wrapped, compute)
        say(engines.start_line(args, trainer.model_wrapped, trainer.dtypes, trainer.layout, state.max_steps))
        trainer.count_steps_of(state)
        engines.replay_cpu_adam(trainer)
        if args.save_rehearsal:
            rehearse_save(trainer)
        if args.should_save and args.overwrite_output_dir:  # not before: what there was is kept until this run works
            delete_run(args.output_dir)
            utils.write_json(self.run, Path(args.output_dir, "run.json"))
        if args.should_save:  # not before: where the rehearsal fails, no step is trained anew
            unmark_checkpoints_after(state.global_step, args.output_dir)
        self.signals.enter_context(utils.on_signals(trainer.note_signal))
        if state.global_step and args.resume_anyway:  # the checkpoint brings the schedule of its own learning rate
            engines.use_learning_rate(trainer)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # resumed behind the last step: the Trainer would train one more
            raise AlreadyTrained
        # group_by_length draws from the global generator, which differs between processes and after resuming.
        batches = kwargs["train_dataloader"].batch_sampler
        sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
        if isinstance(sampler, LengthGroupedSampler):
            epoch = state.global_step // (len(self.trainer.train_dataset) // engines.global_batch(args))
            sampler.generator = torch.Generator().manual_seed(args.seed + epoch)

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            mark_checkpoint(folder, step=state.global_step, resumable=not args.save_only_model)
            for old in find_checkpoints(args.output_dir)[0][: -self.num_kept] if self.num_kept else []:
                if str(old) != str(state.best_model_checkpoint):
                    delete_checkpoint(old)
        self.trainer.accelerator.wait_for_everyone()


class ProgressLine(TrainerCallback):
    """A line of progress on stderr, from the first process: rewritten on a terminal, every logging_steps elsewhere."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step, self.targets = None, state.global_step, 0
        every = args.logging_steps if args.logging_steps >= 1 else args.logging_steps * state.max_steps
        self.every = max(int(every), 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        step, now = state.global_step, time.perf_counter()
        if self.started is None:  # the first step, with its warming up, is no part of the rates
            self.started, self.first_step, rates = now, step, ""
        else:
            self.targets += logs["num_targets"]
            seconds, done = now - self.started, step - self.first_step
            left = int((state.max_steps - step) * seconds / done)
            speed = done * engines.global_batch(args) / seconds
            rates = (
                f"  {speed:.1f} examples/s  {self.targets / seconds:,.0f} target tokens/s"
                f"  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            )
        norm = logs.get("grad_norm")
        line = (
            f"step {step}/{state.max_steps}  epoch {logs['epoch']:.2f}  loss {logs['loss']:.4f}"
            f"  lr {logs['learning_rate']:.2e}  grad {'?' if norm is None else format(norm, '.3f')}{rates}"
        )
        if "skipped_steps" in logs:
            line += f"  overflow: step skipped ({logs['skipped_steps']} so far)"
        is_due = step % self.every == 0 or "skipped_steps" in logs
        utils.show_progress(line, is_due, is_last=step == state.max_steps)


# --- The run's folder: whose it is, and what of it is whole ----------------------------------------------------------

RUN_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "checkpoint-*", "trainer_state.json")


def settings_of(args, model_args, hashes):
    """The settings that decide what a run computes; a resumed run must have the same. `hashes` are of the data files."""
    names = (
        "model_max_length pad_token seed data_seed learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
        "num_train_epochs max_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm "
        "fp16 bf16 label_smoothing_factor neftune_noise_alpha train_sampling_strategy average_tokens_across_devices"
    )
    model = model_args.model_name_or_path
    settings = {name: getattr(args, name) for name in names.split()} | {
        "model": os.path.abspath(model) if os.path.isdir(model) else model,
        "dtype": model_args.dtype,
        "data": hashes,
        "global_batch": engines.global_batch(args),
        "engine": engines.engine_name(args).removesuffix(" with offload"),
    }
    for name in ("optimizer", "scheduler"):  # which DeepSpeed's JSON may set in place of the options
        if args.deepspeed and name in args.deepspeed:
            settings[f"DeepSpeed's {name}"] = args.deepspeed[name]
    if args.deepspeed or args.fsdp:
        settings["processes"] = args.world_size  # its checkpoints are in as many parts
    return json.loads(json.dumps(settings, default=str))


def started_run(args, given, settings, hashes, dataset):
    """What run.json says of a run before its first step: paths absolute, a DeepSpeed JSON by its content."""
    arguments = {
        k: v for k, v in given.items() if k not in ("resume_from_checkpoint", "resume_anyway", "overwrite_output_dir")
    }
    arguments |= {"data_path": list(map(os.path.abspath, hashes))} if given.get("data_path") else {}
    arguments |= {"deepspeed": args.deepspeed} if given.get("deepspeed") else {}
    if os.path.isdir(given.get("model_name_or_path", "")):
        arguments["model_name_or_path"] = os.path.abspath(given["model_name_or_path"])
    return {
        "made_by": "cria",
        "status": "started",
        "arguments": arguments,
        "settings": settings,
        "prompt_style": "alpaca",
        "data": hashes,
        "counts": {key: value if isinstance(value, int) else len(value) for key, value in dataset.report.items()},
        "filled": dataset.num_filled,
        "versions": utils.versions("torch", "transformers", "accelerate", "deepspeed", "tokenizers"),
        "git_commit": utils.git_commit(),
        "seed": args.seed,
        "files": (utils.read_run(args.output_dir) or {}).get("files", []),  # of the model that this run will replace
    }


def results_of(trainer):
    """What run.json says of a run at its end."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "skipped_steps": trainer.num_skipped,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_loss": sum(losses) / len(losses),
        "dtypes": trainer.dtypes,
        "engine": engines.engine_name(trainer.args),
        "processes": trainer.args.world_size,
        "padded": trainer.layout == "padded",
    }


def mark_checkpoint(folder, **facts):
    """Write the marker that makes a checkpoint count: its files with their sizes, and `facts`."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(COMPLETE, None)
    utils.write_json({**facts, "files": files}, folder / COMPLETE)


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
        return
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


def delete_run(folder):
    """Remove what a run of ours wrote into `folder`, and nothing else."""
    folder = Path(folder)
    for path in sum(find_checkpoints(folder), []):
        if any(any(path.glob(pattern)) for pattern in (COMPLETE, *RUN_FILES)):
            delete_checkpoint(path)
        else:
            say(f"{path}: holds nothing of a run; left")
    for name in [*(utils.read_run(folder) or {}).get("files", []), "loss.csv", "run.json"]:
        if Path(folder, name).is_dir():
            shutil.rmtree(Path(folder, name))
        else:
            Path(folder, name).unlink(missing_ok=True)


def is_resumable(path):
    """Whether a whole checkpoint holds the optimizer too (not so with --save_only_model)."""
    return json.loads((path / COMPLETE).read_text(encoding="utf-8"))["resumable"]


def named_checkpoint(path, settings):
    """The checkpoint that --resume_from_checkpoint names, and what the run that wrote it had other than `settings`.

    Raises UserError where it is none, or is one of ours that is unfinished or holds no optimizer.
    """
    if not (path / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {path}: no checkpoint there (it lacks trainer_state.json)")
    folder = path.resolve().parent
    run = utils.read_run(folder)
    usable = [whole for whole in find_checkpoints(folder)[0] if is_resumable(whole)]
    if run is not None and path.resolve() not in usable:
        raise UserError(
            f"--resume_from_checkpoint {path}: it is unfinished or holds no optimizer; "
            f"whole ones there: {', '.join(whole.name for whole in usable) or 'none'}"
        )
    return str(path), changes_of(run, settings)


def changes_of(run, settings):
    """What of `settings` a run had otherwise, as words."""
    old = (run or {}).get("settings", settings)
    return [f"{key} was {old.get(key)} and is {value}" for key, value in settings.items() if old.get(key) != value]


def own_run(folder):
    """The run.json of a run of ours in `folder`, None where there is nothing. Raises UserError for anything else."""
    run = utils.read_run(folder)
    if run is not None and "settings" not in run:  # a model that another script of ours wrote
        raise UserError(f"{folder}: holds what {run.get('script')} wrote; choose another --output_dir")
    foreign = sorted(path.name for pattern in RUN_FILES for path in folder.glob(pattern)) if run is None else []
    if foreign:
        raise UserError(f"{folder}: holds {foreign[0]}, which is not of a run of ours; choose another --output_dir")
    return run


def resume_point(folder, settings, wanted="", overwrite=False, anyway=False):
    """Decide what a run does with its output folder. Returns (finished, checkpoint to resume from or None).

    | the folder holds                      | --resume_from_checkpoint | what happens                              |
    |---------------------------------------|--------------------------|-------------------------------------------|
    | anything of ours                      | PATH                     | resume from PATH                          |
    | nothing, or --overwrite_output_dir    | -, False                 | start                                     |
    | nothing, or --overwrite_output_dir    | True                     | refused                                   |
    | a run                                 | False                    | refused                                   |
    | a finished run with all its weights   | -, True                  | finished                                  |
    | a run                                 | -, True                  | resume from its newest whole checkpoint   |
    | a run without a whole checkpoint      | -                        | start                                     |
    | a run without a whole checkpoint      | True                     | refused                                   |

    A run that had other `settings`, here or where PATH lies, is refused unless `anyway`.
    """
    folder, word = Path(folder), str(wanted or "").strip()
    run, word = own_run(folder), word.lower() if word.lower() in ("true", "false") else word
    run = None if overwrite else run
    checkpoint, changed = named_checkpoint(Path(word), settings) if word not in ("", "true", "false") else (None, [])
    changed = list(dict.fromkeys(changes_of(run, settings) + changed))
    if changed and not anyway:
        raise UserError(
            f"{folder if run else Path(word).resolve().parent}: its run had other settings: {'; '.join(changed)}; "
            "choose another --output_dir, start afresh with --overwrite_output_dir, or go on all the same with "
            "--resume_anyway True"
        )
    if checkpoint or run is None:
        if word == "true":
            raise UserError(f"--resume_from_checkpoint: {folder} holds no run; leave the option out to start one")
        return False, checkpoint
    if word == "false":
        raise UserError(f"{folder}: holds a run already; to start it afresh use --overwrite_output_dir")
    if is_whole(folder, run) and not changed:
        say(f"{folder}: this run is finished ({run['results']['steps']} steps); nothing to do")
        return True, None
    return False, newest_checkpoint(folder, must_exist=word == "true")


def is_whole(folder, run):
    """Whether a run is finished and its weights are still there."""
    gone = [name for name in run.get("files", []) if name.endswith(".safetensors") and not (folder / name).exists()]
    if run["status"] == "finished" and gone:
        say(f"{folder}: this run was finished, but {gone[0]} is gone")
    return run["status"] == "finished" and not gone


def newest_checkpoint(folder, must_exist):
    """The newest whole checkpoint that holds the optimizer, None where there is none; says what it found."""
    whole, unfinished = find_checkpoints(folder)
    for path in unfinished:
        say(f"{path}: unfinished checkpoint, not used")
    if resumable := [path for path in whole if is_resumable(path)]:
        say(f"resuming from {resumable[-1]}")
        return str(resumable[-1])
    if must_exist:
        raise UserError(f"--resume_from_checkpoint: {folder} holds no whole checkpoint; leave the option out")
    say(f"{folder}: its run has no whole checkpoint yet; starting from the first step")
    return None


def open_output(args, settings, model):
    """Take the output folder for this process, and decide what to do with it; see `resume_point`.

    Raises UserError where --overwrite_output_dir would delete what the run reads: `model`, the folder that it starts
    from, or the checkpoint that it is to resume from.
    """
    utils.claim_folder(args.output_dir)
    wanted, overwrite, anyway = args.resume_from_checkpoint, args.overwrite_output_dir, args.resume_anyway
    folder = Path(args.output_dir).resolve()
    for path in (Path(name).resolve() for name in (model, wanted) if overwrite and os.path.isdir(str(name))):
        if path == folder or (path.parent == folder and path.name.startswith("checkpoint-")):
            raise UserError(
                f"--overwrite_output_dir would delete {path}, which this run reads; choose another --output_dir"
            )
    for hidden in (".saving", ".rehearsal"):  # of a run that was killed
        shutil.rmtree(folder / hidden, ignore_errors=True)
    return resume_point(args.output_dir, settings, wanted, overwrite, anyway)


# --- Saving ----------------------------------------------------------------------------------------------------------


def from_first_process(function, *arguments):
    """Call `function` on the first process and return its result on all of them, which wait for it.

    What the user can mend, a full disk included, is raised on all of them, so that none waits for ever.
    """
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
    """Read the weights of `folder` back and compare them with `expected`, a dict of name -> tensor, bit by bit.

    Raises UserError naming the first tensor that is wrong.
    """
    from safetensors import safe_open

    missing = set(expected)
    for path in utils.weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                found, wanted = file.get_tensor(name), expected.get(name)
                if wanted is None or found.dtype != wanted.dtype or not torch.equal(found, wanted):
                    raise UserError(f"{path.name}: tensor {name} read back differs from what was written")
                missing.remove(name)
    if missing:
        raise UserError(f"{folder}: saved weights lack {len(missing)} of {len(expected)} tensors, first {min(missing)}")


def write_model(trainer, weights, folder):
    """Write weights, config and tokenizer into `folder`, read the weights back and compare; see `utils.hidden_folder`.

    Returns the names of the files. Raises UserError for a value that is not finite in the dtype of the weights.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    weights = revert_weight_conversion(model, weights)  # the names of published files, where the library's differ
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            advice = "lower --learning_rate" if weight.dtype == torch.float32 else "use --save_dtype float32"
            raise UserError(f"weight {name} has values that are not finite in {str(weight.dtype)[6:]}; {advice}")
    with utils.hidden_folder(Path(folder, ".saving"), folder) as staging:
        model.save_pretrained(staging, state_dict=dict(weights), max_shard_size="5GB", save_original_format=False)
        config = utils.read_json(staging / "config.json") | {"dtype": str(engines.save_dtype(trainer.args))[6:]}
        utils.jdump(config, staging / "config.json", indent=2)  # the library writes the dtype of the masters
        trainer.processing_class.save_pretrained(staging)
        trainer.state.save_to_json(str(staging / "trainer_state.json"))
        check_weights(staging, weights)
        return sorted(path.name for path in staging.iterdir())


def safe_save_model_for_hf_trainer(trainer, output_dir):
    """Gather the trained weights on the first process's CPU and write the model, verified; returns its files."""
    weights = engines.gather_weights(trainer, engines.save_dtype(trainer.args))
    return from_first_process(write_model, trainer, weights, output_dir)


def weights_size(folder):
    """GiB of the weights in a model folder."""
    return sum(path.stat().st_size for path in utils.weight_files(folder)) / GIB


def rehearse_save(trainer):
    """Save the untrained model through the real engine and remove it: a save that fails must fail now."""
    start, folder = time.perf_counter(), Path(trainer.args.output_dir, ".rehearsal")
    safe_save_model_for_hf_trainer(trainer, folder)
    if trainer.args.should_save:
        size = weights_size(folder)
        shutil.rmtree(folder)
        say(f"save rehearsed: {size:.2f} GiB written, read back and removed in {time.perf_counter() - start:.1f} s")


def write_loss_csv(history, path):
    """Write the per-step log of the Trainer as CSV."""
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm", "num_targets", "skipped_steps")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(entry for entry in history if "loss" in entry)


def finish(trainer, run):
    """Write the model, loss.csv and the finished run.json; say where they are."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    names = safe_save_model_for_hf_trainer(trainer, args.output_dir)
    if not args.should_save:
        return
    write_loss_csv(trainer.state.log_history, folder / "loss.csv")
    run |= {"status": "finished", "results": results_of(trainer), "files": [*names, "loss.csv"]}
    utils.write_json(run, folder / "run.json")
    size = f"{weights_size(folder):.2f} GiB {str(engines.save_dtype(args))[6:]}"
    print(f"{folder}: model saved ({size}), last loss {run['results']['last_loss']:.4f}", flush=True)


# --- The story -------------------------------------------------------------------------------------------------------


def quiet_libraries():
    """Let the libraries speak of errors only, and show progress on the first process's terminal alone."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if utils.rank() != 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def check_before_loading(args, model_args, config, dataset):
    """Refuse what cannot work while nothing is loaded yet: layer class, positions, memory, disk."""
    bones = utils.skeleton(config)
    engines.check_model(args, bones, max(map(len, dataset.input_ids)))
    if config.get_text_config() is config and not getattr(config, "layerdrop", 0):  # each step trains all parameters
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)  # None would look for others, and warn
    os.makedirs(args.output_dir, exist_ok=True)
    num_params = sum(parameter.numel() for parameter in bones.parameters())
    engines.check_needs(args, model_args.dtype, num_params, engines.num_steps(len(dataset), args))


def make_trainer(model, args, dataset, tokenizer, run):
    """The Trainer and its RunCallback, which takes over the deletion of old checkpoints."""
    num_kept, args.save_total_limit = args.save_total_limit, None
    collator = DataCollatorForSupervisedDataset(tokenizer) if args.padded else flatten
    words = {"train_dataset": dataset.rows, "data_collator": collator, "processing_class": tokenizer}
    try:
        trainer = SFTTrainer(model=model, args=args, **words)
    except LIBRARY_ERRORS as error:  # options that the Trainer refuses, in its own words
        raise UserError(" ".join(str(error).split())) from None
    watch = RunCallback(trainer, run, num_kept)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(watch)
    trainer.add_callback(ProgressLine())
    return trainer, watch


def run_steps(trainer, watch, checkpoint):
    """Train to the last step, or to the first after a signal; then exit 143. Raises UserError for what can be mended."""
    try:
        with contextlib.suppress(AlreadyTrained), watch.signals:
            trainer.train(resume_from_checkpoint=checkpoint)
    except UserError:
        raise
    except Exception as error:  # of the libraries that make optimizer and schedule, or write checkpoints
        if isinstance(error, LIBRARY_ERRORS) and not watch.began:
            raise UserError(" ".join(str(error).split())) from None
        if not utils.is_disk_full(error):
            raise
        what = f"{trainer.args.output_dir}: cannot be written ({first_line(error)}); make room"
        raise UserError(f"{what}; {trainer.last_checkpoint()}") from None
    if trainer.signal:
        say(f"stopped at step {trainer.state.global_step}; the same command goes on from there")
        sys.exit(128 + signal.SIGTERM)
    if trainer.num_applied == 0:
        raise UserError(f"none of {trainer.num_skipped} steps was applied, all overflowed in fp16; use --bf16 True")


def train():
    """Parse the command line, prepare the data, train, and write the model; see the module's docstring."""
    quiet_libraries()
    model_args, data_args, args, given = parse_arguments(sys.argv[1:])
    base, batch = model_args.model_name_or_path, engines.global_batch(args)
    transformers.set_seed(args.seed)  # before the model: new rows must be equal on all processes
    config = utils.load_config(base, args.cache_dir)
    tokenizer = utils.load_tokenizer(base, args.model_max_length, args.cache_dir)
    dataset = SupervisedDataset(data_args.data_path, tokenizer, data_args.skip_bad_records, multiple=batch)
    if args.dry_run:
        if utils.rank() == 0:
            print(dry_run(dataset, tokenizer, args, args.dry_run, sys.stdout.isatty()))
        return

    hashes = {path: utils.sha256_of(path) for path in data_args.data_path}
    settings = settings_of(args, model_args, [hashes[path] for path in data_args.data_path])
    finished, checkpoint = from_first_process(open_output, args, settings, base)
    if finished:
        return
    if checkpoint and not os.path.isdir(checkpoint):
        raise UserError(f"{checkpoint} is not on this node; to resume, --output_dir must be where all nodes see it")
    check_before_loading(args, model_args, config, dataset)
    say(f"data: {dataset.num_filled} rows without targets fill the last global batch of {batch}")
    run = started_run(args, given, settings, hashes, dataset)
    if utils.rank() == 0 and not args.overwrite_output_dir:
        utils.write_json(run, Path(args.output_dir, "run.json"))

    model = load_model(model_args, args, config, tokenizer)
    trainer, watch = make_trainer(model, args, dataset, tokenizer, run)
    del model  # the engine shards it: a name for the whole would keep its memory
    gc.collect()
    run_steps(trainer, watch, checkpoint)
    finish(trainer, run)


if __name__ == "__main__":
    utils.run_main(train)
