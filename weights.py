"""Tensors from file to file, in blocks, into a new folder: what convert_llama_weights.py and apply_delta.py share.

safetensors, torch and zipfile say what a file holds and whether it is whole; a tensor is a view of the mapped file, of
which blocks of rows are copied, so memory does not depend on the model. No library writes safetensors in a stream.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import mmap
import operator
import os
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

import utils
from utils import UserError, say

BLOCK, SYNC = 2 * 2**20, 32 * 2**20  # bytes that are read at once; that may wait in the page cache
DTYPES = {  # name: (safetensors' name, bytes, bits of the exponent: all set means infinite or no number)
    "float64": ("F64", 8, 0x7FF0000000000000), "float32": ("F32", 4, 0x7F800000), "float16": ("F16", 2, 0x7C00),
    "bfloat16": ("BF16", 2, 0x7F80), "int64": ("I64", 8, 0), "int32": ("I32", 4, 0), "int16": ("I16", 2, 0),
    "int8": ("I8", 1, 0), "uint8": ("U8", 1, 0), "bool": ("BOOL", 1, 0),
}  # fmt: skip
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
MAX_PICKLE = 100 * 2**20  # bytes of a list of tensors: enough for a million
SHARD_SIZE = 5 * 10**9  # bytes, as transformers has it
AGAIN = "copy or download it again"
STAMP = operator.attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")  # changes when somebody writes to a file
REWRITE = "rewrite it with python -c \"import torch; torch.save(torch.load('OLD', 'cpu', weights_only=True), 'NEW')\""


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a WeightFile: `bits` are unsigned integers in the mapped file, `offset` bytes from its start."""

    file: "WeightFile"
    name: str
    dtype: str
    offset: int
    bits: np.ndarray

    shape = property(lambda self: self.bits.shape)
    nbytes = property(lambda self: self.bits.nbytes)

    def __len__(self):
        """The rows; a number counts as one."""
        return len(np.atleast_1d(self.bits))

    def read(self, start=0, stop=None):
        """Rows `start` to `stop` as unsigned integers, copied; torch.from_numpy(block).view(dtype) sees numbers."""
        self.file.check_unchanged()  # to read what somebody has cut off a mapped file ends the process
        rows = np.atleast_1d(self.bits)[start:stop]
        if not rows.flags.c_contiguous or not rows.size:  # rows that lie apart, as a transposed matrix has them
            return np.array(rows, order="C")
        block, place = np.empty(rows.shape, rows.dtype), self.offset + start * rows.strides[0]
        rest = memoryview(block).cast("B")
        while count := len(rest) and os.preadv(self.file.file.fileno(), [rest], place):
            rest, place = rest[count:], place + count
        if len(rest):
            raise self.file.error(f"ends within tensor {self.name}; damaged, or cut while it was read")
        return block


