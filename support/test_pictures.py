"""Pictures: each image and each number is where it should be."""

import numpy as np
import pytest
import torch
from PIL import Image

from support import pictures
from support.pictures import MARGIN, WIDTH, numbered, square, write_picture
from support.processes import UserError


def image_of(value, side=64):
    return torch.full((3, side, side), value, dtype=torch.uint8)


@pytest.mark.parametrize("height, width, side", [(100, 64, 64), (64, 100, 64), (50, 67, 48)])
def test_the_middle_square_is_cut_out_and_divides_by_four(height, width, side):
    y, x = np.mgrid[:height, :width]
    frames = np.stack([y, x, y + x], axis=-1).astype(np.uint8)[None].repeat(2, axis=0)
    squares = square(frames)
    assert squares.shape == (2, 3, side, side) and squares.dtype == torch.uint8
    top, left = squares[1, 0, 0, 0].item(), squares[1, 1, 0, 0].item()
    assert abs(top - (height - side) / 2) <= 0.5 and abs(left - (width - side) / 2) <= 0.5
    part = frames[1, top : top + side, left : left + side]
    assert np.array_equal(squares[1].permute(1, 2, 0).numpy(), part)


def labels_and_boxes(monkeypatch):
    """What is written on each image, and where: a list that grows with each one that is drawn."""
    drawn, original = [], pictures.draw_bounding_boxes

    def recorded(image, boxes, labels, *args, **options):
        drawn.append((image, boxes.tolist(), labels))
        return original(image, boxes, labels, *args, **options)

    monkeypatch.setattr(pictures, "draw_bounding_boxes", recorded)
    return drawn


def test_images_stand_in_a_row_each_with_its_own_numbers(monkeypatch):
    drawn = labels_and_boxes(monkeypatch)
    values = (30, 90, 150, 210)
    images = torch.stack([image_of(value) for value in values])
    stripe = numbered(images, list(range(100, 124)), rows=3, cols=2)
    side = WIDTH // 4 - MARGIN
    pitch = side + MARGIN  # from one image to the next
    assert stripe.dtype == torch.uint8
    assert stripe.shape == (3, side + 2 * MARGIN, 4 * pitch + MARGIN)
    assert [labels for _, _, labels in drawn] == [
        [str(100 + 6 * i + cell) for cell in range(6)] for i in range(4)
    ]
    for i, (value, (image, boxes, _)) in enumerate(zip(values, drawn)):
        assert image.shape == (3, side, side) and (image == value).all()
        place = stripe[:, MARGIN : MARGIN + side, MARGIN + i * pitch : MARGIN + i * pitch + side]
        assert (place == value).float().mean() > 0.8  # the rest are numbers and lines
        for cell, (x1, y1, x2, y2) in enumerate(boxes):
            row, col = divmod(cell, 2)
            want = [col / 2, row / 3, (col + 1) / 2, (row + 1) / 3]
            assert [x1, y1, x2, y2] == pytest.approx([v * side for v in want], abs=1.5)
    assert (stripe[:, :MARGIN] == 255).all() and (stripe[:, :, :MARGIN] == 255).all()


def test_a_number_is_drawn_in_the_upper_left_corner_of_its_cell():
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    numbers = list(range(16))
    stripe = numbered(image, numbers, rows=4, cols=4)
    cell_size = stripe.shape[-1] / 4
    for cell in (0, 3, 6, 13):
        others = numbers[:cell] + [88] + numbers[cell + 1 :]
        other = numbered(image, others, rows=4, cols=4)
        _, y, x = torch.nonzero(stripe != other).T
        row, col = divmod(cell, 4)
        assert len(x) > 10  # pixels that tell one number from another
        for first, last, place in ((y.min(), y.max(), row), (x.min(), x.max(), col)):
            assert 0 <= first / cell_size - place < 0.2 and last / cell_size - place < 0.4


def test_a_single_image_takes_no_more_than_half_of_the_width():
    stripe = numbered(image_of(0)[None], [0])
    assert 0.9 * WIDTH // 2 < stripe.shape[-1] <= WIDTH // 2


def test_stripes_are_written_one_below_the_other_the_narrower_with_a_white_margin(tmp_path):
    wide, narrow = torch.full((3, 10, 40), 7), torch.full((3, 20, 30), 9)
    path = tmp_path / "a:b$1$.png"
    write_picture(path, wide.byte(), narrow.byte())
    picture = np.array(Image.open(path).convert("RGB"))
    assert picture.shape == (30, 40, 3)
    assert (picture[:10] == 7).all() and (picture[10:, :30] == 9).all()
    assert (picture[10:, 30:] == 255).all()


@pytest.mark.parametrize("name", ["absent/a.png", "a.nothing", "a"])
def test_a_picture_that_cannot_be_written_is_a_sentence(name, tmp_path):
    with pytest.raises(UserError, match=f"cannot write .*{name}"):
        write_picture(str(tmp_path / name), image_of(0))
