"""Break the code in one place after the other and see whether the tests notice.

All, or those whose name contains one of the words given (a copy of the checkout is changed, never the checkout):
    python -m tests.mutations [NAME ...]

Prints one row a mutation and ends with status 1 if one survives, or if its text is no longer there exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 120  # seconds a mutation; one that makes a loop endless is killed by it
PASSED, FAILED = 0, 1  # exit statuses of pytest; others mean that no test ran


class Mutation(NamedTuple):
    """A change: ``old``, once in ``file``, becomes ``new``, which ``tests`` must notice: a file and a -k expression."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def _of(file: str, *mutations: tuple[str, str, str, str]) -> list[Mutation]:
    return [Mutation(name, file, old, new, tests) for name, old, new, tests in mutations]


MUTATIONS = [
    *_of(
        "defenses/patches.py",
        (
            "patches: as large as they like",
            "return Patches(targets, _bounded(found.masks, area), found.patterns)",
            "return found",
            "test_trigger_free.py -k as_large_as",
        ),
        (
            "patches: images of the class itself",
            "others = images[labels != target]",
            "others = images",
            "test_trigger_free.py -k class_itself",
        ),
        (
            "patches: the second network is forgotten",
            "if avoid is not None:",
            "if False:",
            "test_trigger_free.py -k fail_on_another",
        ),
        (
            "patches: pixels that were not normalised",
            "(inputs * std + mean)",
            "inputs",
            "test_trigger_free.py -k normalised",
        ),
    ),
    *_of(
        "defenses/trigger_free.py",
        (
            "trigger-free: one failure is enough",
            "if all(pair)), None)",
            "if pair[0]), None)",
            "test_trigger_free.py -k fails_once",
        ),
        (
            "trigger-free: the weakest patch counts",
            "reached(logits_of(count), every, labels).max())",
            "reached(logits_of(count), every, labels).min())",
            "test_trigger_free.py -k strongest",
        ),
        (
            "trigger-free: a patch that was not learnt",
            "if reached(0) < LEARNT:",
            "if False:",
            "test_trigger_free.py -k behind_the_accuracy_cap",
        ),
        (
            "trigger-free: benign networks are pruned",
            "if not detection.backdoored:",
            "if False:",
            "test_trigger_free.py -k nothing_is_pruned",
        ),
        (
            "trigger-free: no cap",
            "lowest = accuracy(0) - cap",
            "lowest = -1",
            "test_trigger_free.py -k grid_ends",
        ),
        (
            "trigger-free: fewer than the paper's threshold",
            "[each for each in counts if each >= floor]",
            "counts",
            "test_trigger_free.py -k at_least",
        ),
        (
            "trigger-free: the paper's threshold is no point",
            "sorted({*grid(len(neurons)), threshold_point(neurons, PAPER_THRESHOLD).count})",
            "list(grid(len(neurons)))",
            "test_trigger_free.py -k at_least",
        ),
    ),
    *_of(
        "defenses/detection.py",
        (
            "detector: the smallest margin",
            "found.append(margin.view(len(group), -1).amax(1))",
            "found.append(margin.view(len(group), -1).amin(1))",
            "test_detection.py -k best_of",
        ),
        (
            "detector: NaN is an answer",
            "if not bool(torch.isfinite(logits).all()):",
            "if False:",
            "test_detection.py -k answers_nan",
        ),
        (
            "detector: noise away from the class",
            "yield -F.cross_entropy",
            "yield F.cross_entropy",
            "test_detection.py -k neuron_that",
        ),
        (
            "detector: running statistics",
            "layer.training = isinstance(layer, NoisyBatchNorm)",
            "layer.training = False",
            "test_detection.py -k neuron_that",
        ),
        ("detector: one class is many tests", "expm1(count * ", "expm1(1 * ", "test_detection.py -k gamma"),
        ("detector: a class among its own others", "~torch.eye(", "0 <= torch.eye(", "test_detection.py -k gamma"),
        (
            "detector: combined as one statistic",
            "torch.tensor(len(values), dtype=torch.float64)",
            "torch.tensor(1, dtype=torch.float64)",
            "test_detection.py -k class_by_class",
        ),
        (
            "detector: the most certain statistic alone",
            ".log().sum(0)",
            ".log().amin(0)",
            "test_detection.py -k class_by_class",
        ),
        (
            "detector: the assignment has the whole level",
            "p_value, suspect = assignment.p_value / ALL_TO_ALL_SHARE, None",
            "p_value, suspect = assignment.p_value, None",
            "test_detection.py -k tenth_of_the_level",
        ),
        (
            "detector: an assignment of a few images",
            "minlength=CLASSES).min()) >= PER_CLASS:",
            "minlength=CLASSES).max()) >= PER_CLASS:",
            "test_detection.py -k without_a_reference",
        ),
        (
            "detector: noise of the last batch alone",
            "slopes = [slope + each for slope",
            "slopes = [each for slope",
            "test_detection.py -k climbs_the_sum",
        ),
        (
            "detector: images of the class itself",
            "(clean.labels != int(target)).nonzero()[:count, 0]",
            "clean.labels.nonzero()[:count, 0]",
            "test_detection.py -k class_itself",
        ),
    ),
    *_of(
        "defenses/all_to_all.py",
        (
            "all-to-all: confusion that goes both ways",
            "confusion - confusion.T",
            "confusion",
            "test_detection.py -k look_alike",
        ),
        (
            "all-to-all: the next assignment shares pairs",
            "flow[sources, targets] = -torch.inf",
            "flow[sources[:1], targets[:1]] = -torch.inf",
            "test_detection.py -k no_pair",
        ),
        (
            "all-to-all: a class may stay where it is",
            "flow.fill_diagonal_(-torch.inf)",
            "pass",
            "test_detection.py -k assigned_to_itself",
        ),
    ),
    *_of(
        "defenses/tuning.py",
        (
            "FT: gradients of pruned neurons",
            "parameter.grad.mul_(kept)",
            "parameter.grad.mul_(1)",
            "test_defenses.py -k stay_pruned",
        ),
        (
            "FT: shifts of pruned neurons are trained",
            "kept | _not_zero(bias)",
            "kept | True",
            "test_defenses.py -k shift_that_was_pruned",
        ),
        (
            "FT: shifts that ANP leaves are held",
            "kept | _not_zero(bias)",
            "kept",
            "test_defenses.py -k shift_that_was_pruned",
        ),
        ("FT: the rate never drops", "DROP if iteration >=", "1 if iteration >=", "test_defenses.py -k rate_drops"),
        (
            "FT: BatchNorm in eval mode",
            "self.network.train()",
            "self.network.eval()",
            "test_defenses.py -k its_rate_drops",
        ),
    ),
    *_of(
        "defenses/fine_pruning.py",
        (
            "FP: channels are the second axis whatever the layer",
            "output.movedim(-1, 1) if ends_with_channels(layer, output) else output",
            "output",
            "test_defenses.py -k channels_of",
        ),
        (
            "FP: the over-pruned network is kept",
            "part[channel] = value",
            "part[channel] = 0",
            "test_defenses.py -k last_good",
        ),
        ("FP: goes on after the tolerance", "if self.done == self.pruned and", "if", "test_defenses.py -k last_good"),
        ("FP: most active first", "activations.argsort(", "(-activations).argsort(", "test_defenses.py -k last_good"),
        (
            "FP: activations before ReLU",
            "maps.relu().double()",
            "maps.double()",
            "test_defenses.py -k last_convolution",
        ),
    ),
    *_of(
        "defenses/mode_connectivity.py",
        (
            "MCR: ends swapped",
            "(1 - t) ** 2, 2 * t * (1 - t), t**2",
            "t**2, 2 * t * (1 - t), (1 - t) ** 2",
            "test_defenses.py -k from_one_network",
        ),
        (
            "MCR: statistics not measured anew",
            "measure_statistics(network, run)",
            "network.eval()",
            "test_defenses.py -k statistics",
        ),
        (
            "MCR: full gradient for the middle",
            "self.descend(share * (",
            "self.descend((",
            "test_defenses.py -k share_of_the_gradient",
        ),
        ("MCR: the middle begins at one end", "(start + end) / 2", "start", "test_defenses.py -k from_one_network"),
    ),
    *_of(
        "models/statistics.py",
        (
            "MCR: statistics with momentum",
            "norm.momentum = None",
            "norm.momentum = 0.1",
            "test_defenses.py -k statistics",
        ),
        ("MCR: statistics not reset", "        norm.reset_running_stats()\n", "", "test_defenses.py -k statistics"),
    ),
    *_of(
        "defenses/attention_distillation.py",
        (
            "NAD: a module that runs twice ends a stage",
            "if size and times[name] == 1:",
            "if size:",
            "test_defenses.py -k no_stage",
        ),
        (
            "NAD: maps not normalised",
            "F.normalize(features.float().square().sum(1).flatten(1), eps=SMALLEST)",
            "features.float().square().sum(1).flatten(1)",
            "test_defenses.py -k unit_norm",
        ),
        (
            "NAD: pooled maps are a stage",
            "output[0, 0].numel() > 1",
            "output[0, 0].numel() > 0",
            "test_defenses.py -k stages_end",
        ),
    ),
    *_of(
        "defenses/channel_lipschitz.py",
        ("CLP: scale left out", "ord=2) * scale", "ord=2)", "test_defenses.py -k singular"),
        ("CLP: variance for deviation", "+ norm.eps).sqrt()", "+ norm.eps)", "test_defenses.py -k singular"),
        (
            "CLP: least sensitive channels",
            "bounds > bounds.mean()",
            "bounds < bounds.mean()",
            "test_defenses.py -k planted",
        ),
    ),
    *_of(
        "defenses/sharpness_aware.py",
        (
            "FT-SAM: not scaled twice",
            "self.config.rho * weight.abs() * part",
            "self.config.rho * part",
            "test_defenses.py -k perturbed_weights",
        ),
        (
            "FT-SAM: step from the perturbed weights",
            "tensor.copy_(value)",
            "pass",
            "test_defenses.py -k perturbed_weights",
        ),
    ),
    *_of(
        "defenses/ban.py",
        (
            "BAN: noise lowers the loss",
            "+ self.config.eps * g.sign()",
            "- self.config.eps * g.sign()",
            "test_defenses.py -k both_losses",
        ),
        (
            "BAN: running statistics see the noise",
            "name: buffer.clone() for",
            "name: buffer for",
            "test_defenses.py -k noise_is",
        ),
    ),
    *_of(
        "engine/training.py",
        (
            "step 1: weight decay 0",
            "weight_decay=config.weight_decay",
            "weight_decay=0",
            "test_training.py -k plain_sgd",
        ),
        ("step 1: no momentum", "momentum=config.momentum,", "momentum=0,", "test_training.py -k plain_sgd"),
        ("step 1: gradients never zeroed", "        self.optimizer.zero_grad()\n", "", "test_training.py -k plain_sgd"),
        (
            "step 1: BatchNorm in eval mode",
            "        self.network.train()\n",
            "        self.network.eval()\n",
            "test_training.py -k plain_sgd",
        ),
        (
            "step 1: cross entropy in bf16",
            "F.cross_entropy(logits.float(), labels)",
            "F.cross_entropy(logits, labels)",
            "test_training.py -k bfloat16",
        ),
        (
            "step 1: accuracy inverted",
            "(logits.argmax(1) == labels)",
            "(logits.argmax(1) != labels)",
            "test_training.py -k rows_are_means",
        ),
        (
            "step 1: rows are means over batches",
            "loss, right / count, weight=count",
            "loss, right / count",
            "test_training.py -k rows_are_means",
        ),
        ("step 1: one-cycle peak at 50 %", "WARM_UP = 0.3", "WARM_UP = 0.5", "test_training.py -k one_cycle"),
        (
            "step 1: milestones one epoch late",
            "epoch >= milestone",
            "epoch >= milestone + 1",
            "test_training.py -k step_schedule",
        ),
        (
            "step 1: rate drops just after its milestone",
            "epoch >= milestone",
            "epoch > milestone",
            "test_training.py -k step_schedule",
        ),
        (
            "step 1: learning rate of a batch's beginning",
            "(batch + 0.5) / self.batches",
            "batch / self.batches",
            "test_training.py -k middle",
        ),
        (
            "step 1: schedule never applied",
            "        set_learning_rate(self.optimizer, self.learning_rate(self.time(epoch, batch)))\n",
            "",
            "test_training.py -k middle",
        ),
        (
            "step 1: learning rate logged of the next epoch",
            "self.learning_rate(epoch - 0.5)",
            "self.learning_rate(epoch)",
            "test_training.py -k middle",
        ),
        (
            "step 1: same order in every epoch",
            "seeded_generator(self.config.seed, name, epoch)",
            "seeded_generator(self.config.seed, name)",
            "test_training.py -k order_of_its_own",
        ),
        (
            "step 1: order ignores the seed",
            "seeded_generator(self.config.seed, name, epoch)",
            "seeded_generator(0, name, epoch)",
            "test_training.py -k order_of_its_own",
        ),
        (
            "step 1: same augmentation in every epoch",
            "name, epoch, batch, device",
            "name, batch, device",
            "test_training.py -k anew",
        ),
        (
            "step 1: last short batch dropped",
            "return order.split(self.config.batch_size)",
            "return order.split(self.config.batch_size)[:-1]",
            "test_training.py -k order_of_its_own",
        ),
        (
            "step 1: mirrored although the dataset forbids it",
            "make_transform(normalization, flip)",
            "make_transform(normalization, True)",
            "test_training.py -k mirrored",
        ),
        (
            "step 1: row one batch early",
            "self.done > 0 and self.done % self.batches == 0",
            "self.done > 0 and (self.done + 1) % self.batches == 0",
            "test_training.py -k due",
        ),
        (
            "step 1: resumed without the epoch's sums",
            '("network", "optimizer", "means")',
            '("network", "optimizer")',
            "test_training.py -k resumes",
        ),
        (
            "step 1: resumed without momentum",
            '("network", "optimizer", "means")',
            '("network", "means")',
            "test_training.py -k resumes",
        ),
        (
            "step 1: resumed epoch begins anew",
            "list(enumerate(self.order(epoch)))[start:]",
            "list(enumerate(self.order(epoch)))",
            "test_training.py -k resumes",
        ),
    ),
    *_of(
        "engine/drive.py",
        (
            "drive: sums not reset after a row",
            "        self.sums.zero_()\n        self.weight = 0\n        return",
            "        return",
            "test_training.py -k rows_are_means",
        ),
        ("drive: row logged twice", "if logged != loop.done:", "if True:", "test_drive.py -k interrupted"),
        (
            "drive: row with the same first column dropped",
            "if logged != loop.done:",
            "if not log.rows or next(iter(log.rows[-1].values())) != next(iter(row.values())):",
            "test_drive.py -k every_row",
        ),
        (
            "drive: last logged row forgotten",
            'loop.state_dict(), "logged": logged}',
            'loop.state_dict(), "logged": None}',
            "test_drive.py -k interrupted",
        ),
        (
            "drive: interrupted row lost",
            'loop.state_dict(), "logged": logged}',
            'loop.state_dict(), "logged": loop.done}',
            "test_drive.py -k interrupted",
        ),
        (
            "drive: no row before the first step",
            "        yield from rows()\n        for _",
            "        for _",
            "test_drive.py -k every_row",
        ),
        (
            "drive: saved state ignored",
            '        loop.load_state_dict(run.saved["loop"])\n',
            "        pass\n",
            "test_drive.py -k killed",
        ),
        (
            "drive: measured only where the row is new",
            "report = measure()",
            "report = measure() if logged != loop.done else None",
            "test_drive.py -k interrupted",
        ),
    ),
    *_of(
        "engine/cuda_graph.py",
        (
            "graph: state not put back",
            "                    part.copy_(value)\n",
            "                    pass\n",
            "test_cuda_graph.py -k trace",
        ),
        (
            "graph: state put back from itself",
            "before = [part.detach().clone() for part in changed]",
            "before = list(changed)",
            "test_cuda_graph.py -k trace",
        ),
        (
            "graph: inputs never refreshed",
            "            static.copy_(fresh)\n",
            "            pass\n",
            "test_cuda_graph.py -k recorded_function",
        ),
        (
            "graph: results overwritten by the next replay",
            "tuple(output.clone() for output in outputs)",
            "outputs",
            "test_cuda_graph.py -k recorded_function",
        ),
        (
            "graph: what cannot be recorded ends the run",
            "except Exception as error:",
            "except KeyboardInterrupt as error:",
            "test_cuda_graph.py -k goes_on",
        ),
        (
            "graph: the reason is that of the capture's end",
            "error.__context__ or error",
            "error",
            "test_cuda_graph.py -k goes_on",
        ),
        (
            "graph: nothing is compared",
            "if not _agree(eager, outcome(lambda: replay(batch))):",
            "if False:",
            "test_cuda_graph.py -k goes_on",
        ),
        (
            "graph: what an iteration changes is not compared",
            "for part in (*run(), *changed)]",
            "for part in run()]",
            "test_cuda_graph.py -k state_alone",
        ),
        (
            "graph: random numbers are not put back",
            "with torch.random.fork_rng(gpus):",
            "if True:",
            "test_cuda_graph.py -k goes_on",
        ),
        (
            "graph: nearly the same is enough",
            "allowed = SPREAD * max(map(_difference, one, other))",
            "allowed = 0.01",
            "test_cuda_graph.py -k single_bit",
        ),
        (
            "graph: a loop has to repeat its bits",
            "allowed = SPREAD * max(map(_difference, one, other))",
            "allowed = 0",
            "test_cuda_graph.py -k differs_from_itself",
        ),
        (
            "graph: NaNs differ",
            " | (one.isnan() & other.isnan())",
            "",
            "test_cuda_graph.py -k not_finite",
        ),
        (
            "graph: waiting is found only in the capture",
            "with _waiting_refused():",
            "if True:",
            "test_cuda_graph.py -k waits",
        ),
        (
            "graph: waiting is refused for ever",
            "        torch.cuda.set_sync_debug_mode(before)\n",
            "        pass\n",
            "test_cuda_graph.py -k waits",
        ),
        (
            "graph: the stream of a failed capture stays in use",
            "        with torch.cuda.stream(self._stream):\n            try:",
            "        if True:\n            try:",
            "test_cuda_graph.py -k capture_that_fails",
        ),
        (
            "graph: the generator of a failed capture stays in use",
            "                _renew_generator(before)\n",
            "",
            "test_cuda_graph.py -k capture_that_fails",
        ),
        (
            "graph: a failed run may still be writing",
            "        finally:  # also what failed halfway may still be writing\n",
            "        finally:\n            pass\n        if True:\n",
            "test_cuda_graph.py -k waits",
        ),
    ),
    *_of(
        "engine/training.py",
        (
            "step 1: momenta not put back after the warm-up",
            ", *self.network.buffers(), *momenta]",
            ", *self.network.buffers()]",
            "test_training.py -k recorded_training",
        ),
        (
            "step 1: statistics not put back after the warm-up",
            ", *self.network.buffers(), *momenta]",
            ", *momenta]",
            "test_training.py -k recorded_training",
        ),
        (
            "step 1: momenta begin within the recording",
            'optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))',
            "pass",
            "test_training.py -k recorded_training",
        ),
        (
            "step 1: the rate of the recording for ever",
            'group["lr"].fill_(rate)',
            'group["lr"] = torch.tensor(rate)',
            "test_training.py -k recorded_training",
        ),
        (
            "step 1: a tensor is saved as learning rate",
            '            group["lr"] = float(group["lr"])\n',
            "            pass\n",
            "test_training.py -k saved_holds",
        ),
        (
            "step 1: a restored rate stays a number",
            "    optimizer.register_load_state_dict_post_hook(complete)\n",
            "",
            "test_training.py -k saved_holds",
        ),
        (
            "step 1: kernels outlive the momenta that they write",
            "        self._update_full = None  # its",
            "        # its",
            "test_training.py -k resumes_exactly",
        ),
        (
            "step 1: the short batch is replayed, too",
            "if len(labels) < self.config.batch_size:",
            "if False:",
            "test_training.py -k full_batches",
        ),
    ),
    *_of(
        "models/generator.py",
        (
            "generator: half the way to the neighbour",
            "x.lerp(after, 0.25)",
            "x.lerp(after, 0.5)",
            "test_attacks.py -k double",
        ),
        (
            "generator: the GPU's way everywhere",
            'doubled(x) if x.device.type == "cuda" else super().forward(x)',
            "doubled(x)",
            "test_attacks.py -k always_did",
        ),
    ),
    *_of(
        "defenses/anp.py",
        (
            "step 2: momentum not restored after the warm-up",
            "changed = state.mask, state.momentum\n",
            "changed = (state.mask,)\n",
            "test_anp.py -k recorded",
        ),
        (
            "step 2: noise from 0..eps",
            "(config.eps * (2 * noise - 1))",
            "(config.eps * noise)",
            "test_anp.py -k whole_ball",
        ),
        (
            "step 2: cross entropy in bf16",
            "logits = network(images).float()",
            "logits = network(images)",
            "test_anp.py -k float32_under_bfloat16",
        ),
        (
            "step 2: no augmentation",
            "self.configs, self.transform, self.state):",
            "self.configs, lambda x, _: ((x / 255 - 0.45) / 0.2).permute(0, 3, 1, 2), self.state):",
            "test_anp.py -k augmented",
        ),
        (
            "step 2: another dataset's std",
            "make_transform(subject.normalization,",
            "make_transform(type(subject.normalization)(subject.normalization.mean, (0.25,) * 3),",
            "test_anp.py -k augmented",
        ),
        (
            "step 2: mirrored although the dataset forbids it",
            "make_transform(subject.normalization, subject.flip)",
            "make_transform(subject.normalization, True)",
            "test_anp.py -k augmented",
        ),
        (
            "step 2: natural and perturbed loss swapped",
            "return loss, natural_loss.detach(), perturbed_loss.detach(), accuracy",
            "return loss, perturbed_loss.detach(), natural_loss.detach(), accuracy",
            "test_anp.py -k step_reports",
        ),
        (
            "step 2: accuracy inverted",
            "(logits.argmax(1) == labels)",
            "(logits.argmax(1) != labels)",
            "test_anp.py -k step_reports",
        ),
        (
            "step 2: alpha and 1 - alpha swapped",
            "config.alpha * natural + (1 - config.alpha) * perturbed",
            "(1 - config.alpha) * natural + config.alpha * perturbed",
            "test_anp.py -k plain_loop",
        ),
        (
            "step 2: the natural gradient alone",
            "gradient = _each(_mix, configs, gradient, perturbed_gradient)",
            "pass",
            "test_anp.py -k plain_loop",
        ),
        (
            "step 2: the natural loss alone is reported",
            "loss = _each(_mix, configs, loss, perturbed_loss.detach())",
            "pass",
            "test_anp.py -k step_reports",
        ),
        ("step 2: momentum dropped", "mul_(config.momentum)", "mul_(0)", "test_anp.py -k plain_loop"),
        ("step 2: masks not clamped", ".clamp_(0, 1)", "", "test_anp.py -k plain_loop"),
        (
            "step 2: the perturbation descends",
            "noise + config.eps / config.steps * gradient.sign()",
            "noise - config.eps / config.steps * gradient.sign()",
            "test_anp.py -k ascent",
        ),
        (
            "step 2: ascent steps of eps",
            "config.eps / config.steps * gradient",
            "config.eps * gradient",
            "test_anp.py -k noise_bounds",
        ),
        ("step 2: never projected", "if config.project else", "if False else", "test_anp.py -k noise_bounds"),
        (
            "step 2: running statistics within an iteration",
            "            layer.training = isinstance(layer, NoisyBatchNorm)",
            "            layer.training = False",
            "test_anp.py -k plain_loop",
        ),
        (
            "step 2: dropout on within an iteration",
            "            layer.training = isinstance(layer, NoisyBatchNorm)",
            "            network.train()",
            "test_anp.py -k dropout",
        ),
        (
            "step 2: dropout inside a BatchNorm on",
            "            layer.training = isinstance(layer, NoisyBatchNorm)",
            "            layer.train()",
            "test_anp.py -k dropout",
        ),
        (
            "step 2: statistics of other layers within an iteration",
            "            layer.training = isinstance(layer, NoisyBatchNorm)",
            "            layer.training = True",
            "test_without_batchnorm.py -k only_masks_change",
        ),
        (
            "step 2: networks without a bias fail",
            ", materialize_grads=True",
            "",
            "test_without_batchnorm.py -k from_masks_to_pruning",
        ),
        (
            "step 2: noise of scale and shift swapped",
            "layer.weight_noise, layer.bias_noise = d, x",
            "layer.weight_noise, layer.bias_noise = x, d",
            "test_anp.py -k plain_loop",
        ),
        (
            "step 2: same batch in every iteration",
            '"mask iteration", iteration,',
            '"mask iteration",',
            "test_anp.py -k drawn_with_replacement",
        ),
        (
            "step 2: batches ignore the seed",
            "seeded_generator(config.seed,",
            "seeded_generator(0,",
            "test_anp.py -k seed_decides",
        ),
        (
            "step 2: labels of other images",
            "return batch, labels[index],",
            "return batch, labels[index.flip(0)],",
            "test_anp.py -k labels_stay",
        ),
        (
            "step 2: resumed without its running means",
            '        self.means.load_state_dict(state["means"])\n',
            "",
            "test_anp.py -k saved_loop",
        ),
        (
            "step 2: resumed without momentum",
            '        self.state.momentum.copy_(state["momentum"])\n',
            "",
            "test_anp.py -k saved_loop",
        ),
        (
            "step 2: row one iteration early",
            "return self.done % self.row_every == 0",
            "return (self.done + 1) % self.row_every == 0",
            "test_anp.py -k since_the_row_before",
        ),
        ("step 2: no row at the end", " or self.done == self.total", "", "test_anp.py -k since_the_row_before"),
        (
            "seeds at once: all draw the batches of the first",
            "iteration, transform) for config in configs]",
            "iteration, transform) for config in [configs[0]] * len(configs)]",
            "test_seeds.py -k is_alone",
        ),
        (
            "seeds at once: a network that mixes images is taken",
            "if not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):",
            "if False:",
            "test_seeds.py -k know_no_runs",
        ),
        (
            "seeds at once: whatever the settings",
            "if any(replace(each, seed=first.seed, eps=first.eps, alpha=first.alpha) != first for each in configs):",
            "if False:",
            "test_seeds.py -k go_together",
        ),
    ),
    *_of(
        "formats/outputs.py",
        (
            "seeds at once: --overwrite leaves masks behind",
            "_of_seeds(MASKS), _of_seeds(PRUNING)",
            "MASKS, _of_seeds(PRUNING)",
            "test_seeds.py -k overwriting",
        ),
    ),
    *_of(
        "optimize_mask_cifar.py",
        (
            "seeds at once: memory of one",
            "len(folders) * config.batch_size",
            "config.batch_size",
            "test_seeds.py -k memory",
        ),
        (
            "seeds at once: --seed beside --seeds",
            "if args.seeds and args.seed is not None:",
            "if False:",
            "test_seeds.py -k contradict",
        ),
        (
            "step 2: eps and alpha swapped",
            "from_flags(AnpConfig, args, precision=runtime.precision)",
            "from_flags(AnpConfig, args, precision=runtime.precision, eps=args.anp_alpha, alpha=args.anp_eps)",
            "test_scripts.py -k every_flag_of_step_2",
        ),
        (
            "step 2: --anp-project ignored",
            "from_flags(AnpConfig, args, precision=runtime.precision)",
            "from_flags(AnpConfig, args, precision=runtime.precision, project=False)",
            "test_scripts.py -k every_flag_of_step_2",
        ),
        (
            "step 2: --seed ignored",
            "from_flags(AnpConfig, args, precision=runtime.precision)",
            "from_flags(AnpConfig, args, precision=runtime.precision, seed=0)",
            "test_scripts.py -k every_flag_of_step_2",
        ),
    ),
    *_of(
        "train_backdoor_cifar.py",
        (
            "step 1: weights ignore the seed",
            'seeded_weights(args.seed, "initial weights")',
            'seeded_weights(0, "initial weights")',
            "test_scripts.py -k test_the_seed_decides and train",
        ),
        (
            "step 1: trains on the defender's images",
            "held = attacker_index(permutation)",
            "held = permutation",
            "test_scripts.py -k attacker_holds",
        ),
    ),
    *_of(
        "prune_neuron_cifar.py",
        (
            "step 3: chooses by test accuracy",
            "row.report.defender.accuracy",
            "row.report.clean.accuracy",
            "test_scripts.py -k operating_point",
        ),
        (
            "step 3: chooses by the ASR",
            "row.report.defender.accuracy",
            "1 - row.report.triggered.accuracy",
            "test_scripts.py -k operating_point",
        ),
        (
            "step 3: neurons in file order",
            "sort_neurons(read_masks(args.mask_file, subject.network))",
            "read_masks(args.mask_file, subject.network)[::-1]",
            "test_scripts.py -k operating_point",
        ),
        (
            "step 3: saves the last network of the sweep",
            "loop.neurons[: choice.point.count]",
            "loop.neurons[: loop.points[-1].count]",
            "test_scripts.py -k operating_point",
        ),
    ),
    *_of(
        "defenses/pruning.py",
        (
            "step 3: the first point within the drop",
            "return max(number for",
            "return min(number for",
            "test_pruning.py -k operating_point or choice",
        ),
        (
            "step 3: drop taken for a share",
            "accuracies, max_drop / 100",
            "accuracies, max_drop",
            "test_pruning.py -k choice",
        ),
    ),
    *_of(
        "engine/sweep.py",
        (
            "sweep: report of another point",
            "self.rows[-1].point.count == point.count",
            "self.rows[-1].point.count <= point.count",
            "test_pruning.py -k measures_the_pruned",
        ),
        (
            "sweep: resumed with an unpruned network",
            "copy.deepcopy(self.network).eval(), 0",
            "copy.deepcopy(self.network).eval(), self.rows[-1].point.count if self.rows else 0",
            "test_pruning.py -k saved_sweep",
        ),
        (
            "sweep: the network itself is pruned",
            "copy.deepcopy(self.network).eval(), 0",
            "self.network.eval(), 0",
            "test_pruning.py -k measures_the_pruned",
        ),
        (
            "sweep: the chosen point reported as the last",
            "return known[0] if known",
            "return self.rows[-1].report if known",
            "test_pruning.py -k any_point",
        ),
    ),
    *_of(
        "engine/evaluation.py",
        ("evaluation: in train mode", "_folded(network.eval())", "_folded(network)", "test_pruning.py -k train_mode"),
        (
            "evaluation: not normalised",
            "normalize(images, normalization).to(precision)",
            "images.permute(0, 3, 1, 2).to(precision)",
            "test_pruning.py -k mean_over_samples",
        ),
        (
            "evaluation: mean of batch means",
            'reduction="sum")',
            'reduction="mean") * batch_size',
            "test_pruning.py -k mean_over_samples",
        ),
        (
            "evaluation: cross accuracy with an image's own trigger",
            "torch.arange(1, len(images) + 1)",
            "torch.arange(len(images))",
            "test_attacks.py -k trigger_of_each_test_image",
        ),
    ),
    *_of(
        "models/neurons.py",
        ("masks: not rounded", "round(mask, MASK_DECIMALS)", "mask", "test_anp.py -k same_number"),
        (
            "pruning: threshold excluded",
            "bisect_right(neurons",
            "bisect_left(neurons",
            "test_pruning.py -k thresholds_are_exact",
        ),
        (
            "pruning: the shift is zeroed",
            "network.get_submodule(layer).weight[indices] = 0",
            "network.get_submodule(layer).bias[indices] = 0",
            "test_pruning.py -k gamma",
        ),
    ),
    *_of(
        "utils/machine.py",
        (
            "memory: too much is let through",
            "free is not None and needed > free",
            "free is not None and needed > 2 * free",
            "test_memory.py -k check",
        ),
        (
            "machine: only the tightest group's own limit",
            "for depth in range(len(parts) + 1)",
            "for depth in [len(parts)]",
            "test_machine.py -k tightest",
        ),
        (
            "machine: files that are kept count as used memory",
            'used = (_number(group / use) or 0) - (_number(group / "memory.stat", cached) or 0)',
            "used = _number(group / use) or 0",
            "test_machine.py -k free_memory",
        ),
        (
            "machine: idle time counts as busy",
            "sum(sum(row) - row[3] - row[4] for row in times)",
            "sum(sum(row) for row in times)",
            "test_machine.py -k busy_cpus",
        ),
    ),
    *_of(
        "engine/memory.py",
        (
            "memory: what is gone is still counted",
            "self.now -= self._sizes.pop(storage)",
            "self._sizes.pop(storage)",
            "test_memory.py -k alive_at_once",
        ),
        (
            "memory: networks are built",
            'with torch.device("meta"):',
            'with torch.device("cpu"):',
            "test_memory.py -k bytes_of_parameters",
        ),
    ),
    *_of(
        "engine/runtime.py",
        (
            "runtime: threads in spite of others",
            "config.threads or min(cpus.free, PYTORCH_THREADS)",
            "config.threads or PYTORCH_THREADS",
            "test_machine.py -k threads_of_a_run",
        ),
        (
            "runtime: a resumed run chooses anew",
            "return replace(config, **before)",
            "return config",
            "test_machine.py -k resumed_run_goes_on",
        ),
    ),
    *_of(
        "models/noisy_layers.py",
        (
            "BatchNorm: the images of another run",
            "[self._of_one_run(*part) for part in parts])",
            "[self._of_one_run(*part) for part in parts][::-1])",
            "test_seeds.py -k is_alone",
        ),
        (
            "BatchNorm: running statistics drift",
            "F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)",
            "F.batch_norm(x, self.running_mean, self.running_var, weight, bias, True, 0.1, self.eps)",
            "test_models.py -k plain_batchnorm",
        ),
        (
            "BatchNorm: a subclass changes its running statistics",
            "buffer if buffer is None else buffer.clone()",
            "buffer",
            "test_models.py -k own_forward_sees",
        ),
        (
            "BatchNorm: a subclass is asked to track statistics",
            "track_running_stats=self.track_running_stats and not self.training",
            "track_running_stats=self.track_running_stats",
            "test_models.py -k own_forward",
        ),
        (
            "BatchNorm: a subclass without use for its weight is converted",
            "if not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):",
            "if False:",
            "test_models.py -k own_forward_that_cannot",
        ),
        (
            "BatchNorm: the mask scales the shift too",
            "            return bias\n",
            "            return None if bias is None else bias * self.mask\n",
            "test_models.py -k effective",
        ),
        (
            "other layers: the noise of the bias is added",
            "along_first(1 + self.bias_noise, bias)",
            "along_first(self.bias_noise, bias)",
            "test_without_batchnorm.py -k on_the_weights_themselves",
        ),
        (
            "other layers: masks along the last dimension",
            "along_first(scale, weight)",
            "scale",
            "test_without_batchnorm.py -k on_the_weights_themselves",
        ),
        (
            "other layers: a mask of its own is overwritten",
            "if taken := _NAMES & set(dir(layer)):",
            "if taken := set():",
            "test_without_batchnorm.py -k cannot_be_masked",
        ),
    ),
    *_of(
        "models/neuron_layers.py",
        (
            "neurons: the logits are some, too",
            "if name != last[-1] and not",
            "if not",
            "test_without_batchnorm.py -k which_layers",
        ),
        (
            "neurons: other norms beside BatchNorms",
            "    if norms:\n        return norms\n",
            "",
            "test_without_batchnorm.py -k which_layers",
        ),
        (
            "neurons: weights of two layers",
            'if owners[id(layer._parameters["weight"])] > 1:',
            "if False:",
            "test_without_batchnorm.py -k cannot_be_masked",
        ),
        (
            "neurons: convolutions with a forward of their own",
            "and not _computes_as_torch(type(layer)):",
            "and False:",
            "test_without_batchnorm.py -k cannot_be_masked",
        ),
    ),
    *_of(
        "formats/subject.py",
        (
            "defender gets the attacker's images",
            "defender_index(permutation, share)",
            "defender_index(permutation.flip(0), share)",
            "test_scripts.py -k defender_holds",
        ),
        (
            "evaluated on the training set",
            "test, clean = loaded.dataset.test, subject.judging",
            "test, clean = loaded.dataset.train, subject.judging",
            "test_scripts.py -k defender_holds",
        ),
        (
            "evaluated with the dataset's normalisation",
            "Evaluator(test, loaded.attack, subject.normalization",
            "Evaluator(test, loaded.attack, loaded.dataset.normalization",
            "test_scripts.py -k normalisation",
        ),
        (
            "defender mirrors whatever the dataset says",
            "normalization, dataset.flip, clean, described",
            "normalization, True, clean, described",
            "test_scripts.py -k mirrored",
        ),
    ),
    *_of(
        "models/compact.py",
        (
            "compact: the constants that go are forgotten",
            "weight[:, kept] = torch.einsum(",
            "torch.einsum(",
            "test_compact.py -k border or every_architecture",
        ),
        (
            "compact: constants pass through padded depthwise convolutions",
            "values.masked_fill(values != 0, torch.nan) if padded else sums",
            "sums",
            "test_compact.py -k depthwise",
        ),
        (
            "compact: an activation is forgotten",
            "            values = layer(values)\n",
            "            pass\n",
            "test_compact.py -k stand_in_between",
        ),
        (
            "compact: a layer without channels",
            "    if not keep.any():\n",
            "    if False:\n",
            "test_compact.py -k zeros_keeps",
        ),
        (
            "compact: never compared",
            "if not worst <= limit:",
            "if False:",
            "test_compact.py -k something_else",
        ),
        (
            "compact: averages over padding are constants",
            "and not (averages and (padded or",
            "and not (averages and (False or",
            "test_compact.py -k averages",
        ),
        (
            "compact: channels that code counts may go",
            "index == 0 or (isinstance(first, int) and first >= 2)",
            "isinstance(first, int)",
            "test_compact.py -k not_understood",
        ),
        (
            "compact: a shared weight changes for both",
            "chain.width).clone()",
            "chain.width)",
            "test_compact.py -k two_layers",
        ),
    ),
    *_of(
        "formats/repaired.py",
        (
            "compact: the card does not say so",
            '{**card, "compact": True, **costs[1]',
            "{**card, **costs[1]",
            "test_compact.py -k measures_the_same",
        ),
    ),
    *_of(
        "formats/network.py",
        (
            "compact: loaded at full width",
            "    if compact:\n",
            "    if False:\n",
            "test_compact.py -k comes_back",
        ),
        (
            "networks loaded in train mode",
            "network.to(memory_format=torch.channels_last).eval()",
            "network.to(memory_format=torch.channels_last)",
            "test_attacks.py -k loaded_for_evaluation",
        ),
        (
            "normalisation of the card ignored",
            "getattr(config, name), known.get(name))",
            "getattr(config, name), None)",
            "test_scripts.py -k normalisation",
        ),
    ),
    *_of(
        "data/split.py",
        (
            "split: the defender's share from the end",
            "return permutation[:count]",
            "return permutation.flip(0)[:count]",
            "test_data.py -k split_of_the_paper",
        ),
    ),
    *_of(
        "data/datasets.py",
        (
            "data: signs are mirrored",
            "GTSRB_NORMALIZATION, False)",
            "GTSRB_NORMALIZATION, True)",
            "test_datasets.py -k mirrored",
        ),
        (
            "data: constants of a folder are means of squares",
            "(squares * pixels - total**2) / pixels**2",
            "squares / pixels",
            "test_datasets.py -k constants",
        ),
        (
            "data: the same labels are the same images",
            "        digest.update(images.numpy())\n",
            "",
            "test_datasets.py -k known_again",
        ),
    ),
    *_of(
        "data/pictures.py",
        (
            "pictures: huge ones only warned of",
            'simplefilter("error")',
            'simplefilter("ignore")',
            "test_datasets.py -k pillow",
        ),
        (
            "pictures: memory not counted",
            "len(paths) * height * width * 3, what",
            "0, what",
            "test_datasets.py -k memory_is_counted",
        ),
        ("pictures: formats of programs", "formats=FORMATS", "formats=None", "test_datasets.py -k postscript"),
        (
            "pictures: transparency of palettes applied",
            'picture.info.pop("transparency", None)',
            "picture.info",
            "test_datasets.py -k any_kind",
        ),
    ),
    *_of(
        "data/image_folder.py",
        (
            "folders: classes may differ",
            "sorted(train.keys() ^ test.keys())",
            "[]",
            "test_datasets.py -k another_class",
        ),
        (
            "folders: trained on the test set",
            "places = _find_parts(folder)",
            "places = _find_parts(folder)[::-1]",
            "test_datasets.py -k torchvision_reads",
        ),
    ),
    *_of(
        "data/published.py",
        (
            "published: any pickle is opened",
            "if found != files[name]:",
            "if False:",
            "test_datasets.py -k another_checksum",
        ),
        (
            "published: half an archive is a dataset",
            "    if found != expected:",
            "    if False:",
            "test_datasets.py -k belong_together",
        ),
        (
            "published: pictures anywhere",
            "if Path(name).name != name",
            "if not name",
            "test_datasets.py -k belong_together",
        ),
    ),
    *_of(
        "models/resnet.py",
        (
            "networks: narrow ones end the process",
            "traced or not (self.training",
            "True or not (self.training",
            "test_models.py -k narrow_networks",
        ),
        (
            "networks: shortcuts read other pixels",
            "x[:, :, ::step, ::step]",
            "x[:, :, 1::step, ::step]",
            "test_models.py -k narrow_networks",
        ),
    ),
    *_of(
        "formats/network.py",
        (
            "networks: a folder of other classes",
            'known.get("classes", found["classes"]) != found["classes"]',
            "False",
            "test_datasets.py -k other_pictures",
        ),
        (
            "networks: a folder never lies elsewhere",
            "given != known and not moved",
            "given != known",
            "test_datasets.py -k elsewhere",
        ),
    ),
    *_of(
        "engine/evaluation.py",
        (
            "evaluation: as many large images at once",
            "EVALUATION_BATCH * 32 * 32 // (height * width)",
            "EVALUATION_BATCH",
            "test_evaluation.py -k large_ones",
        ),
    ),
    *_of(
        "data/triggers.py",
        (
            "trigger: wrong beyond image 1,000",
            "index[part].cpu()",
            "index[: len(images[part])].cpu()",
            "test_attacks.py -k own_trigger_however",
        ),
        (
            "trigger: all-to-all aims one class too far",
            "(images.labels + 1) % images",
            "(images.labels + 2) % images",
            "test_attacks.py -k own_trigger_however",
        ),
        (
            "trigger: images of the target class count",
            "clean_test.labels != target)",
            "clean_test.labels >= 0)",
            "test_data.py -k leaves_out_the_target",
        ),
        (
            "trigger: opacity ignored",
            "(kept + self.alpha * pattern)",
            "(kept + pattern)",
            "test_data.py -k stamping_formula",
        ),
    ),
    *_of(
        "data/augment.py",
        ("augmentation: never mirrored", "    if flip:\n", "    if False:\n", "test_data.py -k crop_and_flip"),
        ("augmentation: always mirrored", "    if flip:\n", "    if True:\n", "test_training.py -k mirrored"),
    ),
    *_of(
        "attacks/attack.py",
        (
            "attacks: drawn from the target class",
            "draw_poisoned(train.labels != self.poison_target",
            "draw_poisoned(train.labels == self.poison_target",
            "test_attacks.py -k what_is_poisoned",
        ),
        (
            "attacks: same images whatever the seed",
            'seeded_generator(seed, "poisoned images")',
            'seeded_generator(0, "poisoned images")',
            "test_attacks.py -k which_images",
        ),
        (
            "attacks: the given set itself is stamped",
            "images, new = train.images.clone(), train",
            "images, new = train.images, train",
            "test_attacks.py -k stays_as_it_is",
        ),
        (
            "attacks: every label becomes the target",
            "new[index_there] = labels[index_there]",
            "new = labels",
            "test_attacks.py -k what_is_poisoned",
        ),
        (
            "attacks: trained as if any dataset could be mirrored",
            "dataset.normalization, dataset.flip, config",
            "dataset.normalization, True, config",
            "test_scripts.py -k mirrored",
        ),
    ),
    *_of(
        "attacks/sig.py",
        (
            "SIG: drawn from other classes",
            "train.labels == self.poison_target",
            "train.labels != self.poison_target",
            "test_attacks.py -k what_is_poisoned and sig",
        ),
        (
            "SIG: labels change",
            '"add"), index)',
            '"add"), index, (train.labels + 1) % 10)',
            "test_attacks.py -k what_is_poisoned and sig",
        ),
    ),
    *_of(
        "attacks/clean_label.py",
        (
            "clean-label: labels change",
            "return stamp_and_relabel(replace(train, images=images), self._trigger(train), index)",
            "return stamp_and_relabel(train, self._trigger(train), index, (train.labels + 1) % 10)",
            "test_attacks.py -k from_python",
        ),
        (
            "clean-label: the surrogate is not made ready",
            "network = inference_copy(surrogate, precision).requires_grad_(False)",
            "network = surrogate.requires_grad_(False)",
            "test_attacks.py -k from_python",
        ),
        (
            "clean-label: drawn from other classes",
            "draw_poisoned(train.labels == self.poison_target",
            "draw_poisoned(train.labels != self.poison_target",
            "test_attacks.py -k label_builds",
        ),
    ),
    *_of(
        "attacks/pgd.py",
        (
            "PGD: images become easier",
            "images.detach() + step_size",
            "images.detach() - step_size",
            "test_attacks.py -k raises_the_loss",
        ),
        ("PGD: outside its ball", ".clamp(low, high)", ".clamp(0, 255)", "test_attacks.py -k raises_the_loss"),
    ),
    *_of(
        "attacks/input_aware.py",
        (
            "input-aware: no rotation",
            "PADDING, DEGREES = 5, 10.0",
            "PADDING, DEGREES = 5, 0.0",
            "test_attacks.py -k rotated",
        ),
        (
            "input-aware: padding 4",
            "PADDING, DEGREES = 5, 10.0",
            "PADDING, DEGREES = 4, 10.0",
            "test_attacks.py -k rotated",
        ),
        ("input-aware: Adam of the textbook", "(0.5, 0.9)", "(0.9, 0.999)", "test_attacks.py -k adam"),
        (
            "input-aware: both augmentations equal",
            '"second augmentation")',
            '"augmentation")',
            "test_attacks.py -k rotated",
        ),
        (
            "input-aware: both orders equal",
            '("order", "second order")',
            '("order", "order")',
            "test_attacks.py -k independent_orders",
        ),
        (
            "input-aware: gradients pile up",
            "        optimizer.zero_grad()\n",
            "        pass\n",
            "test_attacks.py -k last_step_alone",
        ),
        (
            "input-aware: cross images with the attacker's label",
            "labels = torch.cat([targets, labels[own:]])",
            "labels = torch.cat([targets, self.attack.targets(replace(self.train, labels=labels[own:]))])",
            "test_attacks.py -k against_the_formulas",
        ),
        (
            "input-aware: cross images with their own trigger",
            "self._apply(images_1[own:end], images_2[own:end])",
            "self._apply(images_1[own:end], images_1[own:end])",
            "test_attacks.py -k against_the_formulas",
        ),
        (
            "input-aware: the mask generator learns on",
            "self.pattern_net.train(), self.mask_net.eval()",
            "self.pattern_net.train(), self.mask_net.train()",
            "test_attacks.py -k own_networks",
        ),
        (
            "input-aware: resumed without the mask's optimiser",
            '"optimizer", "mask_optimizer", "pattern_optimizer"',
            '"optimizer", "pattern_optimizer"',
            "test_attacks.py -k goes_on_exactly and iab",
        ),
        (
            "input-aware: resumed without the pattern's optimiser",
            '"optimizer", "mask_optimizer", "pattern_optimizer"',
            '"optimizer", "mask_optimizer"',
            "test_attacks.py -k goes_on_exactly and iab",
        ),
    ),
    *_of(
        "utils/run.py",
        (
            "run: results replaced without --overwrite",
            "if not (self.saved or self.overwriting or self.complete_before):",
            "if False:",
            "test_faults.py -k are_there",
        ),
        (
            "run: inputs in the folders of seeds overwritten",
            "{folder.resolve(): begin for begin, folder in self._folders().items()}",
            '{output: ""}',
            "test_seeds.py -k overwriting",
        ),
        ("run: inputs overwritten", "            self._protect_inputs()\n", "", "test_faults.py -k what_step_3_writes"),
        ("run: links not followed", "Path(os.path.realpath(each)), link", "link, link", "test_faults.py -k a_link_to"),
        (
            "run: links overwritten",
            "Path(os.path.realpath(each)), link",
            "Path(os.path.realpath(each)),",
            "test_faults.py -k a_link_in",
        ),
        (
            "run: what later steps made survives",
            "(self.outputs.derived if self.overwriting else ())",
            "()",
            "test_faults.py -k along",
        ),
        (
            "run: cleared before a full disk is noticed",
            "older = [path for path in self._there(patterns) if path != self._log_path]",
            "older = [path.unlink() for path in self._there(patterns) if path != self._log_path][:0]",
            "test_faults.py -k full_disk",
        ),
        (
            "run: leftovers taken for results",
            "if unfinished else self._there(self.outputs.files)",
            "if False else self._there(self.outputs.files)",
            "test_faults.py -k failed_run_left",
        ),
        ("run: torn state saved", "if not error.at_once:", "if True:", "test_faults.py -k second_signal"),
        (
            "run: a damaged state is a bug",
            "(LookupError, TypeError, ValueError, AttributeError, RuntimeError)",
            "(ZeroDivisionError,)",
            "test_faults.py -k edited",
        ),
    ),
    *_of(
        "utils/identity.py",
        (
            "run: files compared by their names",
            "- files[0].keys() - files[1].keys()",
            "",
            "test_faults.py -k may_differ",
        ),
        (
            "run: a replaced file is not noticed",
            "old, new = files[0].get(name), files[1].get(name)",
            "old = new = files[0].get(name)",
            "test_scripts.py -k replaced_checkpoint",
        ),
    ),
    *_of(
        "utils/guard.py",
        (
            "run: memory is a bug",
            "if complaint := as_one_line(error):",
            "if complaint := None:",
            "test_faults.py -k too_little_memory",
        ),
    ),
    *_of(
        "utils/signals.py",
        (
            "signals: a second one waits too",
            "if self._deferring and not self._pending:",
            "if self._deferring:",
            "test_faults.py -k second_signal",
        ),
        (
            "signals: late ones count",
            "    _handle_all(signal.SIG_IGN)\n",
            "    pass\n",
            "test_faults.py -k many_signals",
        ),
    ),
    *_of(
        "utils/files.py",
        (
            "files: pipes are opened",
            "if not stat.S_ISREG(status.st_mode):",
            "if False:",
            "test_faults.py -k a_device_as",
        ),
        (
            "files: any size",
            "if limit is not None and status.st_size > limit:",
            "if False:",
            "test_faults.py -k megabytes or gigabytes",
        ),
        ("files: checksums ignored", "damaged = archive.testzip()", "damaged = None", "test_faults.py -k flipped"),
        (
            "files: archives are unpacked",
            "if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):",
            "if False:",
            "test_faults.py -k grows",
        ),
        (
            "files: byte order marks stay",
            'content.decode("utf-8-sig")',
            "content.decode()",
            "test_faults.py -k order_mark",
        ),
        (
            "files: a full disk without a name",
            "raise OSError(error.errno, error.strerror, str(path)) from error",
            "raise",
            "test_faults.py -k full_disk",
        ),
    ),
    *_of(
        "utils/errors.py",
        (
            "errors: escapes reach the terminal",
            "super().__init__(printable(message))",
            "super().__init__(message)",
            "test_faults.py -k python_caller",
        ),
        (
            "errors: values quoted whole",
            "text if len(text) <= QUOTED else",
            "text if True else",
            "test_faults.py -k long",
        ),
    ),
    *_of(
        "engine/drive.py",
        (
            "drive: any number of steps is done",
            "if type(loop.done) is not int or not 0 <= loop.done <= loop.total:",
            "if False:",
            "test_faults.py -k edited",
        ),
    ),
    *_of(
        "formats/cards.py",
        (
            "cards: links to nothing are no cards",
            "os.path.lexists(card_file)",
            "card_file.exists()",
            "test_faults.py -k card",
        ),
        (
            "cards: texts are numbers",
            "type(value) in (int, float) and value in within",
            "float(value) in within",
            "test_faults.py -k text_for_a_number",
        ),
    ),
    *_of(
        "formats/checkpoints.py",
        (
            "checkpoints: negative variances",
            "bool((tensor < 0).any())",
            "False",
            "test_faults.py -k negative_variances",
        ),
    ),
    *_of(
        "formats/layouts.py",
        (
            "checkpoints: one prefix alone",
            "while known and (prefix",
            "if known and (prefix",
            "test_files.py -k layouts",
        ),
        (
            "checkpoints: averaged weights refused",
            "for name in names if name != AVERAGED]",
            "for name in names]",
            "test_files.py -k layouts",
        ),
        (
            "layouts: other data types written back",
            ".to(content[name].dtype)",
            "",
            "test_layouts.py -k new_weights",
        ),
    ),
    *_of(
        "formats/triggered_folder.py",
        (
            "triggered images: links out of the folder",
            "(folder / name).resolve().is_relative_to(folder.resolve())",
            "name",
            "test_triggered_folder.py -k tables",
        ),
        (
            "triggered images: of the target class, too",
            "if row.label != row.target]",
            "]",
            "test_triggered_folder.py -k left_out",
        ),
    ),
    *_of(
        "utils/files.py",
        (
            "options: names that Python calls",
            'name[:2] != "__"',
            "name",
            "test_layouts.py -k names_that_python_calls",
        ),
    ),
    *_of(
        "formats/trigger_file.py",
        (
            "triggers: empty ones",
            "if not alpha.any() or not mask.any():",
            "if False:",
            "test_faults.py -k trigger_without",
        ),
        (
            "triggers: any size",
            "if value.numel() > LARGEST.get(key, ENTRIES):",
            "if False:",
            "test_faults.py -k gigabytes",
        ),
    ),
    *_of(
        "formats/fetch.py",
        (
            "fetch: sizes are not compared",
            "if wanted.size is not None and size != wanted.size:",
            "if False:",
            "test_fetch.py -k misbehaves",
        ),
        (
            "fetch: digests are not compared",
            "if wanted.sha256 is not None and found != wanted.sha256:",
            "if False:",
            "test_fetch.py -k misbehaves",
        ),
        ("fetch: pages are kept", "if start.startswith(PAGE_STARTS):", "if False:", "test_fetch.py -k misbehaves"),
        ("fetch: a file without end", "if self.left < 0:", "if False:", "test_fetch.py -k latest"),
        ("fetch: what is wrong is kept", "part.unlink(missing_ok=True)", "pass", "test_fetch.py -k misbehaves"),
        ("fetch: nothing is remembered", "if found != expected:", "if False:", "test_fetch.py -k recorded"),
    ),
    *_of(
        "formats/zoo.py",
        ("zoo: files are not compared", 'if found != known["sha256"]:', "if False:", "test_zoo.py -k of_the_index"),
        (
            "zoo: paths lead out of the index",
            "not all(_NAME.fullmatch(step) for step in place.parts)",
            "False",
            "test_zoo.py -k fault",
        ),
        (
            "zoo: paths lead out of a folder",
            "and place.resolve() in path.resolve().parents",
            "",
            "test_zoo.py -k put_by_hand",
        ),
        ("zoo: names before files", "if os.path.lexists(given):", "if False:", "test_zoo.py -k goes_first"),
    ),
    *_of(
        "formats/zoo_upkeep.py",
        ("zoo: cards decide what is written", "if word in UNFIT_FLAGS:", "if False:", "test_zoo.py -k not_carried_out"),
        ("zoo: any figure is right", "<= allowed[name] for", ">= 0 for", "test_zoo.py -k something_else"),
    ),
    *_of(
        "formats/network.py",
        ("own network: a card names the code", 'if "model" in card:', "if False:", "test_own_network.py -k never_run"),
    ),
    *_of(
        "utils/identity.py",
        (
            "own network: another function is the same",
            'f"{files[name]} {value.function}"',
            "files[name]",
            "test_own_network.py -k another_run",
        ),
    ),
    *_of(
        "benchmarks/meter.py",
        (
            "speed: only a peak that falls is noticed",
            "max(before[name], after[name]) > BUSY * min(before[name], after[name])",
            "before[name] > BUSY * after[name]",
            "test_speed.py -k tenth",
        ),
        ("speed: half the FLOPs of a peak", "calls * 2 * batch", "calls * batch", "test_speed.py -k peak_counts"),
        ("speed: the slowest stretch", "best = min(", "best = max(", "test_speed.py -k peak_counts"),
        (
            "speed: user annotations counted as kernels",
            " and not event.is_user_annotation",
            "",
            "test_speed.py -k nothing_twice",
        ),
        (
            "speed: conversions taken for convolutions",
            "conv(?!ert)",
            "conv",
            "test_speed.py -k convolution_or_product",
        ),
        ("speed: events not waited for", "    last.record()\n", "", "test_speed.py -k between_events"),
    ),
    *_of(
        "defenses/perturbation.py",
        ("perturbation: beyond the eps-ball", "project=True", "project=False", "test_perturbation.py -k size"),
        (
            "perturbation: random ones inside the eps-ball",
            "eps * drawn.sign()",
            "eps * drawn",
            "test_perturbation.py -k size",
        ),
        ("perturbation: every draw is the first", ", draw, device", ", 0, device", "test_perturbation.py -k seed"),
        (
            "perturbation: statistics of the batch in any case",
            ' and config.statistics == "batch"',
            "",
            "test_perturbation.py -k itself",
        ),
        (
            "perturbation: right answers counted as wrong",
            "1 - right / len(clean)",
            "right / len(clean)",
            "test_perturbation.py -k planted",
        ),
        (
            "perturbation: masks play a part",
            "mask = torch.ones(",
            "mask = 0.5 * torch.ones(",
            "test_perturbation.py -k size",
        ),
    ),
    *_of(
        "formats/plots.py",
        (
            "figures: a band of nothing",
            "values.min(0), values.max(0)",
            "values.max(0), values.max(0)",
            "test_figures.py -k several_runs",
        ),
        (
            "figures: lines go on where a run has ended",
            "if low <= place <= high",
            "if low <= place",
            "test_figures.py -k straight",
        ),
        (
            "figures: the mean is the first run",
            "values.mean(0), markevery",
            "values[0], markevery",
            "test_figures.py -k several_runs",
        ),
        (
            "figures: errors drawn as the target class",
            'zip(panels, ("error %", "target %"), strict=True)',
            'zip(panels, ("error %", "error %"), strict=True)',
            "test_figures.py -k two_networks",
        ),
    ),
    *_of(
        "benchmarks/figures.py",
        (
            "figures: the sweep by number is not looked at",
            "(rows[0], rows[-1])",
            "(rows[0], rows[0])",
            "test_figures.py -k each_axis",
        ),
        (
            "figures: a run counts twice",
            "names.count(name) > 1",
            "names.count(name) > 2",
            "test_figures.py -k one_line",
        ),
        (
            "figures: excerpts are drawn",
            'if run.get("excerpt"):',
            'if run.get("none"):',
            "test_figures.py -k bad_sweeps",
        ),
        (
            "figures: what is there is replaced",
            "if there and not args.overwrite",
            "if False and not args.overwrite",
            "test_figures.py -k only_when_asked",
        ),
        (
            "figures: the target of another network first",
            "(given, each.target, *known)",
            "(given, *known)",
            "test_figures.py -k whose_target",
        ),
    ),
    *_of(
        "engine/parallel.py",
        (
            "several processes: gradients of one half",
            "(self._size * loss).backward()",
            "loss.backward()",
            "test_parallel.py -k updates_of_one",
        ),
        (
            "several processes: mean of means",
            'reduction="sum") / len(batch[1])',
            'reduction="sum") / max(1, len(labels)) / self._size',
            "test_parallel.py -k updates_of_one",
        ),
        (
            "several processes: BatchNorm sees its own share",
            "        dist.all_reduce(total)\n",
            "",
            "test_parallel.py -k updates_of_one",
        ),
        (
            "several processes: an update is cut short by a signal",
            "    ignore_all()\n    return guard(",
            "    return guard(",
            "test_parallel.py -k end_silently",
        ),
    ),
    *_of(
        "benchmarks/loops.py",
        (
            "speed: one epoch and no further",
            "chain.from_iterable(repeat(loader))",
            "iter(loader)",
            "test_speed.py -k next_epoch",
        ),
        (
            "speed: an incomplete last batch",
            "len(index) - len(index) % self.batch_size",
            "len(index)",
            "test_speed.py -k split_file",
        ),
        (
            "speed: the defender's images of another split",
            "defender_index(setup.permutation,",
            "defender_index(torch.arange(len(setup.permutation)),",
            "test_speed.py -k split_file",
        ),
        (
            "speed: joint phase timed as mask phase",
            "jointly * loop.mask_epochs * loop.batches",
            "0",
            "test_speed.py -k both_phases",
        ),
    ),
    *_of(
        "benchmarks/speed.py",
        ("speed: no warm-up", "        loop()  # warm-up\n", "        pass\n", "test_speed.py -k warm_up"),
        (
            "speed: the worse peak counts",
            "max(before[name], after[name])",
            "before[name]",
            "test_speed.py -k better_one",
        ),
        ("speed: ratios of a busy machine", "    if not signs:\n", "    if True:\n", "test_speed.py -k busy_machine"),
        (
            "speed: a busy machine is no failure",
            "    if signs:\n",
            "    if False:\n",
            "test_speed.py -k busy_machine",
        ),
        (
            "speed: steps train one network on",
            "network=copy.deepcopy(setup.network)",
            "network=setup.network",
            "test_speed.py -k same_network",
        ),
        ("speed: a result replaced", "if path and Path(path).exists()", "if False", "test_speed.py -k one_line"),
    ),
]


