"""Allocates KV blocks to sequences. Integers only: no tensors, no clock, no threads.

A block holds the keys and values of ``block_size`` tokens. Full blocks are named by a chain of digests that
starts with the adapter's digest. So a block is found again only for the same tokens and the same weights: a
replaced adapter can never read its predecessor's KV.

A free block keeps its content and its name until it is allocated again; the least recently freed block is
allocated first. The prefix cache is the set of named blocks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BlockName = bytes


def chain_root(digest: str | None) -> BlockName:
    """The start of the chain of names: from the adapter's content digest, or for the base."""
    return hashlib.blake2b((digest or "base").encode(), digest_size=16).digest()


def chain_next(parent: BlockName, tokens: Sequence[int]) -> BlockName:
    """The name of the block that holds ``tokens`` after the block ``parent``."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockTable:
    """One sequence's blocks, in order, and the names of the full ones.

    Attributes:
        root: see ``chain_root``.
        blocks: block ids; token i is in ``blocks[i // block_size]``.
        names: names of the leading full blocks whose content is computed.
    """

    __slots__ = ("blocks", "names", "root")

    def __init__(self, root: BlockName) -> None:
        self.root = root
        self.blocks: list[int] = []
        self.names: list[BlockName] = []

    @property
    def tip(self) -> BlockName:
        return self.names[-1] if self.names else self.root


class BlockManager:
    """Allocates blocks, shares equal prefixes, and keeps cached blocks as long as possible.

    Args:
        num_blocks: the number of blocks in the KV tensors.
        block_size: tokens of a block.
        prefix_caching: whether full blocks are named and found again.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._refs = [0] * num_blocks
        self._name_of: list[BlockName | None] = [None] * num_blocks
        self._by_name: dict[BlockName, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, table: BlockTable, num_tokens: int, spare: int) -> int:
        """How many blocks are missing to hold ``num_tokens`` in ``table`` and leave ``spare`` blocks free.

        Zero or negative if there are enough.
        """
        return self.blocks_for(num_tokens) - len(table.blocks) + spare - self.num_free

    def match(self, table: BlockTable, tokens: Sequence[int]) -> int:
        """Add the cached blocks of the longest known prefix of ``tokens`` to ``table``; returns its length.

        The last token is never taken from the cache, because the caller needs its logits.
        """
        if not self._prefix_caching:
            return 0
        size = self.block_size
        for start in range(0, len(tokens) - size, size):
            name = chain_next(table.tip, tokens[start : start + size])
            block = self._by_name.get(name)
            if block is None:
                break
            self._take(block)
            table.blocks.append(block)
            table.names.append(name)
        return len(table.blocks) * size

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Extend ``table`` to hold ``num_tokens``. Returns False and changes nothing if blocks run out."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.blocks.append(self._take_any())
        return True

    def commit(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Name the blocks that became full: the first ``num_computed`` of ``tokens`` have their KV now."""
        if not self._prefix_caching:
            return
        size = self.block_size
        for i in range(len(table.names), num_computed // size):
            name = chain_next(table.tip, tokens[i * size : (i + 1) * size])
            table.names.append(name)
            if name not in self._by_name:
                self._by_name[name] = table.blocks[i]
                self._name_of[table.blocks[i]] = name

    def release(self, table: BlockTable) -> None:
        """Free all blocks of a sequence, the last one first, so that a prefix stays cached the longest."""
        for block in reversed(table.blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._name_of[block] is None:
                    self._free.move_to_end(block, last=False)
        table.blocks.clear()
        table.names.clear()

    def held_alone(self, table: BlockTable) -> int:
        """The number of blocks that only ``table`` uses, so releasing it would free them."""
        return sum(self._refs[block] == 1 for block in table.blocks)

    def check_integrity(self, tables: Sequence[BlockTable]) -> None:
        """Assert that the bookkeeping agrees with the live ``tables`` (for tests)."""
        refs = [0] * self.num_blocks
        for table in tables:
            for block in table.blocks:
                refs[block] += 1
        assert refs == self._refs, "reference counts differ from the tables"
        assert {b for b, n in enumerate(refs) if n == 0} == set(self._free), "free list is wrong"
        for name, block in self._by_name.items():
            assert self._name_of[block] == name, f"block {block} lost its name"
        assert sum(n is not None for n in self._name_of) == len(self._by_name), "a name is not indexed"

    def _take_any(self) -> int:
        block, _ = self._free.popitem(last=False)
        name = self._name_of[block]
        if name is not None:
            del self._by_name[name]
            self._name_of[block] = None
        self._refs[block] = 1
        return block

    def _take(self, block: int) -> None:
        self._free.pop(block, None)
        self._refs[block] += 1
