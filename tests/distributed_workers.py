"""What tests/test_distributed.py runs in other processes: two workers in one gloo group.

The workers run the kernels on CPU tensors in Triton's interpreter, whatever the test session runs
them on. A pair is started once and takes jobs, functions of this module by name: a start costs
seconds, most jobs less than one.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import io
import multiprocessing
import os
import pathlib
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from bam_kernels import BAM, explain
from bam_kernels.explain import Explanation

WORLD = 2
COLLECTIVE_SECONDS = 60
JOB_SECONDS = 120
KERNELS = ("pool_reduce_forward", "channel_mlp_forward", "gate_forward", "input_gradient")


# --- what is trained --------------------------------------------------------------------------


class Network(nn.Module):
    """Two convolutions with a BAM behind each, and a classifier; no norm is the identity."""

    def __init__(self, bam: type[nn.Module] = BAM, **options: Any) -> None:
        super().__init__()
        options = {"dilation": 2} | options
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(16)
        self.stem_bam = bam(16, 4, **options)
        self.conv = nn.Conv2d(16, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.bam = bam(24, 4, **options)
        self.head = nn.Linear(24, 5)
        with torch.no_grad():
            for part in self.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.weight.uniform_(0.5, 1.5)
                    part.bias.normal_(std=0.5)
                    part.running_mean.normal_(std=0.2)
                    part.running_var.uniform_(0.5, 2.0)
                elif isinstance(part, nn.Linear | nn.Conv2d):
                    part.bias.uniform_(0.5, 1.5)  # so that no hidden layer is dead on all samples
                    if isinstance(part, nn.Linear):  # of few units: a bias that weighs more
                        part.bias += 0.5
                        part.weight *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bam(F.relu(self.stem_norm(self.stem(x))))
        x = self.bam(F.relu(self.norm(self.conv(x))))
        return self.head(x.mean(dim=(2, 3)))


def train(
    model: nn.Module, network: nn.Module, inputs: Tensor, targets: Tensor, scale: float
) -> dict[str, Tensor]:
    """SGD on the summed loss times `scale`; all that each step leaves behind, on the CPU and whole.

    Args:
        model: what is called: `network`, or what it is wrapped in.
        network: the module whose parameters and buffers are reported.
        inputs: [steps, N, C, H, W].
        targets: [steps, N], classes.
        scale: 1 / N for a mean. Where the gradients of `WORLD` processes are averaged, and each
            has a part of the batch, `WORLD` / N makes them the gradient of the mean over all.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    found = {}
    for i, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        optimizer.zero_grad()
        x = x.detach().clone().requires_grad_()
        out = model(x)
        (F.cross_entropy(out, target, reduction="sum") * scale).backward()
        # Of an empty part, SyncBatchNorm gives no gradient.
        step = {"out": out, "dx": x.grad if x.numel() else torch.zeros_like(x)}
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None, f"{key} got no gradient"
            step[f"d{key}"] = parameter.grad
        found |= {f"step {i}: {key}": snapshot(value) for key, value in step.items()}
        optimizer.step()
        state = network.state_dict()
        found |= {f"step {i}: {key}": snapshot(value) for key, value in state.items()}
    return found


def snapshot(t: Tensor) -> Tensor:
    """A copy on the CPU, of the whole tensor where it is sharded."""
    t = t.detach()
    return (t.full_tensor() if is_sharded(t) else t).to("cpu", copy=True)


def is_sharded(t: Tensor) -> bool:
    return isinstance(t, distributed.tensor.DTensor)


class Watch:
    """How the BAMs of a network ran.

    Attributes:
        told: what `explain` said inside of each call of each BAM, by the BAM's name.
        sharded: whether a BAM met a sharded parameter of its own when it was called.
        kernels: how often each operator of the Triton backend was called.
    """

    def __init__(self) -> None:
        self.told: dict[str, list[Explanation]] = collections.defaultdict(list)
        self.sharded = False
        self.kernels: collections.Counter[str] = collections.Counter()

    @property
    def backends(self) -> set[str]:
        return {told.backend for calls in self.told.values() for told in calls}


