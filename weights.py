"""Tensors from file to file, in blocks: what convert_llama_weights.py and apply_delta.py share.

What convert_llama_weights.py and apply_delta.py share: tensors of any size go from file to file in blocks of BLOCK
bytes, so that memory does not depend on the model. numpy only; torch is imported where there is a pickle to read.

    with new_folder(target, size, inputs=[source], overwrite=False) as folder:     # hidden until the block ends well
        tensors = open_weights(find_model(source))       # {name: StoredTensor(file, name, dtype, shape, ...)}
        plan = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        with WeightWriter(folder, plan) as writer, Meter("copy", plan_size(plan)) as meter:
            for name, tensor in tensors.items():
                for start, stop in row_blocks(tensor.shape, tensor.dtype):
                    block = tensor.read(start, stop)     # its bits: uint16 for float16 and bfloat16, uint32 ...
                    check_finite(block, tensor.dtype, name)
                    writer.append(name, block)           # in order of rows; tensors in any order, even by turns
                    meter.add(block.nbytes)
        close_weights(tensors)                           # CRC-32 of every zip record, and: the files have not changed

`torch.from_numpy(block).view(torch.float16)` sees a block as numbers, without a copy. Every problem of a file is a
UserError that names file and tensor.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

from utils import (
    HELD_LOCKS,
    LOCK,
    UserError,
    claim_folder,
    first_line,
    hidden_folder,
    jdump,
    jload,
    on_signals,
    say,
    show_progress,
)

BLOCK = 2 * 2**20  # bytes
SYNC = 32 * 2**20  # bytes that may wait in the page cache
DTYPES = {  # name: (safetensors' name, bytes, bits of the exponent: all set means infinite or no number)
    "float64": ("F64", 8, 0x7FF0000000000000),
    "float32": ("F32", 4, 0x7F800000),
    "float16": ("F16", 2, 0x7C00),
    "bfloat16": ("BF16", 2, 0x7F80),
    "int64": ("I64", 8, 0),
    "int32": ("I32", 4, 0),
    "int16": ("I16", 2, 0),
    "int8": ("I8", 1, 0),
    "uint8": ("U8", 1, 0),
    "bool": ("BOOL", 1, 0),
}
MAX_HEADER = 100 * 2**20  # bytes of a safetensors header or of a pickle: enough for a million tensors
LEGACY_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6
SHARD_SIZE = 5 * 10**9  # bytes, as transformers has it
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a WeightFile: `offset` in bytes from the start of the file, `strides` in elements."""

    file: "WeightFile"
    name: str
    dtype: str
    shape: tuple
    strides: tuple
    offset: int

    @property
    def nbytes(self):
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    def read(self, start=0, stop=None):
        """Rows `start` to `stop` as an array of unsigned integers, (stop - start, *shape[1:]): the tensor's bits.

        A number counts as a tensor of one row and no more dimensions.
        """
        import numpy as np

        shape, strides = (self.shape, self.strides) if self.shape else ((1,), (1,))
        stop = shape[0] if stop is None else stop
        size = DTYPES[self.dtype][1]
        block = np.empty((stop - start, *shape[1:]), dtype=f"<u{size}")
        self.file.gather(block, self.offset + start * strides[0] * size, strides)
        return block


