"""The built-in demo data set: small h264 videos of one textured sprite that moves over a textured background.

The 8 classes differ only in motion, so that a network that sees single frames stays at chance:
- Each of 24 backgrounds is equally frequent in every class and has a random offset. Sprites have random shapes, colours
  and textures.
- In a random frame, the sprite's position (uniform, the picture wraps around), size and angle have the same
  distribution in all classes. A property that a class does not change is drawn once per video, from the distribution
  that the other classes sweep through.
- A horizontal flip, which training applies, does not change the class: left and right are one class, and so are the two
  directions of rotation.
"""

import json
from pathlib import Path

import numpy as np

from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.files import atomic_write
from dclr.lock import folder_lock
from dclr.progress import ProgressBar

SIZE = 64
"""Height and width in pixels."""
FRAMES = 40
FPS = 25
BACKGROUNDS = 24

CLASSES = ("up", "down", "across", "spin", "grow", "shrink", "circle", "shake")
"""across: moves left or right; spin: turns on the spot; circle: moves on a circle; shake: trembles. Spin and circle go
in both directions."""

_RADII = (10.0, 22.0)
"""Smallest and largest radius of the sprite in pixels. The logarithm of the radius is uniform, as in a steady
growth."""

_VERSION = 1
"""Version of the pictures: raise it when they change, so that older renderings are replaced."""


def render_demo(
    folder: Path, *, train_per_class: int = 24, test_per_class: int = 8, seed: int = 0, progress: bool = True
) -> Path:
    """Write folder/videos/<class>/<class>_0000.mp4 ... and folder/splits/{train,test,classes}.txt. Returns the folder.

    A line of a list is `path label group`. The group is the background, scene00 to scene23. A folder that is complete
    for the same numbers and seed is left unchanged. The same seed gives the same pixels before encoding. If several
    processes call this at the same time, one of them renders and the others wait.

    Raises:
        UserError: the folder cannot be written.
    """
    settings = {"version": _VERSION, "train_per_class": train_per_class, "test_per_class": test_per_class, "seed": seed}
    done = folder / "demo.json"

    def is_complete() -> bool:
        return done.is_file() and done.read_text() == json.dumps(settings)

    if is_complete():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, wait=True):
            if not is_complete():  # another process may have rendered them while this one waited
                done.unlink(missing_ok=True)
                _render(folder, train_per_class, test_per_class, seed, progress)
                # demo.json is written last and atomically: it marks a complete folder.
                atomic_write(done, json.dumps(settings).encode())
    except OSError as error:
        raise UserError(f"cannot write the demo videos to {folder}: {error}") from error
    return folder


