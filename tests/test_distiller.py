from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import Tensor, nn

import attar
import attar.distiller
from attar.errors import AttarError
from attar.method import Batch, Method, Outputs
from attar.methods import KD, ONE, Supervised
from networks import IMAGES, LABELS, Net


def built(*methods: Method, **options: object) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(Net(batch_norm=True).double(), methods, attar.Classification(3), **options).build(IMAGES)


class Probing(Method):
    """Records what it is given and asks for a second pass."""

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        self.seen = outputs
        rotated = outputs.student(batch.images.rot90(1, (2, 3)))
        with torch.no_grad():
            self.quiet = outputs.student(batch.images)
        return {"rotation": (outputs.logits - rotated.logits).square().mean()}


def test_methods_compose_in_one_forward() -> None:
    passes = []
    distiller = built(ONE(branches=2), KD(Net().double(), task_weight=1.0), Supervised(label_smoothing=0.1))
    distiller.student.low.register_forward_hook(lambda m, a, o: passes.append(1))
    terms = distiller((IMAGES, LABELS), torch.tensor(0.5))
    assert list(terms.losses) == ["task", "ONE.ce_branches", "ONE.ce_ensemble", "ONE.kl", "KD.kl"]
    assert len(passes) == 1
    by_hand = sum(terms.weights[name] * loss for name, loss in terms.losses.items())
    torch.testing.assert_close(terms.total(), by_hand)


def test_outputs_hold_stages_embedding_and_further_passes() -> None:
    distiller = built(Probing())
    terms = distiller((IMAGES, LABELS), 0.5)
    seen, student = distiller.methods["Probing"].seen, distiller.student.eval()
    assert [stage.shape for stage in seen.stages] == [(6, 6, 8, 8), (6, 8, 4, 4)]
    assert torch.equal(seen.embedding, seen.stages[-1].mean(dim=(2, 3)))
    terms.losses["Probing.rotation"].backward()
    assert student.low[0].weight.grad is not None
    assert not distiller.methods["Probing"].quiet.logits.requires_grad


def test_batches_of_every_form() -> None:
    distiller = built().eval()
    index = torch.arange(6)
    expected = distiller(Batch(IMAGES, LABELS), 0.5).total()
    for batch in ((IMAGES, LABELS), [IMAGES, LABELS], (IMAGES, LABELS, index)):
        assert torch.equal(distiller(batch, torch.tensor(0.5)).total(), expected)
    soft = nn.functional.one_hot(LABELS, 3).double()
    torch.testing.assert_close(distiller((IMAGES, soft), 0.5).total(), expected)
    assert Batch.of((IMAGES, LABELS)).labels is LABELS
    assert Batch.of((IMAGES, soft)).labels is None
    moved = Batch(IMAGES, LABELS, index).to("meta")
    assert (moved.images.device.type, moved.index.device.type, moved.labels) == ("meta", "meta", None)


def test_impossible_pairs_are_refused_with_the_reason() -> None:
    def make(*methods: Method) -> attar.Distiller:
        return attar.Distiller(Net(), methods, attar.Classification(3))

    class NeedsLabels(Probing):
        needs = frozenset({"labels"})

    with pytest.raises(AttarError, match="ONE is given 2 times"):
        make(ONE(), ONE())
    with pytest.raises(AttarError, match="NeedsLabels needs labels, which Supervised as configured takes away"):
        make(NeedsLabels(), Supervised(mixup=0.2))
    make(NeedsLabels(), Supervised(label_smoothing=0.1))

    class TwoTargets(Probing):
        claims = {"targets": "TwoTargets refines them"}  # noqa: RUF012

    with pytest.raises(AttarError, match="TwoTargets and Supervised cannot be combined, since both set the targets"):
        make(TwoTargets(), Supervised(label_smoothing=0.1))

    class GivesViewsAway(Probing):
        views = 2
        breaks = frozenset({"views"})

    class NeedsViews(Probing):
        views = 2

    with pytest.raises(AttarError, match="NeedsViews needs views, which GivesViewsAway as configured takes away"):
        make(GivesViewsAway(), NeedsViews())


def test_views_are_demanded() -> None:
    class TwoViews(Probing):
        views = 2

    distiller = built(TwoViews())
    assert distiller.views == 2
    with pytest.raises(AttarError, match="need 2 views of every image, but the batch holds 1"):
        distiller((IMAGES, LABELS), 0.5)


def test_task_is_required_and_outputs_are_checked() -> None:
    with pytest.raises(AttarError, match="Give the distiller a task"):
        attar.Distiller(Net())
    with pytest.raises(AttarError, match=r"returns \[2, 3\] instead of \[N, 10\]: build it with num_classes=10"):
        attar.Distiller(Net(), [], attar.Classification(10)).build(IMAGES.float())

    class Pair(Net):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(images), images

    with pytest.raises(AttarError, match="returns a tuple instead of one logits tensor"):
        attar.Distiller(Pair(), [], attar.Classification(3)).build(IMAGES.float())

    class PairInTraining(Net):
        def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return (super().forward(images), images) if self.training else super().forward(images)

    distiller = attar.Distiller(PairInTraining(), [], attar.Classification(3))
    with pytest.raises(AttarError, match="auxiliary outputs"):
        distiller.build(IMAGES.float())


