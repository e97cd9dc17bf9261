"""The tree of shared beginnings against a naive model, through random operations; its books."""

import random

import pytest

from t5x_inference_ext.engine.prefix_tree import PrefixTree

P = 2


class Naive:
  """Beginnings in a dict, with the time of their last use; eviction searches all of them.

  Attributes:
    blocks: (salt, beginning of whole blocks) -> time of last use.
  """

  def __init__(self, blocks):
    self.size, self.blocks, self.time = blocks, {}, 0

  def _use(self, salt, beginning):
    """A parent is used after its children."""
    for end in range(len(beginning), 0, -P):
      self.time += 1
      self.blocks[salt, beginning[:end]] = self.time

  def _stored(self, tokens, salt, most):
    end = 0
    while end + P <= most and (salt, tokens[: end + P]) in self.blocks:
      end += P
    return tokens[:end]

  def match(self, tokens, salt):
    found = self._stored(tokens, salt, len(tokens) - 1)
    self._use(salt, found)
    return found

  def _evict(self, spared):
    def may_go(key):
      (salt, beginning), (spared_salt, begins) = key, spared
      return salt != spared_salt or begins[: len(beginning)] != beginning

    candidates = [key for key in self.blocks if may_go(key)]
    if candidates:
      del self.blocks[min(candidates, key=self.blocks.get)]
    return bool(candidates)

  def extend(self, tokens, salt):
    end = start = len(self._stored(tokens, salt, len(tokens)))
    while end + P <= len(tokens):
      if len(self.blocks) == self.size and not self._evict((salt, tokens[:end])):
        break
      end += P
      self.blocks[salt, tokens[:end]] = 0
    self._use(salt, tokens[:end])
    return [tokens[i : i + P] for i in range(start, end, P)]


def contents(tree):
  """{(salt, beginning): block} of a tree."""
  found = {}

  def visit(node, salt, before):
    for child in node.children.values():
      found[salt, before + child.key] = child.block
      visit(child, salt, before + child.key)

  for salt, root in tree._roots.items():
    visit(root, salt, ())
  return found


def beginning(node):
  return sum((n.key for n in [*node.path()][::-1]), ())


@pytest.mark.parametrize('seed', range(30))
def test_random_operations(seed):
  rng = random.Random(seed)
  size = rng.choice((0, 1, 3, 8, 20))
  tree, naive, counts = PrefixTree(size, P), Naive(size), [0] * 6
  evicted = 0
  for _ in range(400):
    tokens = tuple(rng.choices(range(2), k=rng.randrange(12)))
    salt = rng.choice(((), 'tenant', 7))
    if rng.random() < 0.5:
      path, wanted = tree.match(tokens, salt), naive.match(tokens, salt)
      assert [n.key for n in path] == [wanted[i : i + P] for i in range(0, len(wanted), P)]
      assert [n.depth for n in path] == list(range(len(path)))
      added = (1, bool(path), len(tokens), len(wanted), 0, 0)
      counts = [a + b for a, b in zip(counts, added)]
    else:
      before = contents(tree)
      made, wanted = tree.extend(tokens, salt), naive.extend(tokens, salt)
      assert [n.key for n in made] == wanted
      assert all(tokens[n.depth * P : (n.depth + 1) * P] == n.key for n in made)
      after = contents(tree)
      # Blocks of beginnings that stayed are where they were.
      assert all(before.get(key, block) == block for key, block in after.items())
      gone = len(before) + len(made) - len(after)
      evicted += gone
      counts[4] += len(made)
      counts[5] += gone
    assert tree.check() == []
    found = contents(tree)
    assert found.keys() == naive.blocks.keys()
    assert tree.used == len(found) <= size
    assert counts == [
      tree.queries,
      tree.hits,
      tree.query_tokens,
      tree.hit_tokens,
      tree.stored,
      tree.evictions,
    ]
    by_use = sorted(found, key=naive.blocks.get)
    assert by_use == [_key_of(tree, node) for node in tree._order]
  assert evicted > 0 or size in (0, 20)


def _key_of(tree, node):
  root = [*node.path()][-1].parent
  return root.key[0], beginning(node)


