"""What the methods compute for one answer per pixel: their own terms on the valid pixels, and nothing of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attar
from attar.anatomy.heads import ExitOutput
from attar.errors import AttarError
from attar.functional import kl_divergence
from attar.method import Method, Terms
from attar.methods import AT, BYOT, DML, KD, ONE, SAD, SCD, SPKD, InDistill, Supervised, TfKD
from dense_networks import Dilated, UNet, block

K = 4
VOID = 255


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 3, 32, 48, generator=generator)
    masks = torch.randint(K, (4, 32, 48), generator=generator)
    masks[:, :8] = VOID
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = VOID
    return images, masks


IMAGES, MASKS = _data()
VALID = MASKS != VOID


def built(method: Method, student: Callable[[int], nn.Module] = UNet, **options: object) -> attar.Distiller:
    torch.manual_seed(0)
    task = attar.Segmentation(K, VOID, **options)  # type: ignore[arg-type]
    return attar.Distiller(student(K), [method], task).build(IMAGES).train()


def drawn(network: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return network(K).eval()


def rows(logits: Tensor) -> Tensor:
    """The valid pixels as samples of a classifier: [P, K]."""
    return logits.movedim(1, -1)[VALID]


LABELS = MASKS[VALID]


def answers_of(*networks: nn.Module) -> list[Tensor]:
    """What the networks return in the next step, one tensor of logits each."""
    seen: list[Tensor] = []

    def catch(module: nn.Module, args: object, output: object) -> None:
        output = output["out"] if isinstance(output, dict) else output
        seen.append(getattr(output, "logits", output))

    for network in networks:
        network.register_forward_hook(catch)
    return seen


def kept(distiller: attar.Distiller, name: str | None) -> nn.Module:
    return distiller.strip(name, prove_export=False)


def test_kd_is_that_of_classifiers_over_the_valid_pixels() -> None:
    teachers = [drawn(Dilated), drawn(UNet)]
    distiller = built(KD(teachers, temperature=3.0))
    terms = distiller((IMAGES, MASKS), 0.5)
    with torch.no_grad():
        own = [rows(teachers[0](IMAGES)["out"]), rows(teachers[1](IMAGES))]
    target = torch.stack([(z / 3).softmax(1) for z in own]).mean(0)
    expected = 9 * (target * (target.log() - (rows(terms.logits) / 3).log_softmax(1))).sum() / len(LABELS)
    torch.testing.assert_close(terms.losses["KD.kl"], expected)


def test_a_teacher_of_lower_resolution_is_brought_to_the_students_size() -> None:
    teacher = drawn(UNet)
    low = nn.Sequential(teacher, nn.AvgPool2d(4))
    terms = built(KD(low, temperature=1.0))((IMAGES, MASKS), 0.5)
    target = F.interpolate(low(IMAGES), IMAGES.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(terms.losses["KD.kl"], kl_divergence(rows(terms.logits), rows(target)))


@pytest.mark.parametrize("variant", ["code", "paper", "self-kd-lib"])
def test_the_handmade_teacher_stands_at_every_valid_pixel(variant: str) -> None:
    distiller = built(TfKD(variant=variant, temperature=5.0, true_class=0.9))  # type: ignore[arg-type]
    terms = distiller((IMAGES, MASKS), 0.5)
    p = torch.full((len(LABELS), K), 0.1 / 3).scatter(1, LABELS[:, None], 0.9)
    z = rows(terms.logits)
    if variant == "self-kd-lib":
        expected = -(p * (z / 5).log_softmax(1)).sum(1).mean() / 5
        torch.testing.assert_close(terms.losses["TfKD.cross_entropy"], expected)
        return
    if variant == "paper":
        target, log_q = p.pow(0.2) / p.pow(0.2).sum(1, keepdim=True), (z / 5).log_softmax(1)
    else:
        target, log_q = (p / 5).softmax(1), z.log_softmax(1)
    expected = (target * (target.log() - log_q)).sum(1).mean()
    torch.testing.assert_close(terms.losses["TfKD.kl"], expected)


def test_an_earlier_training_teaches_per_pixel() -> None:
    teacher = drawn(Dilated)
    terms = built(TfKD(teacher), Dilated)((IMAGES, MASKS), 0.5)
    target = rows(teacher(IMAGES)["out"])
    torch.testing.assert_close(terms.losses["TfKD.kl"], kl_divergence(rows(terms.logits), target, 6.0))
    with pytest.raises(AttarError, match="another network than the student"):
        built(TfKD(drawn(UNet)), Dilated)


def test_peers_imitate_each_other_per_pixel_and_learn_their_auxiliary_answers() -> None:
    distiller = built(DML(temperature=2.0), Dilated, auxiliary_weight=0.3)
    peer = distiller.methods["DML"].peers.networks[0]
    whole: list[dict[str, Tensor]] = []
    peer.register_forward_hook(lambda module, args, output: whole.append(output))
    terms = distiller((IMAGES, MASKS), 0.5)
    own, other = rows(terms.logits), rows(whole[0]["out"])
    torch.testing.assert_close(terms.losses["DML.kl"], kl_divergence(own, other, 2.0))
    torch.testing.assert_close(terms.losses["DML.kl_peers"], kl_divergence(other, own, 2.0))
    ce = F.cross_entropy(other, LABELS) + 0.3 * F.cross_entropy(rows(whole[0]["aux"]), LABELS)
    torch.testing.assert_close(terms.losses["DML.ce_peers"], ce)


@pytest.mark.parametrize("target", ["probabilities", "logits"])
def test_the_mean_of_peers_as_target(target: str) -> None:
    distiller = built(DML(peers=2, target=target))  # type: ignore[arg-type]
    seen = answers_of(*distiller.methods["DML"].peers.networks)
    terms = distiller((IMAGES, MASKS), 0.5)
    one, two = map(rows, seen)
    mean = (one.softmax(1) + two.softmax(1)).log() if target == "probabilities" else (one + two) / 2
    torch.testing.assert_close(terms.losses["DML.kl"], kl_divergence(rows(terms.logits), mean))


@pytest.mark.parametrize("cut", [None, "down2"])
def test_one_gates_per_sample_and_distils_per_pixel(cut: str | None) -> None:
    distiller = built(ONE(branches=3, cut=cut))
    method = distiller.methods["ONE"]
    gates: list[Tensor] = []
    method.gate.register_forward_hook(lambda module, args, output: gates.append(output))
    seen = answers_of(*method.tails)
    terms = distiller((IMAGES, MASKS), 0.5)
    (gate,) = gates
    assert gate.shape == (4, 3)
    logits = [terms.logits, *seen]
    ensemble = sum(gate[:, b, None, None, None] * z for b, z in enumerate(logits))
    expected = [kl_divergence(rows(z), rows(ensemble), 3.0, shift=1e-7) for z in logits]
    torch.testing.assert_close(terms.losses["ONE.kl"], torch.stack(expected).sum())
    torch.testing.assert_close(terms.losses["ONE.ce_ensemble"], F.cross_entropy(rows(ensemble), LABELS))
    ce = sum(F.cross_entropy(rows(z), LABELS) for z in seen)
    torch.testing.assert_close(terms.losses["ONE.ce_branches"], ce)
    # Decoder and head are replicated behind the encoder; with a cut inside it what lies behind that too.
    replicated = {name.split(".")[0] for name, _ in method.tails[0].named_parameters()}
    assert replicated == {"up1", "up2", "head"} | ({"down3"} if cut else set())


def test_branches_have_no_auxiliary_answers() -> None:
    distiller = built(ONE(branches=2), Dilated)
    tail = distiller.methods["ONE"].tails[0]
    assert {name.split(".")[0] for name, _ in tail.named_parameters()} == {"head"}
    terms = distiller((IMAGES, MASKS), 0.5)
    assert terms.weights["aux"] == 0.4
    terms.total().backward()
    assert distiller.student.aux_head[1].weight.grad is not None


@pytest.mark.parametrize(
    ("form", "imitate"), [("conference", "deepest"), ("journal", "deepest"), ("conference", "all")]
)
def test_exits_answer_and_imitate_per_pixel(form: str, imitate: str) -> None:
    distiller = built(BYOT(form=form, imitate=imitate))  # type: ignore[arg-type]
    seen = answers_of(*distiller.methods["BYOT"].exits)
    terms = distiller((IMAGES, MASKS), 0.5)
    assert [z.shape for z in seen] == [terms.logits.shape] * 2
    logits = [*map(rows, seen), rows(terms.logits)]
    torch.testing.assert_close(terms.losses["BYOT.ce_exits"], sum(F.cross_entropy(z, LABELS) for z in logits[:-1]))
    pairs = [(0, 2), (1, 2)] if imitate == "deepest" else [(i, j) for i in range(3) for j in range(3) if i != j]
    if form == "conference":
        expected = [kl_divergence(logits[i], logits[j], 3.0) for i, j in pairs]
    else:
        expected = [F.cross_entropy(logits[i] / 3, (logits[j] / 3).softmax(1)) for i, j in pairs]
    torch.testing.assert_close(terms.losses["BYOT.kd"], torch.stack(expected).sum())


def test_the_hint_compares_pooled_features_of_the_encoder() -> None:
    distiller = built(BYOT())
    features: list[Tensor] = []
    deepest: list[Tensor] = []
    for exit_ in distiller.methods["BYOT"].exits:
        exit_.register_forward_hook(lambda module, args, output: features.append(output.features))
    distiller.student.down3.register_forward_hook(lambda module, args, output: deepest.append(output.mean((2, 3))))
    terms = distiller((IMAGES, MASKS), 0.5)
    expected = sum((f - deepest[0]).square().sum(1).mean() for f in features)
    torch.testing.assert_close(terms.losses["BYOT.hint"], expected)


@pytest.mark.parametrize("options", [{}, {"class_weights": (1.0, 2.0, 0.5, 3.0)}, {"dice_weight": 0.7}])
@pytest.mark.parametrize("student", [UNet, Dilated])
def test_label_smoothing_is_the_tasks_own(options: dict[str, object], student: type[nn.Module]) -> None:
    distiller = built(Supervised(label_smoothing=0.2), student, **options)
    whole: list[Tensor | dict[str, Tensor]] = []
    distiller.student.register_forward_hook(lambda module, args, output: whole.append(output))
    terms = distiller((IMAGES, MASKS), 0.5)
    expected = distiller.task.loss(terms.logits, MASKS, label_smoothing=0.2)
    if student is Dilated:
        expected = expected + 0.4 * distiller.task.loss(whole[0]["aux"], MASKS, label_smoothing=0.2)
    torch.testing.assert_close(terms.total(), expected)
    if not options and student is UNet:
        torch.testing.assert_close(expected, F.cross_entropy(rows(terms.logits), LABELS, label_smoothing=0.2))


@pytest.mark.parametrize("options", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "label_smoothing": 0.1}])
def test_masks_are_not_mixed(options: dict[str, float]) -> None:
    with pytest.raises(AttarError, match="Supervised cannot train segmentation, since Mixup and CutMix mix the labels"):
        built(Supervised(**options))


class Classifier(nn.Module):
    """The encoder of `UNet` with a classifier on top."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = block(3, 6, 2), block(6, 8, 2), block(8, 10, 2)
        self.leave = nn.Linear(10, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.leave(self.down3(self.down2(self.down1(images))).mean(dim=(2, 3)))


FEATURE_METHODS: dict[str, Callable[[nn.Module], Method]] = {
    "AT": lambda teacher: AT(teacher),
    "InDistill": lambda teacher: InDistill(teacher),
    "SAD": lambda teacher: SAD(),
    "SCD": lambda teacher: SCD(),
    "SPKD": lambda teacher: SPKD(),
    "SPKD with a teacher": lambda teacher: SPKD(teacher, layers="all"),
}


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_feature_methods_read_the_encoder_as_they_read_a_classifier(name: str) -> None:
    """Every term is that of a classifier with the same encoder, teacher and weights."""
    found: list[Terms] = []
    for network, task, targets in (
        (UNet, attar.Segmentation(K, VOID), MASKS),
        (Classifier, attar.Classification(K), torch.tensor([0, 1, 2, 3])),
    ):
        torch.manual_seed(1)
        encoder = UNet(K).state_dict()
        teacher, student = network(K), network(K)
        for part, shift in ((teacher, 0.01), (student, 0.0)):
            kept = {key: value for key, value in encoder.items() if key.startswith("down")}
            part.load_state_dict(
                {key: v + shift if v.is_floating_point() else v for key, v in kept.items()}, strict=False
            )
        distiller = attar.Distiller(student, [FEATURE_METHODS[name](teacher)], task).build(IMAGES).train()
        if distiller.phases:
            distiller.enter(1)
        found.append(distiller((IMAGES, targets), 0.9))
    term = next(key for key in found[0].losses if "." in key)
    assert found[0].losses[term] > 0
    torch.testing.assert_close(found[0].losses[term], found[1].losses[term])


@pytest.mark.parametrize(
    ("method", "answering"),
    [
        (lambda: ONE(branches=3), lambda method: method.tails),
        (lambda: DML(peers=2), lambda method: method.peers.networks),
        (lambda: BYOT(), lambda method: method.exits),
        (lambda: BYOT(form="journal", imitate="all"), lambda method: method.exits),
    ],
)
def test_what_branches_peers_and_exits_say_of_void_pixels_counts_for_nothing(
    method: Callable[[], Method], answering: Callable[[Method], list[nn.Module]]
) -> None:
    void = ~VALID[:, None].expand(-1, K, -1, -1)
    noise = torch.randn(void.shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for size in (0.0, 30.0):
        distiller = built(method())
        moved = (size * noise * void).requires_grad_()

        def hook(module: nn.Module, args: object, output: Any, moved: Tensor = moved) -> Any:
            if isinstance(output, ExitOutput):
                return output._replace(logits=output.logits + moved)
            return output + moved

        for network in answering(next(iter(distiller.methods.values()))):
            network.register_forward_hook(hook)
        terms = distiller((IMAGES, MASKS), 1.0)
        terms.total().backward()
        assert not moved.grad[void].any()
        assert moved.grad[~void].any()
        losses.append(terms.losses)
    for name, loss in losses[0].items():
        assert torch.equal(loss, losses[1][name]), name


@pytest.mark.parametrize(
    "method",
    [
        lambda: KD(drawn(UNet)),
        lambda: TfKD(),
        lambda: TfKD(variant="self-kd-lib"),
        lambda: DML(),
        lambda: ONE(),
        lambda: BYOT(),
        lambda: Supervised(label_smoothing=0.1),
    ],
)
def test_a_batch_of_void_pixels_alone_teaches_nothing(method: Callable[[], Method]) -> None:
    distiller = built(method())
    terms = distiller((IMAGES, torch.full_like(MASKS, VOID)), 1.0)
    assert all(loss == 0 for name, loss in terms.losses.items() if not name.endswith("hint"))
    terms.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)


@pytest.mark.parametrize("student", [UNet, Dilated])
@pytest.mark.parametrize("method", [lambda: ONE(branches=2), lambda: BYOT(), lambda: DML()])
def test_other_deployables_answer_per_pixel_at_any_size(
    method: Callable[[], Method], student: Callable[[int], nn.Module]
) -> None:
    distiller = built(method(), student)
    distiller((IMAGES, MASKS), 0.5)
    images = torch.randn(2, 3, 48, 64)
    task = distiller.task
    for name in distiller.deployables():
        network = kept(distiller, name)
        output = network(images)
        assert task.logits(output).shape == (2, K, 48, 64)
        if "peer" not in name:  # a peer is a network of the student's kind, and returns what that returns
            assert isinstance(output, Tensor)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (lambda: ONE(branches=2), "ONE.ensemble"),
        (lambda: BYOT(), "BYOT.exit1"),
        (lambda: BYOT(), "BYOT.ensemble"),
        (lambda: DML(), "DML.ensemble"),
    ],
)
def test_they_are_exported(method: Callable[[], Method], name: str) -> None:
    assert isinstance(built(method(), Dilated).strip(name)(IMAGES), Tensor)


