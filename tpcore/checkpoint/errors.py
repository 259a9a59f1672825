from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and the way out."""
