"""What the tests of sharded attention run on every rank."""

from __future__ import annotations

import copy
import functools
import logging
import math
import traceback
from typing import Any

import ranks
import torch
import zoo
from oracle import denoise, first, hvfast, relative_error
from torch.distributed.device_mesh import init_device_mesh

import hvcompile
import hvcompile.backend
import hvcompile.errors
import hvcompile.runtime.agreement
import hvcompile.runtime.state

WIDTH = 64  # four heads
DEPTH = {"num_layers": 2, "num_single_layers": 2, "width": WIDTH}


def inputs_of(family: str, valid: int | tuple[int, ...] = 5, size: tuple[int, int, int] = (3, 4, 6)) -> dict[str, Any]:
    """Inputs of a family with so many valid text tokens (one number a sample) and so many latent frames and pixels."""
    inputs = zoo.FAMILIES[family].inputs(3)
    counts = valid if isinstance(valid, tuple) else (valid,)
    draw = zoo.Draw(11)
    inputs = {
        name: torch.cat([held + 0.1 * place if held.is_floating_point() else held for place in range(len(counts))])
        for name, held in inputs.items()
    }
    shape = inputs["hidden_states"].shape
    inputs["hidden_states"] = draw.normal(*shape[:2], *size)
    inputs["timestep"] = inputs["timestep"][:1].expand(len(counts)).clone()
    inputs["encoder_attention_mask"] = torch.cat([zoo.partial_mask(zoo.TEXT, count) for count in counts])
    return inputs


def equality(lower: str, cases: list[tuple[str, Any, list[dict[str, Any]]]], cache: Any = False) -> list[float]:
    """The relative difference from one rank, in order; a case is a family, how its model is split, and its calls."""
    found = []
    for family, parallel, calls in cases:
        model = zoo.FAMILIES[family].build(**DEPTH)
        options = {"lower": lower, "first_block_cache": cache, "context_parallel": parallel}
        fast = hvfast(model, fullgraph=True, options=options)
        for call in calls:
            inputs = inputs_of(family, **call)
            with torch.no_grad():
                expected = first(model(**inputs, return_dict=False))
                actual = first(fast(**inputs, return_dict=False))
            assert bool(expected.isfinite().all())
            found.append(relative_error(actual, expected))
        torch._dynamo.reset()
    return found


def inductor_steps() -> list[float]:
    """A computed and a reused step against one rank's, both compiled by Inductor."""
    inputs, steps = inputs_of("hunyuan_video_i2v_replace", size=(3, 2, 10)), []
    for parallel in (True, False)[: 2 - rank()]:
        torch._dynamo.reset()
        model = zoo.FAMILIES["hunyuan_video_i2v_replace"].build(**DEPTH | {"num_single_layers": 1})
        options = {"first_block_cache": {"threshold": 1.0}, "context_parallel": parallel}
        fast = hvfast(model, fullgraph=True, options=options)
        with torch.no_grad():
            steps.append(
                [
                    first(fast(**inputs | {"timestep": torch.tensor([time])}, return_dict=False))
                    for time in (900.0, 900.0)
                ]
            )
        assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True]
    return [relative_error(*pair) for pair in zip(*steps, strict=True)] if rank() == 0 else []


def float8(lower: str, parallel: list[Any]) -> list[float]:
    """The relative difference from one rank, all with float8."""
    outputs = []
    for fields in (*parallel, False):
        torch._dynamo.reset()
        options = {"lower": lower, "first_block_cache": False, "fp8": True, "context_parallel": fields}
        fast = hvfast(zoo.FAMILIES["hunyuan_video"].build(**DEPTH), fullgraph=True, options=options)
        # 18 rows for each rank: one rank alone has no more layers that are worth it.
        inputs = inputs_of("hunyuan_video", size=(3, 4, 6 * torch.distributed.get_world_size()))
        with torch.no_grad():
            outputs.append(first(fast(**inputs, return_dict=False)))
    *together, alone = outputs
    return [relative_error(output, alone) for output in together]


