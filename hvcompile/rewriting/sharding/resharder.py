"""Splitting a sequence over ranks: which dimension of each value is the sequence, found op by op, and corrected.

``Resharder`` copies a graph node by node. Given which of the graph's inputs hold one rank's part of the sequence, it
says of every value computed from them along which dimension it is split, corrects literals that hold the full length,
and splits whole operands (rotary tables, per-token modulation) that meet split ones. An operation that has no rule
(``rules``), or would mix tokens, ends it with the operation's name. Every node is run on fake tensors of one
rank's shapes as it is made, and must have the shape that was derived for it.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from hvcompile.graph.inline import inline, run_on_fakes
from hvcompile.graph.nodes import contexts, is_tensor, mutated_operand, op_name, storage
from hvcompile.ranks.split import Layout, Layouts, Split, delocalise, localise
from hvcompile.torch_private import dynamo, fakes
from hvcompile.torch_private.fakes import TAG, provenance, shape_key, value
from hvcompile.torch_private.subclasses import is_together, is_wrapper


class CannotShard(Exception):  # noqa: N818  (a verdict, caught by the pass, not an error of the user's)
    """An operation that can't be proven to work on one rank's part; says which and why."""


class WantsSplit(Exception):  # noqa: N818  (as above)
    """A graph's input turned out to be a per-token operand, so it should come split."""

    def __init__(self, placeholder: fx.Node, layout: Layout) -> None:
        super().__init__(placeholder.name)
        self.placeholder, self.layout = placeholder, layout


Attention = Callable[["Resharder", fx.Node], Layout | None]
Rule = Callable[["Resharder", fx.Node], tuple[fx.Node, Layouts]]

# Views and casts by which a per-token table comes from an input.
FROM_INPUTS = {"getitem", "to", "float", "double", "half", "bfloat16", "type", "contiguous", "unsqueeze", "view"}


def same_dim(before: Sequence[Any], after: Sequence[Any], dim: int) -> int | None:
    """Where a dimension of more than one element is after its tensor was reshaped; None where it was merged or cut."""
    size, leading = str(before[dim]), _product(before[:dim])
    for place, other in enumerate(after):
        if str(other) == size and _product(after[:place]) == leading:
            return place
    return None


def _product(sizes: Iterable[Any]) -> Any:
    return math.prod(fakes.expression_of(size) for size in sizes)


