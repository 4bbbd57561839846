from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
import attar.zoo
from attar.anatomy.bifpn import BiFPN
from attar.errors import AttarError
from attar.functional import attention_map, attention_transfer, flat_map, kl_divergence
from attar.methods import FRSKD
from attar.methods.frskd import SelfTeacher, _margin
from attar.train.cost import multiply_adds
from networks import IMAGES, LABELS, Net

FEATURES = ("at", "fit", "od", "none")


class ReLUNet(nn.Module):
    """Three stages at odd sizes that end in ReLU, as the paper's networks do."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.high = nn.Sequential(nn.Conv2d(8, 10, 3, 2), nn.BatchNorm2d(10), nn.ReLU(inplace=True))
        self.head = nn.Linear(10, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.high(self.middle(self.low(images))).mean(dim=(2, 3)))


ODD = torch.randn(4, 3, 26, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(3))  # 13x11, 7x6, 3x2
ODD_LABELS = torch.tensor([0, 1, 2, 1])


def built(method: FRSKD, seed: int = 0) -> attar.Distiller:
    torch.manual_seed(seed)
    distiller = attar.Distiller(ReLUNet(), [method], attar.Classification(3))
    return distiller.double().build(ODD).train()


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


def self_teacher(channels: tuple[int, ...], width: float, classes: int) -> SelfTeacher:
    widths = [max(8, round(width * c)) for c in channels]
    return SelfTeacher(BiFPN(channels, widths), widths[-1], classes)


def formula(c: tuple[int, ...], w: float, classes: int, depth: int = 2) -> int:
    """frskd.md's count of the self-teacher's parameters."""
    d = [max(8, round(w * x)) for x in c]
    n = len(c)
    node = [depth * (9 * x + x * x + 2 * x) for x in d]
    total = sum(c[i] * d[i] + 2 * d[i] for i in range(n))
    for i in range(1, n):
        total += c[i] * d[i] + 2 * d[i] + node[i] + d[i - 1] * d[i] + 2 * d[i] + (3 if i < n - 1 else 2)
    for i in range(n - 1):
        total += d[i + 1] * d[i] + 2 * d[i] + node[i] + 2
    return total + d[-1] * classes + classes


BASIC, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)


@pytest.mark.parametrize(
    ("channels", "width", "classes", "size", "parameters", "megamacs"),
    [
        ((4, 8), 2, 3, None, 1_895, None),
        (BASIC, 2, 100, 32, 6_375_794, "392.2"),
        (BASIC, 1, 100, 32, 1_983_730, "114.3"),
        ((32, 64, 128), 2, 100, 32, 411_885, "67.7"),
        (BASIC, 2, 200, 56, 6_478_294, "1.20e3"),
        (BOTTLENECK, 2, 1000, 56, "103.6e6", "19.0e3"),
        (BOTTLENECK, 1, 1000, 56, "32.5e6", "5.5e3"),
        (BOTTLENECK, 0.5, 1000, 56, "11.5e6", "1.7e3"),
        (BOTTLENECK, 0.25, 1000, 56, "4.5e6", "0.62e3"),
        ((24, 32, 96, 320), 2, 1000, (56, 28, 14, 7), "2.39e6", "0.19e3"),
    ],
)
def test_published_sizes(
    channels: tuple[int, ...], width: float, classes: int, size: Any, parameters: int | str, megamacs: str | None
) -> None:
    def rounded(value: float, as_in: str) -> float:
        digits = as_in.partition("e")[0].replace("0.", "").replace(".", "")
        return float(f"{value:.{len(digits) - 1}e}")

    with torch.device("meta"):
        teacher = self_teacher(channels, width, classes)
    count = sum(p.numel() for p in teacher.parameters())
    assert count == formula(channels, width, classes)
    assert count == parameters if isinstance(parameters, int) else rounded(count, parameters) == float(parameters)
    if megamacs is not None:
        sizes = size if isinstance(size, tuple) else [size // 2**i for i in range(len(channels))]
        maps = [torch.zeros(1, c, s, s, device="meta") for c, s in zip(channels, sizes, strict=True)]
        assert rounded(multiply_adds(lambda: teacher(maps)) / 1e6, megamacs) == float(megamacs)


@settings(max_examples=20, deadline=None)
@given(
    channels=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    width=st.floats(0.1, 3),
    classes=st.integers(2, 9),
)
def test_the_count_holds_for_any_backbone(channels: list[int], width: float, classes: int) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in self_teacher(tuple(channels), width, classes).parameters())
    assert count == formula(tuple(channels), width, classes)


def test_sized_for_cifar_resnet18_by_itself() -> None:
    """frskd.md: 11,220,132 parameters of the network, 6,375,794 of the self-teacher, 0.706 times the multiply-adds."""
    student = timm.create_model("cifar_resnet18", num_classes=100)
    distiller = attar.Distiller(student, [FRSKD()], attar.Classification(100)).build(torch.zeros(2, 3, 32, 32))
    teacher = distiller.methods["FRSKD"].self_teacher
    assert sum(p.numel() for p in student.parameters()) == 11_220_132
    assert sum(p.numel() for p in teacher.parameters()) == 6_375_794
    image = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        plain = multiply_adds(lambda: distiller.student.eval()(image))
        both = multiply_adds(lambda: distiller.eval()((image, torch.tensor([0])), 0.5))
    assert round((both - plain) / plain, 3) == 0.706


@pytest.mark.parametrize(("limit", "widths"), [(1024, [128, 256, 512, 1024]), (512, [64, 128, 256, 512])])
def test_width_budget(limit: int, widths: list[int]) -> None:
    method = FRSKD(max_channels=limit)
    assert method._widths(BOTTLENECK) == widths
    assert FRSKD()._widths(BASIC) == [128, 256, 512, 1024]
    assert FRSKD(width=0.25)._widths((16, 32, 64)) == [8, 8, 16]
    assert FRSKD(pyramid="bifpn", channels=256)._widths(BASIC) == [256] * 4


def test_attention_worked_example() -> None:
    f = torch.tensor([[[[1, 0], [0, 1]], [[1, 0], [0, 0]]]], dtype=torch.float64)
    t = torch.tensor([[[[2, 0], [0, 0]], [[0, 0], [0, 2]]]], dtype=torch.float64)
    maps = [flat_map(attention_map(x, reduce="mean"), "l2") for x in (f, t)]
    torch.testing.assert_close(maps[0], torch.tensor([[0.894427, 0, 0, 0.447214]]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(maps[1], torch.tensor([[0.707107, 0, 0, 0.707107]]).double(), atol=1e-6, rtol=0)
    assert attention_transfer(f, t).item() == pytest.approx(0.0256584, abs=1e-7)


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.0615542), (4, 16 * 0.00644416), (4, 0.103107)])
def test_kd_worked_example(temperature: float, expected: float) -> None:
    z, z_t = torch.tensor([[1.0, 0, -1]]).double(), torch.tensor([[2.0, 0, 0]]).double()
    assert kl_divergence(z, z_t, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_kd_at_infinite_temperature() -> None:
    z, z_t = torch.tensor([[1.0, 0, -1]]).double(), torch.tensor([[2.0, 0, 0]]).double()
    d = z_t - z
    limit = ((d - d.mean()) ** 2).sum().item() / 6
    assert limit == pytest.approx(0.111111, abs=1e-6)
    assert kl_divergence(z, z_t, 1e4).item() == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("features", FEATURES)
def test_distillation_never_reaches_the_self_teacher(features: str) -> None:
    """The self-teacher's gradient is that of its own cross-entropy, whatever alpha and beta."""
    distiller = built(FRSKD(features=features, alpha=3.0, beta=200.0))
    method = distiller.methods["FRSKD"]
    terms = distiller((ODD, ODD_LABELS), 1.0)
    alone = gradients(terms.losses["FRSKD.ce_teacher"], method.self_teacher)
    together = gradients(terms.total(), method.self_teacher)
    for name, gradient in alone.items():
        assert gradient is not None, name
        torch.testing.assert_close(together[name], gradient, rtol=1e-12, atol=1e-14, msg=name)
    for term in terms.losses.keys() - {"task", "FRSKD.ce_teacher"}:
        assert all(g is None for g in gradients(terms.losses[term], method.self_teacher).values()), term
        assert any(g is not None and g.any() for g in gradients(terms.losses[term], distiller.student).values()), term