def decisions(
    lower: str, thresholds: list[float], parallel: list[Any], **fields: Any
) -> list[tuple[list[bool], list[bool], float]]:
    """Thirty steps at each threshold: decisions of the ranks together, those of one rank, how the samples differ."""
    found = []
    for threshold in thresholds:
        runs = []
        for layout in (*parallel, False):
            torch._dynamo.reset()
            cache = {"threshold": threshold, **fields}
            options = {"lower": lower, "first_block_cache": cache, "context_parallel": layout}
            fast = hvfast(zoo.FAMILIES["hunyuan_video"].build(**DEPTH), fullgraph=True, options=options)

            def was_reused(fast: Any = fast) -> bool:
                return hvcompile.stats(fast).steps[-1].reused

            inputs = inputs_of("hunyuan_video", size=(3, 4, 10))
            runs.append(denoise(fast, inputs, was_reused=was_reused))
        *together, alone = runs
        found += [(run.reused, alone.reused, relative_error(run.sample, alone.sample)) for run in together]
    return found


HEADS = 4


class JointBlock(torch.nn.Module):
    """Attention of video tokens to video and text, in several heads; the text is only read."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.text, self.out = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.scale = scale

    def forward(self, hidden: Any, text: Any, time: Any, place: Any, mask: Any = None) -> Any:
        def heads(tokens: Any) -> Any:
            return tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        text = self.text(text)
        query, key, value = self.query(hidden + place), self.key(hidden + place), self.value(hidden)
        key, value = torch.cat([key, text], dim=1), torch.cat([value, text], dim=1)
        mixed = torch.nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value), mask)
        return hidden + self.scale * self.out(mixed.transpose(1, 2).flatten(2) + time[:, None])


class Joint(torch.nn.Module):
    """``(sample [B, N, C], timestep [B], text [B, L, C], valid text [B, L]) -> [B, N, C]``, quick to trace."""

    def __init__(self, blocks: int = 3, scale: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time, self.head = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.blocks = torch.nn.ModuleList(JointBlock(scale) for _ in range(blocks))

    def forward(self, sample: Any, timestep: Any, text: Any, valid: Any = None) -> Any:
        time = self.time((timestep[:, None].float() / 1000 * torch.arange(WIDTH, device=timestep.device)).cos())
        place = torch.arange(sample.shape[1] * WIDTH, device=sample.device).view(sample.shape[1], WIDTH).sin()[None]
        hidden, mask = self.embed(sample), None
        if valid is not None:
            mask = torch.cat([valid.new_ones(sample.shape[:2]), valid], dim=1)[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, text, time, place, mask)
        return self.head(hidden)


class Repeated(Joint):
    """The same with a Python number as an input."""

    def forward(self, sample: Any, timestep: Any, text: Any, valid: Any = None, times: int = 1) -> Any:
        return super().forward(sample * times, timestep, text, valid)


class FromHalf(Joint):
    """The same, of a sample in bf16."""

    def forward(self, sample: Any, timestep: Any, text: Any, valid: Any = None) -> Any:
        return super().forward(sample.float(), timestep, text, valid)


def joint_inputs(seed: int = 0, tokens: int = 13, timestep: float = 900.0) -> dict[str, Any]:
    draw = zoo.Draw(seed)
    return {
        "sample": draw.normal(1, tokens, WIDTH),
        "timestep": torch.tensor([timestep]),
        "text": draw.normal(1, 5, WIDTH),
    }


def rank() -> int:
    return torch.distributed.get_rank()


def joint(cache: Any = False, lower: str = "eager", timeout: float = 20.0, **fields: Any) -> Any:
    sharded: Any = {"timeout_seconds": timeout, **fields}
    options = {"lower": lower, "first_block_cache": cache, "context_parallel": sharded}
    return hvfast(Joint(), fullgraph=True, options=options)


def toy_lengths(lengths: list[int], fields: dict[str, Any]) -> list[float]:
    """Relative errors of the small model at these lengths."""
    found = []
    for tokens in lengths:
        torch._dynamo.reset()
        inputs = joint_inputs(tokens=tokens)
        with torch.no_grad():
            found.append(relative_error(joint(**fields)(**inputs), Joint()(**inputs)))
    return found


def masked_inputs(counts: tuple[int, ...], tokens: int = 13) -> dict[str, Any]:
    """Inputs of the small model with so many valid text tokens of five, one number a sample."""
    inputs = {name: held.expand(len(counts), *held.shape[1:]) for name, held in joint_inputs(tokens=tokens).items()}
    draw = zoo.Draw(4)
    inputs["text"] = draw.normal(len(counts), 5, WIDTH)
    return inputs | {"valid": torch.arange(5)[None] < torch.tensor(counts)[:, None]}


def toy_masks(valid: list[tuple[int, ...]], tokens: int, fields: dict[str, Any]) -> list[float]:
    """Relative errors of the small model, first with the mask as it is and then as shorter keys."""
    found = []
    for attention in (False, True):
        torch._dynamo.reset()
        options = {"lower": "eager", "first_block_cache": False, "context_parallel": fields, "attention": attention}
        fast = hvfast(Joint(), fullgraph=True, dynamic=False, options=options)
        for counts in valid:
            inputs = masked_inputs(counts, tokens)
            with torch.no_grad():
                found.append(relative_error(fast(**inputs), Joint()(**inputs)))
    return found


def toy_inductor(fields: dict[str, Any]) -> list[float]:
    """Relative errors of the small model compiled by Inductor: a computed and a reused step of each of two batches."""
    errors, cache = [], {"threshold": 1.0}
    fast, alone = (
        hvfast(
            Joint(2), fullgraph=True, options={"lower": lower, "first_block_cache": cache, "context_parallel": split}
        )
        for lower, split in (("inductor", fields), ("eager", False))
    )
    for counts in ((2, 4), (5, 1)):
        for _ in range(2):
            inputs = masked_inputs(counts)
            with torch.no_grad():
                errors.append(relative_error(fast(**inputs), alone(**inputs)))
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True] * 2
    assert not hvcompile.stats(fast).recompiles
    return errors


def fault(kind: str) -> str:
    """Run the small model with something wrong on rank 1, and return what was raised."""
    odd = rank() == 1
    patience = 6.0 if kind in {"off", "death"} else 60.0
    fast = joint(cache={"threshold": 0.1 if kind == "threshold" and odd else 0.5}, timeout=patience)
    inputs = joint_inputs(seed=int(kind == "seed" and odd), tokens=14 if kind == "shape" and odd else 13)
    if kind == "death in a ring":
        fast = joint(cache={"threshold": 0.5}, timeout=patience, ring=2)
    if kind == "ring":
        fast = joint(cache={"threshold": 0.5}, timeout=patience, ring=1 + odd)
    if kind == "cfg":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("cfg", "sequence"))
        fast, inputs = joint(timeout=patience, mesh=mesh, cfg=2, ring=1 + odd), masked_inputs((3, 5))
    if kind == "weights" and odd:
        with torch.no_grad():
            fast.head.bias += 1e-3
    if kind == "version" and odd:
        torch.__version__ = "2.99"  # type: ignore[assignment]
    if kind == "off" and odd:
        fast = hvfast(Joint(), fullgraph=True, options={"lower": "eager", "context_parallel": False})
    if kind == "blocks" and odd:
        fast = hvfast(
            Joint(4), fullgraph=True, options={"lower": "eager", "context_parallel": {"timeout_seconds": patience}}
        )
    try:
        with torch.no_grad():
            if kind == "failure" and odd:
                joint(cache={"threshold": 0.5}, timeout=patience, ulysses=3)(**inputs)
            fast(**inputs)
            if kind == "later shape":
                fast(**joint_inputs(tokens=15 if odd else 13, seed=4))
            if kind == "later prompt":
                fast(**joint_inputs(seed=5 if odd else 6))
            if kind in {"another known prompt", "one new prompt", "another known shape"}:
                prompts = [joint_inputs(seed=seed) for seed in (1, 2)]
                if kind == "another known shape":  # as many tokens on each rank
                    prompts = [joint_inputs(tokens=tokens) for tokens in (13, 14)]
                for known in prompts[: 1 if kind == "one new prompt" else 2]:
                    fast(**known)
                fast(**prompts[odd])
            if kind == "number":
                fast = hvfast(Repeated(), fullgraph=True, options={"lower": "eager", "first_block_cache": False})
                for times in (3, 4, 5 + odd):
                    fast(**inputs, times=times)
            if kind == "compiling again":
                if odd:
                    torch._dynamo.reset()
                fast(**inputs)
            if kind == "later seed":
                for clock in (800.0, 700.0):
                    fast(**inputs | {"timestep": torch.tensor([clock])})
                inputs["sample"] = torch.randn_like(inputs["sample"]) + rank()
                for clock in (900.0, 800.0, 700.0):
                    fast(**inputs | {"timestep": torch.tensor([clock])})
            if kind == "death":
                if odd:
                    ranks.die()
                for clock in (800.0, 700.0, 600.0):
                    fast(**joint_inputs(seed=1, timestep=clock))
            if kind in {"death in a step", "death in a ring"}:
                if odd:
                    compare = hvcompile.runtime.agreement.compare

                    def die_after(group: Any, doing: str, facts: Any) -> None:
                        compare(group, doing, facts)
                        ranks.die()

                    hvcompile.runtime.agreement.compare = die_after
                fast(**inputs | {"timestep": torch.tensor([800.0])})
    except Exception as error:
        return "".join(traceback.format_exception_only(error))
    return "nothing"


def given_apart(kind: str, lower: str = "eager") -> tuple[list[float], str, list[str]]:
    """Four calls; from the second on, rank 1 is given something of its own, if that is not what it should have.

    How far each output is from what one rank makes of rank 0's inputs, what was raised in the end, and what was logged.
    """
    odd, errors, logged = rank() == 1, [], []
    alone = FromHalf() if kind == "bf16" else Joint()
    fast = hvfast(
        copy.deepcopy(alone),
        fullgraph=True,
        options={
            "lower": lower,
            "first_block_cache": kind == "cached" and {"threshold": 0.5},
            "context_parallel": True,
        },
    )
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hvcompile").addHandler(handler)
    inputs = joint_inputs()
    if kind == "bf16":
        inputs["sample"] = inputs["sample"].bfloat16()
    try:
        with torch.no_grad():
            for step in range(4):
                time = torch.tensor([900 - 50 * step]).to(torch.int64 if kind == "whole clock" else torch.float32)
                given = inputs | {"timestep": time, "sample": inputs["sample"] * (1 - 0.1 * step)}
                expected = alone(**given)
                if kind == "nan on all":
                    given["sample"][0, 3, 5] = torch.nan
                if odd and step:
                    noise = torch.randn_like(given["sample"])
                    if kind in {"rounding", "bf16", "inductor"}:
                        given["sample"] = given["sample"] + 1e-3 * noise
                    if kind in {"sample", "cached", "last sample"} and (kind != "last sample" or step == 3):
                        given["sample"] = given["sample"] + 0.1 * noise
                    if kind == "nan on one":
                        given["sample"][0, 3, 5] = torch.nan
                    if kind == "condition":
                        given["text"].data.mul_(1.1)
                    if kind in {"clock", "whole clock"}:
                        given["timestep"] = time - 1
                errors.append(relative_error(fast(**given), expected))
        hvcompile.stats(fast)
    except hvcompile.errors.DisagreementError as error:
        return errors, str(error), logged
    return errors, "", logged


def group_gone(port: int) -> list[str]:
    """What is said where the process group has been taken down, or made anew with the ranks exchanged."""
    fast, inputs, said = joint(cache={"threshold": 0.5}), joint_inputs(), []
    with torch.no_grad():
        fast(**inputs)
        torch.distributed.barrier()
        mine = rank()
        torch.distributed.destroy_process_group()
        said.append(str(hvcompile.stats(fast).misses))
        for again in (None, 1 - mine):
            if again is not None:
                torch.distributed.init_process_group(
                    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=again, world_size=2
                )
            try:
                fast(**inputs)
            except RuntimeError as error:
                said.append(str(error))
    return said


def rows_apart() -> tuple[list[bool], float]:
    """Two videos on a 2x2 mesh, one a row; the second row's changes more. Decisions, and the error of the last step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cfg", "ulysses"))
    row, error = rank() // 2, 0.0
    fast = joint(cache={"threshold": 0.3}, mesh=mesh["ulysses"])
    options = {"lower": "eager", "first_block_cache": {"threshold": 0.3}, "context_parallel": False}
    alone = hvfast(Joint(), fullgraph=True, options=options)
    with torch.no_grad():
        for step in range(5):
            inputs = joint_inputs(seed=row, timestep=900.0 - 0.5 * step)
            inputs["sample"] *= 1 + (0.02 + 0.4 * row) * step
            error = max(error, relative_error(fast(**inputs), alone(**inputs)))
    return [step.reused for step in hvcompile.stats(fast).steps], error


