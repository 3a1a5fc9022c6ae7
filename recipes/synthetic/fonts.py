"""Finds a font with Korean letters (Hangul) on this machine."""

import os
from functools import cache
from pathlib import Path

from sfa_adapters.errors import DataError

__all__ = ["VARIABLE", "hangul_font"]

VARIABLE = "SFA_HANGUL_FONT"
SYLLABLE = "\ud55c"
# Plain faces first, which are legible at small sizes; then any other font with Hangul.
PREFERRED = ("nanumgothic", "nanumbarungothic", "notosanscjk", "notosanskr", "malgun", "applesdgothicneo", "undotum")
HELP = (
    "Install one: `apt install fonts-nanum` or `fonts-noto-cjk` (Debian, Ubuntu), `dnf install "
    "google-noto-sans-cjk-fonts` (Fedora); Windows and macOS have one. Or name a font file: "
)


def hangul_font() -> Path:
    """Finds a font file with Hangul: the one that the variable SFA_HANGUL_FONT names, else one of the system's.

    Raises:
        DataError: There is none, or the named file has no Hangul; says what to install.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return _of_system()
    path = Path(named).expanduser()
    if not path.is_file() or not _has_hangul(path):
        problem = "is not there" if not path.is_file() else "cannot write Korean"
        raise DataError(f"{VARIABLE}={named} {problem}. {HELP}{VARIABLE}=/path/to/font.ttf")
    return path


@cache
def _of_system() -> Path:
    from matplotlib import font_manager

    def rank(path: Path) -> tuple[int, int, str]:
        name = path.stem.casefold().replace("-", "")
        place = next((i for i, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
        return place, len(name), str(path)  # the short names are the regular weights

    for path in sorted((Path(p) for p in font_manager.findSystemFonts()), key=rank):
        if _has_hangul(path):
            return path
    raise DataError(
        f"Korean charts and pages need a font with Hangul, and there is none. {HELP}{VARIABLE}=/path/to/font.ttf"
    )


def _has_hangul(path: Path) -> bool:
    from matplotlib.ft2font import FT2Font

    try:
        return FT2Font(str(path)).get_char_index(ord(SYLLABLE)) != 0
    except (OSError, RuntimeError):  # not a font, or not one that FreeType reads
        return False