def test_detached_input_without_weights_is_plain_training() -> None:
    for detach in (True, False):
        distiller = built(FRSKD(alpha=0.0, beta=0.0, detach_teacher_input=detach))
        terms = distiller((ODD, ODD_LABELS), 1.0)
        plain = gradients(terms.losses["task"], distiller.student)
        found = gradients(terms.total(), distiller.student)
        same = [torch.allclose(found[name], gradient, rtol=1e-12, atol=1e-14) for name, gradient in plain.items()]
        assert all(same) if detach else not any(s for s, name in zip(same, plain, strict=True) if "0.weight" in name)


def test_terms_by_hand() -> None:
    distiller = built(FRSKD())
    method = distiller.methods["FRSKD"]
    terms = distiller((ODD, ODD_LABELS), 1.0)
    student = distiller.student
    low = student.low(ODD)
    middle = student.middle(low)
    maps = [low, middle, student.high(middle)]
    refined, logits = method.self_teacher(maps)
    assert [tuple(t.shape) for t in refined] == [(4, 12, 13, 11), (4, 16, 7, 6), (4, 20, 3, 2)]
    ce, losses = nn.functional.cross_entropy, terms.losses
    torch.testing.assert_close(losses["FRSKD.ce_teacher"], ce(logits, ODD_LABELS))
    torch.testing.assert_close(losses["FRSKD.kl"], kl_divergence(terms.logits, logits, 4.0))
    by_hand = torch.zeros(())
    for f, t in zip(maps, refined, strict=True):
        a, b = (x.square().mean(1).flatten(1) for x in (f, t.relu()))
        a, b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (a, b))
        by_hand = by_hand + (a - b).square().mean()
    torch.testing.assert_close(losses["FRSKD.features"], by_hand)
    weights = {name: float(weight) for name, weight in terms.weights.items()}
    assert weights == {"task": 1.0, "FRSKD.ce_teacher": 1.0, "FRSKD.kl": 2.0, "FRSKD.features": 100.0}