class WeightFile:
    """One .safetensors file, or one zip of torch.save (.pth, .bin), kept open: what was listed is what is read.

    `tensors` maps names to StoredTensor. Records of a zip have their CRC-32 checked as they are read, and what was not
    read in one go by `finish`. Pickles are read with torch's `weights_only`, so none can run code. Raises UserError
    for a file that is truncated, damaged or of another kind.
    """

    def __init__(self, path):
        self.path, self.tensors = Path(path), {}
        self.records = {}  # of a zip, by where their data starts: [size, CRC-32 wanted, bytes read, their CRC-32]
        self.starts = []  # the keys of `records`, sorted
        try:
            self.handle = open(path, "rb")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        self.status = os.fstat(self.handle.fileno())
        self.size = self.status.st_size
        head = self.handle.read(64)
        try:
            if head.startswith(b"PK"):
                self._list_zip()
            elif self.path.suffix == ".safetensors":
                self._list_safetensors(head)
            else:
                raise UserError(f"{path}: {_kind_of_file(head, self.path)}")
        except UserError:
            self.handle.close()
            raise

    def _list_safetensors(self, head):
        # Format: https://huggingface.co/docs/safetensors - 8 bytes of length, JSON, then the tensors without gaps.
        def unique(pairs):
            if len(dict(pairs)) != len(pairs):
                raise ValueError("a name stands twice in its header")
            return dict(pairs)

        length = int.from_bytes(head[:8], "little")
        if self.size < 8 or head[8:9] != b"{" or not 2 <= length <= MAX_HEADER:
            raise UserError(f"{self.path}: {_kind_of_file(head, self.path)}")
        if length > self.size - 8:
            raise UserError(f"{self.path}: truncated: its header alone has {length:,} bytes, the file {self.size:,}")
        names = {entry[0]: dtype for dtype, entry in DTYPES.items()}
        spans, start = [], 8 + length
        try:
            header = json.loads(self._pread(8, length).tobytes(), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            for name, entry in header.items():
                (first, last), shape = entry["data_offsets"], tuple(entry["shape"])
                if entry["dtype"] not in names:
                    raise UserError(f"{self.path}: tensor {name} is {entry['dtype']}, which is not supported")
                if not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
                    raise ValueError(f"tensor {name} has a shape or offset that is none")
                tensor = StoredTensor(self, name, names[entry["dtype"]], shape, contiguous(shape), start + first)
                if last - first != tensor.nbytes:
                    raise ValueError(f"tensor {name} {list(shape)} has {last - first:,} bytes, not {tensor.nbytes:,}")
                self.tensors[name] = tensor
                spans.append((first, last, name))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = first_line(error) if type(error) is ValueError else "its header cannot be read"
            raise UserError(f"{self.path}: damaged: {problem}; copy or download it again") from None
        end = 0
        for first, last, name in sorted(spans):
            if first != end:
                what = f"tensor {name} starts at {first:,}, the one before ends at {end:,}"
                raise UserError(f"{self.path}: damaged: {what}; copy or download it again")
            end = last
        if start + end != self.size:
            raise UserError(
                f"{self.path}: truncated or damaged: {self.size:,} bytes, its header describes {start + end:,}; "
                "copy or download it again"
            )

    def _list_zip(self):
        import zipfile

        try:
            with zipfile.ZipFile(self.handle) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
            raise UserError(
                f"{self.path}: truncated: it has {self.size:,} bytes{self._needed()} and lacks the table of contents "
                "that ends such a file; copy or download it again"
            ) from None
        starts, records = {}, {}
        has_crc = any(entry.CRC for entry in entries)  # torch.serialization.set_crc32_options(False) writes zeros
        for entry in entries:
            local = self._pread(entry.header_offset, 30)  # its last 4 bytes: the lengths of name and extra field
            start = entry.header_offset + 30 + int(local[26:28].view("<u2")[0]) + int(local[28:30].view("<u2")[0])
            if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > self.size:
                raise UserError(f"{self.path}: damaged: record {entry.filename}; copy or download it again")
            starts[entry.filename.partition("/")[2]] = (start, entry.file_size)
            if has_crc:
                records[start] = [entry.file_size, entry.CRC, 0, 0]
        self.records, self.starts = records, sorted(records)
        if not has_crc:
            say(f"{self.path}: it was written without checksums; damage cannot be noticed")
        if "data.pkl" not in starts or starts["data.pkl"][1] > MAX_HEADER:
            raise UserError(f"{self.path}: a zip, but none of torch.save: {_REWRITE}")
        if "byteorder" in starts and self._pread(*starts["byteorder"]).tobytes() != b"little":
            raise UserError(f"{self.path}: its numbers are big-endian: {_REWRITE}")
        for name, tensor in _unpickle(self._pread(*starts["data.pkl"]).tobytes(), self.path).items():
            dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            storage = tensor.untyped_storage()
            start, room = starts.get(f"data/{getattr(storage, 'record', None)}", (0, -1))
            if dtype not in DTYPES:
                raise UserError(f"{self.path}: tensor {name} is {dtype}, which is not supported")
            if storage.nbytes() > room:
                raise UserError(f"{self.path}: damaged: tensor {name} {list(shape)} reaches past its record")
            offset = start + tensor.storage_offset() * DTYPES[dtype][1]
            self.tensors[name] = StoredTensor(self, name, dtype, shape, tensor.stride(), offset)

    def _needed(self):
        """What a zip whose end is lost should hold, as words: by its list of tensors, which torch puts first."""
        try:
            local = self._pread(0, 30)
            start = 30 + int(local[26:28].view("<u2")[0]) + int(local[28:30].view("<u2")[0])
            pickled = self._pread(start, min(MAX_HEADER, self.size - start)).tobytes()
            storages = (tensor.untyped_storage() for tensor in _unpickle(pickled, self.path).values())
            records = {storage.record: storage.nbytes() for storage in storages}
            return f", its tensors alone need {sum(records.values()):,},"
        except Exception:  # then so much is lost that nothing can be said
            return ""

    def _pread(self, offset, size):
        """`size` bytes from `offset` as an array of uint8."""
        import numpy as np

        data = np.empty(size, np.uint8)
        self._fill(data, offset)
        return data

    def _fill(self, data, offset):
        """Fill an array of uint8 from byte `offset` on; keeps the CRC-32 of a record that is read in order."""
        done, size = 0, len(data)
        while done < size:
            count = os.preadv(self.handle.fileno(), [memoryview(data)[done:]], offset + done)
            if count == 0:
                raise UserError(f"{self.path}: ends at byte {offset + done:,}; damaged, or cut while it was read")
            done += count
        for start in self._record_of(offset):
            size_there, wanted, position, crc = record = self.records[start]
            if position == offset - start and position + size <= size_there:
                position, crc = position + size, zlib.crc32(data, crc)
                record[2:] = position, crc  # judged by the local two: another thread may read the record and write here
                if position == size_there and crc != wanted:
                    names = [t.name for t in self.tensors.values() if start <= t.offset < start + size_there]
                    what = f"tensor {', '.join(names[:3])}" if names else "what describes its tensors"
                    raise UserError(
                        f"{self.path}: damaged: the CRC-32 of {what} is {crc:08x} and should be {wanted:08x}; "
                        "copy or download it again"
                    )

    def _record_of(self, offset):
        """The start of the record that holds byte `offset`, in a list; [] where none does."""
        i = bisect.bisect_right(self.starts, offset) - 1
        return [self.starts[i]] if i >= 0 and offset < self.starts[i] + self.records[self.starts[i]][0] else []

    def gather(self, out, offset, strides):
        """Fill the array `out` with elements from byte `offset` on, `strides` elements apart in the file."""
        import numpy as np

        if out.size == 0:
            return
        if all(n == 1 or a == b for n, a, b in zip(out.shape, strides, contiguous(out.shape), strict=True)):
            if out.flags.c_contiguous:
                self._fill(out.reshape(-1).view(np.uint8), offset)
            else:
                out[...] = self._pread(offset, out.nbytes).view(out.dtype).reshape(out.shape)
        elif out.ndim == 1:
            span = self._pread(offset, ((len(out) - 1) * strides[0] + 1) * out.itemsize).view(out.dtype)
            out[...] = np.lib.stride_tricks.as_strided(span, out.shape, [strides[0] * out.itemsize])
        else:  # along the widest stride, so that each piece is as contiguous as can be
            axis = max(range(out.ndim), key=lambda i: strides[i] if out.shape[i] > 1 else -1)
            pieces, rest = np.moveaxis(out, axis, 0), strides[:axis] + strides[axis + 1 :]
            for i, piece in enumerate(pieces):
                self.gather(piece, offset + i * strides[axis] * out.itemsize, rest)

    def finish(self):
        """Read what of the zip's records was not read in order, check it, and close the file, which must not have
        changed since it was opened."""
        for start, record in self.records.items():
            while record[2] < record[0]:
                self._pread(start + record[2], min(BLOCK, record[0] - record[2]))
        now = os.fstat(self.handle.fileno())
        self.handle.close()
        if (now.st_size, now.st_mtime_ns) != (self.size, self.status.st_mtime_ns):
            raise UserError(f"{self.path}: somebody wrote to it while it was read; try again when it is whole")


_REWRITE = (
    "rewrite it with python -c \"import torch; torch.save(torch.load('OLD', map_location='cpu', "
    "weights_only=True), 'NEW')\""
)


def _kind_of_file(head, path):
    """What a file is that holds no weights, by its first bytes, and what to do."""
    if not head:
        return "the file is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run git lfs pull in its folder"
    if head.lstrip().startswith((b"<", b"{")) or head.startswith(b"Access denied"):
        return "a web page or an error message, not weights; download it again"
    if head.startswith(LEGACY_PICKLE):
        return f"the format of torch before 1.6, which cannot be read in parts; {_REWRITE}"
    if path.suffix == ".safetensors":
        return "no safetensors file; copy or download it again"
    return f"no zip of torch.save (damaged, or of another program); if torch can load it, {_REWRITE}"


def _unpickle(pickled, path):
    """{name: tensor on the meta device} of a pickled state dict; its untyped_storage().record is its data's name.

    The unpickler is that of torch.load(weights_only=True): it knows tensors and a few harmless types, and runs nothing
    else. Not through torch.load, which reads all the data and does not tell where in the file a tensor lies.
    """
    import torch
    from torch._weights_only_unpickler import Unpickler

    def storage(saved):
        _, kind, record, _, numel = saved
        dtype = getattr(kind, "dtype", torch.uint8)
        found = torch.UntypedStorage(numel * dtype.itemsize, device="meta")
        found.record = record
        return torch.storage.TypedStorage(wrap_storage=found, dtype=dtype, _internal=True)

    unpickler = Unpickler(io.BytesIO(pickled), encoding="utf-8")
    unpickler.persistent_load = storage
    try:
        found = unpickler.load()
    except Exception as error:  # a damaged pickle can fail in any way
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: its pickle asks for {asked[1]}, which no weights need; nothing of it was run; get the "
                "weights as safetensors, or from somebody you trust"
            ) from None
        raise UserError(f"{path}: damaged: its list of tensors cannot be read; download it again") from None
    if isinstance(found, dict) and len(found) == 1 and isinstance(next(iter(found.values())), dict):
        found = next(iter(found.values()))  # {"model": {...}}
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: holds no dict of tensors; {_REWRITE}")
    for name, tensor in found.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided):
            raise UserError(f"{path}: entry {name!r} is no tensor, so this is no file of weights")
    return found


