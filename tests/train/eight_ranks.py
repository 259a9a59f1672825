"""One of eight ranks: every step of a 4 x 2 mesh beside those of one process.

torchrun --standalone --nproc-per-node 8 -m tests.train.eight_ranks FOLDER REFERENCE COUNTS_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.train.test_gradients import check_steps
from tpcore.parallel.group import destroy_parallel, init_parallel


def main(folder: str, reference: str, counts: str) -> None:
    torch.set_num_threads(1)
    tp, dp = init_parallel(4, backend="gloo")
    expected = torch.load(reference, weights_only=True)
    count = check_steps(tp, dp, Path(folder), expected, {})
    (Path(counts) / f"{dp.rank}-{tp.rank}").write_text(str(count))
    destroy_parallel()


if __name__ == "__main__":
    main(*sys.argv[1:])
