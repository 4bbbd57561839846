"""FRSKD on dense networks: the published form on a neck, and the form over any encoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import attar
import attar.zoo
from attar.anatomy import Tap
from attar.anatomy.neck import BiFPNNeck
from attar.errors import AttarError
from attar.method import Outputs
from attar.methods import FRSKD
from attar.methods.frskd import _margin
from attar.testing import MethodContract

CLASSES, SIZE, VOID = 4, (33, 47), 255
IMAGES = torch.randn(3, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MASKS = torch.randint(CLASSES, (3, *SIZE), generator=torch.Generator().manual_seed(2))
MASKS[:, :7] = VOID
MASKS[0, :, 20:33] = VOID
VALID = MASKS != VOID


def block(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def enlarged(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Necked(nn.Module):
    """Four maps of five channels, a neck of attar's on them, a head on its finest map."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(3, 6), block(6, 8), block(8, 8), block(8, 10)])
        self.laterals = nn.ModuleList([nn.Conv2d(c, 5, 1) for c in (6, 8, 8, 10)])
        self.neck = BiFPNNeck(5, 4, 2, ends_fine=True)
        self.head = nn.Conv2d(5, classes, 3, padding=1)

    def maps(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        return self.neck(maps)

    def forward(self, images: Tensor) -> Tensor:
        return enlarged(self.head(self.maps(images)[0]), images.shape[2:])


class Own(nn.Module):
    """A pyramid of one's own, three maps of five channels after ReLU; answers with a dict, as torchvision's do."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, 6), block(6, 8), block(8, 10)])
        self.maps = nn.ModuleList([block(c, 5, 1) for c in (6, 8, 10)])
        self.head, self.aux = nn.Conv2d(15, classes, 1), nn.Conv2d(10, classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps, x, size = [], images, images.shape[2:]
        for down, to_map in zip(self.down, self.maps, strict=True):
            x = down(x)
            maps.append(to_map(x))
        joined = torch.cat([maps[0], *(enlarged(m, maps[0].shape[2:]) for m in maps[1:])], dim=1)
        return {"out": enlarged(self.head(joined), size), "aux": enlarged(self.aux(x), size)}


class UNet(nn.Module):
    """An encoder of three stages and concatenating skips."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.low, self.middle, self.high = block(3, 6), block(6, 8), block(8, 10)
        self.up2, self.up1 = block(18, 8, 1), block(14, 6, 1)
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        low = self.low(images)
        middle = self.middle(low)
        high = self.high(middle)
        x = self.up2(torch.cat([enlarged(high, middle.shape[2:]), middle], 1))
        x = self.up1(torch.cat([enlarged(x, low.shape[2:]), low], 1))
        return enlarged(self.head(x), images.shape[2:])


OWN_MAPS = ("maps.0", "maps.1", "maps.2")


def built(student: nn.Module, **options: Any) -> attar.Distiller:
    torch.manual_seed(0)
    distiller = attar.Distiller(student, [FRSKD(**options)], attar.Segmentation(CLASSES))
    return distiller.double().build(IMAGES).train()


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


FORMS = {"neck": (Necked, {}), "own maps": (Own, {"maps": OWN_MAPS}), "encoder": (UNet, {})}


def form(name: str, **options: Any) -> attar.Distiller:
    make, own = FORMS[name]
    return built(make(), **own, **options)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_sizes_on_the_published_student() -> None:
    """frskd.md: self-teacher of 2 layers, the last only top-down: 4,352 parameters at d0, its head 196,629."""
    student = timm.create_model("bifpn_efficientnet_b0", num_classes=21)
    keys = list(student.state_dict())
    distiller = attar.Distiller(student, [FRSKD()], attar.Segmentation(21)).build(torch.randn(2, 3, 64, 96))
    teacher = distiller.methods["FRSKD"].self_teacher
    assert [(len(layer.up), len(layer.down)) for layer in teacher.pyramid.layers] == [(6, 5), (6, 0)]
    assert (parameters(teacher.pyramid), parameters(teacher.head)) == (4_352, 196_629)
    masks = torch.randint(21, (2, 64, 96))
    terms = distiller.train()((torch.randn(2, 3, 64, 96), masks), 1.0)
    assert {name: float(weight) for name, weight in terms.weights.items()} == {
        "task": 1.0,
        "FRSKD.ce_teacher": 1.0,
        "FRSKD.kl": 1.0,
        "FRSKD.features": 50.0,
    }
    terms.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    assert list(distiller.strip(prove_export=False).state_dict()) == keys


def test_values_are_those_published_for_the_task() -> None:
    method = form("neck").methods["FRSKD"]
    assert (method.alpha, method.beta, method.temperature) == (1.0, 50.0, 1.0)
    assert (method.start, method.ramp) == pytest.approx((2 / 3, 1 / 3))
    method = form("neck", alpha=3.0, beta=0.0, temperature=2.0, start=0.5).methods["FRSKD"]
    assert (method.alpha, method.beta, method.temperature, method.start, method.ramp) == (3.0, 0.0, 2.0, 0.5, 0.5)
    method = FRSKD()
    assert (method.alpha, method.beta, method.temperature, method.start, method.ramp) == (2.0, 100.0, 4.0, 0.0, 0.0)


@pytest.mark.parametrize("options", [{"start": 40 / 60, "ramp": 20 / 60, "alpha": 1.0, "beta": 50.0}, {}])
def test_schedule_of_the_60_epoch_recipe(options: dict[str, float]) -> None:
    """frskd.md's values, whether progress moves by the epoch or by the step (100 of them in an epoch)."""
    method = form("neck", **options).methods["FRSKD"]
    listed = {0: 0, 38: 0, 39: 0, 40: 0.01097, 44: 0.06006, 49: 0.28651, 54: 0.73162, 59: 1}
    for epoch, expected in listed.items():
        method.epoch_start(epoch, 60)
        for progress in (epoch / 60, (100 * epoch + 1) / 6000, (100 * epoch + 99) / 6000):
            weights = method.weights(torch.zeros(()).fill_(progress))
            assert float(weights["kl"]) == pytest.approx(expected, abs=1e-5)
            assert float(weights["features"]) == pytest.approx(50 * expected, abs=5e-4)
    t = torch.arange(1, 21) / 20
    exact = torch.exp(-5 * (1 - t) ** 2)
    for epoch, expected in zip(range(40, 60), exact.tolist(), strict=True):
        method.epoch_start(epoch, 60)
        assert float(method.weights(torch.zeros(()).fill_(epoch / 60))["kl"]) == pytest.approx(expected, rel=1e-5)


def test_without_epochs_the_schedule_follows_progress() -> None:
    method = form("neck").methods["FRSKD"]
    for progress, expected in ((0.5, 0.0), (2 / 3 + 1e-6, math.exp(-5)), (5 / 6, math.exp(-1.25)), (1.0, 1.0)):
        assert float(method.weights(torch.tensor(progress))["kl"]) == pytest.approx(expected, rel=1e-3)


def attention(f: Tensor, t: Tensor) -> Tensor:
    a, b = (x.square().mean(1).flatten(1) for x in (f, t))
    a, b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (a, b))
    return (a - b).square().mean()


