"""The FLOPs ledger: what a step of any model costs, in the paper's columns (sections 4 and 5).

Two FLOPs per multiply-add; matrix products, convolutions and attention kernels only. The paper's
figure is the sum of forward, input gradient, weight gradient and overhead (the estimator). Products
with the vocabulary have a column of their own outside it. Recomputation, inside attention kernels
and by gradient checkpointing, is not counted.

A :class:`Ledger` records one dense forward pass and reads off the autograd graph which products a
backward pass runs. The cost for any state of the gates is then arithmetic: sites say what share of a
product they run (:meth:`mat.layers.site.Site.shares`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mat.layers.site import WHOLE, Product, Shares

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


@dataclass(frozen=True)
class Flops:
    """FLOPs by column (paper section 4); ``vocabulary`` is outside the paper's figure."""

    forward: int = 0
    input_grad: int = 0
    weight_grad: int = 0
    overhead: int = 0
    vocabulary: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def backward(self) -> int:
        """Input and weight gradients."""
        return self.input_grad + self.weight_grad

    @property
    def figure(self) -> int:
        """The paper's figure: everything but the products with the vocabulary."""
        return self.forward + self.backward + self.overhead

    @property
    def everything(self) -> int:
        """All columns: what a FLOPs counter sees."""
        return self.figure + self.vocabulary


def flop_counter() -> FlopCounterMode:
    """Torch's FLOPs counter, with formulas for kernels that it lacks or whose recomputation it counts."""
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