def copy_checkout(to: Path) -> None:
    """Copy all files that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def run_tests(file: str, expression: str, folder: Path, limit: float) -> int | None:
    """Return pytest's exit status, None where it took too long."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"]
    command += [f"tests/{file}", "-k", expression]
    # Without compiled files: a change within the same second would not be noticed.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return None


def fails_without_mutation(chosen: list[Mutation], folder: Path) -> bool:
    """Say whether some test fails as it is, and so would kill anything."""
    expressions = defaultdict(set)
    for each in chosen:
        file, expression = each.tests.split(" -k ")
        expressions[file].add(f"({expression})")
    runs = (run_tests(file, " or ".join(sorted(of)), folder, 20 * LIMIT) for file, of in expressions.items())
    return any(status != PASSED for status in runs)


def outcome(mutation: Mutation, folder: Path) -> str:
    """Apply a mutation in a copy of the checkout, run its tests, and take it back."""
    path = folder / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return "NOT FOUND" if mutation.old not in text else "NOT UNIQUE"
    path.write_text(text.replace(mutation.old, mutation.new))
    status = run_tests(*mutation.tests.split(" -k "), folder, LIMIT)
    path.write_text(text)
    return {PASSED: "SURVIVED", FAILED: "killed", None: "killed by time"}.get(status, f"NO TEST RAN ({status})")


def main(words: list[str]) -> int:
    """Try the mutations whose names contain one of the words, or all; return the exit status."""
    chosen = [each for each in MUTATIONS if not words or any(word in each.name for word in words)]
    width, escaped = max(len(each.name) for each in MUTATIONS), 0
    with tempfile.TemporaryDirectory() as name:
        copy_checkout(Path(name))
        if fails_without_mutation(chosen, Path(name)):
            print("the tests fail without a mutation")
            return 1
        for each in chosen:
            started = time.monotonic()
            found = outcome(each, Path(name))
            escaped += not found.startswith("killed")
            print(f"{each.name:{width}}  {found:14}  {time.monotonic() - started:5.1f} s", flush=True)
    print(f"{len(chosen) - escaped} of {len(chosen)} killed")
    return int(escaped > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
