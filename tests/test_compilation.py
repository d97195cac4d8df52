import logging

import numpy as np
import pytest
import torch

from tasks.compilation import compiled
from tasks.recipe import Augmentation, TrainConfig
from tasks.samples import Samples
from tasks.training import train


def test_without_a_compiler_the_network_stays_as_it_is_and_the_log_says_why(caplog):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    weights = network[1].weight.detach().clone()
    before = torch.get_rng_state()
    with fresh_cache(), config.patch({"cpp.cxx": ("no-such-compiler",)}), caplog.at_level(logging.WARNING):
        found = compiled(network, lambda: torch.ones(4, 4, 4, 3), wanted=True)
    assert found is network and "not compiled, the training runs as it is" in caplog.text
    assert torch.equal(network[1].weight, weights) and torch.equal(before, torch.get_rng_state())


def test_nothing_is_tried_where_it_is_not_wanted():
    network = torch.nn.Linear(3, 3)
    assert compiled(network, lambda: pytest.fail("asked for images"), wanted=False) is network


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_training_is_the_same_training():
    random = np.random.default_rng(0)
    labels = (np.arange(48) % 2).astype(np.int64)
    images = random.normal((90 + 40 * labels)[:, None, None, None], 50, (48, 16, 16, 3)).clip(0, 255).astype(np.uint8)
    samples = Samples(images, labels, np.array([str(n) for n in range(48)]))
    config = TrainConfig(
        architecture="tinyvgg",
        pretrained=False,
        image_size=16,
        epochs=2,
        batch_size=16,
        augmentation=Augmentation(quarter_turns=True),
        precision="float32",
    )
    plain = train(samples, samples, ("dark", "light"), config)
    fast = train(samples, samples, ("dark", "light"), config.model_copy(update={"compile": True}))
    for one, other in zip(plain.epochs, fast.epochs, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-3)
        assert other.validation_loss == pytest.approx(one.validation_loss, rel=1e-3)
    assert set(fast.network.state_dict()) == set(plain.network.state_dict()), "no name of a wrapper in the weights"
