"""BN -> ReLU and BN -> add [-> ReLU] in a traced forward, each made one call of the BN.

    relu(bn(x))       ->  bn(x, relu=True)
    relu(bn(x) + r)   ->  bn(x, residual=r, relu=True)

A fused value must have no other reader. Identities in between (timm keeps places for dropout and
anti-aliasing) are dropped with what surrounds them.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from arat_fast.nn.fused_batch_norm import FusedBatchNorm2d, has_hooks

from .batch_norm import DropInBatchNorm2d

__all__ = ["FUSABLE", "Fused", "fuse"]

FUSABLE = (FusedBatchNorm2d, DropInBatchNorm2d)

_RELU_FUNCTIONS: frozenset[Any] = frozenset({F.relu, F.relu_, torch.relu, torch.relu_})
_ADD_FUNCTIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add})
_IN_PLACE_ADDS: frozenset[Any] = frozenset({operator.iadd, "add_"})


class Fused(NamedTuple):
    """Names of the layers that took over a ReLU and an addition."""

    relu: set[str]
    add: set[str]


def fuse(graph: fx.Graph, module: nn.Module) -> Fused:
    """Rewrite the graph of `module`'s forward."""
    return _Fusion(graph, module).run()


class _Fusion:
    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self.graph = graph
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.order = {node: k for k, node in enumerate(graph.nodes)}
        self.fused = Fused(set(), set())

    def run(self) -> Fused:
        nodes = list(self.graph.nodes)
        for node in nodes:
            if self._is_relu(node):
                self._fuse_below(node)
        for node in nodes:
            # What is left: additions that no ReLU follows.
            if self._is_add(node) and node in self.order and node.users:
                self._fuse_add(node, node, relu=False)
        self.graph.lint()
        return self.fused

    def _fuse_below(self, relu: fx.Node) -> None:
        source = self._sole_source(relu.args[0])
        if source is None:
            return
        if self._is_batch_norm(source):
            self._replace(relu, source, None)
        elif self._is_add(source):
            self._fuse_add(source, relu, relu=True)

    def _fuse_add(self, add: fx.Node, last: fx.Node, relu: bool) -> None:
        first, second = add.args
        for operand, residual in ((first, second), (second, first)):
            norm = self._sole_source(operand)
            if norm is None or not self._is_batch_norm(norm) or operand is residual:
                continue
            assert isinstance(residual, fx.Node)
            if self._read_between(norm, add) or (residual is first and self._is_seen_changed(add)):
                continue
            self._replace(last, norm, residual, relu, add)
            return

    def _replace(
        self,
        last: fx.Node,
        norm: fx.Node,
        residual: fx.Node | None,
        relu: bool = True,
        at: fx.Node | None = None,
    ) -> None:
        """One call in the place of the BN, at the addition where there is one, for all up to `last`."""
        options: dict[str, Any] = {} if residual is None else {"residual": residual}
        if relu:
            options["relu"] = True
        with self.graph.inserting_before(norm if at is None else at):
            new = self.graph.call_module(str(norm.target), norm.args, options)
        self.order[new] = self.order[norm if at is None else at]
        last.replace_all_uses_with(new)
        if relu:
            self.fused.relu.add(str(norm.target))
        if residual is not None:
            self.fused.add.add(str(norm.target))
        self._erase_up_from(last, norm, residual)

    def _erase_up_from(self, last: fx.Node, norm: fx.Node, residual: fx.Node | None) -> None:
        """The chain from `last` up to the BN: each has lost its only reader."""
        todo = [last]
        while todo:
            node = todo.pop()
            sources = [] if node is norm else [n for n in node.all_input_nodes if n is not residual]
            self.graph.erase_node(node)
            del self.order[node]
            todo += sources

    def _sole_source(self, value: Any) -> fx.Node | None:
        """`value` behind identities, where nothing else reads it on the way."""
        while isinstance(value, fx.Node) and len(value.users) == 1:
            if not self._is_identity(value):
                return value
            value = value.args[0]
        return None

    def _read_between(self, norm: fx.Node, add: fx.Node) -> bool:
        """Whether the BN's input is read, and perhaps changed in place, before the addition."""
        x = norm.args[0]
        assert isinstance(x, fx.Node)
        start, end = self.order[norm], self.order[add]
        return any(start < self.order[user] < end for user in x.users if user is not norm)

    def _is_seen_changed(self, add: fx.Node) -> bool:
        """Whether the addition is in place and its first operand is read elsewhere, by the caller perhaps."""
        first = add.args[0]
        assert isinstance(first, fx.Node)
        return add.target in _IN_PLACE_ADDS and (len(first.users) > 1 or first.op == "placeholder")

    def _module(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        return self.modules.get(str(node.target)) if isinstance(node.args[0], fx.Node) else None

    def _is_identity(self, node: fx.Node) -> bool:
        module = self._module(node)
        return type(module) is nn.Identity and not has_hooks(module)

    def _is_batch_norm(self, node: fx.Node) -> bool:
        return type(self._module(node)) in FUSABLE

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._module(node)
            return type(module) is nn.ReLU and not has_hooks(module)
        if node.op == "call_function":
            plain = set(node.kwargs) <= {"inplace"} and len(node.args) in (1, 2)
            return node.target in _RELU_FUNCTIONS and plain
        return node.op == "call_method" and node.target in ("relu", "relu_") and len(node.args) == 1

    def _is_add(self, node: fx.Node) -> bool:
        known = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        two = len(node.args) == 2 and all(isinstance(value, fx.Node) for value in node.args)
        return known and two and not node.kwargs
