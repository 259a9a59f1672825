"""Fine-tuned models as modules of Lightning: restored, evaluated and saved as in NeMo.

A model that is given a Trainer reads its weights when the Trainer runs, since only then do the
ranks know each other; each rank holds its part. Without a Trainer it is whole at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tpcore import checkpoint
from tpcore.checkpoint.formats import nemo
from tpcore.interop.lightning import TensorParallelStrategy
from tpcore.interop.nemo.trainer import NLPDDPPlugin
from tpcore.models.bert import BertModel
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.tasks import Dataset, Task
from tpcore.tasks.sections import DataConfig
from tpcore.train.config import ConfigError, TrainConfig
from tpcore.train.evaluation import Evaluation, evaluate, named_metrics
from tpcore.train.launch import environment_int
from tpcore.train.nemo_file import describe_nemo, load_nemo, save_nemo


class NemoModel(LightningModule):
    """A `.nemo` file of a downstream task.

    Attributes:
        network: this rank's part of the model; None until a Trainer runs it.
        test_evaluation: what the last `trainer.test` found, beside its metrics the predictions.
        validation_evaluation: the same of `trainer.validate`.
    """

    tasks: ClassVar[tuple[str, ...]]
    """Names of the tasks that the class is for."""
    test_evaluation: Evaluation | None = None
    validation_evaluation: Evaluation | None = None

    def __init__(self, path: Path, config: TrainConfig, task: Task) -> None:
        super().__init__()
        self.path, self.config, self.task = path, config, task
        self.network: BertModel | None = None
        self._data: dict[str, tuple[Dataset, DataConfig]] = {}

    @classmethod
    def restore_from(
        cls,
        restore_path: str | os.PathLike[str],
        override_config_path: Any = None,
        map_location: torch.device | str | None = None,
        strict: bool = True,
        return_config: bool = False,
        save_restore_connector: Any = None,
        trainer: Any = None,
    ) -> Any:
        """A model from a file that tpcore or NeMo wrote.

        Args:
            restore_path: the file.
            override_config_path: must be None; what a file says of its model belongs to its
                weights.
            map_location: where the model goes without a Trainer, which decides otherwise.
            strict: must be True.
            return_config: return the file's model_config.yaml instead, as a DictConfig.
            save_restore_connector: must be None.
            trainer: the one that will run the model; may be left out in a process of its own.

        Raises:
            CheckpointError: the file does not say what it is for, or is damaged.
            ValueError: the file is of another task, or an argument is not as it must be.
        """
        for name, value in (
            ("override_config_path", override_config_path),
            ("save_restore_connector", save_restore_connector),
        ):
            if value is not None:
                raise ValueError(f"{name}={value!r}; expected None: it has no meaning here")
        if not strict:
            raise ValueError("strict=False; weights that a file lacks are never made up")
        path = Path(restore_path)
        if return_config:
            return OmegaConf.create(dict(nemo.contents(path).config))
        config, task = describe_nemo(path)
        if task.name not in cls.tasks:
            known = {name: sub for sub in NemoModel.__subclasses__() for name in sub.tasks}
            other = known.get(task.name)
            way = f"use {other.__name__}" if other else "use tpcore.load_run"
            raise ValueError(f"{path} is of task={task.name}, not for {cls.__name__}; {way}")
        model = cls(path, config, task)
        if trainer is None:
            model.configure_model()
            return model.to(map_location or "cpu").eval()
        if isinstance(trainer.strategy, NLPDDPPlugin):
            trainer.strategy.stored_size = checkpoint.inspect(path).tensor_parallel_size
        elif not isinstance(trainer.strategy, TensorParallelStrategy) and trainer.world_size > 1:
            raise ValueError(
                f"the Trainer has {trainer.world_size} ranks and the strategy "
                f"{type(trainer.strategy).__name__}; pass plugins=[NLPDDPPlugin()]"
            )
        return model

    @property
    def groups(self) -> tuple[TensorParallelGroup, DataParallelGroup]:
        """Those of the Trainer that runs the model, or none but this process."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, TensorParallelStrategy):
            return strategy.tp, strategy.dp
        return TensorParallelGroup.single(), DataParallelGroup.single()

    def configure_model(self) -> None:
        """Read the weights at the size of the Trainer's strategy."""
        tp, _ = self.groups
        if self.network is None or self.network.tp.size != tp.size:
            self.network = load_nemo(self.path, tp).model

    def setup_test_data(
        self, test_data_config: Mapping[str, Any] | DictConfig | None = None
    ) -> None:
        """Read the data that `trainer.test` is about.

        Args:
            test_data_config: as `model.test_ds` of a configuration; None: that of the run which
                the file ended.

        Raises:
            ConfigError: an unknown key, a wrong value, or no file.
            DataError: a file cannot be used.
        """
        self._data["test"] = self._load("test_ds", test_data_config)

    def setup_validation_data(
        self, val_data_config: Mapping[str, Any] | DictConfig | None = None
    ) -> None:
        """The same for `trainer.validate`, as `model.validation_ds`."""
        self._data["val"] = self._load("validation_ds", val_data_config)

    def update_data_dir(self, data_dir: str | os.PathLike[str]) -> None:
        """Where files are that a data configuration names without a folder."""
        dataset = self.config.model.dataset
        if not hasattr(dataset, "data_dir"):
            raise ConfigError(f"task={self.task.name} has no model.dataset.data_dir")
        dataset.data_dir = os.fspath(data_dir)

    def _load(
        self, part: str, given: Mapping[str, Any] | DictConfig | None
    ) -> tuple[Dataset, DataConfig]:
        model = self.config.model
        if given is not None:
            setattr(model, part, _merged(getattr(model, part), given, part, model.no_meaning))
        source = model.source(part)
        if source is None:
            raise ConfigError(f"model.{part} names no file; set model.{part}.{model.file_key}")
        data: DataConfig = getattr(model, part)
        for ok, key, expected in model.rules():
            if not ok and key.startswith(part):
                raise ConfigError(f"model.{key}: expected {expected}")
        return self.task.load(source, num_samples=data.num_samples), data

    def test_dataloader(self) -> Iterable[str]:
        """One item: the whole data set, whose batches `tpcore.train.evaluation` cuts."""
        return self._loader("test")

    def val_dataloader(self) -> Iterable[str]:
        """The same for validation."""
        return self._loader("val")

    def _loader(self, part: str) -> Iterable[str]:
        if part not in self._data:
            setup = {"test": "setup_test_data", "val": "setup_validation_data"}[part]
            raise ValueError(f"there is no data yet; call model.{setup}(...) first")
        return _Once(part)

    def test_step(self, part: str, batch_idx: int = 0) -> None:
        """Evaluate; logs test_loss and the metrics of the task, test_accuracy and so on."""
        self.test_evaluation = self._evaluate(part)

    def validation_step(self, part: str, batch_idx: int = 0) -> None:
        """The same with val_ before the names."""
        self.validation_evaluation = self._evaluate(part)

    def _evaluate(self, part: str) -> Evaluation:
        assert self.network is not None
        dataset, data = self._data[part]
        _, dp = self.groups
        result = evaluate(self.network, self.task, dataset, data=data, dp=dp, device=self.device)
        report = self.task.report(dataset, result.predictions)
        if report and self.global_rank == 0:
            print(report)
        metrics = named_metrics(result, part)
        # Equal on all ranks already; a mean over them changes nothing and satisfies Lightning.
        self.log_dict(metrics, sync_dist=True, batch_size=1)
        return result

    def training_step(self, *_: Any) -> None:
        """Not here: `tpcore finetune` trains.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "these models evaluate; train with `tpcore finetune`, or a module of your own under "
            "TensorParallelStrategy (docs/lightning.md)"
        )

    def save_to(self, save_path: str | os.PathLike[str]) -> None:
        """Write a `.nemo` file, one part for each tensor-parallel rank; all ranks call it.

        Before a Trainer has run the model its weights are those of its own file, which is copied.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = Path(save_path)
        if self.network is None:
            if environment_int("RANK", environment_int("LOCAL_RANK", 0)) == 0:
                _copy(self.path, path)
        elif self.groups[1].rank == 0:
            save_nemo(self.network, self.task, self.config, path)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()


