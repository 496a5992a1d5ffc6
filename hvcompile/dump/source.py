"""A graph as Python source that runs with torch alone: classes, constants, and example inputs."""

from __future__ import annotations

import operator
import re
import sys
import textwrap
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import is_weight, op_name
from hvcompile.graph.paths import module_path, parameter_path
from hvcompile.runtime.left_state import LEAVE
from hvcompile.torch_private.dynamo import source_name
from hvcompile.torch_private.fakes import STORED, TAG, number_hint, numel_hint, size_hint, value
from hvcompile.trunk.trunk import Derived

_FETCHES = "torch.ops.hvcompile.fetch"
_WITH_TORCH = {"torch._C", "torch.functional", "torch.nn", "torch.nn.functional", "torch.ops"}  # import torch suffices


class GraphSource:
    """A module, and all modules that it refers to, as source text: each once, callees first.

    Args:
        root: the module.
        fixed: inputs for which not every number is legal, see ``fixed_values``.
        derived: inputs that the text computes from the others.

    Attributes:
        imports: statements.
        classes: one for each module.
        build: statements that make the modules and return the root.
        constants: tensors of the modules, by name, to be saved beside the file.
        names: of the root's inputs; weights go by their path in the model.
        inputs: an expression for each example input.
        derived: statements that compute derived inputs.

    """

    def __init__(self, root: fx.GraphModule, fixed: Mapping[str, float], derived: Sequence[Derived] = ()) -> None:
        self.imports = {"import torch"}
        self.classes: list[str] = []
        self.build: list[str] = []
        self.constants: dict[str, torch.Tensor] = {}
        self._names: dict[fx.GraphModule, str] = {}
        placeholders = list(root.graph.find_nodes(op="placeholder"))
        self._paths = {node.name: parameter_path(node) for node in placeholders if is_weight(node)}
        self._add(root, "root")
        self.names = [self._paths.get(node.name, str(node.target)) for node in placeholders]
        self.inputs = [f"{_example(*item, fixed)}," for item in zip(placeholders, self.names, strict=True)]
        self.derived = [self._derive(placeholders, item) for item in derived if not _referenced(item.module)]
        if self.constants:
            self.build.insert(0, 'constants = torch.load(Path(__file__).with_suffix(".pt"), weights_only=True)')
        self.build.append("return root")

    def _derive(self, placeholders: Sequence[fx.Node], item: Derived) -> str:
        """A statement that computes derived inputs from the other example inputs."""
        instance = self._add(item.module, f"derived_{placeholders.index(item.placeholders[0])}")
        created = next(line for line in self.build if line.startswith(f"{instance} = "))
        self.build.remove(created)
        sources = ", ".join(f"inputs[{placeholders.index(node)}]" for node in item.sources)
        results = f"{created.partition(' = ')[2]}({sources})"
        if item.read is not None:  # how many keys each sample of each mask keeps
            results = f"(keys for mask in {results} for keys in kept_keys(mask))"
        first = placeholders.index(item.placeholders[0])
        return f"inputs[{first}:{first + len(item.placeholders)}] = {results}"

    def _add(self, module: fx.GraphModule, hint: str) -> str:
        """Write out a module unless that has been done; returns the name of its instance."""
        if module in self._names:
            return self._names[module]
        attributes = _referenced(module)
        children = {
            target: self._add(item, target) for target, item in attributes.items() if isinstance(item, fx.GraphModule)
        }
        name = re.sub(r"\W", "_", hint)
        while name in self._names.values():
            name += "_"
        self._names[module] = name

        code, used = _forward(module.graph)
        renamed = _short_names(module.graph, self._paths)
        code = re.sub(r"\b[A-Za-z_]\w*", lambda match: renamed.get(match[0], match[0]), code)
        if _FETCHES in code:
            self.imports.add("import hvcompile.hollow.fetch  # the operator torch.ops.hvcompile.fetch")
        self.imports |= _torch_imports(code).union(*(_import_lines(*item) for item in used.items()))
        class_name = re.sub(r"(?:^|_)([a-z0-9])", lambda match: match[1].upper(), name)
        self.classes.append(f"class {class_name}(torch.nn.Module):\n{textwrap.indent(code, ' ' * 4)}")
        self.build.append(f"{name} = {class_name}()")
        owners = {target[: dot.start()]: None for target in attributes for dot in re.finditer(r"\.", target)}
        self.build += [f"{name}.{owner} = torch.nn.Module()" for owner in owners]
        for target, item in attributes.items():
            if isinstance(item, torch.Tensor):
                self.constants[f"{name}.{target}"] = item.detach()
                self.build.append(f'{name}.{target} = constants["{name}.{target}"]')
            elif target in children:
                self.build.append(f"{name}.{target} = {children[target]}")
            else:
                self.build.append(f"# {name}.{target} is a {type(item).__name__}, which can't be written: set it here")
        return name


