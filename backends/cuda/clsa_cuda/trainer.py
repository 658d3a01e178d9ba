"""Training on torch: float32 weights, compute in one dtype without autocast, fused AdamW."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.errors import BackendError, TrainError
from clsa.ops import Ops, Queries, StepBatch
from clsa_cuda.train_ops import TrainOps, wide

Forward = Callable[[Ops, Mapping[str, Tensor], StepBatch], Tensor]  # flat weights -> logits [B * T, V]
Tokens = np.ndarray  # [B, T] int32
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TorchTrainer:
    """The `clsa.train.trainer.Trainer` of torch; see there for what each method promises."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "torch on CPU"
        self.device = f"{device} ({name}), computing in {str(dtype).removeprefix('torch.')}"
        self._device, self._dtype = device, dtype
        self._master = torch.promote_types(dtype, torch.float32)
        self._params: dict[str, Tensor] = {}
        self._trainable: dict[str, Tensor] = {}
        self._optimizer: torch.optim.AdamW | None = None

    def load(self, params: Mapping[str, np.ndarray]) -> None:
        self._params = {
            name: torch.from_numpy(np.array(value)).to(self._device, self._master) for name, value in params.items()
        }
        self._trainable, self._optimizer = {}, None

    def prepare(self, trainable: Mapping[str, float], betas: tuple[float, float], eps: float) -> None:
        for name, weight in self._params.items():
            weight.requires_grad_(name in trainable)
        self._trainable = {name: self._params[name] for name in trainable}
        groups = [
            {"params": [self._params[n] for n, d in trainable.items() if d == decay], "weight_decay": decay}
            for decay in sorted(set(trainable.values()))
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def step(
        self,
        forward: Forward,
        batches: Sequence[tuple[Tokens, Tokens]],
        *,
        lr: float,
        clip: float,
        lm_weight: float,
        kd_weight: float,
        sparse: bool,
        with_coverage: bool,
    ) -> Callable[[], dict[str, float]]:
        assert self._optimizer is not None, "prepare() comes before step()"
        sums: dict[str, Tensor] = {}
        for inputs, targets in batches:
            ops, cross_entropy = self._run(forward, inputs, targets, sparse)
            losses = {"lm_loss": cross_entropy.mean()}
            loss = lm_weight * losses["lm_loss"]
            if ops.routings:
                losses["kd_loss"] = ops.kd_loss()
                loss = loss + kd_weight * losses["kd_loss"]
                if with_coverage and (coverage := ops.coverage()) is not None:
                    losses["coverage"] = coverage.mean()
            (loss / len(batches)).backward()
            for name, value in {"loss": loss, **losses}.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(batches)
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(self._trainable.values(), clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        values = torch.stack([value.float() for value in sums.values()])
        return lambda: dict(zip(sums, values.tolist(), strict=True))

    @torch.no_grad()
    def score(
        self, forward: Forward, inputs: Tokens, targets: Tokens, *, sparse: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        ops, cross_entropy = self._run(forward, inputs, targets, sparse)
        coverage = ops.coverage()
        return ops.to_numpy(cross_entropy), None if coverage is None else ops.to_numpy(coverage)

    def params(self) -> dict[str, np.ndarray]:
        return {name: _to_host(weight) for name, weight in self._params.items()}

    def moments(self) -> dict[str, np.ndarray]:
        assert self._optimizer is not None, "prepare() comes before moments()"
        state = self._optimizer.state
        return {
            f"{moment}.{name}": _to_host(state[weight][moment])
            for name, weight in self._trainable.items()
            for moment in _MOMENTS
            if weight in state
        }

    def restore(self, moments: Mapping[str, np.ndarray], step: int) -> None:
        assert self._optimizer is not None, "prepare() comes before restore()"
        wanted = {f"{m}.{name}": tuple(w.shape) for name, w in self._trainable.items() for m in _MOMENTS}
        if {name: value.shape for name, value in moments.items()} != wanted:
            raise TrainError("the saved optimiser state does not fit the weights that train; start the stage afresh")
        for name, weight in self._trainable.items():
            self._optimizer.state[weight] = {
                "step": torch.tensor(float(step), device=self._device),
                **{m: torch.from_numpy(np.array(moments[f"{m}.{name}"])).to(self._device) for m in _MOMENTS},
            }

    def _run(self, forward: Forward, inputs: Tokens, targets: Tokens, sparse: bool) -> tuple[TrainOps, Tensor]:
        """The ops after a forward pass, and the cross-entropy [B, T] of each token."""
        batch, length = inputs.shape
        ops = TrainOps(self._device, self._dtype, batch, length, sparse)
        weights = {name: weight.to(self._dtype) for name, weight in self._params.items()}
        logits = forward(ops, weights, self._batch(self._tokens(inputs), batch, length))
        labels = self._tokens(targets).long()
        return ops, F.cross_entropy(wide(logits), labels, reduction="none").view(batch, length)

    def _tokens(self, tokens: Tokens) -> Tensor:
        """[B, T] on the host -> [B * T] on the device, without waiting for what the device still computes."""
        flat = torch.from_numpy(np.ascontiguousarray(tokens)).view(-1)
        return flat.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else flat

    def _batch(self, tokens: Tensor, batch: int, length: int) -> StepBatch:
        """Whole sequences, one after the other; there are no pages and no rings to map to."""
        positions = torch.arange(length, dtype=torch.int32, device=self._device).repeat(batch)
        bounds = tuple(range(0, batch * length + 1, length))
        queries = Queries(positions, None, None, None, bounds, (length,) * batch)
        return StepBatch(tokens, queries, None, None, None, None)


def _to_host(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float32, copy=True).numpy()


def open_trainer(device: str | None, dtype: str) -> TorchTrainer:
    """A trainer on "cuda", "cuda:N" or "cpu"; None takes the GPU if there is one. Raises BackendError."""
    if dtype not in ("float32", "bfloat16"):
        raise BackendError(f"training computes in float32 or bfloat16, got {dtype!r}")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", name) is None:
        raise BackendError(f"training runs on device 'cuda', 'cuda:N' or 'cpu', got {name!r}")
    chosen = torch.device(name)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"there is no device {name!r} here ({torch.cuda.device_count()} GPUs found); try 'cpu'")
    return TorchTrainer(chosen, getattr(torch, dtype))
