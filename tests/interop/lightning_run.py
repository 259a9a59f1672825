"""A run of a Lightning Trainer under TensorParallelStrategy; one process of several.

    torchrun --nproc-per-node 4 -m tests.interop.lightning_run '{"tp": 2, ...}'

Global rank 0 writes what the tests compare to the JSON file `output`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tpcore.interop.lightning import TensorParallelStrategy
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import SequenceClassificationHead
from tpcore.parallel.sharding import sharding_table, unshard

CONFIG = BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
    padded_vocab_size=128,
)
LENGTH = 9
GLOBAL_BATCH = 8
NUM_EXAMPLES = 48


class Data(torch.utils.data.Dataset):
    """(sample id, input ids, label): whether the first token is an even number."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, CONFIG.vocab_size, (LENGTH,), generator=generator)
        return index, ids, int(ids[0]) % 2


class Classifier(lightning.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.model: BertModel | None = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            tp = self.trainer.strategy.tp
            head = SequenceClassificationHead(CONFIG, 2, tp=tp)
            self.model = BertModel(CONFIG, tp=tp, head=head)

    def training_step(self, batch, batch_index):
        sample_ids, ids, labels = batch
        output = self.model(ids, labels=labels, sample_ids=sample_ids, seed=1000 + self.global_step)
        loss = self.trainer.strategy.reduce(output.loss.detach())
        self.losses.append(float(loss))
        return output.loss

    def validation_step(self, batch, batch_index):
        _, ids, labels = batch
        output = self.model(ids, labels=labels)
        self.log("val_loss", output.loss, sync_dist=True)
        self.log("val_count", float(len(ids)), sync_dist=True, reduce_fx="sum")

    def configure_optimizers(self):
        # Not Adam: it divides a gradient that is zero but for rounding by its own size.
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def _full_weights(module: Classifier, strategy: TensorParallelStrategy) -> dict[str, list[float]]:
    """Sum and absolute sum of each unsharded parameter."""
    table, shards = sharding_table(module), [{} for _ in range(strategy.tp.size)]
    own = {name: p.detach() for name, p in module.named_parameters()}
    torch.distributed.all_gather_object(shards, own, group=strategy.tp.process_group)
    full = {name: unshard([s[name] for s in shards], table[name]).double() for name in own}
    return {n: [float(w.sum()), float(w.abs().sum())] for n, w in full.items()}


def main() -> None:
    options = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    world = int(os.environ["WORLD_SIZE"])
    lightning.seed_everything(7 + options.get("seed_step", 0) * int(os.environ["RANK"]))
    strategy = TensorParallelStrategy(tensor_parallel_size=options["tp"])
    folder = Path(options["folder"])
    keeper = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_epochs=1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        precision=options.get("precision", "32-true"),
        max_epochs=options.get("epochs", 1),
        gradient_clip_val=options.get("clip"),
        callbacks=[keeper],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    replicas = world // options["tp"]
    loader = DataLoader(Data(), batch_size=GLOBAL_BATCH // replicas)
    module = Classifier(options.get("lr", 0.05))
    if options.get("validate"):
        metrics = trainer.validate(module, loader, ckpt_path=options["resume"], verbose=False)[0]
    else:
        trainer.fit(module, loader, loader, ckpt_path=options.get("resume"))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = _full_weights(module, strategy)
    if strategy.global_rank == 0:
        result = {"losses": module.losses, "metrics": metrics, "weights": weights}
        Path(options["output"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