def _referenced(module: fx.GraphModule) -> dict[str, Any]:
    """The attributes of a module that its graph reads, by dotted path, in graph order."""
    targets = [str(node.target) for node in module.graph.nodes if node.op in {"get_attr", "call_module"}]
    return {target: operator.attrgetter(target)(module) for target in targets}


def _short_names(graph: fx.Graph, paths: Mapping[str, str]) -> dict[str, str]:
    """What to call a graph's inputs: weights by their path in the model, the others by the name of their node.

    Dynamo's own name spells out every ``_modules`` on the way, and its first letter differs from that of the node's.
    """
    used = {node.name for node in graph.nodes}
    renamed: dict[str, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        short = node.name
        if node.name in paths:
            short = re.sub(r"\W|^(?=\d)", "_", paths[node.name])
            while short in used:
                short += "_"
            used.add(short)
        renamed |= {node.name: short} | ({str(node.target): short} if _is_alias(node) else {})
    return renamed


def _is_alias(placeholder: fx.Node) -> bool:
    return str(placeholder.target).lower() == placeholder.name.lower()


def _forward(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """A graph as the source of a method ``forward``, and the globals that it uses, by name."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    inputs = {node.name for node in placeholders}
    aliases = {f"{node.name} = {node.target}" for node in placeholders if _is_alias(node)}  # both get one name
    comments = _comments(graph)

    def annotate(lines: list[str]) -> list[str]:
        annotated: list[str] = []
        for line in lines:
            if line.startswith("\n#") or line.rstrip() in aliases:
                continue  # fx's own comment gives the source line, with its absolute path, of nearly every statement
            counter = re.fullmatch(r"# COUNTER: (\d+)\n", line)
            if counter and int(counter[1]) in comments:
                annotated.append(f"\n# {comments[int(counter[1])]}\n")
            if line.startswith(";  ") and line.endswith(" = None\n"):  # freed after the last use; not so the inputs,
                freed = [name for name in line[3:-1].split(" = ")[:-1] if name not in inputs]  # which the caller holds
                line = f";  {' = '.join(freed)} = None\n" if freed else "\n"  # noqa: PLW2901
            annotated.append(line)
        return annotated

    with graph.on_generate_code(lambda current: lambda lines: annotate(current(lines) if current else lines)):
        code = graph.python_code("self", verbose=True, expanded_def=True)
    used = {name: item for name, item in code.globals.items() if re.search(rf"(?<![\w.]){re.escape(name)}\b", code.src)}
    # The file runs without this package: there, state that a step leaves is copied.
    text = code.src.replace(f"torch.ops.{LEAVE}(", "torch.clone(")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip(), used


def _comments(graph: fx.Graph) -> dict[int, str]:
    """A comment for each index in the graph from which on nodes come from another module or pass."""
    stacks = {node: node.meta["nn_module_stack"] for node in graph.nodes if node.meta.get("nn_module_stack")}
    paths = {node: module_path(str([*stack.values()][-1][0])) for node, stack in stacks.items()}
    inner = {path[:length] for path in paths.values() for length in range(len(path))}
    comments: dict[int, str] = {}
    current, start = "", None
    for index, node in enumerate(graph.nodes):
        if node.op == "get_attr":  # a reference belongs to the call after it
            start = index if start is None else start
            continue
        tag, path = node.meta.get(TAG), paths.get(node)
        is_part = node.target is operator.getitem and isinstance(value(node.args[0]), tuple)
        if node.op != "placeholder" and (tag or path is not None) and not is_part:
            if path and path not in inner and path[:-1] in paths.values():
                path = path[:-1]  # a module without modules, such as a linear, is named with what surrounds it
            parts = [".".join(path or ("the model",))] if path is not None else []
            comment = " ".join([*parts, f"({tag})"] if tag else parts)
            if comment != current:
                comments[index if start is None else start] = current = comment
        start = None
    return comments


def _import_lines(name: str, item: Any) -> set[str]:
    """The statements that give a global of the code its value."""
    if isinstance(item, types.ModuleType):
        return {f"import {item.__name__}" + (f" as {name}" if name != item.__name__ else "")}
    if isinstance(item, float):
        return {f'{name} = float("{item}")'}
    if item is type(None):
        return {f"{name} = type(None)"}
    module, attribute = getattr(item, "__module__", None), getattr(item, "__qualname__", "")
    if getattr(sys.modules.get(str(module)), attribute, None) is item:
        return {f"from {module} import {attribute}" + (f" as {name}" if name != attribute else "")}
    for wrapped in (getattr(item, field, None) for field in ("f", "op", "method")):  # Dynamo's wrappers of NumPy's
        if isinstance(wrapped, str):
            return {f"{name} = {name}_type({wrapped!r})"} | _import_lines(f"{name}_type", type(item))
        if callable(wrapped):
            lines = _import_lines(f"{name}_type", type(item)) | _import_lines(f"{name}_of", wrapped)
            return {f"{name} = {name}_type({name}_of)"} | lines
    return {f"{name} = None  # a {type(item).__name__} made at run time: what uses it can't run from this file"}


def _torch_imports(code: str) -> set[str]:
    """Imports of the parts of torch that the code names by their full path; ``import torch`` does not load all."""
    lines = set()
    for path in set(re.findall(r"(?<![\w.])torch(?:\.\w+)+", code)):
        parts = path.split(".")
        names = {".".join(parts[:length]) for length in range(2, len(parts))} - _WITH_TORCH
        lines |= {f"import {name}" for name in names if getattr(sys.modules.get(name), "__file__", None)}
    return lines


def fixed_values(root: fx.GraphModule) -> dict[str, float]:
    """A legal number for each input that not every number is legal for, by name.

    These are Python numbers that Dynamo made tensors of, and indices.
    """
    fixed: dict[str, float] = {}
    for module in root.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else []:
            reads = node.all_input_nodes[0].name if node.all_input_nodes else ""
            if op_name(node) == "embedding":
                fixed[reads] = 0  # a table may have a single row
            elif op_name(node) == "item" and isinstance(value(node), torch.SymFloat):
                hint = number_hint(value(node))  # None where it depends on data
                fixed |= {reads: hint} if hint is not None else {}
    return fixed


def _example(placeholder: fx.Node, name: str, fixed: Mapping[str, float]) -> str:
    """The expression for one example input; a symbolic size has its value in the captured run."""
    tensor = value(placeholder)
    if not isinstance(tensor, torch.Tensor):
        number = size_hint(tensor) if isinstance(tensor, torch.SymInt) else tensor
        return f'KEPT.get("{name}", {number if isinstance(number, (bool, int, float)) else None})'
    shape = tuple(map(size_hint, tensor.shape))
    if not source_name(placeholder) and STORED not in placeholder.meta:  # state, or yet to be derived from inputs
        return f'torch.full({shape}, 0, dtype={tensor.dtype}, device="{tensor.device}")'
    if placeholder.name in fixed:
        number = fixed[placeholder.name]
        return f'KEPT.get("{name}", torch.full({shape}, {number}, dtype={tensor.dtype}, device="{tensor.device}"))'
    arguments = [f'"{name}"', str(shape), str(tensor.dtype)]
    if tensor.device.type != "cpu":
        arguments.append(f'device="{tensor.device}"')
    if is_weight(placeholder) and len(shape) > 1 and 0 not in shape:
        arguments.append(f"scale={(shape[0] / numel_hint(tensor)) ** 0.5:.4g}")  # keeps activations of order one
    stride = tuple(map(size_hint, tensor.stride()))
    if 0 not in shape and stride != torch.empty(shape, device="meta").stride():
        arguments.append(f"stride={stride}")
    return f"draw({', '.join(arguments)})"
