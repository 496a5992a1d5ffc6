"""Options: every mistake is an error that names the key and what is allowed, and costs no compile time."""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import hvfast, relative_error
from toy import Toy, toy_inputs

import hvcompile
from hvcompile.errors import OptionError
from hvcompile.options import DUMP_VARIABLE, MODES, parse
from hvcompile.passes import PASSES
from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.passes.float8_attention import Float8Attention
from hvcompile.passes.float8_linears import Float8Linears
from hvcompile.passes.unmasked_attention import UnmaskedAttention
from hvcompile.pipeline import Pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"first_block_cash": True}, ["'first_block_cash'", "'first_block_cache'", "did you mean"]),
        ({"first_block_cache": {"treshold": 0.1}}, ["'treshold'", "did you mean 'threshold'"]),
        ({"first_block_cache": {"threshold": "high"}}, ["first_block_cache.threshold", "str", "float"]),
        ({"first_block_cache": {"threshold": True}}, ["first_block_cache.threshold", "bool", "float"]),
        ({"first_block_cache": {"threshold": -0.1}}, ["first_block_cache.threshold", "-0.1", "from 0 to 1e+09"]),
        ({"first_block_cache": {"threshold": float("nan")}}, ["first_block_cache.threshold", "nan", "from 0 to 1e+09"]),
        ({"first_block_cache": {"warmup_steps": -1}}, ["first_block_cache.warmup_steps", "-1", "0 or more"]),
        ({"first_block_cache": {"warmup_steps": 1.5}}, ["first_block_cache.warmup_steps", "float", "int"]),
        ({"first_block_cache": {"max_consecutive_hits": 0}}, ["max_consecutive_hits", "1 or more"]),
        ({"first_block_cache": {"last_steps_computed": -2}}, ["last_steps_computed", "0 or more"]),
        ({"first_block_cache": 0.06}, ["first_block_cache", "0.06", "threshold"]),
        ({"attention": {"kernel": "fa9"}}, ["attention.kernel", "'fa9'", "'cudnn'", "'flash'"]),
        ({"attention": {"unmask": 1}}, ["attention.unmask", "int", "bool"]),
        ({"attention": {"masks": False}}, ["'masks'", "'unmask'", "'kernel'", "'hoist'"]),
        ({"guards": "none"}, ["guards", "'none'", "'quick'", "'dynamo'"]),
        ({"guards": None}, ["guards", "None", "'quick'", "'dynamo'"]),
        ({"lower": "tvm"}, ["lower", "'tvm'", "'inductor'", "'aot'", "'eager'"]),
        ({"dump": 3}, ["dump", "3", "directory"]),
        ({"dump": __file__}, ["dump", "is a file"]),
        ({"dump_limit_gib": -1}, ["dump_limit_gib", "-1", "0 or more"]),
        ({"dump_limit_gib": float("nan")}, ["dump_limit_gib", "nan", "0 or more"]),
        ({"dump_limit_gib": "2"}, ["dump_limit_gib", "str", "float"]),
        (["first_block_cache"], ["options", "list", "dict"]),
    ],
)
def test_invalid_options(options: Any, says: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse(PASSES, options, None)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_invalid_modes() -> None:
    with pytest.raises(OptionError, match=r"'fast'.*'default', 'exact', 'max'"):
        parse(PASSES, None, "fast")
    with pytest.raises(OptionError, match="first_block_cache"):
        parse(PASSES, {"first_block_cache": True}, "exact")


def test_defaults_and_modes() -> None:
    settings = parse(PASSES, None, None)
    assert settings.passes == tuple((item(), False) for item in PASSES)
    assert (settings.lower, settings.dump, settings.dump_limit_gib) == ("inductor", None, 2.0)
    assert dict(parse(PASSES, {"first_block_cache": True}, None).passes)[FirstBlockCache(threshold=0.06)]
    given = parse(PASSES, {"first_block_cache": {"threshold": 1}}, "default").passes
    assert (FirstBlockCache(threshold=1), True) in given
    numbers: tuple[Any, ...] = (np.float64(0.5), np.float32(0.5), Fraction(1, 2))
    for number in numbers:
        assert type(FirstBlockCache(threshold=number).threshold) is float, "no graph takes another kind of number"
    off = parse(PASSES, {"first_block_cache": False}, None)
    assert FirstBlockCache not in [type(item) for item, _ in off.passes]
    exact = parse(PASSES, None, "exact")
    assert [type(item) for item, _ in exact.passes] == [item for item in PASSES if item.is_exact]
    assert all("numerics" in why for _, why in exact.switched_off)


def test_lists() -> None:
    """A list or tuple of strings, and no bare string, which is a list of letters."""
    (given,) = [item for item, asked in parse(PASSES, {"fp8": {"skip": ["a", "b"]}}, None).passes if asked]
    assert given == Float8Linears(skip=("a", "b"))
    for wrong in ("a", [1], None):
        with pytest.raises(OptionError, match=r"fp8\.skip is .*allowed is a list of str"):
            parse(PASSES, {"fp8": {"skip": wrong}}, None)


def test_dump_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "a"))
    assert parse(PASSES, None, None).dump == tmp_path / "a"
    assert parse(PASSES, {"dump": tmp_path / "b"}, None).dump == tmp_path / "b"
    monkeypatch.setenv(DUMP_VARIABLE, __file__)
    with pytest.raises(OptionError, match=DUMP_VARIABLE):
        parse(PASSES, None, None)


