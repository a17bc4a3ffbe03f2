"""A simulated accelerator: torch takes it for a device, its tensors lie in host memory, and it watches like a GPU.

`simgpu` is registered with torch as a device with streams, events, pinned memory and random numbers of its own. Results
are those of the CPU. Raised are the mistakes that a GPU punishes, or that it hides:

- `HostTensorError`: an operation gets tensors of the device and of the host.
- `RaceError`: a stream uses memory that another stream writes, or writes what another one reads, without a wait in
  between; or memory is given out again while another stream still uses it.
- `HostMemoryError`: pinned memory is written to while a copy from it is under way.

Counted is how often the host waited for the device (`Watch.waits`).

A process that has registered the device keeps it: use `in_child`.
"""

import functools
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from helpers.simulated_streams import WATCH, HostMemoryError, HostTensorError, RaceError, SimEvent, SimStream

NAME = "simgpu"
STAGED = 64 * 2**10
"""Bytes that CUDA copies from unpinned memory without waiting for the stream."""
TOTAL_MEMORY = 64 * 2**20
"""Bytes: so few that a loss is cut into slices."""


_LIBRARY: list[Any] = []


class SimTensor(torch.Tensor):
    """A tensor of the device; `host` holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "SimTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        tensor.host = host
        return tensor

    def __init__(self, host: torch.Tensor) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"SimTensor({self.host})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        WATCH.host_waits()  # saved as a tensor of the host
        return self.host.detach().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        WATCH.host_waits(WATCH.stream())
        return self.host.tolist()

    def record_stream(self, stream: SimStream) -> None:
        WATCH.memory[self.host.untyped_storage()].recorded.add(stream.number)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


_WAITING = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "allclose",
        "bincount",
        "repeat_interleave",
        "unique_consecutive",
        "_unique2",
    )
}
"""Operations whose result, or its size, the host has to know."""


def is_sim(device: Any) -> bool:
    """Whether a `device` argument names the simulated device."""
    return device is not None and torch.device(device).type == NAME


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the host's copies of its arguments, watched."""
    with WATCH.lock:
        return _run(func, args, kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = func._schema.name, _leaves([args, kwargs])
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    target = kwargs.get("device")
    if name in ("aten::_to_copy", "aten::copy_"):
        return _copy(func, args, kwargs, name)
    hosts = [tensor for tensor in tensors if not isinstance(tensor, SimTensor) and tensor.dim() > 0]
    if ours and hosts:
        raise HostTensorError(
            f"{name} got tensors of the device and of the host, of shapes "
            f"{[tuple(tensor.shape) for tensor in tensors]}."
        )
    if name in _WAITING or (name == "aten::index" and _has_mask(args)):
        WATCH.host_waits(WATCH.stream())
    unwrapped_args, unwrapped = _mapped(_host, (args, kwargs))
    if target is not None:
        unwrapped["device"] = torch.device("cpu") if is_sim(target) else target
    written = _mutated(func, args, kwargs)
    WATCH.operation(
        name,
        [tensor.host.untyped_storage() for tensor in ours if not any(tensor is other for other in written)],
        [tensor.host.untyped_storage() for tensor in written],
    )
    with _random(func):
        result = func(*unwrapped_args, **unwrapped)
    resized = [tensor for tensor in written if tensor.host.shape != tensor.shape]
    assert not resized, f"{name} resizes its result, which is not simulated"
    originals = {id(tensor.host): tensor for tensor in ours}
    if not ours and not is_sim(target):
        return result
    return _mapped(functools.partial(_wrapped, originals), result)


def _copy(func: Any, args: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A copy between host and device, or a cast."""
    source = args[0] if name == "aten::_to_copy" else args[1]
    if name == "aten::copy_":
        target_is_sim, not_blocking = isinstance(args[0], SimTensor), len(args) > 2 and args[2]
    else:
        target = kwargs.get("device")
        target_is_sim = isinstance(source, SimTensor) if target is None else is_sim(target)
        not_blocking = kwargs.get("non_blocking", False)
    source_is_sim = isinstance(source, SimTensor)
    if source_is_sim and not target_is_sim:
        assert not not_blocking, "a copy to the host that nobody waits for"
        WATCH.host_waits(WATCH.stream())
    if target_is_sim and not source_is_sim:
        if not_blocking and source.untyped_storage() in WATCH.pinned:
            WATCH.copies.append((source, source._version))
        elif not not_blocking or source.nbytes > STAGED:
            WATCH.host_waits()
    unwrapped_args, unwrapped = _mapped(_host, (args, kwargs))
    if "device" in unwrapped and target_is_sim:
        unwrapped["device"] = torch.device("cpu")
    read = [source.host.untyped_storage()] if source_is_sim else []
    written = [args[0].host.untyped_storage()] if name == "aten::copy_" and target_is_sim else []
    WATCH.operation(name, read, written)
    result = func(*unwrapped_args, **unwrapped)
    if name == "aten::copy_":
        return args[0]
    return _wrapped({}, result) if target_is_sim else result


def _leaves(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dictionaries; torch's own walk takes most of a run's time."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for item in value for leaf in _leaves(item)]


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same nest with each leaf changed."""
    if isinstance(value, dict):
        return {name: _mapped(change, item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, item) for item in value)
    return change(value)


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, SimTensor) else leaf


def _has_mask(args: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in _leaves(args[1]))


def _mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> list[SimTensor]:
    """The arguments that an operation writes to."""
    tensors = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors += [leaf for leaf in _leaves(value) if isinstance(leaf, SimTensor)]
    return tensors


def _wrapped(originals: dict[int, SimTensor], leaf: Any) -> Any:
    """The device's tensor of a result: the argument itself, a view of one, or a new one."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if id(leaf) in originals:
        return originals[id(leaf)]
    storage = leaf.untyped_storage()
    if storage not in WATCH.memory:
        WATCH.operation("allocation", [], [storage])
    return SimTensor(leaf)


@contextmanager
def _random(func: Any) -> Iterator[None]:
    """Random numbers come from the device's own generator."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        yield
        return
    host = torch.get_rng_state()
    torch.set_rng_state(WATCH.random.get_state())
    try:
        yield
    finally:
        WATCH.random.set_state(torch.get_rng_state())
        torch.set_rng_state(host)


class _Functions(TorchFunctionMode):
    """Pinned memory, which a process without a GPU lacks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pinned = bool(kwargs.pop("pin_memory", False)) or func is torch.Tensor.pin_memory
        result = args[0].clone() if func is torch.Tensor.pin_memory else func(*args, **kwargs)
        if pinned:
            WATCH.pinned.add(result.untyped_storage())
        return result


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> SimTensor:
    """A new tensor on the device: all that torch makes there begins with it."""
    return _fresh(torch.empty(list(size), dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> SimTensor:
    return _fresh(torch.empty_strided(list(size), list(stride), dtype=dtype))


def _factory(operation: Any) -> Callable[..., SimTensor]:
    """A factory function that torch would start from an empty tensor, and resize."""

    def make(*args: Any, dtype: Any = None, device: Any = None, **_: Any) -> SimTensor:
        return _fresh(operation(*args, dtype=dtype))

    return make


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """The copy of `torch.tensor`, which passes by a tensor's own dispatch."""
    with WATCH.lock:
        return _copy(torch.ops.aten.copy_.default, (target, source, non_blocking), {}, "aten::copy_")


def _fresh(host: torch.Tensor) -> SimTensor:
    with WATCH.lock:
        WATCH.operation("allocation", [], [host.untyped_storage()])
    return SimTensor(host)


class _Module:
    """torch.simgpu, with what torch.cuda has of it."""

    Stream, Event = SimStream, SimEvent

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    max_memory_allocated = staticmethod(lambda device=None: 2**20)

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        WATCH.random.manual_seed(seed)

    manual_seed = manual_seed_all

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return WATCH.random.get_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        WATCH.random.set_state(state)

    @staticmethod
    def current_stream(device: Any = None) -> SimStream:
        return WATCH.stream()

    @staticmethod
    def stream(stream: SimStream) -> Any:
        return WATCH.using(stream)

    @staticmethod
    def synchronize(device: Any = None) -> None:
        WATCH.synchronized += 1
        WATCH.host_waits()

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return type("Properties", (), {"total_memory": TOTAL_MEMORY})()

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@contextmanager
def simulated() -> Iterator[torch.device]:
    """Registers the device, once in a process, and watches it within the block."""
    from torch.utils import backend_registration

    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        torch.__future__.set_swap_module_params_on_conversion(True)
        _LIBRARY.append(torch.library.Library("aten", "IMPL"))
        _LIBRARY[0].impl("empty.memory_format", _empty, "PrivateUse1")
        for name in ("arange", "arange.start", "arange.start_step"):
            _LIBRARY[0].impl(name, _factory(torch.arange), "PrivateUse1")
        _LIBRARY[0].impl("_copy_from", _copy_from, "PrivateUse1")
        _LIBRARY[0].impl("empty_strided", _empty_strided, "PrivateUse1")
    with _Functions():
        yield torch.device(NAME, 0)
    WATCH.host_waits()


_context = multiprocessing.get_context("forkserver")


def in_child(scenario: Callable[..., Any], *args: Any, timeout: float = 180.0) -> Any:
    """Runs `scenario(device, *args)` with the simulated device in a process of its own.

    Returns:
        Its result, which must be picklable.

    Raises:
        AssertionError: With the child's traceback, of the error's own class where it is one of this module's.
    """
    receiver, sender = _context.Pipe(duplex=False)
    child = _context.Process(target=_child, args=(sender, scenario, args))
    child.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"no result within {timeout} s"
        kind, content = receiver.recv()
    except EOFError as error:
        child.join(10)
        raise AssertionError(
            f"the child ended without a result (exit code {child.exitcode}); can it import {scenario.__module__}?"
        ) from error
    finally:
        child.kill()
        child.join()
    if kind == "result":
        return content
    raise {error.__name__: error for error in _MISTAKES}.get(kind, AssertionError)(content)


_MISTAKES = (HostTensorError, RaceError, HostMemoryError)


def _child(sender: Any, scenario: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        with simulated() as device:
            message = ("result", scenario(device, *args))
    except BaseException as error:
        message = (type(_cause(error)).__name__, "".join(traceback.format_exception(error)))
    sender.send(message)
    sender.close()


def _cause(error: BaseException) -> BaseException:
    """The first mistake of the chain that ends in `error`: cleaning up after it may fail as well."""
    chain: list[BaseException] = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    return next((earlier for earlier in reversed(chain) if isinstance(earlier, _MISTAKES)), error)
