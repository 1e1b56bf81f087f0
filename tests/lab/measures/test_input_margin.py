"""Distances to the decision boundary where they have a closed form, and against slow loops where not."""

import math

import pytest
import torch
from torch import nn

from lab.measures.subjects import PIXELS, Given, convolutional, images, left_alone, subject
from manifold_mixup.lab.measures import input_margin
from manifold_mixup.lab.measures.input_margin import (
    InputMarginOptions,
    compute,
    first_order_margins,
    line_margins,
    logit_margins,
)
from manifold_mixup.lab.measures.registry import MEASURES


def linear(inputs, classes, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, classes)


def exact(model, x, y):
    """The distance of each point to the nearest hyperplane between its class and another, 0 on the wrong side."""
    w, b = model.weight.detach().double(), model.bias.detach().double()
    found = []
    for point, own in zip(x.double(), y.tolist(), strict=True):
        rivals = [j for j in range(len(b)) if j != own]
        found.append(min(float(((w[own] - w[j]) @ point + b[own] - b[j]) / (w[own] - w[j]).norm()) for j in rivals))
    return torch.tensor(found, dtype=torch.float64).clamp(min=0)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_linear_classifier_has_its_exact_distances(classes):
    model, x = linear(4, classes), torch.randn(60, 4)
    y = torch.randint(classes, (60,))
    expected = exact(model, x, y)
    assert 0 < int((expected == 0).sum()) < 60
    torch.testing.assert_close(first_order_margins(subject(model), x, y), expected, rtol=1e-4, atol=1e-6)
    found = compute(subject(model, test=(x, y)), InputMarginOptions(examples=60))
    assert found["input_margin"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_distances_of_images_are_in_units_where_white_is_one():
    model = nn.Sequential(nn.Flatten(), linear(108, 3))
    x, y = images(40)
    task = subject(model, pixels=PIXELS, test=(x, y))
    # in these units the network is linear too, with weights divided by the standard deviations
    unit = nn.Linear(108, 3)
    sd = torch.tensor(PIXELS.sd).repeat_interleave(36)
    mean = torch.tensor(PIXELS.mean).repeat_interleave(36)
    with torch.no_grad():
        unit.weight.copy_(model[1].weight / sd)
        unit.bias.copy_(model[1].bias - unit.weight @ mean)
    expected = exact(unit, x.flatten(1) / 255, y).mean().item()
    found = compute(task, InputMarginOptions())
    assert found["input_margin"] == pytest.approx(expected, rel=1e-4)
    assert found["line_margin"] >= found["input_margin"] > 0


def test_fewer_rivals_are_those_of_the_largest_logits():
    model, x = linear(3, 6), torch.randn(50, 3)
    y = model(x).argmax(dim=1)
    w, b = model.weight.detach().double(), model.bias.detach().double()
    logits = (x.double() @ w.T + b).sort(dim=1, descending=True)
    for rivals in (1, 2, 4):
        expected = []
        for i in range(50):
            first, *others = logits.indices[i, : rivals + 1].tolist()
            gaps = [float(logits.values[i, 0] - (w[j] @ x[i].double() + b[j])) for j in others]
            expected.append(min(gap / float((w[first] - w[j]).norm()) for gap, j in zip(gaps, others, strict=True)))
        found = first_order_margins(subject(model), x, y, rivals)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_examples_of_one_batch_do_not_mix(monkeypatch):
    model = convolutional()
    x, y = images(15)
    task = subject(model, pixels=PIXELS)
    whole = first_order_margins(task, x.float() / 255, y)
    monkeypatch.setattr(input_margin, "GRADIENT_BATCH", 1)
    torch.testing.assert_close(first_order_margins(task, x.float() / 255, y), whole, rtol=1e-4, atol=1e-7)


def test_a_tie_and_the_wrong_side_are_at_distance_zero_and_a_constant_network_has_no_boundary():
    x, y = torch.tensor([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]), torch.zeros(3, dtype=torch.long)
    found = first_order_margins(subject(Given()), x, y)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, math.sqrt(2)], dtype=torch.float64))
    constant = linear(2, 2)
    nn.init.zeros_(constant.weight)
    with torch.no_grad():
        constant.bias.copy_(torch.tensor([1.0, 0.0]))
    for model in (constant, Fixed()):
        task = subject(model, test=(x, [0, 0, 0]))
        assert first_order_margins(task, x, y).tolist() == [math.inf] * 3
        assert first_order_margins(task, x, y + 1).tolist() == [0.0] * 3
        measured = compute(task, InputMarginOptions())
        assert measured == {"input_margin": math.inf, "line_margin": math.inf, "logit_margin": 1.0}


class Fixed(nn.Module):
    """Logits that nothing can be differentiated through."""

    def forward(self, x):
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)


def test_a_class_that_is_ruled_out_is_no_rival():
    model = Masked()
    x = torch.tensor([[3.0, 1.0, 9.0], [1.0, 3.0, 9.0]])
    found = first_order_margins(subject(model), x, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.full((2,), math.sqrt(2), dtype=torch.float64))


class Masked(nn.Module):
    def forward(self, x):
        return x.masked_fill(torch.tensor([False, False, True]), -math.inf)


