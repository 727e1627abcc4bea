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
import dataclasses
import gc
import itertools
import logging
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import torch
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

import utils
from utils import GIB, IGNORE_INDEX, PROMPT_DICT, UserError, find_checkpoints, render_prompt, say  # noqa: F401

DEFAULT_PAD_TOKEN = "[PAD]"
DEFAULT_EOS_TOKEN = "</s>"
DEFAULT_BOS_TOKEN = "<s>"
DEFAULT_UNK_TOKEN = "<unk>"
CHUNK = 1000  # rows a tokenizer call; one call for all would hold every Encoding at once (about 1.2 GB for 52k rows)
Dtype = Literal["float32", "bfloat16", "float16"]
LIBRARY_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, AssertionError)  # about options they do not take
MAX_SKIPPED_STEPS = 40  # from a loss scale of 2^32 a healthy fp16 run skips 16

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    model_name_or_path: Optional[str] = field(
        default="facebook/opt-125m", metadata={"help": "Model folder, or a name on the hub."}
    )
    dtype: Dtype = field(default="float32", metadata={"help": "Dtype of the master weights; half ones train worse."})


@dataclass
class DataArguments:
    data_path: Optional[list[str]] = field(
        default=None,
        metadata={"help": "One or more JSON or JSON Lines files of records; given again, it adds.", "action": "extend"},
    )
    skip_bad_records: bool = field(
        default=False, metadata={"help": "Drop and count records that cannot be read instead of refusing the data."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: Optional[str] = field(default=None, metadata={"help": "Where the hub's files are cached."})
    model_max_length: int = field(
        default=512, metadata={"help": "Window in tokens; longer rows are cut on the right and counted."}
    )
    pad_token: Literal["keep", "add"] = field(
        default="keep",
        metadata={"help": "keep: the vocabulary stays as it is. add: a [PAD] row is added, as Stanford Alpaca did."},
    )
    padded: bool = field(default=False, metadata={"help": "Pad micro-batches on the right instead of flattening them."})
    save_dtype: Optional[Dtype] = field(
        default=None, metadata={"help": "Dtype of the final model's files; by default what the run computes in."}
    )
    save_rehearsal: bool = field(default=True, metadata={"help": "Save, check and remove the model before step 1."})
    memory_check: bool = field(default=True, metadata={"help": "Compare what the run needs with what there is."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh in a folder of ours; only files that a run wrote are deleted."}
    )
    resume_anyway: bool = field(default=False, metadata={"help": "Resume although settings of the run have changed."})
    dry_run: int = field(default=0, metadata={"help": "Check the data, show this many examples and stop; no weights."})
    tensorboard_dir: Optional[str] = field(default=None, metadata={"help": "Where --report_to tensorboard writes."})
    # Three defaults of the Trainer that this script needs otherwise.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it False: rows carry their number."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave it False: it logs NaN as 0.0."})
    logging_steps: float = field(default=1, metadata={"help": "Print a line every so many steps (off a terminal)."})

    def __post_init__(self):
        if self.fp16 and self.bf16:
            raise UserError("--fp16 and --bf16 are both set; keep one of them")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least 1")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs:g} trains nothing; it must be more than 0")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: it must not be negative")
        utils.fit_device(self)
        utils.check_launcher(self)
        if self.fsdp:
            utils.configure_fsdp(self)
        if self.deepspeed:
            utils.configure_deepspeed(self)
        if self.gradient_checkpointing and not self.gradient_checkpointing_kwargs:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.tensorboard_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.tensorboard_dir
        self.disable_tqdm, self.logging_nan_inf_filter, self.remove_unused_columns = True, False, False
        super().__post_init__()
        utils.configure_more(self)


def parse_arguments(words):
    """Parse argv without the script's name. Returns (model_args, data_args, training_args, given).

    `given` is what differs from the defaults, as run.json keeps it. A first word that is a run.json brings its own.
    """
    classes = (ModelArguments, DataArguments, TrainingArguments)
    parser = transformers.HfArgumentParser(classes, prog="train.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    words, notices = utils.translate_old_options(words)
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
        raise UserError(f"the processes cannot meet ({utils.first_line(error)}); {hint}") from None
    return *built, given


# ---------------------------------------------------------------------------------------------------------------------
# Records to tensors
# ---------------------------------------------------------------------------------------------------------------------


def token_ids(texts, tokenizer):
    """The ids of tokenizer(texts), cut at its model_max_length, as lists.

    Where that call is the library's own, it is made for one text, which sets truncation, and the others go to the
    tokenizer's Rust half without offsets, which takes half the time.
    """
    options = {"return_attention_mask": False, "verbose": False}
    if tokenizer.model_max_length < 10**9:  # a tokenizer without a limit says 10^30
        options |= {"truncation": True, "max_length": tokenizer.model_max_length}
    own, library = type(tokenizer), transformers.PreTrainedTokenizerFast
    steps = ("__call__", "_encode_plus", "_convert_encoding")  # a fork may have a step of its own
    if any(getattr(own, step, None) is not getattr(library, step) for step in steps):
        return tokenizer(texts, **options).input_ids
    tokenizer(texts[:1], **options)
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]


def preprocess(sources: Sequence[str], targets: Sequence[str], tokenizer) -> dict:
    """Tokenize source + target and mask the source, by the rule of Stanford Alpaca.

    The first len(tokenize(source)) ids of tokenize(source + target) carry no loss. A token that straddles the border
    therefore counts as source; `straddling` says in which rows that happened. Both are cut at the tokenizer's
    model_max_length. Returns {input_ids, labels: list of LongTensor (length,), straddling: list of bool}.
    """
    result = {"input_ids": [], "labels": [], "straddling": []}
    for start in range(0, len(sources), CHUNK):
        prompts = list(sources[start : start + CHUNK])
        texts = [prompt + target for prompt, target in zip(prompts, targets[start : start + CHUNK], strict=True)]
        for ids, head in zip(token_ids(texts, tokenizer), token_ids(prompts, tokenizer), strict=True):
            input_ids = torch.tensor(ids, dtype=torch.long)
            labels = input_ids.clone()
            labels[: len(head)] = IGNORE_INDEX
            result["input_ids"].append(input_ids)
            result["labels"].append(labels)
            result["straddling"].append(ids[: len(head)] != head)
    return result


class SupervisedDataset(Dataset):
    """The records of one or more files as masked tensors; every record is kept, or dropped and counted.

    Items are {input_ids, labels}, LongTensors (length,). `sources[i]` names the record of item i; `report` holds the
    counts and the records behind them. Raises UserError for data that cannot be read or holds nothing to train on.
    """

    def __init__(self, data_path, tokenizer, skip_bad_records=False):
        super().__init__()
        paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
        records, problems = utils.read_records(paths)
        if problems and not skip_bad_records:
            shown = "; ".join(problems[:3] + ["..."] * (len(problems) > 3))
            total = len(problems) + len(records)
            raise UserError(
                f"{len(problems)} of {total} records cannot be used: {shown}; mend them, "
                "or drop and count them with --skip_bad_records True"
            )
        prompts = [render_prompt(record) for record in records]
        targets = [record["output"] + tokenizer.eos_token for record in records]
        data = preprocess(prompts, targets, tokenizer)
        window = tokenizer.model_max_length
        # A row as long as the window may or may not have been cut: count it again, whole.
        full = [i for i, ids in enumerate(data["input_ids"]) if len(ids) == window]
        whole = tokenizer([prompts[i] + targets[i] for i in full], verbose=False).input_ids if full else []
        lengths = [len(ids) for ids in whole]
        cut = {i for i, length in zip(full, lengths, strict=True) if length > window}
        keep = [i for i, labels in enumerate(data["labels"]) if (labels != IGNORE_INDEX).any()]
        dropped = sorted(set(range(len(records))) - set(keep))
        special = [token for token in tokenizer.all_special_tokens if token]
        self.input_ids = [data["input_ids"][i] for i in keep]
        self.labels = [data["labels"][i] for i in keep]
        self.sources = [records[i]["source"] for i in keep]
        name = [record["source"] for record in records]
        self.report = {
            "read": len(records) + len(problems),
            "kept": len(keep),
            "unreadable": problems,
            "prompt_fills_window": [name[i] for i in dropped],
            "truncated": [name[i] for i in keep if i in cut],
            "straddling": [name[i] for i in keep if data["straddling"][i]],
            "empty_output": [name[i] for i in keep if not records[i]["output"]],
            "special_tokens": [
                name[i]
                for i in keep
                if any(token in records[i][key] for key in ("instruction", "input", "output") for token in special)
            ],
            "end_token_trained": sum(int(labels[-1]) == tokenizer.eos_token_id for labels in self.labels),
        }
        for line in utils.account(self.report, window):
            say(line)
        if not keep:
            raise UserError(
                f"{', '.join(map(str, paths))}: nothing to train on, none of {self.report['read']} records is left; "
                "see the counts above, or raise --model_max_length"
            )

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return {"input_ids": self.input_ids[i], "labels": self.labels[i]}


@dataclass
class DataCollatorForSupervisedDataset:
    """Pad a micro-batch on the right: {input_ids, labels, attention_mask}, LongTensors (batch, longest).

    The mask goes by length, so a padding id that also stands inside a row does no harm.
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
        }


def flatten(instances):
    """Join a micro-batch into one row without padding; logits are asked for only where there is a target.

    Position ids restart with every example, which is what keeps the examples apart in transformers' masks: an
    attention_mask, even of ones, would undo it. Position i predicts token i + 1, so lengths 3 and 2 with the labels
    [-100, 5, 6] and [-100, 7] give position_ids [[0, 1, 2, 0, 1]], logits_to_keep [0, 1, 3], targets [[5, 6, 7]].
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
    }


@dataclass
class FlatCollator:
    """Micro-batches as one flat row, or padded where `padded` says so; `rows` tells which records are inside."""

    right_padding: DataCollatorForSupervisedDataset
    padded: bool = False

    def __call__(self, instances):
        batch = self.right_padding(instances) if self.padded else flatten(instances)
        return {**batch, "rows": torch.tensor([instance["row"] for instance in instances])}


class FilledDataset(Dataset):
    """A dataset filled to a multiple of the global batch with rows of one token and no target.

    Without it DDP repeats records and engines disagree at the end of an epoch; with it every record is trained
    exactly once per epoch on every engine. Items carry their number as `row`.
    """

    def __init__(self, dataset, multiple, token_id):
        self.dataset = dataset
        self.num_filled = -len(dataset) % multiple
        self.filler = {"input_ids": torch.tensor([token_id]), "labels": torch.tensor([IGNORE_INDEX])}

    def __len__(self):
        return len(self.dataset) + self.num_filled

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return {**(self.dataset[i] if i < len(self.dataset) else self.filler), "row": i}


def make_supervised_data_module(tokenizer, data_args) -> dict:
    """The data arguments of a Trainer: {train_dataset, eval_dataset, data_collator}."""
    if not data_args.data_path:
        raise UserError("--data_path is missing: name one or more JSON or JSON Lines files")
    dataset = SupervisedDataset(data_args.data_path, tokenizer, getattr(data_args, "skip_bad_records", False))
    return {
        "train_dataset": dataset,
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


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
            with utils.gathered([embedding.weight]), torch.no_grad():
                embedding.weight[first : len(tokenizer)] = embedding.weight[:first].mean(dim=0, keepdim=True)


def load_model(model_args, args, config, tokenizer):
    """The base model with fp32 master weights and with special ids that are the tokenizer's.

    Under FSDP one process of a node reads the weights; the others make room for them, and accelerate sends each its
    shards from the first process while it wraps the model.
    """
    dtype = getattr(torch, model_args.dtype)  # transformers 5 would take the files' fp16 and train in it
    if args.fsdp and args.fsdp_config["cpu_ram_efficient_loading"] and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        model = utils.empty_model(config, dtype)
    else:
        model = utils.load_weights(model_args.model_name_or_path, config, dtype, args.cache_dir)
    changed = utils.repair_ids(model, tokenizer)
    if changed:
        say(f"config: {', '.join(changed)}")
    if args.pad_token == "add" and tokenizer.pad_token in (None, tokenizer.unk_token):
        smart_tokenizer_and_embedding_resize({"pad_token": DEFAULT_PAD_TOKEN}, tokenizer, model)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The Trainer: every step looked at, every checkpoint whole, signals heard
# ---------------------------------------------------------------------------------------------------------------------


class SFTTrainer(Trainer):
    """The Trainer with FSDP on CPU as well, and with a look at every optimizer step before anything is saved."""

    def __init__(self, *arguments, **keywords):
        self.step_rows, self.step_losses, self.step_targets = [], [], 0
        self.num_applied = self.num_skipped = self.skipped_in_a_row = 0
        super().__init__(*arguments, **keywords)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled and self.args.use_cpu and self.args.world_size > 1:
            utils.enable_fsdp2_on_cpu(self)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.step_rows.append(inputs.pop("rows"))
        if torch.is_tensor(num_items_in_batch):  # FSDP would round a float to 16 bits: 1986 targets to 1984
            num_items_in_batch = num_items_in_batch.long()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_losses.append(loss.detach())
        self.step_targets = num_items_in_batch
        return loss

    def log(self, logs, start_time=None):
        if "loss" in logs:  # one optimizer step: see RunCallback.on_step_end
            self.check_step(logs)
            logs["num_targets"] = int(self.step_targets or 0)
            self.step_rows.clear(), self.step_losses.clear()
        super().log(logs, start_time)

    def count_steps_of(self, state):
        """Take over the counts of applied and skipped steps from the state of the checkpoint resumed from."""
        skipped = [entry.get("skipped_steps", 0) for entry in state.log_history if "loss" in entry]
        self.num_skipped = max(skipped, default=0)
        self.num_applied = state.global_step - self.num_skipped
        self.skipped_in_a_row = len(list(itertools.takewhile(bool, reversed(skipped))))

    def check_step(self, logs):
        """Stop the run at a step that went wrong; a step that fp16's loss scaling skipped is counted instead."""
        loss, norm = logs["loss"], logs.get("grad_norm")
        skipped = self.accelerator.optimizer_step_was_skipped
        self.num_skipped, self.num_applied = self.num_skipped + skipped, self.num_applied + (not skipped)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        if skipped:
            logs["skipped_steps"] = self.num_skipped
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise UserError(
                f"step {self.state.global_step}: {self.skipped_in_a_row} steps in a row overflowed in fp16 and were "
                f"skipped; use --bf16 True or a lower --learning_rate; {self.last_checkpoint()}"
            )
        no_norm = norm is not None and not math.isfinite(norm)
        if math.isfinite(loss) and not (no_norm and not skipped) and not (loss == 0 and (norm == 0 or no_norm)):
            return
        if all(torch.isfinite(loss) for loss in self.step_losses):
            time.sleep(1)  # let the process whose records did it speak
        sources, num_rows = self.train_dataset.dataset.sources, len(self.train_dataset.dataset)
        names = [sources[row] for rows in self.step_rows for row in rows.tolist() if row < num_rows]
        raise UserError(
            f"step {self.state.global_step}: the loss is {loss} and the gradient norm {norm}; "
            f"records of process {self.args.process_index}: {', '.join(names) or 'none'}; {self.dtypes}; "
            f"{self.last_checkpoint()}; look at these records with --dry_run, or lower --learning_rate"
        )

    def last_checkpoint(self):
        whole = find_checkpoints(self.args.output_dir)[0]
        return f"last good checkpoint: {whole[-1]}" if whole else "no checkpoint was written yet"


class AlreadyTrained(Exception):
    """Leaves the Trainer's loop when the checkpoint resumed from is that of the last step."""


class RunCallback(TrainerCallback):
    """What happens around the steps: proofs before the first, signals between them, markers behind checkpoints."""

    def __init__(self, trainer, run):
        self.trainer, self.run, self.began, self.signal, self.handlers = trainer, run, False, 0, {}
        # The Trainer deletes an old checkpoint before the new one is known to be whole; on_save does it after.
        self.num_kept, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, self.began = self.trainer, True
        utils.check_engine(trainer)
        reason, compute = utils.probe(trainer)
        if args.label_smoothing_factor or args.use_liger_kernel:  # both compute the loss from all logits
            reason = reason or "label smoothing and Liger kernels need all logits"
        if reason and not trainer.data_collator.padded:
            say(f"micro-batches are padded on the right: {reason}")
            trainer.data_collator.padded = True
        trainer.dtypes = utils.measured_dtypes(trainer, compute)
        say(utils.start_line(trainer, state.max_steps))
        trainer.count_steps_of(state)
        utils.replay_cpu_adam(trainer)
        if args.save_rehearsal:
            rehearse_save(trainer)
        if args.should_save and args.overwrite_output_dir:  # not before: what there was is kept until this run works
            utils.delete_run(args.output_dir)
            utils.write_json(self.run, Path(args.output_dir, "run.json"))
        if args.should_save:  # not before: where the rehearsal fails, no step is trained anew
            utils.unmark_checkpoints_after(state.global_step, args.output_dir)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: so do we
                self.handlers[number] = signal.signal(number, self.note_signal)  # until restore_signals
        if state.global_step and args.resume_anyway:  # the checkpoint brings the schedule of its own learning rate
            utils.use_learning_rate(trainer)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # resumed behind the last step: the Trainer would train one more
            raise AlreadyTrained
        # group_by_length draws from the global generator, which differs between processes and after resuming.
        batches = kwargs["train_dataloader"].batch_sampler
        sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
        if isinstance(sampler, LengthGroupedSampler):
            epoch = state.global_step // (len(self.trainer.train_dataset) // utils.global_batch(args))
            sampler.generator = torch.Generator().manual_seed(args.seed + epoch)

    def note_signal(self, number, frame):
        self.signal = number
        if utils.rank() == 0:  # not print(): the signal may have come in the middle of one
            os.write(2, f"{signal.Signals(number).name}: saving a checkpoint after this step, then exit 143\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = True  # every step is looked at, before it can be saved
        stop = torch.tensor(int(self.signal), device=args.device)
        if args.world_size > 1:  # one process may have heard the signal before the others
            torch.distributed.all_reduce(stop, op=torch.distributed.ReduceOp.MAX)
        if stop:
            self.signal = int(stop)
            control.should_save = control.should_training_stop = True
            args.save_only_model = False  # the same command is to go on from this checkpoint

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            utils.mark_checkpoint(folder, step=state.global_step, resumable=not args.save_only_model)
            for old in find_checkpoints(args.output_dir)[0][: -self.num_kept] if self.num_kept else []:
                if str(old) != str(state.best_model_checkpoint):
                    utils.delete_checkpoint(old)
        self.trainer.accelerator.wait_for_everyone()

    def restore_signals(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


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
            speed = done * utils.global_batch(args) / seconds
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
        if sys.stderr.isatty():
            print(f"\r{line}\x1b[K", end="\n" if step == state.max_steps else "", file=sys.stderr, flush=True)
        elif step % self.every == 0 or step == state.max_steps or "skipped_steps" in logs:
            print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def safe_save_model_for_hf_trainer(trainer, output_dir):
    """Gather the trained weights on the first process's CPU and write the model, verified; returns its files."""
    weights = utils.gather_weights(trainer, utils.save_dtype(trainer.args))
    return utils.from_first_process(utils.write_model, trainer, weights, output_dir)


def rehearse_save(trainer):
    """Save the untrained model through the real engine and remove it: a save that fails must fail now."""
    start, folder = time.perf_counter(), Path(trainer.args.output_dir, ".rehearsal")
    safe_save_model_for_hf_trainer(trainer, folder)
    if trainer.args.should_save:
        size = utils.weights_size(folder) / GIB
        shutil.rmtree(folder)
        say(f"save rehearsed: {size:.2f} GiB written, read back and removed in {time.perf_counter() - start:.1f} s")


# ---------------------------------------------------------------------------------------------------------------------
# The story
# ---------------------------------------------------------------------------------------------------------------------


def train():
    """Parse the command line, prepare the data, train, and write the model; see the module's docstring."""
    transformers.utils.logging.set_verbosity_error()  # the libraries speak of errors only
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if utils.rank() != 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model_args, data_args, args, given = parse_arguments(sys.argv[1:])
    if args.eval_strategy != "no":
        raise UserError(f"--eval_strategy {args.eval_strategy.value}: there is no data to evaluate on; leave it out")
    transformers.set_seed(args.seed)  # before the model: new rows must be equal on all processes
    config = utils.load_config(model_args.model_name_or_path, args.cache_dir)
    tokenizer = utils.load_tokenizer(model_args.model_name_or_path, args.model_max_length, args.cache_dir)
    module = make_supervised_data_module(tokenizer, data_args)
    dataset = module["train_dataset"]
    if args.dry_run:
        if utils.rank() == 0:
            print(utils.show_examples(dataset, tokenizer, args.dry_run, sys.stdout.isatty()))
            print(utils.summarize(dataset, args))
        return
    hashes = {path: utils.sha256_of(path) for path in data_args.data_path}
    settings = utils.settings_of(args, model_args, [hashes[path] for path in data_args.data_path])
    model_path = model_args.model_name_or_path
    finished, checkpoint = utils.from_first_process(utils.open_output, args, settings, model_path)
    if finished:
        return
    if checkpoint and not os.path.isdir(checkpoint):
        raise UserError(f"{checkpoint} is not on this node; to resume, --output_dir must be where all nodes see it")
    bones = utils.skeleton(config)
    num_params, steps = sum(p.numel() for p in bones.parameters()), utils.num_steps(len(dataset), args)
    utils.fix_layer_class(args, bones)
    utils.check_positions(bones, max(map(len, dataset.input_ids)))
    if config.get_text_config() is config and not getattr(config, "layerdrop", 0):  # each step trains all parameters
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)  # None would look for others, and warn
    os.makedirs(args.output_dir, exist_ok=True)
    utils.check_needs(args, model_args.dtype, num_params, steps)
    filled = FilledDataset(dataset, utils.global_batch(args), tokenizer.eos_token_id)
    say(f"data: {filled.num_filled} rows without targets fill the last global batch of {utils.global_batch(args)}")
    run = utils.started_run(args, given, settings, hashes, filled)
    if utils.rank() == 0 and not args.overwrite_output_dir:
        utils.write_json(run, Path(args.output_dir, "run.json"))
    model = load_model(model_args, args, config, tokenizer)
    try:
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=filled,
            data_collator=FlatCollator(module["data_collator"], padded=args.padded),
            processing_class=tokenizer,
        )
    except LIBRARY_ERRORS as error:  # options that the Trainer refuses, in its own words
        raise UserError(" ".join(str(error).split())) from None
    del model, bones
    gc.collect()
    watch = RunCallback(trainer, run)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(watch)
    trainer.add_callback(ProgressLine())
    try:
        with contextlib.suppress(AlreadyTrained):
            trainer.train(resume_from_checkpoint=checkpoint)
        if watch.signal:
            say(f"stopped at step {trainer.state.global_step}; the same command goes on from there")
            sys.exit(128 + signal.SIGTERM)
        if trainer.num_applied == 0:
            raise UserError(f"none of {trainer.num_skipped} steps was applied, all overflowed in fp16; use --bf16 True")
        finish(trainer, run)
    except UserError:
        raise
    except Exception as error:  # of the libraries that make optimizer and schedule, or write checkpoints
        if isinstance(error, LIBRARY_ERRORS) and not watch.began:
            raise UserError(" ".join(str(error).split())) from None
        if not utils.is_disk_full(error):
            raise
        what = utils.first_line(error)
        raise UserError(
            f"{args.output_dir}: cannot be written ({what}); make room; {trainer.last_checkpoint()}"
        ) from None
    finally:
        watch.restore_signals()


def finish(trainer, run):
    """Write the model, loss.csv and the finished run.json; say where they are."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    names = safe_save_model_for_hf_trainer(trainer, args.output_dir)
    if not args.should_save:
        return
    utils.write_loss_csv(trainer.state.log_history, folder / "loss.csv")
    run["status"], run["results"] = "finished", utils.results_of(trainer)
    run["files"] = [*names, "loss.csv"]
    utils.write_json(run, folder / "run.json")
    size = f"{utils.weights_size(folder) / GIB:.2f} GiB {utils.save_dtype(args)}".replace("torch.", "")
    print(f"{folder}: model saved ({size}), last loss {run['results']['last_loss']:.4f}", flush=True)


if __name__ == "__main__":
    utils.run_main(train)
