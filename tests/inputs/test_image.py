"""Tiling against the published algorithm, written out again below, and pixels against straight numpy."""

import gc
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from nvlm_runtime.inputs import image as image_module
from nvlm_runtime.inputs.image import MAX_PIXELS, TilePlan, cut_tiles, draw_plan, open_image, plan_tiles, tile_pixels

GOLDEN = {
    (448, 448): (1, 1),
    (633, 633): (1, 1),
    (634, 634): (2, 2),
    (640, 480): (3, 2),
    (1024, 768): (3, 2),
    (768, 1024): (2, 3),
    (1920, 1080): (2, 1),
    (1080, 1920): (1, 2),
    (896, 672): (3, 2),
    (2480, 3508): (2, 3),
    (3000, 500): (6, 1),
    (1000, 250): (4, 1),
    (100, 1000): (1, 6),
    (500, 400): (1, 1),
    (1000, 800): (3, 2),
    (1280, 1024): (3, 2),
    (320, 256): (1, 1),
}
GRIDS = "1:1 1:2 1:3 1:4 1:5 1:6 2:1 2:2 2:3 3:1 3:2 4:1 5:1 6:1"
COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta"]


def _grid(width, height, image_size=448, **limits):
    plan = plan_tiles(width, height, image_size, **limits)
    return plan.cols, plan.rows


def _published_grid(width, height, image_size=448, min_num=1, max_num=6):
    """`dynamic_preprocess` and `find_closest_aspect_ratio` of the model card, without the pixels."""
    target_ratios = {
        (i, j)
        for n in range(min_num, max_num + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= max_num and i * j >= min_num
    }
    best_ratio_diff, best_ratio, area = float("inf"), (1, 1), width * height
    for ratio in sorted(target_ratios, key=lambda x: x[0] * x[1]):
        ratio_diff = abs(width / height - ratio[0] / ratio[1])
        if ratio_diff < best_ratio_diff:
            best_ratio_diff = ratio_diff
            best_ratio = ratio
        elif ratio_diff == best_ratio_diff:
            if area > 0.5 * image_size * image_size * ratio[0] * ratio[1]:
                best_ratio = ratio
    return best_ratio


def _noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _numpy_pixels(tiles):
    x = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32) / np.float32(255)
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    return ((x - mean) / std).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("size", "grid"), GOLDEN.items(), ids=lambda v: "x".join(map(str, v)))
def test_golden_grids(size, grid):
    plan = plan_tiles(*size, 448)
    assert (plan.cols, plan.rows) == grid
    assert plan == TilePlan(width=size[0], height=size[1], cols=grid[0], rows=grid[1], image_size=448)


@pytest.mark.parametrize("ratio", GRIDS.split())
def test_a_picture_of_a_grids_own_size_gets_that_grid(ratio):
    cols, rows = map(int, ratio.split(":"))
    plan = plan_tiles(448 * cols, 448 * rows, 448)
    assert (plan.cols, plan.rows) == (cols, rows)
    assert plan.num_regular == cols * rows
    assert plan.has_thumbnail == (ratio != "1:1")
    assert plan.num_tiles == (1 if ratio == "1:1" else cols * rows + 1)


def test_no_grid_but_the_fourteen():
    sides = [*range(1, 64), *range(64, 4000, 97)]
    assert {_grid(w, h) for w in sides for h in sides} == {tuple(map(int, r.split(":"))) for r in GRIDS.split()}


def test_same_choice_as_the_published_code():
    sides = [1, 2, 3, 5, 7, 11, 13, 16, 17, 60, 300, 600, 633, 634, 1200, *range(50, 2600, 50)]
    assert [_grid(w, h) for w in sides for h in sides] == [_published_grid(w, h) for w in sides for h in sides]


def test_ratios_are_compared_as_floats():
    assert _grid(1000, 1200) == (2, 2)  # exactly half way between 2:3 and 1:1, but not in floats
    assert _grid(350, 600) == (2, 3)


def test_a_tie_goes_up_only_above_half_the_area():
    assert _grid(9, 40, 12) == (1, 4)  # 360 pixels, 0.5 * 12 * 12 * 5 = 360
    assert _grid(896, 448, min_tiles=3, max_tiles=4) == (3, 1)
    assert _grid(898, 449, min_tiles=3, max_tiles=4) == (2, 2)


@pytest.mark.parametrize(("width", "height"), [(0, 1), (1, 0), (-3, 5)])
def test_plan_refuses_empty_pictures(width, height):
    with pytest.raises(ValueError, match=f"{width} x {height} pixels, expected at least 1 x 1"):
        plan_tiles(width, height, 448)


