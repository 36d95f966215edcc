"""EG3D's network pickles, read without executing anything in them.

A pickle is a program for a small stack machine, and unpickling runs it, calls included. Here is a
machine that builds plain values, tensors and inert records, and has no instruction that imports
or calls: a name in the file stays a name. `pickletools.genops` splits the file into instructions.

Bounds on a hostile file: strings and storages cannot exceed the file they come from (it is mapped,
never read ahead), tensors are views of their storages, and the number of instructions, of items
that calls copy, the depth of modules and the size of option values are limited.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densityrl.errors import CheckpointError

MAX_INSTRUCTIONS = 1_000_000  # a snapshot of three networks has about 40,000
MAX_COPIES = 1_000_000  # items that calls copy from one container to another
MAX_MODULE_DEPTH = 64
MAX_MODULES = 20_000
MAX_OPTION_DEPTH = 16
MAX_OPTION_VALUES = 100_000

_STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_NUMPY_CODES = {
    "f2": "e",
    "f4": "f",
    "f8": "d",
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
}
_DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict", "builtins.dict"}
_SETS = {"builtins.set": set, "builtins.frozenset": frozenset}
_INERT_CALLS = {"torch.device", "torch.Size"}  # harmless values that an attribute may hold
_KEY_TYPES = (str, int, float, bytes, type(None))  # bool is an int


@dataclass(frozen=True)
class PickledObject:
    """An object of the file, inert: its class's name and its state, normally a dict."""

    class_name: str
    state: dict[str, Any]


@dataclass(frozen=True)
class ModuleRecord:
    """One module of a network: its class's name and its plain live attributes.

    Attributes hold scalars, strings, containers of them, and tensors that are neither parameter
    nor buffer; anything else is left out.
    """

    class_name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class NetworkRecord(ModuleRecord):
    """A network: the record of its outermost module, its tensors, and all of its modules.

    `tensors` holds parameters and persistent buffers under their state-dict names, in that
    order; `modules` goes by dotted path, "" being the network itself.
    """

    tensors: dict[str, Tensor]
    parameter_names: frozenset[str]
    modules: dict[str, ModuleRecord]