class WeightFile:
    """One .safetensors file, or one zip of torch.save (.pth, .bin): `tensors` is {name: StoredTensor}.

    Raises UserError for what is truncated, damaged, of another kind, or a pickle that asks for more than tensors.
    """

    def __init__(self, path):
        self.path, self.tensors, self.records = Path(path), {}, {}  # of a zip: {first byte of its data: ZipInfo}
        try:
            self.file = open(path, "rb")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        self.stamp, head = STAMP(os.stat(path)), self.file.read(64)
        is_zip, is_safetensors = head.startswith(b"PK"), self.path.suffix == ".safetensors" and head[8:9] == b"{"
        if not is_zip and not is_safetensors:
            is_old, is_page = head.startswith(b"\x80\x02\x8a\n"), head.lstrip()[:1] in (b"<", b"{", b"A")
            kinds = {
                f"the file is empty; {AGAIN}": not head,
                "a git-lfs pointer, not the file itself; run git lfs pull in its folder": head[:13] == b"version https",
                "a web page or an error message, not weights; download it again": is_page,
                f"no safetensors file; {AGAIN}": self.path.suffix == ".safetensors",
                f"the format of torch before 1.6, which cannot be read in parts; {REWRITE}": is_old,
                f"no zip of torch.save (damaged, or of another program); if torch can load it, {REWRITE}": True,
            }
            raise self.error(next(kind for kind, fits in kinds.items() if fits))
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, dtype, offset, shape, *strides in self._list_zip() if is_zip else self._list_safetensors():
            if dtype not in DTYPES:
                raise self.error(f"tensor {name} is {dtype}, which is not supported")
            bits = np.ndarray(shape, f"<u{DTYPES[dtype][1]}", self.map, offset, *strides)
            self.tensors[name] = StoredTensor(self, name, dtype, offset, bits)
        self.has_checksums = any(entry.CRC for entry in self.records.values())  # torch can be told to write zeros
        if is_zip and not self.has_checksums:
            say(f"{path}: it was written without checksums; damage cannot be noticed")

    def error(self, what):
        return UserError(f"{self.path}: {what}")

    def check_unchanged(self):
        if STAMP(os.stat(self.path)) != self.stamp:
            raise self.error("somebody wrote to it while it was read; try again when it is whole")

    def _list_safetensors(self):
        """(name, dtype, first byte, shape) of each tensor: https://huggingface.co/docs/safetensors."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "numpy"):  # it refuses a header that does not describe every byte once
                end = 8 + int.from_bytes(self.map[:8], "little")
        except SafetensorError as error:
            what = utils.first_line(error).removeprefix("Error while deserializing header: ")
            raise self.error(f"truncated or damaged: {what}; {AGAIN}") from None
        names = {theirs: dtype for dtype, (theirs, *_) in DTYPES.items()}
        for name, entry in json.loads(self.map[8:end], object_pairs_hook=list):
            if name in self.tensors:  # safetensors would take the last
                raise self.error(f"damaged: {name} stands twice in its header; {AGAIN}")
            if name != "__metadata__":
                entry = dict(entry)
                yield name, names.get(entry["dtype"], entry["dtype"]), end + entry["data_offsets"][0], entry["shape"]

    def _list_zip(self):
        """(name, dtype, first byte, shape, strides in bytes) of each tensor."""
        try:
            entries = zipfile.ZipFile(self.file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
            what = f"truncated: it has {len(self.map):,} bytes and lacks the table of contents that ends such a file"
            raise self.error(f"{what}; {AGAIN}") from None
        for entry in entries:
            start = entry.header_offset + 30  # and the lengths of the name and the extra field, which end its header
            start += sum(int.from_bytes(self.map[i : i + 2], "little") for i in (start - 4, start - 2))
            if entry.compress_type or entry.flag_bits & 0x61 or start + entry.file_size > len(self.map):
                raise self.error(f"damaged: record {entry.filename}; {AGAIN}")
            self.records[start] = entry
        places = {entry.filename.partition("/")[2]: start for start, entry in self.records.items()}
        if "data.pkl" not in places or self.records[places["data.pkl"]].file_size > MAX_PICKLE:
            raise self.error(f"a zip, but none of torch.save: {REWRITE}")
        if (at := places.get("byteorder")) and self.map[at : at + 6] != b"little":
            raise self.error(f"its numbers are big-endian: {REWRITE}")
        for name, tensor in self._load_meta().items():
            storage, size = tensor.untyped_storage(), tensor.itemsize
            start = getattr(storage, "_checkpoint_offset", None)  # of its data in the file, as torch reckons it
            if start not in self.records:
                raise self.error(f"tensor {name} has no record where torch looks for it; {REWRITE}")
            if storage.nbytes() > self.records[start].file_size:
                raise self.error(f"damaged: tensor {name} {list(tensor.shape)} reaches past its record; {AGAIN}")
            offset, strides = start + tensor.storage_offset() * size, [stride * size for stride in tensor.stride()]
            yield name, str(tensor.dtype)[6:], offset, tensor.shape, strides

    def _load_meta(self):
        """{name: tensor on the meta device} of a state dict of torch.save, whose data are not read."""
        import torch

        try:
            found = torch.load(self.path, map_location="meta", weights_only=True)  # which runs no code of the pickle
        except Exception as error:  # a damaged pickle can fail in any way
            what = f"damaged: its list of tensors cannot be read; {AGAIN}"
            if asked := re.search(r"GLOBAL (\S+)", str(error)):
                what = f"its pickle asks for {asked[1]}, which no weights need; nothing of it was run; get the weights "
                what += "as safetensors, or from somebody you trust"
            raise self.error(what) from None
        if isinstance(found, dict) and len(found) == 1 and isinstance(next(iter(found.values())), dict):
            found = next(iter(found.values()))  # {"model": {...}}
        if not isinstance(found, dict):
            raise self.error(f"holds no dict of tensors; {REWRITE}")
        for name, tensor in found.items():
            if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided):
                raise self.error(f"entry {name!r} is no tensor, so this is no file of weights")
        return found

    def damage(self, archive):
        """What is wrong where the CRC-32 of a record is, as words; None where all are right."""
        try:
            bad = archive.testzip()
        except (ValueError, EOFError, RuntimeError):  # of a header, or because `checksums` has given up
            return f"damaged: a record has another header than the table of contents says; {AGAIN}"
        if bad:
            first, size = next((at, entry.file_size) for at, entry in self.records.items() if entry.filename == bad)
            names = [tensor.name for tensor in self.tensors.values() if 0 <= tensor.offset - first < size]
            what = f"tensor {', '.join(names[:3])}" if names else "what describes its tensors"
            return f"damaged: the CRC-32 of {what} is wrong; {AGAIN}"


def open_weights(path):
    """{name: StoredTensor} of a file or a model folder; safetensors go before .bin, as in transformers."""
    path = index = Path(path)
    if path.is_dir():
        index = next((path / name for name in utils.WEIGHTS if (path / name).is_file()), None)
    if index is None:
        stray = sorted(file.name for kind in ("*.safetensors", "*.bin") for file in path.glob(kind))
        hint = f"; it holds {stray[0]}, but no index names it" if stray else places_below(path)
        raise UserError(f"{path}: no weights there: neither model.safetensors nor pytorch_model.bin nor an index{hint}")
    if index.suffix != ".json":
        return WeightFile(index).tensors
    try:
        places = utils.jload(index)["weight_map"]
        names = sorted(set(places.values()))
        outside = [name for name in names if Path(name).name != name or name in ("", "..")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: not an index of weights; {AGAIN}") from None
    if outside:
        raise UserError(f"{index}: names {outside[0]}, which is not a file beside it; refused")
    if absent := [name for name in names if not (path / name).is_file()]:
        raise UserError(f"{path}: {len(absent)} of {len(names)} files of weights are missing, first {absent[0]}")
    found = {name: WeightFile(path / name).tensors for name in names}
    for name, tensors in found.items():
        wanted = {tensor for tensor, file in places.items() if file == name}
        if wrong := sorted(wanted ^ set(tensors)):
            what = "lacks" if wrong[0] in wanted else "holds, against its index,"
            raise UserError(f"{path / name}: it {what} tensor {wrong[0]} (of {len(wrong)}); copy the folder again")
    return {tensor: found[name][tensor] for tensor, name in places.items()}


def places_below(folder):
    """Words that name the folder meant where weights or adapters are below `folder`."""
    meant = utils.last_inside(folder, *utils.WEIGHTS, *ADAPTERS)
    return f"; {meant} has some, give that folder" if meant else ""


@contextlib.contextmanager
def checksums(tensors):
    """While the block runs, threads compare every CRC-32 in the files of StoredTensors, once. Raises UserError."""
    parts = []  # two of each file
    for file in dict.fromkeys(tensor.file for tensor in tensors if tensor.file.has_checksums):
        for half in range(2):
            parts.append((file, zipfile.ZipFile(open(file.path, "rb"))))
            parts[-1][1].filelist = parts[-1][1].filelist[half::2]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        checks = [(file, threads.submit(file.damage, archive)) for file, archive in parts]
        try:
            yield
            concurrent.futures.wait([check for _, check in checks])
            check_unchanged(tensors)
            for file, check in checks:
                if what := check.result():
                    raise file.error(what)
        finally:
            for _, archive in parts:
                archive.fp.close()  # so that a thread at it gives up


def check_unchanged(tensors):
    """Refuse files of StoredTensors that somebody has written to since they were opened."""
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        file.check_unchanged()


def plan_size(plan):
    """Bytes of all tensors of a plan {name: (dtype, shape)}."""
    return sum(math.prod(shape) * DTYPES[dtype][1] for dtype, shape in plan.values())


def row_blocks(shape, dtype, multiple=1, block=None):
    """(start, stop) of blocks of at most `block` bytes, but of `multiple` rows or a multiple of these, save the last."""
    rows, row_bytes = (shape[0] if shape else 1), math.prod(shape[1:]) * DTYPES[dtype][1]  # a number counts as one row
    step = max((block or BLOCK) // max(row_bytes, 1) // multiple, 1) * multiple
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def check_finite(block, dtype, where, advice="the weights are damaged"):
    """Raise UserError, naming `where`, for bits that stand for an infinite value or for no number (NaN)."""
    exponent, size = DTYPES[dtype][2], block.itemsize
    # As integers with a sign the numbers above 0 are ordered like themselves, those below 0 without one: two maxima
    # tell, in a third of the time of a mask and without its memory.
    sides = (int(block.view(f"i{size}").max()), int(block.max()) - 2 ** (8 * size - 1)) if block.size else (-1,)
    if exponent and max(sides) >= exponent:
        raise UserError(f"{where}: holds values that are not finite (infinite or NaN); {advice}")


def ahead(items):
    """The items of a generator, the next of which a thread computes while the caller works on one."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item