def test_build_comes_first_and_once() -> None:
    distiller = attar.Distiller(Net(), [ONE()], attar.Classification(3))
    for use in (lambda: distiller((IMAGES, LABELS), 0.0), distiller.strip, lambda: distiller.anatomy):
        with pytest.raises(AttarError, match=r"build\(example_images\)"):
            use()
    with pytest.raises(AttarError, match=r"\[N, C, H, W\]"):
        distiller.build(IMAGES[0])
    distiller.build(IMAGES.float())
    with pytest.raises(AttarError, match="built already"):
        distiller.build(IMAGES.float())


def test_build_leaves_the_student_as_it_was() -> None:
    net = Net(batch_norm=True)
    net.low.eval()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    attar.Distiller(net, [ONE()], attar.Classification(3)).build(IMAGES.float())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]


class InPlace(nn.Module):
    """Its second stage overwrites the first one's output, by a module and functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2)
        self.second = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2))
        self.free = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.second(self.first(images))
        x += 1.0
        return self.head(self.free(x).mean(dim=(2, 3)))


def test_tapped_tensors_are_not_overwritten_and_strip_restores() -> None:
    class Tapping(Method):
        def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
            self.maps = outputs.stages
            return {"negative": outputs.stages[0].clamp(max=0).square().mean()}

    torch.manual_seed(0)
    net = InPlace()
    images = torch.randn(4, 3, 16, 16)
    method = Tapping()
    distiller = attar.Distiller(net, [method], attar.Classification(3), stages=["first", "second"]).build(images)
    terms = distiller((images, torch.tensor([0, 1, 2, 0])), 0.5)
    assert terms.losses["Tapping.negative"] > 0, "the ReLU of the second stage was applied to the tapped tensor"
    torch.testing.assert_close(method.maps[0], net.first(images))
    torch.testing.assert_close(method.maps[1], net.second(net.first(images)))
    terms.total().backward()
    assert (net.second[0].inplace, net.free[1].inplace) == (False, True)
    stripped = distiller.strip()
    assert (stripped.second[0].inplace, stripped.free[1].inplace) == (True, True)
    with torch.no_grad():
        assert torch.equal(stripped(images), net.eval()(images))


def test_strip_is_a_copy_and_training_goes_on() -> None:
    distiller = built(ONE()).train()
    stripped = distiller.strip()
    assert stripped is not distiller.student
    before = copy.deepcopy(stripped.state_dict())
    distiller((IMAGES, LABELS), 0.5).total().backward()
    torch.optim.SGD(distiller.parameters(), lr=0.1).step()
    assert all(torch.equal(value, before[key]) for key, value in stripped.state_dict().items())
    assert distiller.student.training
    again = distiller.strip(prove_export=False)
    assert not torch.equal(again.head.weight, stripped.head.weight)


def test_strip_proves_what_it_returns() -> None:
    distiller = built()
    distiller.student.extra = nn.Linear(2, 2)
    with pytest.raises(AttarError, match="original class and keys"):
        distiller.strip()

    class Unexportable(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * (1.0 if float(images.sum()) > -1e9 else 0.0)

    distiller = attar.Distiller(Unexportable(), [], attar.Classification(3)).build(IMAGES.float())
    with pytest.raises(AttarError, match=r"torch.export refuses .*prove_export=False"):
        distiller.strip()
    assert isinstance(distiller.strip(prove_export=False), Unexportable)

    class Restless(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + torch.rand(())

    distiller = attar.Distiller(Restless(), [], attar.Classification(3)).build(IMAGES.float())
    with pytest.raises(AttarError, match="to the last bit"):
        distiller.strip()
    with pytest.raises(AttarError, match=r"did you mean 'ONE\.ensemble'"):
        built(ONE()).strip(deployable="ONE.ensembel")


def test_a_built_distiller_is_saved_by_its_state() -> None:
    distiller = built(ONE())
    with pytest.raises(AttarError, match=r"state_dict\(\)"):
        copy.deepcopy(distiller)
    twin = built(ONE())
    twin.load_state_dict(distiller.state_dict())
    assert torch.equal(twin((IMAGES, LABELS), 0.1).total(), distiller((IMAGES, LABELS), 0.1).total())


def test_auxiliaries_follow_device_and_precision_of_the_images() -> None:
    distiller = attar.Distiller(Net().double(), [ONE()], attar.Classification(3)).build(IMAGES)
    assert {parameter.dtype for parameter in distiller.parameters()} == {torch.float64}


def test_epoch_start_reaches_every_method() -> None:
    class Counting(Probing):
        def epoch_start(self, epoch: int, epochs: int) -> None:
            self.last = (epoch, epochs)

    distiller = built(Counting())
    distiller.epoch_start(3, 10)
    assert distiller.methods["Counting"].last == (3, 10)


def test_labels_are_checked_where_data_are_set_up() -> None:
    task = attar.Classification(3)
    task.check_targets(LABELS)
    with pytest.raises(AttarError, match=r"0\.\.2, but the data hold 7"):
        task.check_targets(torch.tensor([0, 7]))
    with pytest.raises(AttarError, match="hold -1"):
        task.check_targets(torch.tensor([0, -1]))
    with pytest.raises(AttarError, match="at least two classes"):
        attar.Classification(1)


def test_docstring_examples_run() -> None:
    results = doctest.testmod(attar.distiller, raise_on_error=False)
    assert results.attempted > 0
    assert results.failed == 0
