"""Index of cached prompt prefixes: a tree over blocks of token ids, on the host.

A node stands for P tokens that follow those of its parent. It owns one block of the prefix store
(engine/prefix_store.py), which holds the keys and values of these P positions. Keys and values of
a position depend on all tokens before it, so a block is identified by its whole path from the root.

When the store is full, the least recently used leaf is evicted. A node's parent is marked as used
right after the node. So in a list ordered by last use, children come before their parents, and the
first node is a leaf: eviction takes it without a search.
"""

import collections
from collections.abc import Hashable, Iterator, Sequence
import dataclasses


@dataclasses.dataclass(eq=False)
class Node:
  """The P tokens that follow the parent's, and their block.

  Attributes:
    key: The P token ids; for a root, which has no block, (salt,).
    parent: Node of the P tokens before these; None for a root.
    block: Index of the block in the store; -1 for a root and for a node that is no longer in the
      tree.
    depth: Index of the block in every prompt with this prefix; -1 for a root.
    children: Child nodes, by key.
  """

  key: tuple[Hashable, ...]
  parent: 'Node | None'
  block: int
  depth: int
  children: dict[tuple[Hashable, ...], 'Node'] = dataclasses.field(default_factory=dict)

  def path(self) -> Iterator['Node']:
    """Yield this node, its parent and so on, without the root."""
    node = self
    while node.parent is not None:
      yield node
      node = node.parent


