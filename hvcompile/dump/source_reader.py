"""A dumped file as a graph again, node for node: reads what ``GraphSource`` wrote, without tracing.

Tracing the file would fail: Dynamo refuses a call of ``invoke_subgraph`` in user code, and ``symbolic_trace`` runs an
operation without inputs (``arange``, an autocast switch) instead of recording it. One statement of a ``forward`` is one
node, so the syntax tree is enough.
"""

from __future__ import annotations

import ast
import operator
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from hvcompile.graph.subgraphs import callees, is_call
from hvcompile.torch_private import dynamo, lowering

_IN_PLACE: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.iadd,
    ast.Sub: operator.isub,
    ast.Mult: operator.imul,
    ast.MatMult: operator.imatmul,
    ast.Div: operator.itruediv,
    ast.FloorDiv: operator.ifloordiv,
    ast.Mod: operator.imod,
    ast.Pow: operator.ipow,
    ast.LShift: operator.ilshift,
    ast.RShift: operator.irshift,
    ast.BitAnd: operator.iand,
    ast.BitOr: operator.ior,
    ast.BitXor: operator.ixor,
}


def load(path: Path) -> types.ModuleType:
    """Import a dumped file, for its ``build()`` and ``example_inputs()``; raises what running the file raises.

    The file is read anew each time, and no bytecode is cached. Users edit dumps, and a cached file of the same second
    and size would pass for the edited one.
    """
    module = types.ModuleType(f"dumped_{path.stem}")
    module.__file__ = str(path)
    exec(compile(path.read_text("utf-8"), str(path), "exec"), vars(module))
    return module


def read_graph(file: types.ModuleType) -> fx.GraphModule:
    """The graph that a loaded file's ``build()`` computes; a body that several nodes call stays one module."""
    return _Reader(file).module(file.build())


class _Reader:
    """Turns the classes of one file into graph modules, callees first."""

    def __init__(self, file: types.ModuleType) -> None:
        tree = ast.parse(Path(str(file.__file__)).read_text("utf-8"))
        self._globals = vars(file)
        self._classes = {item.name: item for item in tree.body if isinstance(item, ast.ClassDef)}
        self._rebuilt: dict[torch.nn.Module, fx.GraphModule] = {}

    def module(self, instance: torch.nn.Module) -> fx.GraphModule:
        if instance not in self._rebuilt:
            for name, child in list(instance.named_modules(remove_duplicate=False)):
                if "." not in name and child is not instance and type(child).__name__ in self._classes:
                    setattr(instance, name, self.module(child))
            forward = next(
                item for item in self._classes[type(instance).__name__].body if isinstance(item, ast.FunctionDef)
            )
            module = fx.GraphModule(instance, self._graph(forward))
            module.graph.lint()
            self._rebuilt[instance] = module
        return self._rebuilt[instance]

    def _graph(self, forward: ast.FunctionDef) -> fx.Graph:
        graph = fx.Graph()
        names: dict[str, Any] = {}
        for argument in forward.args.args[1:]:
            names[argument.arg] = fx.Proxy(graph.placeholder(argument.arg))
        for statement in forward.body:
            self._statement(graph, statement, names)
        return graph

    def _statement(self, graph: fx.Graph, statement: ast.stmt, names: dict[str, Any]) -> None:
        match statement:
            case ast.Assign(value=ast.Constant(value=None)):
                pass  # frees a value after its last use
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                names[name] = self._node(graph, value, names, name)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = self._node(graph, value, names, name)
            case ast.Assign(targets=[ast.Subscript(value=base, slice=index)], value=value):
                operands = [self._evaluate(item, names) for item in (base, index, value)]
                _call(graph, "call_function", operator.setitem, operands)
            case ast.AugAssign(target=ast.Name(id=name), op=kind, value=value):
                operands = [names[name], self._evaluate(value, names)]
                names[name] = _call(graph, "call_function", _IN_PLACE[type(kind)], operands)
            case ast.Return(value=ast.expr() as value):
                graph.output(_nodes(self._evaluate(value, names)))
            case ast.Expr(value=value):
                self._node(graph, value, names, "")
            case _:
                raise ValueError(f"line {statement.lineno} is no statement of a graph: {ast.unparse(statement)}")

    def _node(self, graph: fx.Graph, value: ast.expr, names: dict[str, Any], name: str) -> Any:
        """What a statement computes; a new node gets the name that the statement assigns to."""
        path = _path(value)
        if path:
            result = fx.Proxy(graph.get_attr(path))
        elif isinstance(value, ast.Call):
            operands = [self._evaluate(item, names) for item in value.args]
            named = {str(item.arg): self._evaluate(item.value, names) for item in value.keywords}
            path, function = _path(value.func), value.func
            if path:
                result = _call(graph, "call_module", path, operands, named)
            elif (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and (function.value.id in names)
            ):
                result = _call(graph, "call_method", function.attr, [names[function.value.id], *operands], named)
            else:
                result = _call(graph, "call_function", self._evaluate(function, names), operands, named)
        else:
            result = self._evaluate(value, names)  # an operator, an index or an attribute: the proxy makes the node
        if name and isinstance(result, fx.Proxy) and not isinstance(value, ast.Name):
            dynamo.rename(result.node, name)
        return result

    def _evaluate(self, value: ast.expr, names: dict[str, Any]) -> Any:
        code = compile(ast.fix_missing_locations(ast.Expression(value)), "<a dumped graph>", "eval")
        return eval(code, self._globals, names)


