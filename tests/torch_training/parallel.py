"""DeviceMesh, DTensor and tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from torch_training.cases import ROUNDING, SEED, Network, batch, case, losses, result, seeded, share


@case()
def device_mesh() -> Any:
    """DeviceMesh of one and of two dimensions, slices, flattened ones; groups of each."""
    size, rank = dist.get_world_size(), dist.get_rank()
    plain = init_device_mesh("cpu", (size,), mesh_dim_names=("all",))
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    flat = mesh["dp", "tp"]._flatten("dp_tp")
    outcome: list[Any] = [mesh.get_coordinate(), flat.get_local_rank()]
    for one in (plain, mesh["dp"], mesh["tp"], flat):
        t = torch.tensor([float(rank + 1)])
        dist.all_reduce(t, group=one.get_group())
        outcome += [t, dist.get_process_group_ranks(one.get_group())]
    return outcome


@case()
def dtensor_redistribute() -> Any:
    """DTensor: distribute, and redistribute between Shard, Replicate and Partial."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(SEED)
    whole = torch.randn(9, 7)  # rows and columns that no size divides
    outcome = []
    placements = [Shard(0), Shard(1), Replicate()]
    for source in placements:
        t = distribute_tensor(whole, mesh, [source])
        for target in placements:
            moved = t.redistribute(mesh, [target])
            assert torch.equal(moved.full_tensor(), whole)
            outcome.append(moved.to_local())
    partial = DTensor.from_local(whole * share(0) * (rank + 1), mesh, [Partial()])
    outcome += [partial.redistribute(mesh, [target]).to_local() for target in placements]
    for op in ("avg", "max", "min"):
        part = DTensor.from_local(whole * share(0) * (rank + 1), mesh, [Partial(op)])
        outcome.append(part.full_tensor())
    return outcome


@case(world_sizes=(4,))
def dtensor_on_two_dimensions() -> Any:
    """DTensor on a 2 x 2 mesh."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(SEED)
    whole = torch.randn(9, 7)
    outcome = []
    placements = [Shard(0), Shard(1), Replicate()]
    for first in placements:
        for second in placements:
            t = distribute_tensor(whole, mesh, [first, second])
            moved = t.redistribute(mesh, [second, first])
            assert torch.equal(moved.full_tensor(), whole)
            outcome.append(moved.to_local())
    return outcome


@case(compared=ROUNDING)
def dtensor_arithmetic() -> Any:
    """DTensor: matmul of split factors, sums, softmax, means; gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(SEED)
    a, b = torch.randn(8, 12), torch.randn(12, 16)
    outcome = []
    for left, right in ((Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(1), Shard(0))):
        x = distribute_tensor(a, mesh, [left]).requires_grad_()
        y = distribute_tensor(b, mesh, [right]).requires_grad_()
        product = x @ y
        total = product.softmax(-1).square().sum() + product.square().mean()
        total.backward()
        outcome += [product.full_tensor(), total.full_tensor()]
        outcome += [x.grad.full_tensor(), y.grad.full_tensor()]
    return outcome


def whole_batch(module: nn.Module, step: int) -> Tensor:
    """The same batch on every rank of a tensor-parallel group."""
    x, y = batch(step, rank=0, rows=8)
    return nn.functional.mse_loss(module(x), y)


@case(compared=ROUNDING)
def tensor_parallel() -> Any:
    """Tensor parallelism: ColwiseParallel, RowwiseParallel."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = parallelize_module(
        seeded(Network, width=16),
        mesh,
        {"middle.0": ColwiseParallel(), "middle.2": RowwiseParallel()},
    )
    return result(losses(module, loss=whole_batch, turns=False), module)


class Sentences(nn.Module):
    """Words, a normed residual block and a classifier: what sequence parallelism splits."""

    def __init__(self, words: int = 32, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.last_norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, words)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return self.classify(self.last_norm(h))


def sentence_loss(module: nn.Module, step: int, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    ids = torch.randint(0, 32, (2, 9), generator=generator)
    logits = module(ids[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def split_sentences(mesh: Any) -> nn.Module:
    plan = {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "last_norm": SequenceParallel(),
        "classify": ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    return parallelize_module(seeded(Sentences), mesh, plan)


@case(compared=ROUNDING, in_ci=(2,))
def tensor_parallel_sequence() -> Any:
    """Tensor parallelism: split embedding, SequenceParallel norms, `loss_parallel`."""
    module = split_sentences(init_device_mesh("cpu", (dist.get_world_size(),)))

    def loss(module: nn.Module, step: int) -> Tensor:
        return sentence_loss(module, step)

    with loss_parallel():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        return result(losses(module, optimizer, loss=loss, turns=False), module)


@case(in_ci=(), compared=ROUNDING)
def tensor_parallel_prepared_input() -> Any:
    """Tensor parallelism: PrepareModuleInput."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = parallelize_module(
        seeded(Network, width=16),
        mesh,
        {
            "middle": PrepareModuleInput(
                input_layouts=(Replicate(),), desired_input_layouts=(Shard(0),)
            ),
            "middle.0": ColwiseParallel(input_layouts=Shard(0)),
            "middle.2": RowwiseParallel(),
        },
    )
    return result(losses(module, loss=whole_batch, turns=False), module)


@case(world_sizes=(4,))
def fully_sharded_tensor_parallel() -> Any:
    """FSDP2 x tensor parallelism on a 2 x 2 mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = split_sentences(mesh["tp"])
    fully_shard(module, mesh=mesh["dp"])
    replica = mesh.get_local_rank("dp")

    def loss(module: nn.Module, step: int) -> Tensor:
        return sentence_loss(module, step, rank=replica)

    with loss_parallel():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        return result(losses(module, optimizer, loss=loss, turns=False), module)


@case(in_ci=(), world_sizes=(4,))
def fully_sharded_flattened() -> Any:
    """FSDP2 on a 2 x 2 mesh that was flattened."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    module = fully_shard(seeded(Network), mesh=mesh["outer", "inner"]._flatten("all"))
    return result(losses(module), module)


@case(in_ci=())
def functional_collectives() -> Any:
    """Functional collectives, eager: each of them."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD
    x = batch(1)[0][:4].repeat(size, 1) * share(0)
    return [
        functional.all_reduce(x, "sum", group),
        functional.all_reduce(x, "avg", group),
        functional.all_gather_tensor(x, 0, group),
        functional.reduce_scatter_tensor(x, "sum", 0, group),
        functional.all_to_all_single(x, None, None, group),
        functional.broadcast(x, 1, group),
        functional.permute_tensor(x.flatten(), [(r + 1) % size for r in range(size)], group),
        *functional.all_reduce_coalesced([x, x + rank * share(0)], "sum", group),
        *functional.all_gather_into_tensor_coalesced([x, x + rank], group),
        *functional.reduce_scatter_tensor_coalesced([x, x * 2], "sum", [0, 0], group),
    ]


@case(in_ci=(), refused="_flash_attention_for_cpu.default does not have a sharding strategy")
def context_parallel_attention() -> Any:
    """Context parallelism: attention over a sequence that the ranks share."""
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(SEED)
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
        attention = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return [attention.detach().clone()]
