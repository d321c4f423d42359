"""Numbers that the papers report, to be set beside measured ones. `published/README.md` explains the files.

They are numbers from publications and no results of this code. A published result stands beside a measured one only
where data, image size, model, method, iteration and guidance agree.
"""

from __future__ import annotations

from collections.abc import Sequence


def layers_text(depth: int | None, student: Sequence[int] | None, teacher: Sequence[int] | None) -> str:
    """Which layers a run aligns, in words: `depth 5; 2, 3, 4 to 7, 9, 11`."""
    words = [] if depth is None else [f"depth {depth}"]
    if student and teacher:
        words.append(f"{', '.join(map(str, student))} to {', '.join(map(str, teacher))}")
    return "; ".join(words)
