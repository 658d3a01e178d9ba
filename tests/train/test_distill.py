"""The distillation loss by blocks of queries, against its definition with everything materialised; its kernels."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clsa.errors import BackendError
from clsa_cuda import distill
from clsa_cuda.distill import Teacher, index_kd_loss, query_blocks
from clsa_cuda.train_ops import Routing, top_k_mask

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from tests.cuda.conftest import DEVICE  # where there is no GPU this also chooses the interpreter, before any import
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
Layers = list[tuple[Tensor, Tensor]]  # q [B, H, T, D] and k [B, G, T, D] of each layer


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(
    batch: int, length: int, dtype: torch.dtype = torch.float64, memories: tuple[int, ...] = (0, 0, 0)
) -> tuple[Tensor, Tensor, Layers]:
    """q_idx, k_idx and layers; `memories` says which k each layer reads. As the model has them: tokens first."""
    q_idx, k_idx = normal(batch, length, 6, seed=1, dtype=dtype), normal(batch, length, 6, seed=2, dtype=dtype)
    keys = {m: normal(batch, length, 2, 8, seed=10 + m, dtype=dtype) for m in memories}
    layers = []
    for layer, m in enumerate(memories):
        q = 2 * normal(batch, length, 6, 8, seed=20 + layer, dtype=dtype)
        layers.append((q.transpose(1, 2), keys[m].transpose(1, 2)))
    return q_idx.requires_grad_(), k_idx.requires_grad_(), layers


def teacher_of(layers: Layers) -> Teacher:
    teacher = Teacher()
    for q, k in layers:
        teacher.add(q, k)
    return teacher


def visible(length: int, device: Any = None) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def defined_teacher(layers: Layers) -> Tensor:
    """[B, T, T], equation 5 as it is written."""
    total = []
    for q, k in layers:
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / q.shape[-1] ** 0.5
        total.append(scores.masked_fill(~visible(q.shape[2], q.device), -torch.inf).softmax(-1).mean(1))
    return torch.stack(total).mean(0)


def defined_loss(q_idx: Tensor, k_idx: Tensor, layers: Layers) -> Tensor:
    """Equation 6, with autograd."""
    seen = visible(q_idx.shape[1], q_idx.device)
    scores = q_idx @ k_idx.mT / q_idx.shape[-1] ** 0.5
    student = scores.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    target = defined_teacher(layers).detach()
    return (torch.xlogy(target, target) - target * student).sum(-1).mean()


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few queries, the last one shorter."""
    monkeypatch.setattr(distill, "_BLOCK_SCORES", 150)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (2, 19), (1, 64)])
@pytest.mark.parametrize("memories", [(0, 0, 0), (0, 0, 1), (0, 1, 0)], ids=["one memory", "two", "two, apart"])
def test_loss_and_gradients_are_the_defined_ones(
    batch: int, length: int, memories: tuple[int, ...], small_blocks: None
) -> None:
    q_idx, k_idx, layers = case(batch, length, memories=memories)
    want = defined_loss(q_idx, k_idx, layers)
    want_grads = torch.autograd.grad(3 * want, (q_idx, k_idx))
    got = index_kd_loss(q_idx, k_idx, teacher_of(layers))
    got_grads = torch.autograd.grad(3 * got, (q_idx, k_idx))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-10, atol=1e-12)
    assert float(want.detach()) > 0.05 or length == 1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype, limit: float, small_blocks: None) -> None:
    q_idx, k_idx, layers = case(2, 31, dtype)
    loss = index_kd_loss(q_idx, k_idx, teacher_of(layers))
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (q_idx, k_idx)]
    want = defined_loss(exact[0], exact[1], [(q.double(), k.double()) for q, k in layers])
    want.backward()
    assert loss.dtype == torch.float32
    assert relative(loss, want) < 2e-6
    for x, wanted in zip((q_idx, k_idx), exact):
        assert x.grad is not None and wanted.grad is not None and x.grad.dtype == dtype
        assert relative(x.grad, wanted.grad) < limit