@contextlib.contextmanager
def watch(network: nn.Module) -> Iterator[Watch]:
    """Record how each BAM in `network` runs inside of the block."""
    from bam_kernels.backends import triton

    seen = Watch()

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Tensor]) -> None:
            seen.told[name].append(explain(module, args[0]))
            seen.sharded |= any(is_sharded(p) for p in module.parameters())

        return before

    def counted(name: str) -> Any:
        function = getattr(triton, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.kernels[name] += 1
            return function(*args, **kwargs)

        return mock.patch.object(triton, name, call)

    with contextlib.ExitStack() as undo:
        for name in KERNELS:
            undo.enter_context(counted(name))
        for name, module in network.named_modules():
            if isinstance(module, BAM):  # a hook on a BAM itself keeps nothing from being fused
                undo.callback(module.register_forward_pre_hook(hook(name)).remove)
        yield seen


# --- the jobs ---------------------------------------------------------------------------------


def part(t: Tensor, rank: int, sizes: tuple[int, ...] | None = None) -> Tensor:
    """This process's part of [steps, N, ...]: one of `sizes` samples, or half of them."""
    return t.tensor_split(WORLD, dim=1)[rank] if sizes is None else t.split(sizes, dim=1)[rank]


def ddp(
    rank: int,
    network: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    sizes: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Watch]:
    """Train under DistributedDataParallel on this process's part of each batch."""
    model = nn.parallel.DistributedDataParallel(network, **options)
    x, target = part(inputs, rank, sizes), part(targets, rank, sizes)
    with watch(network) as seen:
        return train(model, network, x, target, WORLD / targets.shape[1]), seen


def ddp_accumulated(
    rank: int, network: nn.Module, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """The gradients of several batches, which are reduced with those of the last."""
    model = nn.parallel.DistributedDataParallel(network)
    batches = list(zip(part(inputs, rank), part(targets, rank), strict=True))
    for i, (x, target) in enumerate(batches):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            F.cross_entropy(model(x), target).backward()
    return {f"step 0: d{key}": snapshot(p.grad) for key, p in network.named_parameters()}


def shard(network: nn.Module, units: dict[str, torch.dtype | None]) -> None:
    """FSDP2 over both processes.

    Args:
        network: changed in place.
        units: by the path of each module to be sharded, inner ones first, the dtype that its
            parameters have while it computes; None for their own.
    """
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    for path, dtype in units.items():
        policy = distributed.fsdp.MixedPrecisionPolicy(param_dtype=dtype)
        unit = distributed.fsdp.fully_shard(
            network.get_submodule(path), mesh=mesh, mp_policy=policy
        )
        # Of float32 and bfloat16, FSDP2 averages gradients by ReduceOp.AVG, which gloo does not
        # have; this makes it divide their sum, as it does in float64 of itself.
        unit.set_force_sum_reduction_for_comms(True)
    assert all(is_sharded(p) for p in network.parameters())


def fsdp(
    rank: int, network: nn.Module, inputs: Tensor, targets: Tensor, units: tuple[str, ...]
) -> tuple[dict[str, Tensor], Watch]:
    """Train under FSDP2 on this process's half: the modules `units` sharded, and the root."""
    shard(network, dict.fromkeys((*units, "")))
    scale = WORLD / targets.shape[1]
    with watch(network) as seen:
        return train(network, network, part(inputs, rank), part(targets, rank), scale), seen


def fsdp_mixed(
    rank: int, module: nn.Module, x: Tensor, dout: Tensor, units: dict[str, torch.dtype | None]
) -> tuple[dict[str, Tensor], Watch]:
    """One forward and backward of a module under FSDP2's mixed precision, on half of x."""
    shard(module, units)
    x = x.chunk(WORLD)[rank].requires_grad_()
    with watch(module) as seen:
        out = module(x)
    out.backward(dout.chunk(WORLD)[rank])
    return {"out": snapshot(out), "dx": snapshot(x.grad)}, seen


def one_fails(rank: int) -> None:
    """Rank 1 raises while rank 0 waits for it."""
    if rank == 1:
        raise ZeroDivisionError("from rank 1")
    distributed.barrier()


# --- SyncBatchNorm on CPU tensors -------------------------------------------------------------
#
# In a process group, torch's SyncBatchNorm takes the tensors of accelerators only: its five
# operators (the sums within one process, and the elementwise parts) have no CPU kernels, so the
# layer and DDP both refuse CPU tensors. Here the five get CPU kernels, and both checks are let
# pass. All else is torch's own: the modules are those that convert_sync_batchnorm makes, and the
# layer's forward, its autograd function with its collectives, here over gloo, and the updates of
# its buffers run as on a GPU.


def _over_channels(t: Tensor, x: Tensor) -> Tensor:
    """[C], to broadcast over x [N, C, ...]."""
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
    return mean, torch.rsqrt(var + eps)


def _batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    total = counts.sum()
    share = (counts / total)[:, None]
    mean = (means * share).sum(0)
    var = ((invstds**-2 - eps + (means - mean) ** 2) * share).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * total / (total - 1), momentum)
    return mean, torch.rsqrt(var + eps)


def _batch_norm_elemt(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    normal = (x - _over_channels(mean, x)) * _over_channels(invstd, x)
    return normal * _over_channels(weight, x) + _over_channels(bias, x)


def _batch_norm_backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dims = _all_but_channels(x)
    sum_dy = dy.sum(dims)
    sum_dy_xmu = (dy * (x - _over_channels(mean, x))).sum(dims)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def _batch_norm_backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    total = count.sum()
    slope = _over_channels(sum_dy_xmu * invstd**2 / total, x)
    dx = dy - _over_channels(sum_dy / total, x) - (x - _over_channels(mean, x)) * slope
    return dx * _over_channels(invstd * weight, x)


def let_sync_batch_norm_take_cpu_tensors() -> torch.library.Library:
    """For as long as the process and the library that is returned live."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    for kernel in (
        _batch_norm_stats,
        _batch_norm_gather_stats_with_counts,
        _batch_norm_elemt,
        _batch_norm_backward_reduce,
        _batch_norm_backward_elemt,
    ):
        library.impl(kernel.__name__.removeprefix("_"), kernel)
    forward = nn.SyncBatchNorm.forward

    def accepting_cpu(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        # The layer's check asks for the name of an out-of-tree accelerator, and takes that too.
        with mock.patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu"):
            return forward(self, x)

    nn.SyncBatchNorm.forward = accepting_cpu
    # DDP's check: this method does nothing else.
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
    return library


# --- the processes ----------------------------------------------------------------------------


class Pair:
    """Two processes in one gloo group.

    A job that fails in either process, or does not end in `JOB_SECONDS`, ends both.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with mock.patch.dict(os.environ, environment):  # which the processes inherit
            for rank in range(WORLD):
                ours, theirs = context.Pipe()
                store = str(folder / "store")
                process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)

    @property
    def alive(self) -> bool:
        return bool(self.processes)

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """What the function `job` of this module returns, by rank.

        Raises:
            RuntimeError: with the traceback of each process where it failed.
        """
        request = _pack((job, arguments))
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):  # noticed again below
                connection.send_bytes(request)
        done: dict[int, Any] = {}
        failed: dict[int, str] = {}
        deadline = time.monotonic() + JOB_SECONDS
        while len(done) + len(failed) < WORLD:
            pending = {
                connection: rank
                for rank, connection in enumerate(self.connections)
                if rank not in done and rank not in failed
            }
            ready = wait(list(pending), max(deadline - time.monotonic(), 0))
            for connection in ready:
                rank = pending[connection]
                try:
                    error, value = _unpack(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    error, value = "the process ended", None
                if error is None:
                    done[rank] = value
                else:
                    failed[rank] = error
                    # The other process may be waiting for this one, in a collective.
                    deadline = min(deadline, time.monotonic() + 3)
            if not ready:
                failed |= dict.fromkeys(pending.values(), "did not end, was killed")
        if failed:
            self.close()
            texts = [f"rank {rank}: {text}" for rank, text in sorted(failed.items())]
            raise RuntimeError("\n".join([f"job {job!r} failed", *texts]))
        return [done[rank] for rank in range(WORLD)]

    def close(self) -> None:
        """End both processes."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.connections, self.processes = [], []


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank: int, store: str, connection: Connection) -> None:
    """A worker's life: join the group, and take jobs until nobody is left to give them."""
    import torch.distributed.fsdp
    import torch.distributed.tensor

    from bam_kernels.backends.triton import configs
    from bam_kernels.testing.interpreter import accelerate

    accelerate()
    torch.set_num_threads(1)
    library = let_sync_batch_norm_take_cpu_tensors()
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(store, WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    # The tiles of the fixture large_tiles: the interpreter's time goes with their number.
    tile = configs.Tile(128, 256, 4, 1)
    with configs.override(**dict.fromkeys(configs.KERNELS, tile)), contextlib.suppress(EOFError):
        while True:
            job, arguments = _unpack(connection.recv_bytes())
            faulthandler.dump_traceback_later(JOB_SECONDS - 5)  # where it hangs, to stderr
            try:
                reply = None, globals()[job](rank, **arguments)
            except Exception:
                reply = traceback.format_exc(), None
            faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(_pack(reply))
    distributed.destroy_process_group()
    del library