def _path(value: ast.expr) -> str:
    """What an expression reads from ``self``, as a dotted path; empty where it does not."""
    match value:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
        case ast.Attribute(value=base, attr=name):
            return f"{path}.{name}" if (path := _path(base)) else ""
        case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id="self"), ast.Constant(value=str(name))]):
            return name  # one that is no identifier
        case ast.Call(func=ast.Name(id="getattr"), args=[base, ast.Constant(value=str(name))]):
            return f"{path}.{name}" if (path := _path(base)) else ""
    return ""


def _nodes(operand: Any) -> Any:
    """An operand with the node of each proxy in its place."""
    if isinstance(operand, fx.Proxy):
        return operand.node
    if isinstance(operand, (tuple, list)):
        return type(operand)(_nodes(item) for item in operand)
    if isinstance(operand, slice):
        return slice(_nodes(operand.start), _nodes(operand.stop), _nodes(operand.step))
    if isinstance(operand, dict):
        return {key: _nodes(item) for key, item in operand.items()}
    return operand


def _call(
    graph: fx.Graph, kind: str, target: Any, operands: list[Any], named: dict[str, Any] | None = None
) -> fx.Proxy:
    return fx.Proxy(graph.create_node(kind, target, _nodes(tuple(operands)), _nodes(named or {})))


def fix_numbers(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Write the inputs that are Python numbers into a graph and into the bodies that it calls, as literals.

    Tracing with such inputs makes literals of them, and Inductor asserts that ``invoke_subgraph`` gets none
    (``FakeTensorProp.run_node``). A body that gets different numbers from different calls keeps its input.

    Args:
        module: the graph, which is changed. Its placeholders stay, so it takes the same inputs as before.
        inputs: one for each placeholder.

    Returns:
        ``module``.

    """
    modules = [item for item in module.modules() if isinstance(item, fx.GraphModule)]
    calls = [
        (node, list(graphs.values()), operands)
        for owner in modules
        for node in owner.graph.nodes
        if is_call(node)
        for graphs, operands in [callees(owner, node)]
    ]
    values = _numbers(module, inputs, [(bodies, operands) for _, bodies, operands in calls])
    if all(number is None for number in values.values()):
        return module
    for node, (body, *_), operands in calls:
        inner = body.graph.find_nodes(op="placeholder")
        left = tuple(
            operand for placeholder, operand in zip(inner, operands, strict=True) if values.get(placeholder) is None
        )
        node.args = (*node.args[:3], left) if node.target is lowering.COND else (*node.args[:2], *left)
    for item in modules:
        for placeholder in item.graph.find_nodes(op="placeholder"):
            if values.get(placeholder) is not None:
                _replace(placeholder, values[placeholder])
                if item is not module:
                    item.graph.erase_node(placeholder)
        item.graph.lint()
        item.recompile()
    return module


def _numbers(
    module: fx.GraphModule, inputs: Sequence[Any], calls: Sequence[tuple[list[fx.GraphModule], list[Any]]]
) -> dict[fx.Node, Any]:
    """The number that a placeholder always gets; None if it gets something else, or not always the same."""
    values: dict[fx.Node, Any] = {}
    for placeholder, item in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        values[placeholder] = item if isinstance(item, (int, float)) and not isinstance(item, bool) else None
    before: dict[fx.Node, Any] = {}
    while before != values:  # callers may come after what they call
        before = dict(values)
        for bodies, operands in calls:
            for body in bodies:
                for placeholder, operand in zip(body.graph.find_nodes(op="placeholder"), operands, strict=True):
                    if not isinstance(operand, fx.Node) or operand.op != "placeholder":
                        values[placeholder] = None
                    elif operand in values:
                        is_same = values.setdefault(placeholder, values[operand]) == values[operand]
                        values[placeholder] = values[operand] if is_same else None
    return values


def _replace(node: fx.Node, number: float) -> None:
    def literal(item: fx.Node) -> Any:
        return number if item is node else item

    for user in list(node.users):
        args: Any = fx.node.map_arg(user.args, literal)
        kwargs: Any = fx.node.map_arg(user.kwargs, literal)
        user.args, user.kwargs = args, kwargs
