"""Attention example by example: the examples' own, bit for bit, forwards and backwards, on the CPU and as on a GPU."""

import json

import pytest
import torch
import transformers

from transformers.loss.loss_utils import ForCausalLMLoss

import engines
import train
from train import flatten

engines.register_attention()
LENGTHS = [7, 1, 12, 3]
HEADS, GROUPS, SIZE = 4, 2, 8


class Layer(torch.nn.Module):
    """As much of an attention layer as transformers' functions look at."""

    num_key_value_groups, is_causal = HEADS // GROUPS, True


def row():
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def by_hand(query, key, value):
    """Softmax attention of each example, written out: (1, tokens, heads, size)."""
    out, start = [], 0
    for length in LENGTHS:
        q, k, v = (tensor[0, :, start : start + length] for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(HEADS // GROUPS, dim=0) for tensor in (k, v))
        later = torch.ones(length, length).triu(1).bool()
        weights = (q @ k.transpose(1, 2) / SIZE**0.5).masked_fill(later, -torch.inf).softmax(-1)
        out.append((weights @ v).transpose(0, 1))
        start += length
    return torch.cat(out)[None]


def reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What torch's varlen attention computes for rows (tokens, heads, size) of any lengths."""
    assert query.shape == key.shape == value.shape and window_size == (-1, 0) and scale == SIZE**-0.5
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == max_k == max(LENGTHS)
    out = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        out.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_it_is_softmax_attention_of_each_example(kernel, monkeypatch):
    monkeypatch.setattr(engines, "varlen_attn", reference_varlen)
    monkeypatch.setattr(engines, "takes_varlen", lambda query, dropout: kernel == "varlen")
    tensors = row()
    options = {"scaling": SIZE**-0.5, **engines.borders(LENGTHS)}
    found, _ = engines.attend_by_example(Layer(), *tensors, None, **options)
    wanted = by_hand(*tensors)
    assert found.shape == (1, sum(LENGTHS), HEADS, SIZE) and torch.allclose(found, wanted, atol=1e-6)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weights).sum(), tensors) for out in (found, wanted)]
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_an_example_depends_on_another(dtype):
    tensors = [tensor.to(dtype) for tensor in row()]
    last = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
    other = [tensor.detach() * 3 for tensor in tensors]
    for one, two in zip(tensors, other, strict=True):
        two[:, :, last] = one[:, :, last].detach()
    found = [engines.attend_by_example(Layer(), *row, None, **engines.borders(LENGTHS))[0] for row in (tensors, other)]
    assert torch.equal(found[0][:, last], found[1][:, last]) and not torch.equal(*found)
    gradients = torch.autograd.grad(found[0][:, last].float().sum(), tensors)
    assert all(not g[:, :, : last.start].any() and not g[:, :, last.stop :].any() for g in gradients)


def test_the_varlen_kernel_is_used_where_it_exists():
    """On a CPU it never is; elsewhere for half precision, heads of up to 256, no dropout."""
    assert not engines.takes_varlen(torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), 0.0)