class TextClassificationModel(NemoModel):
    """Text classification, and relation extraction, which NeMo has as the same."""

    tasks = ("text_classification", "relation_extraction")


class TokenClassificationModel(NemoModel):
    """A label for each word."""

    tasks = ("token_classification",)


class QAModel(NemoModel):
    """Answers as spans of a context."""

    tasks = ("question_answering",)


class _Once:
    """A loader of one item; Lightning would take a list for several loaders."""

    def __init__(self, item: str) -> None:
        self.item = item

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        yield self.item


def _merged(
    section: Any,
    given: Mapping[str, Any] | DictConfig,
    part: str,
    no_meaning: Mapping[str, str],
) -> Any:
    """A section of data with other values; keys that change nothing here are said once."""
    values: Any = given
    if OmegaConf.is_config(given):
        values = OmegaConf.to_container(given, resolve=True)
    assert isinstance(values, Mapping)
    known = [field.name for field in dataclasses.fields(section)]
    kept = {}
    for name, value in values.items():
        key = str(name)
        reason = no_meaning.get(f"{part}.{key}")
        if reason is not None:
            warnings.warn(f"model.{part}.{key}={value} changes nothing: {reason}", stacklevel=4)
        elif key in known:
            kept[key] = value
        else:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key model.{part}.{key}; {hint}")
    try:
        base = OmegaConf.structured(type(section))
        return OmegaConf.to_object(OmegaConf.merge(base, kept))
    except OmegaConfBaseException as error:
        raise ConfigError(f"model.{part}: {str(error).splitlines()[0]}") from error


def _copy(source: Path, target: Path) -> None:
    """A whole file or none."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
