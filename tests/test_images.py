"""Untrusted images: never outside their root, never partly read, and with the pixels that an image viewer shows."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import code_of
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from mopefuse.errors import DataError
from mopefuse.modalities.image import FORMATS, open_image

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def png(width: int, height: int) -> bytes:
    """A header that declares a size, and nothing else."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(folder: Path, content: bytes, **options: Any) -> np.ndarray[Any, Any]:
    (folder / "image").write_bytes(content)
    image = open_image([folder], "image", where="train.jsonl:1", **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(folder: Path, relative: str = "image", content: bytes | None = None, **options: Any) -> DataError:
    if content is not None:
        (folder / relative).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_image([folder], relative, where="train.jsonl:17, id 4411", **options)
    assert caught.value.where == "train.jsonl:17, id 4411"
    return caught.value


# -- pixels


def grey16() -> Image.Image:
    return Image.fromarray(np.array([[0, 10 * 256 + 255, 128 * 256, 65535]], dtype=np.uint16))


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLACK])
    image.putdata([0, 1])
    image.info["transparency"] = 1
    return image


def one(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (1, 1), colour)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (one("RGB", (1, 2, 3)), "PNG", [(1, 2, 3)]),
        (one("RGB", (1, 2, 3)), "BMP", [(1, 2, 3)]),
        (one("L", 77), "PNG", [(77, 77, 77)]),
        (one("1", 1), "PNG", [WHITE]),
        (one("1", 0), "PNG", [BLACK]),
        (one("LA", (100, 0)), "PNG", [WHITE]),
        (one("LA", (0, 255)), "PNG", [BLACK]),
        (one("RGBA", (255, 0, 0, 0)), "PNG", [WHITE]),
        (one("RGBA", (255, 0, 0, 255)), "PNG", [RED]),
        (one("RGBA", (255, 0, 0, 51)), "PNG", [(255, 204, 204)]),  # a fifth of red over four fifths of white
        (one("RGBA", (255, 0, 0, 0)), "WEBP", [WHITE]),
        (palette_with_transparency(), "PNG", [RED, WHITE]),
        (palette_with_transparency(), "GIF", [RED, WHITE]),
        (grey16(), "PNG", [(0, 0, 0), (10, 10, 10), (128, 128, 128), WHITE]),
    ],
    ids=lambda value: getattr(value, "mode", value if isinstance(value, str) else ""),
)  # fmt: skip
def test_pixels_are_those_that_an_image_viewer_shows(
    tmp_path: Path, image: Image.Image, kind: str, expected: list[tuple[int, ...]]
) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert [tuple(pixel) for pixel in pixels(tmp_path, encoded(image, kind, **options))[0].tolist()] == expected


@pytest.mark.parametrize(
    ("cmyk", "rgb"),
    [
        ((0, 0, 0, 0), WHITE),
        ((0, 255, 255, 0), RED),
        ((0, 0, 0, 255), BLACK),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 255, 128), (127, 127, 0)),
    ],
)
def test_cmyk_is_converted_as_ink_on_white(tmp_path: Path, cmyk: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    image = encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)
    assert np.abs(pixels(tmp_path, image).astype(int) - np.array(rgb)).max() <= 3  # because of JPEG's rounding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """The stored pixels of a 2 x 3 picture under each EXIF orientation, reversed by hand."""
    upright = np.arange(18, dtype=np.uint8).reshape(3, 2, 3) * 10
    undo: dict[int, Callable[[Any], Any]] = {  # what a camera stores for an upright picture
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    assert (pixels(tmp_path, encoded(stored, "PNG", exif=exif)) == upright).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation_is_used(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE, BLACK)]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(tmp_path, content) == RED).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_images_of_any_shape_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    assert pixels(tmp_path, encoded(Image.new("RGB", size, RED), "PNG")).shape == (size[1], size[0], 3)


# -- damaged, too large, or of another format


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    whole = encoded(noise(), kind)
    assert pixels(tmp_path, whole).shape == (48, 64, 3)
    error = refused(tmp_path, content=whole[: int(len(whole) * share)])
    assert error.code == "MF-DATA-13"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n  <!DOCTYPE html><html>", "looks like HTML"),
        (b"<html><body>404", "looks like HTML"),
        (b"<svg xmlns='x'/>", "looks like SVG"),
        (b"%PDF-1.7", "of the format PDF, which is not enabled"),
        (b"8BPS\0\1", "of the format PSD, which is not enabled"),
        (encoded(noise(), "TIFF"), "of the format TIFF, which is not enabled"),
        (encoded(noise(), "EPS"), "of the format PostScript, which is not enabled"),
        (encoded(noise(), "PPM"), "cannot identify"),
        (b"GIF89a", "not a readable image"),
        (b"\x89PNG\r\n\x1a\n", "not a readable image"),
        (bytes(range(200, 255)), "not a readable image"),
    ],
    ids="empty HTML html SVG PDF PSD TIFF EPS PPM GIF PNG noise".split(),
)
def test_a_file_of_another_format_is_an_error_that_names_the_format(
    tmp_path: Path, content: bytes, message: str
) -> None:
    error = refused(tmp_path, content=content)
    assert message in error.what
    assert error.code == ("MF-DATA-14" if "not enabled" in message else "MF-DATA-13")


