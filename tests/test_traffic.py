"""The traffic meter against kernels and operators whose byte counts are known by hand."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bam_kernels.testing.traffic import measure  # noqa: E402

OPS = torch.ops.traffic_test

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="the meter counts what Triton's interpreter does: run with TRITON_INTERPRET=1",
)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def reread_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    mean = tl.sum(tl.load(x_ptr + offsets, mask=mask, other=0.0), axis=0) / n
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0) - mean
    tl.store(y_ptr + offsets, centred, mask=mask)
    tl.store(y_ptr, 0.0)


@triton.jit
def strided_copy_kernel(x_ptr, y_ptr, stride, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * stride + columns
    mask = columns < width
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def reinterpreted_copy_kernel(x_ptr, y_ptr, n, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x, y = x_ptr.to(tl.pointer_type(TYPE)), y_ptr.to(tl.pointer_type(TYPE))
    tl.store(y + offsets, tl.load(x + offsets, mask=mask), mask=mask)


@triton.jit
def atomic_kernel(x_ptr, total_ptr, lock_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.atomic_add(total_ptr + offsets % 2, x, mask=mask)
    tl.atomic_cas(lock_ptr, 0, 1)


@triton.jit
def descriptor_kernel(x_ptr, y_ptr, rows, width, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, width], [width, 1], [BLOCK, BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, [rows, width], [width, 1], [BLOCK, BLOCK])
    y.store([0, 0], x.load([0, 0]))


def copy(x, y, n=None, block=32):
    n = x.numel() if n is None else n
    copy_kernel[(triton.cdiv(n, block),)](x, y, n, BLOCK=block)


def x_and_y(traffic):
    (launch,) = traffic.launches
    return launch.tensors["x_ptr"], launch.tensors["y_ptr"]


def test_masked_copy_is_counted_to_the_byte():
    x = torch.randn(101)
    y = torch.empty_like(x)
    with measure(strict=True) as traffic:
        copy(x, y)
    assert torch.equal(x, y)
    (launch,) = traffic.launches
    assert (launch.kernel, launch.grid) == ("copy_kernel", (4, 1, 1))
    assert list(launch.tensors) == ["x_ptr", "y_ptr"]
    read, written = x_and_y(traffic)
    assert (read.read_bytes, read.distinct_read_bytes, read.written_bytes) == (404, 404, 0)
    assert (written.written_bytes, written.distinct_written_bytes) == (404, 404)
    assert (written.read_bytes, written.size_bytes) == (0, 404)
    assert (launch.read_bytes, launch.written_bytes) == (404, 404)
    assert not launch.atomics and launch.outside_bytes == traffic.outside_bytes == 0
    # Nothing else ran: the interpreter's own tensor handling is no operator of the code.
    assert traffic.operators == [] and traffic.device_launches == 1
    assert traffic.passes(x) == 2 and traffic.small_bytes(x) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_item_size_is_the_tensors(dtype):
    x = torch.ones(5, dtype=dtype)
    with measure(strict=True) as traffic:
        copy(x, torch.empty_like(x))
    assert traffic.launches[0].read_bytes == traffic.launches[0].written_bytes == 5 * x.itemsize


def test_rereads_and_overwrites_show_apart():
    x = torch.randn(10)
    y = torch.empty(10)
    with measure(strict=True) as traffic:
        reread_kernel[(1,)](x, y, 10, BLOCK=16)
    x, y = x_and_y(traffic)
    assert (x.read_bytes, x.distinct_read_bytes) == (80, 40)
    assert (y.written_bytes, y.distinct_written_bytes) == (44, 40)


def test_read_past_the_end_is_outside():
    x, y = torch.zeros(16)[:10], torch.empty(12)
    with measure() as traffic:
        copy(x, y, n=11)
    assert traffic.launches[0].outside_bytes == traffic.outside_bytes == 4
    assert [t.read_bytes + t.written_bytes for t in x_and_y(traffic)] == [40, 44]
    with pytest.raises(AssertionError) as error, measure(strict=True):
        copy(x, y, n=11)
    message = (
        "kernel 'copy_kernel': 4 bytes outside its tensor arguments, first by a read of 4 bytes"
    )
    assert str(error.value) == message + " at +40 bytes of argument 'x_ptr' (40 bytes)"


def test_write_past_the_end_is_outside():
    x, y = torch.ones(13), torch.zeros(16)[:10]
    with measure() as traffic:
        copy(x, y, n=13)
    assert traffic.outside_bytes == 12
    assert x_and_y(traffic)[1].written_bytes == 40
    with pytest.raises(AssertionError, match=r"write of 4 bytes .*\+40 bytes .*'y_ptr'"):
        with measure(strict=True):
            copy(x, y, n=13)


def test_access_before_the_start_is_outside():
    x, y = torch.zeros(16)[4:8], torch.zeros(16)[4:8]
    with pytest.raises(AssertionError, match=r"8 bytes .*read of 4 bytes at -8 bytes .*'x_ptr'"):
        with measure(strict=True):
            strided_copy_kernel[(2,)](x, y, -2, 1, BLOCK=8)


def test_gaps_of_a_strided_view_are_outside():
    x = torch.zeros(4, 8)[:, :5]
    y = torch.zeros(4, 8)[:, :5]
    with measure(strict=True) as traffic:
        strided_copy_kernel[(4,)](x, y, 8, 5, BLOCK=8)
    assert x_and_y(traffic)[0].distinct_read_bytes == x_and_y(traffic)[0].size_bytes == 80
    with measure() as traffic:
        strided_copy_kernel[(3,)](x, y, 8, 6, BLOCK=8)
    # One element too far in each row: in the gap, though within the view's first and last address.
    assert traffic.outside_bytes == 3 * (4 + 4)
    assert x_and_y(traffic)[0].read_bytes == 3 * 5 * 4
    assert traffic.launches[0].first_outside.startswith("read of 4 bytes at +20 bytes")


def test_channels_last_and_expanded_tensors_have_no_gaps():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    row = torch.randn(8)
    with measure(strict=True) as traffic:
        copy(x, torch.empty_like(x))
        copy(row.expand(1000, 8), torch.empty(8), n=8)
    expanded = traffic.launches[1].tensors["x_ptr"]
    assert (expanded.size_bytes, expanded.storage_bytes, expanded.read_bytes) == (32000, 32, 32)
    assert traffic.passes(x) == 2 and traffic.small_bytes(x) == 64


def test_tensor_passed_twice_counts_for_the_first_parameter():
    x = torch.randn(7)
    with measure(strict=True) as traffic:
        copy(x, x)
    assert [(t.read_bytes, t.written_bytes) for t in x_and_y(traffic)] == [(28, 28), (0, 0)]


def test_reinterpreted_pointers_wider_and_narrower_than_the_elements():
    x = torch.randn(10, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    with measure(strict=True) as traffic:
        reinterpreted_copy_kernel[(1,)](x, y, 5, TYPE=tl.int32, BLOCK=8)
    assert torch.equal(x, y)
    moved = [t.distinct_read_bytes + t.distinct_written_bytes for t in x_and_y(traffic)]
    assert moved == [20, 20]
    with measure() as traffic:
        reinterpreted_copy_kernel[(1,)](torch.zeros(4, 2)[:, 0], y, 7, TYPE=tl.int8, BLOCK=8)
    moved = [t.distinct_read_bytes + t.distinct_written_bytes for t in x_and_y(traffic)]
    assert moved == [4, 7] and traffic.outside_bytes == 3


def test_atomics_read_and_write():
    x, total, lock = torch.ones(6), torch.zeros(2), torch.zeros(1, dtype=torch.int32)
    with measure(strict=True) as traffic:
        atomic_kernel[(1,)](x, total, lock, 6, BLOCK=8)
    assert total.tolist() == [3, 3]
    (launch,) = traffic.launches
    assert launch.atomics
    sums = launch.tensors["total_ptr"]
    assert (sums.read_bytes, sums.written_bytes, sums.distinct_written_bytes) == (24, 24, 8)
    locks = launch.tensors["lock_ptr"]
    assert (locks.read_bytes, locks.written_bytes) == (4, 4)


def test_tensor_descriptors():
    x = torch.randn(5, 4)
    y = torch.empty_like(x)
    with measure(strict=True) as traffic:
        descriptor_kernel[(1,)](x, y, 5, 4, BLOCK=8)
    assert torch.equal(x, y)
    assert traffic.launches[0].read_bytes == traffic.launches[0].written_bytes == 80


def test_empty_grid_is_no_device_launch():
    x = torch.empty(0)
    with measure() as traffic:
        copy(x, x)
    assert traffic.launches[0].grid == (0, 1, 1) and traffic.device_launches == 0


def test_views_and_allocations_are_not_operators():
    x = torch.randn(6, 4)
    with measure() as traffic:
        x.view(24).reshape(3, 8).t().expand(2, 8, 3).transpose(0, 1)
        x[1:, ::2].detach().as_strided((2, 2), (1, 1)).unsqueeze_(0)
        torch.empty(5), torch.empty_like(x), x.new_empty(3), torch.empty_strided((2, 2), (1, 2))
        torch.relu(torch.empty(0))
        x.matmul(torch.empty(4, 0)), x.contiguous(), x.to(torch.float32)
        assert traffic.operators == []
        torch.relu(x)
    (relu,) = traffic.operators
    assert (relu.name, relu.read_bytes, relu.written_bytes) == ("aten.relu.default", 96, 96)
    assert traffic.passes(x) == 2 and traffic.device_launches == 1


def test_in_place_and_out_and_copying_operators():
    x, y = torch.randn(20)[::2], torch.randn(10)
    with measure() as traffic:
        x.add_(y)  # reads both, writes x
        x.copy_(y)  # reads y, writes x
        torch.mul(y, y, out=x)  # reads y once, writes x
        torch.zeros_like(x)  # only writes
        x.to(torch.float64)
        x.expand(5, 10).sum()  # the expanded tensor holds ten numbers
        x[0].item()
        x.view(2, 5).t().reshape(10)  # a reshape that has to copy
    counts = [(op.read_bytes, op.written_bytes) for op in traffic.operators]
    assert counts == [(80, 40), (40, 40), (40, 40), (0, 40), (40, 80), (40, 4), (4, 0), (40, 40)]


def test_backward_operators_are_counted():
    x = torch.randn(50, requires_grad=True)
    with measure() as traffic:
        x.relu().sum().backward()
    assert names(traffic) == ["relu", "sum", "ones_like", "threshold_backward"]
    # The gradient of a sum is one expanded number; the other input is x-sized.
    backward = traffic.operators[-1]
    assert (backward.read_bytes, backward.written_bytes) == (204, 200)


def test_convolution_and_inference_mode():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 1, 1)
    with measure() as traffic:
        torch.nn.functional.conv2d(x, weight)
    assert names(traffic) == ["convolution"]
    assert traffic.passes(x) == 2 and traffic.small_bytes(x) == weight.numel() * 4
    with torch.inference_mode(), measure() as traffic:
        torch.nn.functional.linear(torch.ones(3, 4), torch.ones(5, 4))
    assert names(traffic) == ["ones", "ones", "mm"]


@pytest.fixture(scope="module")
def library():
    lib = torch.library.Library("traffic_test", "FRAGMENT")
    lib.define("scaled_relu(Tensor x) -> Tensor")
    lib.impl("scaled_relu", lambda x: torch.relu(x) * 2, "CPU")
    lib.define("nested(Tensor x) -> Tensor")
    lib.impl("nested", lambda x: OPS.scaled_relu(x).neg(), "CompositeExplicitAutograd")
    lib.define("composite(Tensor x) -> Tensor")
    lib.impl("composite", lambda x: OPS.scaled_relu(x).abs(), "CompositeImplicitAutograd")
    lib.define("make(int n) -> Tensor")
    lib.impl("make", lambda n: torch.ones(n), "CompositeExplicitAutograd")
    lib.define("launch(Tensor x) -> Tensor")
    lib.impl("launch", launch_and_double, "CPU")
    yield lib
    lib._destroy()


def launch_and_double(x):
    y = torch.empty_like(x)
    copy(x, y)
    return y * 2


def names(traffic):
    return [op.name.split(".")[1] for op in traffic.operators]


def test_custom_operators_are_containers(library):
    x = torch.randn(9)
    for op, inner in (
        ("scaled_relu", ["relu", "mul"]),
        ("nested", ["relu", "mul", "neg"]),
        ("composite", ["relu", "mul", "abs"]),
    ):
        with measure() as traffic:
            out = getattr(OPS, op)(x)
        assert names(traffic) == inner
        assert torch.equal(out.abs(), torch.relu(x) * 2)
    with torch.inference_mode(), measure() as traffic:
        OPS.composite(x)
        OPS.make(3)
    assert names(traffic) == ["relu", "mul", "abs", "ones"]


def test_custom_operator_with_a_launch_inside_and_nested_meters(library):
    x = torch.randn(9)
    with measure(strict=True) as outer:
        torch.relu(x)
        with measure(strict=True) as inner:
            out = OPS.launch(x)
    assert torch.equal(out, x * 2)
    assert names(inner) == ["mul"] and len(inner.launches) == 1
    assert inner.device_launches == 2 and inner.passes(x) == 4
    assert names(outer) == ["relu", "mul"] and outer.launches == inner.launches


def test_custom_op_decorator_with_launches_forward_and_backward():
    @torch.library.custom_op("traffic_test::decorated", mutates_args=())
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(launch_and_double(x))

    decorated.register_autograd(lambda ctx, grad: launch_and_double(grad.contiguous()))
    x = torch.randn(9, requires_grad=True)
    with measure(strict=True) as traffic:
        decorated(x).sum().backward()
    assert len(traffic.launches) == 2
    assert names(traffic) == ["mul", "sigmoid", "sum", "ones_like", "clone", "mul"]
    assert torch.equal(x.grad, torch.full((9,), 2.0))


def test_passes_and_small_bytes_of_a_composition():
    x, gate = torch.randn(2, 8, 16), torch.randn(2, 8, 1)
    with measure(strict=True) as traffic:
        pooled = x.mean(-1)  # reads x
        scale = torch.sigmoid(pooled)  # small
        y = x * (scale.unsqueeze(-1) + gate)  # reads x, writes y
        copy(y, torch.empty_like(y))  # reads and writes
    assert [traffic.passes(torch.empty(n)) for n in (256, 512, 513)] == [5, 2.5, 0]
    # mean's result, sigmoid's two, the sum's three and the product's small factor.
    assert traffic.small_bytes(x) == 7 * 16 * 4


def test_table_has_a_row_for_every_event():
    x = torch.randn(300000)
    with measure() as traffic:
        copy(x[:1000], torch.empty(1000), block=256)
        torch.relu(x)
    lines = traffic.table().splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[1].split()[:4] == ["copy_kernel", "4x1x1", "3.91", "KiB"]
    assert lines[2].split()[:4] == ["aten.relu.default", "operator", "1.14", "MiB"]


def interpreter_state():
    from triton.runtime import interpreter

    classes = interpreter.GridExecutor, interpreter.InterpreterBuilder
    return [dict(vars(cls)) for cls in classes] + [torch._C._len_torch_dispatch_stack()]


def test_patches_are_removed_also_after_exceptions():
    before = interpreter_state()
    x, short = torch.randn(5), torch.zeros(8)[:4]
    with measure() as traffic:
        assert interpreter_state() != before
        copy(x, x)
    assert interpreter_state() == before
    copy(x, x)
    torch.relu(x)
    assert len(traffic.events) == 1
    # The exception of the code is what shows, not what strict would have said.
    with pytest.raises(ZeroDivisionError), measure(strict=True) as traffic:
        copy(x, short)
        _ = 1 / 0
    assert interpreter_state() == before and traffic.outside_bytes == 4
    with pytest.raises(Exception, match="NoneType"), measure() as traffic:
        copy_kernel[(1,)](x, x, None, BLOCK=8)
    assert interpreter_state() == before and traffic.launches == []
    with pytest.raises(AssertionError), measure(strict=True):
        copy(x, short)
    assert interpreter_state() == before


def test_compiled_mode_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), measure():
        pass
