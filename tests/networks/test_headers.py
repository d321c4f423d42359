"""Headers of files of weights: torch reads the same tensors, plain data stays, and nothing in a file is run."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import random
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from haste.networks import headers, pickles
from haste.networks.tensors import read

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.float8_e4m3fn, torch.uint16]
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def found_in(path):
    """What a file holds, with its tensors read from where the headers say that they lie."""
    return read(path, "weights")


@st.composite
def tensors(draw):
    """Tensors of any type, whole, transposed, cut out of others, empty, or without dimensions."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    base = torch.randn([n + 2 for n in shape]).mul(50)
    dtype = draw(st.sampled_from(DTYPES))
    base = (base.abs() if dtype in (torch.uint8, torch.uint16) else base).to(dtype)
    for dim, n in enumerate(shape):
        base = base.narrow(dim, draw(st.integers(0, 2)), n)
    return base.transpose(0, -1) if draw(st.booleans()) and base.ndim else base


def equal(one, other):
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    one, other = (value.contiguous().view(bits[value.element_size()]) for value in (one, other))
    return one.shape == other.shape and torch.equal(one, other)


@settings(quick, max_examples=150)
@given(found=st.lists(tensors(), max_size=4), layout=st.sampled_from(["zip", "old", "safetensors"]))
def test_tensors_are_where_the_headers_say_as_torch_reads_them(tmp_path, found, layout):
    held = {f"t{i}": value for i, value in enumerate(found)}
    path = tmp_path / "file"
    if layout == "safetensors":
        save_file({name: value.contiguous().clone() for name, value in held.items()}, path)
        again = found_in(path)
    else:
        held |= {
            "shared": found[0].flatten() if found else torch.ones(2),
            "parameter": torch.nn.Parameter(torch.ones(3)),
        }
        torch.save({"model": held, "list": [*found]}, path, _use_new_zipfile_serialization=layout == "zip")
        again = found_in(path)["model"]
    assert again.keys() == held.keys()
    for name, value in held.items():
        assert again[name].dtype == value.dtype and equal(again[name], value.detach())


def saved(path, found, **options):
    torch.save(found, path, **options)
    return path


