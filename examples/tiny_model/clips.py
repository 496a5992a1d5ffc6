"""Procedural clips of moving shapes with captions: the data that the embedded tiny HunyuanVideo is trained on.

Everything follows from one integer, the seed of a clip, so a data set is a range of integers. Some combinations of
colour, shape, direction and background are held out: no training clip has them, and the checks use nothing else.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

NUM_FRAMES: Final = 17
HEIGHT: Final = 32
WIDTH: Final = 48

COLOURS: Final = {
    "red": (220, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 230, 50),
    "green": (35, 165, 65),
    "blue": (45, 85, 230),
    "purple": (160, 45, 190),
    "white": (245, 245, 245),
    "grey": (125, 125, 125),
    "black": (15, 15, 15),
}
"""RGB, 0 to 255, of every colour word."""

OBJECT_COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "white")
BACKGROUNDS: Final = ("black", "white", "grey", "blue", "green")
SHAPES: Final = ("circle", "square", "triangle", "diamond")
SIZES: Final = {"small": 4.0, "": 5.5, "big": 7.0}
"""Radius in pixels of a circle of that size; the other shapes have about the area of that circle."""
SPEEDS: Final = {"slowly": 6.0, "": 11.0, "quickly": 16.0}
"""Pixels moved from the first frame to the last."""
DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit vector (x, y) of a direction; y grows downwards."""
PHRASES: Final = {
    "left": ("moves to the left", "moves left"),
    "right": ("moves to the right", "moves right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "falls"),
}
BOUNCES: Final = {"right": "bounces left and right", "down": "bounces up and down"}
"""What a bounce along the axis of a direction is called."""

_HELD_OUT_OF: Final = 8
_SHARE_BOUNCING: Final = 0.1
_SHARE_CROSSING: Final = 0.15

Pixels = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: how it looks and where its centre is at each frame.

    Attributes:
        colour: a key of ``COLOURS``.
        shape: one of ``SHAPES``.
        size: a key of ``SIZES``.
        phrase: what it does, in words.
        centres: (x, y) in pixels, a pair a frame.

    """

    colour: str
    shape: str
    size: str
    phrase: str
    centres: tuple[tuple[float, float], ...]

    @property
    def words(self) -> str:
        """The object as a clause: article, size, colour, shape, and what it does."""
        return " ".join(word for word in ("a", self.size, self.colour, self.shape, self.phrase) if word)

    def coverage(self, scale: int = 1) -> Pixels:
        """Share of each pixel that the object covers: (frames, height, width), 0 to 1, edges antialiased.

        With ``scale`` the picture has so many pixels in the place of one along each side.
        """
        centres = np.array(self.centres, np.float32)
        x, y = (((np.arange(extent * scale) + 0.5) / scale - 0.5).astype(np.float32) for extent in (WIDTH, HEIGHT))
        across, down = x[None, None, :] - centres[:, 0, None, None], y[None, :, None] - centres[:, 1, None, None]
        distance = scale * _distance(self.shape, across, down, SIZES[self.size])
        coverage: Pixels = np.clip(0.5 - distance, 0, 1).astype(np.float32)
        return coverage


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A captioned clip.

    Attributes:
        things: the objects, the one behind first.
        background: a key of ``COLOURS``.
        direction: where a single moving object goes, a key of ``DIRECTIONS``; "" for bounces and crossings.

    """

    things: tuple[Thing, ...]
    background: str
    direction: str

    @property
    def caption(self) -> str:
        """The clip in words of the grammar."""
        return f"{' and '.join(thing.words for thing in self.things)} over a {self.background} background"

    def frames(self, scale: int = 1) -> Pixels:
        """Draw the clip, ``scale`` times as large: (frames, height, width, 3), 0 to 1."""
        picture = np.broadcast_to(_rgb(self.background), (NUM_FRAMES, scale * HEIGHT, scale * WIDTH, 3))
        for thing in self.things:
            coverage = thing.coverage(scale)[..., None]
            picture = picture * (1 - coverage) + _rgb(thing.colour) * coverage
        return picture.astype(np.float32)


def make(seed: int, *, held_out: bool = False) -> Clip:
    """Make the clip of a seed; ``held_out`` gives a single moving object of a held-out combination."""
    rng = random.Random(f"{seed} {held_out}")
    while True:
        background = rng.choice(BACKGROUNDS)
        kind = 1.0 if held_out else rng.random()
        if kind < _SHARE_BOUNCING:
            clip = Clip(things=(_bouncing(rng, background),), background=background, direction="")
            keys = [next(way for way, phrase in BOUNCES.items() if phrase == clip.things[0].phrase)]
        elif kind < _SHARE_BOUNCING + _SHARE_CROSSING:
            things, keys = _crossing(rng, background)
            clip = Clip(things=things, background=background, direction="")
        else:
            direction = rng.choice(list(DIRECTIONS))
            thing = _moving(rng, background, direction)
            clip, keys = Clip(things=(thing,), background=background, direction=direction), [direction]
        # a crossing counts as held out where either of its objects is
        is_held_out = any(
            holds_out(thing.colour, thing.shape, direction, background)
            for thing, direction in zip(clip.things, keys, strict=True)
        )
        if is_held_out == held_out:
            return clip


def crowd(seed: int, num_things: int = 8) -> Clip:
    """Make a clip of many moving objects: no caption's, but every part of it teaches the VAE something."""
    rng = random.Random(f"{seed} crowd")
    background = rng.choice(list(COLOURS))
    things = tuple(_moving(rng, background, rng.choice(list(DIRECTIONS))) for _ in range(num_things))
    return Clip(things=things, background=background, direction="")


def holds_out(colour: str, shape: str, direction: str, background: str) -> bool:
    """Whether the combination is kept from training: one in eight is."""
    return zlib.crc32(f"{colour} {shape} {direction} {background}".encode()) % _HELD_OUT_OF == 0


def _moving(rng: random.Random, background: str, direction: str) -> Thing:
    colour, shape, size = _look(rng, background)
    speed = rng.choice(list(SPEEDS))
    phrase = " ".join(word for word in (rng.choice(PHRASES[direction]), speed) if word)
    path = np.linspace(0, SPEEDS[speed], NUM_FRAMES)
    return Thing(colour=colour, shape=shape, size=size, phrase=phrase, centres=_place(rng, direction, path, size))


def _bouncing(rng: random.Random, background: str) -> Thing:
    colour, shape, size = _look(rng, background)
    direction = rng.choice(list(BOUNCES))
    turns = np.linspace(0, 3, NUM_FRAMES)  # there, back, there
    path = SPEEDS[""] * np.abs((turns + 1) % 2 - 1)
    centres = _place(rng, direction, path, size)
    return Thing(colour=colour, shape=shape, size=size, phrase=BOUNCES[direction], centres=centres)


def _crossing(rng: random.Random, background: str) -> tuple[tuple[Thing, ...], list[str]]:
    """Two objects of unlike colours pass each other, in opposite directions, on lines a few pixels apart."""
    ways = rng.choice([["left", "right"], ["right", "left"], ["up", "down"], ["down", "up"]])
    axis = 0 if ways[0] in ("left", "right") else 1
    looks = [_look(rng, background), _look(rng, background)]
    while looks[0][0] == looks[1][0]:
        looks[1] = _look(rng, background)
    travel = 16.0
    middle = [(WIDTH - 1) / 2, (HEIGHT - 1) / 2]
    middle[0] += rng.uniform(-8, 8)
    middle[1] += rng.uniform(-3, 3)
    things = []
    for sign, direction, (colour, shape, size) in zip((-1, 1), ways, looks, strict=True):
        forward = DIRECTIONS[direction][axis]
        centres = []
        for along in np.linspace(-travel / 2, travel / 2, NUM_FRAMES):
            point = list(middle)
            point[axis] += forward * along
            point[1 - axis] += sign * 2
            centres.append((point[0], point[1]))
        phrase = PHRASES[direction][0]
        things.append(Thing(colour=colour, shape=shape, size=size, phrase=phrase, centres=tuple(centres)))
    return tuple(things), ways


def _look(rng: random.Random, background: str) -> tuple[str, str, str]:
    colour = rng.choice([colour for colour in OBJECT_COLOURS if colour != background])
    return colour, rng.choice(SHAPES), rng.choice(list(SIZES))


def _place(
    rng: random.Random, direction: str, path: npt.NDArray[np.float64], size: str
) -> tuple[tuple[float, float], ...]:
    """Put a path (pixels along ``direction``) where the object stays within the picture."""
    step = np.array(DIRECTIONS[direction])
    offsets = path[:, None] * step
    margin = SIZES[size]
    start = [
        rng.uniform(margin - offsets[:, axis].min(), extent - 1 - margin - offsets[:, axis].max())
        for axis, extent in enumerate((WIDTH, HEIGHT))
    ]
    return tuple((float(x), float(y)) for x, y in offsets + np.array(start))


def _distance(shape: str, x: Pixels, y: Pixels, radius: float) -> Pixels:
    """Signed distance in pixels (close to the edge) from a shape centred at the origin; negative inside."""
    if shape == "circle":
        circle: Pixels = np.hypot(x, y) - radius
        return circle
    if shape == "square":
        square: Pixels = np.maximum(np.abs(x), np.abs(y)) - 0.89 * radius
        return square
    if shape == "diamond":
        diamond: Pixels = (np.abs(x) + np.abs(y) - 1.25 * radius) / math.sqrt(2)
        return diamond
    corner = 1.4 * radius  # from the centre of the triangle, which points up, to its corners
    triangle: Pixels = np.maximum(y - corner / 2, math.sqrt(3) / 2 * np.abs(x) - (y + corner) / 2)
    return triangle


def _rgb(colour: str) -> Pixels:
    return np.array(COLOURS[colour], np.float32) / 255
