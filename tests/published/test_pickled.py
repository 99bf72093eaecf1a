import contextlib
import functools
import io
import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shine.errors import InputError
from shine.published.pickled import open_torch_file

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def read(path, key="model"):
    with open_torch_file(path) as file:
        return file.content, file.tensors(file.content[key])


def published(state):
    """What a training program keeps, its optimiser and scheduler included."""
    parameters = [torch.nn.Parameter(value) for value in state.values() if value.dim()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    options = Namespace(device=torch.device("cuda", 0), lr=1e-4, sizes=[1, 2], name=None, on=True)
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 7,
        "opt": options,
    }


@FORMATS
def test_tensors_and_options_of_a_whole_checkpoint_are_read_bit_for_bit(tmp_path, zipped):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    content, tensors = read(saved(tmp_path / "a.ckpt", published(layer.state_dict()), zipped))
    assert list(tensors) == list(layer.state_dict())
    assert all(torch.equal(tensors[name], v) for name, v in layer.state_dict().items())
    expected = {"device": "cuda:0", "lr": 1e-4, "sizes": [1, 2], "name": None, "on": True}
    assert vars(content["opt"]) == expected
    assert content["epoch"] == 7


@FORMATS
def test_views_parameters_scalars_and_every_known_type_are_read(tmp_path, zipped):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "transposed": whole.T,
        "cut": whole[1:3, ::2],
        "parameter": torch.nn.Parameter(whole),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        **{
            str(kind).removeprefix("torch."): torch.tensor([0, 1, 1]).to(kind)
            for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
        },
    }
    _, tensors = read(saved(tmp_path / "a.ckpt", {"model": state}, zipped))
    for name, value in state.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value.detach())


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


class Restored:
    """Pickles as an object whose `__setstate__` runs."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        open(state["path"], "w").close()


class WithSlots(Namespace):
    """A namespace by another name."""


def gadgets(canary):
    """Objects that, unpickled as Python unpickles, create the file `canary` or would harm."""
    touch = f"touch {canary}"
    return {
        "os.system": Calls(os.system, touch),
        "exec": Calls(exec, f"open({str(canary)!r}, 'w').close()"),
        "open": Calls(open, str(canary), "w"),
        "partial": Calls(functools.partial(os.system, touch)),
        "partial object": functools.partial(os.system, touch),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "setstate": Restored(str(canary)),
        "np.load": Calls(np.load, str(canary), None, True),
        "numpy array of objects": np.array([Calls(os.system, touch)], dtype=object),
        "numpy scalar": np.float64(1),
        "torch.load": Calls(torch.load, str(canary)),
        "tensor of a call": Calls(torch.tensor, Calls(os.system, touch)),
        "large bytes": Calls(bytearray, 10**15),
        "large tensor": Calls(torch.Tensor, 10**9, 10**9),
        "codec": Calls(__import__("codecs").encode, "x", "rot13"),
        "subclass": WithSlots(x=1),
        "nested": {"a": [({"b": Calls(os.system, touch)},)]},
        "set": {1, 2},
        "bytes": b"abc",
        "function": os.system,
        "class": Restored,
    }


NAMES = list(gadgets("x"))


@FORMATS
@pytest.mark.parametrize("place", ["opt", "inside opt", "model", "inside model", "top", "key"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_hostile_file_runs(tmp_path, name, place, zipped):
    canary = tmp_path / "canary"
    gadget = gadgets(canary)[name]
    good = {"model": OrderedDict(w=torch.zeros(2)), "opt": Namespace(lr=1.0), "epoch": 1}
    content = {
        "opt": {**good, "opt": gadget},
        "inside opt": {**good, "opt": Namespace(device=[gadget])},
        "model": {**good, "model": gadget},
        "inside model": {**good, "model": OrderedDict(w=torch.zeros(2), v=gadget)},
        "top": gadget,
        "key": {**good, "optimizer": {"state": {0: gadget}}},
    }[place]
    path = saved(tmp_path / "hostile.ckpt", content, zipped)
    with pytest.raises(InputError, match=r"hostile.ckpt: refused, since it .*nothing .* was run"):
        read(path)
    assert not canary.exists()


def test_the_canary_of_the_hostile_files_sings_when_python_unpickles_them(tmp_path):
    """Otherwise the test above could not fail."""
    for name in ("os.system", "exec", "setstate", "numpy array of objects", "nested"):
        canary = tmp_path / name.replace(" ", "_")
        torch.load(saved(tmp_path / "a.ckpt", gadgets(canary)[name]), weights_only=False)
        assert canary.exists()


def zip_with(path, pickled):
    """An archive in the layout of torch whose pickle is given byte by byte."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", b"\0" * 8)
    return path


