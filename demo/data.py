"""Synthetic clips for the demo model: a moving colored shape, a tone, and a caption.

`render`, `sound` and `caption` turn a scene into frames, a stereo waveform and a sentence.
Frequencies are multiples of 100 Hz and clicks fall on
hundredths of a second, so that a mel frame (10 ms) determines the phase of its sound.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SIZE, FRAMES, FPS = 96, 25, 24.0
DURATION = FRAMES / FPS

COLORS = {
    "red": (220, 45, 45),
    "yellow": (235, 210, 45),
    "green": (50, 175, 65),
    "cyan": (50, 200, 215),
    "blue": (50, 80, 225),
    "purple": (165, 60, 205),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("right", "left", "up", "down", "still", "growing", "bouncing")
BACKGROUNDS = {"dark": 28, "light": 228}
PITCHES = {"low": 200, "middle": 500, "high": 1200}
TIMBRES = ("pure", "buzzing")


@dataclasses.dataclass
class Scene:
    """Attributes of a clip; lengths in frame widths, times in seconds, colors 0-255."""

    shape: str
    color: str
    motion: str
    background: str
    pitch: str
    timbre: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.2
    travel: float = 0.48
    first_contact: float = 0.3
    rgb: tuple = ()
    gray: float = -1.0

    def __post_init__(self):
        self.rgb = self.rgb or COLORS[self.color]
        self.gray = self.gray if self.gray >= 0 else BACKGROUNDS[self.background]


def sample_scene(rng: np.random.Generator, **fixed: str) -> Scene:
    """A random scene with some attributes fixed."""
    choices = dict(
        shape=SHAPES,
        color=tuple(COLORS),
        motion=MOTIONS,
        background=tuple(BACKGROUNDS),
        pitch=tuple(PITCHES),
        timbre=TIMBRES,
    )
    named = {k: fixed.get(k) or v[rng.integers(len(v))] for k, v in choices.items()}
    return Scene(
        **named,
        x=rng.uniform(0.38, 0.62),
        y=rng.uniform(0.38, 0.62),
        radius=rng.uniform(0.17, 0.22),
        travel=rng.uniform(0.44, 0.52),
        first_contact=int(rng.integers(25, 36)) / 100,
        rgb=tuple(float(c + rng.uniform(-6, 6)) for c in COLORS[named["color"]]),
        gray=BACKGROUNDS[named["background"]] + rng.uniform(-6, 6),
    )


FLOOR, BOUNCE_HEIGHT, BOUNCE_PERIOD = 0.76, 0.42, 0.5


def trajectory(
    scene: Scene, t: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Center x, center y and radius at times t (seconds), in frame widths, y downwards."""
    progress = t / DURATION - 0.5
    x, y, radius = (np.full_like(t, v) for v in (scene.x, scene.y, scene.radius))
    if scene.motion in ("right", "left"):
        x = 0.5 + scene.travel * progress * (1 if scene.motion == "right" else -1)
    elif scene.motion in ("down", "up"):
        y = 0.5 + scene.travel * progress * (1 if scene.motion == "down" else -1)
    elif scene.motion == "growing":
        radius = scene.radius * (1.0 + 0.9 * progress)
    elif scene.motion == "bouncing":
        phase = (t - scene.first_contact) / BOUNCE_PERIOD % 1.0
        y = FLOOR - BOUNCE_HEIGHT * 4 * phase * (1 - phase)
    return x, y, radius


def contacts(scene: Scene) -> np.ndarray:
    """Times (seconds) at which a bouncing shape touches the floor."""
    if scene.motion != "bouncing":
        return np.zeros(0)
    return np.arange(scene.first_contact, DURATION - 0.05, BOUNCE_PERIOD)


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray):
    """Share of a pixel at (dx, dy) from the center that the shape covers, 0 to 1."""
    if shape == "circle":
        outside = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        outside = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    else:
        side = (np.abs(dx) * 2.0 - (dy + 1.1 * radius)) / np.sqrt(5.0)
        outside = np.maximum(side, dy - 0.9 * radius)
    return np.clip(0.5 - outside * SIZE / 1.6, 0.0, 1.0)


def render(scene: Scene, frames=range(FRAMES)) -> np.ndarray:
    """Frames by index, uint8 (F, SIZE, SIZE, 3)."""
    t = np.asarray(frames, np.float32) / np.float32(FPS)
    x, y, radius = (v[:, None, None] for v in trajectory(scene, t))
    pixel = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    cover = coverage(
        scene.shape, pixel[None, None] - x, pixel[None, :, None] - y, radius
    )
    gray, rgb = np.float32(scene.gray), np.asarray(scene.rgb, np.float32)
    return (gray + cover[..., None] * (rgb - gray) + 0.5).astype(np.uint8)


