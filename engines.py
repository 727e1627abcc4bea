"""train.py's chapter on where it runs: devices, launchers, FSDP and DeepSpeed, what they need, and proofs of them."""

import contextlib
import ctypes
import inspect
import io
import itertools
import math
import os
import re

import accelerate
import torch
import transformers
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from utils import UserError, first_line, free_host_memory, read_json, refuse_all, say, size_of, skeleton


def fit_device(args):
    """Drop, with a line, what this device cannot honour; a command for a cluster can be rehearsed on a laptop."""
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to find out
        hold_memory(args)
    if args.tf32 and (args.use_cpu or not transformers.utils.is_torch_tf32_available()):
        say("--tf32 needs a GPU of the Ampere generation or newer; ignored here")
        args.tf32 = None
    if args.fp16 and args.use_cpu and not args.deepspeed:
        say("--fp16 needs a GPU, or --deepspeed; computing in float32 here")
        args.fp16 = False
    if args.fp16 and not args.deepspeed and args.optim == "adamw_torch_fused":
        args.optim = "adamw_torch"  # the fused one skips overflowed steps itself and tells nobody
    if args.bf16 and not args.use_cpu and not transformers.utils.is_torch_bf16_gpu_available():
        raise UserError("--bf16 needs a GPU of the Ampere generation or newer; use --fp16 True here")


def hold_memory(args):
    """Let a CPU's memory be used again, and not grow with every new shape.

    glibc would map tensors above 32 MB anew each time, and their pages be zeroed: where weights have gradients, a step
    of 32 examples takes 12 % less without. oneDNN would keep what it compiles for the last 1,024 shapes, 0.5 GB or more.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # read at its first use
    if not args.lora_r:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no allocation is mapped by itself
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check_launcher(args):
    """Plain `python` runs one process on one device: refuse or say what needs a launcher, never DataParallel."""
    for engine, option in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed)):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" and not option:
            raise UserError(f"the launcher asks for {engine} and the options do not; give --{engine.lower()} here")
    if "WORLD_SIZE" in os.environ:
        return
    devices = 0 if args.use_cpu else torch.cuda.device_count()
    command = f"torchrun --standalone --nproc_per_node={devices or 2} train.py ..."
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():  # on a CPU it starts one process for all
        raise UserError(f"accelerate launch has started one process in place of several; use {command}")
    if args.fsdp or args.deepspeed:
        raise UserError(f"--{'fsdp' if args.fsdp else 'deepspeed'} needs a launcher: {command}")
    if devices > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        say(f"using GPU {visible} of {devices}; for all of them: {command}")


# The keys of --fsdp_config, without "fsdp_": those that FSDP2 heeds, those that only FSDP1 did, accelerate's names.
FSDP_KEYS = {"activation_checkpointing", "auto_wrap_policy", "cpu_offload", "cpu_ram_efficient_loading", "version"}
FSDP_KEYS |= {"min_num_params", "reshard_after_forward", "state_dict_type", "transformer_layer_cls_to_wrap"}
FSDP1_KEYS = {"backward_prefetch", "forward_prefetch", "limit_all_gathers", "sync_module_states", "use_orig_params"}
FSDP1_KEYS |= {"xla", "xla_fsdp_grad_ckpt", "xla_fsdp_v2"}
FSDP_NAMES = {"offload_params": "cpu_offload", "sharding_strategy": "reshard_after_forward"}
RESHARD = {"TRUE": True, "FULL_SHARD": True, "1": True, "FALSE": False, "SHARD_GRAD_OP": False, "2": False}


def configure_fsdp(args):
    """Turn the words of --fsdp into FSDP2's settings; what the user wrote in --fsdp_config wins."""
    words, config = args.fsdp.lower().split() if isinstance(args.fsdp, str) else [], args.fsdp_config or {}
    if not {"full_shard", "shard_grad_op", "auto_wrap", "offload", "true"}.issuperset(words):
        raise UserError(f"--fsdp {args.fsdp}: choose from full_shard, shard_grad_op, auto_wrap, offload")
    if isinstance(config, str):
        name, text = ("--fsdp_config", config) if config.lstrip().startswith("{") else (config, None)
        config = read_json(name, text, "; --fsdp_config takes JSON or its file")
    config = {FSDP_NAMES.get(key.removeprefix("fsdp_"), key.removeprefix("fsdp_")): config[key] for key in config}
    if unknown := sorted(config.keys() - FSDP_KEYS - FSDP1_KEYS):
        raise UserError(f"--fsdp_config: unknown key {unknown[0]}; those that exist: {', '.join(sorted(FSDP_KEYS))}")
    if dropped := sorted(config.keys() & FSDP1_KEYS):
        say(f"--fsdp_config: {', '.join(dropped)}: of FSDP1, without meaning in FSDP2; ignored")
        config = {key: config[key] for key in config if key not in dropped}
    if str(config.get("version", 2)) != "2":
        raise UserError("--fsdp_config: there is FSDP2 only; leave version out")
    strategy = str(config.get("reshard_after_forward", "shard_grad_op" not in words)).upper()
    if strategy not in RESHARD:
        what = f"{strategy} is not there in FSDP2; choose FULL_SHARD, SHARD_GRAD_OP or no --fsdp"
        raise UserError(f"--fsdp_config: {what}")
    # RAM-efficient loading: one full copy of the weights per node.
    config = {"cpu_offload": "offload" in words, "cpu_ram_efficient_loading": True} | config
    config["reshard_after_forward"] = RESHARD[strategy]
    if size := int(config.get("min_num_params") or 0):
        config = {"auto_wrap_policy": "SIZE_BASED_WRAP"} | config | {"min_num_params": size}
    if args.gradient_checkpointing:  # FSDP's own form saves the Trainer's extra gather in the backward pass
        config, args.gradient_checkpointing = {"activation_checkpointing": True} | config, False
    args.fsdp, args.fsdp_config = True, config
    # accelerate reads these when the process group is made: with them CPU tensors get a gloo group beside NCCL.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")