def split_plan(plan, max_shard_size=SHARD_SIZE):
    """A plan as files of at most `max_shard_size` bytes: {file name: plan}; a larger tensor has a file of its own."""
    shards, size = [{}], 0
    for name, entry in plan.items():
        size += (own := plan_size({name: entry}))
        if shards[-1] and size > max_shard_size:
            shards, size = [*shards, {}], own
        shards[-1][name] = entry
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def weight_file_names(plan, max_shard_size=SHARD_SIZE):
    """The names of the files that a WeightWriter writes for a plan."""
    files = list(split_plan(plan, max_shard_size))
    return files + ["model.safetensors.index.json"] * (len(files) > 1)


class BlockWriter(contextlib.AbstractContextManager):
    """Writes tensors where files have room for them: `places` is {key: (path, first byte, end)}.

    Tensors may come by turns, the rows of each in order. What is not on the disk at the end, `new_folder` puts there.
    """

    def __init__(self, places):
        self.files = {path: open(path, "r+b", buffering=0) for path in {path for path, _, _ in places.values()}}
        self.places = {key: [self.files[path], first, end] for key, (path, first, end) in places.items()}
        self.syncer, self.unsynced = concurrent.futures.ThreadPoolExecutor(1), 0
        self.syncing = self.syncer.submit(int)  # nothing yet

    def append(self, key, block):
        """Write the next rows of a tensor, an array of its bits or anything else of the right bytes."""
        file, position, end = self.places[key]
        data = memoryview(block).cast("B") if getattr(block, "size", 1) else b""
        assert position + len(data) <= end, f"{key}: more bytes than planned"
        self.places[key][1] += len(data)
        self.unsynced += len(data)
        while len(data):
            written = os.pwrite(file.fileno(), data, position)
            data, position = data[written:], position + written
        if self.unsynced >= SYNC:  # the disk works while the next blocks come, and the page cache stays small
            self.syncing.result()  # the system tells a failed write once: no later fsync would hear of it
            self.syncing, self.unsynced = self.syncer.submit(self._sync_and_forget, file.fileno()), 0

    def _sync_and_forget(self, number):
        os.fdatasync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)

    def __exit__(self, kind, error, trace):
        self.syncer.shutdown()
        if kind is None:
            short = [key for key, (_, position, end) in self.places.items() if position != end]
            assert not short, f"{short[0]}: fewer bytes than planned"
            self.syncing.result()
        for file in self.files.values():
            file.close()


