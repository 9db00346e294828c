"""CUDA graphs without CUDA: it records the operations of a run and repeats them on the same tensors.

It is like a real graph in three ways. A replay does not run the model's Python. It reads the same addresses
as the recorded run. A run that reads values on the host cannot be recorded. It records torch's primitive
operations, launches of interpreted Triton kernels, and calls of functions that replace kernels
(``as_launch``). It does not notice tensors that ``torch.from_numpy`` makes from the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

P = ParamSpec("P")
R = TypeVar("R")
aten = torch.ops.aten

_READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
"""Methods that copy values to the host. On a CPU they are not operations that could be recorded."""

_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Operations that depend on values only if the index is a mask."""

_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

_recording: list[_Recording] = []
"""The current recording, if there is one."""


class RecordedGraph:
    """Like ``Graph``."""

    def __init__(self) -> None:
        self._launches: list[_Launch] = []

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Run it once. As after a real capture, the results have no values before a replay.

        Raises:
            RuntimeError: an operation cannot be recorded.
        """
        with ExitStack() as stack:
            recording = _Recording(self._launches)
            _recording.append(recording)
            stack.callback(_recording.pop)
            stack.enter_context(_interpreter_through(recording))
            stack.enter_context(_NoReading(recording))
            stack.enter_context(recording)
            result = run()
        self._forget_values()
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for launch in self._launches:
            launch.again()

    @torch.inference_mode()
    def _forget_values(self) -> None:
        for launch in self._launches:
            for made in launch.made:
                if made is not None:
                    made.fill_(torch.nan if made.is_floating_point() else 1)


def as_launch(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function a launch, like a kernel. A graph repeats the call and records nothing inside it."""

    @wraps(function)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _recording:
            return function(*args, **kwargs)
        result: R = _recording[-1].launch(function, args, kwargs)
        return result

    return launched


@dataclass(frozen=True)
class _Launch:
    """``made``: the tensors of the result, with None for those that are arguments or views of them."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: list[Tensor | None]

    def again(self) -> None:
        result = _tensors(self.function(*self.args, **self.kwargs))
        for made, new in zip(self.made, result, strict=True):
            if made is not None:
                made.copy_(new)


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation. torch has already split compound operations."""

    def __init__(self, launches: list[_Launch]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._launches = launches
        self.inside = False
        """During a launch, the operations inside it are not recorded separately."""

    def __torch_dispatch__(
        self, func: OpOverload[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            _refuse_if_impossible(func, args)
            result = self.launch(func, args, kwargs)
        return result

    def launch(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.inside:
            return function(*args, **kwargs)
        self.inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            self.inside = False
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = [None if x.untyped_storage()._cdata in given else x for x in _tensors(result)]
        mutates = not isinstance(function, OpOverload) or function._schema.is_mutable
        if mutates or any(x is not None for x in made):  # else it made views
            self._launches.append(_Launch(function, args, kwargs, made))
        return result


class _NoReading(TorchFunctionMode):
    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in _READS and not self._recording.inside:
            raise RuntimeError(f"{func.__name__} waits for the device and cannot be recorded in a graph")
        return func(*args, **(kwargs or {}))


def _refuse_if_impossible(func: OpOverload[..., Any], args: tuple[Any, ...]) -> None:
    if func is aten.lift_fresh.default:
        raise RuntimeError(
            "a tensor made from the host's values would be the same in every replay of a graph"
        )
    if func.overloadpacket in _INDEXING:
        waits = any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
    else:
        waits = bool(_DEPENDENT & set(func.tags))
    if waits:
        raise RuntimeError(f"{func} waits for the device and cannot be recorded in a graph")


def _interpreter_through(recording: _Recording) -> AbstractContextManager[object]:
    """Record Triton's interpreted launches as launches."""
    run = InterpretedFunction.run
    return mock.patch.object(
        InterpretedFunction, "run", lambda self, *args, **kwargs: recording.launch(run, (self, *args), kwargs)
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
