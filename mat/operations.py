"""The operations of a forward pass that cost FLOPs, and the autograd graph that they stand in.

Two FLOPs per multiply-add; matrix products, convolutions and attention kernels only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mat.layers.site import Operation

aten = torch.ops.aten
# Place of the first of two factors among the arguments; behind what the product is added to.
FACTORS: dict[Any, int] = {aten.mm: 0, aten.bmm: 0, aten.convolution: 0, aten._grouped_mm: 0}
FACTORS |= {aten.addmm: 1, aten.baddbmm: 1}
# Autograd nodes between a parameter and the factor that it is: views and casts.
VIEWS = (
    "T",
    "Transpose",
    "Permute",
    "View",
    "UnsafeView",
    "ToCopy",
    "Select",
    "Slice",
    "Split",
    "Index",
)


def flop_counter() -> FlopCounterMode:
    """Torch's counter, with formulas for kernels that it lacks or whose recomputation it counts."""
    formulas: dict[Any, Any] = {
        aten.baddbmm_: _batched,
        aten._grouped_mm: _grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._scaled_dot_product_flash_attention_backward: _attention_backward,
        aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


# Formulas are given the shapes of what the kernels are given.
def _batched(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(a) * b[2])


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    batch = a[0] if len(a) == len(b) == 3 else 1  # else every row is in one group's product
    return int(2 * batch * a[-2] * a[-1] * b[-1])


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = q
    return int(2 * batch * heads * length * k[2] * (width + v[3]))


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * _attention(q, k, v)


@dataclass
class Term:
    """One product of the recorded forward pass, and what a dense backward pass runs of it.

    Attributes:
        number: Its place among all.
        node: Sequence number of its node in the autograd graph, if it has one.
        tracked: Whether it ran with gradients on; inside a custom function they are off.
        factors: Places of the two factors among the node's edges. None for a kernel or a custom
            function: its backward counts as two times its forward.
        inputs: Number of input gradients.
        weights: Number of weight gradients.
        vocabulary: Whether it has that column.
    """

    number: int
    operation: Operation
    node: int
    tracked: bool
    factors: tuple[int, int] | None
    inputs: int = 0
    weights: int = 0
    vocabulary: bool = False


@dataclass
class Node:
    """A node of the autograd graph.

    Attributes:
        children: Numbers of the nodes that it hands input gradients to.
        parameters: Identities of those whose gradients it forms.
        terms: Its products.
    """

    children: list[int]
    parameters: list[int]
    terms: Sequence[Term] = ()


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every product that runs, and the path of modules that it runs in."""

    def __init__(self, paths: dict[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths, self.terms = paths, list[Term]()
        # Of the modules that run: their paths, and the shapes of their first inputs.
        self.stack, self.shapes = [""], list[tuple[int, ...]]([()])
        self.formulas = flop_counter().flop_registry

    def __enter__(self) -> "Recorder":
        def enter(module: nn.Module, inputs: Any) -> None:
            self.stack.append(self.paths.get(module, ""))
            shape = inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else ()
            self.shapes.append(tuple(shape))

        def leave(*_: Any) -> None:
            self.stack.pop()
            self.shapes.pop()

        before = register_module_forward_pre_hook(enter)
        self.hooks = before, register_module_forward_hook(leave, always_call=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kernel = func._overloadpacket
        if kernel in self.formulas:
            flops = self.formulas[kernel](*args, **(kwargs or {}), out_val=result)
            stacked: tuple[int, ...] = ()
            if kernel is aten._grouped_mm and len(args) > 2:
                stacked = tuple(args[2].diff(prepend=args[2].new_zeros(1)).tolist())
            first, tracked = FACTORS.get(kernel), torch.is_grad_enabled()
            factors = (first, first + 1) if tracked and first is not None else None
            # A node is numbered just before its products run; there is none without a gradient.
            idle = tracked and not any(isinstance(a, Tensor) and a.requires_grad for a in args)
            last = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
            node = -1 if idle else last
            operation = Operation(tuple(self.stack), flops, self.shapes[-1], stacked=stacked)
            self.terms.append(Term(len(self.terms), operation, node, tracked, factors))
        return result


def graph_of(outputs: Any, terms: Sequence[Term], names: dict[int, str]) -> list[Node]:
    """The autograd graph in an order of backward passes; the first node stands for the outputs."""
    starts = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.grad_fn]
    graph: dict[int, Any] = {}
    stack: list[Any] = list(starts)
    while stack:
        node = stack.pop()
        if _inner(node) and node._sequence_nr() not in graph:
            graph[node._sequence_nr()] = node
            stack += [edge for edge, _ in node.next_functions]
    place = {number: at for at, number in enumerate(sorted(graph, reverse=True), start=1)}
    products: dict[int, list[Term]] = {}
    for term in terms:
        node = graph.get(term.node)
        if node is not None and (term.tracked or isinstance(node, BackwardCFunction)):
            products.setdefault(term.node, []).append(term)
    nodes = [Node([place[start._sequence_nr()] for start in starts if _inner(start)], [])]
    for number in place:
        edges = [edge for edge, _ in graph[number].next_functions]
        leaves = [_parameter(edge) for edge in edges]
        children = [
            place[edge._sequence_nr()]
            for edge, (parameter, _) in zip(edges, leaves, strict=True)
            if parameter is None and _inner(edge)
        ]
        own = [id(parameter) for parameter, _ in leaves if parameter is not None]
        for term in products.get(number, ()):
            if term.factors is None:  # two gradients: of inputs, or of an input and a weight
                term.inputs, term.weights = (1, 1) if own else (2, 0)
                continue
            for at in term.factors:
                parameter, used = leaves[at]
                if parameter is not None:
                    term.weights += 1
                    name = names.get(id(parameter), "")
                    stacked = term.operation.stacked or used
                    term.operation = replace(term.operation, weight=name, stacked=stacked)
                elif edges[at] is not None:
                    term.inputs += 1
        nodes.append(Node(children, own, products.get(number, ())))
    return nodes


def _inner(node: Any) -> bool:
    """Whether it is a node, and not one that collects a parameter's gradient."""
    return node is not None and not hasattr(node, "variable")


def _parameter(node: Any) -> tuple[nn.Parameter | None, tuple[int, ...]]:
    """The parameter that an edge leads to by views alone, and how often each row is used."""
    chosen = None
    while _inner(node):
        name = node.name().removesuffix("Backward0")
        if name not in VIEWS:
            return None, ()
        if name == "Select" and node._saved_dim == 0:
            chosen = torch.tensor([node._saved_index])
        elif name == "Index":
            chosen = node._saved_indices[0]
        node = node.next_functions[0][0]
    if node is None or chosen is None:
        return (None if node is None else node.variable), ()
    used = torch.bincount(chosen.flatten(), minlength=len(node.variable))
    return node.variable, tuple(used.tolist())
