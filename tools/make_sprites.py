"""Make the canvas's sprite sheet from Noto Color Emoji (needed only to change the glyphs).

apt-get install fonts-noto-color-emoji
python tools/make_sprites.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GLYPHS = {
    "Architectures": "🏛🏰🏠",
    "Bears": "🐻🐼",
    "Birds": "🐦🦜🦅",
    "Butterfly": "🦋",
    "Cats": "🐱🐈😺",
    "Dogs": "🐶🐕",
    "Fishes": "🐟🐠🐡",
    "Flame": "🔥",
    "Flowers": "🌻🌹🌷",
    "Frogs": "🐸",
    "Horses": "🐴🐎",
    "Human": "🧑👩👨",
    "Jellyfish": "🪼",
    "Rabbits": "🐰🐇",
    "Sandwiches": "🥪🍔",
    "Sea": "🌊",
    "Statues": "🗿🗽",
    "Towers": "🗼",
    "Trees": "🌳🌲🌴",
    "Waterfalls": "⛲",
}
STRIKE = 109  # the only bitmap size in the font
CELL = 96
COLUMNS = 8


def cut(font: ImageFont.FreeTypeFont, glyph: str) -> Image.Image | None:
    """The glyph as RGBA [CELL, CELL], or None where the font lacks it.

    It fills its cell whatever its own margins, so that size is the renderer's choice alone.
    """
    big = Image.new("RGBA", (136, 136))
    ImageDraw.Draw(big).text((0, 4), glyph, font=font, embedded_color=True)
    box = big.getbbox()
    if box is None:
        return None
    big = big.crop(box)
    side = max(big.size)
    square = Image.new("RGBA", (side, side))
    square.paste(big, ((side - big.width) // 2, (side - big.height) // 2))
    return square.resize((CELL, CELL), Image.Resampling.LANCZOS)


def main(path: str, out: Path) -> None:
    """Write `sprites.png` and `sprites.json` (which cells show which object) into the folder `out`."""
    font = ImageFont.truetype(path, STRIKE)
    pairs = [(name, glyph) for name, glyphs in GLYPHS.items() for glyph in glyphs]
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(pairs) // COLUMNS) * CELL))
    index: dict[str, list[int]] = {}
    for i, (name, glyph) in enumerate(pairs):
        cell = cut(font, glyph)
        if cell is None:
            sys.exit(f"{path} has no glyph for {name} ({glyph}): pass Noto Color Emoji with bitmaps")
        sheet.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
        index.setdefault(name, []).append(i)
    sheet.save(out / "sprites.png", optimize=True)
    (out / "sprites.json").write_text(json.dumps({"cell": CELL, "columns": COLUMNS, "glyphs": index}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1], Path(__file__).parents[1] / "src" / "neuraleraser" / "canvas")
