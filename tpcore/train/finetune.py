"""From a configuration to a finished run: what each rank does."""

from __future__ import annotations

import torch

from tpcore.memory import keep_freed_memory
from tpcore.parallel.group import (
    DataParallelGroup,
    TensorParallelGroup,
    destroy_parallel,
    init_parallel,
)
from tpcore.train.config import ConfigError, ExpManagerConfig, TrainConfig
from tpcore.train.launch import environment_int, of_first_rank, on_all_ranks, set_num_threads
from tpcore.train.logging import RunLog
from tpcore.train.prepare import build_model, prepare
from tpcore.train.run_state import RunChoice, choose_run
from tpcore.train.saving import FitResult
from tpcore.train.trainer import Trainer


def finetune(config: TrainConfig) -> FitResult:
    """Fine-tune on the ranks that torchrun started, or in this process alone.

    Raises:
        ValueError: ConfigError, CheckpointError or DataError, before anything is written.
        DivergedError: loss or gradient became infinite or NaN.
        StoppedError: a signal came, and the state is saved.
    """
    keep_freed_memory()  # before the first tensor; the command line has done more
    threads = set_num_threads(config.trainer.num_threads)
    # All that needs no other rank is checked before there is a process group to wait in.
    job = prepare(config, environment_int("WORLD_SIZE", 1))
    device = choose_device(config.trainer.accelerator)
    tp, dp = start_parallel(job.tensor_parallel_size, device, config.trainer.timeout_s)
    is_first = tp.rank == 0 and dp.rank == 0
    log = RunLog(enabled=is_first, progress_bar=config.trainer.enable_progress_bar)
    for note in job.notes:
        log.info(note)
    log.info(
        f"{tp.size} tensor-parallel x {dp.size} data-parallel rank(s) on {device.type}, "
        f"{threads} thread(s) each; {job.total_steps} steps"
    )
    try:
        with log.capture():
            model = on_all_ranks(lambda: build_model(job, tp, device), tp, dp)
        run = _agree_on_run(config.exp_manager, tp, dp)
        result = Trainer(job, model, tp=tp, dp=dp, run=run, log=log).fit()
    finally:
        log.close()
    destroy_parallel()
    return result


def choose_device(accelerator: str, option: str = "trainer.accelerator") -> torch.device:
    """The device of this rank: a GPU of its own, or the CPU.

    Raises:
        ConfigError: `gpu` was asked for and there are too few.
    """
    local_rank = environment_int("LOCAL_RANK", 0)
    num_local_ranks = environment_int("LOCAL_WORLD_SIZE", 1)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "gpu" and num_gpus < num_local_ranks:
        raise ConfigError(
            f"{option}=gpu: {num_local_ranks} rank(s) on this machine, but {num_gpus} CUDA "
            f"device(s); start fewer ranks, or use {option}=cpu"
        )
    if accelerator == "cpu" or num_gpus < num_local_ranks:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def start_parallel(
    tensor_parallel_size: int, device: torch.device, timeout_s: float = 600
) -> tuple[TensorParallelGroup, DataParallelGroup]:
    """`init_parallel` with the backend that suits the device."""
    return init_parallel(
        tensor_parallel_size, backend="gloo" if device.type == "cpu" else None, timeout_s=timeout_s
    )


def _agree_on_run(
    config: ExpManagerConfig, tp: TensorParallelGroup, dp: DataParallelGroup
) -> RunChoice:
    """Rank 0's choice on every rank: each of them has its own clock."""
    return of_first_rank(on_all_ranks(lambda: choose_run(config), tp, dp), tp, dp)