def configure_deepspeed(args):
    """Read --deepspeed, a path or a dict, and complete it; see `complete_ds_config`."""
    try:
        import deepspeed
    except ImportError:
        raise UserError("--deepspeed needs the package: pip install deepspeed; or use --fsdp") from None
    deepspeed.utils.logger.setLevel("ERROR")
    given, is_file = args.deepspeed, isinstance(args.deepspeed, str)
    path, config = given if is_file else "DeepSpeed configuration", read_json(given) if is_file else given
    config, notices = complete_ds_config(config)
    for notice in notices:
        say(f"{path}: {notice}")
    if config["zero_optimization"].get("stage") not in (1, 2, 3):
        raise UserError(f"{path}: its zero_optimization has no stage 1, 2 or 3; ds_config.json is a whole one")
    for name in ("fp16", "bf16"):
        if config[name].get("enabled") is True and not getattr(args, name):
            say(f"{path}: it asks for {name}, as --{name} True does")
            setattr(args, name, True)
    if args.fp16 and args.bf16:
        raise UserError(f"{path}: fp16 and bf16 are both asked for; keep one of them")
    if args.fp16 and args.use_cpu and not deepspeed.get_accelerator().is_fp16_supported():  # DeepSpeed would refuse
        say("fp16 under DeepSpeed needs a GPU, or a CPU that computes in fp16; computing in float32 here")
        args.fp16, config["fp16"] = False, config["fp16"] | {"enabled": "auto"}
    args.deepspeed = config


def complete_ds_config(config):
    """Fill in what a DeepSpeed JSON of 2023 leaves out. Returns (config, notices); `config` itself is not changed."""
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",  # without it any accumulation fails an assertion
        "gradient_clipping": "auto",  # without it accelerate clips at 1.0 whatever --max_grad_norm says
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},  # without it --bf16 trains in float32
    }
    added, zero = [key for key in auto if key not in config], dict(config.get("zero_optimization") or {})
    notices = [f'added {", ".join(added)} as "auto"'] if added else []
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        notices.append("set stage3_gather_16bit_weights_on_model_save, without which no model would be saved")
    blocks = [key for key in ("optimizer", "scheduler") if key in config]
    notices += [f"its {key} block takes the place of the options" for key in blocks]
    return auto | config | {"zero_optimization": zero}, notices


def configure_groups(args):
    """What can be set only after the Trainer's arguments have made the process group and accelerate's settings."""
    if args.fsdp and (args.bf16 or args.fp16) and args.fsdp_plugin_args["fsdp_version"] == 2:
        half = torch.bfloat16 if args.bf16 else torch.float16
        policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy  # accelerate's own would round the loss as well
    if args.deepspeed and args.use_cpu:
        import deepspeed  # it must adopt torch's gloo group before from_pretrained partitions the model

        with contextlib.redirect_stdout(io.StringIO()):  # every process would say that it built an operator
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def engine_name(args):
    """The engine that the arguments ask for: single process, DDP, FSDP, ZeRO-2 or ZeRO-3, and " with offload"."""
    if args.deepspeed:
        zero = args.deepspeed["zero_optimization"]
        devices = [(zero.get(f"offload_{part}") or {}).get("device", "none") for part in ("optimizer", "param")]
        return f"ZeRO-{zero.get('stage', 0)}" + " with offload" * (devices != ["none", "none"])
    if args.fsdp:
        return "FSDP" + " with offload" * bool(args.fsdp_config["cpu_offload"])
    return "DDP" if args.world_size > 1 else "single process"