def test_only_formats_with_safe_decoders_are_enabled() -> None:
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "GIF", "BMP"}


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_000, 9_500), (2**31 - 1, 2**31 - 1), (100, 101)])
def test_an_image_with_too_many_pixels_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    limit = 10_000 if width == 100 else 50_000_000
    began = time.process_time()
    error = refused(tmp_path, content=png(width, height), max_pixels=limit)
    assert time.process_time() - began < 1
    assert error.code == "MF-DATA-12"
    assert refused(tmp_path, content=png(100, 100), max_pixels=10_000).code == "MF-DATA-13"  # small enough, but without pixels


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    body = b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    whole = encoded(noise(), "PNG")
    began = time.process_time()
    assert refused(tmp_path, content=whole[:33] + chunk + whole[33:]).code == "MF-DATA-13"
    assert time.process_time() - began < 2


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    content = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert code_of(lambda: pixels(tmp_path, content)) in ("", "MF-DATA-13")


# -- paths


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder `data` next to a valid image that must not be opened."""
    (tmp_path / "data").mkdir()
    noise().save(tmp_path / "secret.png")
    noise().save(tmp_path / "data" / "inside.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "relative",
    [
        "../secret.png",
        "x/../../secret.png",
        "{outside}/secret.png",
        "/etc/passwd",
        "~/secret.png",
        "~root/x",
        "file:///etc/passwd",
        "http://example.com/a.png",
        "C:\\secret.png",
        "C:/secret.png",
        "\\\\server\\share",
        "inside.png\0.txt",
        "linked-file",
        "linked-folder/secret.png",
        "..",
    ],
)
def test_a_path_outside_the_root_is_refused_and_nothing_is_opened(
    canary: Path, relative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (canary / "linked-file").symlink_to(canary.parent / "secret.png")
    (canary / "linked-folder").symlink_to(canary.parent)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    error = refused(canary, relative.format(outside=canary.parent))
    assert error.code == "MF-SEC-01"
    assert "outside the data folder" in error.what


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        ("https://example.org/1.png", "download the file, and use its path relative to the data folder"),
        ("{root}/x/inside.png", "write x/inside.png"),
    ],
)
def test_a_refused_path_has_a_fix_of_its_own(canary: Path, written: str, fix: str) -> None:
    error = refused(canary, written.format(root=canary))
    assert (error.code, error.fix) == ("MF-SEC-01", fix)


def test_links_inside_the_root_and_a_linked_root_are_allowed(canary: Path) -> None:
    (canary / "link.png").symlink_to("inside.png")
    (canary.parent / "alias").symlink_to(canary)
    for root, name in ((canary, "link.png"), (canary.parent / "alias", "inside.png"), (canary, "./x/../inside.png")):
        assert open_image([root], name, where="").size == (64, 48)


@pytest.mark.parametrize("kind", ["folder", "pipe", "root", "empty"])
def test_irregular_files_are_refused_without_opening_them(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    relative = {"root": ".", "empty": ""}.get(kind, kind)
    assert "not a regular file" in refused(tmp_path, relative).what


def test_for_a_missing_image_a_name_in_other_case_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "A.JPG").touch()
    error = refused(tmp_path, "a.jpg")
    assert (error.code, error.what) == ("MF-DATA-11", "image not found: a.jpg")
    assert "A.JPG" in error.fix
    assert refused(tmp_path, "b.jpg").fix == "add the file"


@pytest.mark.parametrize("relative", ["x" * 5000, "x/" * 3000, "loop/a.png", "file/below.png", "\ud800"])
def test_an_impossible_path_is_reported_as_not_found(tmp_path: Path, relative: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert refused(tmp_path, relative).code == "MF-DATA-11"


@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "~", ":", "\0", "inside.png"])).map("".join))
@example("./inside.png")
def test_any_path_is_inside_or_refused(tmp_path_factory: pytest.TempPathFactory, relative: str) -> None:
    root = tmp_path_factory.getbasetemp() / "root"
    if not root.exists():
        root.mkdir()
        noise().save(root / "inside.png")
    code = code_of(lambda: open_image([root], relative, where="here"))
    assert code.startswith(("MF-DATA-", "MF-SEC-")) or (root / relative).resolve() == (root / "inside.png").resolve()


@given(st.binary(max_size=300), st.sampled_from([b"", *(encoded(noise(4, 4), kind)[:40] for kind in FORMATS)]))
def test_any_bytes_are_an_image_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes, head: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "any").write_bytes(head + content)
    code = code_of(lambda: open_image([folder], "any", where="here", max_pixels=10_000).getpixel((0, 0)))
    assert code in ("", "MF-DATA-12", "MF-DATA-13", "MF-DATA-14")
