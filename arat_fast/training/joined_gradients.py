"""Where two gradients meet in front of a BatchNorm, its backward adds them: a pass for compiled graphs.

A block's output is read by the next block's first convolution and by its shortcut; autograd adds both
gradients in a kernel of its own. This turns `split_bn_batch_backward(a + b, …)` into
`split_bn_joined_backward(a, b, …)`, which gives the same bits and saves two passes over the activation
(`arat_fast.kernels.split_batch_norm_joined`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from arat_fast.kernels import split_batch_norm_joined  # noqa: F401  registers the op


class JoinedGradients(CustomGraphPass):
    """Inductor's `post_grad_custom_post_pass` (`arat_fast.training.compiled`)."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite in place."""
        of_sum = torch.ops.arat_fast.split_bn_batch_backward.default
        joined = torch.ops.arat_fast.split_bn_joined_backward.default
        for node in graph.find_nodes(op="call_function", target=of_sum):
            total = node.args[0]
            if not _adds_alike(total):
                continue
            with graph.inserting_before(node):
                replacement = graph.call_function(joined, (*total.args, *node.args[1:]), node.kwargs)
            replacement.meta.update(node.meta)
            # The layouts that Inductor must hand to the op.
            replacement.meta["eager_input_vals"] = fx.node.map_arg(
                (replacement.args, replacement.kwargs), lambda part: part.meta["val"]
            )
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            graph.erase_node(total)

    def uuid(self) -> Any:
        """Inductor's cache holds graphs that this file has rewritten."""
        return get_hash_for_files((__file__,))


def _adds_alike(node: Any) -> bool:
    """Whether a node is the sum of two channels-last tensors of its dtype and shape, read nowhere else."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.add.Tensor:
        return False
    if len(node.users) != 1 or node.kwargs.get("alpha", 1) != 1:
        return False
    whole = node.meta["val"]
    values = [whole, *(part.meta.get("val") if isinstance(part, fx.Node) else None for part in node.args)]
    return all(
        isinstance(value, Tensor)
        and value.dtype == whole.dtype
        and value.shape == whole.shape
        and value.is_contiguous(memory_format=torch.channels_last)
        for value in values
    )