def contiguous(shape):
    """The strides, in elements, of a tensor of `shape` without gaps: (2, 3, 4) gives (12, 4, 1)."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def plan_size(plan):
    """Bytes of all tensors of a plan {name: (dtype, shape)}."""
    return sum(math.prod(shape) * DTYPES[dtype][1] for dtype, shape in plan.values())


def row_blocks(shape, dtype, multiple=1, block=None):
    """Borders (start, stop) of blocks of whole rows, each at most `block` bytes but at least `multiple` rows.

    All blocks but the last have a number of rows that `multiple` divides; a number counts as one row.
    """
    rows, row_bytes = (shape[0] if shape else 1), math.prod(shape[1:]) * DTYPES[dtype][1]
    step = max((block or BLOCK) // max(row_bytes, 1) // multiple, 1) * multiple
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def check_finite(block, dtype, where, advice="the weights are damaged"):
    """Raise UserError, naming `where`, for bits that stand for an infinite value or for no number (NaN)."""
    exponent, sign = DTYPES[dtype][2], 1 << 8 * block.itemsize - 1
    if not exponent or not block.size:
        return
    # As integers with a sign the numbers above 0 are ordered like themselves, those below 0 without one: two maxima
    # tell, in a third of the time of a mask and without its memory.
    if int(block.view(f"i{block.itemsize}").max()) >= exponent or int(block.max()) >= sign + exponent:
        raise UserError(f"{where}: holds values that are not finite (infinite or NaN); {advice}")


def open_weights(path):
    """The tensors of a model folder or of one file, {name: StoredTensor}, none of them loaded.

    `close_weights` ends it. A folder's safetensors go before its .bin files, as in transformers. Raises UserError for
    a folder without weights, for an index that names files outside the folder or does not agree with them, and for
    what WeightFile refuses.
    """
    path = Path(path)
    if not path.is_dir():
        return WeightFile(path).tensors
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if (path / single).is_file():
            return WeightFile(path / single).tensors
        if index.is_file():
            return _open_sharded(path, index)
    stray = sorted(file.name for kind in ("*.safetensors", "*.bin") for file in path.glob(kind))
    hint = f"; it holds {stray[0]}, but no index names it" if stray else ""
    raise UserError(f"{path}: no weights there: neither model.safetensors nor pytorch_model.bin nor their index{hint}")


def _open_sharded(folder, index):
    try:
        places = jload(index)["weight_map"]
        names = sorted(set(places.values()))
        outside = [name for name in names if Path(name).name != name or name in ("", "..")]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index of weights; copy or download it again") from None
    if outside:
        raise UserError(f"{index}: names {outside[0]}, which is not a file beside it; refused")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(names)} files of weights are missing, first {absent[0]}")
    found = {}
    for name in names:
        here = WeightFile(folder / name).tensors
        wanted = {tensor for tensor, file in places.items() if file == name}
        wrong = sorted(wanted ^ set(here))
        if wrong:
            what = "lacks" if wrong[0] in wanted else "holds, against its index,"
            raise UserError(f"{folder / name}: it {what} tensor {wrong[0]} (of {len(wrong)}); copy the folder again")
        found |= here
    return {name: found[name] for name in places}


def close_weights(tensors):
    """Check and close all files of `open_weights`; see WeightFile.finish."""
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        file.finish()


def ahead(items):
    """The items of a generator, the next of which a thread computes while the caller works on one."""
    end = object()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = thread.submit(next, items, end)
            yield item


def split_plan(plan, max_shard_size=SHARD_SIZE):
    """A plan as files of at most `max_shard_size` bytes: {file name: plan}; a larger tensor has a file of its own."""
    shards, sizes = [{}], [0]
    for name, entry in plan.items():
        size = plan_size({name: entry})
        if shards[-1] and sizes[-1] + size > max_shard_size:
            shards.append({}), sizes.append(0)
        shards[-1][name], sizes[-1] = entry, sizes[-1] + size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def weight_file_names(plan, max_shard_size=SHARD_SIZE):
    """The names of the files that a WeightWriter writes for a plan."""
    files = list(split_plan(plan, max_shard_size))
    return files + ["model.safetensors.index.json"] * (len(files) > 1)


def _sync_and_forget(handle):
    """Put what was written on the disk, and give its memory in the page cache back."""
    os.fdatasync(handle.fileno())
    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class WeightWriter:
    """Writes safetensors: one file, or shards of at most `max_shard_size` bytes with their index.

    `plan` is {name: (dtype, shape)}; no tensor is split between files. Every byte is written once, at the place that
    the plan gives it, so tensors may come in any order and by turns; the rows of one tensor come in order. Leaving the
    block without an error checks that all is there and puts it on the disk. `files` are the names written.

    A thread writes while the caller reads on, so a block must not change after `append`; an error of the disk is
    raised by a later `append` or at the end.
    """

    def __init__(self, folder, plan, max_shard_size=SHARD_SIZE, metadata=None):
        self.folder, self.places, self.handles = Path(folder), {}, []
        self.files, shards = weight_file_names(plan, max_shard_size), split_plan(plan, max_shard_size)
        self.index = {
            "metadata": {"total_size": plan_size(plan), **(metadata or {})},
            "weight_map": {name: file for file, shard in shards.items() for name in shard},
        }
        for file, shard in shards.items():
            # Wide elements go first, so that every tensor starts at a multiple of its element's size.
            order = sorted(shard.items(), key=lambda item: -DTYPES[item[1][0]][1])
            header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
            for name, (dtype, shape) in order:
                size = plan_size({name: (dtype, shape)})
                entry = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [end, end + size]}
                header[name], end = entry, end + size
            text = json.dumps(header, separators=(",", ":")).encode("utf-8")
            text += b" " * (-len(text) % 8)
            handle = open(self.folder / file, "xb", buffering=0)
            self.handles.append(handle)
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in shard:
                first, last = header[name]["data_offsets"]
                self.places[name] = [handle, 8 + len(text) + first, 8 + len(text) + last]  # next byte, end
        self.queue, self.error, self.stopped = queue.Queue(4), None, False
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self):
        unsynced, syncing = 0, None
        with concurrent.futures.ThreadPoolExecutor(1) as syncer:
            while (item := self.queue.get()) is not None:
                handle, data, position = item
                if self.error or self.stopped:
                    continue  # so that `append` never waits for room
                try:
                    while len(data):
                        written = os.pwrite(handle.fileno(), data, position)
                        data, position, unsynced = data[written:], position + written, unsynced + written
                    if unsynced >= SYNC:  # the disk works while the next blocks come, and the page cache stays small
                        if syncing:
                            syncing.result()
                        syncing, unsynced = syncer.submit(_sync_and_forget, handle), 0
                except BaseException as error:
                    self.error = error
            if syncing:  # the system tells a failed write once: the fsync at the end would no longer hear of it
                self.error = self.error or syncing.exception()

    def append(self, name, block):
        """Write the next rows of a tensor, an array of its bits or anything else of the right bytes."""
        handle, position, end = self.places[name]
        data = memoryview(block).cast("B") if getattr(block, "size", 1) else b""
        assert position + len(data) <= end, f"{name}: more bytes than planned"
        self.places[name][1] += len(data)
        if self.error:
            raise self.error
        self.queue.put((handle, data, position))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.stopped = kind is not None
        self.queue.put(None)
        self.thread.join()
        if kind is None and self.error:
            raise self.error
        if kind is None:
            short = [name for name, (_, position, end) in self.places.items() if position != end]
            assert not short, f"{short[0]}: fewer bytes than planned"
            for handle in self.handles:
                os.fsync(handle.fileno())
            if len(self.files) > 1:
                jdump(self.index, self.folder / self.files[-1], indent=2)
        for handle in self.handles:
            handle.close()


class Meter:
    """A progress bar on a terminal, with GB/s; elsewhere one line when the block ends."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.shown = what, max(total, 1), 0, 0.0
        self.start = time.monotonic()

    def line(self):
        seconds = max(time.monotonic() - self.start, 1e-6)
        rate = self.done / seconds
        text = f"{self.what}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"
        left = f"{(self.total - self.done) / max(rate, 1):.0f} s left"
        return f"{text}, {f'{seconds:.0f} s' if self.done >= self.total else left}"

    def add(self, count):
        self.done += count
        now = time.monotonic()
        if now - self.shown > 0.2:
            self.shown, share = now, 30 * self.done // self.total
            show_progress(f"[{'#' * share}{'.' * (30 - share)}] {self.line()}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            say(self.line())
        elif sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def find_model(name, patterns=("*.json", "*.safetensors", "*.bin", "tokenizer*"), option="the model"):
    """The folder (or file) of a path, or of a name on the hub, whose files that match `patterns` are downloaded.

    Where the hub has safetensors, .bin files stay there. Raises UserError for what is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(f"{option} {name}: no such folder")
    import huggingface_hub

    try:
        there = ()
        with contextlib.suppress(Exception):  # without network, what is in the cache is taken
            there = huggingface_hub.list_repo_files(str(name))
        unwanted = ["*.bin"] if any(file.endswith(".safetensors") for file in there) else []
        found = huggingface_hub.snapshot_download(str(name), allow_patterns=list(patterns), ignore_patterns=unwanted)
    except Exception as error:  # no network, no such name, no permission: the library has a dozen exceptions
        raise UserError(
            f"{option} {name}: no such folder here, and from the hub it cannot be had ({first_line(error)})"
        ) from None
    return Path(found)


def same_place(one, other):
    """Whether two paths lead to one folder or file, through links, case, or files that are hard links of each other."""
    one, other = Path(one), Path(other)
    if one.resolve() == other.resolve():
        return True
    if not (one.exists() and other.exists()):
        return False

    def weights(path):  # a tokenizer or a licence that both share does no harm
        files = path.iterdir() if path.is_dir() else [path]
        found = [file.stat() for file in files if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
        return {(status.st_dev, status.st_ino) for status in found}

    return one.samefile(other) or not weights(one).isdisjoint(weights(other))


def check_output(target, inputs=(), overwrite=False, writes=(), option="--output_dir"):
    """Refuse an output folder that exists with something in it, is a file, or is one of `inputs`; see `new_folder`."""
    target = Path(target)
    for path in inputs:
        if same_place(target, path):
            raise UserError(f"{option} {target}: the same place as {path}; choose another folder")
    if target.is_symlink() and not target.exists():
        raise UserError(f"{option} {target}: a link to {os.readlink(target)}, which does not exist; remove the link")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{option} {target}: a file of that name exists; choose another folder")
    if os.path.ismount(target):
        raise UserError(f"{option} {target}: where a disk is mounted, which cannot be renamed; give a folder inside it")
    there = sorted(path.name for path in target.iterdir())
    if there and not overwrite:
        raise UserError(
            f"{option} {target}: exists and holds {there[0]}{f' and {len(there) - 1} more' if there[1:] else ''}; "
            "choose another folder, or give --overwrite, which replaces only files of the names that are written"
        )
    kinds = ("model*.safetensors", "pytorch_model*.bin", "*.index.json", "consolidated.*.pth")
    stale = sorted(path.name for kind in kinds for path in target.glob(kind) if path.name not in writes)
    if there and stale:
        raise UserError(
            f"{option} {target}: holds {stale[0]}, which would stay beside the new weights and might be loaded "
            "instead; remove it, or choose another folder"
        )


@contextlib.contextmanager
def new_folder(target, size, inputs=(), overwrite=False, writes=(), option="--output_dir"):
    """Yield a hidden folder beside `target` that takes its name, synced, when the block ends well; else it is removed.

    `size` is what will be written, in bytes, and compared with the free space; `inputs` are paths that must not be the
    target. A target that holds files is refused; with `overwrite` those that are written replace their namesakes; see
    `utils.hidden_folder`. `writes` are the names of the weight files to come. What a killed run left behind is named
    and removed. SIGTERM and SIGHUP end the block like Ctrl-C. Raises UserError.
    """
    check_output(target, inputs, overwrite, writes, option)
    final = Path(target).resolve()
    hidden = final.with_name(f".{final.name}.unfinished")

    def stop(number, frame):
        say(f"stopped by {signal.Signals(number).name}; nothing is left of this run")
        raise SystemExit(128 + number)

    try:
        there = sorted(hidden.iterdir()) if hidden.exists() else []
        if there and not (hidden / LOCK).exists():
            raise UserError(f"{hidden}: holds {there[0].name}, which no run of ours left behind; move that folder away")
        lock = claim_folder(hidden, target)
    except OSError as error:
        raise UserError(f"{option} {target}: {error.strerror}; choose another folder") from None
    if left := [path for path in hidden.rglob("*") if path.is_file() and path.name != LOCK]:
        gigabytes = sum(path.stat().st_size for path in left) / 1e9
        say(f"{hidden}: left by a run that did not finish ({len(left)} files, {gigabytes:.2f} GB); removed")
    try:
        with on_signals(stop), hidden_folder(hidden, final):
            free = shutil.disk_usage(hidden).free
            if size > free:
                raise UserError(
                    f"{option} {target}: {size / 1e9:.2f} GB will be written and {free / 1e9:.2f} GB are free; make "
                    "room, or choose a folder on another disk"
                )
            yield hidden
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{option} {target}: {error.strerror} ({size / 1e9:.2f} GB are needed); nothing is left of this run; make "
            "room, then give the same command again"
        ) from None
    finally:
        HELD_LOCKS.remove(lock)
        lock.close()
