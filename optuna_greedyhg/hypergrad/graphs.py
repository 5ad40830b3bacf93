"""Walks over the graphs of autograd, from their ends towards their leaves."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge


def behind(ends: Iterable[Node | None]) -> set[Node]:
    """All nodes that a pass from ``ends`` may come by, these included."""
    seen: set[Node] = set()
    nodes = list(ends)
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(before for before, _ in node.next_functions)
    return seen


def reach(nodes: Iterable[Node], leaves: Iterable[Tensor]) -> bool:
    """Whether one of these leaves is among the nodes."""
    found = set(nodes)
    return bool(found) and not {get_gradient_edge(leaf).node for leaf in leaves}.isdisjoint(found)


def is_of_python(node: Node) -> bool:
    """Whether it is a ``torch.autograd.Function``."""
    return isinstance(node, BackwardCFunction)


def is_cut(nodes: Iterable[Node]) -> bool:
    """Whether a function that is differentiable once has been differentiated: what lies behind it is lost.

    Autograd raises an error where it passes such a place, but on the way to a leaf it never does: the graph ends there,
    and the derivative would silently be taken for zero.
    """
    return any(type(node).__name__ == "Error" for node in nodes)
