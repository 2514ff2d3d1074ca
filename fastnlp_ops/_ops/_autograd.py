"""Derivatives of ops: one mechanism for all families.

An op is given its plain PyTorch form, what to save, and the formula of its gradient. From these come

- reverse mode, eager and compiled: a kernel at the dispatcher's Autograd key that records the formula;
- torch.func (grad, vjp, jacrev, vmap): a ``torch.autograd.Function`` that takes the slices of vmap one by one;
- forward mode (torch.func.jvp, jacfwd, hessian, dual numbers): the plain form, which torch differentiates;
- derivatives of any order: a formula calls the backward op, whose own formula is the derivative of its plain form.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Formula = Callable[..., Any]

library = torch.library.Library("fastnlp_ops", "IMPL")


def is_eager() -> bool:
    """Whether nothing looks on: no compiler, no tracer, no torch.func transform, no forward-mode derivative."""
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def is_dual(inputs: Sequence[Any]) -> bool:
    """Whether forward-mode AD differentiates by one of the inputs."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and _tangent(x) is not None for x in inputs)


def _tangent(x: Tensor) -> Tensor | None:
    while torch._C._functorch.is_batchedtensor(x):  # vmap has no rule for what is asked here
        x = torch._C._functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent


def differentiable(
    name: str, plain: Callable[..., Any], setup: Setup, formula: Formula, *, no_vmap: str | None = None
) -> Callable[..., Any]:
    """Makes op `name` differentiable; returns what to call in its place, which torch.func and forward mode need.

    `plain(*inputs)` is the op in PyTorch, `setup(ctx, inputs, output)` and `formula(ctx, *cotangents)` are as in
    ``torch.library.register_autograd``. Results that only a formula reads may be empty in the plain form. `no_vmap`:
    the sentence that refuses vmap.
    """
    op = getattr(torch.ops.fastnlp_ops, name).default

    class Node(torch.autograd.Function):
        """Without setup_context, which costs torch an inspection of signatures at each call."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return formula(ctx, *cotangents)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if is_dual(inputs):
            raise NotImplementedError(f"op {name} has no forward-mode derivative: call the function of fastnlp_ops")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(f"op {name} is unknown to torch.func: call the function of fastnlp_ops")
            return Node.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def in_plain(*inputs: Any) -> Any:
        with _without_autocast(inputs):
            return plain(*inputs)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return in_plain(*inputs) if torch._C._are_functorch_transforms_active() else op(*inputs)
        if torch._C._get_tracing_state() is not None:
            return op(*inputs)
        if forward_ad._current_level >= 0:
            return in_plain(*inputs)
        if torch._C._are_functorch_transforms_active():
            return transformed(*inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Node.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    transformed = _for_torch_func(name, call, setup, formula, no_vmap)
    _rename(Node, name)
    library.impl(name, kernel, "Autograd", with_keyset=True)
    return call


def through_plain(
    name: str,
    plain: Callable[..., Any],
    *,
    results: Sequence[int] = (),
    kernel: bool = False,
    parts: Callable[..., Iterable[tuple[list[Any], Sequence[Any]]]] | None = None,
) -> Callable[..., Any]:
    """`differentiable` for an op whose formula is the derivative of its plain form, to any order.

    Tensors and None come first among its arguments, then options. Those at `results` were computed from the others,
    which stand for them in the derivative. `kernel`: the plain form is the kernel, too. `parts(inputs, cotangents)`:
    both for some sequences of the batch at a time, which bounds the memory of a derivative.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.options = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)

    def formula(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = [*ctx.saved_tensors, *ctx.options]
        by = [i for i, needed in enumerate(ctx.needs_input_grad) if needed and i not in results]
        gradients: list[Tensor | None] = [None] * len(inputs)
        if all(x is None for x in cotangents):
            return tuple(gradients)

        def one_part(inputs: Sequence[Any], cotangents: Sequence[Tensor | None]) -> list[Tensor]:
            def of_those(*scores: Any) -> Any:
                given = list(inputs)
                for i, x in zip(by, scores, strict=True):
                    given[i] = x
                return plain(*given)

            return vjp(of_those, [inputs[i] for i in by], cotangents)

        def all_parts(*tensors: Any) -> tuple[Tensor, ...]:
            given, rest = list(inputs), iter(tensors)
            for i in by:
                given[i] = next(rest)
            above = [None if c is None else next(rest) for c in cotangents]
            split = [(given, above)] if parts is None else parts(given, above)
            found = [one_part(*part) for part in split]
            return tuple(x[0] if len(x) == 1 else torch.cat(x) for x in zip(*found, strict=True))

        there = [x for x in cotangents if x is not None]
        for i, x in zip(by, _recomputed(all_parts, *(inputs[i] for i in by), *there), strict=True):
            gradients[i] = x
        return tuple(gradients)

    if kernel:
        _register_kernel(name, plain)
    return differentiable(name, plain, setup, formula)


def undifferentiable(name: str) -> Callable[..., Any]:
    """What to call in the place of an op whose results are integers or bool: vmap takes its slices one by one."""
    op = getattr(torch.ops.fastnlp_ops, name).default

    def call(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return transformed(*inputs)
        return op(*inputs)

    def setup(ctx: Any, _: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output)

    def formula(*_: Any) -> None:
        raise NotImplementedError(f"{name} has no gradient")

    transformed = _for_torch_func(name, call, setup, formula, None)
    return call


def _for_torch_func(
    name: str, call: Callable[..., Any], setup: Setup, formula: Formula, no_vmap: str | None
) -> Callable[..., Any]:
    op = getattr(torch.ops.fastnlp_ops, name).default

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return formula(ctx, *cotangents)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            if no_vmap is not None:
                raise NotImplementedError(no_vmap)
            return _one_by_one(call, info.batch_size, in_dims, inputs)

    def transformed(*inputs: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack().key() == torch._C._functorch.TransformType.Functionalize:
            return op(*inputs)  # which takes no autograd.Function, and need not know one
        return Transformed.apply(*inputs)

    _rename(Transformed, name)
    return transformed


def vjp(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> list[Any]:
    """Gradients of the outputs of function(*inputs) by its inputs: None by None, zeros where nothing flows.

    They can be differentiated where the caller records a graph, is inside of torch.func, or computes with dual numbers.
    """
    there = [x for x in inputs if x is not None]

    def used(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        outputs = function(*(None if x is None else next(rest) for x in inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(y for y, c in zip(outputs, cotangents, strict=True) if c is not None)

    above = tuple(c for c in cotangents if c is not None)
    if torch._C._are_functorch_transforms_active():
        # The inputs are outputs too, with cotangents of 0: for inputs that nothing flows to torch.func.vjp makes zeros
        # from tensors of a level that is gone, and fails where it is nested.
        pull: Any = torch.func.vjp(lambda *given: (*used(*given), *given), *there)[1]
        found = iter(pull((*above, *(torch.zeros_like(x) for x in there))))
    else:
        found = iter(_recorded_vjp(used, there, above))
    return [None if x is None else next(found) for x in inputs]


def _recorded_vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor]:
    # Not torch.func.vjp here: that refuses saved-tensor hooks, under which checkpointing and save_on_cpu work.
    create_graph = torch.is_grad_enabled()
    # Copies: each input is differentiated by itself where two are one. They are on the caller's graph where that is
    # recorded, else leaves. Unlike detach, clone keeps the tangents of dual numbers.
    copies = [x.clone() for x in inputs]
    copies = [x if x.requires_grad else x.requires_grad_() for x in copies]
    with torch.enable_grad():
        pairs = [(y, c) for y, c in zip(function(*copies), cotangents, strict=True) if y.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in inputs]
        outputs, above = ([pair[i] for pair in pairs] for i in (0, 1))
        return torch.autograd.grad(outputs, copies, above, create_graph=create_graph, materialize_grads=True)


def _rename(function: Any, name: str) -> None:
    """So that grad_fn, profiles and errors name the op."""
    function.__name__ = function.__qualname__ = name
    function._backward_cls.__name__ = f"{name}_backward"


class _Recomputed(torch.autograd.Function):
    """A function as one node of the graph: its derivatives compute it again, and none of its parts is recorded.

    So autocast has no part in its derivatives, even where they are taken under it: what torch records obeys it there.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        with _without_autocast(inputs):
            return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, there = ctx.saved_tensors, [x for x in cotangents if x is not None]

        def slopes(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors[len(inputs) :])
            above = [None if c is None else next(rest) for c in cotangents]
            return tuple(vjp(ctx.function, tensors[: len(inputs)], above))

        return (None, *_recomputed(slopes, *inputs, *there))


def _recomputed(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    if is_eager() and torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _Recomputed.apply(function, *inputs)
    with _without_autocast(inputs):
        return function(*inputs)


def _register_kernel(name: str, plain: Callable[..., Any]) -> None:
    # A kernel runs below autograd, where nothing is recorded; this one differentiates, so it starts afresh.
    include, exclude = torch._C._dispatch_tls_local_include_set, torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)

    def kernel(*inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._ForceDispatchKeyGuard(include(), exclude), torch.no_grad(), _without_autocast(inputs):
            return tuple(x.contiguous() for x in plain(*inputs))

    torch.library.impl(f"fastnlp_ops::{name}", "CompositeExplicitAutograd")(kernel)


def _without_autocast(inputs: Iterable[Any]) -> torch.autocast:
    return torch.autocast(next(x.device.type for x in inputs if isinstance(x, Tensor)), enabled=False)


def _one_by_one(
    call: Callable[..., Any], size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[Any, Any]:
    """`call` of each slice along in_dims, and its results in a stack along dimension 0."""

    def slices(x: Any, dim: int | None) -> Sequence[Any]:
        if dim is None:
            return [x] * max(1, size)
        x = x.movedim(dim, 0)
        return x.contiguous().unbind() if size else [x.new_zeros(x.shape[1:])]  # of none: for the shapes of results

    outputs = [call(*one) for one in zip(*map(slices, inputs, in_dims), strict=True)]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs)[:size], 0
    return tuple(torch.stack(parts)[:size] for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])