def test_fit_and_od_by_hand() -> None:
    distiller = built(FRSKD(features="fit"))
    method = distiller.methods["FRSKD"]
    found = distiller((ODD, ODD_LABELS), 1.0).losses["FRSKD.features"]
    low = distiller.student.low(ODD)
    middle = distiller.student.middle(low)
    maps = [low, middle, distiller.student.high(middle)]
    refined, _ = method.self_teacher(maps)
    by_hand = sum((r(f) - t.relu()).square().mean() for r, f, t in zip(method.regressors, maps, refined, strict=True))
    torch.testing.assert_close(found, by_hand)

    distiller = built(FRSKD(features="od"))
    method = distiller.methods["FRSKD"]
    found = distiller((ODD, ODD_LABELS), 1.0).losses["FRSKD.features"]
    pre = [distiller.student.low[:2](ODD)]
    pre.append(distiller.student.middle[:2](pre[0].relu()))
    pre.append(distiller.student.high[:2](pre[1].relu()))
    refined, _ = method.self_teacher([p.relu() for p in pre])
    by_hand = torch.zeros(())
    for level, (regress, f, t) in enumerate(zip(method.regressors, pre, refined, strict=True)):
        target = torch.where(t > -math.sqrt(2 / math.pi), t, -math.sqrt(2 / math.pi))
        s = regress(f)
        assert (s < 0).any()  # before ReLU
        kept = ~((s <= target) & (target <= 0))
        by_hand = by_hand + (s - target)[kept].square().sum() / 4 / (4, 2, 1)[level]
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=0.0)
    terms = distiller((ODD, ODD_LABELS), 1.0)
    assert all(g is not None for g in gradients(terms.total(), method.regressors).values())


