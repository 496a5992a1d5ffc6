"""``hvcompile tune``: which settings are tried, what is chosen, what is kept, and a tuning of the tiny pipeline."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tune_cases as cases
from PIL import Image
from slow import SLOW
from tune_cases import law, row_of, run_of
from typer.testing import CliRunner

import hvcompile
from hvcompile.app import identity, pipelines
from hvcompile.app.cli import app
from hvcompile.app.notes import notes
from hvcompile.app.request.tune import Request
from hvcompile.app.runner import Runner
from hvcompile.app.tuning import candidates, plot, tune
from hvcompile.app.tuning.candidates import Candidate, Goal
from hvcompile.app.tuning.results import Measured, Row, denoising_seconds
from hvcompile.app.tuning.store import Store, rounded
from hvcompile.errors import InputError
from hvcompile.inputs import unlike
from hvcompile.options import parse
from hvcompile.passes import PASSES

SCHEDULES = {number: tuple(range(number)) for number in range(1, 31)}
LADDERS = [*candidates.LADDERS, *(candidates.ladder_of(SCHEDULES, front) for front in candidates.FRONT_BLOCKS)]


def searched(goal: Goal) -> dict[Candidate, Row]:
    """All that is measured until nothing is missing; what may be missing at most never grows."""
    rows: dict[Candidate, Row] = {}
    most = candidates.most_missing(rows, goal, LADDERS)
    while wanted := candidates.missing(rows, goal, LADDERS):
        assert wanted[0] not in rows
        rows[wanted[0]] = law(wanted[0])
        assert candidates.most_missing(rows, goal, LADDERS) < most
        most = candidates.most_missing(rows, goal, LADDERS)
    assert most == 0
    return rows


GOALS = (Goal(psnr=45.0), Goal(worst_psnr=50.0), Goal(speedup=1.7), Goal(psnr=45.0, speedup=1.3), Goal(psnr=200.0))


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_by_few_measurements_the_best_of_all_is_found(goal: Goal) -> None:
    rows = searched(goal)
    assert len(rows) <= 4 * len(LADDERS)
    every = {candidate: law(candidate) for ladder in LADDERS for candidate in ladder}
    chosen, best = goal.choose(rows), goal.choose(every)
    assert (chosen is None) == (best is None)
    if chosen is not None and best is not None:
        assert (every[chosen].reused, every[chosen].psnr) == (every[best].reused, every[best].psnr)
        assert goal.is_met(rows[chosen])


def test_without_a_goal_each_rule_draws_a_curve_until_it_shows_something_else() -> None:
    rows = searched(Goal())
    assert [candidate for candidate in LADDERS[-1] if candidate in rows] == list(LADDERS[-1][::3])
    for ladder in candidates.LADDERS:
        measured = [candidate for candidate in ladder if candidate in rows]
        assert [candidate.threshold for candidate in measured] == list(candidates.COARSE)
    assert candidates.missing(rows, Goal(), LADDERS) == []
    runaway = {Candidate(threshold=0.06): row_of(psnr=19.0)}
    assert candidates.missing(runaway, Goal(), LADDERS)[0] == Candidate(threshold=0.03), "what a goal left out is drawn"
    runaway[Candidate(threshold=0.03)] = row_of(psnr=30.0)
    assert all(item.forecast for item in candidates.missing(runaway, Goal(), LADDERS)), "beyond it nothing is worth it"


def test_every_candidate_is_an_option_of_the_cache_and_comes_back_from_json() -> None:
    every = [candidate for ladder in LADDERS for candidate in ladder]
    assert len(set(map(str, every))) == len(every)
    for candidate in every:
        parse(PASSES, {"first_block_cache": candidate.section()}, None)
        assert Candidate(**json.loads(json.dumps(candidate.section()))) == candidate


def test_the_front_is_what_no_other_beats_each_once() -> None:
    ladder = LADDERS[0]
    places = [(0.1, 50.0), (0.1, 50.0), (0.2, 51.0), (0.3, 40.0), (0.25, 39.0), (0.4, math.inf)]
    rows = {
        candidate: row_of(reused=reused, psnr=psnr) for candidate, (reused, psnr) in zip(ladder, places, strict=False)
    }
    assert candidates.front(rows) == [ladder[5]]
    del rows[ladder[5]]
    assert candidates.front(rows) == [ladder[2], ladder[3]]
    assert candidates.front({ladder[0]: rows[ladder[0]], ladder[1]: rows[ladder[1]]}) == [ladder[0]]


def test_a_row_sums_up_its_clips() -> None:
    row = row_of(reused=0.25, seconds=0.5, psnr=40.0, worst=30.0)
    assert (row.reused, row.speedup, row.psnr, row.worst_psnr, row.temporal_psnr) == (0.25, 4.0, 40.0, 30.0, 30.0)
    identical = dataclasses.replace(row.clips[0], psnr=math.inf, worst_frame_psnr=math.inf)
    assert Row([identical, row.clips[1]]).psnr == 30.0
    assert Row([identical]).psnr == math.inf
    assert [Measured.read(json.loads(json.dumps(clip.record()))) for clip in (identical, *row.clips)] == [
        identical,
        *row.clips,
    ]
    compiled = run_of(np.zeros((1, 4, 4, 3)), seconds=1.0)
    first = dataclasses.replace(compiled.steps[0], seconds=60.0, compiled=True)
    run = dataclasses.replace(compiled, steps=(first, *compiled.steps[1:]))
    assert denoising_seconds(run, 9.0) == pytest.approx(4.0), "a step that compiles counts as a computed one"
    rest = [dataclasses.replace(step, reused=True, seconds=0.1) for step in run.steps[1:]]
    run = dataclasses.replace(run, steps=(first, *rest))
    assert denoising_seconds(run, 2.0) == pytest.approx(2.3), "it tells of no computed one"


def test_what_was_measured_is_kept_and_nothing_of_other_conditions(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", {"model": "a", "prompts": ["x"]}, 2)
    candidate, clip = Candidate(threshold=0.1, forecast=1), np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
    store.rows[candidate], store.reference_seconds, store.schedules = row_of(), [2.0, 2.0], {1: {2: (0, 3)}, 0: {}}
    for place in range(2):
        store.write_reference(place, clip)
    store.keep()
    again = Store(tmp_path / "store", {"prompts": ["x"], "model": "a"}, 2)
    assert again.rows[candidate].clips == row_of().clips
    assert again.schedules == {1: {2: (0, 3)}, 0: {}}
    assert again.has_references()
    second = tmp_path / "store" / "reference" / "1.npy"
    for damaged in (b"", second.read_bytes()[:200]):
        second.write_bytes(damaged)
        assert not again.has_references()
    assert np.array_equal(again.reference(0), rounded(clip))
    assert np.abs(rounded(clip) - clip).max() < 1e-5
    with pytest.raises(InputError, match=r"other conditions: prompts was \[\"x\"\] and is \[\"y\"\]: give another"):
        Store(tmp_path / "store", {"model": "a", "prompts": ["y"]}, 2)
    whole = json.loads((tmp_path / "store" / "results.json").read_text())
    section, clip_record = {"threshold": 0.1}, whole["settings"][0]["clips"][0]
    wrong_clips: tuple[Any, ...] = (
        [],
        [clip_record],
        [{**clip_record, "ssim": "x"}] * 2,
        [{**clip_record, "seconds": 0}] * 2,
    )
    wrong_sections = ({"threshold": "0.1"}, {"threshold": 0.1, "forecast": 7})
    damages: tuple[dict[str, Any], ...] = (
        {"conditions": None},
        {"reference_seconds": 3},
        {"reference_seconds": [math.nan, 2.0]},
        {"schedules": [0, 1]},
        *({"settings": [{"first_block_cache": section, "clips": clips}]} for clips in wrong_clips),
        *({"settings": [{"first_block_cache": wrong, "clips": [clip_record] * 2}]} for wrong in wrong_sections),
    )
    for damage in damages:
        (tmp_path / "store" / "results.json").write_text(json.dumps({**whole, **damage}))
        with pytest.raises(InputError, match=r"results\.json that can't be read"):
            Store(tmp_path / "store", {"model": "a", "prompts": ["x"]}, 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.jpg").touch()
    with pytest.raises(InputError, match="is no earlier tuning: give another directory"):
        Store(tmp_path / "other", {}, 1)


@pytest.fixture(scope="module")
def loaded() -> pipelines.Loaded:
    return pipelines.load()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs cost nothing; gives the settings in their order. See ``tune_cases.begin_world``."""
    made: list[str] = []
    cases.begin_world(made, monkeypatch.setattr)
    return made


