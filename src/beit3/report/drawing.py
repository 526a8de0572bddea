"""What was found in a picture, drawn onto it: boxes with names and scores, masks, and maps of
labels with a legend.

Shapes: pictures uint8 [H, W, 3], labels int [H, W], objects as predictions hold them -> Pillow
pictures. A label
has one colour everywhere. Lines and letters grow with the picture; small pictures are enlarged, so
that names can be read.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from beit3.data.stores.rle import RLE, compute_box, decode_rle, encode_rle, rasterize
from beit3.files import atomic_write
from beit3.images import open_image
from beit3.task import Prediction, Record
from beit3.tasks.ade20k import decode_label_map

if TYPE_CHECKING:
    from beit3.predict import Predictor

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

FORMATS, QUALITY = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}, 92
"""What can be written, by the ending of its name; of those that lose something, how little."""

COLORS, FIRST = 256, (240, 90, 30)
"""Colours before they come again, and what the first is near to."""

MIN_SCORE = 0.3
"""Objects of which a network is less sure are not drawn, unless one asks for them."""

LEAST = 400
"""Longest side in pixels below which a picture is enlarged."""

LINES_PER_SIDE, LETTERS_PER_SIDE = 400, 48
"""The longest side over the width of a line, and over the size of letters: 3 and 27 pixels of
1280."""

THINNEST, SMALLEST = 2, 13
"""Pixels of a line and of letters at the least."""

TINT, FILL = 0.4, 0.65
"""How much of the colour is in a mask, and in a map of labels."""

EDGE, PAPER, INK = (16, 16, 16), (255, 255, 255), (24, 24, 24)
"""What lies around coloured lines, for they must show on pictures of any brightness; the legend's
ground and letters."""

LONGEST_NAME, LEGEND = 40, 24
"""Characters of a name, and classes in a legend; what is longer is cut."""

MORE_LETTERS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "wqy-zenhei.ttc",
)
"""Fonts of the system for letters that DejaVu, which comes with matplotlib, does not have."""


# Files --------------------------------------------------------------------------------------------


def predict_drawn(
    predictor: "Predictor",
    inputs: Sequence[Any],
    out: str | Path,
    *,
    min_score: float | None = None,
) -> list[Prediction]:
    """Ask, draw what is found in the picture `inputs[0]` into the file `out`, and return it in
    short: objects without masks,
    and of a map what share of the picture each class has.

    min_score: of objects that are drawn and returned, by default `MIN_SCORE`. ValueError for a name
    that is no picture's, for
    the picture's own, and for predictions that are neither objects nor a map.
    """
    if not out:
        raise ValueError("--min-score says which objects are drawn: give --out too")
    out = Path(out)
    if out.suffix.lower() not in FORMATS:  # before anything that takes time
        raise ValueError(
            f"--out {out} has not the ending of a picture: give one of {', '.join(FORMATS)}"
        )
    if (
        out.exists()
        and isinstance(inputs[0], str | Path)
        and Path(inputs[0]).exists()
        and out.samefile(inputs[0])
    ):
        raise ValueError(f"--out {out} is the picture itself: give another name")
    found = predictor(*inputs)
    image, names = (
        open_image(inputs[0]).permute(1, 2, 0).numpy(),
        predictor.task.class_names,
    )
    drawn, short = drawing(
        image,
        found[0] if len(found) == 1 else {},
        names,
        min_score=MIN_SCORE if min_score is None else min_score,
    )
    with atomic_write(out) as file:
        drawn.save(file, FORMATS[out.suffix.lower()], quality=QUALITY)
    return [short]


def drawing(
    image: np.ndarray, prediction: Prediction, names: Sequence[str], *, min_score: float
) -> tuple[Image.Image, Prediction]:
    """A picture with its prediction drawn onto it, and the prediction in short. names: of a map's
    labels; objects carry theirs."""
    short = {key: prediction[key] for key in ("id", "height", "width") if key in prediction}
    if "objects" in prediction:
        objects = [each for each in prediction["objects"] if each["score"] >= min_score]
        rows = [{key: value for key, value in each.items() if key != "mask"} for each in objects]
        return draw_objects(image, objects), short | {"objects": rows}
    if "map" in prediction:
        labels = decode_label_map(prediction)
        rows = shares(labels, names)
        return with_legend(draw_map(image, labels), rows), short | {"classes": rows}
    raise ValueError(
        "these weights find neither objects nor a map of labels: there is nothing to draw, leave "
        "--out and --min-score out"
    )


# Objects ------------------------------------------------------------------------------------------


def draw_objects(
    image: np.ndarray, objects: Sequence[Mapping[str, Any]], *, side: int = 0
) -> Image.Image:
    """Objects, the best first, with `box` [x, y, w, h], `label`, and where they have them `name`,
    `score` and `mask`, an RLE.

    A name that would hide a better object's is left out. side: the longest side of what is
    returned, 0 = the picture's own or `LEAST`.
    """
    canvas, scale = _scaled(image, side)
    pixels = np.array(canvas)
    line, size = _line(canvas), _letters(canvas)
    for each in reversed(objects):
        if "mask" in each:
            _tint(pixels, each["mask"], scale, color(each["label"]), line)
    canvas = Image.fromarray(pixels)
    pen = ImageDraw.Draw(canvas)
    for each in reversed(objects):
        x, y, width, height = (number * scale for number in each["box"])
        _frame(pen, (x, y, x + width, y + height), color(each["label"]), line)
    taken: list[Box] = []
    for each in objects:
        score = f" {each['score']:.0%}" if "score" in each else ""
        text = name_of(each["label"], [], each.get("name", "")) + score
        box = tuple(number * scale for number in each["box"])
        taken += _tag(pen, text, box, canvas.size, color(each["label"]), size, taken)
    return canvas


def true_objects(record: Record, names: Sequence[str]) -> list[dict[str, Any]]:
    """A record's objects as `draw_objects` takes them, the largest first: names are placed in that
    order."""
    found = []
    for each in sorted(record.get("objects", ()), key=lambda each: -each["area"]):
        crowd = " (crowd)" if each["crowd"] else ""
        row = {
            "box": each["box"],
            "label": each["label"],
            "name": name_of(each["label"], names) + crowd,
        }
        outline = each.get("segmentation")
        found.append(
            row
            | (
                {"mask": encode_rle(rasterize(outline, record["height"], record["width"]))}
                if outline
                else {}
            )
        )
    return found


def _tint(pixels: np.ndarray, mask: RLE, scale: float, paint: Color, line: int) -> None:
    """Colour a mask's pixels and draw its outline, in place; of a large picture only where the mask
    is."""
    left, top, right, bottom = compute_box(mask)
    if right <= left or bottom <= top:
        return
    inside = Image.fromarray(decode_rle(mask).numpy()[top:bottom, left:right] * 255)
    x, y = round(left * scale), round(top * scale)
    inside = inside.resize(
        (max(1, round(right * scale) - x), max(1, round(bottom * scale) - y)),
        Image.Resampling.NEAREST,
    )
    hit = np.array(inside)[: pixels.shape[0] - y, : pixels.shape[1] - x] > 0
    window = pixels[y : y + hit.shape[0], x : x + hit.shape[1]]
    window[hit] = _blend(window[hit], paint, TINT)
    window[hit & ~_shrunk(hit, line)] = paint


def _shrunk(hit: np.ndarray, by: int) -> np.ndarray:
    """bool [H, W] without what is nearer than `by` pixels to its edge, up, down or to a side."""
    padded = np.pad(hit, by)
    height, width = hit.shape
    moves = [
        (by + step * down, by + step * right)
        for step in (by, -by)
        for down, right in ((1, 0), (0, 1))
    ]
    return np.logical_and.reduce(
        [padded[row : row + height, column : column + width] for row, column in moves]
    )


def _frame(pen: ImageDraw.ImageDraw, box: Box, paint: Color, line: int) -> None:
    """A box's lines, between dark ones of half their width; a box without an area is a point."""
    left, top, right, bottom = box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)
    around = max(1, line // 2)
    pen.rectangle(
        (left - around, top - around, right + around, bottom + around),
        outline=EDGE,
        width=line + 2 * around,
    )
    pen.rectangle((left, top, right, bottom), outline=paint, width=line)


def _tag(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: Sequence[float],
    room: tuple[int, int],
    paint: Color,
    size: int,
    taken: Sequence[Box],
) -> list[Box]:
    """Write a name at a corner of its box [x, y, w, h]; where all corners are `taken`, its colour
    has to do. Gives the place."""
    letters, margin = font(text, size), max(2, size // 5)
    left, _, right, _ = pen.textbbox((0, 0), text, font=letters)
    width, height = right - left + 2 * margin, size + 2 * margin
    rows = (box[1] - height, box[1], box[1] + box[3], box[1] + box[3] - height)
    corners = [(x, y) for y in rows for x in (box[0], box[0] + box[2] - width)]
    places = (_inside((x, y, x + width, y + height), room) for x, y in corners)
    free = [place for place in places if not any(_meet(place, other) for other in taken)][:1]
    for place in free:
        pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=paint, outline=EDGE)
        # Letters stand on one line in all tags, whatever their own height.
        pen.text(
            (place[0] + margin - left, place[3] - margin - size * 0.14),
            text,
            font=letters,
            fill=_legible(paint),
            anchor="ls",
        )
    return free


def _inside(place: Box, room: tuple[int, int]) -> Box:
    """A rectangle moved into a picture of this size, as far as it fits."""
    width, height = place[2] - place[0], place[3] - place[1]
    left, top = max(0.0, min(place[0], room[0] - width)), max(0.0, min(place[1], room[1] - height))
    return left, top, left + width, top + height


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# Maps of labels -----------------------------------------------------------------------------------


def draw_map(
    image: np.ndarray, labels: np.ndarray, *, side: int = 0, ignore: int = -1
) -> Image.Image:
    """Every pixel in its label's colour, dark lines between labels; those that are `ignore` show
    the picture alone."""
    canvas, _ = _scaled(image, side)
    # Nearest pixels, read one by one: Pillow resizes no whole numbers beyond 8 bits.
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
        for new, old in zip(canvas.size[::-1], labels.shape, strict=True)
    )
    labels, line = labels[rows][:, columns], _line(canvas)
    paints = np.array([color(label) for label in range(COLORS)], np.uint8)
    pixels, known = np.array(canvas), labels != ignore
    pixels[known] = _blend(pixels[known], paints[labels[known] % COLORS], FILL)
    for axis in (0, 1):
        edges = np.zeros(labels.shape, bool)
        body = np.diff(labels, axis=axis) != 0
        for shift in range(line):
            target = np.moveaxis(edges, axis, 0)[shift : shift + body.shape[axis]]
            target |= np.moveaxis(body, axis, 0)[: len(target)]
        pixels[edges] = _blend(pixels[edges], EDGE, FILL)
    return Image.fromarray(pixels)