class Ledger:
    """What steps and estimates on batches of one shape cost.

    Random states, buffers, gradients and modes of the model stay as they are.

    Args:
        model: The model, attached or not.
        forward: Computes what the backward pass starts from, the loss, as a step does.
        vocabulary: Modules (the decoder) or parameters (the tied matrix), by name, whose products
            have the column ``vocabulary``.
        training: Run it as a training step does; else in evaluation mode, as the estimator does.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[], Any],
        vocabulary: Sequence[str] = (),
        training: bool = True,
    ) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        recorder = _Recorder(self.paths)
        with _undisturbed(model, training), recorder, torch.enable_grad():
            outputs = forward()
        self.terms = recorder.terms
        named = list(model.named_parameters(remove_duplicate=False))
        self.nodes = _nodes(outputs, self.terms, {id(p): name for name, p in reversed(named)})
        names = set(vocabulary)
        tied = {id(parameter) for name, parameter in named if name in names}
        for term in self.terms:
            inside = not names.isdisjoint(term.product.path)
            term.vocabulary = inside or not tied.isdisjoint(term.weights)

    def step(self, executed: bool = True) -> Flops:
        """FLOPs of a training step with the gates as they stand.

        Args:
            executed: Count what runs, padding included; else what the active set needs.
        """
        gates = getattr(self.model, "_gates", None)
        sites = {self.paths[site.module]: site for site in gates.sites} if gates else {}
        idle = {id(part.parameter) for part in gates.parts() if not part.wanted} if gates else set()
        shares = []
        for term in self.terms:
            # The module that has the weight, else the innermost that it runs in.
            places = term.product.weight.rpartition(".")[0], *reversed(term.product.path)
            site = next((sites[path] for path in places if path in sites), None)
            shares.append(site.shares(term.product, executed) if site else WHOLE)
        wanted = self._leading_to(lambda node: not idle.issuperset(node.parameters))
        return self._count(shares, wanted)

    def estimate(self, measured: Iterable[str], passes: int, kernels: int) -> Flops:
        """FLOPs of one call of the estimator, which runs as if nothing were gated.

        Args:
            measured: Paths of the modules whose products are measured; backward passes end there.
            passes: Backward passes, without weight gradients.
            kernels: FLOPs of the kernels and their eigenvalues.
        """
        inside = set(measured)
        wanted = self._leading_to(
            lambda node: any(inside.intersection(term.product.path) for term in node.terms)
        )
        inputs_alone = replace(WHOLE, weight_grad=Fraction(0))
        once = self._count([inputs_alone] * len(self.terms), wanted)
        forward = sum(term.product.flops for term in self.terms if term.vocabulary)
        return Flops(
            overhead=once.forward + passes * once.input_grad + kernels,
            vocabulary=forward + passes * (once.vocabulary - forward),
        )

    def _leading_to(self, wanted: Callable[["_Node"], bool]) -> list[bool]:
        """Of every node whether it, or one below it, is wanted."""
        leading = [False] * len(self.nodes)
        for at in reversed(range(len(self.nodes))):  # a node stands before its children
            node = self.nodes[at]
            leading[at] = wanted(node) or any(leading[child] for child in node.children)
        return leading

    def _count(self, shares: Sequence[Shares], wanted: Sequence[bool]) -> Flops:
        """FLOPs of a forward and a backward pass.

        Args:
            shares: Of every product.
            wanted: Of every node whether its gradient is.
        """
        columns = [Fraction(0)] * 4

        def add(term: _Term, column: int, share: Fraction) -> None:
            columns[3 if term.vocabulary else column] += share * term.product.flops

        for term in self.terms:
            add(term, 0, shares[term.number].forward)
        reached = [at == 0 for at in range(len(self.nodes))]
        for at, node in enumerate(self.nodes):
            if not reached[at]:
                continue
            children = [child for child in node.children if wanted[child]]
            for term in node.terms:
                one_each = len(children) if term.factors else term.inputs
                inputs = min(term.inputs, one_each) if children else 0
                add(term, 1, inputs * shares[term.number].input_grad)
                add(term, 2, len(term.weights) * shares[term.number].weight_grad)
            if all(shares[term.number].input_grad for term in node.terms):
                for child in children:
                    reached[child] = True
        forward, input_grad, weight_grad, vocabulary = (int(total) for total in columns)
        return Flops(forward, input_grad, weight_grad, vocabulary=vocabulary)


@dataclass
class _Term:
    """One product of the recorded forward pass, and what a dense backward pass runs of it.

    Attributes:
        number: Its place among all.
        node: Sequence number of its node in the autograd graph, if it has one.
        tracked: Whether it ran with gradients on; inside a custom function they are off.
        factors: Places of the two factors among the node's edges. None for a kernel or a custom
            function: its backward counts as two times its forward.
        inputs: Number of input gradients.
        weights: Identities of the parameters among the factors.
        vocabulary: Whether it has that column.
    """

    number: int
    product: Product
    node: int
    tracked: bool
    factors: tuple[int, int] | None
    inputs: int = 0
    weights: tuple[int, ...] = ()
    vocabulary: bool = False


@dataclass
class _Node:
    """A node of the autograd graph.

    Attributes:
        children: Numbers of the nodes that it hands input gradients to.
        parameters: Identities of those whose gradients it forms.
        terms: Its products.
    """

    children: list[int]
    parameters: list[int]
    terms: Sequence[_Term] = ()


class _Recorder(TorchDispatchMode):
    """Notes every product that runs, and the path of modules that it runs in."""

    def __init__(self, paths: dict[nn.Module, str]) -> None:
        super().__init__()
        self.paths, self.terms = paths, list[_Term]()
        self.stack, self.shapes = [""], [()]  # of the modules that run: paths, first inputs
        self.formulas = flop_counter().flop_registry

    def __enter__(self) -> "_Recorder":
        def enter(module: nn.Module, inputs: Any) -> None:
            self.stack.append(self.paths.get(module, ""))
            shape = inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else ()
            self.shapes.append(tuple(shape))

        def leave(*_: Any) -> None:
            self.stack.pop()
            self.shapes.pop()

        before = register_module_forward_pre_hook(enter)
        self.hooks = before, register_module_forward_hook(leave, always_call=True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
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
            # A node is numbered just before its products run.
            node = torch.autograd._get_sequence_nr() - 1
            product = Product(tuple(self.stack), flops, self.shapes[-1], stacked=stacked)
            self.terms.append(_Term(len(self.terms), product, node, tracked, factors))
        return result


def _nodes(outputs: Any, terms: Sequence[_Term], names: dict[int, str]) -> list[_Node]:
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
    products: dict[int, list[_Term]] = {}
    for term in terms:
        node = graph.get(term.node)
        if node is not None and (term.tracked or isinstance(node, BackwardCFunction)):
            products.setdefault(term.node, []).append(term)
    nodes = [_Node([place[start._sequence_nr()] for start in starts if _inner(start)], [])]
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
                term.inputs, term.weights = (1, (own[0],)) if own else (2, ())
                continue
            for at in term.factors:
                parameter, used = leaves[at]
                if parameter is not None:
                    term.weights += (id(parameter),)
                    name = names.get(id(parameter), "")
                    stacked = term.product.stacked or used
                    term.product = replace(term.product, weight=name, stacked=stacked)
                elif edges[at] is not None:
                    term.inputs += 1
        nodes.append(_Node(children, own, products.get(number, ())))
    return nodes


def _inner(node: Any) -> bool:
    """Whether it is a node, and not one that collects a parameter's gradient."""
    return node is not None and not hasattr(node, "variable")


def _parameter(node: Any) -> tuple[nn.Parameter | None, tuple[int, ...]]:
    """The parameter that an edge leads to by views alone, if any, and how often each row is used."""
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


@contextmanager
def _undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Within, nothing is gated; after it modes, buffers and random states are what they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gates = getattr(model, "_gates", None)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    if model.training != training:  # else parts that are kept in another mode stay in it
        model.train(training)
    try:
        with (
            torch.random.fork_rng(devices),
            gates.transparent() if gates else nullcontext(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(
                    buffer, saved
                ):  # batch norm's kernel leaves their versions alone
                    buffer.copy_(saved)