def cross_entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1).permute(0, 2, 3, 1)[VALID]
    return -log_p[torch.arange(len(log_p)), MASKS[VALID]].mean()


@pytest.mark.parametrize("count_void", [False, True])
def test_terms_on_a_neck_by_hand(count_void: bool) -> None:
    distiller = built(Necked(), count_void=count_void)
    student, teacher = distiller.student, distiller.methods["FRSKD"].self_teacher
    terms = distiller((IMAGES, MASKS), 1.0)
    s = student.maps(IMAGES)
    o1 = enlarged(student.head(s[0]), SIZE)
    refined = s
    for layer in teacher.pyramid.layers:
        refined = layer(refined)
    hidden = F.relu(teacher.head.bn(teacher.head.conv(refined[0])))
    o2 = enlarged(teacher.head.classifier(hidden), SIZE)
    torch.testing.assert_close(terms.logits, o1)
    torch.testing.assert_close(terms.losses["task"], cross_entropy(o1))
    torch.testing.assert_close(terms.losses["FRSKD.ce_teacher"], cross_entropy(o2))
    pixels = (o2.softmax(1) * (o2.log_softmax(1) - o1.log_softmax(1))).sum(1)
    expected = pixels.mean() if count_void else pixels[VALID].mean()
    torch.testing.assert_close(terms.losses["FRSKD.kl"], expected)
    levels = [attention(a, b) for a, b in zip(s, refined, strict=True)]
    torch.testing.assert_close(terms.losses["FRSKD.features"], torch.stack(levels).sum())
    torch.testing.assert_close(
        terms.total(), cross_entropy(o1) + cross_entropy(o2) + expected + 50 * torch.stack(levels).sum()
    )


