"""Step 1's loop against plain PyTorch: updates, order, augmentation, rows, resume in the middle of an epoch."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks.plain import plain_train
from data.augment import random_crop_flip
from data.datasets import CIFAR10_NORMALIZATION, ImageSet
from engine.cuda_graph import record
from engine.training import SgdLoop, TrainConfig, make_recordable
from tests.mutations import MUTATIONS, ROOT
from tests.replay import Replay
from utils.seeding import seeded_generator

BATCHES = 4  # of an epoch: 16, 16, 16 and 2 images


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (50, 10, 10, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(50) % 5, 5)


def loop_of(images, flip=True, weights=0, **changes):
    torch.manual_seed(weights)
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    network = nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 5))
    config = TrainConfig(**{"epochs": 3, "batch_size": 16, "milestones": (), **changes})
    return SgdLoop(network, images, CIFAR10_NORMALIZATION, flip, config)


def augmented(pixels, seed, epoch, batch):
    pixels = random_crop_flip(pixels, seeded_generator(seed, "augmentation", epoch, batch), padding=4)
    mean, std = CIFAR10_NORMALIZATION.mean, CIFAR10_NORMALIZATION.std
    return torch.stack([TF.normalize(TF.to_tensor(image.numpy()), mean, std) for image in pixels])


def test_equals_plain_sgd(images):
    loop = loop_of(images)
    reference = copy.deepcopy(loop.network)
    batches = [
        (augmented(images.images[index], 0, epoch, batch), images.labels[index])
        for epoch in range(3)
        for batch, index in enumerate(loop.order(epoch))
    ]
    assert list(loop.steps()) == [16, 16, 16, 2] * 3
    plain_train(reference, batches)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(loop.network.state_dict()[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_rows_are_means_over_the_images_of_one_epoch(images):
    loop, logits, rows = loop_of(images), [], []
    loop.network.register_forward_hook(lambda network, inputs, output: logits.append(output.detach()))
    for _ in loop.steps():
        if loop.due():
            rows.append(loop.row())
    assert len(rows) == 3
    for epoch, row in enumerate(rows):
        answers = torch.cat(logits[BATCHES * epoch : BATCHES * (epoch + 1)])
        labels = images.labels[torch.cat(loop.order(epoch))]
        loss, right = F.cross_entropy(answers, labels).item(), (answers.argmax(1) == labels).sum().item()
        assert row == pytest.approx({"epoch": epoch + 1, "lr": 0.1, "train loss": loss, "train acc %": 2 * right})


def test_a_row_is_due_after_every_epoch_and_only_then(images):
    loop = loop_of(images)
    due = [loop.due(), *(loop.due() for _ in loop.steps())]
    assert [number for number, is_due in enumerate(due) if is_due] == [4, 8, 12]


def test_every_epoch_has_every_image_once_in_an_order_of_its_own(images):
    orders = [torch.cat(loop_of(images, seed=seed).order(epoch)).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert torch.cat(loop_of(images, weights=1).order(0)).tolist() == orders[0]


def test_every_batch_is_augmented_anew(images):
    batches = [
        loop_of(images, seed=seed).augmented(images.images, epoch, batch)
        for seed, epoch, batch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert not any(torch.equal(one, two) for n, one in enumerate(batches) for two in batches[:n])


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_only_where_the_dataset_allows_it(images, flip):
    rising = torch.arange(10, dtype=torch.uint8)[None, None, :, None].expand(50, 10, 10, 3)
    batch = loop_of(images, flip).augmented(rising, 0, 0)
    mirrored = batch[:, 0, 4, 5] < batch[:, 0, 4, 4]  # wherever the crop lies, these are pixels of the image
    assert mirrored.any() == flip and not mirrored.all()


def test_step_schedule():
    config = TrainConfig()
    rates = [config.learning_rate(epoch) for epoch in (0, 99.9, 100, 149.9, 150, 199.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_one_cycle_schedule():
    config = TrainConfig(epochs=10, lr=0.2, lr_schedule="one-cycle", milestones=())
    rates = [config.learning_rate(epoch) for epoch in (0, 1.5, 3, 6.5, 10)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.1, 0])


def test_every_batch_is_updated_at_the_rate_of_its_middle(images):
    loop = loop_of(images, lr_schedule="one-cycle")
    rates = [loop.optimizer.param_groups[0]["lr"] for _ in loop.steps()]
    assert rates == pytest.approx([loop.config.learning_rate((batch + 0.5) / BATCHES) for batch in range(12)])
    loop = loop_of(images, milestones=(1, 2))
    rows = [loop.row()["lr"] for _ in loop.steps() if loop.due()]
    assert rows == pytest.approx([0.1, 0.01, 0.001])


def test_the_loss_is_computed_in_float32_under_bfloat16(images):
    loop, seen = loop_of(images, precision=torch.bfloat16), []
    loop.network.register_forward_hook(lambda network, inputs, output: seen.append(output.detach()))
    loss, _ = loop.train_batch(torch.arange(16), 0, 0)
    assert seen[0].dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(seen[0].float(), images.labels[:16]).item(), rel=1e-6)


@pytest.mark.parametrize("interrupted_after", [2, 4, 6])
def test_resumes_exactly(images, interrupted_after):
    def rows(loop):
        return [loop.row() for _ in loop.steps() if loop.due()]

    through, broken, resumed = loop_of(images), loop_of(images), loop_of(images, weights=1)
    expected, file, before = rows(through), io.BytesIO(), []
    for _ in broken.steps():
        if broken.due():
            before.append(broken.row())
        if broken.done == interrupted_after:
            break
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    assert before + rows(resumed) == expected
    for name, value in through.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name


# ---- as on CUDA: recorded, with the learning rate a tensor


def recordable_loop(images, **changes):
    loop = loop_of(images, **{"lr_schedule": "one-cycle", **changes})
    make_recordable(loop.optimizer)
    return loop


@pytest.fixture
def recording(monkeypatch):
    """Record as on CUDA; the recordings made."""
    made = []

    def recorded(iterate, changed, batch):
        before = [part.detach().clone() for part in changed]
        made.append(record(iterate, changed, batch, Replay()))
        assert all(map(torch.equal, changed, before)), "neither the warm-up nor the comparison leaves a trace"
        return made[-1]

    monkeypatch.setattr("engine.training.replayed", recorded)
    return made


def all_tensors(loop):
    return [part for part in tree_leaves(loop.state_dict()) if torch.is_tensor(part)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_recorded_training_is_the_training(images, recording, monkeypatch, capsys, precision):
    recorded, eager = (recordable_loop(images, precision=precision) for _ in range(2))
    rows = [recorded.row() for _ in recorded.steps() if recorded.due()]
    assert len(recording) == 1 and recording[0] != recorded._update and capsys.readouterr().out == ""
    monkeypatch.undo()
    assert rows == [eager.row() for _ in eager.steps() if eager.due()]
    assert all(map(torch.equal, all_tensors(recorded), all_tensors(eager)))


def test_only_full_batches_are_recorded(images, recording):
    loop, sizes = recordable_loop(images), []
    loop.network.register_forward_hook(lambda network, inputs, output: sizes.append(len(output)))
    list(loop.steps())
    assert sizes == [16] * 4 + [2] * 3  # three runs to warm up, the recording; then the replays call no hook


def test_a_rate_that_is_a_tensor_and_momenta_that_are_zero_change_nothing_but_rounding(images):
    ours, plain = recordable_loop(images), loop_of(images, lr_schedule="one-cycle")
    for ours_done, plain_done in zip(ours.steps(), plain.steps(), strict=True):
        assert ours_done == plain_done
    for one, other in zip(all_tensors(ours), all_tensors(plain), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interrupted_after", [0, 3, 6])
@pytest.mark.parametrize("early", [False, True])
def test_a_recorded_training_resumes_exactly(images, recording, interrupted_after, early):
    """Whether or not the loop that is restored has made a recording of its own."""
    through, broken, resumed = (recordable_loop(images, weights=weights) for weights in (0, 0, 1))
    list(through.steps())
    list(itertools.islice(broken.steps(), interrupted_after))
    if early:
        next(resumed.steps())
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    list(resumed.steps())
    assert all(map(torch.equal, all_tensors(resumed), all_tensors(through)))


def test_what_is_saved_holds_numbers_whatever_device_it_comes_from(images, recording):
    """A state saved on CUDA goes on on a CPU, and the other way round, even one from before the first step."""
    for make, other in ((recordable_loop, loop_of), (loop_of, recordable_loop)):
        for steps in (0, 2):
            saving, loading = make(images), other(images, weights=1, lr_schedule="one-cycle")
            list(itertools.islice(saving.steps(), steps))
            saved = saving.state_dict()
            assert {type(group["lr"]) for group in saved["optimizer"]["param_groups"]} == {float}
            loading.load_state_dict(copy.deepcopy(saved))
            assert next(loading.steps()) == 16
            assert isinstance(loading.optimizer.param_groups[0]["lr"], torch.Tensor) == (other is recordable_loop)


def test_every_mutation_can_be_made():
    """Its text is in its file exactly once, so that the list keeps up with the code."""
    found = {each.name: (ROOT / each.file).read_text().count(each.old) for each in MUTATIONS}
    assert len(found) == len(MUTATIONS)
    assert {name: count for name, count in found.items() if count != 1} == {}