class Resharder:
    """Copies a graph so that it works on one rank's part of the sequence; see the module.

    Args:
        source: the graph to copy; not changed.
        split: how the sequence lies on the ranks.
        tag: the pass's name.
        where: what to call the graph in messages.
        attention: copies a scaled dot product attention one of whose operands is split.
        rules: how to copy each other operation, by its name; one without a rule is refused.
        may_split: the inputs that can come split where they turn out to be per-token operands.
        around: the autocast regions that the graph is called in, outermost first.

    """

    def __init__(
        self,
        source: fx.Graph,
        split: Split,
        tag: str,
        where: str,
        attention: Attention,
        rules: Mapping[str, Rule],
        may_split: frozenset[fx.Node] = frozenset(),
        around: Sequence[fx.Node] = (),
    ) -> None:
        self.source, self.split, self.tag, self.where = source, split, tag, where
        self.attention, self.rules, self.may_split = attention, rules, may_split
        self._around, self._within = tuple(around), contexts(source)
        self.mode = fakes.fake_mode(source)
        self.graph = fx.Graph()
        self.end = self.graph.output(())
        self.env: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, Layouts] = {}
        self._local: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self._whole: dict[fx.Node, fx.Node] = {}
        self._position: fx.Node | None = None
        self.streams: frozenset[fx.Node] = frozenset()
        """Inputs that come split since they are streams of the blocks, not tables with a row a token."""
        self.joined: set[fx.Node] = set()
        """What was made of values that were put together."""

    may_split_again: ClassVar[bool] = True
    """Whether what was made whole between two blocks may be split again, whatever was done to it there."""

    # What the rules build on

    def layout(self, node: Any) -> Layout | None:
        """Where the sequence is in a node of the source; None for what is whole, or no tensor."""
        found = self.layouts.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Layout) else None

    def refuse(self, node: fx.Node, reason: str) -> CannotShard:
        """The verdict on an operation."""
        stack = node.meta.get("nn_module_stack")
        path = f" of {[*stack.values()][-1][0]}" if stack else ""
        return CannotShard(f"{op_name(node)} ({node.name}{path}, in {self.where}): {reason}")

    def make(self, target: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
        """Add an operation of our own, with its fake value."""
        with self.graph.inserting_before(self.end):
            kind = self.graph.call_method if isinstance(target, str) else self.graph.call_function
            made = kind(target, args, kwargs)
        made.meta = provenance(like, self.tag, None)
        self.run(made, like)
        return made

    def inline(self, function: Callable[..., Mapping[str, Any]], operands: Mapping[str, fx.Node], like: fx.Node) -> Any:
        """Add graph code (see ``graph.inline``) that stands for a node of the source."""
        last = self.end.prev
        with self._refusing(like):
            made = inline(self.graph, function, operands, before=self.end, tag=self.tag)
        while (last := last.next) is not self.end:
            last.meta = provenance(like, self.tag, value(last))
        return made

    def copy(self, node: fx.Node, replaced: Mapping[fx.Node, fx.Node] | None = None, **changed: Any) -> fx.Node:
        """Copy a node, with other operands for some of its own; ``changed`` may hold new ``args`` and ``kwargs``."""
        env = {**self.env, **(replaced or {})}
        with self.graph.inserting_before(self.end):
            made = self.graph.node_copy(node, env.__getitem__)
        made.meta = dict(node.meta)
        for name, held in changed.items():
            setattr(made, name, fx.map_arg(held, env.__getitem__))
        return made

    def run(self, node: fx.Node, source: fx.Node) -> None:
        """Run a node of the new graph on fake tensors, and keep what comes out as its value.

        ``source`` is the node that it stands for: in its autocast regions the copy runs as well.
        """
        if self.mode is None:
            raise CannotShard(f"{self.where} has no tensor")
        with self._refusing(node), self.mode, torch.no_grad(), contextlib.ExitStack() as regions:
            regions.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of a region that the model itself enters, which has warned already
            for region in (*self._around, *self._within[source]):
                regions.enter_context(dynamo.autocast_of(region))
            node.meta["example_value"] = run_on_fakes(node)

    @contextlib.contextmanager
    def _refusing(self, node: fx.Node) -> Iterator[None]:
        """Make a verdict of what torch says to shapes that it can't compute with."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise self.refuse(node, f"fails on one rank's shapes ({said})") from error

    def length(self, size: Any, node: fx.Node) -> int:
        """A size as a number, on which the compiled graph then depends."""
        try:
            return fakes.fix_size(size, self.source)
        except ValueError as error:
            raise self.refuse(node, str(error)) from error

    def part_of(self, node: fx.Node, layout: Layout) -> fx.Node:
        """One rank's part of a source node that is whole on every rank.

        Raises:
            WantsSplit: it comes from an input of the graph by a chain of operations that could work on a part.

        """
        if (node, layout) not in self._local:
            if fakes.is_data_dependent(value(node)) and layout.is_padded(self.split):
                # torch.nn.functional.pad can't be traced on it, and says so at length in the log.
                raise self.refuse(node, f"a length of what would be split depends on data: {tuple(value(node).shape)}")
            if layout.is_complete(self.split):
                found = self._input_of(node, layout)
                if found is not None:
                    raise WantsSplit(*found)
            self._local[node, layout] = self.take(node, layout)
        return self._local[node, layout]

    def take(self, node: fx.Node, layout: Layout) -> fx.Node:
        """Add what cuts one rank's part out of a source node that is whole."""
        ndim = value(node).ndim

        def cut(whole: Any) -> dict[str, Any]:
            return {"part": localise(whole, split=self.split, layout=layout, ndim=ndim)}

        made: fx.Node = self.inline(cut, {"whole": self.env[node]}, node)["part"]
        return made

    def join(self, node: fx.Node, layout: Layout) -> fx.Node:
        """Add what makes a source node whole that is split."""

        def put_together(local: Any) -> dict[str, Any]:
            return {"whole": delocalise(local, split=self.split, layout=layout)}

        made: fx.Node = self.inline(put_together, {"local": self.env[node]}, node)["whole"]
        return made

    def _input_of(self, node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
        """The input from which a per-token operand comes by views and casts alone, and its sequence dimension."""
        dim = layout.dim
        while node.op != "placeholder":
            if op_name(node) not in FROM_INPUTS or len(node.all_input_nodes) != 1:
                return None
            (before,) = node.all_input_nodes
            if not is_tensor(before):
                return None
            found = same_dim(value(node).shape, value(before).shape, dim)
            if found is None:
                return None
            node, dim = before, found
        return (node, layout.at(dim)) if node in self.may_split else None

    def whole(self, node: fx.Node) -> fx.Node:
        """A source node's value gathered from all ranks, where it is split; in the new graph."""
        layout = self.layout(node)
        if layout is None:
            return self.env[node]
        if node not in self._whole:
            if not layout.is_complete(self.split):
                raise self.refuse(node, "only some tokens of it are wanted outside the trunk")
            self._whole[node] = self.join(node, layout)
        return self._whole[node]

    def position(self, like: fx.Node) -> fx.Node:
        """The place of each of this rank's tokens in the whole sequence."""
        if self._position is None:
            start, device = self.split.start, value(like).device
            self._position = self.make(torch.arange, (start, start + self.split.local), like, device=device)
        return self._position

    # The walk

    def placeholder(self, node: fx.Node, layout: Layout | None) -> None:
        """Copy an input, which comes as one rank's part where a layout is given."""
        with self.graph.inserting_before(self.end):
            made = dynamo.copy_placeholder(self.graph, node)
        made.meta = dict(node.meta)
        if layout is not None and self.mode is not None:
            old = value(node)
            shape = list(old.shape)
            shape[layout.dim] = layout.size(self.split)
            made.meta["example_value"] = fakes.fake_like(self.mode, shape, old.dtype, old.device)
        self.env[node], self.layouts[node] = made, layout

    def visit(self, node: fx.Node) -> None:
        """Copy a node of the source."""
        self._check_write(node)
        if all(self.layouts.get(item) is None for item in node.all_input_nodes):
            self.env[node] = self.copy(node)
            if not self.joined.isdisjoint(node.all_input_nodes):
                self.joined.add(node)
            return
        name = op_name(node)
        rule = self.rules.get(name) or self.rules.get(name.rstrip("_"))
        if "scaled_dot_product_attention" in name:
            self.layouts[node] = self.attention(self, node)
        elif rule is None:
            raise self.refuse(node, "is not known to work on a part of the tokens")
        else:
            self._check_weight(node)
            self.env[node], self.layouts[node] = rule(self, node)
        self._prove(node)

    def _check_weight(self, node: fx.Node) -> None:
        """Refuse what computes with a quantised weight, unless it is known to take each row of its input by itself."""
        for weight in node.all_input_nodes:
            if not is_wrapper(value(weight)):
                continue
            kind = type(value(weight)).__name__
            if op_name(node) != "linear" or not is_together(weight):
                raise self.refuse(node, f"it reads a {kind} otherwise than as a linear layer's weight")
            if weight.target.mixes_rows is not False:  # type: ignore[union-attr]
                why = "can't be tried out without its values" if weight.target.mixes_rows is None else "is so"  # type: ignore[union-attr]
                raise self.refuse(
                    node,
                    f"its weight is a {kind} that may quantise the whole input with one scale (which {why}), and each "
                    "rank would have a scale of its own: quantise with a scale a row, in torchao granularity=PerRow()",
                )

    def _check_write(self, node: fx.Node) -> None:
        """Refuse a write in place that would go into a copy, or that an earlier copy would not see."""
        target = mutated_operand(node)
        if target is None:
            return
        layout = self.layout(target)
        others = [item for item in node.all_input_nodes if item is not target]
        if layout is None and any(self.layouts.get(item) is not None for item in others):
            raise self.refuse(node, "it writes a part of the tokens into a tensor that is whole")
        if layout is not None and not layout.is_complete(self.split):
            raise self.refuse(node, "it writes into some of the tokens")
        if storage(target) in {storage(item) for item in (*(item for item, _ in self._local), *self._whole)}:
            raise self.refuse(node, "it writes into what was read before, as a part or as a whole")

    def _prove(self, node: fx.Node) -> None:
        """Run the copy on one rank's shapes; what comes out must have the shape that was derived."""
        new, layouts = self.env[node], self.layouts[node]
        if new.meta.get(TAG) != self.tag:  # what is made of our own operations has run already
            self.run(new, node)
        before, after = value(node), value(new)
        if before is None and after is None:
            return  # it writes into an operand
        items: Any = layouts
        if isinstance(before, torch.Tensor):
            before, after, items = [before], [after], [layouts]
        for old, made, layout in zip(before, after, items, strict=True):
            wanted = list(shape_key(old))
            if isinstance(layout, Layout):
                if str(layout.total) != wanted[layout.dim]:
                    raise self.refuse(node, f"{layout} was derived for a value of shape {tuple(old.shape)}")
                wanted[layout.dim] = str(layout.size(self.split))
            if list(shape_key(made)) != wanted or made.dtype != old.dtype:
                raise self.refuse(node, f"gives {tuple(made.shape)} on one rank, not ({', '.join(wanted)})")
