"""The classes that NeMo's page on Megatron-BERT shows, for `.nemo` files of tpcore and of NeMo.

    from tpcore.interop.nemo import NLPDDPPlugin, TextClassificationModel, Trainer

    trainer = Trainer(plugins=[NLPDDPPlugin()], **cfg.trainer)
    model = TextClassificationModel.restore_from(cfg.model.nemo_path, trainer=trainer)
    model.setup_test_data(test_data_config=cfg.model.test_ds)
    trainer.test(model=model, ckpt_path=None)

They need the extra [lightning], which is imported when the first of them is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcore.interop.nemo.models import (
        QAModel,
        TextClassificationModel,
        TokenClassificationModel,
    )
    from tpcore.interop.nemo.trainer import NLPDDPPlugin, Trainer

_HOMES = {
    "NLPDDPPlugin": "trainer",
    "QAModel": "models",
    "TextClassificationModel": "models",
    "TokenClassificationModel": "models",
    "Trainer": "trainer",
}

__all__ = [
    "NLPDDPPlugin",
    "QAModel",
    "TextClassificationModel",
    "TokenClassificationModel",
    "Trainer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lightning":
            raise
        raise ImportError(
            f"{__name__}.{name} needs Lightning; install tpcore with its extra [lightning], e.g. "
            "pip install '.[finetune,lightning]' in a checkout"
        ) from error
    return getattr(module, name)