def shares(labels: np.ndarray, names: Sequence[str], *, ignore: int = -1) -> list[dict[str, Any]]:
    """The classes of a map by their share of its pixels, the largest first: [{"label", "name",
    "share"}]."""
    found, counts = np.unique(labels[labels != ignore], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        {
            "label": int(found[place]),
            "name": name_of(int(found[place]), names),
            "share": round(float(counts[place]) / labels.size, 4),
        }
        for place in order
    ]


def with_legend(picture: Image.Image, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """A picture above the colours, names and shares of its classes, in as many columns as fit."""
    size = _letters(picture)
    margin, step = size // 2, round(size * 1.6)
    lines = [
        (color(row["label"]), f"{cut_short(row['name'])}  {percent(row['share'])}")
        for row in rows[:LEGEND]
    ]
    lines += [(PAPER, f"and {len(rows) - LEGEND} more")] if len(rows) > LEGEND else []
    wide = (
        math.ceil(max((font(text, size).getlength(text) for _, text in lines), default=0))
        + size
        + 3 * margin
    )
    columns = max(1, min(len(lines), (picture.width - margin) // wide))
    deep = math.ceil(len(lines) / columns)
    whole = Image.new(
        "RGB", (max(picture.width, wide + margin), picture.height + deep * step + 2 * margin), PAPER
    )
    whole.paste(picture, (0, 0))
    pen = ImageDraw.Draw(whole)
    for place, (paint, text) in enumerate(lines):
        x, y = margin + place // deep * wide, picture.height + margin + place % deep * step
        pen.rectangle(
            (x, y, x + size, y + size), fill=paint, outline=EDGE if paint != PAPER else PAPER
        )
        pen.text(
            (x + size + margin, y + size * 0.86), text, font=font(text, size), fill=INK, anchor="ls"
        )
    return whole


def percent(share: float) -> str:
    """A share as people read it; of what is there it never says 0.0%."""
    return f"{share:.1%}" if share >= 0.001 else "< 0.1%"


# Colours and letters ------------------------------------------------------------------------------


def name_of(label: int, names: Sequence[str], known: str = "") -> str:
    """What a label is called, short enough to be drawn."""
    return cut_short(known or (names[label] if 0 <= label < len(names) else f"class {label}"))


def cut_short(name: str) -> str:
    """One line of at most `LONGEST_NAME` characters."""
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def color(label: int) -> Color:
    """The colour of a label, as far as can be from those of all smaller ones."""
    return palette()[label % COLORS]


@cache
def palette() -> tuple[Color, ...]:
    """`COLORS` colours, each the farthest from those before it, to eyes with and without a
    difference of red and green.

    Distances are OKLab's (Ottosson, 2020); neither near black nor near white nor grey, for pictures
    are full of these.
    """
    steps = np.linspace(0, 255, 18).round()
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    light, *tint = _oklab(rgb).T
    vivid = np.hypot(*tint)
    rgb = rgb[(light > 0.5) & (light < 0.88) & (vivid > 0.07) & (vivid < 0.24)]
    seen = np.concatenate([_oklab(rgb), _oklab(rgb, blind=True)], axis=1)
    order = [int(np.abs(rgb - FIRST).sum(1).argmin())]
    nearest = np.full(len(rgb), np.inf)
    for _ in range(COLORS - 1):
        nearest = np.minimum(nearest, np.linalg.norm(seen - seen[order[-1]], axis=1))
        order.append(int(nearest.argmax()))
    return tuple((int(red), int(green), int(blue)) for red, green, blue in rgb[order])


def _oklab(rgb: np.ndarray, *, blind: bool = False) -> np.ndarray:
    """sRGB of 0 to 255 [n, 3] -> OKLab [n, 3]; blind: as seen without green's receptors (Machado et
    al., 2009, table 1)."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    if blind:
        linear = (
            linear
            @ np.array(
                [
                    [0.367322, 0.860646, -0.227968],
                    [0.280085, 0.672501, 0.047413],
                    [-0.01182, 0.04294, 0.968881],
                ]
            ).T
        )
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = np.array(
        [
            [0.2104542553, 0.793617785, -0.0040720468],
            [1.9779984951, -2.428592205, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.808675766],
        ]
    )
    return np.cbrt(linear @ cones.T) @ lab.T


@cache
def _typeface(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Letters of this size for a text: DejaVu's, or those of a font of this system that has what
    DejaVu lacks."""
    usual = _typeface(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
    if not _lacking(usual, text):
        return usual
    for file in MORE_LETTERS:
        try:
            other = _typeface(file, size)
        except OSError:
            continue
        if not _lacking(other, text):
            return other
    return usual


def _lacking(letters: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether some letter of a text would come out as the box that stands for unknown ones."""
    unknown = bytes(letters.getmask("\U0010fffe"))
    return any(
        not letter.isspace() and bytes(letters.getmask(letter)) == unknown for letter in set(text)
    )


# Sizes --------------------------------------------------------------------------------------------


def _scaled(image: np.ndarray, side: int) -> tuple[Image.Image, float]:
    """The picture at its size on the drawing, and how many times larger that is; enlarged it keeps
    its pixels."""
    drawn = Image.fromarray(np.ascontiguousarray(image))
    longest = max(drawn.size)
    scale = side / longest if side else float(max(1, math.ceil(LEAST / longest)))
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    return drawn.resize(
        size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    ) if scale != 1 else drawn, scale


def _line(canvas: Image.Image) -> int:
    return max(THINNEST, round(max(canvas.size) / LINES_PER_SIDE))


def _letters(canvas: Image.Image) -> int:
    return max(SMALLEST, round(max(canvas.size) / LETTERS_PER_SIDE))


def _blend(pixels: np.ndarray, paint: Any, share: float) -> np.ndarray:
    """uint8 [n, 3] with this share of a colour, or of a colour each, in them."""
    return (pixels * (1 - share) + np.asarray(paint) * share).round().astype(np.uint8)


def _legible(paint: Color) -> Color:
    """Black or white, whichever is farther from a colour in lightness."""
    return EDGE if _oklab(np.array([paint], float))[0, 0] > 0.62 else PAPER
