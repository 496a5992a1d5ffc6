"""Compiling from the command line for a GPU that is not there: a pipeline by its skeleton, or a script's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile import outputs
from hvcompile.app.request.lower import Request
from hvcompile.app.script import ScriptSeenError, nothing_seen, run_up_to
from hvcompile.app.skeleton import first_call
from hvcompile.errors import InputError
from hvcompile.journal import Declined
from hvcompile.lowered.gpus import GPUS, peaks
from hvcompile.lowered.lower import Lowered, lower_call, settings_for
from hvcompile.lowered.quantised import quantisations
from hvcompile.options import Options
from hvcompile.torch_private.dynamo import frame_call
from hvcompile.trunk.outline import recover

Call = tuple[torch.nn.Module, Sequence[Any], Mapping[str, Any]]


def lower_request(request: Request) -> dict[str, Lowered]:
    """Compile what the request names, and write the files that it asks for.

    Returns:
        "hvfast", and "Inductor" where the request asks for that too.

    Raises:
        InputError, OptionError: the request can't be met; the message says why.
        UntraceableModelError: the transformer does not trace as one graph.
        RequestedPassError: a pass that options ask for by name can't apply.

    """
    request.check()
    if request.is_script:
        call, settings = script_call(str(request.model), request.arguments)
        results = {"hvfast": lower_call(call, settings, GPUS[request.gpu], ranks=request.ranks)}
    else:
        found = first_call(request.model, request.dtype, request.prompt, request.sizes)
        call = (found.pipe.transformer, found.args, found.kwargs)
        with settings_for(request.backend_options(), request.mode, request.ranks) as settings:
            results = {"hvfast": lower_call(call, settings, GPUS[request.gpu], ranks=request.ranks)}
    if request.plain:
        results["Inductor"] = lower_call(call, settings, GPUS[request.gpu], plain=True)
    if request.output is not None:
        _write_code(results, request)
    if request.json_file is not None:
        outputs.write_json({name: _figures(item) for name, item in results.items()}, request.json_file)
    return results


def script_call(path: str, arguments: Sequence[str]) -> tuple[Call, Options]:
    """Run a script up to the first call of a model with blocks that it compiles with hvfast.

    Returns:
        The model and the arguments of the call, and the script's options.

    Raises:
        InputError: the script ends, or fails, before it calls such a model.

    """
    seen: list[tuple[Call, Options]] = []
    reasons: list[str] = []

    def look(graph: fx.GraphModule, inputs: Any, settings: Options) -> Any:
        del inputs
        trunk, call = recover(graph), frame_call()
        if isinstance(trunk, Declined) or call is None:
            reasons.append(trunk.reason if isinstance(trunk, Declined) else "it is the graph of no module's forward")
            return graph.forward
        seen.append((call, settings))
        raise ScriptSeenError

    run_up_to(path, arguments, look)
    if seen:
        return seen[0]
    raise nothing_seen(path, reasons)


def _write_code(results: Mapping[str, Lowered], request: Request) -> None:
    directory = request.output
    assert directory is not None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, item in results.items():
            for number, code in enumerate(item.code):
                (directory / f"{name.lower()}_{number}.py").write_text(code, "utf-8")
    except OSError as error:
        raise InputError(
            f"output {str(directory)!r} can't be written ({error.strerror or error}): give a place where you may"
        ) from error


def _figures(item: Lowered) -> dict[str, Any]:
    steps, device = {"computed": item.computed, "reused": item.reused}, peaks(item.gpu)
    return {
        "gpu": dataclasses.asdict(item.gpu),
        "ranks": item.ranks,
        "seconds": item.seconds,
        "peak_bytes": item.peak_bytes,
        "kernels": [dataclasses.asdict(kernel) for kernel in item.kernels],
        "failures": item.failures,
        "measured": item.measured,
        "journal": [row.line() for row in item.journal],
        "steps": {
            name: {
                "launches": step.num_launches,
                "bytes": step.num_bytes,
                "flops": step.flops,
                "model_seconds": None if device is None else step.seconds(device),
                "transferred_bytes": step.transferred_bytes,
                "peak_bytes": step.peak_bytes,
                "input_bytes": step.input_bytes,
                "by_function": step.by_function(),
                "collectives": step.overlaps(),
                "quantisations": [
                    {"part": function, "kernel": kernel, "apart": apart}
                    for (function, kernel), apart in quantisations(step).items()
                ],
            }
            for name, step in steps.items()
            if step is not None
        },
    }