def sound(scene: Scene, rate: int) -> np.ndarray:
    """The stereo waveform (samples, 2), float32 in [-1, 1], at `rate` samples a second."""
    t = np.arange(round(DURATION * rate)) / rate
    harmonics = range(1, 2 if scene.timbre == "pure" else 6)
    tone = sum(np.sin(2 * np.pi * k * PITCHES[scene.pitch] * t) / k for k in harmonics)
    tone *= 0.3 / (1.0 if scene.timbre == "pure" else 1.7)
    for contact in contacts(scene):
        since = np.maximum(t - contact, 0.0)
        tone += 0.5 * np.exp(-since / 0.004) * np.sin(2 * np.pi * 3000 * since)
    angle = (0.1 + 0.8 * trajectory(scene, t)[0]) * np.pi / 2
    return np.stack([tone * np.cos(angle), tone * np.sin(angle)], -1).astype(np.float32)


WORDS = {
    "red": ("red", "scarlet", "crimson"),
    "yellow": ("yellow", "golden", "lemon yellow"),
    "green": ("green", "emerald", "grass green"),
    "cyan": ("cyan", "turquoise", "teal"),
    "blue": ("blue", "navy blue", "deep blue"),
    "purple": ("purple", "violet", "magenta"),
    "circle": ("circle", "disc", "ball", "disk", "round shape", "dot"),
    "square": ("square", "box", "block", "square shape"),
    "triangle": ("triangle", "triangular shape", "pyramid"),
    "dark": ("dark", "black", "dim", "night"),
    "light": ("light", "white", "bright", "pale"),
    "low": ("low", "deep", "low pitched", "bass"),
    "middle": ("middle", "medium", "mid", "medium pitched"),
    "high": ("high", "high pitched", "shrill", "treble"),
    "pure": ("pure", "soft", "clean", "smooth"),
    "buzzing": ("buzzing", "rough", "harsh", "raspy"),
}
GO = ("move", "slide", "glide", "travel", "go", "drift", "fly", "run", "float", "head")
PHRASES = {
    "right": (
        "{go} from left to right|{go} from the left to the right|{go} to the right|{go} right"
        "|{go} rightwards|{go} towards the right|{go} from the left side to the right side"
        "|{go} toward the right edge|cross the frame from left to right"
        "|start on the left and end on the right|enter from the left and {go} to the right"
    ),
    "left": (
        "{go} from right to left|{go} from the right to the left|{go} to the left|{go} left"
        "|{go} leftwards|{go} towards the left|{go} from the right side to the left side"
        "|{go} toward the left edge|cross the frame from right to left"
        "|start on the right and end on the left|enter from the right and {go} to the left"
    ),
    "up": (
        "{go} up|{go} upwards|{go} upward|rise|rise to the top|climb|ascend|{go} to the top"
        "|{go} from bottom to top|{go} from the bottom to the top|lift up|{go} towards the top"
        "|start at the bottom and end at the top"
    ),
    "down": (
        "{go} down|{go} downwards|{go} downward|fall|sink|sink to the bottom|descend"
        "|{go} to the bottom|{go} from top to bottom|{go} from the top to the bottom"
        "|drop down|{go} towards the bottom|start at the top and end at the bottom"
    ),
    "still": (
        "stay still|stand still|do not move|rest in place|remain motionless|stay in place"
        "|hang motionless|remain still|stay where it is|keep still|be stationary"
    ),
    "growing": (
        "grow|grow bigger|get bigger|get larger|become larger|become bigger|expand|swell"
        "|grow in size|increase in size|keep growing"
    ),
    "bouncing": (
        "bounce|bounce up and down|bounce on the floor|hop|hop up and down|jump up and down"
        "|keep bouncing|bounce off the ground|bounce with a click"
    ),
}
IRREGULAR = {
    "go": ("goes", "going"),
    "fly": ("flies", "flying"),
    "cross": ("crosses", "crossing"),
    "run": ("runs", "running"),
    "be": ("is", "being"),
    "do": ("does", "not moving"),
    "get": ("gets", "getting"),
    "hop": ("hops", "hopping"),
    "drop": ("drops", "dropping"),
}
SUBJECTS = (
    "a {c} {s}|the {c} {s}|one {c} {s}|a small {c} {s}|a large {c} {s}|a plain {c} {s}"
    "|a {s} that is {c}|a simple {c} {s}|a single {c} {s}|{c} {s}|a {s} in {c}|a big {c} {s}"
)
OPENINGS = (
    "|||||a video of |a clip of |an animation of |we see |there is |this is |video: "
    "|a short animation of |the scene shows |in this clip |a simple scene with |look: "
)
BACKDROPS = (
    "on a {b} background|against a {b} background|in front of a {b} background"
    "|over a {b} backdrop|on {b}|the background is {b}|with a {b} background"
    "|the backdrop is {b}|on a plain {b} background"
)
SOUNDS = (
    "a {p} {n} plays|with a {p} {n}|while a {p} {n} sounds|accompanied by a {p} {n}"
    "|a {p} {n} is heard|we hear a {p} {n}|to the sound of a {p} {n}|as a {p} {n} plays"
    "|and a {p} {n}|making a {p} {n}|the {n} is {p}|the sound is a {p} {n}|sound: {p} {n}"
    "|it hums a {p} {n}|with {p} sound|humming at a {p} pitch|a {n} of {p} pitch is heard"
)
NOUNS = ("tone", "note", "sound", "hum", "beep", "tone", "pitch", "whistle")
FILLERS = (
    "slowly gently nicely then now quietly smoothly steadily calm minimal digital abstract "
    "here again very just quite evenly screen picture cartoon geometric flat style view"
).split()
# Wordings held out from training, for evaluation.
UNSEEN = (
    "{S} which is {ing}, {B}, and there is a {p} {n}",
    "you can watch {S} {ing} {B} and listen to a {p} {n}",
    "{p} {n}, {S}, {ing}, {B}",
    "{B} please show me {S}; it should {base} and play a {p} {n}",
    "imagine {S}. it {v}. {B}. then a {p} {n} can be heard",
    "an image sequence where {S} {v} {B} along with a {p} {n} in stereo",
)


