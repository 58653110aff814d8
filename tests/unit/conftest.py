"""Settings of the unit tests: no deadlines (machines differ), and one thread (the tensors are small)."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("unit")
torch.set_num_threads(1)