class Disc(nn.Module):
    """Class 1 inside a disc of radius 2 about the origin, class 0 outside."""

    def forward(self, x):
        inside = 2 - x.norm(dim=1)
        return torch.stack([torch.zeros_like(inside), inside], dim=1)


def test_lines_end_where_they_meet_a_disc():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0], [-6.0, 0.0]])
    y = torch.tensor([1, 1, 0, 0])
    ends = torch.tensor([[0.0, 5.0], [-6.0, 0.0], [0.0, -0.5], [-0.5, 0.0]])
    end_y = torch.tensor([0, 0, 1, 1])
    found = line_margins(subject(Disc()), x, y, ends, end_y, end_y)
    # from (1, 0) to (0, 5): (1 - t, 5 t) has length 2 where 26 t² - 2 t - 3 = 0
    t = (2 + math.sqrt(4 + 12 * 26)) / 52
    # from (0, 5) to (-0.5, 0), nearer than (0, -0.5): (-0.5 s, 5 - 5 s) has length 2 where 25.25 s² - 50 s + 21 = 0
    s = (50 - math.sqrt(2500 - 4 * 25.25 * 21)) / 50.5
    # from (-6, 0) straight to (-0.5, 0)
    expected = torch.tensor([2.0, t * math.sqrt(26), s * math.sqrt(25.25), 4.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_lines_lead_to_the_nearest_example_that_is_of_another_class_and_predicted_as_one(monkeypatch):
    model = linear(3, 4)
    x = torch.randn(30, 3)
    y = model(x).argmax(dim=1)
    ends, end_y = torch.randn(50, 3), torch.randint(4, (50,))
    end_labels = model(ends).argmax(dim=1)
    expected = []
    for point, own in zip(x, y, strict=True):
        targets = [e for e, c, p in zip(ends, end_y, end_labels, strict=True) if c != own and p != own]
        step = min(((e - point).double() for e in targets), key=lambda d: d.norm())
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            changed = model.double()(point.double() + middle * step).argmax() != own
            low, high = (low, middle) if changed else (middle, high)
        model.float()
        expected.append(high * float(step.norm()))
    for block in (7, 1000):
        monkeypatch.setattr(input_margin, "BLOCK", block)
        found = line_margins(subject(model), x, y, ends, end_y, end_labels)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    bound = exact(model, x, y)
    assert (found >= bound * (1 - 1e-4)).all()


def test_logit_margins_are_negative_on_the_wrong_side():
    logits = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [1.0, 1.0, -math.inf]], dtype=torch.float64)
    assert logit_margins(logits, torch.tensor([0, 1, 0])).tolist() == [0.5, -2.0, 0.0]


def test_misclassified_examples_count_as_zero():
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]])
    found = compute(subject(Given(), test=(x, [0, 1, 0, 0])), InputMarginOptions())
    # the two that are right lie sqrt(2) from the diagonal and look straight at each other
    assert found["input_margin"] == pytest.approx(2 * math.sqrt(2) / 4)
    assert found["line_margin"] == pytest.approx(2 * math.sqrt(2) / 4)
    assert found["logit_margin"] == pytest.approx((2 + 2 - 3 - 4) / 4)
    wrong = compute(subject(Given(), test=(x, [1, 0, 0, 0])), InputMarginOptions())
    assert wrong["input_margin"] == wrong["line_margin"] == 0


def test_one_class_one_example_and_outputs_that_are_no_numbers_are_results():
    x = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    one_class = compute(subject(Given(), test=(x, [0, 0])), InputMarginOptions())
    assert one_class["input_margin"] == pytest.approx(2.5 / math.sqrt(2))
    assert one_class["line_margin"] == math.inf
    alone = compute(subject(Given(), test=(x[:1], [0])), InputMarginOptions())
    assert alone == {"input_margin": pytest.approx(math.sqrt(2)), "line_margin": math.inf, "logit_margin": 2.0}
    x[0, 0] = math.nan
    unknown = compute(subject(Given(), test=(x, [0, 0])), InputMarginOptions())
    assert len(unknown) == 3
    assert all(math.isnan(value) for value in unknown.values())
    assert first_order_margins(subject(Given()), x, torch.tensor([0, 0])).isnan().tolist() == [True, False]


def test_the_network_is_left_as_it_was_and_examples_are_drawn_from_the_seed():
    x, y = images(60)
    model = convolutional()
    tasks = [subject(model, pixels=PIXELS, test=(x, y), seed=seed) for seed in (0, 0, 1)]
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    stored = x.clone()
    with left_alone(model):
        first, second, third = (compute(task, InputMarginOptions(examples=20)) for task in tasks)
    assert torch.equal(x, stored)
    assert first == second
    assert first["logit_margin"] != third["logit_margin"]
    assert all(MEASURES["input_margin"].describe(name) for name in first)


def test_a_network_that_works_in_place_leaves_the_examples_alone():
    x = torch.randn(10, 2)
    stored = x.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), linear(2, 2))
    found = first_order_margins(subject(model), x, model[1](x.relu()).argmax(dim=1))
    assert torch.equal(x, stored)
    assert (found > 0).all()