PLAIN = {
    "a NumPy number": (np.float64(2.5), 2.5),
    "a NumPy whole number": (np.int64(-7), -7),
    "a NumPy truth": (np.bool_(True), True),
    "NumPy's text": (np.str_("abc"), "abc"),
    "a path": (pathlib.PurePosixPath("/a/b"), "/a/b"),
    "a path of this machine": (Path("a/b"), "a/b"),
    "a path of Windows": (pathlib.PureWindowsPath("C:/a/b"), "C:\\a\\b"),
    "a set": ({1, 2}, {1, 2}),
    "an OrderedDict": (collections.OrderedDict(a=1), {"a": 1}),
    "a defaultdict": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "a shape": (torch.Size([1, 2]), (1, 2)),
    "a device": (torch.device("cuda", 1), "cuda:1"),
    "a type": (torch.bfloat16, "bfloat16"),
    "a complex number": (1j, 1j),
    "bytes": (b"\x00\xff", b"\x00\xff"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", PLAIN)
def test_numbers_paths_and_collections_are_plain_data(tmp_path, name, protocol, zipped):
    given_, expected = PLAIN[name]
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    path = saved(tmp_path / "a.pt", {"x": given_, "args": argparse.Namespace(x=given_)}, **options)
    held, _ = headers.contents(path)
    assert held["x"] == expected and type(held["x"]) in (type(expected), pickles._Dictionary)
    assert isinstance(held["args"], pickles.Namespace) and held["args"].entries["x"] == expected


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_programs_keep_beside_weights_is_passed_over(tmp_path, protocol):
    kept = {
        "state": np.random.RandomState(0).get_state(),
        "generator": np.random.default_rng(0),
        "random": random.getstate(),
        "torch": torch.get_rng_state(),
        "array": np.arange(6.0).reshape(2, 3).T,
        "objects": np.array([{}, None], object),
        "when": datetime.datetime.now(),
        "records": np.zeros(2, [("a", "i4")]),
    }
    held, _ = headers.contents(
        saved(tmp_path / "a.pt", {**kept, "ema": {"w": torch.ones(2)}}, pickle_protocol=protocol)
    )
    assert held["ema"]["w"].shape == (2,) and "<f8 (3, 2)" in repr(held["array"])
    assert held["random"] == kept["random"] and held["state"][0] == "MT19937"


class Runs:
    def __init__(self, function, *arguments):
        self.what = (function, arguments)

    def __reduce__(self):
        return self.what


GADGETS = [os.system, eval, exec, getattr, __import__, open, pickle.loads, np.load, torch.load, io.open_code, print]
GADGETS += [torch.hub.load, np.testing.assert_array_equal, bytearray, pathlib.Path.unlink]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", GADGETS, ids=lambda function: function.__name__)
def test_a_function_is_refused_by_name_and_not_called(tmp_path, monkeypatch, function, zipped):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.pt", {"x": Runs(function, "touch made")}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pt: refused: it holds [\w.]+, which could run code"):
        headers.contents(path)
    assert os.listdir(tmp_path) == ["a.pt"]


def pickled(path, content):
    """A zip archive of torch's around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content)
    return path


def test_a_pickle_changes_none_of_the_functions_and_classes_that_it_is_given(tmp_path):
    before = dict(pickles.Namespace.__dict__)
    changes = [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",  # attributes of a function
        b"\x80\x02cargparse\nNamespace\nN}X\x07\x00\x00\x00entriesK\x01s\x86b.",  # attributes of a class
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",  # of an object: it keeps its methods
    ]
    for content in changes:
        try:
            held, _ = headers.contents(pickled(tmp_path / "a.pt", content))
        except ValueError as refusal:
            assert "a.pt: " in str(refusal)
        else:
            assert not isinstance(held, dict) or list(held.items()) == []
    assert dict(pickles.Namespace.__dict__) == before and not hasattr(pickles._tensor, "a")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The pickle within a file that holds a little of everything."""
    kept = {name: value for name, (value, _) in PLAIN.items()} | {"array": np.arange(3.0)}
    kept |= {"ema": {f"w{i}": torch.ones(2, 3) for i in range(3)}, "args": argparse.Namespace(a=[1, (2, "x")])}
    path = saved(tmp_path_factory.mktemp("whole") / "a.pt", kept)
    with zipfile.ZipFile(path) as archive:
        return archive.read("a/data.pkl"), {name: archive.read(name) for name in archive.namelist()}


@settings(quick, max_examples=400)
@given(changes=st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_pickle_is_read_or_refused_with_the_files_name(tmp_path, whole, changes):
    content, records = whole
    broken = bytearray(content)
    for place, value in changes:
        broken[int(place * len(broken))] = value
    with zipfile.ZipFile(tmp_path / "fuzzed.pt", "w") as archive:
        for name, record in {**records, "a/data.pkl": bytes(broken)}.items():
            archive.writestr(name, record)
    try:
        headers.contents(tmp_path / "fuzzed.pt")
    except ValueError as refusal:
        assert "fuzzed.pt: " in str(refusal)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x96" + (2**30).to_bytes(8, "little") + b".",  # a bytearray, of which a machine has the memory
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",  # bytes
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a place far out in the memo
        b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.",  # a frame
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",  # a call that allocates
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_claims_terabytes_allocates_none(tmp_path, content, zipped):
    start = b"".join(pickle.dumps(part, 2) for part in (headers._MAGIC, headers._PROTOCOL, {}))
    (tmp_path / "a.pt").write_bytes(start + content)
    if zipped:
        pickled(tmp_path / "a.pt", content)
    tracemalloc.start()
    try:
        headers.contents(tmp_path / "a.pt")
    except ValueError as refusal:
        assert "a.pt: " in str(refusal)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_of_a_large_file_the_headers_alone_are_read(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[1000000,1000],"data_offsets":[0,4000000000]}}'
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4_000_000_000)  # a hole: it takes no room on the disk
    path = saved(tmp_path / "a.pt", {"w": torch.ones(5_000_000)})
    tracemalloc.start()
    assert headers.contents(tmp_path / "a.safetensors")[0]["w"].shape == (1_000_000, 1000)
    assert headers.contents(path)[0]["w"].shape == (5_000_000,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    "header",
    [
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        '{"w":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
        '{"w":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}',
        '{"w":{"dtype":"F32","shape":[1]}}',
        '{"w":7}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "[]",
    ],
)
def test_a_header_of_safetensors_that_contradicts_itself_is_refused(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4)
    with pytest.raises(ValueError, match=r"a\.safetensors: expected a checkpoint, found "):
        headers.contents(tmp_path / "a.safetensors")


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", torch.ones(3))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickle_ = records["a/data.pkl"].replace(b"K\x03\x85", b"K\x7f\x85", 1)
    assert pickle_ != records["a/data.pkl"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in {**records, "a/data.pkl": pickle_}.items():
            archive.writestr(name, record)
    with pytest.raises(ValueError, match=r"beyond its 3 numbers"):
        headers.contents(path)
