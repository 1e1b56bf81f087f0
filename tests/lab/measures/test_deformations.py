"""Deformed images against scipy, pixel for pixel, and accuracies against loops over images."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from lab.measures.subjects import PIXELS, both_forms, convolutional, images, left_alone, subject
from manifold_mixup.lab.data import DATASETS, Examples, Pixels, load_data
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures.base import Subject
from manifold_mixup.lab.measures.deformations import (
    DeformationsOptions,
    compute,
    deform,
    requested,
    rotation,
    shear,
    zoom,
)
from manifold_mixup.lab.measures.registry import MEASURES, measure

TABLE_9 = [
    *("rotation_20", "rotation_40", "rotation_60", "rotation_80"),
    *("shear_28.6", "shear_57.3", "shear_114.6", "shear_143.2", "shear_171.9"),
    *(f"zoom_{z}" for z in (20, 40, 60, 80, 120, 140, 160, 180)),
]
SHAPES = [(3, 8, 8), (1, 7, 7), (1, 9, 5), (3, 4, 11)]


def reference(images, matrices, *, order, cval=0.0, centre=None):
    """One channel of one image at a time, by scipy."""
    out = np.empty_like(images)
    middle = (np.array(images.shape[2:]) - 1) / 2 if centre is None else np.array(centre)
    for i, image in enumerate(images):
        matrix = matrices[i if len(matrices) > 1 else 0]
        for c, channel in enumerate(image):
            fill = cval[c] if isinstance(cval, (list, tuple)) else cval
            offset = middle - matrix @ middle
            out[i, c] = ndimage.affine_transform(channel, matrix, offset, order=order, mode="constant", cval=fill)
    return out


def decided(shape, matrices, centre=None):
    """Pixels of the result whose place is neither on the edge of the original nor as near to two of its pixels.

    There scipy goes by its rounding errors. All channels alike: ``(n, 1, height, width)``.
    """
    sides = np.array(shape[1:])
    middle = (sides - 1) / 2 if centre is None else np.array(centre)
    grid = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), axis=-1) - middle
    places = np.einsum("nij,hwj->nhwi", matrices, grid) + middle
    clear = (np.abs(places) > 1e-9) & (np.abs(places - (sides - 1)) > 1e-9)
    clear &= np.abs(places - np.floor(places) - 0.5) > 1e-9
    return clear.all(axis=-1)[:, None]


def drawn(shape, n=12, seed=0):
    """Images without black pixels, so that padding can be told."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n, *shape), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("legacy", [False, True])
def test_nearest_is_scipys_pixel_for_pixel(shape, legacy):
    x = drawn(shape)
    centre = (shape[1] / 2 + 0.5, shape[2] / 2 + 0.5) if legacy else None
    generator = torch.Generator().manual_seed(1)
    for make in (rotation, shear, zoom):
        matrices = make(190 * torch.rand(len(x), dtype=torch.float64, generator=generator))
        found = deform(x, matrices, centre=centre)
        assert found.dtype == torch.uint8
        expected = reference(x.numpy(), matrices.numpy(), order=0, centre=centre)
        clear = decided(shape, matrices.numpy(), centre)
        assert clear.mean() > 0.7
        np.testing.assert_array_equal(found.numpy() * clear, expected * clear)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bilinear_is_scipys(shape, dtype):
    x = drawn(shape).to(dtype) / 255
    generator = torch.Generator().manual_seed(2)
    for make in (rotation, shear, zoom):
        matrices = make(190 * torch.rand(len(x), dtype=torch.float64, generator=generator))
        found = deform(x, matrices, interpolation="bilinear", fill=torch.arange(1, shape[0] + 1) / 8)
        assert found.dtype == dtype
        fill = [(c + 1) / 8 for c in range(shape[0])]
        expected = reference(x.double().numpy(), matrices.numpy(), order=1, cval=fill)
        clear = decided(shape, matrices.numpy())
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        np.testing.assert_allclose(found.numpy() * clear, expected * clear, rtol=0, atol=tolerance)


def test_the_17_of_table_9_on_photograph_sizes_are_scipys():
    x = drawn((3, 32, 32), n=6)
    made = dict(requested(DeformationsOptions(), len(x)))
    assert list(made) == TABLE_9
    for name, matrices in made.items():
        expected = reference(x.numpy(), matrices.numpy(), order=0)
        np.testing.assert_array_equal(deform(x, matrices).numpy(), expected, err_msg=name)


