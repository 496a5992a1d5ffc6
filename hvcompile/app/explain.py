"""Explaining from the command line: a pipeline by its skeleton, or a script by running it up to its transformer."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from hvcompile import outputs
from hvcompile.app.request.explain import Request
from hvcompile.app.script import ScriptSeenError, nothing_seen, run_up_to
from hvcompile.app.skeleton import first_call
from hvcompile.explanation import report
from hvcompile.explanation.explain import Explanation, explain, explain_graph
from hvcompile.graph.costs import DEVICES
from hvcompile.options import Options


def explain_request(request: Request) -> Explanation:
    """Explain what the request names, and write the JSON file and the report that it asks for.

    Raises:
        InputError: the request can't be met; the message says why.
        UntraceableModelError: the transformer does not trace as one graph.

    """
    request.check()
    if request.is_script:
        explanation, facts = explain_script(request), {"script": str(request.model)}
    else:
        explanation, facts = explain_pipeline(request)
    if request.json_file is not None:
        figures = dataclasses.asdict(dataclasses.replace(explanation, stages=()))
        del figures["stages"]
        figures |= {"flops": explanation.flops, "seconds": explanation.seconds}
        for row, need in zip(figures["needs"], explanation.needs, strict=True):
            row["peak_bytes"] = need.peak_bytes
        outputs.write_json(figures, request.json_file)
    if request.html_file is not None:
        title = "the embedded tiny pipeline" if request.model is None else request.model
        report.write(request.html_file, explanation=explanation, title=title, facts=facts)
    return explanation


def explain_script(request: Request) -> Explanation:
    """Run a script up to the first call of a model that it compiles with hvfast, and explain that call.

    Graphs without blocks on the way run as they are. The script's own options and mode are those explained. What was
    compiled in this process before is compiled anew when it is called again.

    Raises:
        InputError: the script ends, or fails, before it calls such a model.

    """
    explanations: list[Explanation] = []
    reasons: list[str] = []  # of graphs that hvfast would leave as they are

    def explain_it(graph: fx.GraphModule, inputs: Any, settings: Options) -> Any:
        explanation = explain_graph(graph, inputs, settings, DEVICES[request.gpu])
        if explanation.reason:
            reasons.append(explanation.reason)
            return graph.forward
        explanations.append(explanation)
        raise ScriptSeenError

    path = str(request.model)
    run_up_to(path, request.arguments, explain_it)
    if explanations:
        return explanations[0]
    raise nothing_seen(path, reasons)


def explain_pipeline(request: Request) -> tuple[Explanation, dict[str, str]]:
    """Explain the transformer of a pipeline as its first step calls it, and name what was explained.

    Raises:
        InputError: the request can't be met; the message says why.
        UntraceableModelError: the transformer does not trace as one graph.

    """
    call = first_call(request.model, request.dtype, request.prompt, request.sizes)
    explanation = explain(
        call.pipe.transformer, *call.args, **call.kwargs, mode=request.mode, device=DEVICES[request.gpu]
    )
    return explanation, call.facts()