def test_a_tuning_ends_in_a_file_that_generate_takes(
    loaded: pipelines.Loaded, world: list[str], tmp_path: Path
) -> None:
    request = Request(
        prompt="a red circle",
        seeds="0-1",
        psnr=45.0,
        backend_settings=("first_block_cache.warmup_steps=1",),
        output=tmp_path / "tuned.json",
        json_file=tmp_path / "all.json",
    )
    seen: list[Any] = []
    outcome = tune.tune(request, seen.append, loaded)
    assert world[0] == "inductor"
    assert world[1] == "repeat at 0", "by which schedules are found"
    assert len(world) == len(set(world)) == len(outcome.rows) + 2
    fronts = {candidate.front_blocks for candidate in outcome.rows if candidate.computed_steps}
    assert fronts == set(candidates.FRONT_BLOCKS)
    assert outcome.chosen is not None
    options = hvcompile.load_options(tmp_path / "tuned.json")
    assert options == {"first_block_cache": {"warmup_steps": 1, **outcome.chosen.section()}}
    parse(PASSES, options, None)
    assert json.loads((tmp_path / "tuned.json").read_text())["made_for"] == {
        **{"num_steps": 4, "sampler": "FlowMatchEulerDiscreteScheduler", "model": "embedded"}
    }
    assert len(json.loads((tmp_path / "all.json").read_text())["settings"]) == len(outcome.rows)
    assert not (tmp_path / "tuned.store" / "reference").exists()
    progress = [event for event in seen if isinstance(event, tune.Progress)]
    assert [event.done for event in progress] == list(range(2 * len(world)))
    assert all(later.most <= earlier.most for earlier, later in itertools.pairwise(progress))
    assert progress[-1].most == 2 * len(world)

    world.clear()
    again = tune.tune(request, loaded=loaded)
    assert (again.chosen, world) == (outcome.chosen, []), "nothing is missing"
    other = tune.tune(dataclasses.replace(request, psnr=52.0), loaded=loaded)
    assert other.chosen is not None
    assert world[0] == "inductor", "its clips were gone"
    assert set(world[1:]).isdisjoint(map(str, outcome.rows))
    plot.plot(other, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_schedule_that_was_made_for_other_steps_is_told_of(
    loaded: pipelines.Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tuned.json"
    made_for = {"num_steps": 30, "sampler": "FlowMatchEulerDiscreteScheduler", "model": "embedded"}
    schedule = {"threshold": 1e9, "computed_steps": [0, 3]}
    path.write_text(json.dumps({"first_block_cache": schedule, "made_for": made_for}))
    run = run_of(np.zeros((1, 4, 4, 3)), num_steps=4)
    words = "the schedule was made for 30 steps, and this is 4 steps: the steps in its list mean other ones here."
    (note,) = notes(Request(prompt="a red circle", options_file=path), loaded, run, ())
    assert note.startswith(f"{path}: {words}")
    hvcompile.load_options(path, num_steps=30)
    assert not caplog.records
    assert hvcompile.load_options(path, num_steps=4) == {"first_block_cache": schedule}
    assert words in caplog.text
    path.write_text(json.dumps({"first_block_cache": {"threshold": 0.1}, "made_for": made_for}))
    assert notes(Request(prompt="a red circle", options_file=path), loaded, run, ()) == (), "it holds of any number"
    assert unlike({"first_block_cache": schedule}, {"model": "./m"}, model="m") == []
    (line,) = unlike({"first_block_cache": schedule}, {"model": "m", "num_steps": None}, model="n", num_steps=3)
    assert "other steps may suit it better" in line
    path.write_text(json.dumps({"made_for": {"num_steps": "30"}}))
    with pytest.raises(InputError, match=r"made_for.num_steps is '30'; allowed is a whole number, or null"):
        hvcompile.load_options(path)
    path.write_text('{"made_for": 3}')
    with pytest.raises(InputError, match="made_for is a int; allowed is an object"):
        hvcompile.load_options(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"vae_tiling": False}, "vae_tiling"), ({"prompt": "a blue box"}, "prompts"), ({"seed": 3}, "seeds")],
)
def test_a_store_serves_one_request_alone(
    change: dict[str, Any], named: str, loaded: pipelines.Loaded, world: list[str], tmp_path: Path
) -> None:
    request = Request(prompt="a red circle", psnr=90.0, output=tmp_path / "tuned.json")
    tune.tune(request, loaded=loaded)
    with pytest.raises(InputError, match=f"is of other conditions: {named} was"):
        tune.tune(dataclasses.replace(request, **change), loaded=loaded)