def _render(folder: Path, train_per_class: int, test_per_class: int, seed: int, progress: bool) -> None:
    """Write the videos and the lists. Raises OSError."""
    scenes = _scenes(seed)
    order = np.random.default_rng([seed, 1]).permutation(BACKGROUNDS)
    lists: dict[str, list[str]] = {"train": [], "test": []}
    per_class = train_per_class + test_per_class
    with ProgressBar(len(CLASSES) * per_class, "rendering demo videos", "video", shown=progress) as bar:
        for label, name in enumerate(CLASSES):
            (folder / "videos" / name).mkdir(parents=True, exist_ok=True)
            for index in range(per_class):
                scene = int(order[index % BACKGROUNDS])  # the same for every class
                path = f"videos/{name}/{name}_{index:04d}.mp4"
                rng = np.random.default_rng([seed, 2, label, index])
                write_video(folder / path, render_video(name, scenes[scene], rng), fps=FPS)
                lists["train" if index < train_per_class else "test"].append(f"{path} {label} scene{scene:02d}\n")
                bar.advance()
    (folder / "splits").mkdir(exist_ok=True)
    for split, lines in lists.items():
        (folder / "splits" / f"{split}.txt").write_text("".join(lines))
    (folder / "splits" / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def render_video(
    name: str,
    scene: np.ndarray,  # (S, S, 3) float32 in [0, 1], repeats seamlessly
    rng: np.random.Generator,
) -> np.ndarray:
    """Render one video of a class: (FRAMES, SIZE, SIZE, 3) uint8."""
    background = np.roll(scene, rng.integers(0, len(scene), 2), axis=(0, 1))[:SIZE, :SIZE]
    sprite = _sprite(rng)
    y, x, radius, angle = _trajectory(name, rng)

    # The position of each pixel of each frame on the sprite. Offsets wrap, so a sprite that leaves at the top comes in
    # at the bottom.
    pixels = np.arange(SIZE, dtype=np.float32)
    dy = (pixels[None, :, None] - y[:, None, None] + SIZE / 2) % SIZE - SIZE / 2  # (T, H, 1)
    dx = (pixels[None, None, :] - x[:, None, None] + SIZE / 2) % SIZE - SIZE / 2  # (T, 1, W)
    cos, sin = (np.cos(angle) / radius)[:, None, None], (np.sin(angle) / radius)[:, None, None]
    colour = _sampled(sprite, cos * dy - sin * dx, sin * dy + cos * dx)  # (T, H, W, 4)
    opacity = colour[..., 3:]
    return np.rint(255 * (opacity * colour[..., :3] + (1 - opacity) * background)).astype(np.uint8)


def _trajectory(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return y, x, radius (pixels) and angle (radians) of the sprite in each frame, each (FRAMES,) float32.

    All random numbers are drawn for every class, so that their distributions cannot differ between classes.
    """
    time = np.arange(FRAMES) / FRAMES  # 0 to 1
    y, x = rng.uniform(0, SIZE, 2)
    smallest, largest = np.log(_RADII)
    log_radius = rng.uniform(smallest, largest)
    angle, phase, axis = rng.uniform(0, 2 * np.pi, 3)
    sense = rng.choice([-1, 1])
    speed = rng.uniform(0.8, 1.25)  # 1: the class's normal speed

    match name:
        case "up":
            y = y - 1.5 * SIZE * speed * time
        case "down":
            y = y + 1.5 * SIZE * speed * time
        case "across":
            x = x + 1.5 * SIZE * speed * sense * time
        case "spin":
            angle = angle + 2 * np.pi * 1.2 * speed * sense * time
        case "grow":  # over the whole range at normal speed: a jump back to the start would reveal the class
            log_radius = smallest + (largest - smallest) * time
        case "shrink":
            log_radius = largest - (largest - smallest) * time
        case "circle":
            turn = phase + 2 * np.pi * 1.6 * speed * sense * time
            y, x = y + 11 * np.sin(turn), x + 11 * np.cos(turn)
        case "shake":  # about 7 frames per period, so that clips of every second frame still show it
            swing = 3.5 * np.sin(phase + 2 * np.pi * 5.7 * speed * time)
            y, x = y + swing * np.sin(axis), x + swing * np.cos(axis)
        case _:
            raise ValueError(f"no such demo class: {name}")
    by_frame = np.broadcast_arrays(y, x, np.exp(log_radius), angle, time)[:4]
    y, x, radius, angle = (values.astype(np.float32) for values in by_frame)
    return y, x, radius, angle


def _sprite(rng: np.random.Generator) -> np.ndarray:
    """Draw a sprite, (48, 48, 4) float32 in [0, 1]: bright and dark patches of colour, and opacity.

    The shape is random between ellipse and rectangle. It is longer than wide, so that its rotation is visible.
    """
    v, u = np.meshgrid(*[np.linspace(-1.15, 1.15, 48)] * 2, indexing="ij")
    aspect = rng.uniform(1.25, 1.7)
    power = rng.uniform(2, 6)  # 2: ellipse; 6: nearly a rectangle
    distance = (np.abs(v) ** power + np.abs(u * aspect) ** power) ** (1 / power)
    opacity = np.clip((1 - distance) * 8 + 0.5, 0, 1)

    frequency, direction, phase = rng.uniform(3, 6), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
    stripes = np.sin(frequency * (np.cos(direction) * v + np.sin(direction) * u) + phase)
    mix = np.clip(stripes * 3 + 0.5, 0, 1)[..., None]
    bright, dark = rng.uniform(0.6, 1, 3), rng.uniform(0, 0.35, 3)
    rim = np.clip((distance[..., None] - 0.8) * 10, 0, 1)  # a dark rim separates it from any background
    colour = (mix * bright + (1 - mix) * dark) * (1 - 0.8 * rim)
    return np.concatenate([colour, opacity[..., None]], axis=-1).astype(np.float32)


def _sampled(sprite: np.ndarray, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Interpolate a sprite (R, R, 4) bilinearly at v, u, given in sprite radii from its centre."""
    resolution = len(sprite)
    row = np.clip((v / 1.15 + 1) / 2 * (resolution - 1), 0, resolution - 1.001)
    column = np.clip((u / 1.15 + 1) / 2 * (resolution - 1), 0, resolution - 1.001)
    top, left = row.astype(np.intp), column.astype(np.intp)
    down, right = (row - top)[..., None], (column - left)[..., None]
    upper = sprite[top, left] * (1 - right) + sprite[top, left + 1] * right
    lower = sprite[top + 1, left] * (1 - right) + sprite[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def _scenes(seed: int) -> np.ndarray:
    """Return the backgrounds, (BACKGROUNDS, 2 SIZE, 2 SIZE, 3) float32 in [0, 1]: sums of sinusoids that tile
    seamlessly."""
    size = 2 * SIZE
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    scenes = np.empty((BACKGROUNDS, size, size, 3), dtype=np.float32)
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, 0, number])
        pattern = np.zeros((size, size, 3))
        for _ in range(10):
            waves = rng.integers(-9, 10, 2)  # whole waves across the picture, so that its edges match
            phase = 2 * np.pi * (waves[0] * rows + waves[1] * columns) / size + rng.uniform(0, 2 * np.pi)
            pattern += np.sin(phase)[..., None] * rng.normal(size=3)
        scene[:] = np.clip(rng.uniform(0.3, 0.7, 3) + 0.15 * pattern / pattern.std(), 0, 1)
    return scenes