def test_margin_is_the_mean_of_what_lies_below_zero() -> None:
    norm = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 0.5]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    margin = _margin(norm).flatten()
    draws = torch.randn(400_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = draws * norm.weight[:3].abs() + norm.bias[:3]
    sampled = torch.stack([column[column < 0].mean() for column in draws.unbind(1)])
    torch.testing.assert_close(margin[:3], sampled, rtol=0.01, atol=0.0)
    assert margin[0].item() == pytest.approx(-math.sqrt(2 / math.pi))
    assert margin[3].item() == pytest.approx(-1.5)  # hardly anything below zero: three deviations


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100), side=st.integers(2, 6), samples=st.integers(1, 3))
def test_feature_loss_invariances_and_bound(seed: int, scale: float, side: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    method, features, refined = FRSKD(), [], []
    for size in (2 * side, side):
        features.append(torch.randn(samples, 4, size, size, generator=generator, dtype=torch.float64).relu())
        refined.append(torch.randn(samples, 6, size, size, generator=generator, dtype=torch.float64))
    loss = method._feature_loss(features, refined)
    assert 0 <= loss <= sum(2 / f[0, 0].numel() for f in features) + 1e-12
    scaled = method._feature_loss([scale * f for f in features], refined)
    torch.testing.assert_close(scaled, loss)
    scaled = method._feature_loss(features, [scale * t for t in refined])
    torch.testing.assert_close(scaled, loss)
    order = torch.randperm(4, generator=generator)
    permuted = method._feature_loss([f[:, order] for f in features], refined)
    torch.testing.assert_close(permuted, loss)
    assert method._feature_loss([3 * t.relu() for t in refined], refined) < 1e-20


def test_maps_of_another_size_are_no_silent_broadcast() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        FRSKD()._feature_loss([torch.rand(2, 3, 4, 4)], [torch.rand(2, 3, 1, 1)])


def test_schedules() -> None:
    published = FRSKD().weights(torch.tensor(0.0))
    assert {name: float(weight) for name, weight in published.items()} == {"kl": 2.0, "features": 100.0}
    assert set(FRSKD(features="none").weights(torch.tensor(0.0))) == {"kl"}
    # Segmentation's schedule, of 60 epochs: nothing for 40, then a ramp; the values at the end of each epoch.
    late = FRSKD(alpha=1.0, beta=50.0, start=40 / 60, ramp=20 / 60)
    for epoch, expected in ((0, 0), (39 - 1, 0), (40, 0.01097), (44, 0.06006), (49, 0.28651), (54, 0.73162), (59, 1)):
        weights = late.weights(torch.tensor((epoch + 1) / 60, dtype=torch.float64))
        assert float(weights["kl"]) == pytest.approx(expected, abs=1e-5)
        assert float(weights["features"]) == pytest.approx(50 * expected, abs=5e-4)


@pytest.mark.parametrize("pyramid", ["bifpnc", "bifpn"])
@pytest.mark.parametrize("features", FEATURES)
def test_every_form_trains_and_strips(features: str, pyramid: str) -> None:
    distiller = built(FRSKD(features=features, pyramid=pyramid, channels=6, levels=2, beta=1e-3))
    terms = distiller((ODD, ODD_LABELS), 0.5)
    terms.total().backward()
    assert ("FRSKD.features" in terms.losses) == (features != "none")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    stripped = distiller.strip(prove_export=False)
    assert list(stripped.state_dict()) == list(ReLUNet().state_dict())
    distiller.eval()
    assert torch.equal(stripped(ODD), distiller.student(ODD))
    assert all(m.inplace for m in stripped.modules() if isinstance(m, nn.ReLU))
    twin = built(FRSKD(features=features, pyramid=pyramid, channels=6, levels=2, beta=1e-3), seed=1)
    twin.load_state_dict(distiller.state_dict())
    a, b = (d.eval()((ODD, ODD_LABELS), 0.5).total() for d in (distiller, twin))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("model", "last"),
    [
        (lambda: timm.create_model("resnet18", num_classes=3), "layer4.1.act2"),
        (lambda: torchvision.models.resnet18(num_classes=3), "layer4.1.relu"),
        (lambda: timm.create_model("cifar_resnet20", num_classes=3), "layer3.2.act2"),
        (lambda: timm.create_model("mobilenetv2_050", num_classes=3), None),  # stages end in a linear bottleneck
    ],
)
def test_od_reads_what_the_last_relu_takes(model: Any, last: str | None) -> None:
    torch.manual_seed(0)
    distiller = attar.Distiller(model(), [FRSKD(features="od", width=0.1)], attar.Classification(3))
    distiller.build(torch.randn(2, 3, 64, 64))
    method, stages = distiller.methods["FRSKD"], distiller.anatomy.stages
    if last is None:
        assert list(method._before_relu) == [stage.tap for stage in stages]
        return
    assert (method._before_relu[-1].module, method._before_relu[-1].side) == (last, "input")
    with torch.no_grad():
        for name, parameter in distiller.student.named_parameters():
            if "bn2.weight" in name:
                parameter.fill_(1.0)  # timm begins with zero, where nothing is negative before the ReLU
        outputs = distiller.eval()._pass(torch.randn(2, 3, 64, 64))
    for stage, tap in zip(stages, method._before_relu, strict=True):
        assert (outputs[tap] < 0).any()
        assert torch.equal(outputs[tap].relu(), outputs[stage.tap])


