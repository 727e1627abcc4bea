"""The recipe of Stanford Alpaca in its plain form, on today's library: what the benchmarks and checks compare with.

Written anew from its description. Every text is tokenized by a call of its own, the joined texts and the prompts
separately; lengths are counted as the ids that are not padding; the labels are a deep copy of the ids with the
prompt masked; micro-batches are padded on the right with a mask made by the padding id; and the Trainer is the stock
one. Importable functions and nothing more.
"""

import copy

import peft
import torch
import transformers

IGNORE_INDEX = -100


def tokenize(texts, tokenizer):
    """Tokenize one text after the other. Returns ([LongTensor (length,)], [length in tokens without padding])."""
    ids = []
    for text in texts:
        limits = {"max_length": tokenizer.model_max_length, "truncation": True}
        ids.append(tokenizer(text, return_tensors="pt", padding="longest", **limits).input_ids[0])
    return ids, [int(row.ne(tokenizer.pad_token_id).sum()) for row in ids]


def preprocess(sources, targets, tokenizer):
    """Ids of source + target and labels without the source: {input_ids, labels}, lists of LongTensor (length,)."""
    input_ids, _ = tokenize([source + target for source, target in zip(sources, targets, strict=True)], tokenizer)
    _, source_lengths = tokenize(sources, tokenizer)
    labels = copy.deepcopy(input_ids)
    for row, length in zip(labels, source_lengths, strict=True):
        row[:length] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


class RowDataset(torch.utils.data.Dataset):
    """Rows of ids and labels: items {input_ids, labels}."""

    def __init__(self, input_ids, labels):
        self.input_ids, self.labels = input_ids, labels

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return {"input_ids": self.input_ids[i], "labels": self.labels[i]}


class PaddingCollator:
    """Pad a micro-batch to its longest row: {input_ids, labels, attention_mask}, tensors (batch, longest)."""

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, instances):
        def pad(key, value):
            rows = [instance[key] for instance in instances]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        input_ids = pad("input_ids", self.pad_token_id)
        mask = input_ids.ne(self.pad_token_id)
        return {"input_ids": input_ids, "labels": pad("labels", IGNORE_INDEX), "attention_mask": mask}


def make_trainer(model, options, rows, tokenizer, lora_r=0):
    """The stock Trainer over `rows`, with peft's LoRA on all linear layers where `lora_r` is given.

    `options` are those of transformers.TrainingArguments.
    """
    if lora_r:
        transformers.set_seed(options.get("seed", 42))
        config = peft.LoraConfig(r=lora_r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(use_cpu=not torch.accelerator.is_available(), **options),
        train_dataset=rows,
        data_collator=PaddingCollator(tokenizer.pad_token_id),
    )