NAMESPACE = b"\x80\x02cargparse\nNamespace\n)\x81"


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cposix\nsystem\n.",  # by its name alone
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",  # the name taken from the stack
        b"\x80\x02(S'x'\nios\nsystem\n.",  # an instance made by name
        b"\x80\x02}(cos\nsystem\nX\x01\x00\x00\x00xo.",  # an object made from the stack
        b"\x80\x02\x82\x01.",  # an extension registered by number
        b"\x80\x02P0\n.",  # a persistent name in text
        NAMESPACE + b"X\x09\x00\x00\x00__class__" + b"b.",  # state that is no dictionary
        NAMESPACE + b"}X\x01\x00\x00\x00a}s\x86b.",  # state for slots
        NAMESPACE + b"]X\x01\x00\x00\x00aX\x01\x00\x00\x00bes.",
        b"\x80\x02cargparse\nNamespace\nX\x01\x00\x00\x00a\x85R.",  # a namespace made by a call
        b"\x80\x02ctorch\ndevice\n]R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # a storage made by a call
        b"\x80\x02ctorch\nFloatStorage\n)\x81.",
        b"\x80\x02}}b.",  # state for a dictionary
        b"\x80\x02X\x07\x00\x00\x00storage\x85Q.",  # a storage without its place
        b"\x80\x02e.",
        b"\x80\x02u.",
        b"\x80\x020.",
        b"\x80\x02..",
        b"\x80\x02.",
        b"\x80\x02}}.",
        b"",
        b"\x80\x02h\x05.",
        b"\x80\x02\x8a\xff" + b"\x01" * 3,  # less than it says
        b"\x80\x02}(]K\x01u.",  # a list as a key
        b"\x80\x02}(K\x01u.",  # half an entry
        b"\x80\x02ctorch\n\\p\n.",  # a name that Python would not write
    ],
)
def test_pickles_made_by_hand_are_refused(tmp_path, pickled):
    with pytest.raises(InputError):
        read(zip_with(tmp_path / "a.ckpt", pickled))


def tensor_pickle(offset, size, stride, length):
    """A checkpoint of one tensor that claims what its numbers say."""

    class Unpickled:
        def __init__(self, text):
            self.text = text

    class Writer(pickle.Pickler):
        def persistent_id(self, thing):
            return thing.text if isinstance(thing, Unpickled) else None

    rebuild = torch._utils._rebuild_tensor_v2
    storage = Unpickled(("storage", torch.FloatStorage, "0", "cpu", length))
    claim = Calls(rebuild, storage, offset, size, stride, False, OrderedDict())
    stream = io.BytesIO()
    Writer(stream, protocol=2).dump({"model": {"w": claim}})
    return stream.getvalue()


def test_a_tensor_within_its_numbers_is_read(tmp_path):
    path = zip_with(tmp_path / "a.ckpt", tensor_pickle(0, (2, 1), (1, 1), 2))
    assert torch.equal(read(path)[1]["w"], torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("offset", "size", "stride", "length"),
    [
        (0, (10**6, 10**6), (0, 0), 2),  # the same number again and again
        (0, (3,), (1,), 2),
        (1, (2,), (1,), 2),
        (-1, (1,), (1,), 2),
        (0, (2,), (-1,), 2),
        (0, (-2, -1), (1, 1), 2),
        (0, (2,), (2**62,), 2),
        (0, (2,), (), 2),
        (0, (2,), (1,), 3),
        (0, (2,), (1,), -2),
    ],
)
def test_a_tensor_beyond_its_numbers_is_refused(tmp_path, offset, size, stride, length):
    path = zip_with(tmp_path / "a.ckpt", tensor_pickle(offset, size, stride, length))
    with pytest.raises(InputError):
        read(path)


def test_tensors_that_share_numbers_do_not_grow_beyond_the_file(tmp_path):
    shared = torch.zeros(1000)
    state = {f"w{i}": shared for i in range(1000)}
    with pytest.raises(InputError, match="claim numbers that the file does not hold"):
        read(saved(tmp_path / "a.ckpt", {"model": state}))


@pytest.mark.parametrize("count", [-1, 0, 1, 3, 2**63 - 1])
def test_a_count_of_the_older_format_must_be_that_of_its_tensor(tmp_path, count):
    path = saved(tmp_path / "a.ckpt", {"model": {"w": torch.ones(2)}}, zipped=False)
    content = path.read_bytes()  # ends in the count and the two numbers
    assert content[-16:-8] == (2).to_bytes(8, "little")
    path.write_bytes(content[:-16] + count.to_bytes(8, "little", signed=True) + content[-8:])
    with pytest.raises(InputError, match="not a whole file"):
        read(path)


def test_compressed_archives_are_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(InputError, match="compressed"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4", b"\x80\x02}.", b"\x80", b"\0" * 99])
def test_other_files_are_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other.ckpt"):
        read(path)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "absent.ckpt", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            read(path)


@functools.cache
def whole(zipped):
    stream = io.BytesIO()
    state = {"w": torch.ones(3, 5), "b": torch.ones(3)}
    torch.save(published(state), stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@given(zipped=st.booleans(), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory, zipped, share):
    path = tmp_path_factory.mktemp("cut") / "a.ckpt"
    path.write_bytes(whole(zipped)[: int(len(whole(zipped)) * share)])
    with pytest.raises(InputError):
        read(path)


@given(
    zipped=st.booleans(),
    share=st.floats(0, 1, exclude_max=True),
    bytes_=st.binary(min_size=1, max_size=9),
)
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, zipped, share, bytes_):
    content = bytearray(whole(zipped))
    start = int(len(content) * share)
    content[start : start + len(bytes_)] = bytes_
    path = tmp_path_factory.mktemp("damaged") / "a.ckpt"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        read(path)
