"""Files that `torch.save` wrote, read as data.

A pickle is a program: it names functions and says what to call them with. Here its instructions are
followed on data of our own alone. No name in a file is looked up, let alone called; the few that
tensors, their dictionaries and an option namespace need have a meaning of ours, and any other ends
the reading with a sentence. Memory stays in proportion to the file.
"""

import math
import mmap
import pickletools
import re
import struct
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shine.errors import InputError

_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_NAMES = {
    *_DTYPES,
    "argparse.Namespace",
    "collections.OrderedDict",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FRESH = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# What reading bytes that somebody chose can raise; our own sentences are none of them.
_DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
)


@dataclass(frozen=True)
class Storage:
    """Numbers in a file, which several tensors may share."""

    dtype: torch.dtype
    key: str
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that was not read yet."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """What the tensor takes once read."""
        return math.prod(self.size) * self.storage.dtype.itemsize

    @property
    def whole(self) -> bool:
        """Whether all of its numbers are stored, each place on its own."""
        counts = [self.offset, *self.size, *self.stride]
        if min(counts) < 0 or len(self.size) != len(self.stride):
            return False
        steps = ((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        last = self.offset + sum(steps)
        length = self.storage.length
        return math.prod(self.size) <= length and (0 in self.size or last < length)


class TorchFile:
    """What a file of `torch.save` holds; tensors stay in the file until they are asked for.

    Attributes:
        content: dictionaries, lists, tuples, numbers, text, `argparse.Namespace`, devices as text,
            and `StoredTensor`.
    """

    def __init__(self, path: Path, content: Any, stored: Callable[[str], bytes]) -> None:
        self.path = path
        self.content = content
        self._stored = stored

    def tensors(self, entries: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """The tensors on the CPU, each with memory of its own.

        Raises:
            InputError: the file does not hold the numbers that they claim.
        """
        claimed = sum(entry.num_bytes for entry in entries.values())
        present = self.path.stat().st_size
        if claimed > present or not all(entry.whole for entry in entries.values()):
            raise InputError(
                f"{self.path}: its tensors claim numbers that the file does not hold "
                f"({claimed} bytes of {present}); the file is damaged or was made to harm"
            )
        with _damage_told(self.path):
            storages = {e.storage: self._read(e.storage) for e in entries.values()}
            return {
                name: storages[e.storage].as_strided(e.size, e.stride, e.offset).clone()
                for name, e in entries.items()
            }

    def _read(self, storage: Storage) -> Tensor:
        data = bytearray(self._stored(storage.key))
        if len(data) != storage.length * storage.dtype.itemsize:
            raise ValueError(f"{len(data)} bytes are stored for {storage.length} numbers")
        numbers = torch.empty(0, dtype=storage.dtype)
        return torch.frombuffer(data, dtype=storage.dtype) if data else numbers


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """The content of a checkpoint in either format of `torch.save`, without running any of it.

    Raises:
        InputError: the file is none, is damaged, or asks for more than data.
    """
    with _damage_told(path):
        file = path.open("rb")
    with file:
        if file.read(4) == b"PK\3\4":
            with _damage_told(path):
                archive = zipfile.ZipFile(file)
                torch_file = _read_zip(path, archive)
            yield torch_file
        elif path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                with _damage_told(path):
                    torch_file = _read_legacy(path, view)
                yield torch_file
        else:
            raise InputError(f"{path}: expected a file of torch.save, got an empty one")


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        raise InputError(
            f"{path}: not a whole file of torch.save ({type(error).__name__}: {error}); "
            f"download it again"
        ) from None


def _read_zip(path: Path, archive: zipfile.ZipFile) -> TorchFile:
    """The format of torch 1.6 and later: an archive of one pickle and a file per storage."""
    entries = archive.infolist()
    packed = any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries)
    if packed or sum(e.file_size for e in entries) > path.stat().st_size:
        raise InputError(
            f"{path}: its archive is compressed or overlaps, which torch.save never writes; it is "
            f"no checkpoint"
        )
    roots = [e.filename.removesuffix("/data.pkl") for e in entries if _is_pickle(e.filename)]
    if len(roots) != 1:
        raise InputError(f"{path}: an archive without the one data.pkl of a checkpoint")
    order = f"{roots[0]}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise InputError(
            f"{path}: written with another byte order; save it again on a usual machine"
        )
    with archive.open(f"{roots[0]}/data.pkl") as stream:
        content = _Reader(path).read(stream)
    return TorchFile(path, content, lambda key: archive.read(f"{roots[0]}/data/{key}"))


def _is_pickle(name: str) -> bool:
    return re.fullmatch(r"[^/]+/data\.pkl", name) is not None


def _read_legacy(path: Path, view: mmap.mmap) -> TorchFile:
    """The older format: pickles of a magic number, a version, the machine, the content, the keys.

    The numbers follow, for each key their count and their bytes.
    """
    reader = _Reader(path)
    magic = reader.read(view) if view[:1] == b"\x80" else None
    if magic != _LEGACY_MAGIC:
        raise InputError(f"{path}: expected a file of torch.save (a .ckpt), got something else")
    reader.read(view)
    if reader.read(view)["little_endian"] is not True:
        raise InputError(
            f"{path}: written with another byte order; save it again on a usual machine"
        )
    content = reader.read(view)
    places: dict[str, tuple[int, int]] = {}
    for key in reader.read(view):
        count = int.from_bytes(view.read(8), "little")
        start = view.tell()
        places[key] = (start, start + count * reader.dtypes[key].itemsize)
        view.seek(places[key][1])
    return TorchFile(path, content, lambda key: view[slice(*places[key])])


@dataclass(frozen=True)
class _Name:
    """What a file calls a function or a class. Never more than its name."""

    text: str


class _Reader:
    """Follows the instructions of pickles that `torch.save` writes (protocol 2)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # of the storages that were met

    def read(self, stream: Any) -> Any:
        """The object of the pickle that an open file or map stands at; it then stands behind it."""
        self._stack, self._marks, self._memo = [], [], {}
        with warnings.catch_warnings(action="error"):  # on text that Python would not write
            for operation, argument, _ in pickletools.genops(stream):
                self._follow(operation.name, argument)
        (content,) = self._stack
        return content

    def _follow(self, operation: str, argument: Any) -> None:
        push, pop = self._stack.append, self._stack.pop
        match operation:
            case "PROTO" | "STOP":
                pass
            case _ if operation in _LITERALS:
                push(argument)
            case _ if operation in _CONSTANTS:
                push(_CONSTANTS[operation])
            case _ if operation in _FRESH:
                push(_FRESH[operation]())
            case _ if operation in _TUPLES:
                push(tuple(self._taken(len(self._stack) - _TUPLES[operation])))
            case "MARK":
                self._marks.append(len(self._stack))
            case "TUPLE":
                push(tuple(self._taken(self._marks.pop())))
            case "APPEND":
                self._extend([pop()])
            case "APPENDS":
                self._extend(self._taken(self._marks.pop()))
            case "SETITEM":
                self._set(self._taken(len(self._stack) - 2))
            case "SETITEMS":
                self._set(self._taken(self._marks.pop()))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "GLOBAL":
                push(self._name(argument.replace(" ", ".")))
            case "BINPERSID":
                push(self._storage(pop()))
            case "REDUCE":
                arguments = pop()
                push(self._made(pop(), arguments))
            case "NEWOBJ":
                arguments = pop()
                push(self._new(pop(), arguments))
            case "BUILD":
                self._build(pop())
            case _:
                raise self._refused(f"uses the pickle instruction {operation}")

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"{self._path}: refused, since it {what}, which tensors and options do not need; "
            f"nothing in the file was run"
        )

    def _taken(self, start: int) -> list[Any]:
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError("an instruction takes more than there is")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError("only lists grow")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if type(self._stack[-1]) not in (dict, OrderedDict):
            raise TypeError("only dictionaries have entries")
        if not all(isinstance(key, str | int) for key in items[::2]):
            raise TypeError("keys are text or integers")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _name(self, text: str) -> _Name:
        if text not in _NAMES:
            raise self._refused(f"asks for {text}")
        return _Name(text)

    def _storage(self, identity: Any) -> Storage:
        match identity:
            # The last element is there in the older format alone: the storage is no view.
            case ("storage", _Name(kind), str(key), str(), int(length), *view) if (
                kind in _DTYPES and not any(view)
            ):
                self.dtypes[key] = _DTYPES[kind]
                return Storage(_DTYPES[kind], key, length)
        raise TypeError("no storage that torch.save writes")

    def _made(self, name: Any, arguments: Any) -> Any:
        match (name, arguments):
            case (_Name("collections.OrderedDict"), ()):
                return OrderedDict()
            case (_Name("torch.device"), (str(kind),)):
                return kind
            case (_Name("torch.device"), (str(kind), int(index))):
                return f"{kind}:{index}"
            case (_Name("torch._utils._rebuild_parameter"), (StoredTensor() as tensor, *_)):
                return tensor
            case (
                _Name("torch._utils._rebuild_tensor_v2"),
                (Storage() as storage, int(offset), tuple(size), tuple(stride), *_),
            ) if all(isinstance(n, int) for n in (*size, *stride)):
                return StoredTensor(storage, offset, size, stride)
        raise self._refused(f"calls {name.text if isinstance(name, _Name) else 'a value'}")

    def _new(self, name: Any, arguments: Any) -> Namespace:
        if name != _Name("argparse.Namespace") or arguments != ():
            raise self._refused(f"makes a {name.text if isinstance(name, _Name) else 'value'}")
        return Namespace()

    def _build(self, state: Any) -> None:
        made = self._stack[-1]
        if type(made) is Namespace:
            if type(state) is not dict or not all(isinstance(key, str) for key in state):
                raise TypeError("a namespace has named values")
            vars(made).update(state)
        elif type(made) is not OrderedDict:  # the version numbers that come with a state_dict
            raise self._refused("changes what it made")
