"""Which blocks of the KV cache belong to whom: free list, and reuse by the hash of what they hold. Pure: no tensors.

A block holds `block_size` tokens of one sequence, in every layer. Full blocks are found again by the hash chain of their
tokens, so a sequence that begins like an earlier one shares its blocks (the design is vLLM's automatic prefix caching,
https://docs.vllm.ai/en/latest/design/prefix_caching.html). A freed block keeps its content until it is needed for something
else, the least recently used first. A pool belongs to one loaded model, so no block of one is ever found for another.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

Hash = bytes
ROOT: Hash = b""  # the hash before a sequence's first block, where all may share


def root(scope: str) -> Hash:
    """Give the hash before a sequence's first block where only sequences of the same scope may share blocks."""
    return blake2b(scope.encode(), digest_size=16).digest() if scope else ROOT


def chain(parent: Hash, token_ids: Sequence[int]) -> Hash:
    """Give the hash of a full block whose predecessor has the hash `parent`; equal hashes mean equal ids from the start."""
    return blake2b(parent + array("Q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """`count` blocks of `block_size` tokens: who uses which, and which are free but still worth finding.

    A block is free (nobody uses it; it may still be known by its hash) or used by one or more sequences.
    """

    def __init__(self, count: int, block_size: int) -> None:
        self.count = count
        self.block_size = block_size
        self._users: dict[int, int] = {}
        # Free blocks, the next one to be taken first: those never used, or given back without content, then the least
        # recently used.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._by_hash: dict[Hash, int] = {}
        self._hash_of: dict[int, Hash] = {}

    @property
    def free(self) -> int:
        """How many blocks can be taken."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-tokens // self.block_size)

    def find(self, hashes: Iterable[Hash]) -> list[int]:
        """Give the blocks that hold a sequence's beginning, as far as they are known; they are not taken yet.

        No hash is asked for after the first that is not known.
        """
        found = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Use blocks that `find` gave."""
        for block in blocks:
            self._users[block] = self._users.get(block, 0) + 1
            self._free.pop(block, None)

    def take(self, count: int) -> list[int] | None:
        """Use `count` free blocks, whose old content is forgotten; None, and nothing taken, if there are not as many."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self.forget((block,))
            self._users[block] = 1
            taken.append(block)
        return taken

    def has(self, count: int, beside: Sequence[int] = ()) -> bool:
        """Whether so many blocks could be taken if those `beside` were shared first."""
        return count <= len(self._free) - sum(block in self._free for block in beside)

    def remember(self, block: int, block_hash: Hash) -> None:
        """Make a full block findable. Of two with the same content the first stays the one that is found."""
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Stop using a sequence's blocks, given from its first to its last."""
        # From the last to the first: of one chain the end is forgotten first, because without its beginning it is no use.
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            self._free[block] = None
            if block not in self._hash_of:
                self._free.move_to_end(block, last=False)

    def forget(self, blocks: Iterable[int]) -> None:
        """Make blocks findable no more: what they hold is gone, or can no longer be trusted."""
        for block in blocks:
            if (known := self._hash_of.pop(block, None)) is not None:
                del self._by_hash[known]
