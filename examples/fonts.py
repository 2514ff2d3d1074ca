"""Fonts for names that matplotlib's own font cannot draw: Chinese, for example."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib import font_manager, rcParams
from matplotlib.ft2font import FT2Font

# Among installed fonts with the wanted characters, those that also look well next to Latin text.
PREFERRED = ("notosanscjk", "notosans-", "sourcehansans", "wqy", "wenquanyi", "droidsansfallback", "sans")


def without_glyph(texts: Iterable[str]) -> set[str]:
    """Adds installed fonts to those that matplotlib draws with, until they have all characters or there are no more;
    the answer is what is missing then.
    """
    missing = set("".join(texts))
    for family in rcParams["font.family"]:
        missing -= drawn_by(font_manager.findfont(font_manager.FontProperties(family=[family])), missing)
    if missing:
        # Not matplotlib's list of fonts: it is made once, and lacks what was installed since.
        for path in sorted(font_manager.findSystemFonts(), key=preference):
            drawn = drawn_by(path, missing)
            if drawn:
                font_manager.fontManager.addfont(path)
                rcParams["font.family"] = [*rcParams["font.family"], FT2Font(path).family_name]
                missing -= drawn
            if not missing:
                break
    return missing


def preference(path: str) -> tuple[int, bool, str]:
    name = path.lower()
    place = next((i for i, part in enumerate(PREFERRED) if part in name), len(PREFERRED))
    return place, "regular" not in name, path


def drawn_by(path: str, characters: set[str]) -> set[str]:
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # no font that matplotlib can read
        return set()
    if not font.scalable:  # emoji in colour: pictures of one size
        return set()
    return {character for character in characters if font.get_char_index(ord(character))}