def halves(fields: dict[str, Any], steps: int, lower: str = "eager") -> list[tuple[bool, bool, float]]:
    """A batch of two samples, whose second one changes more, its halves on two rows of ranks, with the cache.

    Of each step, what this rank decided, what one rank decides, and the error of its half. One rank has both samples,
    or, where guidance is "apart", that sample alone.
    """
    shape = (2, torch.distributed.get_world_size() // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("cfg", "sequence"))
    cache: dict[str, Any] = {"threshold": 0.3, "guidance": fields.pop("guidance", "together")}
    is_apart, row = cache["guidance"] == "apart", rank() // shape[1]
    fast = joint(cache=cache, lower=lower, timeout=120.0, mesh=mesh, cfg=2, **fields)
    alone = hvfast(
        Joint(), fullgraph=True, options={"lower": "eager", "first_block_cache": cache, "context_parallel": False}
    )
    found = []
    with torch.no_grad():
        for step in range(steps):
            inputs = masked_inputs((2, 4))
            inputs["timestep"] = torch.full((2,), 900.0 - 0.5 * step)
            inputs["sample"] = torch.cat([joint_inputs(seed=0)["sample"], joint_inputs(seed=1)["sample"]])
            inputs["sample"] *= 1 + torch.tensor([0.02, 0.42])[:, None, None] * step
            mine = {name: held[row : row + 1] if is_apart else held for name, held in inputs.items()}
            error = relative_error(fast(**inputs)[row : row + 1], alone(**mine)[0 if is_apart else row][None])
            together, single = (hvcompile.stats(model).steps[-1].reused for model in (fast, alone))
            found.append((together, single, error))
    return found


def float8_halves() -> float:
    """The relative difference from one rank, all with float8, of two prompts of one batch on a rank each."""
    outputs = []
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("cfg", "sequence"))
    for fields in ({"mesh": mesh, "cfg": 2}, False):
        torch._dynamo.reset()
        options = {"lower": "eager", "first_block_cache": False, "fp8": True, "context_parallel": fields}
        fast = hvfast(zoo.FAMILIES["hunyuan_video"].build(**DEPTH), fullgraph=True, options=options)
        with torch.no_grad():
            outputs.append(first(fast(**inputs_of("hunyuan_video", valid=(2, 6), size=(3, 4, 12)), return_dict=False)))
    return relative_error(*outputs)