def global_batch(args):
    """Examples per optimizer step, over all processes and accumulated micro-batches."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def num_steps(num_examples, args):
    """Optimizer steps of the run."""
    a_pass = -(-num_examples // global_batch(args))  # an epoch; its last batch may be filled
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * a_pass)


def save_dtype(args):
    """The dtype of the final model: --save_dtype, else what the run computes in; of adapters that of the masters."""
    chosen = getattr(args, "save_dtype", None) or ("float32" if getattr(args, "lora_r", 0) else None)
    return getattr(torch, chosen or ("bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"))


# --- LoRA and QLoRA --------------------------------------------------------------------------------------------------


def check_adapter_options(args, dtype):
    """Refuse what does not go with LoRA; `dtype` is that of the frozen weights."""
    engine, way = engine_name(args), "with several devices give --lora_r with --fsdp and without --load_in_4bit"
    wrong = {
        f"--load_in_4bit: {engine} would compute with wrong weights; {way}": args.load_in_4bit
        and (args.fsdp or args.deepspeed),
        "--gradient_checkpointing_kwargs use_reentrant: adapters would get no gradient; leave it out": (
            args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        ),
        "--pad_token add: gives the model a row that adapters do not hold; leave it out": args.pad_token == "add",
        f"--dtype {dtype}: adapters in float32 need --bf16 True or --fp16 True with it": (
            dtype != "float32" and not (args.bf16 or args.fp16)
        ),
        f"--lora_r {args.lora_r}: it must be at least 1": args.lora_r < 1,
        f"--lora_alpha {args.lora_alpha:g}: it must be more than 0": args.lora_alpha <= 0,
        f"--lora_dropout {args.lora_dropout:g}: it must be at least 0 and below 1": not 0 <= args.lora_dropout < 1,
    }
    refuse_all(wrong)


def in_4bit(args):
    """What from_pretrained takes to load a model's linear layers in NF4 with double quantisation, the head's apart."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("--load_in_4bit needs the package: pip install bitsandbytes; or leave it out") from None
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **kind)
    return {"quantization_config": config, "device_map": None if args.use_cpu else {"": args.device}}


def check_4bit(model):
    """Refuse widths that bitsandbytes gets wrong on a CPU: its blocks of 64 values may not span two rows there."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 64:
            what = f"{name} is {list(module.weight.shape)}, whose width is no multiple of 64"
            raise UserError(f"--load_in_4bit on a CPU: {what}; it needs a GPU, or leave the option out")


def count_parameters(model):
    """(how many parameters are trained, how many are not) of a model on any engine."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        packed = 2 if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8 else 1  # two a byte
        sizes[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel() * packed)
    return sizes[True], sizes[False]


NF4_BYTES = 0.516  # a weight: 4 bits, one of 8 bits for every 64, one of 32 for every 16,384 (QLoRA, section 3)


def count_run(args, dtype, model):
    """(parameters trained, all of them, bytes of those that are not) of a run; `model` is its model without weights.

    `dtype` is that of what is not trained; with --load_in_4bit linear layers but the last have NF4_BYTES a weight.
    """
    (trained, frozen), head = count_parameters(model), model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head)
    quantised = {id(module.weight): module.weight.numel() for module in linear if not module.weight.requires_grad}
    in_4bit = sum(quantised.values()) if args.load_in_4bit else 0
    return trained, trained + frozen, (frozen - in_4bit) * getattr(torch, dtype).itemsize + in_4bit * NF4_BYTES


def gather_adapters(trainer, dtype):
    """All that is trained beside frozen weights, by peft's names: {name: CPU tensor of `dtype`} on the first process.

    On the others it is {}; nothing that is frozen is gathered. The names are the parameters' own, without what FSDP's
    checkpointing, torch.compile and peft itself put between.
    """
    model, weights = trainer.accelerator.unwrap_model(trainer.model_wrapped), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # peft has both names of what is tied
        if parameter.requires_grad:
            whole = parameter
            if hasattr(trainer.model_wrapped, "zero_optimization_stage"):
                from deepspeed.utils import safe_get_full_fp32_param  # of the masters

                whole = safe_get_full_fp32_param(parameter)
            elif hasattr(parameter, "full_tensor"):
                whole = parameter.to(trainer.args.device).full_tensor()
            if trainer.args.should_save:
                name = re.sub(r"\.(_checkpoint_wrapped_module|modules_to_save\.default|default)(?=\.|$)", "", name)
                weights[name.removeprefix("_orig_mod.")] = whole.detach().to("cpu", dtype, copy=True).contiguous()
    return weights