def pick(rng: np.random.Generator, options) -> str:
    """A random item of a tuple, or of a string's alternatives separated by |."""
    options = options.split("|") if isinstance(options, str) else options
    return options[rng.integers(len(options))]


def conjugate(phrase: str, form: int) -> str:
    """Third person (form 0) or participle (form 1) of a phrase that starts with its verb."""
    parts = phrase.split(" and ") if phrase.startswith(("start", "enter")) else [phrase]
    done = []
    for part in parts:
        verb, _, rest = part.partition(" ")
        if verb in IRREGULAR:
            verb = IRREGULAR[verb][form]
            rest = "" if verb == "not moving" else rest
        elif form == 0:
            verb += "s"
        else:
            verb = (verb[:-1] if verb.endswith("e") else verb) + "ing"
        done.append(f"{verb} {rest}".strip())
    return " and ".join(done)


def caption(scene: Scene, rng: np.random.Generator, unseen: bool = False) -> str:
    """A caption of the scene in a training wording, or in one held out from training."""

    def word(name, plain=0.5):
        return name if rng.random() < plain else pick(rng, WORDS[name])

    subject = pick(rng, SUBJECTS).format(c=word(scene.color), s=word(scene.shape))
    phrase = pick(rng, PHRASES[scene.motion]).format(go=pick(rng, GO))
    backdrop = pick(rng, BACKDROPS).format(b=word(scene.background))
    pitch = word(scene.pitch)
    if rng.random() < 0.6:
        pair = [word(scene.timbre), pitch]
        pitch = " ".join(pair if rng.random() < 0.5 else pair[::-1])
    if unseen:
        return pick(rng, UNSEEN).format(
            S=subject,
            v=conjugate(phrase, 0),
            ing=conjugate(phrase, 1),
            base=phrase,
            B=pick(rng, BACKDROPS.split("|")[:4]).format(b=word(scene.background)),
            p=pitch,
            n=pick(rng, NOUNS),
        )
    heard = pick(rng, SOUNDS).format(p=pitch, n=pick(rng, NOUNS))
    if rng.random() < 0.4:
        seen = f"{pick(rng, OPENINGS)}{subject} {conjugate(phrase, 1)}"
    else:
        it = pick(rng, " | that | which |, it |. it |; the shape ")
        seen = f"{pick(rng, OPENINGS)}{subject}{it}{conjugate(phrase, 0)}"
    parts = [seen, heard]
    if rng.random() < 0.8:
        parts.insert(rng.integers(3), backdrop)
    elif rng.random() < 0.3:
        parts.reverse()
    text = pick(rng, ", |. | |; |, and ").join(parts)
    if rng.random() < 0.3:
        words = text.split(" ")
        words.insert(rng.integers(len(words) + 1), pick(rng, FILLERS))
        text = " ".join(words)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + pick(rng, "|.|.|!")
