"""Make Triton's interpreter faster: most of its time goes to bookkeeping, not to arithmetic."""

from __future__ import annotations

import functools
import math
from typing import Any


def accelerate() -> bool:
    """Leave out work that the interpreter repeats; the numbers stay what they are.

    - It patches ``triton.language`` again for each call of a ``@triton.jit`` function from a
      kernel, 0.6 ms each, most of the time of a kernel written in small functions: once a launch.
    - It works out each sum and product of integers a second time in 64 bits, for an assertion that
      it then leaves out, since it does so unless its options say `debug`.
    - It derives the same few types and shapes anew for each operation: looked up.

    For the rest of the process, and only where the interpreter is as it is known to be (Triton 3.6
    to 3.9).

    Returns:
        Whether it took effect.
    """
    from triton.language import core, semantic
    from triton.runtime import interpreter

    expected = (
        (interpreter, ("_patch_lang", "_LangPatchScope", "GridExecutor", "_get_np_dtype")),
        (semantic.TritonSemantic, ("binary_op_sanitize_overflow_impl", "broadcast_impl_value")),
        (core, ("block_type", "tensor", "tuple", "constexpr", "_unwrap_shape")),
    )
    if not all(hasattr(owner, name) for owner, names in expected for name in names):
        return False
    if not hasattr(interpreter._patch_lang, "patched"):
        _patch_once_a_launch(interpreter, core)
        _leave_out_overflow_checks(interpreter, semantic)
        _look_up_types(interpreter, core, semantic)
    return True


def _patch_once_a_launch(interpreter: Any, core: Any) -> None:
    import triton.language as tl

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        languages = {id(v) for v in fn.__globals__.values() if v is tl or v is core}
        if languages <= patched:
            return interpreter._LangPatchScope()  # nothing to undo
        patched.update(languages)
        return patch(fn)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # the launch before has undone its patches
        return call(self, *args, **kwargs)

    patch_lang.patched = patched
    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = launch


def _leave_out_overflow_checks(interpreter: Any, semantic: Any) -> None:
    check = semantic.TritonSemantic.binary_op_sanitize_overflow_impl

    @functools.wraps(check)
    def checked(self: Any, *args: Any) -> None:
        if self.builder.options.debug or not isinstance(
            self.builder, interpreter.InterpreterBuilder
        ):
            check(self, *args)

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = checked


def _look_up_types(interpreter: Any, core: Any, semantic: Any) -> None:
    find_np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def np_dtype(type: Any) -> Any:
        key = type.scalar.name
        if (found := np_dtypes.get(key)) is None:
            found = np_dtypes[key] = find_np_dtype(type)
        return found

    @functools.cache
    def block(dims: tuple[int, ...]) -> tuple[Any, int]:
        """The shape that a block type has, and its elements; refuses what Triton refuses."""
        plain = make_block.__get__(core.block_type.__new__(core.block_type))
        plain(core.int32, list(dims))
        return plain.__self__.shape, plain.__self__.numel

    @functools.cache
    def name(shape: tuple[int, ...], element: str) -> str:
        return f"<{block(shape)[0]}, {element}>"

    make_block = core.block_type.__init__

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        dims = tuple([d if type(d) is int else core._unwrap_if_constexpr(d) for d in shape])
        self.element_ty = element_ty
        self.shape, self.numel = block(dims)
        self.name = name(dims, element_ty.name)

    @functools.cache
    def tensor_shape(dims: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(d) for d in dims]), core.constexpr(math.prod(dims))

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        dims = tuple(type.shape.values) if type.is_block() else ()
        self.shape, self.numel = tensor_shape(dims)

    interpreter._get_np_dtype = np_dtype
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    @functools.wraps(broadcast)
    def broadcast_impl_value(self: Any, a: Any, b: Any) -> Any:
        blocks = a.type.is_block(), b.type.is_block()
        if blocks == (False, False) or (blocks == (True, True) and a.type.shape is b.type.shape):
            return a, b
        return broadcast(self, a, b)

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    semantic.TritonSemantic.broadcast_impl_value = broadcast_impl_value
