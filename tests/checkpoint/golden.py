"""Where recorded checkpoints are, and how one of them is compared with a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
COMMITTED = REPOSITORY / "tests" / "golden"
# A larger collection that only some checkouts have beside them.
SHARED = REPOSITORY.parent / "shared" / "fixtures"


@dataclass(frozen=True)
class Golden:
    """One recorded checkpoint."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoint(self) -> Path:
        places = (self.folder / name for name in ("ckpt", "model.nemo", "model"))
        return next(place for place in places if place.exists())

    def inputs(self) -> dict[str, torch.Tensor]:
        return self._tensors("inputs.pt")

    def expected(self) -> dict[str, torch.Tensor]:
        return self._tensors("expected.pt")

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        tensors = torch.load(self.folder / name, weights_only=True)
        return {key: value.to(torch.get_default_device()) for key, value in tensors.items()}


def committed() -> list[Golden]:
    return [Golden(folder) for folder in sorted(COMMITTED.iterdir()) if folder.is_dir()]


def shared() -> list[Golden]:
    """Those beside the checkout that are not committed; empty where there are none."""
    if not SHARED.is_dir():
        return []
    known = {golden.name for golden in committed()}
    return [
        Golden(folder)
        for folder in sorted(SHARED.iterdir())
        if folder.is_dir() and folder.name not in known
    ]


def errors_against(golden: Golden, output: object, prefix: str = "") -> dict[str, float]:
    """Largest absolute differences between a model's output and what was recorded."""
    expected = golden.expected()
    rows, columns = expected["nonpad_idx"].unbind(1)

    def at_tokens(x: torch.Tensor) -> torch.Tensor:
        return x[rows, columns].float()

    def largest(x: torch.Tensor, name: str) -> float:
        assert x.shape == expected[name].shape, (name, x.shape)
        return (x - expected[name]).abs().max().item()

    # NeMo's models have the GeLU that NeMo 1.x forced on them.
    nemo = "_onnx_safe_gelu" if "hidden_onnx_safe_gelu" in expected else ""
    errors = {"hidden": largest(at_tokens(output.last_hidden_state), prefix + "hidden" + nemo)}
    if prefix + "pooled" in expected:
        errors["pooled"] = largest(output.pooler_output, prefix + "pooled")
    if output.prediction_logits is not None:
        columns_recorded = expected[prefix + "logits"].shape[1]
        logits = at_tokens(output.prediction_logits)[:, :columns_recorded]
        errors["lm_logits"] = largest(logits[expected["logits_sel"]], prefix + "logits")
        errors["lm_lse"] = largest(logits.logsumexp(-1), prefix + "logits_lse")
        errors["binary"] = largest(output.seq_relationship_logits, prefix + "binary_logits")
    elif output.logits is not None:
        logits = output.logits if output.logits.dim() == 2 else at_tokens(output.logits)
        errors["logits"] = largest(logits, f"token_logits{nemo}" if nemo else "logits")
    elif output.start_logits is not None:
        errors["start"] = largest(at_tokens(output.start_logits), "start_logits")
        errors["end"] = largest(at_tokens(output.end_logits), "end_logits")
    return errors


def assert_reproduced(golden: Golden, output: object, prefix: str = "") -> None:
    """Within the tolerances of the collection's README."""
    unit = 1e-2 if "fp16" in golden.name else 1e-5
    for name, error in errors_against(golden, output, prefix).items():
        allowed = 2 * unit if name.startswith("lm_") else unit
        assert error <= allowed, f"{golden.name}: {name} differs by {error:.2e} (<= {allowed:.0e})"