def test_gradients_are_those_of_finite_differences(small_blocks: None) -> None:
    q_idx, k_idx, layers = case(2, 13)
    teacher = teacher_of(layers)
    assert torch.autograd.gradcheck(lambda q, k: index_kd_loss(q, k, teacher), (q_idx, k_idx))


def test_teacher_carries_no_gradient(small_blocks: None) -> None:
    q_idx, k_idx, layers = case(1, 9)
    leaves = [x.detach().requires_grad_() for x in layers[0]]
    index_kd_loss(q_idx, k_idx, teacher_of([(leaves[0], leaves[1])])).backward()
    assert all(x.grad is None for x in leaves) and q_idx.grad is not None


def test_the_same_inputs_give_the_same_bits(small_blocks: None) -> None:
    q_idx, k_idx, layers = case(2, 40, torch.float32)
    runs = []
    for _ in range(2):
        loss = index_kd_loss(q_idx, k_idx, teacher_of(layers))
        runs.append([loss.detach(), *torch.autograd.grad(loss, (q_idx, k_idx))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


class _Largest(TorchDispatchMode):
    """The most elements any result has whose memory is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return result


@pytest.mark.parametrize("length", [128, 512])
def test_no_array_has_a_value_for_each_pair_of_positions(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_BLOCK_SCORES", 1 << 12)
    q_idx, k_idx, layers = case(1, length, torch.float32, memories=(0,))
    routing = Routing(q_idx, k_idx, 4, 1)
    routing.observe(*layers[0])
    with _Largest() as largest:
        routing.kd_loss().backward()
        routing.coverage()
    assert largest.elements <= max(1 << 12, layers[0][0].numel())  # a block of scores, or the queries of a layer


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 300), (2, 1000), (3, 257), (200, 7)])
def test_blocks_cover_all_queries_once(batch: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_BLOCK_SCORES", 1 << 18)
    blocks = list(query_blocks(batch, length))
    assert [i for start, stop in blocks for i in range(start, stop)] == list(range(length))
    assert all(batch * (stop - start) * length <= 1 << 18 for start, stop in blocks)
    assert all((stop - start) % 128 == 0 for start, stop in blocks[:-1])


@pytest.mark.parametrize(("k", "block_size"), [(1, 1), (5, 1), (64, 1), (6, 2), (8, 4)])
def test_selection_and_coverage_by_blocks_are_those_of_all_queries_at_once(
    k: int, block_size: int, small_blocks: None
) -> None:
    q_idx, k_idx, layers = case(2, 21)
    ties = [(x.detach() * 2).round() for x in (q_idx, k_idx)]
    routing = Routing(ties[0], ties[1], k, block_size)
    for q, keys in layers:
        routing.observe(q, keys)
    want = top_k_mask(ties[0] @ ties[1].mT, k, block_size)
    covered = (defined_teacher(layers) * want).sum(-1)
    torch.testing.assert_close(routing.coverage(), covered, rtol=1e-12, atol=1e-12)  # before there is a mask
    assert torch.equal(routing.mask, want)
    torch.testing.assert_close(routing.coverage(), covered, rtol=1e-12, atol=1e-12)


# -- kernels: on the GPU if there is one, and in Triton's interpreter otherwise ----------------------------
# (B, C, S), groups, heads of a group, head dim
KERNEL_CASES = [((1, 1, 1), 1, 1, 16), ((2, 19, 40), 2, 3, 16), ((1, 33, 33), 1, 2, 24), ((1, 16, 64), 2, 1, 8)]
KERNEL_DTYPES = ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.cuda)]  # as in tests/cuda


def kernel_inputs(shape: tuple[int, int, int], groups: int, heads: int, dim: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Contiguous q [B, G, M, C, D], and k [B, G, S, D] as a part of a longer memory with tokens first."""
    batch, count, length = shape
    q = 2 * normal(batch, groups, heads, count, dim, seed=3)
    k = normal(batch, length + 5, groups, dim, seed=4)
    k[:, length:] = torch.nan
    q, k = (x.to(DEVICE, getattr(torch, dtype)) for x in (q, k))
    return q, k.transpose(1, 2)[:, :, :length]


def blocks_of(q: int, k: int) -> Any:
    from clsa_cuda.kernels.distill import DistillTiles

    return DistillTiles(q, k, num_warps=4, num_stages=2)


@needs_triton
@pytest.mark.parametrize("tiles", [None, (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("shape", "groups", "heads", "dim"), KERNEL_CASES)
def test_kernels_give_the_weighted_attention(
    shape: tuple[int, int, int], groups: int, heads: int, dim: int, dtype: str, tiles: tuple[int, int] | None
) -> None:
    q, k = kernel_inputs(shape, groups, heads, dim, dtype)
    from clsa_cuda.kernels.distill import softmax_sums, weighted_attention

    chosen = blocks_of(*tiles) if tiles else None
    sums = softmax_sums(q, k, chosen)
    got = weighted_attention(q, k, sums, 0.25, chosen)
    scores = q.double() @ k.double()[:, :, None].mT / dim**0.5
    scores = distill.hide_future(scores, -torch.inf)
    want = 0.25 * scores.softmax(-1).sum((1, 2))
    assert relative(torch.exp2(sums.double()), scores.exp().sum(-1)) < 2e-6
    assert relative(got, want) < 5e-6
    assert not got[want == 0].any(), "a key that is not visible must get 0"


@needs_triton
def test_kernels_agree_with_what_other_devices_do() -> None:
    q, k = kernel_inputs((2, 19, 40), 2, 3, 16, "float32")
    from clsa_cuda.kernels.distill import softmax_sums, weighted_attention

    plain = distill._weighted_attention(q, k, 0.5)  # in float32 it has no kernel, wherever it is
    assert relative(weighted_attention(q, k, softmax_sums(q, k), 0.5), plain) < 2e-6


@needs_triton
def test_kernels_refuse_two_dtypes() -> None:
    q, k = kernel_inputs((1, 4, 4), 1, 1, 16, "float16")
    from clsa_cuda.kernels.distill import softmax_sums

    with pytest.raises(BackendError, match=r"one dtype, got torch\.float16 and torch\.float32"):
        softmax_sums(q, k.float())


@needs_triton
@pytest.mark.parametrize(("head_dim", "shared_memory"), [(128, 227), (128, 163), (256, 99), (64, 64)])
def test_tiles_leave_room_for_two_programs(head_dim: int, shared_memory: int) -> None:
    from clsa_cuda.kernels.distill import distill_tiles
    from clsa_cuda.kernels.tiles import Limits

    for streams_queries in (True, False):
        tiles = distill_tiles(streams_queries, head_dim, 2, Limits(132, shared_memory << 10))
        streamed, kept = tiles.block_q, tiles.block_k
        if not streams_queries:
            streamed, kept = kept, streamed
        assert 2 * 2 * head_dim * (kept + tiles.num_stages * streamed) <= shared_memory << 10
        assert min(tiles.block_q, tiles.block_k) >= 16


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_the_loss_is_the_defined_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_BLOCK_SCORES", 1 << 17)
    q_idx, k_idx, layers = case(2, 333, dtype, memories=(0, 0, 1))
    q_idx, k_idx = (x.detach().cuda().requires_grad_() for x in (q_idx, k_idx))
    teacher = Teacher()
    for q, k in layers:
        teacher.add(q.cuda(), k.cuda())
    loss = index_kd_loss(q_idx, k_idx, teacher)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (q_idx, k_idx)]
    want = defined_loss(exact[0], exact[1], [(q.cuda().double(), k.cuda().double()) for q, k in layers])
    want.backward()
    assert relative(loss, want) < 1e-5
    for x, wanted in zip((q_idx, k_idx), exact):
        assert x.grad is not None and wanted.grad is not None
        assert relative(x.grad, wanted.grad) < 5e-3
