"""Long texts as overlapping windows, and which window sees a token best."""

from __future__ import annotations

from collections.abc import Sequence


def cut_windows(num_tokens: int, room: int, stride: int) -> list[range]:
    """Windows of at most `room` tokens that begin every `stride` tokens and cover all of them.

    The last one ends at the last token and is the only one that may be shorter. No tokens: one
    empty window.

    Raises:
        ValueError: no room, or a stride that would leave tokens out or never end.
    """
    if not 0 < stride <= room:
        raise ValueError(
            f"stride={stride} with room for {room} tokens; expected at least 1, at most the room"
        )
    windows = []
    start = 0
    while start + room < num_tokens:
        windows.append(range(start, start + room))
        start += stride
    windows.append(range(start, num_tokens))
    return windows


def best_windows(windows: Sequence[range], num_tokens: int) -> list[int]:
    """For each token the number of the window in which it has the most context.

    Context is the smaller of the numbers of tokens before and after it in the window; where that is
    equal the longer window wins, then the first (as in the script of BERT for SQuAD).
    """
    best = [0] * num_tokens
    if len(windows) == 1:
        return best
    scores = [-1.0] * num_tokens
    for number, window in enumerate(windows):
        for token in window:
            score = min(token - window.start, window.stop - 1 - token) + 0.01 * len(window)
            if score > scores[token]:
                best[token], scores[token] = number, score
    return best