def test_the_last_token_is_always_run():
  tree = PrefixTree(4, P)
  assert [(n.depth, n.block) for n in tree.extend((1, 2, 3, 4, 5))] == [(0, 0), (1, 1)]
  assert len(tree.match((1, 2, 3, 4))) == 1
  assert len(tree.match((1, 2, 3, 4, 9))) == 2
  assert tree.match((1, 2)) == tree.match((1,)) == tree.match(()) == []
  assert (tree.queries, tree.hits, tree.query_tokens, tree.hit_tokens) == (5, 2, 12, 6)


def test_salts_separate_and_leave_nothing_behind():
  tree = PrefixTree(2, P)
  for tenant in range(1000):
    assert tree.match((1, 2, 3), tenant) == []
    assert len(tree.extend((1, 2, 3), tenant)) == 1
  assert len(tree._roots) == 2 and tree.evictions == 998
  assert not tree.match((1, 2, 3), 0) and tree.match((1, 2, 3), 999)


def test_a_prompt_longer_than_the_store_keeps_its_beginning():
  tree = PrefixTree(2, P)
  tree.extend((9, 9, 8, 8))
  assert [n.depth for n in tree.extend((1, 2, 3, 4, 5, 6))] == [0, 1]
  assert len(tree.match((1, 2, 3, 4, 5, 6))) == 2 and tree.check() == []


def test_a_prompt_s_own_beginning_is_not_evicted_for_its_end():
  tree = PrefixTree(2, P)
  tree.extend((1, 2))
  tree.extend((5, 6))
  assert [(n.depth, n.block) for n in tree.extend((1, 2, 3, 4, 5, 6))] == [(1, 1)]
  assert len(tree.match((1, 2, 3, 4, 5))) == 2 and tree.check() == []


def test_clear_forgets_all_beginnings():
  tree = PrefixTree(3, P)
  first, last = tree.extend((1, 2, 3, 4), 'tenant')
  tree.clear()
  assert tree.match((1, 2, 3, 4, 5), 'tenant') == [] and tree.used == 0 and tree.check() == []
  assert first.block == last.block == -1 and tree.evictions == 2
  assert len(tree.extend((1, 2, 3, 4, 5, 6))) == 3 and tree.check() == []


def _break(what):
  """Return a tree of (1, 2) -> (3, 4), (5, 6), and (7, 7), with one broken book."""
  tree = PrefixTree(6, P)
  first, second = tree.extend((1, 2, 3, 4))
  tree.extend((1, 2, 5, 6))
  (other,) = tree.extend((7, 7), 'tenant')
  assert tree.check() == []
  what(tree, first, second, other)
  return tree


BROKEN = {
  'a block lost': lambda t, *_: t._free.pop(),
  'a block twice': lambda t, first, *_: t._free.append(first.block),
  'two owners': lambda t, first, second, *_: setattr(second, 'block', first.block),
  'an unknown block': lambda t, first, *_: setattr(first, 'block', 6),
  'a node unreachable': lambda t, first, second, *_: first.children.pop(second.key),
  'a wrong parent': lambda t, first, second, other: setattr(second, 'parent', other),
  'no parent': lambda t, first, second, *_: setattr(second, 'parent', None),
  'a wrong depth': lambda t, first, second, *_: setattr(second, 'depth', 0),
  'a wrong key': lambda t, first, second, *_: setattr(second, 'key', (3, 9)),
  'a short key': lambda t, first, second, *_: (
    setattr(second, 'key', (3,)),
    first.children.update({(3,): first.children.pop((3, 4))}),
  ),
  'a node out of the order': lambda t, first, second, *_: t._order.pop(second),
  'an evicted node in the order': lambda t, first, second, *_: t._order.update(
    {PrefixTree(1, P).extend((1, 2))[0]: None}
  ),
  'an empty root': lambda t, *_: t._roots['tenant'].children.clear(),
  'a root of another salt': lambda t, *_: t._roots.update(other=t._roots.pop('tenant')),
  'too many hits': lambda t, *_: setattr(t, 'hits', 1),
  'too many tokens hit': lambda t, *_: setattr(t, 'hit_tokens', 1),
  'too few evictions': lambda t, *_: setattr(t, 'evictions', 1),
}


@pytest.mark.parametrize('what', BROKEN)
def test_check_finds_broken_books(what):
  assert _break(BROKEN[what]).check()


def test_check_finds_a_parent_that_would_go_before_its_child():
  tree = PrefixTree(3, P)
  first, _ = tree.extend((1, 2, 3, 4))
  tree._order.move_to_end(first, last=False)
  assert tree.check() == ['the node of block 1 was used after its parent']
