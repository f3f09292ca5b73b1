"""Triton's interpreter without what it does over and over: two thirds of the time that small kernels take.

What numpy computes is the same, and so is whatever is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


class _Launch:
    """Which modules are patched for the kernel that runs.

    Triton patches its language before a kernel and restores it afterwards, but patches it again at every call of a
    function within, which finds all of it patched already; finding that out takes longer than what is called.
    """

    def __init__(self) -> None:
        self.original: Callable[[Any], Any] = interpreter._patch_lang
        self.scope: Any = None
        self.patched: set[frozenset[str]] = set()
        self._visible: dict[Any, frozenset[str]] = {}

    def patch(self, fn: Any) -> Any:
        modules = self.visible(fn)
        if self.scope is None:
            self.scope, self.patched = self.original(fn), {modules}
        elif modules not in self.patched:
            self.scope._changes += self.original(fn)._changes
            self.patched.add(modules)
        return self

    def restore(self) -> None:
        """Only a launch calls this, when it has ended."""
        scope, self.scope = self.scope, None
        scope.restore()

    def visible(self, fn: Any) -> frozenset[str]:
        """What `_patch_lang` of this function patches."""
        if fn not in self._visible:
            names = {m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core}
            self._visible[fn] = frozenset(names)
        return self._visible[fn]


def _builtins_once() -> Callable[..., None]:
    """What is built in is looked up once: it is the same for every launch."""
    found: dict[Any, list[tuple[str, Any]]] = {}

    def patch(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in found:
            members = ((name, getattr(pkg, name, None)) for name in dir(pkg))
            found[pkg] = [(name, member) for name, member in members if tl.core.is_builtin(member)]
        for name, member in found[pkg]:
            interpreter._patch_attr(pkg, name, member, builder, scope)

    return patch


def _np_dtype_once() -> Callable[[Any], np.dtype]:
    """Triton builds the table of all dtypes to look one up."""
    original, found = interpreter._get_np_dtype, {}

    def get(dtype: Any) -> np.dtype:
        if dtype.name not in found:
            found[dtype.name] = original(dtype)
        return found[dtype.name]

    return get


def _block_type_once() -> Callable[..., None]:
    """The type of a block, checked once for each shape."""
    original, found = tl.block_type.__init__, {}

    def init(self: Any, element_ty: tl.dtype, shape: Any) -> None:
        key = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if key not in found:
            original(self, element_ty, shape)
            found[key] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, name = found[key]
        self.name = f"<{name}, {element_ty}>"

    return init


def _tensor_once() -> Callable[..., None]:
    """A tensor's shape in constexprs, made once for each shape."""
    original, found = tl.tensor.__init__, {}

    def init(self: Any, handle: Any, type: tl.dtype) -> None:
        key = tuple(type.shape.values) if isinstance(type, tl.block_type) else ()
        if key not in found:
            original(self, handle, type)
            found[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found[key]

    return init


def _unread_overflow() -> Callable[..., None]:
    """Without `debug` Triton asks whether integers overflow in a dozen operations, and then does not look at it."""
    original = TritonSemantic.binary_op_sanitize_overflow_impl

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            original(self, lhs, rhs, binary_op)

    return check


def install() -> None:
    """In a version of Triton that has other insides it stays as it is."""
    names = ("_LangPatchScope", "_patch_lang", "_patch_builtin", "_patch_attr", "_get_np_dtype")
    if all(hasattr(interpreter, name) for name in names):
        interpreter._patch_lang = _Launch().patch
        interpreter._patch_builtin = _builtins_once()
        interpreter._get_np_dtype = _np_dtype_once()
        tl.block_type.__init__ = _block_type_once()
        tl.tensor.__init__ = _tensor_once()
        TritonSemantic.binary_op_sanitize_overflow_impl = _unread_overflow()
