"""The reader of EG3D's pickles: right on good files, one sentence and no harm on hostile ones."""

import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from densityrl.errors import CheckpointError
from densityrl.generator import load_generator
from densityrl.generator.pickle_reader import PickledObject, read_network_pickle, read_pickle

PROTO = b"\x80\x04"


def refused(path, content=None):
    """The one sentence with which a file is refused."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_network_pickle(path)
    message = str(caught.value)
    assert message.startswith(str(path)) or str(path) in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))
    return message


def text(value):
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


def name(module, qualified):
    return text(module) + text(qualified) + b"\x93"


def call(module, qualified, *arguments):
    """Instructions that call a global with arguments that are instructions themselves."""
    return name(module, qualified) + b"(" + b"".join(arguments) + b"tR"


def snapshot(value):
    """A file whose G_ema is what these instructions leave."""
    return PROTO + b"}" + text("G_ema") + value + b"s."


def number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def binary(data):
    return b"B" + struct.pack("<I", len(data)) + data


def legacy_storage(values, claimed=None, identity=None, system=None):
    """torch's layout before 1.6 around float32 values, honest unless told otherwise."""
    count = len(values) if claimed is None else claimed
    identity = identity or (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("k")
        + text("cuda:0")
        + number(count)
        + b"NtQ"
    )
    system = system or pickle.dumps({"little_endian": True}, 2)
    parts = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        system,
        b"\x80\x02" + identity + b".",
        pickle.dumps(["k"], 2),
        struct.pack("<q", count),
        struct.pack(f"<{len(values)}f", *values),
    ]
    return b"".join(parts)


def tensor(storage, offset=b"K\x00", size=(2,), stride=(1,)):
    def tuple_of(numbers):
        return b"(" + b"".join(map(number, numbers)) + b"t"

    loaded = call("torch.storage", "_load_from_bytes", binary(storage))
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        loaded,
        offset,
        tuple_of(size),
        tuple_of(stride),
        b"\x89",
        call("collections", "OrderedDict"),
    )