class PrefixTree:
  """Maps prompt prefixes to blocks of the store.

  The tree is valid for one set of weights: call `clear` when they change. Prompts share blocks only
  if their salts, any hashable values, are equal. So a salt must name everything else that keys and
  values depend on, such as an adapter, and the tenant if tenants must not share.

  Args:
    blocks: Number of blocks in the store.
    block_size: P, positions of a block.

  Attributes:
    queries: Calls of `match`.
    hits: Calls of `match` that found a block or more.
    query_tokens: Tokens of all prompts that were looked up.
    hit_tokens: Number of these tokens that were found.
    stored: Number of nodes created.
    evictions: Number of nodes removed, to make room or by `clear`.
  """

  def __init__(self, blocks: int, block_size: int) -> None:
    self.blocks, self.block_size = blocks, block_size
    self.queries = self.hits = self.query_tokens = self.hit_tokens = 0
    self.stored = self.evictions = 0
    self._reset()

  def _reset(self) -> None:
    self._roots: dict[Hashable, Node] = {}
    self._free = list(range(self.blocks))[::-1]
    # All nodes except the roots, in the order of their last use.
    self._order: collections.OrderedDict[Node, None] = collections.OrderedDict()

  @property
  def used(self) -> int:
    """Number of blocks in use."""
    return self.blocks - len(self._free)

  def match(self, tokens: Sequence[int], salt: Hashable = ()) -> list[Node]:
    """Find the longest stored prefix of a prompt, and mark it as used.

    Args:
      tokens: The prompt, BOS first. The prefix never includes the last token: it must be run to get
        the logits after it.
      salt: Separates prompts that must not share.

    Returns:
      The nodes of the prefix, from the first block on. They stay in the tree until the next
      `extend`.
    """
    path = self._find(tokens, salt, max(0, len(tokens) - 1) // self.block_size)
    self.queries += 1
    self.hits += bool(path)
    self.query_tokens += len(tokens)
    self.hit_tokens += len(path) * self.block_size
    if path:
      self._use(path[-1])
    return path

  def find(self, tokens: Sequence[int], salt: Hashable = ()) -> list[Node]:
    """Return the stored nodes of a prompt's whole blocks, without counting a query or a use."""
    return self._find(tokens, salt, len(tokens) // self.block_size)

  def extend(self, tokens: Sequence[int], salt: Hashable = ()) -> list[Node]:
    """Add the whole blocks of a prompt that are not in the tree yet, as many as fit.

    The caller must save each new node's block (block number `depth` of the prompt) before it looks
    up the next prompt.

    Args:
      tokens: The prompt, BOS first. All its keys and values must have been computed.
      salt: Separates prompts that must not share.

    Returns:
      The new nodes, in the order of their blocks in the prompt.
    """
    wanted = len(tokens) // self.block_size
    path = self._find(tokens, salt, wanted)
    # While the root has no children, an eviction may have removed it. Enter it again.
    root = self._roots.get(salt) or Node((salt,), None, -1, -1)
    last = path[-1] if path else root
    # Eviction takes nodes from the order of use. It must spare the parents of the new nodes.
    for node in last.path():
      del self._order[node]
    made: list[Node] = []
    for depth in range(len(path), wanted):
      block = self._take_block()
      if block is None:
        break
      node = Node(self._key(tokens, depth), last, block, depth)
      last.children[node.key] = node
      last = node
      made.append(node)
    self.stored += len(made)
    self._use(last)
    if root.children:
      self._roots[salt] = root
    return made

  def clear(self) -> None:
    """Remove all nodes."""
    for node in self._nodes():
      node.block = -1
    self.evictions += self.used
    self._reset()

  def check(self) -> list[str]:
    """Return one sentence for each inconsistency in the tree's records; [] if there is none."""
    faults: list[str] = []
    nodes = list(self._nodes())
    held = sorted([node.block for node in nodes] + self._free)
    if held != list(range(self.blocks)):
      faults.append(
        f'{len(nodes)} nodes and {len(self._free)} free blocks are not each of {self.blocks} '
        'blocks once'
      )
    if self.stored - self.evictions != len(nodes):
      faults.append(
        f'{len(nodes)} nodes are in the tree, of {self.stored} made and {self.evictions} evicted'
      )
    if not self.hits <= self.queries or not self.hit_tokens <= self.query_tokens:
      faults.append(
        f'{self.hits} hits with {self.hit_tokens} tokens in {self.queries} queries with '
        f'{self.query_tokens}'
      )
    for salt, root in self._roots.items():
      if (root.key, root.parent, root.block, root.depth) != ((salt,), None, -1, -1):
        faults.append('a root is not what its salt says')
      if not root.children:
        faults.append('a root has no nodes after it')
    for node in nodes:
      faults += self._check_node(node)
    # A parent is marked as used right after its child, so it follows all its children in the order
    # of use.
    order: dict[Node | None, int] = {node: i for i, node in enumerate(self._order)}
    if order.keys() != set(nodes):
      faults.append(f'{len(order)} nodes in the order of use are not the {len(nodes)} of the tree')
    for node in self._order:
      if order.get(node.parent, len(order)) <= order[node]:
        faults.append(f'the node of block {node.block} was used after its parent')
    return faults

  def _check_node(self, node: Node) -> list[str]:
    what, faults = f'the node of block {node.block}', []
    if len(node.key) != self.block_size:
      faults.append(f'{what} has {len(node.key)} tokens, not {self.block_size}')
    if node.parent is None or node.parent.children.get(node.key) is not node:
      faults.append(f'{what} is not among the children of its parent')
    elif node.depth != node.parent.depth + 1:
      faults.append(f'{what} has depth {node.depth}, its parent {node.parent.depth}')
    return faults

  def _nodes(self) -> Iterator[Node]:
    """Yield all nodes except the roots."""
    left = [node for root in self._roots.values() for node in root.children.values()]
    while left:
      node = left.pop()
      left.extend(node.children.values())
      yield node

  def _key(self, tokens: Sequence[int], depth: int) -> tuple[Hashable, ...]:
    return tuple(tokens[depth * self.block_size : (depth + 1) * self.block_size])

  def _find(self, tokens: Sequence[int], salt: Hashable, most: int) -> list[Node]:
    """Return the stored nodes of a prompt's first `most` blocks."""
    path: list[Node] = []
    node = self._roots.get(salt)
    while node is not None and len(path) < most:
      node = node.children.get(self._key(tokens, len(path)))
      if node is not None:
        path.append(node)
    return path

  def _use(self, node: Node) -> None:
    """Mark a node, then its ancestors, as the most recently used."""
    for each in node.path():
      self._order[each] = None
      self._order.move_to_end(each)

  def _take_block(self) -> int | None:
    """Return a free block, evicting the least recently used leaf if need be; None without one."""
    if self._free:
      return self._free.pop()
    if not self._order:
      return None
    node, _ = self._order.popitem(last=False)
    block, node.block = node.block, -1
    parent = node.parent
    assert parent is not None and not node.children
    del parent.children[node.key]
    if parent.parent is None and not parent.children:
      # There may be as many salts as requests, so roots without children are removed.
      del self._roots[parent.key[0]]
    self.evictions += 1
    return block