# --- Before weights are loaded: will it run, and does it fit? --------------------------------------------------------

ENGINE_OPTIONS = {
    "FSDP": '--fsdp "full_shard auto_wrap"', "FSDP with offload": '--fsdp "full_shard auto_wrap offload"',
    "ZeRO-2 with offload": "--deepspeed examples/ds_zero2.json", "ZeRO-3 with offload": "--deepspeed ds_config.json",
}  # fmt: skip


def check_layers(args, model, longest):
    """Refuse an FSDP layer class that the model lacks (case aside), and rows longer than its table of positions."""
    wanted = (args.fsdp_config or {}).get("transformer_layer_cls_to_wrap") or []
    classes = {type(module).__name__.lower(): type(module).__name__ for module in model.modules()}
    for i, name in enumerate(wanted):
        wanted[i] = classes.get(name.lower())
        if wanted[i] is None:
            lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
            layers = ", ".join(sorted({type(layer).__name__ for layers in lists for layer in layers}))
            raise UserError(f"FSDP layer class {name} is not in this model; it has {layers}; or leave the option out")
        if wanted[i] != name:
            say(f"FSDP layer class {name} is {wanted[i]} in this model")
    if wanted and "transformer_cls_names_to_wrap" in args.fsdp_plugin_args:
        args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(wanted)
    for name, module in model.named_modules():  # learned positions, as GPT-2 and OPT have them
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions"):
            rows = module.num_embeddings - getattr(module, "offset", 0)
            what = f"rows of up to {longest} tokens, but this model has {rows} positions"
            if longest > rows:
                raise UserError(f"{what}; give --model_max_length {rows}")
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > trained:
        say(f"warning: rows of up to {longest} tokens, where this model was made for {trained} positions")


def memory_needs(num_params, weight_bytes, half, adam, world_size, local_world_size, frozen=0):
    """Lower bounds in bytes: {engine: (on each device, on each host)} for weights, gradients and AdamW's two moments.

    `weight_bytes` is the size of a master weight, `half` whether ZeRO computes in 16 bits, `frozen` the bytes of the
    weights beside the `num_params` that are trained. Sources: the ZeRO paper,
    section 3.1 (16 bytes a parameter for mixed precision Adam), and one full copy per node while FSDP loads.
    """
    share, states = local_world_size / world_size, 2 * weight_bytes + 8 * adam
    work, rest = 2 if half else 4, 4 + 8 * adam  # ZeRO's working weights; its masters with the moments
    needs = {
        "single process": (states, 0), "DDP": (states, 0),
        "FSDP": (states / world_size, weight_bytes), "FSDP with offload": (0, max(states * share, weight_bytes)),
        "ZeRO-2": (work + (work + rest) / world_size, 0), "ZeRO-2 with offload": (work, rest * share),
        "ZeRO-3": ((2 * work + rest) / world_size, 0), "ZeRO-3 with offload": (0, (2 * work + rest) * share),
    }  # fmt: skip
    parts = {  # of what is frozen
        "single process": (1, 0), "DDP": (1, 0), "FSDP": (1 / world_size, 1), "FSDP with offload": (0, 1),
        "ZeRO-2": (1, 0), "ZeRO-2 with offload": (1, 0), "ZeRO-3": (1 / world_size, 0), "ZeRO-3 with offload": (0, share),
    }  # fmt: skip
    return {
        name: tuple(num_params * size + frozen * part for size, part in zip(needs[name], parts[name], strict=True))
        for name in needs
    }


def memory_problem(engine, needs, local_world_size, host_free, device_free=None):
    """Why `engine` cannot fit, with the options of those that do, or ""; `device_free` is None on a machine of CPUs."""

    def lack(name):
        device, host = needs[name]
        if device_free is None:
            device, host = 0, host + device * local_world_size
        if device > (device_free or 0):
            return f"{size_of(device)} on each GPU, where {size_of(device_free)} are free"
        return f"{size_of(host)} of host memory, where {size_of(host_free)} are free" * (host > host_free)

    if engine not in needs or not lack(engine):
        return ""
    fits = [option for name, option in ENGINE_OPTIONS.items() if not lack(name)]
    advice = f"what fits here: {' or '.join(fits)}" if fits else "no engine fits here: more devices, or a smaller model"
    return f"{engine} needs {lack(engine)}, for weights, gradients and optimizer; {advice}"


