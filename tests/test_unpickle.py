"""Pickles are read without running anything, whatever they say."""

import contextlib
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from convert.reading.native.unpickle import Call, Global, Persistent, UnpickleError, unpickle

MOST = 2**20
PLAIN = {
    "a": [1, -5, 2**40, 1.5, None, True, False],
    "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "c": {},
}


class Runs:
    """A class whose pickle calls what it is told to."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back_as_pickle_gives_them(protocol: int) -> None:
    shared = ["x" * 300]
    value = {**PLAIN, "twice": [shared, shared], "long": list(range(3000)), "text": "ü"}
    found = unpickle(pickle.dumps(value, protocol), (), MOST)
    assert found == value
    assert found["twice"][0] is found["twice"][1]


def test_what_is_admitted_becomes_a_stand_in_that_was_never_called() -> None:
    data = pickle.dumps(Path("/nowhere/x"), 4)
    name = f"{type(Path()).__module__}.PosixPath"
    found = unpickle(data, {name}, MOST)
    assert isinstance(found, Call)
    assert found.name == name
    assert unpickle(pickle.dumps(OrderedDict(a=1)), {"collections.OrderedDict"}, MOST) == {"a": 1}


def test_a_global_is_a_name_and_a_persistent_id_a_value() -> None:
    assert unpickle(b"\x80\x02ctorch\nfloat32\n.", {"torch.float32"}, MOST) == Global("torch.float32")
    assert unpickle(b"\x80\x02(X\x01\x00\x00\x00aK\x01tQ.", (), MOST) == Persistent(("a", 1))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Runs(os.system, "touch {}"), "posix.system"),
        (Runs(eval, "open('{}', 'w')"), "builtins.eval"),
        (Runs(getattr, "x", "upper"), "builtins.getattr"),
        (os.path.join, "posixpath.join"),
        (Call("x", ()), "convert.reading.native.unpickle.Call"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_not_on_the_list_is_refused_by_its_name(
    value: Any, named: str, protocol: int, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    if isinstance(value, Runs):
        function, args = value.call
        value = Runs(function, *(a.format(ran) for a in args))
    data = pickle.dumps([value], protocol)
    with pytest.raises(UnpickleError, match=named.replace("builtins", "(builtins|__builtin__)")):
        unpickle(data, {"torch.Size"}, MOST)
    assert not ran.exists()


DAMAGED = {
    "a name with a dot": (b"\x8c\x05torch\x8c\x0bSize.__init\x93.", "Size.__init"),
    "names doubled again and again": (
        b")q\x00" + b"h\x00\x86q\x00" * 20 + b"h\x00\x93.",
        "a tuple and a tuple",
    ),
    "a large number as a key": (
        b"}\x8a\x08" + struct.pack("<q", 2**61 - 1) + b"K\x01s.",
        "more than 32 bits",
    ),
    "calling a value": (b"X\x01\x00\x00\x00a)R.", "calls a str"),
    "calling what was made": (b"ctorch\nSize\n)\x85R)R.", "calls a tuple"),
    "attributes of a global": (b"ctorch\nSize\n}X\x03\x00\x00\x00abcK\x01sb.", "changes a Global"),
    "attributes of a list": (b"]}b.", "changes a list"),
    "items of a call": (b"ctorch\nsize\n)R(K\x01K\x01u.", "changes a Call"),
    "appending to a tuple": (b")K\x01a.", "changes a tuple"),
    "a nested tuple as a key": (b"})\x85\x85K\x01s.", "tuple as a key"),
    "an odd number of items": (b"}(K\x01u.", "damaged"),
    "an extension": (b"\x82\x01.", "opcode"),
    "an instance": (b"(ctorch\nSize\no.", "opcode"),
    "copyreg's way": (b"ctorch\nSize\n)}\x92.", "opcode"),
    "a string of eight bytes' length": (b"\x8d" + struct.pack("<Q", 2**60) + b".", "opcode"),
    "bytes made at once": (b"\x96" + struct.pack("<Q", 2**40) + b".", "opcode"),
    "more text than there is": (b"X\xff\xff\xff\xffabc.", "cut short"),
    "an empty memo": (b"h\x07.", "damaged"),
    "a mark kept": (b"(q\x00.", "cut short"),
    "a mark as a value": (b"(.", "cut short"),
    "nothing to pop": (b".", "cut short"),
    "no mark": (b"K\x01t.", "cut short"),
    "no end": (b"\x80\x04N", "cut short"),
    "nothing": (b"", "cut short"),
    "a size out of a list": (b"ctorch\nSize\n](K\x01e\x85R.", "damaged"),
    "text that is none": (b"X\x01\x00\x00\x00\xff.", "damaged"),
}


@pytest.mark.parametrize(("data", "said"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_or_does_more_than_it_should_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(UnpickleError, match=said):
        unpickle(data, {"torch.Size", "torch.size"}, MOST)


def test_a_huge_place_in_the_memo_costs_nothing() -> None:
    assert unpickle(b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff.", (), MOST) is None


def test_attributes_are_kept_and_never_set() -> None:
    data = b"ctorch\nsize\n)\x81}X\x09\x00\x00\x00__class__X\x01\x00\x00\x00xsb."
    found = unpickle(data, {"torch.size"}, MOST)
    assert type(found) is Call
    assert (found.name, found.args, found.state) == ("torch.size", (), {"__class__": "x"})
    assert not hasattr(Call, "x")


def test_doubling_again_and_again_makes_one_object_an_opcode() -> None:
    """Tuples of the same tuple twice: 2 to the 60 when written out, sixty objects here."""
    found = unpickle(b")q\x00" + b"h\x00\x86q\x00" * 60 + b".", (), MOST)
    assert found[0] is found[1]


def test_depth_does_not_overflow_anything() -> None:
    found = unpickle(b")" + b"\x85" * (100_000) + b".", (), MOST)
    assert type(found) is tuple


def test_more_than_the_bound_is_not_even_begun() -> None:
    with pytest.raises(UnpickleError, match="expected at most 10"):
        unpickle(pickle.dumps(list(range(100))), (), 10)


def test_a_pickle_cut_anywhere_is_refused() -> None:
    data = pickle.dumps(PLAIN, 4)
    for end in range(len(data)):
        with pytest.raises(UnpickleError):
            unpickle(data[:end], (), MOST)


def test_a_pickle_with_any_byte_changed_is_read_or_refused() -> None:
    data = pickle.dumps([PLAIN, Path("x")], 4)
    for place in range(len(data)):
        for change in (0x01, 0x10, 0x80, 0xFF):
            changed = data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]
            with contextlib.suppress(UnpickleError):
                unpickle(changed, {"pathlib.PosixPath"}, MOST)
