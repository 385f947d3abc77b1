"""A slot table against a plain list of what was used when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.tiers.slots import SlotTable

operations = st.lists(
    st.tuples(st.sampled_from(["add", "find", "drop"]), st.integers(0, 7)), max_size=60
)


@given(num_slots=st.integers(1, 5), operations=operations)
def test_it_holds_what_was_used_last_and_never_more_than_its_bound(
    num_slots: int, operations: list[tuple[str, int]]
) -> None:
    table = SlotTable(num_slots)
    recent: list[bytes] = []  # oldest first
    evicted = 0
    for operation, number in operations:
        name = bytes([number])
        before = {*recent}
        match operation:
            case "add" if name not in table:
                oldest = table.oldest()
                assert (oldest is None) == (len(recent) < num_slots)
                slot = table.add(name)
                if oldest is not None:
                    assert oldest == (recent.pop(0), slot)
                    evicted += 1
                recent.append(name)
            case "drop":
                assert (table.drop(name) is None) == (name not in recent)
                recent = [other for other in recent if other != name]
            case _:
                assert (table.find(name) is None) == (name not in recent)
                if name in recent:
                    recent.remove(name)
                    recent.append(name)
        assert {*table.take_left()} == before - {*recent}
        assert {*table.names()} == {*recent}
        assert len(table) == len(recent) <= num_slots
        assert all(name in table for name in recent)
        assert table.num_evicted == evicted
    slots = [table.find(name) for name in recent]
    assert len(set(slots)) == len(recent)
    assert all(slot is not None and 0 <= slot < num_slots for slot in slots)


def test_a_filled_table_goes_on_with_the_slots_that_are_free() -> None:
    table = SlotTable(4)
    table.fill([(b"a", 2), (b"b", 0)])
    assert {table.add(b"c"), table.add(b"d")} == {1, 3}
    assert table.oldest() == (b"a", 2)
