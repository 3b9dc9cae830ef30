"""`torch.compile` with fixed shapes, for the runner `compiled` and the trainer."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch

from litdeploy.config.target import CompileMode
from litdeploy.errors import CompilationError

P = ParamSpec("P")
Result = TypeVar("Result")


def compiled(
    function: Callable[P, Result],
    options: dict[str, bool] | None = None,
    fallback: Callable[[str], None] | None = None,
    mode: CompileMode | None = None,
) -> Callable[P, Result]:
    """Compile a function for fixed shapes. The first call with a shape compiles.

    Nothing compiled is shared with other functions of the process. Inductor's on-disk cache stays in use, so that
    compiling the same function again is faster than the first time on a machine.

    Args:
        function: the function to compile.
        options: of Inductor.
        fallback: called with the reason if the function cannot be compiled here; the function then runs uncompiled.
        mode: of torch.compile, in place of `options`.

    Raises:
        CompilationError: raised by a call if the function cannot be compiled and there is no fallback.
    """
    with warnings.catch_warnings():
        # Inductor imports this module, whose classes still use a deprecated decorator (torch 2.11 to 2.13).
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is ", DeprecationWarning)
        importlib.import_module("torch.utils.mkldnn")
    inner: Callable[P, Result] = torch.compile(_own_code(function), dynamic=False, options=options, mode=mode)  # type: ignore[arg-type]

    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        nonlocal inner
        from torch._dynamo.exc import TorchDynamoException

        try:
            return inner(*args, **kwargs)
        except TorchDynamoException as error:
            why = str(error).splitlines()[0]
            if fallback is None:
                raise CompilationError(why) from error
        fallback(why)
        inner = function
        return function(*args, **kwargs)

    return call


def _own_code(function: Callable[P, Result]) -> Callable[P, Result]:
    """Wrap a function in one with a code object of its own.

    Dynamo caches compiled code per code object, for all functions that share it: teacher and student would evict each
    other, and after eight of them Dynamo would silently stop compiling.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        return function(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
