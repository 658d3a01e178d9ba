"""How decode steps are padded: few sizes, little waste."""

from __future__ import annotations

from clsa.step import bucket


def test_buckets_of_rows() -> None:
    sizes = {rows: bucket(rows) for rows in range(1, 4097)}
    assert all(size >= rows and bucket(size) == size for rows, size in sizes.items())
    assert all(size - rows < 0.2 * size for rows, size in sizes.items() if rows > 32)
    assert [sizes[rows] for rows in (1, 3, 32, 33, 64, 358)] == [1, 4, 32, 40, 64, 384]
    assert len(set(sizes.values())) <= 40, "each size is recorded once for every size of page table"