def module(parameters=b"}", modules=b"}", extra=b""):
    state = (
        b"}("
        + text("_parameters")
        + parameters
        + text("_buffers")
        + b"}"
        + text("_modules")
        + modules
        + extra
        + b"u"
    )
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("Net")
    meta += text("module_src") + text("raise SystemExit('run!')") + text("state") + state + b"u"
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def good_file():
    parameter = b"}" + text("weight") + tensor(legacy_storage([1.5, -2.0])) + b"s"
    child = b"}" + text("conv") + module(parameter) + b"s"
    gain = call(
        "numpy.core.multiarray",
        "scalar",
        call("numpy", "dtype", text("f8"), b"\x89", b"\x88"),
        binary(struct.pack("<d", 0.125)),
    )
    return snapshot(module(modules=child, extra=text("gain") + gain + text("n") + number(-300)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pkl"


# --- good files ----------------------------------------------------------------------------------


def test_a_small_network_by_hand(path):
    path.write_bytes(good_file())
    record = read_network_pickle(path)
    assert record.class_name == "Net"
    assert record.attributes == {"gain": 0.125, "n": -300}
    assert list(record.modules) == ["", "conv"]
    assert record.tensors["conv.weight"].tolist() == [1.5, -2.0]
    assert record.parameter_names == {"conv.weight"}


def test_every_tensor_of_the_official_format(shared_data):
    folder = shared_data / "eg3d_parity"
    lines = (folder / "state_dict_keys.txt").read_text().splitlines()
    record = read_network_pickle(folder / "eg3d_tiny.pkl")
    found = [
        (
            key,
            str(list(value.shape)),
            str(value.dtype).removeprefix("torch."),
            "param" if key in record.parameter_names else "buffer",
        )
        for key, value in record.tensors.items()
    ]
    assert found == [tuple(line.split("\t")) for line in lines]
    assert record.modules["decoder.net.0"].attributes["bias_gain"] == 1.0
    assert record.modules["renderer"].attributes["plane_axes"].shape == (3, 3, 3)


def test_the_other_networks(shared_data):
    file = shared_data / "eg3d_parity" / "eg3d_tiny.pkl"
    assert read_network_pickle(file, "D").class_name == "DualDiscriminator"
    ours, averaged = (read_network_pickle(file, w).tensors for w in ("G", "G_ema"))
    assert list(ours) == list(averaged)
    assert not torch.equal(ours["decoder.net.0.weight"], averaged["decoder.net.0.weight"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_protocol(path, protocol):
    value = {"a": [1, -2.5, None, True, "x" * 300, (1, 2, 3, 4)], "b": {"c": 2**70}}
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_pickle(path) == value


def test_shared_and_cyclic_values(path):
    value = {"a": [1]}
    value["b"] = value["a"]
    value["self"] = value
    path.write_bytes(pickle.dumps(value, 4))
    ours = read_pickle(path)
    assert ours["a"] is ours["b"]
    assert ours["self"] is ours


def test_unknown_objects_are_inert(path):
    opened = name("subprocess", "Popen") + b"(" + text("touch canary") + b"t\x81"
    path.write_bytes(PROTO + opened + b".")
    assert read_pickle(path) == PickledObject("subprocess.Popen", {})


# --- files that are something else ----------------------------------------------------------------


def test_not_a_pickle(path, tmp_path):
    assert "empty" in refused(path, b"")
    assert "zeros" in refused(path, bytes(1000))
    assert "web page" in refused(path, b"<!doctype html><html>")
    assert "gzip" in refused(path, b"\x1f\x8b\x08" + bytes(40))
    assert "something else" in refused(path, b"\x89PNG\r\n\x1a\n")
    assert "cannot read" in refused(tmp_path / "missing.pkl")
    assert "cannot read" in refused(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    assert "zip archive" in refused(path)
    torch.save({"G_ema": torch.ones(3)}, path)
    assert "zip archive" in refused(path)


def test_another_pickle(path):
    assert "it has D, G" in refused(path, pickle.dumps({"G": 1, "D": 2}))
    assert "no dictionary" in refused(path, pickle.dumps([1, 2]))
    assert "has a str as G_ema" in refused(path, pickle.dumps({"G_ema": "x"}))


def test_keys_that_are_no_names(path):
    """A number of ten thousand digits has no text in Python."""
    huge = b"\x8b" + struct.pack("<i", 9000) + b"\x7f" * 9000
    message = refused(path, PROTO + b"}(" + huge + b"N" + text("D") + b"Nu.")
    assert "has no G_ema: it has D" in message


def test_another_network_is_no_generator(path):
    path.write_bytes(good_file())
    with pytest.raises(CheckpointError, match=r"holds a Net, not EG3D's TriPlaneGenerator"):
        load_generator(path)


def test_a_generator_without_its_tensors(path):
    meta = module(extra=text("z_dim") + number(4)).replace(text("Net"), text("TriPlaneGenerator"))
    path.write_bytes(snapshot(meta))
    with pytest.raises(CheckpointError, match="not the EG3D generator it claims to be"):
        load_generator(path)


def test_truncated_anywhere(path, shared_data):
    content = (shared_data / "eg3d_parity" / "eg3d_tiny.pkl").read_bytes()
    cuts = [1, 2, 3, 20, 1000, len(content) - 1]
    cuts += [random.Random(0).randrange(len(content)) for _ in range(8)]
    for cut in cuts:
        refused(path, content[:cut])


# --- files built to do harm -----------------------------------------------------------------------

HARMFUL_CALLS = {
    "posix.system": ("posix", "system"),
    "os.system": ("os", "system"),
    "builtins.eval": ("builtins", "eval"),
    "builtins.exec": ("__builtin__", "exec"),
    "subprocess.check_output": ("subprocess", "check_output"),
    "torch.load": ("torch", "load"),
    "torch.storage._load_from_bytes": ("torch.storage", "_load_from_bytes"),
    "functools.partial": ("functools", "partial"),
    "copyreg.add_extension": ("copyreg", "add_extension"),
    "importlib.import_module": ("importlib", "import_module"),
    "numpy.load": ("numpy", "load"),
}


@pytest.mark.parametrize("shown", HARMFUL_CALLS)
def test_a_call_is_refused_by_name(path, tmp_path, shown):
    canary = tmp_path / "canary"
    command = text(f"touch {canary}")
    message = refused(path, snapshot(call(*HARMFUL_CALLS[shown], command)))
    assert f"asks to call {shown}" in message
    assert not canary.exists()


def test_what_pickle_itself_would_have_run(path, tmp_path):
    canary = tmp_path / "canary"

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for protocol in (2, 4, 5):
        message = refused(path, pickle.dumps({"G_ema": Harm()}, protocol))
        assert "asks to call posix.system" in message
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists()  # the file did carry what it was meant to carry


@pytest.mark.parametrize("place", ["identity", "system"])
def test_a_pickle_inside_a_storage(path, tmp_path, place):
    canary = tmp_path / "canary"
    harm = call("os", "system", text(f"touch {canary}"))
    harm = b"\x80\x02" + harm + b"." if place == "system" else harm + b"Q"
    storage = legacy_storage([1.0, 2.0], **{place: harm})
    message = refused(path, snapshot(module(b"}" + text("w") + tensor(storage) + b"s")))
    assert "asks to call os.system" in message
    assert "in a tensor's storage" in message
    assert not canary.exists()


def test_a_storage_inside_a_storage(path):
    inner = call("torch.storage", "_load_from_bytes", binary(legacy_storage([1.0])))
    storage = legacy_storage([1.0, 2.0], system=b"\x80\x02" + inner + b".")
    assert "_load_from_bytes" in refused(path, snapshot(tensor(storage)))


HONEST = legacy_storage([1.0, 2.0])
HOSTILE_VALUES = {
    "expanded": tensor(HONEST, size=(2**40,), stride=(0,)),
    "beyond": tensor(HONEST, size=(2,), stride=(5,)),
    "overlapping": tensor(HONEST, size=(2, 2), stride=(0, 1)),
    "negative offset": tensor(HONEST, offset=number(-1)),
    "negative size": tensor(HONEST, size=(-2,)),
    "text as offset": tensor(HONEST, offset=text("0")),
    "boolean as offset": tensor(HONEST, offset=b"\x88"),
    "lying storage": tensor(legacy_storage([1.0, 2.0], claimed=2**60)),
    "negative storage": tensor(legacy_storage([1.0, 2.0], claimed=-2)),
    "storage of rubbish": tensor(b"\x80\x02K\x01."),
    "storage of nothing": tensor(b""),
    "unknown storage type": tensor(
        legacy_storage(
            [1.0],
            identity=b"("
            + text("storage")
            + b"cos\nsystem\n"
            + text("k")
            + text("cpu")
            + number(1)
            + b"NtQ",
        )
    ),
    "tensor of a list": call("torch._utils", "_rebuild_tensor_v2", b"]"),
    "parameter of text": call("torch._utils", "_rebuild_parameter", text("x"), b"\x88", b"}"),
    "storage of text": call("torch.storage", "_load_from_bytes", text("x")),
    "numpy objects": call("numpy", "dtype", text("O8")),
    "short numpy scalar": call(
        "numpy.core.multiarray", "scalar", call("numpy", "dtype", text("f8")), binary(b"abc")
    ),
    "pairs that are none": call("collections", "OrderedDict", b"](K\x01K\x02e"),
    "persistent text": call("torch_utils.persistence", "_reconstruct_persistent_obj", text("x")),
    "persistent function": call(
        "torch_utils.persistence",
        "_reconstruct_persistent_obj",
        b"}" + text("type") + text("function") + b"s",
    ),
    "state of a list": b"]" + b"}b",
    "state that is text": name("a", "B") + b")\x81" + text("x") + b"b",
    "an instance as a function": name("a", "B") + b")\x81)R",
    "text as a class": text("x") + b")\x81",
    "arguments that are no tuple": name("a", "f") + b"}R",
    "a tuple as a key": b"}(" + b")K\x01u",
    "a list in a set": b"\x8f(]\x90",
    "key without value": b"}(K\x01u",
    "global of numbers": b"K\x01K\x02\x93",
    "missing memo": b"h\x07",
    "no mark": b"t",
    "empty stack": b"00000.",
    "instance opcode": b"(ios\nsystem\n",
    "object opcode": b"(cos\nsystem\n" + text("true") + b"o",
    "extension": b"\x82\x01",
    "persistent id outside": text("x") + b"Q",
    "out-of-band buffer": b"\x97",
    "huge bytes": b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
    "huge text": b"\x8d" + struct.pack("<Q", 2**40) + b"abc",
    "huge integer": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc",
    "negative integer length": b"\x8b" + struct.pack("<i", -5),
    "broken text": b"\x8c\x02\xff\xfe",
}


@pytest.mark.parametrize("what", HOSTILE_VALUES)
def test_hostile_values(path, what):
    refused(path, snapshot(HOSTILE_VALUES[what]))


def test_the_class_of_an_object_cannot_be_set(path):
    cls = b"}(" + text("__class__") + name("os", "system") + text("__dict__") + b"}u"
    path.write_bytes(PROTO + name("a", "B") + b")\x81" + cls + b"b.")
    found = read_pickle(path)
    assert type(found) is PickledObject
    assert found.class_name == "a.B"


BOMBS = {
    "lists": PROTO + b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples": PROTO + b")" + b"\x85" * 500_000 + b".",
    "marks": PROTO + b"(" * 30_000_000,
    "sets": PROTO + b"\x8f" * 30_000_000,
    "duplicates": PROTO + b"]" + b"2" * 30_000_000,
    "memo": PROTO + b"]r\xff\xff\xff\xff0" * 1000 + b"N.",
}


BUILT_BOMBS = (
    "modules",
    "options",
    "laughs",
    "one storage, many tensors",
    "one text, many encodings",
    "one list, many sets",
    "one list, many dictionaries",
    "one state, many objects",
)


def bomb(kind):
    if kind == "modules":
        value = module()
        for _ in range(300):
            value = module(modules=b"}" + text("m") + value + b"s")
        return snapshot(value)
    if kind == "options":
        nested = b"]" * 5000 + b"a" * 4999
        return snapshot(module(extra=text("rendering_kwargs") + nested))
    if kind == "laughs":
        doubled = b"(K\x01t" + b"22\x86" * 60
        return snapshot(module(extra=text("rendering_kwargs") + doubled))
    if kind == "one storage, many tensors":
        storage = legacy_storage([0.0] * 250_000)  # 1 MB, read once
        first = binary(storage) + b"q\x01" + b"0"
        again = call("torch.storage", "_load_from_bytes", b"h\x01")
        one = call(
            "torch._utils",
            "_rebuild_tensor_v2",
            again,
            number(0),
            b"(" + number(250_000) + b"t",
            b"(K\x01t",
            b"\x89",
            b"}",
        )
        return PROTO + first + b"](" + one * 2000 + b"e."
    if kind == "one text, many encodings":  # 1 MB, 50,000 times
        first = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x010"
        return PROTO + first + repeated(call("_codecs", "encode", b"h\x01", text("latin1")), 50_000)
    if kind == "one list, many sets":
        numbers = b"](" + b"".join(number(n) for n in range(30_000)) + b"eq\x010"
        return PROTO + numbers + repeated(call("builtins", "set", b"h\x01"), 20_000)
    if kind == "one list, many dictionaries":
        pairs = b"](" + b"".join(number(n) + b"N\x86" for n in range(30_000)) + b"eq\x010"
        return PROTO + pairs + repeated(call("collections", "OrderedDict", b"h\x01"), 20_000)
    if kind == "one state, many objects":
        state = b"}(" + b"".join(text(f"n{n}") + b"N" for n in range(30_000)) + b"uq\x010"
        return PROTO + state + repeated(name("a", "B") + b")\x81h\x01b", 20_000)
    return BOMBS[kind]


def repeated(instructions, times):
    return b"](" + instructions * times + b"e."


@pytest.mark.parametrize("kind", [*BOMBS, *BUILT_BOMBS])
def test_memory_and_stack_stay_bounded(path, kind):
    """In a process of its own: a crash, or memory beyond 350 MB above the start, fails."""
    path.write_bytes(bomb(kind))
    script = f"""
import resource, sys
from densityrl.errors import CheckpointError
from densityrl.generator.pickle_reader import read_network_pickle
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_network_pickle({str(path)!r})
except CheckpointError as error:
    assert chr(10) not in str(error), error
    print("refused", error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print("MB", grown // 1024)
sys.exit(grown > 350 * 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("refused")


def test_flipped_bytes_never_raise_anything_else(path):
    good = good_file()
    rng = random.Random(1)
    outcomes, messages = set(), []
    for _ in range(400):
        content = bytearray(good)
        content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read_network_pickle(path)
            outcomes.add("read")
        except CheckpointError as error:
            outcomes.add("refused")
            messages.append(str(error))
    assert outcomes == {"read", "refused"}
    assert not any("\n" in message for message in messages)


def test_what_follows_the_end_is_ignored(path):
    path.write_bytes(good_file() + b"trailing" + bytes(100))
    assert read_network_pickle(path).class_name == "Net"
