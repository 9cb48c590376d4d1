"""What the cache keeps, what it drops, and how threads share it."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

from data_pipeline.common.recent import Recent


def test_the_values_used_last_stay() -> None:
    recent: Recent[str, int] = Recent(2)
    assert recent.get("a") is None and recent.put("a", 1) == 1
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert (recent.get("a"), recent.get("b"), recent.get("c"), len(recent)) == (1, None, 3, 2)
    recent.put("c", 4)
    assert (recent.get("c"), len(recent), recent.size) == (4, 2, 2)
    recent.clear()
    assert recent.get("c") is None and recent.size == 0


def test_the_size_may_be_counted_in_bytes() -> None:
    recent: Recent[int, bytes] = Recent(10, len)
    for number in range(4):
        recent.put(number, b"1234")
    assert (len(recent), recent.size) == (2, 8)
    recent.change(bytes.upper)
    assert recent.put(9, b"x" * 11) == b"x" * 11 and len(recent) == 0, "one that does not fit is not kept"


def test_a_copy_is_empty_and_threads_share_one() -> None:
    recent: Recent[int, int] = Recent(8)
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda n: recent.put(n % 16, n), range(2000))) == list(range(2000))
    assert recent.size == len(recent) == 8
    copy = pickle.loads(pickle.dumps(recent))
    assert (copy.room, len(copy)) == (8, 0) and len(recent) == 8