def test_terms_over_an_encoder_by_hand() -> None:
    distiller = built(UNet())
    student, method = distiller.student, distiller.methods["FRSKD"]
    assert [tap.module for tap in method._maps] == ["low", "middle", "high"]
    terms = distiller((IMAGES, MASKS), 1.0)
    low = student.low(IMAGES)
    middle = student.middle(low)
    maps = [low, middle, student.high(middle)]
    refined = [t.relu() for t in method.self_teacher.pyramid(maps)]
    assert [tuple(t.shape) for t in refined] == [(3, 12, 17, 24), (3, 16, 9, 12), (3, 20, 5, 6)]
    o1, o2 = terms.logits, method.self_teacher.head(refined[0], SIZE)
    assert method.self_teacher.head.conv.out_channels == 24
    torch.testing.assert_close(terms.losses["FRSKD.ce_teacher"], cross_entropy(o2))
    pixels = (o2.softmax(1) * (o2.log_softmax(1) - o1.log_softmax(1))).sum(1)
    torch.testing.assert_close(terms.losses["FRSKD.kl"], pixels[VALID].mean())
    levels = [attention(a, b) for a, b in zip(maps, refined, strict=True)]
    torch.testing.assert_close(terms.losses["FRSKD.features"], torch.stack(levels).sum())


def test_kl_worked_example_with_a_void_pixel() -> None:
    """frskd.md's example, z = (1, 0, -1) and z_t = (2, 0, 0): 0.0615542 at T = 1; a third, void pixel has 1.0833."""
    z = torch.tensor([[1.0, 0, -1], [1, 0, -1], [-2, 0, 0]], dtype=torch.float64).T.reshape(1, 3, 1, 3)
    z_t = torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 0, 0]], dtype=torch.float64).T.reshape(1, 3, 1, 3)
    masks = torch.tensor([[[0, 1, VOID]]])
    task = attar.Segmentation(3)
    outputs = Outputs(z, z, {Tap("map"): z}, None, task.loss, None)  # type: ignore[arg-type]
    batch = attar.Batch(z, masks, valid=task.valid(masks))
    void = math.log((2 + math.exp(-2)) / 3) + 2 / 3
    for count_void, expected in ((False, 0.0615542), (True, (2 * 0.0615542 + void) / 3)):
        method = FRSKD(features="none", temperature=1.0, count_void=count_void)
        method._maps = (Tap("map"),)
        method.self_teacher = lambda maps, size: (maps, z_t)
        losses = method.losses(outputs, batch, torch.tensor(1.0))
        assert float(losses["kl"]) == pytest.approx(expected, abs=1e-6)
        assert float(losses["ce_teacher"]) == pytest.approx(float(F.cross_entropy(z_t, masks, ignore_index=VOID)))


@pytest.mark.parametrize("features", ["at", "fit"])
@pytest.mark.parametrize("name", FORMS)
def test_distillation_never_reaches_the_self_teacher(name: str, features: str) -> None:
    distiller = form(name, alpha=3.0, beta=200.0, features=features)
    teacher = distiller.methods["FRSKD"].self_teacher
    terms = distiller((IMAGES, MASKS), 1.0)
    alone = gradients(terms.losses["FRSKD.ce_teacher"], teacher)
    together = gradients(terms.total(), teacher)
    for parameter, gradient in alone.items():
        assert gradient is not None, parameter
        torch.testing.assert_close(together[parameter], gradient, rtol=1e-12, atol=1e-14, msg=parameter)
    for term in ("FRSKD.kl", "FRSKD.features"):
        assert all(g is None for g in gradients(terms.losses[term], teacher).values()), term
        assert any(g is not None and g.any() for g in gradients(terms.losses[term], distiller.student).values()), term
    terms.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


@pytest.mark.parametrize("name", FORMS)
def test_without_weights_only_cross_entropies_are_learnt(name: str) -> None:
    for detach in (True, False):
        distiller = form(name, alpha=0.0, beta=0.0, detach_teacher_input=detach)
        terms = distiller((IMAGES, MASKS), 1.0)
        both = sum(
            terms.weights[term] * loss for term, loss in terms.losses.items() if term.startswith(("task", "aux"))
        )
        plain = gradients(both, distiller.student)
        expected = gradients(both + terms.losses["FRSKD.ce_teacher"], distiller.student)
        found = gradients(terms.total(), distiller.student)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-12, atol=1e-14, msg=parameter)
        first = next(iter(plain))
        assert torch.allclose(found[first], plain[first], rtol=1e-12, atol=1e-14) == detach