def test_error_reaches_the_user_before_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvcompile.torch_private import lowering

    def no_lowering(*_: object) -> Any:
        raise AssertionError("lowered in spite of an invalid option")

    monkeypatch.setitem(lowering.LOWERINGS, "inductor", no_lowering)
    compiled = hvfast(Toy(), options={"first_block_cache": {"threshold": -1}})
    with torch.no_grad(), pytest.raises(Exception, match=r"first_block_cache\.threshold is -1"):
        compiled(**toy_inputs())


def test_options_that_the_documents_show_are_valid() -> None:
    root = Path(__file__).parents[1]
    shown = []
    for file in (root / "README.md", root / "docs" / "debugging.md"):
        shown += re.findall(r"options=(\{[^`]*\})[`)]", file.read_text())
    assert len(shown) >= 5
    for text in shown:
        options = ast.literal_eval(text)
        parse(PASSES, {name: held for name, held in options.items() if name != "dump"}, None)
        assert isinstance(options.get("dump", ""), str)


def test_a_section_may_be_the_pass_itself() -> None:
    cache = FirstBlockCache(threshold=0.1)
    assert parse(PASSES, {"first_block_cache": cache}, None) == parse(
        PASSES, {"first_block_cache": {"threshold": 0.1}}, None
    )
    assert dict(parse(PASSES, {"first_block_cache": FirstBlockCache()}, None).passes)[FirstBlockCache()]
    assert Float8Linears(skip=["a"]).skip == ("a",)  # type: ignore[arg-type]

    both = (UnmaskedAttention(kernel="flash"), Float8Attention(fp8=True))
    passes = dict(parse(PASSES, {"attention": list(both)}, None).passes)
    assert passes[both[0]]
    assert passes[both[1]]
    assert passes == dict(parse(PASSES, {"attention": {"kernel": "flash", "fp8": True}}, None).passes)
    for sections, mode in (
        (({"fp8_keep_blocks": 1, "fp8": True}, Float8Attention(fp8_keep_blocks=1, fp8=True)), None),
        (({"fp8_keep_blocks": 1}, Float8Attention(fp8_keep_blocks=1)), "max"),
        (({}, [UnmaskedAttention(), Float8Attention()]), "max"),
    ):  # a pass counts like a dict of its fields that differ from their defaults
        first, second = (parse(PASSES, {"attention": section}, mode) for section in sections)
        assert first == second
    alone = dict(parse(PASSES, {"attention": both[0]}, None).passes)
    assert alone[both[0]]
    assert not alone[Float8Attention()]


class Renamed(FirstBlockCache):
    pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"first_block_cache": Float8Linears()},
            ["a Float8Linears", "allowed is FirstBlockCache"],
        ),
        ({"first_block_cache": Renamed()}, ["first_block_cache", "a Renamed", "allowed is FirstBlockCache"]),
        ({"fp8": Pass()}, ["options['fp8']", "a Pass", "allowed is Float8Linears"]),
        ({"attention": [UnmaskedAttention(), UnmaskedAttention()]}, ["options['attention']", "two of one kind"]),
        ({"attention": []}, ["options['attention']", "[]", "or a list of these"]),
        ({"attention": Float8Attention(fp8_keep_blocks=1)}, ["attention.fp8_keep_blocks", "'attention.fp8' is True"]),
        ({"fp8": FirstBlockCache}, ["options['fp8']", "Float8Linears itself"]),
    ],
)
def test_passes_that_are_no_section(options: Any, says: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse(PASSES, options, None)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_a_pass_checks_its_own_fields() -> None:
    with pytest.raises(OptionError, match=r"first_block_cache\.threshold is 'high', a str; allowed is float"):
        FirstBlockCache(threshold="high")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"fp8\.skip is 'a'; allowed is a list of str"):
        Float8Linears(skip="a")  # type: ignore[arg-type]