def test_matrices_lead_from_the_result_to_the_original_on_row_and_column():
    a = math.radians(30)
    cos, sin = math.cos(a), math.sin(a)
    thirty = torch.tensor([30.0], dtype=torch.float64)
    for made, expected in [
        (rotation(thirty), [[cos, -sin], [sin, cos]]),
        (shear(thirty), [[1, -sin], [0, cos]]),
        (zoom(thirty), [[0.3, 0], [0, 0.3]]),
    ]:
        torch.testing.assert_close(made, torch.tensor([expected], dtype=torch.float64), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("side", [6, 7])
def test_right_angles_and_mirrors_move_pixels_without_loss(side, interpolation):
    x = drawn((2, side, side)).float() / 255
    angle = torch.tensor([90.0, 180.0, -90.0], dtype=torch.float64)
    for i, turns in enumerate((-1, 2, 1)):
        turned = deform(x, rotation(angle[i : i + 1]), interpolation=interpolation)
        torch.testing.assert_close(turned, x.rot90(turns, (2, 3)), rtol=0, atol=1e-6)
    mirrored = deform(x, shear(angle[1:2]), interpolation=interpolation)
    torch.testing.assert_close(mirrored, x.flip(3), rtol=0, atol=1e-6)
    same = deform(x, zoom(torch.tensor([100.0], dtype=torch.float64)), interpolation=interpolation)
    assert torch.equal(same, x)
    almost = deform(x, zoom(torch.tensor([100 + 1e-8], dtype=torch.float64)), interpolation=interpolation)
    torch.testing.assert_close(almost, x, rtol=0, atol=1e-6)  # rounding errors do not blacken the edge


def test_zooming_in_shows_a_centred_box_and_out_pads():
    x = drawn((1, 8, 8), n=1)
    half = deform(x, zoom(torch.tensor([50.0], dtype=torch.float64)))
    assert torch.equal(half, x[:, :, 2:6, 2:6].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    twice = deform(x, zoom(torch.tensor([200.0], dtype=torch.float64)), fill=7)
    assert torch.equal(twice[0, 0, 2:6, 2:6], x[0, 0, 1::2, 1::2])  # of two pixels that are equally near, the later
    twice[0, 0, 2:6, 2:6] = 7
    assert (twice == 7).all()


def by_loop(model, x, y, options, fill_after=False):
    """Accuracy, image by image: scipy on whole pixels, then the network."""
    right = {}
    for name, matrices in requested(options, len(x)):
        hits = 0
        for i in range(len(x)):
            matrix = matrices[i if len(matrices) > 1 else 0].numpy()[None]
            if fill_after:  # the old way: normalised first, then about a point below and right of the centre
                normal = PIXELS.normalise(x[i : i + 1]).numpy()
                centre = [side / 2 + 0.5 for side in x.shape[2:]]
                image = torch.from_numpy(reference(normal, matrix, order=0, centre=centre))
            else:
                image = PIXELS.normalise(torch.from_numpy(reference(x[i : i + 1].numpy(), matrix, order=0)))
            with torch.no_grad():
                hits += int(model(image).argmax() == y[i])
        right[f"{name}_accuracy"] = 100 * hits / len(x)
    return right


def test_accuracies_are_those_of_a_loop_over_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    x, y = images(31)
    options = DeformationsOptions()
    found = compute(subject(model, pixels=PIXELS, test=(x, y)), options)
    assert list(found) == [f"{name}_accuracy" for name in TABLE_9]
    assert found == pytest.approx(by_loop(model, x, y, options))
    assert len(set(found.values())) > 3


def test_legacy_fills_with_zeros_after_normalisation_about_the_wrong_centre():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    x, y = images(31)
    # no ranges at which a pixel is as near as another: there scipy decides by its rounding errors
    options = DeformationsOptions(legacy=True, zoom=[63, 117])
    found = compute(subject(model, pixels=PIXELS, test=(x, y)), options)
    assert found == pytest.approx(by_loop(model, x, y, options, fill_after=True))
    assert found != compute(subject(model, pixels=PIXELS, test=(x, y)), DeformationsOptions(zoom=[63, 117]))


class Seen(nn.Module):
    """Keeps what it reads."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        self.rows.append(x)
        return torch.zeros(len(x), 3)


def seen(options, n=20, **settings):
    model = Seen()
    x, y = images(20)
    compute(subject(model, pixels=PIXELS, test=(x[:n], y[:n]), **settings), options)
    return torch.cat(model.rows)


def test_every_network_and_run_is_shown_the_same_images_and_every_image_another_angle():
    options = DeformationsOptions(rotation=[40], shear="none", zoom=[])
    first = seen(options)
    assert torch.equal(first, seen(options, seed=5))
    assert torch.equal(first, seen(options, batch_size=3))
    assert torch.equal(first[:8], seen(options, n=8))
    assert torch.equal(first[:8], seen(DeformationsOptions(rotation=40, shear=[], zoom="none", examples=8)))
    assert not torch.equal(first, seen(DeformationsOptions(rotation=[40], shear=[], zoom=[], seed=1)))
    drawn_angles = dict(requested(DeformationsOptions(), 2000))["rotation_20"]
    angles = torch.atan2(drawn_angles[:, 1, 0], drawn_angles[:, 0, 0]).rad2deg()
    assert -20 <= float(angles.min()) < -19.5
    assert 19.5 < float(angles.max()) <= 20
    assert abs(float(angles.mean())) < 1
    assert float(angles.square().mean()) == pytest.approx(400 / 3, rel=0.1)
    shears = dict(requested(DeformationsOptions(shear=[20]), 2000))["shear_20"]
    sines = torch.stack([drawn_angles[:, 0, 1], shears[:, 0, 1]])
    assert abs(float(torch.corrcoef(sines)[0, 1])) < 0.1  # kinds have draws of their own


def test_bilinear_pixels_are_not_rounded_and_padding_is_black_or_the_mean_colour():
    options = {"rotation": [], "shear": [], "zoom": [160], "interpolation": "bilinear"}
    black = seen(DeformationsOptions(**options))
    mean, sd = (torch.tensor(v)[:, None] for v in (PIXELS.mean, PIXELS.sd))
    corners = black[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, (-mean / sd).expand_as(corners))
    pixels = black * sd[:, :, None] * 255 + mean[:, :, None] * 255
    assert (pixels - pixels.round()).abs().max() > 0.1
    legacy = seen(DeformationsOptions(**options, legacy=True))
    assert (legacy[:, :, 0, 0] == 0).all()


def test_the_network_is_left_as_it_was():
    model = convolutional().train()
    task = subject(model, pixels=PIXELS, test=images(12))
    model.train()
    with left_alone(model):
        first = compute(task, DeformationsOptions())
        assert compute(task, DeformationsOptions()) == first


def test_a_diverged_network_is_always_wrong_and_one_grey_image_is_enough():
    class Nan(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :2] * math.nan

    pixels = type(PIXELS)((0.5,), (0.25,))
    task = subject(Nan(), pixels=pixels, test=(drawn((1, 5, 8), n=1), [0]))
    assert set(compute(task, DeformationsOptions()).values()) == {0.0}


def test_examples_that_are_no_images_are_refused():
    task = subject(nn.Linear(2, 2), test=(torch.zeros(3, 2), [0, 1, 0]))
    with pytest.raises(UsageError, match="measure 'deformations' needs images"):
        measure(task, [(MEASURES["deformations"], DeformationsOptions())])


@pytest.mark.parametrize("value", [-1, math.inf, math.nan, "20+", "many", True, [20, "x"], None])
def test_ranges_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="should be numbers of at least 0, such as"):
        DeformationsOptions(rotation=value)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("legacy", [False, True])
def test_images_from_0_to_1_that_are_read_as_they_are_give_the_numbers_of_their_bytes(interpolation, legacy):
    torch.manual_seed(0)
    stored, floating = both_forms(nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    options = DeformationsOptions(interpolation=interpolation, legacy=legacy)
    request = [(MEASURES["deformations"], options)]
    found = measure(floating, request)
    assert len(found) == len(TABLE_9)
    assert len(set(found.values())) > 3
    assert found == measure(stored, request)


def test_the_digits_give_the_numbers_of_their_bytes():
    test = load_data("digits", {}, 0).hand_out_test()
    stored = (test.x * 255).round().to(torch.uint8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    bytes_ = subject(model, pixels=Pixels((0.0,), (1.0,)), test=(stored, test.y))
    digits = Subject(model, DATASETS["digits"].info, {"test": Examples(stored.float() / 255, test.y)}, batch_size=100)
    requests = [
        (MEASURES["deformations"], DeformationsOptions()),
        (MEASURES["fgsm"], MEASURES["fgsm"].options(epsilon=[4, 16])),
    ]
    assert measure(digits, requests) == measure(bytes_, requests)


def test_the_nearest_pixel_of_floating_images_is_taken_to_the_bit():
    x = drawn((1, 8, 8))
    for name, matrices in requested(DeformationsOptions(), len(x)):
        moved = deform(x.float() / 255, matrices)
        assert torch.equal(moved, deform(x, matrices).float() / 255), name


def test_ranges_may_be_written_in_several_ways():
    assert DeformationsOptions(shear="28.6+10").shear == DeformationsOptions(shear=[28.6, 10, 10]).shear == [10, 28.6]
    assert [name for name, _ in requested(DeformationsOptions(rotation=7.5, shear=[], zoom=[1e-5]), 1)] == [
        "rotation_7.5",
        "zoom_1e-05",
    ]


def test_every_number_has_words():
    entry = MEASURES["deformations"]
    assert entry.describe("rotation_20_accuracy").title == "accuracy, rotation ±20°"
    assert entry.describe("shear_28.6_accuracy").title == "accuracy, shear ±28.6°"
    assert entry.describe("zoom_1e-05_accuracy").title == "accuracy, zoom 1e-05 %"
    assert entry.describe("rotation_accuracy") is None
