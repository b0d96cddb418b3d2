"""An encoder's run as a CUDA graph, for batches of a shape that comes again.

A page or four are done faster than Python launches their kernels: on an H200 the DeepEncoder took 25 ms for one page as
for four, and 2.7 ms a page in batches of 16. A graph is captured once and launched as a whole.

Only where it cannot be told from the plain run: on a GPU, in half precision, in evaluation mode, without gradients,
without autocast.
Weights that change in place are read anew at each replay; weights that move, modules that are exchanged and hooks that
are added end a graph. What torch's switches (deterministic algorithms, SDPA's backends) said at the capture stays.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

Run = Callable[[torch.Tensor], torch.Tensor]

PLAIN_RUNS = 2
"""Runs of a shape before its capture, in which kernels are compiled and chosen; odd shapes are not captured at all."""
MAX_GRAPHS = 4
"""Shapes that are captured, the first that come so often. None makes room for another: shapes in turn would be captured
again and again, and a capture takes longer than a run."""
FAILED: list[torch.cuda.CUDAGraph] = []
"""Captures that failed: what torch still knows of one that could not even be ended must not be gone."""
CAPTURING = threading.Lock()
"""One capture at a time, of all encoders: before each, torch empties the caches of all GPUs."""


class Graphs:
    """Replays a run over pages of one module where that is possible; a copy begins without graphs, and so does another
    module that came to share it, as by a shallow copy.

    All graphs share one pool of memory: none needs what another left there, since the pages lie outside of it, the
    features are copied out at once, and a replay waits for the one before, whatever streams and threads they are from.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}
        self._reads: Reads | None = None
        self._module: Callable[[], nn.Module | None] = lambda: None
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return Graphs, ()

    def __len__(self) -> int:
        """Graphs that are kept."""
        return len(self._graphs)

    def clear(self) -> None:
        """Give the graphs and their memory back, before weights move."""
        with self._lock:
            self._seen.clear()
            self._graphs.clear()
            self._reads = None

    def __call__(self, run: Run, pages_PHW: torch.Tensor, *, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """`run(pages_PHW)`, or a copy of what its graph made of them.

        Args:
            run: pages to features; must depend on nothing but the pages and the module.
            module: has all weights that it reads.
            dtype: of the weights.
        """
        if not (self.enabled and can_replay(pages_PHW, module, dtype)):
            return run(pages_PHW)
        with self._lock:
            graph = self._find(run, pages_PHW, module, dtype)
            if graph is not None:
                return graph(pages_PHW)
        return run(pages_PHW)

    def _find(self, run: Run, pages_PHW: torch.Tensor, module: nn.Module, dtype: torch.dtype) -> _Graph | None:
        """The graph for these pages, captured if its time has come."""
        if self._module() is not module or (self._reads is not None and not self._reads.unchanged()):
            self.clear()
            self._module = weakref.ref(module)
        key = (tuple(pages_PHW.shape), pages_PHW.dtype, pages_PHW.device, dtype, torch.is_inference_mode_enabled())
        if key in self._graphs:
            return self._graphs[key]
        self._seen[key] += 1
        if self._seen[key] <= PLAIN_RUNS or len(self._graphs) == MAX_GRAPHS:
            return None
        reads = self._reads or Reads(module)
        if not reads.unchanged():
            return None
        try:
            with CAPTURING:
                graph = _Graph(run, pages_PHW, beside=next(iter(self._graphs.values()), None))
        except RuntimeError as error:  # CUDA's, lack of memory, and what a compiler raises
            self.enabled = False
            self.clear()
            log.warning("the encoder cannot be captured as a CUDA graph and runs without one: %s", error)
            return None
        self._graphs[key], self._reads = graph, reads
        return graph


def can_replay(pages_PHW: torch.Tensor, module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a replay would be the same as a run: see the module."""
    return (
        type(pages_PHW) is torch.Tensor
        and pages_PHW.is_cuda
        and not module.training
        and dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0  # a mode that counts or watches operations
        and not torch.cuda.is_current_stream_capturing()
    )


class Reads:
    """What a captured run has written down of its module: which tensors it reads, and that nobody watches its parts."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self.tensors = [
            (held, name)
            for part in parts
            for held in (part._parameters, part._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self.children = [part._modules for part in parts if part._modules]
        self.hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.places, self.made_of = self._places(), [tuple(held.values()) for held in self.children]

    def _places(self) -> list[int]:
        return [held[name].data_ptr() for held, name in self.tensors]  # pyright: ignore[reportOptionalMemberAccess]

    def unchanged(self) -> bool:
        """Whether a replay is a run still. It takes a tenth of a millisecond for 500 tensors."""
        try:
            return (
                not any(self.hooks)
                and self._places() == self.places
                and [tuple(held.values()) for held in self.children] == self.made_of
            )
        except (KeyError, AttributeError):  # a tensor is gone
            return False


class _Graph:
    """A captured run over pages of one shape.

    Args:
        beside: a graph whose pool, stream and place in the order this one shares.
    """

    def __init__(self, run: Run, pages_PHW: torch.Tensor, *, beside: _Graph | None) -> None:
        device = pages_PHW.device
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # That stream is current again afterwards, also where the capture fails and cannot even be ended.
            self.pages_PHW = pages_PHW.clone(memory_format=torch.contiguous_format)
            # A stream of its own: what matrix products keep for a stream then lies in the graphs' pool.
            self.stream = torch.cuda.Stream(device) if beside is None else beside.stream
            self.done = torch.cuda.Event() if beside is None else beside.done
            self.graph = torch.cuda.CUDAGraph()
            pool = torch.cuda.graph_pool_handle() if beside is None else beside.graph.pool()
            generator = torch.cuda.default_generators[device.index]
            generator_before = generator.clone_state()
            try:
                # Other threads, as one that pins a data loader's memory, may go on: `global` would stop them.
                with torch.cuda.graph(self.graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                    self.features_PVE = run(self.pages_PHW)
            except BaseException:
                generator.graphsafe_set_state(generator_before)  # else it may take itself to be captured for ever
                with contextlib.suppress(RuntimeError):  # it was ended
                    # Else the allocator waits for its end for ever: no cache can be emptied, no memory given back.
                    torch._C._cuda_endAllocateToPool(device.index, pool)
                    torch._C._cuda_releasePool(device.index, pool)
                FAILED.append(self.graph)
                raise

    def __call__(self, pages_PHW: torch.Tensor) -> torch.Tensor:
        stream = torch.cuda.current_stream(pages_PHW.device)
        stream.wait_event(self.done)
        self.pages_PHW.copy_(pages_PHW)
        self.graph.replay()
        features_PVE = self.features_PVE.clone()
        self.done.record(stream)
        return features_PVE