def needs_here(args, dtype, counts):
    """`memory_needs` of this run, given its `count_run`, and how many processes a host has; `dtype` is of its masters."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    half, adam = args.fp16 or args.bf16, args.optim.value in ("adamw_torch", "adamw_torch_fused")
    size, (trained, _, frozen) = 4 if args.lora_r else getattr(torch, dtype).itemsize, counts
    return memory_needs(trained, size, half, adam, args.world_size, local, frozen), local


def check_memory(args, dtype, counts):
    """Refuse a run whose weights, gradients and optimizer alone do not fit; `dtype` is of the weights."""
    needs, local = needs_here(args, dtype, counts)
    device_free = None if args.use_cpu else torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else math.inf
    if problem := memory_problem(engine_name(args), needs, local, free_host_memory(), device_free):
        anyway = "to try all the same: --memory_check False"
        lora = "" if args.lora_r else ", or --lora_r 16, which trains adapters alone"
        raise UserError(f"{counts[1] / 1e9:.2f} billion parameters: {problem}{lora}; {anyway}")


# --- The model on its engine: loading, proofs, resuming, saving -------------------------------------------------------


def empty_model(config, dtype):
    """The model with room for its weights on the host, not filled: the system gives no memory until it is written."""
    with accelerate.init_empty_weights():  # buffers, which no file holds, get their values
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu", dtype=dtype)))
    model.tie_weights()
    return model


def enable_fsdp2_on_cpu(trainer):
    """Open accelerate's gate that lets FSDP run on a CPU; used only there.

    AcceleratorState silently runs DDP on CPU processes, though all behind that gate is device neutral. So its state
    gets what it would have written. A test says when this is no longer needed.
    """
    plugin = accelerate.FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    if trainer.accelerator.state.mixed_precision != "no":
        plugin.set_mixed_precision(trainer.accelerator.state.mixed_precision)
    if isinstance(plugin.cpu_offload, torch.distributed.fsdp.CPUOffloadPolicy):
        plugin.cpu_offload = torch.distributed.fsdp.CPUOffloadPolicy(pin_memory=False)  # pinning needs an accelerator
    states = accelerate.state.AcceleratorState._shared_state, accelerate.state.PartialState._shared_state
    for shared in states:
        shared["distributed_type"] = accelerate.utils.DistributedType.FSDP
    states[0]["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True


def gathered(parameters):
    """A context in which partitioned (ZeRO-3) parameters are whole and rank 0's changes reach all ranks."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
    return torch.no_grad()


# --- Attention, example by example, and the proof that a model takes it ----------------------------------------------

BY_EXAMPLE = "by_example"  # our name among transformers' attention functions
BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # transformers' names, for its own too
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # of torch before 2.10
    varlen_attn = None
HAS_VARLEN = varlen_attn is not None and {"window_size", "scale"} <= inspect.signature(varlen_attn).parameters.keys()


# Of 16-bit numbers on a CPU: for each new shape oneDNN compiles kernels and keeps them, megabytes, for good.
SHAPE = 32  # a multiple of it, in tokens


def borders(lengths):
    """Where the examples of a flat row begin and end, given their lengths: a part of the batch, by BORDERS' names."""
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return dict(zip(BORDERS, (ends, ends, max(lengths), max(lengths)), strict=True))


def takes_varlen(query, dropout):
    """Whether torch's varlen attention can be used: FlashAttention's kernel, which needs half precision and Ampere."""
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    is_ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return HAS_VARLEN and fits and is_ampere and not dropout  # torch 2.10's has other arguments