def test_plan_refuses_impossible_limits():
    with pytest.raises(ValueError, match="tiles are 3 to 2, expected 1 <= min_tiles <= max_tiles"):
        plan_tiles(5, 5, 448, min_tiles=3, max_tiles=2)
    with pytest.raises(ValueError, match="tiles are 0 to 6"):
        plan_tiles(5, 5, 448, min_tiles=0)
    with pytest.raises(ValueError, match="image_size is 0"):
        plan_tiles(5, 5, 0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(width=st.integers(1, 10000), height=st.integers(1, 10000), image_size=st.sampled_from([8, 64, 448]))
@example(width=1, height=10000, image_size=448)
@example(width=10000, height=1, image_size=448)
@example(width=1, height=1, image_size=448)
def test_any_size_has_a_plan(width, height, image_size):
    plan = plan_tiles(width, height, image_size)
    assert (plan.cols, plan.rows) == _published_grid(width, height, image_size)
    assert plan.num_tiles in {1, 3, 4, 5, 6, 7}
    assert plan.num_tiles == plan.num_regular + plan.has_thumbnail


@settings(max_examples=100, deadline=None, derandomize=True)
@given(width=st.integers(1, 120), height=st.integers(1, 120))
@example(width=1, height=10000)
@example(width=10000, height=1)
@example(width=1, height=1)
def test_pixels_are_the_planned_tiles(width, height):
    plan = plan_tiles(width, height, 8)
    picture = _noise(width, height)
    tiles, x = cut_tiles(picture, plan), tile_pixels(picture, plan)
    assert [tile.size for tile in tiles] == [(8, 8)] * plan.num_tiles
    assert x.shape == (plan.num_tiles, 3, 8, 8) and x.dtype == torch.float32 and x.is_contiguous()
    np.testing.assert_array_equal(x.numpy(), _numpy_pixels(tiles))


@pytest.mark.parametrize("ratio", GRIDS.split()[1:])
def test_tiles_go_row_by_row_and_the_thumbnail_is_last(ratio):
    cols, rows = map(int, ratio.split(":"))
    picture = Image.new("RGB", (40 * cols, 40 * rows))
    for i in range(cols * rows):
        picture.paste(COLOURS[i], (40 * (i % cols), 40 * (i // cols), 40 * (i % cols + 1), 40 * (i // cols + 1)))
    tiles = cut_tiles(picture, TilePlan(*picture.size, cols, rows, 16))
    middles = [tile.getpixel((8, 8)) for tile in tiles[:-1]]
    assert middles == [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS[: cols * rows]]
    assert tiles[-1].tobytes() == picture.resize((16, 16), Image.Resampling.BICUBIC).tobytes()


def test_tiles_are_crops_of_one_bicubic_resize():
    picture = _noise(70, 50)
    tiles = cut_tiles(picture, TilePlan(70, 50, 3, 2, 16))
    canvas = np.asarray(picture.resize((48, 32), Image.Resampling.BICUBIC))
    want = [canvas[16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for r in range(2) for c in range(3)]
    for tile, part in zip(tiles[:-1], want, strict=True):
        np.testing.assert_array_equal(np.asarray(tile), part)


def test_a_single_tile_has_no_thumbnail():
    picture = _noise(30, 30)
    plan = plan_tiles(30, 30, 448)
    assert (plan.num_regular, plan.has_thumbnail, plan.num_tiles) == (1, False, 1)
    assert tile_pixels(picture, TilePlan(30, 30, 1, 1, 8)).shape[0] == 1


def test_pixel_values():
    x = tile_pixels(Image.new("RGB", (8, 8), (255, 0, 51)), TilePlan(8, 8, 1, 1, 8))
    want = torch.tensor([(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(x, want.view(1, 3, 1, 1).expand(1, 3, 8, 8))


@pytest.mark.parametrize("cut", [cut_tiles, tile_pixels, draw_plan])
def test_a_plan_of_another_picture_is_refused(cut):
    with pytest.raises(ValueError, match="picture is 10 x 20 pixels, its plan 20 x 10"):
        cut(Image.new("RGB", (10, 20)), plan_tiles(20, 10, 8))
    with pytest.raises(ValueError, match="mode P, expected RGB from open_image"):
        cut(Image.new("P", (20, 10)), plan_tiles(20, 10, 8))


def test_draw_plan_marks_the_grid_and_numbers_the_tiles():
    picture = Image.new("RGB", (300, 200), "gray")
    before = picture.tobytes()
    drawn = draw_plan(picture, TilePlan(300, 200, 3, 2, 64))
    assert drawn.size == (192, 128) and picture.tobytes() == before
    assert all(drawn.getpixel(p) == (255, 0, 0) for p in [(64, 40), (128, 100), (40, 64), (170, 64)])
    tiles = [drawn.crop((64 * c + 4, 64 * r + 4, 64 * c + 60, 64 * r + 60)) for r in range(2) for c in range(3)]
    assert len({tile.tobytes() for tile in tiles}) == 6
    assert draw_plan(picture, TilePlan(300, 200, 1, 1, 64)).size == (64, 64)


def test_draw_plan_of_a_sliver():
    assert draw_plan(Image.new("RGB", (1, 10000)), plan_tiles(1, 10000, 8)).size == (8, 48)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.gif", "a.ppm"])
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "path"])
def test_opens_the_usual_files(tmp_path, name, kind):
    _noise(20, 10).save(tmp_path / name)
    with Image.open(tmp_path / name) as expected:
        want = expected.convert("RGB").tobytes()
    got = open_image(kind(tmp_path / name))
    assert (got.mode, got.size) == ("RGB", (20, 10)) and got.tobytes() == want


@pytest.mark.parametrize("shape", [(10, 20), (10, 20, 1), (10, 20, 3), (10, 20, 4)], ids=str)
def test_opens_arrays(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    want = array if shape[2:] in [(3,), (4,)] else np.repeat(array.reshape(10, 20, 1), 3, axis=2)
    got = open_image(array)
    assert (got.mode, got.size) == ("RGB", (20, 10))
    np.testing.assert_array_equal(np.asarray(got), want[:, :, :3])
    np.testing.assert_array_equal(np.asarray(open_image(array[:, ::-1])), want[:, ::-1, :3])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5), bool),
        np.zeros((4, 5), np.uint16),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((1, 4, 5, 3), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.array(None),
    ],
    ids=lambda a: f"{a.dtype}-{a.shape}",
)
def test_refuses_other_arrays(array):
    with pytest.raises(ValueError) as error:
        open_image(array)
    want = f"the array is {array.dtype} {list(array.shape)}, expected uint8 (0 to 255) of shape [H, W], [H, W, 1]"
    assert str(error.value).startswith(want)


def test_the_result_is_a_copy():
    array = np.zeros((4, 5, 3), np.uint8)
    picture = Image.new("RGB", (5, 4))
    for source in (array, picture):
        open_image(source).putpixel((0, 0), (9, 9, 9))
    assert array.sum() == 0 and picture.getpixel((0, 0)) == (0, 0, 0)


def _palette_picture():
    picture = _noise(40, 30).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    picture.info["transparency"] = bytes([0, 128] + [255] * 14)
    return picture


def test_a_palette_becomes_rgb_before_it_is_resized(tmp_path):
    picture = _palette_picture()
    picture.save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = cut_tiles(open_image(tmp_path / "a.png"), TilePlan(40, 30, 1, 1, 16))[0]
    picture.info.clear()
    assert got.tobytes() == picture.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC).tobytes()
    assert got.tobytes() != picture.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB").tobytes()


def test_alpha_is_dropped_not_composited():
    assert open_image(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (10, 20, 30)
    assert open_image(Image.new("LA", (2, 2), (10, 0))).getpixel((0, 0)) == (10, 10, 10)
    picture = _noise(40, 30)
    picture.putalpha(_noise(40, 30, seed=1).convert("L"))
    got = cut_tiles(open_image(picture), TilePlan(40, 30, 1, 1, 16))[0]
    assert got.tobytes() == picture.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC).tobytes()
    assert got.tobytes() != picture.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_convert_as_pillow_does(mode):
    base = _noise(12, 9)
    picture = Image.new("LAB", (12, 9), (128, 10, 20)) if mode == "LAB" else base.convert(mode)
    assert open_image(picture).tobytes() == picture.convert("RGB").tobytes()


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_grey_files_are_scaled(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.mode == "I;16"
    got = np.asarray(open_image(tmp_path / name))
    np.testing.assert_array_equal(got[:, :, 1], [[0, 0, 1, 1, 4, 128, 254, 255, 255]])
    np.testing.assert_array_equal(got[:, :, 0], np.rint(values / 257))


@pytest.mark.parametrize("dtype", [">u2", "<u2", np.int32], ids=["I;16B", "I;16", "I"])
def test_16_bit_grey_images_are_scaled(dtype):
    picture = Image.fromarray(np.array([[0, 257, 65535]], dtype))
    assert np.asarray(open_image(picture))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_grey_beyond_16_bits_is_refused(values):
    with pytest.raises(ValueError, match=f"pixels from {values[0]} to {values[1]}, expected 16-bit ones of 0 to 65535"):
        open_image(Image.fromarray(np.array([values], np.int32)))


def test_refused_modes():
    with pytest.raises(ValueError, match="has float pixels .mode F., expected 8-bit or 16-bit ones"):
        open_image(Image.new("F", (2, 2)))
    with pytest.raises(ValueError, match="has mode La, expected one that converts to RGB"):
        open_image(Image.new("La", (2, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (32, 48), "black")
    upright.paste("white", (0, 0, 16, 16))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    method = undo.get(orientation)
    stored = upright.transpose(Image.Transpose[method]) if method else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    got = open_image(tmp_path / "a.jpg")
    assert got.size == (32, 48)
    assert np.abs(np.asarray(got, np.int32) - np.asarray(upright, np.int32)).max() < 8
    assert open_image(got).tobytes() == got.tobytes()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.tiff"])
def test_truncated_files_are_refused(tmp_path, name):
    path = tmp_path / name
    _noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError) as error:
        open_image(path)
    assert f"{path} is truncated or damaged, expected a complete image" in str(error.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp"])
def test_a_file_cut_anywhere_opens_or_is_refused_in_words(tmp_path, name):
    path = tmp_path / name
    _noise(16, 16).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            assert open_image(path).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith(f"{path} is ") and ", expected" in str(error)


def test_several_frames_cut_anywhere_are_refused_in_words(tmp_path):
    path = tmp_path / "a.gif"
    _noise(8, 8).save(path, save_all=True, append_images=[_noise(8, 8, seed=1)])
    whole = path.read_bytes()
    for length in range(len(whole) // 2, len(whole), 3):
        path.write_bytes(whole[:length])
        try:
            assert open_image(path).size == (8, 8)
        except ValueError as error:
            assert str(error).startswith((f"{path} is truncated", f"{path} holds 2 frames"))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_several_frames_are_refused(tmp_path, name):
    _noise(8, 8).save(tmp_path / name, save_all=True, append_images=[_noise(8, 8, seed=s) for s in (1, 2)])
    with pytest.raises(ValueError, match=f"{name} holds 3 frames, expected a picture of one frame"):
        open_image(tmp_path / name)
    with Image.open(tmp_path / name) as picture, pytest.raises(ValueError, match="the PIL image holds 3 frames"):
        open_image(picture)


def test_a_phone_jpeg_with_a_picture_behind_it_opens(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 8), "white").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    got = open_image(path)
    assert got.size == (16, 8) and got.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty, expected an image file"),
        (b"hello\n" * 99, "is not an image, expected a format that Pillow reads"),
    ],
    ids=["empty", "text"],
)
def test_files_that_are_no_image(tmp_path, content, text):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path} {text}")


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png does not exist, expected an image file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="cannot be opened, expected an image file: Is a directory"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="cannot be opened, expected an image file: embedded null"):
        open_image("a\0.png")


@pytest.mark.parametrize("source", [None, b"\x89PNG", 3, [[0]]], ids=repr)
def test_other_sources_are_refused(source):
    with pytest.raises(ValueError, match=f"a PIL image or a numpy array, got {type(source).__name__}"):
        open_image(source)


def _png_without_data(path, width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.fixture
def no_decoding(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, no_decoding):
    _png_without_data(tmp_path / "a.png", 100_000, 90_000)
    with pytest.raises(ValueError) as error:
        open_image(tmp_path / "a.png")
    assert "a.png is too large to decode, expected at most 178956970 pixels" in str(error.value)
    assert "9000000000 pixels" in str(error.value)


def test_a_bomb_is_refused_where_pillows_limit_was_lifted(tmp_path, monkeypatch, no_decoding):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    _png_without_data(tmp_path / "a.png", 100_000, 90_000)
    with pytest.raises(ValueError, match=f"a.png is 100000 x 90000 pixels, expected 1 to {MAX_PIXELS} pixels"):
        open_image(tmp_path / "a.png")


def test_the_pixel_limit_is_the_largest_size_accepted(monkeypatch):
    assert MAX_PIXELS == 178_956_970 and Image.MAX_IMAGE_PIXELS == 89_478_485
    monkeypatch.setattr(image_module, "MAX_PIXELS", 100)
    assert open_image(Image.new("RGB", (10, 10))).size == (10, 10)
    with pytest.raises(ValueError, match="the PIL image is 101 x 1 pixels, expected 1 to 100 pixels"):
        open_image(Image.new("RGB", (101, 1)))
    with pytest.raises(ValueError, match="the PIL image is 0 x 2 pixels"):
        open_image(Image.new("RGB", (0, 2)))


def test_no_file_stays_open(tmp_path):
    names = ["whole.png", "cut.png", "several.gif", "several.tiff", "text.png", "empty.png", "bomb.png"]
    _noise(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    for name in ("several.gif", "several.tiff"):
        _noise(8, 8).save(tmp_path / name, save_all=True, append_images=[_noise(8, 8, seed=1)])
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "empty.png").write_bytes(b"")
    _png_without_data(tmp_path / "bomb.png", 100_000, 90_000)
    gc.collect()
    num_open = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        opened = []
        for name in names:
            try:
                opened.append(open_image(tmp_path / name))
            except ValueError as error:
                opened.append(error)
        assert len(os.listdir("/proc/self/fd")) == num_open
    finally:
        gc.enable()
