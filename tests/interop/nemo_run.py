"""The evaluation that NeMo's page shows; one process of several.

    torchrun --nproc-per-node 2 -m tests.interop.nemo_run '{"model": ..., ...}'

Global rank 0 writes what the tests compare to the JSON file `output`.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from omegaconf import OmegaConf

from tpcore.interop import nemo
from tpcore.interop import nemo as pl
from tpcore.interop.nemo import NLPDDPPlugin


def main() -> None:
    options = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    cfg = OmegaConf.create(options["cfg"])
    model_class = getattr(nemo, options["model"])

    # As on the page, from here ...
    trainer = pl.Trainer(plugins=[NLPDDPPlugin()], **cfg.trainer)

    model = model_class.restore_from(cfg.model.nemo_path, trainer=trainer)
    model.setup_test_data(test_data_config=cfg.model.test_ds)

    trainer.test(model=model, ckpt_path=None)
    # ... to here.
    sizes = [trainer.strategy.tp.size, trainer.strategy.dp.size]
    if "save_to" in options:
        model.save_to(options["save_to"])
    if trainer.global_rank == 0:
        evaluation = model.test_evaluation
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        result = {
            "sizes": sizes,
            "logged": logged,
            "loss": evaluation.loss,
            "metrics": evaluation.metrics,
            "predictions": evaluation.predictions,
        }
        Path(options["output"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