def test_the_mode_may_be_a_key_of_the_options() -> None:
    for mode in MODES:
        assert parse(PASSES, {"mode": mode}, None) == parse(PASSES, None, mode)
        assert parse(PASSES, {"mode": mode}, mode) == parse(PASSES, None, mode)
    settings = parse(PASSES, {"mode": "max", "first_block_cache": {"threshold": 0.1}}, None)
    assert (Float8Attention(fp8=True), False) in settings.passes
    assert (FirstBlockCache(threshold=0.1), True) in settings.passes
    with pytest.raises(OptionError, match=r"options\['mode'\] is array"):
        parse(PASSES, {"mode": np.zeros(2)}, None)
    with pytest.raises(OptionError, match=r"options\['mode'\] is 'fast'.*'default', 'exact', 'max'"):
        parse(PASSES, {"mode": "fast"}, None)
    with pytest.raises(OptionError, match=r"mode is 'max' and options\['mode'\] is 'exact'"):
        parse(PASSES, {"mode": "exact"}, "max")
    with pytest.raises(OptionError, match="'first_block_cache', which mode='exact' rules out"):
        parse(PASSES, {"mode": "exact", "first_block_cache": FirstBlockCache()}, None)


def test_the_mode_among_the_options_of_torch_compile() -> None:
    model = Toy()
    compiled = torch.compile(model, backend="hvfast", options={"mode": "exact", "lower": "eager"})
    with torch.no_grad():
        compiled(**toy_inputs())
    (journal,) = hvcompile.stats(model).journal
    assert "exact" in next(row for row in journal if row.name == "FirstBlockCache").line()


def asked(options: dict[str, Any], mode: str | None = None) -> list[str]:
    """Names of the passes that options ask for by name."""
    return [type(item).__name__ for item, requested in parse(PASSES, options, mode).passes if requested]


def test_what_switches_off_or_repeats_a_default_asks_for_nothing() -> None:
    """Every field of every pass: as it is by default (if not True), False, None; as a dict and as the pass itself."""
    for kind in PASSES:
        for field in dataclasses.fields(kind):
            hint = typing.get_type_hints(kind)[field.name]
            silent = [] if field.default is True else [field.default]
            silent += [False] if hint is bool else []
            silent += [None] if types.NoneType in typing.get_args(hint) else []
            for setting in silent:
                assert asked({kind.section: {field.name: setting}}) == [], (field.name, setting)
                if setting != field.default:
                    assert asked({kind.section: kind(**{field.name: setting})}) == [], (field.name, setting)
    assert asked({"attention": {"hoist": False, "unmask": False, "kernel": "auto", "fp8": False}}) == []
    assert asked({"fp8": {"skip": [], "audit": False}}) == []
    assert asked({"attention": {"fp8_keep_blocks": 0}}) == []
    assert asked({"fp8": {"audit": False}, "first_block_cache": {"max_consecutive_hits": None}}, "exact") == []


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"attention": {"hoist": False, "kernel": "math"}}, ["UnmaskedAttention"]),
        ({"attention": {"hoist": False, "fp8": True}}, ["Float8Attention"]),
        ({"attention": {"fp8": True, "kernel": "math"}}, ["UnmaskedAttention", "Float8Attention"]),
        ({"attention": {}}, ["UnmaskedAttention"]),
        ({"attention": {"unmask": True, "hoist": False}}, ["UnmaskedAttention"]),
        ({"attention": True}, ["UnmaskedAttention"]),
        ({"attention": UnmaskedAttention()}, ["UnmaskedAttention"]),
        ({"fp8": {"keep_last_blocks": 0}}, ["Float8Linears"]),
        ({"fp8": {"skip": ["proj_out"]}}, ["Float8Linears"]),
        ({"first_block_cache": {"threshold": 0}}, ["FirstBlockCache"]),
        ({"first_block_cache": {"threshold": 0.06, "warmup_steps": 1}}, ["FirstBlockCache"]),
        ({"context_parallel": {"ulysses": 1}}, ["ShardedAttention"]),
        ({"context_parallel": {"timeout_seconds": 5}}, ["ShardedAttention"]),
    ],
)
def test_what_is_asked_for_by_name(options: dict[str, Any], names: list[str]) -> None:
    assert asked(options) == names


def test_what_is_off_is_no_error_on_a_model_that_has_no_use_for_it() -> None:
    """A model without masks, with nothing to hoist, without float8 hardware and on one rank."""
    options: dict[str, Any] = {
        "lower": "eager",
        "attention": {"hoist": False, "unmask": False, "kernel": "auto", "fp8": False},
        "fp8": {"audit": False, "skip": []},
        "context_parallel": {"ulysses": None, "ring": None, "cfg": 1},
        "first_block_cache": {"max_consecutive_hits": None},
    }
    for changes in ({}, {"lower": "inductor"}, {"mode": "exact"}):
        torch._dynamo.reset()
        model = Toy(2)
        with torch.no_grad():
            got = hvfast(model, fullgraph=True, options=options | changes)(**toy_inputs())
            assert relative_error(got, model(**toy_inputs())) < 1e-5
    with torch.no_grad(), pytest.raises(Exception, match=r"RequestedPassError: .*'attention'"):
        hvfast(Toy(2), options={"attention": {"unmask": False, "hoist": False, "kernel": "cudnn"}})(**toy_inputs())