@torch.compiler.disable  # the lengths are numbers of Python's
def attend_in_turn(module, query, key, value, ends, **options):
    """SDPA over each example; `ends` are the borders. Shapes as in `attend_by_example`."""
    lengths, results = ends.diff().tolist(), []  # once: a GPU is waited for
    multiple = SHAPE if query.device.type == "cpu" and query.dtype != torch.float32 else 1
    for length, *part in zip(lengths, *(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        if short := -length % multiple:  # behind the example, where nothing of it looks
            part = [torch.nn.functional.pad(tensor, (0, 0, 0, short)) for tensor in part]
        results.append(sdpa_attention_forward(module, *part, None, **options)[0][:, :length])
    return torch.cat(results, dim=1)


def attend_by_example(
    module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, dropout=0.0, **options
):
    """Causal attention within each example of a flat row, without a mask: its cost grows with the examples' number.

    query is (1, heads, tokens, size), key and value the same with as many heads or fewer; cu_seq_lens_q (examples + 1,)
    are the borders. Returns ((1, tokens, heads, size), None). What has no borders is SDPA's as ever.
    """
    if cu_seq_lens_q is None or len(cu_seq_lens_q) == 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, **options)
    if torch.is_autocast_enabled(query.device.type):  # under which rotary positions leave float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if not takes_varlen(query, dropout):
        return attend_in_turn(module, query, key, value, cu_seq_lens_q, dropout=dropout, **options), None
    groups = query.shape[1] // key.shape[1]
    rows = [tensor[0].transpose(0, 1) for tensor in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    shape = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(*rows, *shape, scale=options.get("scaling"), window_size=(-1, 0))[None], None  # (-1, 0): causal


def mask_by_example(*arguments, attention_mask=None, **keywords):
    """The mask that goes with `attend_by_example`: none, but for rows with padding."""
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **keywords)


def register_attention():
    """Make BY_EXAMPLE known to transformers."""
    transformers.AttentionInterface.register(BY_EXAMPLE, attend_by_example)
    AttentionMaskInterface.register(BY_EXAMPLE, mask_by_example)


class CrossEntropy(torch.autograd.Function):
    """The loss of each target, (targets,), by logits (targets, vocabulary) and ids (targets,), in float32.

    It is taken some targets at a time: beside the logits only their gradient is ever whole, in their dtype. PyTorch's
    holds three in float32, at 32,000 ids 380 kB a target.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        sums = [part.float().logsumexp(1) for part in logits.split(AT_ONCE)]
        ctx.save_for_backward(logits, targets, sums := torch.cat(sums))
        return sums - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx, gradient):
        logits, targets, sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        split = (tensor.split(AT_ONCE) for tensor in (result, logits, targets, sums[:, None], gradient[:, None]))
        for place, part, ids, total, factor in zip(*split, strict=True):
            part = torch.sub(part, total).exp_()  # the softmax, in float32 as the sums are
            part[torch.arange(len(ids), device=ids.device), ids] -= 1
            place.copy_(part.mul_(factor))
        return result, None


AT_ONCE = 128  # targets: 16 MB at 32,000 ids


def flat_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **more):
    """transformers' loss of a causal language model, of flat rows by `CrossEntropy`: all their `shift_labels` count."""
    if shift_labels is None:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **more)
    losses = CrossEntropy.apply(logits.view(-1, vocab_size), shift_labels.view(-1))
    return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)


def use_flat_loss(model):
    """Let `model`, or the one inside its adapters, take `flat_loss`, where its loss is transformers' usual one."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if getattr(base, "loss_function", None) is ForCausalLMLoss:
        base.loss_function = flat_loss


@contextlib.contextmanager
def asked_attention(name):
    """Within the block, what an attention function that was asked for cannot do becomes a UserError."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"--attn_implementation {name}: {first_line(error)}; leave it out, or give sdpa or eager")


def set_attention(config, name):
    """Let the model that is made from `config` use one of transformers' attention functions."""
    with asked_attention(name):
        config._attn_implementation = name
        skeleton(config)


def logits_and_gradient(model, ids, length, **more):
    """(the logits of the last example's last tokens, the gradient of their squares by all embeddings of a row).

    `length` is the example's; the gradient is (1, tokens, size), both are in float32. No parameter gets a gradient: an
    engine has nothing to reduce.
    """
    leaves = []

    def cut(module, inputs, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        keep = torch.arange(ids.shape[1] - min(length, 64), ids.shape[1], device=ids.device)
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep, **more).logits.float()
            (gradient,) = torch.autograd.grad(logits.square().sum(), leaves[0])
    finally:
        hook.remove()
    return logits.detach(), gradient.float()


def flat_row(lengths, with_borders, device):
    """The arguments of a model's forward, beside the ids, for a flat row of examples of these lengths."""
    positions = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device)}
    more = borders(lengths) if with_borders else {}
    return positions | {key: value.to(device) if torch.is_tensor(value) else value for key, value in more.items()}