def most(fields: dict[str, Any]) -> tuple[float, list[str]]:
    """The relative difference from one rank in ``mode="max"``, and what each pass says."""
    outputs, told = [], []
    for parallel in (fields, False):
        torch._dynamo.reset()
        options = {"lower": "eager", "first_block_cache": False, "context_parallel": parallel}
        backend = functools.partial(hvcompile.backend.hvfast, mode="max", options=options)
        fast = torch.compile(Joint(), backend=backend, fullgraph=True)
        with torch.no_grad():
            outputs.append(fast(**masked_inputs((3, 5))))
        told.append([row.line() for row in hvcompile.stats(fast).journal[0]])
    return relative_error(*outputs), told[0]


def lost(thresholds: list[float], **fields: Any) -> list[list[tuple[bool, float]]]:
    """The state of one rank is forgotten on the way; the decisions of each, a list a threshold."""
    found = []
    draw = zoo.Draw(5)
    ways = [draw.normal(1, 13, WIDTH) for _ in range(2)]
    for threshold in thresholds:
        torch._dynamo.reset()
        fast = joint(cache={"threshold": threshold, **fields})
        decided = []
        with torch.no_grad():
            for step in range(16):
                if step == 6 and rank() == 0:
                    hvcompile.reset(fast)
                inputs = joint_inputs(timestep=900.0 - 10 * step)
                inputs["sample"] += 0.06 * step * ways[0] + 0.1 * math.sin(0.9 * step) * ways[1]
                fast(**inputs)
                last = hvcompile.stats(fast).steps[-1]
                decided.append((last.reused, last.difference))
        found.append(decided)
    return found


