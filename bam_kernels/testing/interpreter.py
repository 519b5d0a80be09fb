"""Make Triton's interpreter faster: it patches its own language at every device function's call."""

from __future__ import annotations

from typing import Any


def patch_once_a_launch() -> bool:
    """Have the interpreter patch ``triton.language`` once a launch; the numbers stay what they are.

    It does so again for each call of a ``@triton.jit`` function from a kernel, 0.6 ms each, most of
    the time of a kernel written in small functions. For the rest of the process, and only where the
    interpreter is as it is known to be (Triton 3.6 to 3.9).

    Returns:
        Whether it took effect.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    names = ("_patch_lang", "_LangPatchScope", "GridExecutor")
    if not all(hasattr(interpreter, name) for name in names):
        return False
    if hasattr(interpreter._patch_lang, "patched"):
        return True
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        languages = {id(v) for v in fn.__globals__.values() if v is tl or v is tl.core}
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
    return True