def is_apart(model, ids, count, with_borders, dtypes):
    """Whether the last of `count` examples of a flat row moves by no bit with the others, and is as it is alone."""
    length = ids.shape[1] // count
    other = torch.cat([(ids[:, :-length] + 5) % ids.max(), ids[:, -length:]], dim=1)
    more = flat_row([length] * count, with_borders, ids.device) | {"use_cache": False}
    more["logits_to_keep"] = torch.arange((count - 1) * length, count * length, device=ids.device)
    one, two = (model(input_ids=row, **more).logits for row in (ids, other))
    if one.shape[1] != length:
        raise ValueError("it does not compute selected logits")
    alone = model(input_ids=ids[:, -length:], use_cache=False).logits.float()
    bound = 0.001 if dtypes[-1] == torch.float32 else 0.1  # Llama 4 scales attention by the place in the row
    is_same = not (one.float() - alone).norm() > bound * alone.norm()
    return is_same and torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def by_example_problem(model, ids, own, dtypes):
    """Why attention example by example is not this model's, or "". `ids` (1, tokens) is an example of the longest length.

    Alone it must give the very bits of the attention `own`; behind another one its logits and gradient must be the
    same but for rounding, and none of the gradient may be the other's.
    """
    length, both = ids.shape[1], torch.cat([ids[:, :8].flip(1), ids], dim=1)
    model.set_attn_implementation(own)
    alone, gradient = logits_and_gradient(model, ids, length)
    model.set_attn_implementation(BY_EXAMPLE)
    if model.config._attn_implementation != BY_EXAMPLE:
        return "it cannot be exchanged"
    again, _ = logits_and_gradient(model, ids, length, **flat_row([length], True, ids.device))
    if not torch.equal(alone, again):
        return f"it is more than causal over {length} tokens"
    row = flat_row([both.shape[1] - length, length], True, ids.device)
    behind, spread = logits_and_gradient(model, both, length, **row)
    bound = 0.01 if dtypes[-1] == torch.float32 else 0.1  # of what rounding may do to a norm
    pairs = ((behind, alone), (spread[:, -length:], gradient))
    if spread[:, :-length].any() or any((new - old).norm() > bound * old.norm() for new, old in pairs):
        return "an example in a flat row differs from the same alone"
    return ""


def reshard(model):
    """Give back what FSDP keeps whole for a backward pass, which a probe and an evaluation do not have."""
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.reshard()


@contextlib.contextmanager
def probing(trainer):
    """Within the block the wrapped model is in eval mode without gradients; yields the dtypes its output layer gave."""
    model, dtypes = trainer.model_wrapped, []
    training, head = model.training, trainer.accelerator.unwrap_model(model).get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    model.eval()
    try:
        with torch.no_grad():
            yield dtypes
    finally:
        hook.remove()
        model.train(training)
        reshard(model)