def read_network_pickle(path: str | Path, which: str = "G_ema") -> NetworkRecord:
    """One network of an EG3D snapshot: G_ema (the averaged generator), G or D.

    Raises CheckpointError, one sentence, for anything but such a file.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or which not in content:
        keys = sorted(k for k in content if isinstance(k, str)) if isinstance(content, dict) else []
        there = f"it has {', '.join(keys[:8])}" if keys else "it is no dictionary of networks"
        raise _refusal(path, f"has no {which}: {there}")
    network = content[which]
    if not isinstance(network, PickledObject):
        raise _refusal(path, f"has a {_kind(network)} as {which}, not a network")
    return _NetworkWalk(str(path)).record(network)


def read_pickle(path: str | Path) -> Any:
    """The value a pickle describes, with objects as `PickledObject` and names as they are."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _refuse_other_formats(path, data[:16])
                return _Machine(str(path)).run(data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _refuse_other_formats(path: Path, start: bytes) -> None:
    if re.match(rb"\x80[\x02-\x05]", start):
        return
    known = {
        b"PK\x03\x04": "a zip archive (what torch.save writes today)",
        b"\x1f\x8b": "a gzip archive",
        b"\x00\x00": "filled with zeros, perhaps an unfinished download",
        b"<": "a web page, perhaps a download that failed",
        b"version https://": "a Git LFS pointer, not the file itself",
    }
    what = next(
        (name for magic, name in known.items() if start.startswith(magic)), "something else"
    )
    raise CheckpointError(f"{path} is not an EG3D network pickle but {what}")


# --- the machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """A dotted name that the file mentions."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The elements of a legacy torch storage, 1-D."""

    values: Tensor


@dataclass(frozen=True)
class _NumpyDtype:
    code: str  # such as f8
    order: str = "<"


class _Mark:
    pass


_MARK = _Mark()


class _Fault(Exception):
    """What is wrong, as the end of a sentence; the machine adds file and position."""


class _Machine:
    """Runs the instructions of one pickle; `inner` is the one that lies inside a storage."""

    def __init__(self, name: str, inner: bool = False) -> None:
        self.name = name
        self.inner = inner
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copies_left = MAX_COPIES
        # What calls made of a text or of bytes, by the identity of that, which is kept alive
        # beside it: a file that names one storage a thousand times pays for it once.
        self.made: dict[int, tuple[str | bytes, Any]] = {}

    def run(self, data: Any) -> Any:
        """The value; `data` reads like a file. Raises CheckpointError."""
        position = 0
        try:
            for count, (opcode, argument, where) in enumerate(pickletools.genops(data)):
                position = where or 0
                if count >= MAX_INSTRUCTIONS:
                    raise _Fault(f"has more than {MAX_INSTRUCTIONS:,} instructions")
                if opcode.name == "STOP":
                    return self._pop()
                self._step(opcode.name, argument)
        except _Fault as fault:
            raise _refusal(self.name, f"{fault} (byte {position})") from None
        except (ValueError, OverflowError, MemoryError, struct.error, IndexError) as error:
            reason = str(error) or type(error).__name__
            raise _refusal(
                self.name, f"is damaged or cut short near byte {position}: {reason}"
            ) from None
        raise _refusal(self.name, "ends without a value")

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Fault("takes a value from an empty stack")
        return self.stack.pop()

    def _top(self, kind: type, instruction: str) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            what = _kind(self.stack[-1]) if self.stack else "nothing"
            raise _Fault(f"applies {instruction} to {what}")
        return self.stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise _Fault("looks for a mark that is not there")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(set())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self._pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "LIST":
                stack.append(self._pop_to_mark())
            case "DICT":
                stack.append(self._update({}, self._pop_to_mark()))
            case "FROZENSET":
                stack.append(frozenset(map(_key, self._pop_to_mark())))
            case "APPEND":
                item = self._pop()
                self._top(list, name).append(item)
            case "APPENDS":
                items = self._pop_to_mark()
                self._top(list, name).extend(items)
            case "ADDITEMS":
                items = self._pop_to_mark()
                self._top(set, name).update(map(_key, items))
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._update(self._top(dict, name), [key, value])
            case "SETITEMS":
                items = self._pop_to_mark()
                self._update(self._top(dict, name), items)
            case "POP":
                if not stack:
                    raise _Fault("takes a value from an empty stack")
                stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                stack.append(self._top(object, name))
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top(object, name)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top(object, name)
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise _Fault(f"refers to entry {argument} of the memo, which is not there")
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                qualified, module = self._pop(), self._pop()
                if not (isinstance(module, str) and isinstance(qualified, str)):
                    raise _Fault("names a global with something else than text")
                stack.append(_named(module, qualified))
            case "REDUCE":
                arguments, function = self._pop(), self._pop()
                stack.append(self._reduce(function, arguments))
            case "NEWOBJ":
                _, cls = self._pop(), self._pop()
                stack.append(_new_object(cls))
            case "NEWOBJ_EX":
                _, _, cls = self._pop(), self._pop(), self._pop()
                stack.append(_new_object(cls))
            case "BUILD":
                state = self._pop()
                stack.append(self._build(self._pop(), state))
            case "BINPERSID" if self.inner:
                stack.append(_persistent_storage(self._pop()))
            case _:
                raise _Fault(f"uses the instruction {name}, which a network pickle has no need of")

    @staticmethod
    def _update(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise _Fault("has a dictionary with a key but no value")
        for key, value in zip(islice(items, 0, None, 2), islice(items, 1, None, 2), strict=True):
            target[_key(key)] = value
        return target

    def _reduce(self, function: Any, arguments: Any) -> Any:
        """Stand-ins for the few calls that make up a network pickle; any other is refused."""
        if not isinstance(function, _Global):
            raise _Fault(f"asks to call a {_kind(function)}")
        if not isinstance(arguments, tuple):
            raise _Fault(f"asks to call {function.name} without a tuple of arguments")
        match function.name, arguments:
            case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, *rest):
                return _tensor(storage.values, rest)
            case "torch._utils._rebuild_parameter", (Tensor() as tensor, *_):
                return tensor
            case "torch.storage._load_from_bytes", (bytes() as data,) if not self.inner:
                return self._once(data, lambda: _legacy_storage(data, self.name))
            case "torch_utils.persistence._reconstruct_persistent_obj", (dict() as meta,):
                return _persistent_object(meta)
            case name, () if name in _DICTS:
                return {}
            case name, (list() as pairs,) if name in _DICTS:
                if not all(
                    isinstance(pair, (tuple, list)) and len(pair) == 2
                    for pair in self._copied(pairs)
                ):
                    raise _Fault(f"fills a {name} with something else than pairs")
                return self._update({}, [item for pair in pairs for item in pair])
            case name, (list() as items,) if name in _SETS:
                return _SETS[name](map(_key, self._copied(items)))
            case "numpy.dtype", (str() as code, *_):
                if code.lstrip("<>|=") not in _NUMPY_CODES:
                    raise _Fault(f"has a numpy value of type {code[:20]!r}, which is no number")
                return _NumpyDtype(code.lstrip("<>|="))
            case "numpy.scalar", (_NumpyDtype() as dtype, bytes() as data):
                return _numpy_scalar(dtype, data)
            case "_codecs.encode", (str() as text, "latin1"):
                return self._once(text, lambda: text.encode("latin1"))
            case "copyreg._reconstructor", (_Global() as cls, *_):
                return _new_object(cls)
            case name, _ if name in _INERT_CALLS:
                return PickledObject(name, {})
        known = {"torch", "numpy", "collections", "builtins", "torch_utils", "_codecs", "copyreg"}
        if function.name.partition(".")[0] in known:
            kinds = ", ".join(map(_kind, arguments[:4]))
            raise _Fault(
                f"asks to call {function.name[:80]} with ({kinds}), which a network pickle never "
                "does, so it is refused"
            )
        raise _Fault(
            f"asks to call {function.name[:80]}; nothing in a checkpoint is executed, so the file "
            "is refused"
        )

    def _build(self, target: Any, state: Any) -> Any:
        """Give an object its state; nothing of it is interpreted."""
        if isinstance(target, _NumpyDtype):
            order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
            if order not in ("<", ">", "|", "="):
                raise _Fault("gives a numpy type an unknown byte order")
            return _NumpyDtype(target.code, ">" if order == ">" else "<")
        if isinstance(state, tuple) and len(state) == 2 and state[1] is None:
            state = state[0]
        if not isinstance(state, dict):
            raise _Fault(f"gives an object a {_kind(state)} as its state")
        if isinstance(target, PickledObject):
            target.state.update(self._copied(state))
        elif not isinstance(target, dict):  # a dictionary's own attributes carry nothing we need
            raise _Fault(f"gives a state to a {_kind(target)}")
        return target

    def _once(self, source: str | bytes, make: Callable[[], Any]) -> Any:
        if id(source) not in self.made:
            self.made[id(source)] = (source, make())
        return self.made[id(source)][1]

    def _copied(self, items: Any) -> Any:
        """The container, its size charged to what calls may copy."""
        self.copies_left -= len(items)
        if self.copies_left < 0:
            raise _Fault(f"copies more than {MAX_COPIES:,} items between containers")
        return items


def _key(value: Any) -> Any:
    """Keys and set members are scalars: hashing what else a file nests could exhaust the stack."""
    if not isinstance(value, _KEY_TYPES):
        raise _Fault(f"uses a {_kind(value)} as a key")
    return value


def _named(module: str, name: str) -> _Global:
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if re.fullmatch(r"numpy\.(core|_core)\.multiarray", module) and name == "scalar":
        module = "numpy"
    return _Global(f"{module}.{name}")


def _new_object(cls: Any) -> Any:
    if not isinstance(cls, _Global):
        raise _Fault(f"makes an object of a {_kind(cls)}")
    return {} if cls.name in _DICTS else PickledObject(cls.name, {})


def _persistent_object(meta: dict[Any, Any]) -> PickledObject:
    name, state = meta.get("class_name"), meta.get("state")
    if meta.get("type") != "class" or not isinstance(name, str) or not isinstance(state, dict):
        raise _Fault("has a persistent object without class name and state")
    return PickledObject(name, state)


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> float:
    try:
        return struct.unpack(dtype.order + _NUMPY_CODES[dtype.code], data)[0]
    except struct.error:
        raise _Fault(f"has {len(data)} bytes for a numpy number of type {dtype.code}") from None


def _legacy_storage(data: bytes, name: str) -> _Storage:
    """A storage in the layout of torch before 1.6: four pickles, then the raw elements."""
    stream = io.BytesIO(data)
    inside = f"{name}, in a tensor's storage,"
    if _Machine(inside, inner=True).run(stream) != _LEGACY_MAGIC:
        raise _Fault("has a storage that is not in torch's legacy format")
    if _Machine(inside, inner=True).run(stream) != _LEGACY_PROTOCOL:
        raise _Fault("has a storage of an unknown version of torch's legacy format")
    system = _Machine(inside, inner=True).run(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Fault("has a storage that is not little-endian")
    described = _Machine(inside, inner=True).run(stream)
    keys = _Machine(inside, inner=True).run(stream)
    if not isinstance(described, _StorageKind) or keys != [described.key]:
        raise _Fault("has a storage that does not describe itself")
    header = stream.read(8)
    count = int.from_bytes(header, "little", signed=True)
    size = count * described.dtype.itemsize
    start = stream.tell()
    if len(header) != 8 or count != described.count or count < 0 or start + size > len(data):
        raise _Fault(f"has a storage that claims {described.count} elements, which are not there")
    if count == 0:
        return _Storage(torch.empty(0, dtype=described.dtype))
    raw = bytearray(memoryview(data)[start : start + size])
    return _Storage(torch.frombuffer(raw, dtype=described.dtype))


@dataclass(frozen=True)
class _StorageKind:
    dtype: torch.dtype
    key: str
    count: int


def _persistent_storage(identity: Any) -> _StorageKind:
    """('storage', type, key, location, count, view): the location, say cuda:0, is ignored."""
    match identity:
        case ("storage", _Global() as cls, str() as key, _, int() as count, None):
            module, _, kind = cls.name.rpartition(".")
            if module == "torch" and kind in _STORAGE_TYPES:
                return _StorageKind(_STORAGE_TYPES[kind], key, count)
            raise _Fault(f"has a storage of the unknown type {cls.name[:80]}")
    raise _Fault("has a storage that does not describe itself")


def _tensor(values: Tensor, arguments: list[Any]) -> Tensor:
    """A view of a storage, after checking that it lies inside and covers no element twice."""
    match arguments:
        case (int() as offset, tuple() as size, tuple() as stride, *_):
            pass
        case _:
            raise _Fault("has a tensor without offset, size and stride")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise _Fault("has a tensor whose offset, size and stride are not small whole numbers")
    count, last = 1, offset
    for extent, step in zip(size, stride, strict=True):
        count *= extent
        last += max(extent - 1, 0) * step
    if len(size) > 16 or count > len(values) or (count > 0 and last >= len(values)):
        raise _Fault(
            f"has a tensor of size {list(size[:8])} in a storage of {len(values)} elements"
        )
    return values.as_strided(size, stride, offset)


# --- from objects to a network -------------------------------------------------------------------


class _NetworkWalk:
    """Collects tensors and options of a module tree; shared and cyclic parts stay bounded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, Tensor] = {}
        self.parameter_names: set[str] = set()
        self.modules: dict[str, ModuleRecord] = {}
        self.values_left = MAX_OPTION_VALUES

    def record(self, network: PickledObject) -> NetworkRecord:
        self._visit(network, "", 0)
        return NetworkRecord(
            **vars(self.modules[""]),
            tensors=self.tensors,
            parameter_names=frozenset(self.parameter_names),
            modules=self.modules,
        )

    def _visit(self, module: PickledObject, path: str, depth: int) -> None:
        if depth > MAX_MODULE_DEPTH or len(self.modules) >= MAX_MODULES:
            raise _refusal(
                self.name,
                f"nests modules deeper than {MAX_MODULE_DEPTH} or holds more than {MAX_MODULES:,}",
            )
        state = module.state
        prefix = f"{path}." if path else ""
        self.modules[path] = ModuleRecord(
            class_name=module.class_name.rpartition(".")[2],
            attributes={
                key: plain
                for key, value in state.items()
                if isinstance(key, str)
                and not key.startswith("_")
                and (plain := self._plain(value, 0)) is not _NOT_PLAIN
            },
        )
        transient = state.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            for key, tensor in self._children(state, kind, path):
                if tensor is None or key in transient:
                    continue
                if not isinstance(tensor, Tensor):
                    raise _refusal(self.name, f"has a {_kind(tensor)} as {prefix}{key}")
                self.tensors[prefix + key] = tensor
                if kind == "_parameters":
                    self.parameter_names.add(prefix + key)
        for key, child in self._children(state, "_modules", path):
            if child is None:
                continue
            if not isinstance(child, PickledObject):
                raise _refusal(self.name, f"has a {_kind(child)} as {prefix}{key}")
            self._visit(child, prefix + key, depth + 1)

    def _children(self, state: dict[str, Any], kind: str, path: str) -> Iterator[tuple[str, Any]]:
        table = state.get(kind)
        if table is None:
            table = {}
        if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
            raise _refusal(self.name, f"has no table of names as {kind} of module {path!r}")
        yield from table.items()

    def _plain(self, value: Any, depth: int) -> Any:
        """A copy made of scalars, strings, containers and tensors, or _NOT_PLAIN."""
        self.values_left -= 1
        if depth > MAX_OPTION_DEPTH or self.values_left < 0:
            raise _refusal(
                self.name,
                f"nests option values deeper than {MAX_OPTION_DEPTH} or holds more than "
                f"{MAX_OPTION_VALUES:,}",
            )
        if value is None or isinstance(value, (bool, int, float, str, Tensor)):
            return value
        if isinstance(value, (list, tuple, set, frozenset)):
            items = [self._plain(item, depth + 1) for item in value]
            return _NOT_PLAIN if any(i is _NOT_PLAIN for i in items) else type(value)(items)
        if isinstance(value, dict):
            table = {key: self._plain(item, depth + 1) for key, item in value.items()}
            return {key: item for key, item in table.items() if item is not _NOT_PLAIN}
        return _NOT_PLAIN


_NOT_PLAIN = object()


def _kind(value: Any) -> str:
    """A value's kind in a word or two, for messages."""
    if isinstance(value, PickledObject):
        return f"stand-in for {value.class_name[:80]}"
    if isinstance(value, _Global):
        return f"name {value.name[:80]}"
    return {_Mark: "mark", _Storage: "storage"}.get(type(value), type(value).__name__)


def _refusal(name: str | Path, what: str) -> CheckpointError:
    """One printable line, whatever text the file supplied."""
    return CheckpointError(f"{name} {re.sub(r'[^ -~]+', '?', what)[:250]}")
