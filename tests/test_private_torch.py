"""One door to private torch: no file outside ``hvcompile/torch_private`` names a private member of torch or torchao."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvcompile

PACKAGE = Path(hvcompile.__file__).parent
ROOT = PACKAGE.parent
LIBRARIES = {"torch", "torchao", "functorch"}
UNDOCUMENTED = ("torch.fx.experimental", "torch.multiprocessing.reductions", "functorch")
"""Modules that are private without an underscore."""
MEMBERS = {
    *("_C", "_cdata", "_dynamo_source", "_param_name_to_source", "_compiled_call_impl", "_parse_to", "_rename"),
    *("_modules", "_parameters", "_buffers", "_make_subclass", "_make_wrapper_subclass", "_swap_tensor_impl"),
    *("_resolve_process_group", "_get_process_group_store", "_scaled_mm", "_choose_scale_float8"),
}
"""Members of torch's objects, of which no name says that they are torch's."""


NOT_TORCH = {"os._exit", "config._attn_implementation"}
"""Private members of other libraries than torch."""
BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "import_module", "__import__"}


def is_private(name: str) -> bool:
    """Whether a dotted name of torch has a private part, or lies in a module that is private without one."""
    parts = name.split(".")
    if parts[0] not in LIBRARIES:
        return False
    is_hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return is_hidden or any(name == module or name.startswith(f"{module}.") for module in UNDOCUMENTED)


def is_foreign(node: ast.Attribute) -> bool:
    """Whether an attribute is a private one of another object, whosever it is."""
    is_hidden = node.attr.startswith("_") and not node.attr.startswith("__")
    is_own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
    return is_hidden and not is_own and ast.unparse(node) not in NOT_TORCH


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """An attribute chain as a dotted name, its first part as it was imported or assigned; empty where it is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, names)
        return f"{start}.{node.attr}" if start else ""
    return ""


def names_of(tree: ast.Module) -> dict[str, str]:
    """What a file calls torch's modules and members: by imports anywhere, and by plain assignments of one."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (name := dotted(node.value, names)):
            names.update({target.id: name for target in node.targets if isinstance(target, ast.Name)})
    return {name: of for name, of in names.items() if of.split(".")[0] in LIBRARIES}


def faults(source: str) -> Iterator[tuple[int, str]]:
    """The private names of torch and torchao that a file uses, each with its line."""
    tree = ast.parse(source)
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((node.lineno, name) for name in imported if is_private(name))
        elif isinstance(node, ast.Attribute):
            name = dotted(node, names)
            if is_private(name) or node.attr in MEMBERS or is_foreign(node):
                yield node.lineno, name or ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            owner = dotted(node.args[0], names) if node.args else ""
            for member in node.args:
                if isinstance(member, ast.Constant) and isinstance(member.value, str):
                    name = f"{owner}.{member.value}"
                    is_hidden = member.value.startswith("_") and not member.value.startswith("__")
                    if is_hidden or is_private(name) or is_private(member.value):
                        yield node.lineno, name


def files() -> list[Path]:
    """All modules of the package outside the door, those behind the link ``passes`` too."""
    modules = [*PACKAGE.rglob("*.py"), *(PACKAGE / "passes").glob("*.py")]
    return [file for file in modules if "torch_private" not in file.relative_to(PACKAGE).parts]


def test_private_torch_in_one_folder_only() -> None:
    assert len(files()) > 60
    uses = {
        f"{file.relative_to(PACKAGE)}:{line} {name}"
        for file in files()
        for line, name in faults(file.read_text("utf-8"))
    }
    assert uses == set()


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ndef version_of(tensor):\n    return tensor._version",
        "self.aten = torch.ops.aten\nself.aten._softmax",
        "node._erased",
        "import operator\noperator.attrgetter('_version')",
        "import torch\nhasattr(torch, '_C')",
        "import importlib\nimportlib.import_module('torch._dynamo')",
        "getattr(model, '_orig_mod', model)",
        "import torch\ntorch._C._nn._parse_to('cpu')",
        "import torch._inductor.compile_fx",
        "def late():\n    from torch._dynamo import utils",
        "from torch import _guards",
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
        "from torch.multiprocessing.reductions import StorageWeakRef",
        "import torch as t\nt.nn.functional._some_kernel",
        "import torch\naten = torch.ops.aten\naten._scaled_dot_product_attention_math.default",
        "import torch.distributed as dist\ndist.distributed_c10d._resolve_process_group('0')",
        "from torchao.quantization.quant_primitives import _choose_scale_float8",
        "from torch import nn\nnn.Module._version_of",
        "import torch\ngetattr(torch, '_C')",
        "def add(placeholder):\n    placeholder._dynamo_source = None",
        "def add(placeholder):\n    setattr(placeholder, '_dynamo_source', None)",
        "from functorch.compile import nop",
    ],
)
def test_a_planted_private_name(code: str) -> None:
    assert list(faults(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.nn.functional.linear",
        "import torch\ntorch.__version__",
        "class Torch:\n    def run(self):\n        return self._state",
        "TEXT = 'torch._dynamo.reset()'",
    ],
)
def test_names_that_are_public(code: str) -> None:
    assert list(faults(code)) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch._C._nn._parse_to('cpu')",
        "import torch._dynamo.utils",
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
        "torch.distributed.distributed_c10d._resolve_process_group('0')",
        "torch.ops.aten._scaled_dot_product_flash_attention.default()",
        "from torchao.quantization.quant_primitives import _choose_scale_float8",
    ],
)
def test_the_linter_refuses_it_too(code: str) -> None:
    """As a contributor sees it first: planted at the end of a file that is there, and read from standard input."""
    source = (PACKAGE / "trunk" / "trunk.py").read_text("utf-8")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "TID251",
        "--stdin-filename",
        "hvcompile/trunk/trunk.py",
    ]
    done = [
        subprocess.run([*command, "-"], input=text, cwd=ROOT, capture_output=True, text=True, check=False)
        for text in (source, f"{source}\n\n{code}\n")
    ]
    assert done[0].returncode == 0, done[0].stdout
    assert "belongs to hvcompile/torch_private" in done[1].stdout