def choose_layout(trainer, longest):
    """How micro-batches are laid out, proven on the wrapped model at the width of the widest.

    `longest` is the length of the longest row in tokens. Flat rows must keep their examples apart: example by example
    where that is the model's attention, else by its own mask. Returns ("flat", "flat, masked" or "padded", the
    attention in words, the dtype that the output layer computed in). Raises UserError for a model in which a later
    token moves the logits of an earlier one.
    """
    model, args = trainer.accelerator.unwrap_model(trainer.model_wrapped), trainer.args
    model = getattr(model, "_orig_mod", model)  # of torch.compile; DDP and DeepSpeed wait for a backward pass of theirs
    own, count, whys = model.config._attn_implementation, max(args.per_device_train_batch_size, 2), []
    length = max(args.per_device_train_batch_size * longest // count, 8)
    ids = torch.arange(3, 3 + max(count * length, longest), device=args.device)[None]
    ids %= model.config.get_text_config().vocab_size
    register_attention()
    layouts = [("flat", BY_EXAMPLE), ("flat, masked", own)]
    if args.attn_implementation:
        layouts = [("flat" if "flash" in own else "flat, masked", own)]
    if args.label_smoothing_factor or args.use_liger_kernel:
        layouts, whys = [], ["label smoothing and Liger kernels need all logits"]
    with probing(trainer) as dtypes:
        later = torch.cat([ids[:, :4], ids[:, 4:8].flip(1)], dim=1)
        early, moved = (model(input_ids=row, use_cache=False).logits[:, :4].float() for row in (ids[:, :8], later))
        if not torch.equal(early, moved) and (early - moved).abs().max() > 0.02 * early.std():
            raise UserError("in this model earlier tokens see later ones: it is no causal language model; give one")
        if args.attn_implementation:
            with asked_attention(own), contextlib.suppress(TypeError):  # of a forward that selects no logits
                logits_and_gradient(model, ids[:, :8], 8)  # backwards too, which FlexAttention on a CPU lacks
        for layout, attention in [] if args.padded else layouts:
            try:
                model.set_attn_implementation(attention)
                why = by_example_problem(model, ids[:, :longest], own, dtypes) if attention == BY_EXAMPLE else ""
                if not why and not is_apart(model, ids[:, : count * length], count, layout == "flat", dtypes):
                    why = "in a flat row its examples see each other"
            except torch.OutOfMemoryError:
                raise
            except (TypeError, RuntimeError, IndexError, ValueError) as error:
                why = f"its forward takes no flat rows of {count * length} tokens ({first_line(error)})"
            if not why:
                words = "each example by itself" if attention == BY_EXAMPLE else ": ".join([f"{own}, masked", *whys])
                return layout, words, dtypes[-1]
            whys.append(why)
        model.set_attn_implementation(own)
    if not args.padded:
        say(f"micro-batches are padded on the right: {whys[-1]}")
    return "padded", f"{own}, masked", dtypes[-1]


def check_engine(args, model, compute, layout, max_steps):
    """Refuse another engine around `model` than was asked for; returns its dtypes in words, and a line on the run.

    `compute` is the dtype of the output layer, `layout` as in `choose_layout`. All processes call it.
    """
    parameters = list(model.parameters())
    last = [parameter for parameter in parameters if parameter.requires_grad][-1]  # ZeRO has no masters of others
    kinds = {"FSDP": torch.distributed.fsdp.FSDPModule, "DDP": torch.nn.parallel.DistributedDataParallel}
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    found = next((name for name, kind in kinds.items() if isinstance(inner, kind)), "single process")
    if hasattr(inner, "zero_optimization_stage"):  # its optimizer updates a copy
        from deepspeed.utils import safe_get_full_fp32_param

        found, last = f"ZeRO-{inner.zero_optimization_stage()}", safe_get_full_fp32_param(last)
    wanted, count = engine_name(args), args.world_size
    if found != wanted.removesuffix(" with offload"):
        raise UserError(f"{wanted} was asked for and {found} would run; check the versions against requirements.txt")
    weights = "/".join(sorted({str(parameter.dtype)[6:] for parameter in parameters}))
    dtypes = f"weights {weights}, masters {str(last.dtype)[6:]}, compute {str(compute)[6:]}"
    trained, frozen = count_parameters(model)
    total = trained + frozen
    shards = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]  # of ZeRO-3; FSDP2 has DTensors
    here = sum((shard.to_local() if hasattr(shard, "to_local") else shard).numel() for shard in shards)
    here = total if args.load_in_4bit else here  # whose tensors hold two parameters a byte
    return dtypes, (
        f"engine: {wanted}, {count} process{'es' * (count > 1)} on {args.device.type}, "
        f"{here:,} of {total:,} parameters here, {f'{trained:,} trained, ' * bool(frozen)}{dtypes}, "
        f"micro-batch {args.per_device_train_batch_size} {layout} x accumulation {args.gradient_accumulation_steps} "
        f"x processes {count} = global batch {global_batch(args)}, {max_steps:,} steps"
        + f"; a process that is lost is noticed within {args.ddp_timeout / 60:g} min (--ddp_timeout)"
        * (count > 1)
    )


def replay_cpu_adam(trainer):
    """Take DeepSpeed's CPU Adam, where a run resumes with it, through the steps of the checkpoint on a stand-in.

    Its bias correction is a product over the steps, in no checkpoint; a power in its place differs in the last bits.
    """
    optimizer = getattr(trainer.model_wrapped, "basic_optimizer", None)
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return
    steps = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
    groups, stand_in = optimizer.param_groups, torch.nn.Parameter(torch.zeros(1))
    stand_in.grad = torch.zeros(1)
    optimizer.param_groups = [groups[0] | {"params": [stand_in]}]
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups = groups
    optimizer.state.pop(stand_in, None)


def gather_weights(trainer, dtype):
    """The whole model, without tied tensors, as {name: CPU tensor of `dtype`} on the first process, {} elsewhere."""
    model, weights = trainer.accelerator.unwrap_model(trainer.model_wrapped), {}
    if hasattr(trainer.model_wrapped, "zero_optimization_stage") and dtype != next(model.parameters()).dtype:
        from deepspeed.utils import safe_get_full_fp32_param  # the masters; the model itself is in 16 bits

        for name, parameter in model.named_parameters():
            trained = parameter.requires_grad  # what is frozen has no master
            with gathered([] if trained else [parameter]):
                whole = safe_get_full_fp32_param(parameter) if trained else parameter.detach()
                if trainer.args.should_save:
                    weights[name] = whole.to("cpu", dtype, copy=True)
        return weights
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    for name in list(state) if trainer.args.should_save else []:
        tensor = state.pop(name)  # so that host memory holds each tensor once
        if name not in tied:
            weights[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    return weights
