"""JSON is parsed, or refused before it takes time or memory; Fields validates its values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache.errors import Damaged, RedistillError, Refused, UsageError
from redistill_cache.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES
from redistill_cache.strict_json import Fields, canonical, json_copy, parse

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def read(data: bytes) -> Any:
    return parse(data, cap=1 << 26, where="input")


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_written_json_is_read_back(value: Any):
    data = canonical(value)
    assert canonical(read(data)) == data
    assert read(json.dumps(value).encode()) == value, "escaped, with spaces, in any order"
    assert canonical(json_copy(value, "a value")) == data


@given(st.binary(max_size=60) | TEXTS.map(str.encode) | VALUES.map(canonical).map(lambda data: data[:-1]))
@settings(max_examples=150, deadline=None)
def test_other_bytes_are_refused_in_one_line(data: bytes):
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
    ("text", "message"),
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
def test_errors_state_the_reason(text: bytes, message: str):
    with pytest.raises(Refused, match=message):
        read(text)


def test_brackets_and_commas_inside_strings():
    value = {"names": ["{[,]}" * 1000, '\\"[[[[' * 1000, "\\"] * 10, "deep": "[" * 10_000}
    assert read(canonical(value)) == value
    assert read(b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH)


@pytest.mark.timeout(60)
def test_no_string_causes_backtracking():
    """Unterminated strings, escapes and quotes in every arrangement that could cause backtracking for hours."""
    for piece in (b'\\"', b'"', b"\\", b'\\\\"', b'",', b'{"', b'"a":"', b"[]", b'\\u"'):
        for end in (b"", b"\\", b'"'):
            with pytest.raises(Refused):
                read(b'["' + piece * 300_000 + end)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1: 2}, {"a": object()}, "\ud800", {"a": "\udfff"}, b"bytes", {"a": 1j}],
)
def test_values_that_are_not_json_are_refused(value: object):
    with pytest.raises(UsageError, match="plain JSON"):
        json_copy(value, "a value")


# -- fields -----------------------------------------------------------------------------------------------------------

VALID = {
    "integer": 3, "number": 0.5, "numbers": [1, 2.5], "choice": "a", "flag": False, "text": "x" * 5,
    "mapping": {"k": 1}, "items": [None], "texts": ["a", "b"], "integers": [1, -2], "null": None,
}  # fmt: skip


def read_fields(value: Any, error: type[RedistillError] = Refused) -> list[object]:
    fields = Fields(value, "input", error)
    result = [
        fields.integer("integer", 1, 5),
        fields.number("number", 0, 1),
        fields.numbers("numbers", 2),
        fields.choice("choice", ("a", "b")),
        fields.flag("flag"),
        fields.text("text", 5),
        fields.mapping("mapping"),
        fields.items("items", 1),
        fields.texts("texts", 2),
        fields.integers("integers", 2),
        fields.is_null("null"),
    ]
    fields.done()
    return result


def test_valid_fields_are_returned():
    expected = [3, 0.5, (1.0, 2.5), "a", False, "xxxxx", {"k": 1}, [None], ("a", "b"), (1, -2), True]
    assert read_fields(VALID) == expected


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *(("integer", wrong) for wrong in (0, 6, True, 3.0, "3", None)),
        *(("number", wrong) for wrong in (-0.1, 1.1, True, float("nan"), float("inf"), "1")),
        *(("numbers", wrong) for wrong in ([1], [1, True], [1, float("nan")], [1, "2"], "12", 1)),
        *(("choice", wrong) for wrong in ("c", 1, None)),
        *(("flag", wrong) for wrong in (0, "false", None)),
        *(("text", wrong) for wrong in ("x" * 6, 1, None)),
        *(("mapping", wrong) for wrong in ([], None)),
        *(("items", wrong) for wrong in ([1, 2], {}, None)),
        *(("texts", wrong) for wrong in ([1], ["a"] * 3, "ab")),
        *(("integers", wrong) for wrong in ([True], [1.0], [1] * 3, 1)),
    ],
)
@pytest.mark.parametrize("error", [Refused, Damaged, UsageError])
def test_invalid_fields_are_named_in_one_line(field: str, wrong: object, error: type[RedistillError]):
    with pytest.raises(error, match=f"^input: '{field}' must be .*, found ") as caught:
        read_fields(VALID | {field: wrong}, error)
    assert "\n" not in str(caught.value)


def test_missing_and_unknown_fields():
    with pytest.raises(Refused, match="'flag' is missing"):
        read_fields({key: value for key, value in VALID.items() if key != "flag"})
    with pytest.raises(Refused, match="unknown field 'other'"):
        read_fields(VALID | {"other": 1})
    Fields({"other": 1}, "input").done(ignore_unknown=True)
    for value in ([], None, "text", {1: 2}):
        with pytest.raises(Refused, match="expected an object"):
            Fields(value, "input")