def test_the_ensembles_mix_what_their_parts_answer() -> None:
    distiller = built(DML(), Dilated).eval()
    mine, other = (kept(distiller, name)(IMAGES)["out"] for name in (None, "DML.peer1"))
    mixed = kept(distiller, "DML.ensemble")(IMAGES)
    torch.testing.assert_close(mixed.exp(), (mine.softmax(1) + other.softmax(1)) / 2)

    distiller = built(BYOT(), UNet).eval()
    exits = [kept(distiller, f"BYOT.exit{number}")(IMAGES) for number in (1, 2)]
    mixed = kept(distiller, "BYOT.ensemble")(IMAGES)
    torch.testing.assert_close(mixed, torch.stack([*exits, distiller.student(IMAGES)]).mean(0))

    distiller = built(ONE(branches=2, gate="mean"), Dilated).eval()
    branch = kept(distiller, "ONE.branch1")(IMAGES)
    mixed = kept(distiller, "ONE.ensemble")(IMAGES)
    torch.testing.assert_close(mixed, (branch + distiller.student(IMAGES)["out"]) / 2)


class Resizing(nn.Module):
    """Decides at its top level by what the images hold, which a trace would freeze."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down1, self.down2 = block(3, 6, 2), block(6, 8, 2)
        self.decoder = nn.Sequential(block(8, 8), nn.Conv2d(8, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.decoder(self.down2(self.down1(images)))
        if images.isfinite().all():
            x = F.interpolate(x, size=images.shape[-2:], mode="bilinear")
        return x


def test_a_network_that_cannot_be_traced_needs_its_tail() -> None:
    with pytest.raises(AttarError, match=r"cannot be cut at 'decoder\.0' automatically .* tail="):
        built(ONE(), Resizing)
    student = Resizing(K)
    tail = nn.Sequential(student.decoder, nn.Upsample(scale_factor=4, mode="bilinear"))
    distiller = built(ONE(branches=2, cut="down2", tail=tail), lambda classes: student)
    assert distiller((IMAGES, MASKS), 0.5).losses["ONE.kl"] > 0
    # Its exits cannot be kept, but train.
    assert built(BYOT(), Resizing).deployables() == {}