def skewed() -> list[tuple[bool, float]]:
    """Residuals and state that differ from rank to rank; the decisions of each."""
    fast = joint(cache={"threshold": 0.3})
    with torch.no_grad():
        for step in range(8):
            inputs = joint_inputs(timestep=900.0 - 0.5 * step)
            # only the tokens of the last rank move
            inputs["sample"][:, 9:] += 0.02 * step
            if step == 5 and rank() == 1:
                for state in hvcompile.runtime.state._states_of(fast):
                    for slot in state.slots.values():
                        for tensor in slot.tensors:
                            tensor.zero_()
            fast(**inputs)
    return [(step.reused, step.difference) for step in hvcompile.stats(fast).steps]


def guided(
    lose: bool = False, cache: dict[str, Any] | None = None
) -> tuple[list[tuple[bool, bool]], list[tuple[bool, bool]], float]:
    """Two texts a step, the second of which weighs more: the decisions of ranks, those of one, and the error.

    With ``lose``, rank 1 loses its state between two calls of step 7, from which on no error is taken.
    """
    cache = cache or {"threshold": 0.3}
    fast = joint(cache=cache, timeout=120.0)
    options = {"lower": "eager", "first_block_cache": cache, "context_parallel": False}
    alone = hvfast(Joint(), fullgraph=True, options=options)
    draw = zoo.Draw(5)
    way, texts = draw.normal(1, 13, WIDTH), [draw.normal(1, 5, WIDTH), 4 * draw.normal(1, 5, WIDTH)]
    rows: list[list[tuple[bool, bool]]] = [[], []]
    error = 0.0
    with torch.no_grad():
        for step in range(12):
            inputs = joint_inputs(timestep=900.0 - 10 * step)
            inputs["sample"] += 0.1 * step * way
            now: list[list[bool]] = [[], []]
            for half, text in enumerate(texts):
                if lose and (step, half, rank()) == (7, 1, 1):
                    hvcompile.reset(fast)
                outputs = []
                for place, model in enumerate((fast, alone)):
                    outputs.append(model(**{**inputs, "text": text}))
                    now[place].append(hvcompile.stats(model).steps[-1].reused)
                if not lose or step < 7:
                    error = max(error, relative_error(*outputs))
            for place, decided in enumerate(now):
                rows[place].append((decided[0], decided[1]))
    return rows[0], rows[1], error