SQUARE = torch.randn(4, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def test_joint_labels_by_hand() -> None:
    """frskd.md's FRSKD+SLA: second passes of both networks on four rotations, image after image."""
    torch.manual_seed(0)
    method = FRSKD(joint_labels=True)
    distiller = attar.Distiller(ReLUNet(), [method], attar.Classification(3)).double().build(SQUARE).train()
    terms = distiller((SQUARE, ODD_LABELS), 1.0)
    losses, student = terms.losses, distiller.student
    rotated = torch.stack([torch.rot90(SQUARE, k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
    targets = torch.stack([4 * ODD_LABELS + k for k in range(4)], 1).flatten()

    def run(images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        low = student.low(images)
        middle = student.middle(low)
        maps = [low, middle, student.high(middle)]
        refined, logits = method.self_teacher(maps)
        return maps, [t.relu() for t in refined], logits

    (f, t, z_t), (f4, t4, _) = run(SQUARE), run(rotated)
    z = terms.logits
    joint, joint_t = method.student_joint(f4[-1].mean((2, 3))), method.teacher_joint(t4[-1].mean((2, 3)))
    ce = nn.functional.cross_entropy
    torch.testing.assert_close(losses["FRSKD.joint"], ce(joint, targets) + ce(joint_t, targets))
    u, u_t = (torch.stack([x.unflatten(0, (4, 4))[:, k, k::4] for k in range(4)]).mean(0) for x in (joint, joint_t))
    both = kl_divergence(z, u, 4.0) + kl_divergence(z_t, u_t, 4.0)
    torch.testing.assert_close(losses["FRSKD.joint_kl"], both)
    torch.testing.assert_close(losses["FRSKD.kl"], (kl_divergence(z, z_t, 4.0) + kl_divergence(u, u_t, 4.0)) / 2)
    by_hand = sum(
        (attention_transfer(a, b) + 4 * attention_transfer(a4, b4)) / 5
        for a, b, a4, b4 in zip(f, t, f4, t4, strict=True)
    )
    torch.testing.assert_close(losses["FRSKD.features"], by_hand)
    weights = {name: float(weight) for name, weight in terms.weights.items()}
    own = {"FRSKD.kl": 2.0, "FRSKD.features": 100.0, "FRSKD.joint": 1.0, "FRSKD.joint_kl": 1.0}
    assert weights == {"task": 1.0, "FRSKD.ce_teacher": 1.0, **own}


def test_joint_labels_gradients_and_way_back() -> None:
    torch.manual_seed(0)
    method = FRSKD(joint_labels=True, features="od", beta=1e-3)
    distiller = attar.Distiller(ReLUNet(), [method], attar.Classification(3)).double().build(SQUARE).train()
    terms = distiller((SQUARE, ODD_LABELS), 1.0)
    kl, joint_kl = terms.losses["FRSKD.kl"], terms.losses["FRSKD.joint_kl"]
    for part in (method.self_teacher, method.teacher_joint):
        assert all(g is None for g in gradients(kl, part).values())
    for part in (method.student_joint, method.teacher_joint):  # the aggregates teach: they are constants
        assert all(g is None for g in gradients(joint_kl, part).values())
    assert any(g is not None and g.any() for g in gradients(joint_kl, method.self_teacher).values())
    terms.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    assert list(distiller.strip().state_dict()) == list(ReLUNet().state_dict())


def test_joint_labels_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(AttarError, match="both set the joint labels"):
        attar.Distiller(ReLUNet(), [FRSKD(joint_labels=True), attar.methods.SLA()], attar.Classification(3))
    methods = [FRSKD(joint_labels=True), attar.methods.Supervised(cutmix=1.0)]
    with pytest.raises(AttarError, match="FRSKD needs labels"):
        attar.Distiller(ReLUNet(), methods, attar.Classification(3))
    with pytest.raises(AttarError, match="not 26 x 22"):
        built(FRSKD(joint_labels=True))


def test_mixed_targets_reach_both_networks() -> None:
    methods = [FRSKD(), attar.methods.Supervised(mixup=0.2)]
    torch.manual_seed(0)
    distiller = attar.Distiller(ReLUNet(), methods, attar.Classification(3)).double().build(ODD).train()
    heard: list[Tensor] = []
    handle = distiller.methods["FRSKD"].self_teacher.register_forward_hook(lambda m, a, out: heard.append(out[1]))
    prepared: list[attar.Batch] = []
    prepare = methods[1].prepare
    methods[1].prepare = lambda batch: prepared.append(prepare(batch)) or prepared[-1]  # type: ignore[method-assign]
    terms = distiller((ODD, ODD_LABELS), 0.5)
    handle.remove()
    soft = prepared[0].targets
    assert soft.shape == (4, 3)
    for name, logits in (("task", terms.logits), ("FRSKD.ce_teacher", heard[0])):
        torch.testing.assert_close(terms.losses[name], nn.functional.cross_entropy(logits, soft.double()))


def test_it_shares_one_pass_with_scd() -> None:
    torch.manual_seed(0)
    methods = [FRSKD(), attar.methods.SCD()]
    distiller = attar.Distiller(ReLUNet(), methods, attar.Classification(3)).double().build(ODD).train()
    passes: list[int] = []
    handle = distiller.student.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    terms = distiller((ODD, ODD_LABELS), 0.5)
    handle.remove()
    assert passes == [4]
    assert {name.partition(".")[0] for name in terms.losses} == {"task", "FRSKD", "SCD"}
    terms.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    alone = built(FRSKD())((ODD, ODD_LABELS), 0.5)
    for name, loss in alone.losses.items():
        torch.testing.assert_close(terms.losses[name], loss, msg=name)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"features": "attention"}, "'at', 'fit', 'od' or 'none'"),
        ({"pyramid": "fpn"}, "'bifpnc' or 'bifpn'"),
        ({"width": 0.0}, "width must be positive"),
        ({"depth": 0}, "at least 1"),
        ({"levels": 1}, "at least two levels"),
        ({"start": 0.8, "ramp": 0.3}, "together at most 1"),
        ({"features": "od", "batch_norm": False}, "leave batch_norm on"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        FRSKD(**options)


def test_too_few_stages_are_refused() -> None:
    for method, stages in ((FRSKD(), ["high"]), (FRSKD(levels=3), None)):
        distiller = attar.Distiller(Net(), [method], attar.Classification(3), stages=stages)
        with pytest.raises(AttarError, match="name more with stages"):
            distiller.build(IMAGES.float())


def test_two_levels_are_enough() -> None:
    torch.manual_seed(0)
    distiller = attar.Distiller(Net(), [FRSKD()], attar.Classification(3)).double().build(IMAGES)
    terms = distiller((IMAGES, LABELS), 0.5)
    assert torch.isfinite(terms.total())