class WeightWriter(BlockWriter):
    """Writes a plan {name: (dtype, shape)} as safetensors: one file, or shards with their index."""

    def __init__(self, folder, plan, max_shard_size=SHARD_SIZE):
        shards, places = split_plan(plan, max_shard_size), {}
        for file, shard in shards.items():
            header, end = {"__metadata__": {"format": "pt"}}, 0
            # Wide elements go first, so that every tensor starts at a multiple of its element's size.
            for name, (dtype, shape) in sorted(shard.items(), key=lambda item: -DTYPES[item[1][0]][1]):
                first, end = end, end + plan_size({name: (dtype, shape)})
                header[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [first, end]}
            text = json.dumps(header, separators=(",", ":")).encode("utf-8")
            text += b" " * (-len(text) % 8)
            (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
            for name in shard:
                places[name] = (folder / file, *(8 + len(text) + n for n in header[name]["data_offsets"]))
        if len(shards) > 1:
            files = {name: file for file, shard in shards.items() for name in shard}
            index = {"metadata": {"total_size": plan_size(plan)}, "weight_map": files}
            utils.jdump(index, folder / "model.safetensors.index.json", indent=2)
        super().__init__(places)


def same_place(one, other):
    """Whether two paths lead to one folder or file: through links, case, or weights that are hard links of others."""
    one, other = Path(one).resolve(), Path(other).resolve()
    if not (one.exists() and other.exists()):
        return one == other
    files = [list(path.iterdir()) if path.is_dir() else [path] for path in (one, other)]
    kinds = (".safetensors", ".bin", ".pth", ".pt")  # a tokenizer or a licence that both share does no harm
    found = [{(f.stat().st_dev, f.stat().st_ino) for f in some if f.suffix in kinds and f.is_file()} for some in files]
    return one.samefile(other) or not found[0].isdisjoint(found[1])


def check_output(target, inputs=(), overwrite=False, writes=(), option="--output_dir"):
    """Refuse an output folder that exists with something in it, is a file, or is one of `inputs`; see `new_folder`."""
    target, same = Path(target), [path for path in inputs if same_place(target, path)]
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    kinds = ("model*.safetensors", "pytorch_model*.bin", "*.index.json", "consolidated.*.pth")
    stale = sorted(path.name for kind in kinds for path in target.glob(kind) if path.name not in writes)
    way = "choose another folder, or give --overwrite, which replaces only files of the names that are written"
    problems = [
        (same, f"the same place as {same[:1] and same[0]}; choose another folder"),
        (target.is_symlink() and not target.exists(), "a link to a place which does not exist; remove the link"),
        (target.exists() and not target.is_dir(), "a file of that name exists; choose another folder"),
        (os.path.ismount(target), "where a disk is mounted, which cannot be renamed; give a folder inside it"),
        (there and not overwrite, f"exists and holds {', '.join(there[:3])}{', ...' * (len(there) > 3)}; {way}"),
        (stale, f"holds {', '.join(stale[:1])}, which might be loaded instead of the new weights; remove it"),
    ]
    if problem := next((problem for is_so, problem in problems if is_so), None):
        raise UserError(f"{option} {target}: {problem}")


@contextlib.contextmanager
def new_folder(target, size, inputs=(), overwrite=False, writes=(), option="--output_dir"):
    """Yield a hidden folder beside `target` that takes its name, synced, when the block ends well; else it is removed.

    `size` bytes will be written; for the others see `check_output`. What a killed run left behind is named and removed.
    """

    def stop(number, frame):
        say(f"stopped by {signal.Signals(number).name}; nothing is left of this run")
        raise SystemExit(128 + number)

    check_output(target, inputs, overwrite, writes, option)
    final = Path(target).resolve()
    hidden = final.with_name(f".{final.name}.unfinished")
    try:
        there = sorted(hidden.iterdir()) if hidden.exists() else []
        if there and not (hidden / utils.LOCK).exists():
            raise UserError(f"{hidden}: holds {there[0].name}, which no run of ours left behind; move that folder away")
        lock = utils.claim_folder(hidden, target)
    except OSError as error:
        raise UserError(f"{option} {target}: {error.strerror}; choose another folder") from None
    if sizes := [path.stat().st_size for path in hidden.rglob("*") if path.is_file() and path.name != utils.LOCK]:
        say(f"{hidden}: left by a run that did not finish ({len(sizes)} files, {sum(sizes) / 1e9:.2f} GB); removed")
    stopping = utils.on_signals(stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        with lock, stopping, utils.hidden_folder(hidden, final):
            if size > (free := shutil.disk_usage(hidden).free):
                what = f"{size / 1e9:.2f} GB will be written and {free / 1e9:.2f} GB are free"
                raise UserError(f"{option} {target}: {what}; make room, or choose a folder on another disk")
            yield hidden
    except OSError as error:
        if not utils.is_disk_full(error):
            raise
        what = f"{error.strerror} ({size / 1e9:.2f} GB are needed); nothing is left of this run"
        raise UserError(f"{option} {target}: {what}; make room, then give the same command again") from None


@contextlib.contextmanager
def meter(what, total):
    """tqdm's bar on a terminal; when the block has ended well one line, with GB/s."""
    begin = time.monotonic()
    with tqdm(None, what, total, leave=False, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        yield bar
    seconds = max(time.monotonic() - begin, 1e-6)
    say(f"{what}: {total / 1e9:.2f} GB, {total / seconds / 1e9:.2f} GB/s, {seconds:.0f} s")


def find_model(name, patterns=("*.json", "*.safetensors", "*.bin", "*tokenizer*"), option="the model"):
    """The folder or file of that name, or one on the hub: files that match `patterns`, no .bin beside safetensors."""
    if Path(name).exists():
        return Path(name)
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(f"{option} {name}: no such folder")
    import huggingface_hub

    try:
        unwanted = []
        with contextlib.suppress(Exception):  # without network, what is in the cache is taken
            unwanted = ["*.bin"] * any(file.endswith(".safetensors") for file in huggingface_hub.list_repo_files(name))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=unwanted))
    except Exception as error:  # no network, no such name, no permission: the library has a dozen exceptions
        why = utils.first_line(error)
        raise UserError(f"{option} {name}: no such folder here, and from the hub it cannot be had ({why})") from None
