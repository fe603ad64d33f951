"""One way to make a kernel of its parts: its torch.library ops, their gradient, and the short way of eager code."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pyquiet.native import cpu, cuda

_LIBRARY = torch.library.Library("pyquiet", "DEF")
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}
# Whether functorch, a dispatch mode or a tracer is at work: each hides behind tensors of the plain type.
_functorch = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracer = torch._C._get_tracing_state

Arguments = tuple[Any, ...]
Tensors = tuple[Tensor, ...]


class Kernel:
    """The op `torch.ops.pyquiet.<name>`, and with `backward` its gradient's op `<name>_backward`.

    `signature` is a NamedTuple class: its fields are the op's arguments, in order and with their types, tensors first,
    and `forward`, `fake` and `backward` get them as one tuple. All three are pure: new tensors out, nothing changed.

    Calling a kernel with a tuple of arguments runs `forward` directly (microseconds less than the dispatcher) where no
    input needs a gradient, through a torch.autograd.Function where one does, and through the registered op under a
    compiler, a tracer, a transform of torch.func (grad and vmap in any order) or a dispatch mode, and for tensor
    subclasses. No kernel is differentiable twice: a gradient taken with `create_graph=True` raises when it is
    differentiated.

    Args:
        outputs: how many tensors `forward` returns. Only the first is differentiable.
        forward: (arguments, all_outputs) -> outputs; without `all_outputs` what follows the first may be missing.
        fake: arguments -> outputs of the same shapes, strides and dtypes, not computed.
        inputs: how many of the arguments, the first ones, are differentiable.
        backward: (d_out, outputs, arguments) -> gradients of all inputs, laid out as `empty_rows_like` of each.
        check: raises what is wrong with the arguments; called when a call has raised, so that it is named.
    """

    def __init__(
        self,
        name: str,
        signature: type[Any],
        *,
        outputs: int,
        forward: Callable[[Arguments, bool], Tensors],
        fake: Callable[[Arguments], Tensors],
        check: Callable[[Arguments], None],
        inputs: int = 0,
        backward: Callable[[Tensor, Tensors, Arguments], Tensors] | None = None,
    ) -> None:
        self.name, self.forward, self.check, self.inputs = name, forward, check, inputs
        fields = signature.__annotations__
        self.tensors = tensors = sum(kind in (Tensor, Tensor | None) for kind in fields.values())
        assert all(kind in (Tensor, Tensor | None) for kind in list(fields.values())[:tensors]), "tensors come first"
        _define(name, fields, outputs, lambda *args: forward(args, True), lambda *args: fake(args))
        self.op: Callable[..., Tensors] = getattr(torch.ops.pyquiet, name)
        self._transformed: type[torch.autograd.Function] | None = None
        if backward is not None:
            self._differentiate(name, fields, outputs, backward)

    def _differentiate(
        self,
        name: str,
        fields: dict[str, Any],
        outputs: int,
        backward: Callable[[Tensor, Tensors, Arguments], Tensors],
    ) -> None:
        """Registers the gradient, itself an op, and makes the functions that take the op's place."""
        inputs, tensors = self.inputs, self.tensors

        def flat_backward(d_out: Tensor, *rest: Any) -> Tensors:
            return backward(d_out, rest[:outputs], rest[outputs:])

        def fake_backward(d_out: Tensor, *rest: Any) -> Tensors:
            return tuple(empty_rows_like(x) for x in rest[outputs : outputs + inputs])

        def refuse(ctx: Any, *_: Tensor | None) -> None:
            raise NotImplementedError(f"pyquiet::{name} is not differentiable twice")

        saved = {"d_out": Tensor} | {f"output_{i}": Tensor for i in range(outputs)}
        _define(f"{name}_backward", saved | fields, inputs, flat_backward, fake_backward)
        backward_op: Callable[..., Tensors] = getattr(torch.ops.pyquiet, f"{name}_backward")
        torch.library.register_autograd(f"pyquiet::{name}_backward", refuse, lib=_LIBRARY)

        def save(ctx: Any, inputs: Arguments, output: Tensors) -> None:
            ctx.save_for_backward(*output, *inputs[:tensors])
            ctx.constants = inputs[tensors:]
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)

        def pulled_back(run: Callable[..., Tensors]) -> Callable[..., tuple[Tensor | None, ...]]:
            """The backward of a function whose gradients `run` computes."""

            def pull_back(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
                if d_out is None:
                    return (None,) * len(fields)
                d_inputs = run(d_out, *ctx.saved_tensors, *ctx.constants)
                wanted = (d if ctx.needs_input_grad[i] else None for i, d in enumerate(d_inputs))
                return *wanted, *(None,) * (len(fields) - inputs)

            return pull_back

        torch.library.register_autograd(f"pyquiet::{name}", pulled_back(backward_op), setup_context=save, lib=_LIBRARY)

        def run_and_save(ctx: Any, *arguments: Any) -> Tensors:
            results = self.forward(arguments, True)
            save(ctx, arguments, results)
            return results

        # Of eager code, which spares the dispatcher; and of torch.func, which cannot pass the gradients of ops.
        gradient = _function(forward=lambda ctx, *rest: flat_backward(*rest), backward=refuse)
        self._direct = _function(forward=run_and_save, backward=pulled_back(gradient.apply))
        gradient = _function(
            forward=backward_op, setup_context=lambda *_: None, backward=refuse, generate_vmap_rule=True
        )
        self._transformed = _function(
            forward=self.op, setup_context=save, backward=pulled_back(gradient.apply), generate_vmap_rule=True
        )

    def __call__(self, arguments: Arguments, all_outputs: bool = True) -> Tensors:
        try:
            if forward_ad._current_level >= 0:
                self._refuse_tangents(arguments)
            if (
                is_compiling()
                or _functorch() is not None
                or _dispatch_modes()
                or _tracer() is not None
                or not _PLAIN.issuperset(map(type, arguments[: self.tensors]))
            ):
                if self._transformed is not None and _differentiable():
                    transformed: Tensors = self._transformed.apply(*arguments)
                    return transformed
                return self.op(*arguments)
            if torch.is_grad_enabled():
                for x in arguments[: self.inputs]:
                    if x.requires_grad:
                        results: Tensors = self._direct.apply(*arguments)
                        return results
            return self.forward(arguments, all_outputs)
        except (AttributeError, TypeError, RuntimeError):  # pybind11 says RuntimeError of what it cannot convert
            self.check(arguments)
            raise

    def read_rows(
        self,
        arguments: Arguments,
        outputs: Tensors,
        sizes: Sequence[int],
        raise_fault: Callable[[Arguments, Tensor], None],
    ) -> Tensors:
        """Has native code that reads rows of logits, the first input, fill the outputs, the last of which marks faults.

        `sizes` are those of the workspace on a device, `raise_fault` raises what is wrong with a row that is marked.
        """
        logits: Tensor = arguments[0]
        if logits.is_cpu:
            faults: int = getattr(cpu, self.name)(*arguments, *outputs, torch.get_num_threads())
            if faults:
                self.refuse(arguments) if faults < 0 else raise_fault(arguments, outputs[-1])
            return outputs
        module = cuda()
        floats = getattr(module, f"{self.name}_workspace")(*sizes)
        workspace = logits.new_empty(floats, dtype=torch.float32)
        with torch.cuda.device(logits.device):
            if not getattr(module, self.name)(*arguments, *outputs, workspace, cuda_stream()):
                self.refuse(arguments)
        return outputs

    def refuse(self, arguments: Arguments) -> NoReturn:
        """Raises what is wrong with arguments that native code did not take."""
        self.check(arguments)
        raise AssertionError("the native kernel refused arguments that fit the contract")

    def _refuse_tangents(self, arguments: Arguments) -> None:
        if any(forward_ad.unpack_dual(x).tangent is not None for x in arguments[: self.inputs]):
            raise NotImplementedError(
                f"{self.op} has no forward-mode derivative; use reverse mode (torch.autograd.grad)"
            )


def _differentiable() -> bool:
    """Whether transforms of torch.func are at work, and such that an autograd.Function can pass."""
    if is_compiling() or _functorch() is None:
        return False
    return all(
        level.key() != TransformType.Functionalize for level in torch._C._functorch.get_interpreter_stack() or ()
    )


def reads_natively(logits: Tensor) -> bool:
    """Whether native code that reads rows of logits takes this tensor."""
    if logits.is_cpu:
        return cpu is not None and logits.dtype in (torch.float32, torch.bfloat16)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return logits.is_cuda and logits.dtype in dtypes and logits.numel() > 0 and cuda() is not None


def left_to_check(fault: Tensor) -> bool:
    """Whether the caller has to look at faults that a kernel of a device has marked, for which it waits.

    A graph that is captured cannot stop for what its replays will meet.
    """
    return fault.is_cuda and not is_compiling() and not torch.cuda.is_current_stream_capturing()


def cuda_stream() -> int:
    """The current stream of the current device, as native code takes it."""
    stream: int = torch.cuda.current_stream().cuda_stream
    return stream


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, beside: str, device: torch.device
) -> None:
    """Raises what is wrong with the tensor's dtype, device (that of the argument `beside`) or shape."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}; convert it with .to({dtype})")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but {beside} on {device}; move it there")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def empty_rows_like(x: Tensor) -> Tensor:
    """An uninitialised tensor laid out as x, so that a transposed view gives one; its last dimension contiguous."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)


def _function(**parts: Any) -> type[torch.autograd.Function]:
    """An autograd.Function of these static methods and flags."""
    members = {name: staticmethod(part) if callable(part) else part for name, part in parts.items()}
    return type("KernelFunction", (torch.autograd.Function,), members)


def _define(
    name: str, fields: dict[str, Any], outputs: int, run: Callable[..., Tensors], fake: Callable[..., Tensors]
) -> None:
    def prototype() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(field, kind, annotation=kind_) for field, kind_ in fields.items()]
    result = Tensor if outputs == 1 else tuple[(Tensor,) * outputs]  # type: ignore[misc]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    _LIBRARY.define(name + torch.library.infer_schema(prototype, mutates_args=()))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyquiet::{name}", fake, lib=_LIBRARY)
