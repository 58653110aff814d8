"""A training run that is stopped on its way, and one that goes on from there."""

import torch

from eos_search.training.train import Run
from support.interruptions import broken_off

CPU = torch.device("cpu")


def goes_on_to_the_weights_of(whole, folder, recipe):
    """Stopped in front of step 3, counted from 0, of stage ``full``; checkpoints come every 2 steps."""
    broken = Run(folder, CPU, 0, recipe)
    assert not broken.begin({"git": "first"})
    here = ("full", 3)
    with broken_off(broken, "_one_step", lambda stage, *_: (stage.name, broken.step) == here, KeyboardInterrupt()):
        broken.train()
    again = Run(folder, CPU, 0, recipe)
    assert again.begin({"git": "second"})
    assert again.origins == [{"git": "first"}, {"git": "second"}]
    assert (again.stage, again.step) == (2, 2)
    again.train()
    for name, value in whole.trainee.state_dict().items():
        assert torch.equal(value, again.trainee.state_dict()[name]), name
