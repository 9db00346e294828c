from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.kv_cache import BlockManager, BlockTable, chain_next, chain_root


def _filled(manager: BlockManager, root: bytes, tokens: list[int]) -> BlockTable:
    table = BlockTable(root)
    manager.match(table, tokens)
    assert manager.grow(table, len(tokens))
    manager.commit(table, tokens, len(tokens))
    return table


def test_an_equal_prefix_is_shared_except_its_last_token() -> None:
    manager = BlockManager(8, 4)
    first = _filled(manager, chain_root("a"), list(range(8)))
    again = BlockTable(chain_root("a"))
    assert manager.match(again, list(range(8))) == 4  # the 8th token must be computed to get its logits
    assert again.blocks == first.blocks[:1]
    longer = BlockTable(chain_root("a"))
    assert manager.match(longer, list(range(9))) == 8


def test_another_adapter_never_finds_the_blocks() -> None:
    manager = BlockManager(8, 4)
    _filled(manager, chain_root("a"), list(range(8)))
    for other in ("b", None):
        assert manager.match(BlockTable(chain_root(other)), list(range(9))) == 0


def test_released_blocks_are_still_found_until_taken_for_something_else() -> None:
    manager = BlockManager(4, 4)
    manager.release(_filled(manager, chain_root(None), list(range(8))))
    assert manager.num_free == 4
    table = BlockTable(chain_root(None))
    assert manager.match(table, list(range(9))) == 8
    manager.release(table)
    _filled(manager, chain_root(None), list(range(100, 116)))
    assert manager.match(BlockTable(chain_root(None)), list(range(9))) == 0


def test_growing_past_the_end_changes_nothing() -> None:
    manager = BlockManager(2, 4)
    table = BlockTable(chain_root(None))
    assert not manager.grow(table, 9)
    assert table.blocks == []
    assert manager.grow(table, 8)


@pytest.mark.parametrize(("num_tokens", "spare", "missing"), [(8, 0, -2), (9, 0, -1), (16, 0, 0), (16, 3, 3)])
def test_missing_counts_the_blocks_of_the_table_and_the_free_ones(
    num_tokens: int, spare: int, missing: int
) -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    table = BlockTable(chain_root(None))
    assert manager.grow(table, 5)
    assert manager.missing(table, num_tokens, spare) == missing


def test_without_prefix_caching_blocks_have_no_hash() -> None:
    manager = BlockManager(4, 4, prefix_caching=False)
    manager.release(_filled(manager, chain_root(None), list(range(8))))
    assert manager.match(BlockTable(chain_root(None)), list(range(9))) == 0


def test_block_hashes_depend_on_all_earlier_tokens() -> None:
    root = chain_root("a")
    assert chain_next(root, [1, 2]) != chain_next(root, [2, 1])
    assert chain_next(chain_next(root, [1]), [2]) != chain_next(chain_next(root, [3]), [2])
    assert chain_root("a") != chain_root(None)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", None]),
            st.lists(st.integers(0, 1), min_size=1, max_size=14),
            st.integers(0, 5),
        ),
        max_size=30,
    )
)
def test_any_history_keeps_the_block_manager_consistent(
    history: list[tuple[str | None, list[int], int]],
) -> None:
    manager = BlockManager(10, 2)
    tables: list[BlockTable] = []
    for digest, tokens, drop in history:
        table = BlockTable(chain_root(digest))
        cached = manager.match(table, tokens)
        assert cached < len(tokens)
        assert cached % 2 == 0
        if manager.grow(table, len(tokens)):
            manager.commit(table, tokens, len(tokens))
            tables.append(table)
        else:
            manager.release(table)
        if drop < len(tables):
            manager.release(tables.pop(drop))
        manager.check_integrity(tables)
    for table in tables:
        manager.release(table)
    manager.check_integrity([])
    assert manager.num_free == 10


def test_the_integrity_check_sees_a_leak() -> None:
    manager = BlockManager(4, 4)
    _filled(manager, chain_root(None), [1, 2, 3])
    with pytest.raises(AssertionError, match="reference counts"):
        manager.check_integrity([])