def model_of(**more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def instances():
    torch.manual_seed(1)
    rows = [torch.randint(3, 100, (length,)) for length in (9, 5, 14)]
    return [{"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < 3, -100, ids)} for ids in rows]


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("way", ["plain", "checkpointing", "compiled", "dropout"])
def test_loss_and_gradients_are_those_of_the_mask_and_of_padding(way):
    model = model_of()
    if (
        way == "dropout"
    ):  # which has the kernel of its own; both are drawn anew, so that only the shapes can be compared
        model = model_of(attention_dropout=0.5)
    if way == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    flat = flatten(instances())
    padded = train.DataCollatorForSupervisedDataset(type("Tokenizer", (), {"pad_token_id": 0}))(instances())
    wanted = [loss_and_gradients(model, batch) for batch in (flat, padded)]  # by transformers' own mask
    model.set_attn_implementation(engines.BY_EXAMPLE)
    run = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    found = loss_and_gradients(run, flat)[0], {name: p.grad for name, p in model.named_parameters()}
    for loss, gradients in wanted:
        if way == "dropout":
            assert torch.isfinite(found[0]) and found[0] != loss
            continue
        assert torch.allclose(found[0], loss, atol=1e-6)
        assert all(torch.allclose(found[1][name], gradients[name], atol=1e-6) for name in gradients)


def test_on_a_cpu_16_bit_numbers_have_few_shapes(monkeypatch):
    """Examples are filled up where nothing looks, and so are rows: for each new shape oneDNN keeps megabytes."""
    seen, sdpa = set(), engines.sdpa_attention_forward

    def look(module, query, *arguments, **options):
        seen.add(query.shape[2])
        return sdpa(module, query, *arguments, **options)

    monkeypatch.setattr(engines, "sdpa_attention_forward", look)
    options = {"scaling": SIZE**-0.5, **engines.borders(LENGTHS)}
    found, _ = engines.attend_by_example(Layer(), *(tensor.bfloat16() for tensor in row()), None, **options)
    assert seen == {engines.SHAPE} and torch.allclose(found.float(), by_hand(*row()), atol=0.03)
    seen.clear()
    engines.attend_by_example(Layer(), *row(), None, **options)
    assert seen == set(LENGTHS)


def test_what_fills_a_row_changes_no_loss():
    model, plain, filled = model_of(), flatten(instances()), flatten(instances(), 32)
    model.set_attn_implementation(engines.BY_EXAMPLE)
    assert plain["input_ids"].shape == (1, 28) and flatten(instances(), 4)["input_ids"].shape == (1, 28)
    assert filled["input_ids"].shape == (1, 32) and filled["position_ids"][0, 27:].tolist() == [13, 0, 1, 2, 3]
    assert filled["cu_seq_lens_q"].tolist() == [0, 9, 14, 28, 32] and torch.equal(filled["labels"], plain["labels"])
    (one, before), (two, after) = (loss_and_gradients(model, batch) for batch in (plain, filled))
    assert torch.allclose(one, two, atol=1e-6)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [None, 37, torch.tensor(37)])
def test_the_loss_in_parts_is_that_of_the_library(dtype, count, monkeypatch):
    monkeypatch.setattr(engines, "AT_ONCE", 7)
    torch.manual_seed(0)
    numbers, targets = torch.randn(1, 20, 50) * 4, torch.randint(50, (1, 20))
    found = []
    for function in (ForCausalLMLoss, engines.flat_loss):
        logits = numbers.to(dtype).requires_grad_()
        loss = function(logits, targets, 50, num_items_in_batch=count, shift_labels=targets)
        (1024 * loss).backward()  # as fp16's loss scaling does
        assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
        found.append((loss.detach(), logits.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=torch.finfo(dtype).eps)
    assert engines.flat_loss(numbers, targets, 50) == ForCausalLMLoss(numbers, targets, 50)  # padded: not shifted yet


def test_the_usual_loss_alone_is_replaced():
    args = train.TrainingArguments(output_dir="none", lora_r=2, use_cpu=True)
    whole, inner, other = model_of(), model_of(), model_of()
    other.loss_function = print
    adapted = train.add_adapters(inner, args)
    for model in (whole, adapted, other):
        engines.use_flat_loss(model)
    assert whole.loss_function is inner.loss_function is engines.flat_loss and other.loss_function is print


def test_rows_with_padding_keep_their_mask():
    model, ids = model_of().eval(), torch.randint(3, 100, (2, 9))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    wanted = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation(engines.BY_EXAMPLE)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, wanted)


def test_a_saved_model_does_not_name_it(tmp_path):
    model = model_of()
    model.set_attn_implementation(engines.BY_EXAMPLE)
    model.save_pretrained(tmp_path)
    assert engines.BY_EXAMPLE not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