def test_pictures_of_one_size_are_told_apart() -> None:
    pictures = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "red")]
    first, second, third = map(identity.of_picture, pictures)
    assert first == third != second


def test_a_tuning_that_is_broken_off_goes_on(
    loaded: pipelines.Loaded, world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(prompt="a red circle", worst_psnr=45.0, output=tmp_path / "tuned.json")
    whole = tune.tune(dataclasses.replace(request, store=tmp_path / "whole"), loaded=loaded)
    world.clear()
    make = Runner.run

    def until(self: Any, job: Any, arguments: Any) -> Any:
        if len(world) == 5:
            raise KeyboardInterrupt
        return make(self, job, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", until)
        with pytest.raises(KeyboardInterrupt):
            tune.tune(request, loaded=loaded)
    first = list(world)
    world.clear()
    outcome = tune.tune(request, loaded=loaded)
    assert outcome.chosen == whole.chosen
    assert [*first[:-1], *world] == ["inductor", "repeat at 0", *map(str, whole.rows)], (
        "nothing twice but what was broken off"
    )


def test_a_tuning_that_is_broken_off_in_its_reference_goes_on_as_it_was_or_otherwise(
    loaded: pipelines.Loaded, world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was measured, so that it may go on under other conditions too."""
    request = Request(prompt="a red circle", seeds="0-1", psnr=90.0, output=tmp_path / "tuned.json")
    make, made = Runner.run, itertools.count()

    def until(self: Any, job: Any, arguments: Any) -> Any:
        if next(made) % 2:
            raise KeyboardInterrupt
        return make(self, job, arguments)

    for asked in (request, dataclasses.replace(request, seeds="0-2")):
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "run", until)
            with pytest.raises(KeyboardInterrupt):
                tune.tune(asked, loaded=loaded)
        assert (tmp_path / "tuned.store" / "reference" / "0.npy").exists()
    world.clear()
    tune.tune(dataclasses.replace(request, seeds="0-2"), loaded=loaded)
    assert world[0] == "inductor"


def test_generations_of_one_step_have_nothing_to_tune(
    loaded: pipelines.Loaded, world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "run", lambda *_: run_of(np.zeros((3, 8, 8, 3)), num_reused=0, num_steps=1))
    with pytest.raises(InputError, match=r"of the steps \(1\) none can be timed"):
        tune.tune(Request(prompt="a red circle", output=tmp_path / "tuned.json"), loaded=loaded)
    assert world == ["inductor"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"psnr": -1.0}, "psnr is -1.0: give a finite number above 0"),
        ({"worst_psnr": math.nan}, "worst-psnr is nan"),
        ({"speedup": 0.0}, "speedup is 0.0"),
        ({"mode": "exact"}, "mode 'exact' switches the cache off"),
        (
            {"backend_settings": ("first_block_cache.threshold=0.1",)},
            "first_block_cache.threshold is given, which tune",
        ),
        ({"backend_settings": ("first_block_cache=false",)}, "first_block_cache is given, which tune looks for"),
        ({"output": Path("tuned.txt")}, "is no JSON file"),
        ({"json_file": Path("tuned.json")}, "is the file of output too"),
        ({"prompt": None}, "there is no prompt"),
        ({"prompt": None, "prompts_file": Path("missing.txt")}, "prompts 'missing.txt' can't be read"),
    ],
)
def test_what_is_wrong_is_refused_before_loading(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        Request(**{"prompt": "x", **given}).check()


def test_the_command_says_what_no_setting_reaches(
    loaded: pipelines.Loaded, world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "load", lambda *_, **__: loaded)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["tune", "a red circle", "--psnr", "90"])
    assert result.exit_code == 1
    assert "no setting meets the goal, so no options were written: the table has what each reaches" in result.output
    assert not Path("tuned.json").exists()
    Path("tuned.json").write_text("{}")
    result = CliRunner().invoke(app, ["tune", "a red circle", "--psnr", "90"])
    assert "tuned.json is left as it was, of an earlier goal" in result.output
    result = CliRunner().invoke(app, ["tune", "a red circle", "--store", "curve"])
    assert result.exit_code == 0, result.output
    assert "no goal was given" in result.output
    assert "forecast 2, by error at 0.3" in result.output


@pytest.mark.ranks
@pytest.mark.parametrize("dying", [1, pytest.param(0, marks=SLOW)], ids=["another", "the first"])
def test_ranks_tune_as_one_does_and_end_with_one_of_them(
    dying: int, loaded: pipelines.Loaded, world: list[str], tmp_path: Path
) -> None:
    """All make the same settings; the first alone keeps and writes what one rank would."""
    (tmp_path / "alone").mkdir()
    alone = tune.tune(cases.request_in(tmp_path / "alone"), loaded=loaded)
    ended = ranks.launch(cases.of_all_ranks, 2, str(tmp_path), dying)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [world, world]
    assert hvcompile.load_options(tmp_path / "whole" / "tuned.json") == alone.options
    written = [json.loads((tmp_path / folder / "all.json").read_text()) for folder in ("alone", "whole")]
    for item in written:
        del item["conditions"]["ranks"], item["conditions"]["backend"]
    assert written[0] == written[1], "the schedules too, of what each rank has of the streams"

    num_rows, num_begun, error = ended[1 - dying].result
    assert "for another, which has ended or hangs" in error
    assert (ended[dying].exit_code, num_begun) == (9, 4)
    assert num_rows == (len(alone.rows) if dying else 0)
    kept = json.loads((tmp_path / "broken" / "tuned.store" / "results.json").read_text())
    assert len(kept["settings"]) == 1


@pytest.mark.ranks
@SLOW
def test_ranks_measure_what_one_does(tmp_path: Path) -> None:
    """The tiny pipeline, compiled, its sequence split."""
    (alone,) = ranks.results(ranks.launch(cases.of_the_tiny_pipeline, 1, str(tmp_path), limit=1500.0))
    first, second = ranks.results(ranks.launch(cases.of_the_tiny_pipeline, 2, str(tmp_path), limit=1500.0))
    assert second == []
    assert [row[:3] for row in first] == [row[:3] for row in alone]
    assert any(row[1] for row in first), "schedules too"
    assert all(abs(one[3] - other[3]) < 0.01 for one, other in zip(first, alone, strict=True))


@SLOW
@pytest.mark.parametrize("settings", [("lower=eager",), ("lower=eager", "fp8=true")], ids=["plain", "fp8"])
def test_a_tuning_of_the_tiny_pipeline_keeps_what_it_promises(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "LADDERS", [ladder[5:8] for ladder in LADDERS[1:3]])
    monkeypatch.setattr(tune, "LADDERS", candidates.LADDERS)
    monkeypatch.chdir(tmp_path)
    prompt = "a red circle moves to the left over a blue background"
    outcome = tune.tune(Request(prompt=prompt, steps=10, psnr=30.0, backend_settings=settings), loaded=pipelines.load())
    assert outcome.chosen is not None
    row = outcome.rows[outcome.chosen]
    assert row.psnr >= 30.0
    assert row.reused > 0
