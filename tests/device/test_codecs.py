"""Names, sizes and the choice of a codec: the size is known before an update comes, and the budget decides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.codecs import (
    AUTO,
    CHOSEN,
    CODECS,
    DENSE_SIZE,
    PACKED,
    SECTION,
    check_codec,
    misfit,
    pick_codec,
    section_sizes,
    tensor_bytes,
    unpacked,
    update_bytes,
)
from edge_runtime.errors import UsageError
from tests.samples import quickly, small_spec

SPEC = small_spec(4, 300)


def test_float32_has_the_size_that_it_always_had() -> None:
    for depth in range(5):
        assert update_bytes(SPEC.suffix(depth), "f32") == sum(t.num_bytes for t in SPEC.suffix(depth))


@pytest.mark.parametrize(
    ("name", "size", "wanted"),
    [
        ("f16", 1000, 2000),
        ("int8", 1000, 1000 + 2 * 16),
        ("int4", 1001, 501 + 2 * 16),
        ("int8", 0, 0),
        ("int8", 1, 3),
        ("topk10", DENSE_SIZE, tensor_bytes("int8", DENSE_SIZE)),
        # 6554 of 65536: 3 low bits each, 6554 + 8191 high bits, a byte each, 103 scales
        ("topk10", SECTION, 2458 + 1844 + 6554 + 206),
        ("topk10", 2 * SECTION + 5, 2 * (2458 + 1844 + 6554 + 206) + 1 + 1 + 1 + 2),
    ],
)
def test_the_number_of_bytes_follows_from_the_number_of_values(name: str, size: int, wanted: int) -> None:
    assert tensor_bytes(name, size) == wanted


@quickly(100)
@given(size=st.integers(0, 1 << 40), name=st.sampled_from(sorted(CODECS)))
def test_a_tensors_bytes_are_those_of_its_sections(size: int, name: str) -> None:
    small = size % (5 * SECTION)
    codec = CODECS[name].of(small)
    assert tensor_bytes(name, small) == sum(codec.section_bytes(count) for count in section_sizes(small))
    assert 0 <= tensor_bytes(name, size) <= 4 * size + 2


def test_each_codec_is_smaller_than_the_one_before() -> None:
    sizes = [update_bytes(SPEC.suffix(2), name) for name in CODECS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


@quickly(60)
@given(depth=st.integers(0, 4), budget=st.none() | st.integers(0, 2_000_000))
def test_auto_is_the_finest_within_the_budget_and_the_smallest_where_none_is(depth: int, budget: int | None) -> None:
    chosen = pick_codec(SPEC.suffix(depth), AUTO, budget)
    sizes = {name: update_bytes(SPEC.suffix(depth), name) for name in CHOSEN}
    fitting = [name for name in CHOSEN if budget is None or sizes[name] <= budget]
    if fitting:
        assert chosen == fitting[0]
    else:
        assert sizes[chosen] == min(sizes.values())


def test_a_codec_that_is_named_is_taken_whatever_the_budget() -> None:
    assert pick_codec(SPEC.suffix(2), "int8", 1) == "int8"
    assert pick_codec(SPEC.suffix(2), "f32", 1) == "f32"


@pytest.mark.parametrize("name", ["", "fp32", "topk", "int8+zlib", "F32", "topk100"])
def test_a_codec_that_there_is_not_is_refused_with_those_that_there_are(name: str) -> None:
    for refuse in (lambda: check_codec(name), lambda: pick_codec(SPEC.suffix(0), name, None)):
        with pytest.raises(UsageError, match="codec must be auto or one of f32, f16, int8, int4, topk10, topk1"):
            refuse()


def test_an_offer_is_of_the_planned_codec_and_size_or_smaller_through_zlib() -> None:
    assert misfit("int8", 100, "int8", 100) == ""
    assert misfit("int8" + PACKED, 99, "int8", 100) == ""
    for name, size in [
        ("int8", 99),
        ("int8", 101),
        ("f32", 100),
        ("int8+zlib", 100),
        ("int8+zlib", 0),
        ("f16+zlib", 9),
    ]:
        assert misfit(name, size, "int8", 100) == f"the update must be 100 bytes of int8, it is {size} of {name}"
    assert [unpacked("int8"), unpacked("int8+zlib"), unpacked("+zlib")] == ["int8", "int8", ""]
