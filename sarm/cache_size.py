"""How large a decoder's static cache is and how many rows it holds at once, without torch, so that
a plan and the decoder say the same: `python -m pytest tests/test_cache_size.py`.
"""

WAVE_POSITIONS, MOST_ROWS = 131072, 256
"""Where nobody says how many rows at once: as many as fill so many positions of cache, 16 GiB of an
8B Llama's, and no more than so many. Not by the memory that happens to be free: other rows in a
batch round differently.
"""


def power_of_two(n: int, least: int) -> int:
    """The least power of two that is at least `n` and `least`, itself one."""
    return max(least, 1 << (n - 1).bit_length())


def cached_positions(longest: int) -> int:
    """Positions a row has for a prompt and its response of together at most `longest` tokens."""
    return power_of_two(longest, 256)


def rows_at_once(longest: int) -> int:
    """Rows decoded together where nobody says how many."""
    return min(MOST_ROWS, max(8, WAVE_POSITIONS // cached_positions(longest)))
