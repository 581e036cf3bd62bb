"""JSON that is read is what a canonical writer would have written, or it is refused before it costs anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache.errors import Refused, UsageError
from redistill_cache.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES
from redistill_cache.strict_json import canonical, json_copy, parse

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def read(data: bytes) -> Any:
    return parse(data, cap=1 << 26, where="here")


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read(value: Any):
    data = canonical(value)
    assert canonical(read(data)) == data
    assert read(json.dumps(value).encode()) == value, "escaped, with spaces, in any order"
    assert canonical(json_copy(value, "a value")) == data


@given(st.binary(max_size=60) | TEXTS.map(str.encode) | VALUES.map(canonical).map(lambda data: data[:-1]))
@settings(max_examples=150, deadline=None)
def test_anything_else_is_refused_in_one_line(data: bytes):
    message = ""
    try:
        read(data)
    except Refused as error:
        message = str(error)
    else:
        json.loads(data)
    assert message.isprintable()
    assert len(message) < 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a":1,"a":1}', "duplicate key"),
        (b'{"a":{"b":[{"c":1,"c":2}]}}', "duplicate key"),
        (b"NaN", "not a number"),
        (b"[-Infinity]", "not a number"),
        (b"1e999", "not finite"),
        (b"-18446744073709551616", "64 bits"),
        (b"18446744073709551616", "64 bits"),
        (b"9" * 5000, "64 bits"),
        (b'"\\ud800"', "surrogates"),
        (b'["\xff"]', "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"{} {}", "Extra data"),
        (b"", "Expecting value"),
        (b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1), "nested 33 deep"),
        (b"[" + b"0," * MAX_JSON_VALUES + b"0]", "values, more than the limit"),
        (b'["' + b'","' * MAX_JSON_VALUES + b'"]', "values, more than the limit"),
    ],
)
def test_refusals_say_why(text: bytes, words: str):
    with pytest.raises(Refused, match=words):
        read(text)


def test_brackets_and_commas_inside_texts_are_texts():
    value = {"names": ["{[,]}" * 1000, '\\"[[[[' * 1000, "\\"] * 10, "deep": "[" * 10_000}
    assert read(canonical(value)) == value
    assert read(b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH)


@pytest.mark.timeout(60)
def test_no_text_takes_long():
    """Half texts, escapes and quotes in every arrangement that could send a pattern back to look again, for hours."""
    for piece in (b'\\"', b'"', b"\\", b'\\\\"', b'",', b'{"', b'"a":"', b"[]", b'\\u"'):
        for end in (b"", b"\\", b'"'):
            with pytest.raises(Refused):
                read(b'["' + piece * 300_000 + end)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1: 2}, {"a": object()}, "\ud800", {"a": "\udfff"}, b"bytes", {"a": 1j}],
)
def test_what_is_no_json_is_refused_when_it_is_given(value: object):
    with pytest.raises(UsageError, match="plain JSON"):
        json_copy(value, "a value")