def test_before_the_start_nothing_is_distilled() -> None:
    weights = form("encoder")((IMAGES, MASKS), 0.5).weights
    assert (float(weights["FRSKD.kl"]), float(weights["FRSKD.features"]), weights["FRSKD.ce_teacher"]) == (0, 0, 1)


@pytest.mark.parametrize("name", FORMS)
def test_a_batch_of_void_alone_is_no_accident(name: str) -> None:
    distiller = form(name)
    terms = distiller((IMAGES, torch.full_like(MASKS, VOID)), 1.0)
    assert [terms.losses[n].item() for n in ("task", "FRSKD.ce_teacher", "FRSKD.kl")] == [0, 0, 0]
    terms.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


def test_fit_and_od_over_an_encoder() -> None:
    fit = built(UNet(), features="fit")
    method = fit.methods["FRSKD"]
    assert [block[0].out_channels for block in method.regressors] == [12, 16, 20]
    assert torch.isfinite(fit((IMAGES, MASKS), 1.0).losses["FRSKD.features"])
    od = built(UNet(), features="od", beta=1e-3)
    method = od.methods["FRSKD"]
    assert [(tap.module, tap.side) for tap in method._before_relu] == [
        (f"{s}.2", "input") for s in ("low", "middle", "high")
    ]
    for i, end in enumerate(method.self_teacher.pyramid.ends):
        torch.testing.assert_close(getattr(method, f"margin_{i}"), _margin(end[-1]), rtol=1e-6, atol=0.0)
    assert torch.isfinite(od((IMAGES, MASKS), 1.0).losses["FRSKD.features"])


def test_width_over_an_encoder() -> None:
    """Only the levels that pass 256 channels are lowered: lraspp's are 16, 24, 40 and 960 wide."""
    student = torchvision.models.get_model(
        "lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=CLASSES
    )
    images = torch.randn(2, 3, 64, 96)
    distiller = attar.Distiller(student, [FRSKD()], attar.Segmentation(CLASSES)).build(images).train()
    teacher = distiller.methods["FRSKD"].self_teacher
    refined, logits = teacher([torch.rand(2, c, s, s) for c, s in ((16, 32), (24, 16), (40, 8), (960, 4))], (64, 96))
    assert [t.shape[1] for t in refined] == [32, 48, 80, 256]
    assert logits.shape == (2, CLASSES, 64, 96)
    assert (teacher.head.conv.out_channels, teacher.head.classifier.out_channels) == (64, CLASSES)
    terms = distiller((images, torch.randint(CLASSES, (2, 64, 96))), 1.0)
    terms.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


@pytest.mark.parametrize(
    ("student", "options", "sentence"),
    [
        (Own, {"maps": ("maps.0", "maps.3")}, "maps.3"),
        (Own, {"maps": ("maps.0", "down.1")}, r"two maps or more of one width, but these have \[5, 8\]"),
        (Own, {"maps": ("maps.0",)}, "two maps or more"),
        (Necked, {"features": "od"}, "compare maps before ReLU"),
        (Necked, {"ramp": 0.5}, "together at most 1, not 0.666667 and 0.5"),
        (Necked, {"joint_labels": True}, "cannot train segmentation, since joint_labels name the rotation"),
    ],
)
def test_what_cannot_be_is_refused(student: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(student(), **options)


def test_maps_belong_to_dense_tasks() -> None:
    network = nn.Sequential(block(3, 4), block(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(AttarError, match="maps are those of a dense network's neck"):
        attar.Distiller(network, [FRSKD(maps=("0", "1"))], attar.Classification(3)).build(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("options", [{"layers": 0}, {"head_channels": 0}])
def test_sizes_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(AttarError, match="layers and head_channels of at least 1"):
        FRSKD(**options)


class Contract(MethodContract):
    num_classes = CLASSES
    image_size = (32, 48)
    batch_size = 2

    def task(self) -> attar.Segmentation:
        return attar.Segmentation(self.num_classes)

    @pytest.mark.slow
    def test_compiled_step_equals_eager(self) -> None:
        super().test_compiled_step_equals_eager()


class TestOnANeck(Contract):
    def method(self) -> FRSKD:
        return FRSKD()

    def student(self) -> nn.Module:
        return Necked()


class TestOnOwnMaps(Contract):
    def method(self) -> FRSKD:
        return FRSKD(maps=OWN_MAPS, features="fit")

    def student(self) -> nn.Module:
        return Own()


class TestOverAnEncoder(Contract):
    def method(self) -> FRSKD:
        return FRSKD()

    def student(self) -> nn.Module:
        return UNet()


del Contract
